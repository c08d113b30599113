"""`taskarith edit`: a sequence of edits from the command line."""

import json
import re
from pathlib import Path

import pytest
import torch

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.utils.hub.cards import read_card
from speechbrain_taskarith.vectors import (
    SequentialEditor,
    open_state,
    save_checkpoint,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Models fine-tuned one after another, in the present folder."""
    monkeypatch.chdir(tmp_path)
    noise = torch.Generator().manual_seed(3)
    for name in ("us", "de", "gr"):
        weights = {
            "layers.0.w": torch.randn(6, 5, generator=noise),
            "layers.1.w": torch.randn(6, generator=noise),
            "count": torch.tensor(4),
        }
        torch.save(weights, f"{name}.ckpt")
    return tmp_path


def there(folder):
    """Return every file of a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def run(capsys, *words):
    """Run a verb with --json; return what it says."""
    capsys.readouterr()
    assert main(["edit", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *words):
    """Run what has to fail and change nothing; return its line."""
    capsys.readouterr()
    before = there(".")
    assert main(["edit", *map(str, words)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and there(".") == before
    (line,) = said.err.strip().splitlines()
    return line


START = ("--base", "us.ckpt", "--rule", "TaskArithmetic", "--scale", "0.5")


def start(capsys):
    run(capsys, "learn", "edits", "de", "de.ckpt", *START)
    return run(capsys, "learn", "edits", "gr", "gr.ckpt", "--note", "second")


def test_learned_edits_follow_the_formula(folder, capsys):
    found = start(capsys)
    assert (found["name"], found["scale"], found["note"]) == (
        "gr",
        0.5,
        "second",
    )
    run(capsys, "export", "edits", "-o", "now.ckpt")
    us, de, gr, now = (
        torch.load(f"{n}.ckpt") for n in ("us", "de", "gr", "now")
    )
    for name in ("layers.0.w", "layers.1.w"):
        first = us[name] + 0.5 * (de[name] - us[name])
        second = first + 0.5 * (gr[name] - first)
        assert torch.allclose(now[name], second, atol=1e-6)
    assert torch.equal(now["count"], us["count"])
    card = read_card("now.ckpt")
    assert [p["role"] for p in card["parents"]] == [
        "base",
        "edit 'de'",
        "edit 'gr'",
    ]


def test_undo_gives_back_the_bytes_before(folder, capsys):
    run(capsys, "learn", "edits", "de", "de.ckpt", *START)
    before = run(capsys, "export", "edits", "-o", "a.ckpt")["fingerprint"]
    run(capsys, "learn", "edits", "gr", "gr.ckpt")
    found = run(capsys, "undo", "edits", "gr")
    assert [edit["name"] for edit in found["edits"]] == ["de"]
    after = run(capsys, "export", "edits", "-o", "b.ckpt")["fingerprint"]
    assert before == after == open_state("b.ckpt").fingerprint


def test_reorder_marks_approximations(folder, capsys):
    start(capsys)
    would = run(capsys, "reorder", "edits", "gr", "de", "--dry-run")
    assert would["approximate"] == ["gr", "de"]
    found = run(capsys, "reorder", "edits", "gr", "de")
    assert [(e["name"], e["exact"]) for e in found["edits"]] == [
        ("gr", False),
        ("de", False),
    ]
    found = run(capsys, "reorder", "edits", "de", "gr")
    assert all(edit["exact"] for edit in found["edits"])


def test_undo_of_an_earlier_edit_says_what_becomes_approximate(folder, capsys):
    start(capsys)
    would = run(capsys, "undo", "edits", "de", "--dry-run")
    assert (would["edits"], would["approximate"]) == (["gr"], ["gr"])
    found = run(capsys, "undo", "edits", "de")
    assert [e["exact"] for e in found["edits"]] == [False]


def test_log_shows_edits_and_history(folder, capsys):
    start(capsys)
    run(capsys, "undo", "edits", "gr")
    found = run(capsys, "log", "edits", "--history", "--verify")
    assert [edit["name"] for edit in found["edits"]] == ["de"]
    assert found["edits"][0]["bytes"] > 0
    actions = [entry["action"] for entry in found["history"]]
    assert actions == ["start", "learn", "learn", "undo"]
    assert found["verified"] is True
    assert main(["edit", "log", "edits"]) == 0
    text = capsys.readouterr().out
    assert "de" in text and "TaskArithmetic" in text and "exact" in text


def test_log_verify_finds_an_altered_vector(folder, capsys):
    start(capsys)
    path = next(Path("edits/vectors").glob("*de*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    line = fails(capsys, "log", "edits", "--verify")
    assert path.name in line


def test_the_scale_may_be_a_schedule(folder, capsys):
    words = (*START[:-1], "1/t")
    would = run(capsys, "learn", "e", "de", "de.ckpt", *words, "--dry-run")
    assert would["scale"] == 0.5
    assert run(capsys, "learn", "e", "de", "de.ckpt", *words)["scale"] == 0.5
    would = run(capsys, "learn", "e", "gr", "gr.ckpt", "--dry-run")
    found = run(capsys, "learn", "e", "gr", "gr.ckpt")
    assert would["scale"] == found["scale"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "rule",
    [
        ("TaskArithmetic", "scale=0.25"),
        ("LiNeS", "inner_rule={name: TaskArithmetic, scale: 0.2}", "slope=0.5"),
    ],
)
def test_a_dry_run_tells_the_rules_own_scale(folder, capsys, rule):
    words = ("--base", "us.ckpt", "--rule", *rule)
    would = run(capsys, "learn", "e", "de", "de.ckpt", *words, "--dry-run")
    found = run(capsys, "learn", "e", "de", "de.ckpt", *words)
    assert would["scale"] == found["scale"]
    would = run(capsys, "learn", "e", "gr", "gr.ckpt", "--dry-run")
    assert would["scale"] == found["scale"]


def test_encoding_rule_and_selection_are_kept(folder, capsys):
    run(
        *(capsys, "learn", "edits", "de", "de.ckpt", "--base", "us.ckpt"),
        *("--rule", "TIES", "density=0.5", "--encoding", "sparse-int8"),
        *("--selected-on", "valid"),
    )
    found = run(capsys, "learn", "edits", "gr", "gr.ckpt", "--scale", "0.25")
    assert found["rule"] == {
        "rule": "TIES",
        "density": 0.5,
        "scale": 1.0,
        "trim": "global",
        "elect": "mass",
        "weights": None,
    }
    assert (found["scale"], found["encoding"]) == (0.25, "sparse-int8")
    first = run(capsys, "log", "edits")["edits"][0]
    assert first["selected_on"] == "valid"


def test_dry_runs_write_nothing(folder, capsys):
    words = ("learn", "edits", "de", "de.ckpt", *START, "--dry-run")
    before = there(folder)
    would = run(capsys, *words)
    assert would["norm"] > 0 and there(folder) == before
    start(capsys)
    before = there(folder)
    for words in (
        ("learn", "edits", "third", "us.ckpt"),
        ("undo", "edits", "gr"),
        ("reorder", "edits", "gr", "de"),
        ("export", "edits", "-o", "new.ckpt"),
    ):
        assert run(capsys, *words, "--dry-run")["dry_run"] is True
        assert there(folder) == before, words


def test_a_first_edit_that_fails_leaves_nothing(folder, capsys):
    bad = torch.load("de.ckpt")
    bad["layers.1.w"][0] = float("inf")
    torch.save(bad, "bad.ckpt")
    line = fails(capsys, "learn", "edits", "x", "bad.ckpt", *START)
    assert "bad.ckpt" in line and "NaN or infinity" in line
    assert not Path("edits").exists()
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    fails(capsys, "learn", "mine", "x", "bad.ckpt", *START)
    assert there("mine") == {"notes.txt": b"keep"}


@pytest.mark.parametrize(
    "words, said",
    [
        (("learn", "new", "de", "de.ckpt"), ["new", "--base and --rule"]),
        (("log", "new"), ["new", "edit learn"]),
        (("export", "new", "-o", "x.ckpt"), ["new", "no edit log"]),
        (("undo", "edits", "fr"), ["'fr'", "de, gr"]),
        (("reorder", "edits", "gr"), ["de, gr", "edit undo"]),
        (("learn", "edits", "de", "de.ckpt"), ["'de'", "learned already"]),
        (
            ("learn", "edits", "de", "de.ckpt", "--dry-run"),
            ["'de'", "learned already"],
        ),
        (
            ("learn", "edits", "x", "de.ckpt", "--scale", "inf"),
            ["scale", "finite"],
        ),
        (
            ("learn", "edits", "x", "de.ckpt", "--encoding", "bf16"),
            ["--encoding", "first edit"],
        ),
        (
            ("learn", "edits", "x", "gr.ckpt", "--base", "de.ckpt"),
            ["starts from", "de.ckpt"],
        ),
        (
            ("learn", "edits", "x", "de.ckpt", "--scale", "1/t"),
            ["1/t", "first edit"],
        ),
        (("learn", "edits", "x", "none.ckpt"), ["none.ckpt", "no such"]),
        (("export", "edits", "-o", "us.ckpt"), ["us.ckpt", "--overwrite"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_changes_nothing(folder, capsys, words, said):
    start(capsys)
    line = fails(capsys, *words)
    assert line.startswith("taskarith: error: ")
    for piece in said:
        assert piece in line, line


def test_a_folder_open_elsewhere_is_refused(folder, capsys):
    start(capsys)
    with SequentialEditor.resume("edits"):
        line = fails(capsys, "undo", "edits", "gr")
        assert "edits" in line and "Wait until it is done" in line
    run(capsys, "undo", "edits", "gr")


def test_redo_brings_back_what_was_undone(folder, capsys):
    start(capsys)
    run(capsys, "export", "edits", "-o", "a.ckpt")
    line = fails(capsys, "redo", "edits")
    assert "nothing was undone" in line
    run(capsys, "undo", "edits", "gr")
    before = there(folder)
    would = run(capsys, "redo", "edits", "--dry-run")
    assert (would["edits"], would["approximate"]) == (["de", "gr"], [])
    assert there(folder) == before
    found = run(capsys, "redo", "edits")
    assert [(e["name"], e["exact"]) for e in found["edits"]] == [
        ("de", True),
        ("gr", True),
    ]
    run(capsys, "export", "edits", "-o", "b.ckpt")
    assert open_state("a.ckpt").fingerprint == open_state("b.ckpt").fingerprint


def test_a_model_is_exported_in_another_type_and_learned_from(folder, capsys):
    """A training that starts from a bfloat16 export, and ends in float32."""
    start(capsys)
    found = run(
        capsys, "export", "edits", "-o", "b.ckpt", "--dtype", "bfloat16"
    )
    given = torch.load("b.ckpt")
    kept = SequentialEditor.resume("edits", read_only=True).state()
    for name in ("layers.0.w", "layers.1.w"):
        assert torch.equal(given[name], kept[name].bfloat16())
    assert found["fingerprint"] == open_state("b.ckpt").fingerprint
    tuned = {
        n: t.float() if t.is_floating_point() else t for n, t in given.items()
    }
    tuned["layers.1.w"][0] += 1
    torch.save(tuned, "tuned.ckpt")
    learned = run(capsys, "learn", "edits", "fr", "tuned.ckpt", "--scale", "1")
    assert learned["started_from"] == "bfloat16"
    now = SequentialEditor.resume("edits", read_only=True).state()
    assert torch.equal(now["layers.0.w"], kept["layers.0.w"])
    line = fails(capsys, "export", "edits", "-o", "x.ckpt", "--dtype", "int8")
    assert "int8" in line


def test_an_export_stays_away_from_the_edits(folder, capsys):
    """Neither over their files nor between them, and takes a folder along."""
    start(capsys)
    more = ("--overwrite", "-o")
    for output in ("edits/base.safetensors", "edits/vectors/x.ckpt"):
        line = fails(capsys, "export", "edits", *more, output)
        assert output in line and "lies among the files of the edits" in line
    words = ("export", "edits", "-o", "out/CKPT+z", "--like", "us.ckpt")
    assert "--like us.ckpt: is a file" in fails(capsys, *words)
    run(capsys, "log", "edits", "--verify")


def test_every_action_is_listed(capsys):
    with pytest.raises(SystemExit):
        main(["edit", "--help"])
    listed = capsys.readouterr().out
    for action in ("learn", "undo", "redo", "reorder", "log", "export"):
        assert re.search(rf"^ +{action} +\w", listed, re.M), action


def test_like_a_half_precision_checkpoint_the_types_are_its_own(folder, capsys):
    weights = {"w": torch.randn(5, 4).half(), "b": torch.zeros(4)}
    save_checkpoint({"model": weights}, "save/CKPT+us")
    tuned = {name: tensor + 0.01 for name, tensor in weights.items()}
    torch.save(tuned, "tuned.ckpt")
    words = ("--base", "save", "--rule", "TaskArithmetic", "--scale", "0.3")
    run(capsys, "learn", "e", "de", "tuned.ckpt", *words)
    run(capsys, "export", "e", "-o", "out/CKPT+e", "--like", "save")
    types = {n: t.dtype for n, t in dict(open_state("out/CKPT+e")).items()}
    assert types == {"w": torch.float16, "b": torch.float32}
    run(capsys, "export", "e", "-o", "wide.ckpt")
    assert open_state("wide.ckpt")["w"].dtype == torch.float32


def test_a_dry_run_tells_the_size_and_the_encoding(folder, capsys):
    words = ("--base", "us.ckpt", "--rule", "TIES", "density=0.3")
    would = run(capsys, "learn", "e", "de", "de.ckpt", *words, "--dry-run")
    found = run(capsys, "learn", "e", "de", "de.ckpt", *words)
    assert would["encoding"] == found["encoding"] == "sparse"
    stored = open_state(Path("e") / found["vector"])
    assert would["bytes"] == sum(stored.info(n).nbytes for n in stored)


def test_a_dry_run_finds_what_overflows(folder, capsys):
    torch.save({"w": torch.zeros(2)}, "zero.ckpt")
    torch.save({"w": torch.full((2,), 1e5)}, "far.ckpt")
    words = ("--base", "zero.ckpt", "--rule", "TaskArithmetic")
    words += ("--scale", "3e38")
    for more in ((), ("--dry-run",)):
        line = fails(capsys, "learn", "n", "x", "far.ckpt", *words, *more)
        assert "too large" in line and "'w'" in line
    assert not Path("n").exists()


def test_a_dry_run_makes_the_edit_of_half_precision(folder, capsys):
    """From what was given away rounded, and kept in float32 afterwards."""
    noise = torch.Generator().manual_seed(3)
    base = torch.randn(16, 16, generator=noise).bfloat16()
    tuned = base + torch.randn(16, 16, generator=noise).bfloat16()
    torch.save({"w": base}, "base.ckpt")
    torch.save({"w": tuned}, "tuned.ckpt")
    words = ("--base", "base.ckpt", "--rule", "TaskArithmetic")
    words = (*words, "--scale", "0.4")
    run(capsys, "learn", "e", "a", "tuned.ckpt", *words)
    run(capsys, "export", "e", "-o", "now.ckpt", "--dtype", "bfloat16")
    now = open_state("now.ckpt")["w"].clone()
    now[0, 0] += 1
    torch.save({"w": now}, "next.ckpt")
    would = run(capsys, "learn", "e", "b", "next.ckpt", "--dry-run")
    found = run(capsys, "learn", "e", "b", "next.ckpt")
    with SequentialEditor.resume("e", read_only=True) as editor:
        norm = editor.vector("b").norm()
    assert would["norm"] == pytest.approx(norm) == pytest.approx(1, abs=0.01)
    assert would["started_from"] == found["started_from"] == "bfloat16"
    # More than float16 holds, but not more than float32.
    torch.save({"w": torch.full((2,), 30000.0).half()}, "base.ckpt")
    torch.save({"w": torch.full((2,), 60000.0).half()}, "tuned.ckpt")
    words = (*words[:-1], "1.5")
    run(capsys, "learn", "f", "a", "tuned.ckpt", *words, "--dry-run")
