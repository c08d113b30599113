"""`taskarith fragments`: what it lists, shows and copies."""

from pathlib import Path

import pytest
from cli_support import fails, run, run_json
from hyperpyyaml import load_hyperpyyaml

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.fragments import fragment_names, fragment_path

EMFORMER = "transducer/emformer_medium"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder, as the present one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_lists_every_fragment_in_a_sentence(capsys):
    run("fragments")
    said = capsys.readouterr().out
    lines = said.splitlines()
    for name in fragment_names():
        first = lines[lines.index(name) + 1]
        assert first.startswith("    ") and first[4].isalpha(), first
    assert max(map(len, lines)) < 80
    found = run_json(capsys, "fragments")["fragments"]
    assert [entry["name"] for entry in found] == fragment_names()
    for entry in found:
        assert entry["summary"].endswith(".") and "#" not in entry["summary"]
        assert Path(entry["path"]).read_text() == entry["text"]
        assert "blank_index" in entry["keys"]


def test_it_shows_one(capsys):
    run("fragments", f"{EMFORMER}.yaml")
    assert capsys.readouterr().out == f"{fragment_path(EMFORMER).read_text()}\n"


def test_copies_are_the_files_and_load_by_include(capsys):
    run("fragments", "--copy", "here", EMFORMER)
    copy = Path("here", f"{EMFORMER}.yaml")
    assert copy.read_bytes() == fragment_path(EMFORMER).read_bytes()
    assert [p for p in Path("here").rglob("*") if p.is_file()] == [copy]
    Path("here/main.yaml").write_text(
        f"transducer: !include:{EMFORMER}.yaml\n"
        "    {num_layers: 1, d_model: 8, ffn_dim: 8, num_heads: 2}\n"
    )
    with open("here/main.yaml") as stream:
        assert load_hyperpyyaml(stream)["transducer"]["encoder"]
    found = run_json(capsys, "fragments", "--copy", "all")
    assert len(found["copies"]) == len(fragment_names())
    assert all(Path(copy).is_file() for copy in found["copies"])


def test_a_changed_copy_is_kept_unless_told(capsys):
    run("fragments", "--copy", ".", EMFORMER)
    copy = Path(f"{EMFORMER}.yaml")
    copy.write_text("mine: 1\n")
    # One of several is there: none is written.
    said = fails(capsys, "fragments", "--copy", ".")
    assert f"{EMFORMER}.yaml: exists already" in said and "--overwrite" in said
    run("fragments", "--copy", ".", "--overwrite", EMFORMER)
    assert copy.read_bytes() == fragment_path(EMFORMER).read_bytes()


def test_a_dry_run_writes_nothing(capsys, tmp_path):
    run("fragments", "--copy", "here", "--dry-run")
    assert capsys.readouterr().out.count("would write here/") == len(
        fragment_names()
    )
    assert not list(tmp_path.iterdir())


def test_wrong_names_and_options_are_refused(capsys):
    said = fails(capsys, "fragments", "emformer_meduim")
    assert f"did you mean '{EMFORMER}'?" in said
    said = fails(capsys, "fragments", "--copy", "here", EMFORMER, "none")
    assert "no fragment 'none'" in said
    assert "--copy DIR" in fails(capsys, "fragments", "--overwrite")
    with pytest.raises(SystemExit):
        main(["fragments", "--cpoy", "here"])
    assert "did you mean --copy?" in capsys.readouterr().err
