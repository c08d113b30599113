"""`taskarith merge`: merge files, overrides, and the engine behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.commands.weights.merge import read_plan
from speechbrain_taskarith.utils.hub.cards import read_card
from speechbrain_taskarith.vectors import (
    TIES,
    TaskVector,
    open_state,
    save_state,
)

NAMES = ("encoder.0.w", "encoder.1.w", "ctc.b")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base and two models as safetensors, and a merge file."""
    monkeypatch.chdir(tmp_path)
    noise = torch.Generator().manual_seed(11)
    for name in ("base", "us", "de"):
        weights = {
            "encoder.0.w": torch.randn(8, 7, generator=noise),
            "encoder.1.w": torch.randn(8, 8, generator=noise),
            "ctc.b": torch.randn(9, generator=noise),
            "count": torch.tensor(5),
        }
        save_state(weights, f"{name}.safetensors")
    Path("merge.yaml").write_text(
        "base: base.safetensors\n"
        "finetuned: [us.safetensors, de.safetensors]\n"
        "rule: {name: TIES, density: 0.3}\n"
        "scale: 0.5\n"
        "output: merged.safetensors\n"
    )
    return tmp_path


def there():
    """Return every file of the present folder with its bytes."""
    return {
        str(path): path.read_bytes()
        for path in sorted(Path(".").rglob("*"))
        if path.is_file()
    }


def run(capsys, *words):
    """Merge with --json; return what is said."""
    capsys.readouterr()
    assert main(["merge", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *words):
    """Run what has to fail and change nothing; return its line."""
    capsys.readouterr()
    before = there()
    assert main(["merge", *map(str, words)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and there() == before
    (line,) = said.err.strip().splitlines()
    assert line.startswith("taskarith: error: ")
    return line


def expected(rule):
    base = open_state("base.safetensors")
    taus = [
        TaskVector.between(base, f"{name}.safetensors") for name in ("us", "de")
    ]
    return rule(base, taus)


def test_merge_file_is_the_rule_in_memory(folder, capsys):
    found = run(capsys, "merge.yaml")
    merged, wanted = open_state("merged.safetensors"), None
    wanted = expected(TIES(density=0.3, scale=0.5))
    for name in (*NAMES, "count"):
        assert torch.equal(merged[name], wanted[name]), name
    assert found["fingerprint"] == merged.fingerprint
    assert (found["edited"], found["copied"]) == (3, 1)
    card = read_card("merged.safetensors")
    assert [p["role"] for p in card["parents"]] == [
        "base",
        "fine-tuned",
        "fine-tuned",
    ]
    assert card["rule"]["density"] == 0.3
    assert card["scale"] == 0.5


def test_overrides_as_in_speechbrain(folder, capsys):
    run(
        *(capsys, "merge.yaml", "--rule.density", "0.6", "--scale", "0.25"),
        *("--output", "o.safetensors"),
    )
    wanted = expected(TIES(density=0.6, scale=0.25))
    found = open_state("o.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)
    found = run(capsys, "merge.yaml", "--output=p.safetensors", "--threads=1")
    assert found["threads"] == 1
    assert not Path("merged.safetensors").exists()


def test_plain_flags_without_a_file(folder, capsys):
    models = ("us.safetensors", "de.safetensors")
    run(
        *(capsys, "--base", "base.safetensors", "--finetuned", *models),
        *("--rule", "ties", "density=0.3", "--scale", "0.5"),
        *("-o", "flags.safetensors"),
    )
    run(capsys, "merge.yaml")
    one, other = (
        open_state("flags.safetensors"),
        open_state("merged.safetensors"),
    )
    assert one.fingerprint == other.fingerprint


def test_stored_vectors_are_merged_too(folder, capsys):
    for name in ("us", "de"):
        words = ("vector", "base.safetensors", f"{name}.safetensors")
        assert main([*words, "-o", f"tau_{name}.safetensors"]) == 0
    run(
        *(capsys, "merge.yaml", "--output", "v.safetensors"),
        *("--finetuned", "tau_us.safetensors", "de.safetensors"),
    )
    run(capsys, "merge.yaml")
    one = open_state("v.safetensors").fingerprint
    assert one == open_state("merged.safetensors").fingerprint
    line = fails(
        *(capsys, "merge.yaml", "--base", "us.safetensors"),
        *("--finetuned", "tau_us.safetensors", "-o", "w.safetensors"),
    )
    assert "not the base" in line and "--any-base" in line


def test_options_come_before_or_after_and_swallow_nothing(folder, capsys):
    models = ("us.safetensors", "de.safetensors")
    words = ("--base", "base.safetensors", "--finetuned", *models)
    words += ("--rule", "TIES", "--rule.density", "0.3", "--scale", "0.5")
    found = run(
        *(capsys, *words, "--exclude", "ctc.*", "--threads", "1"),
        *("--memory-limit", "300MB", "--any_base", "true", "-o", "a.ckpt"),
    )
    assert found["rule"]["density"] == 0.3
    assert (found["edited"], found["threads"]) == (2, 1)
    again = run(
        *(capsys, "--exclude", "[ctc.*]", *words, "--any-base"),
        *("--no-fingerprint", "--buffers", "base", "-o", "b.ckpt"),
    )
    assert again["fingerprint"] is None
    one, other = open_state("a.ckpt"), open_state("b.ckpt")
    assert one.fingerprint == other.fingerprint


def test_recoverable_of_a_checkpoint_folder(folder, capsys):
    from speechbrain.utils.checkpoints import Checkpointer

    torch.manual_seed(5)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    for number, model in enumerate(models):
        Checkpointer(f"w{number}", {"whisper": model}).save_checkpoint()
    run(
        *(capsys, "--base", "w0", "--finetuned", "w1", "--rule", "TIES"),
        *("density=1", "--recoverable", "whisper", "-o", "x.safetensors"),
    )
    found = open_state("x.safetensors")["weight"]
    assert torch.allclose(found, models[1].weight, atol=1e-6)


def test_checkpoint_folder_keeps_the_other_recoverables(folder, capsys):
    from speechbrain.utils.checkpoints import Checkpointer

    torch.manual_seed(5)
    models = [torch.nn.Linear(3, 2) for _ in range(3)]
    for number, model in enumerate(models):
        Checkpointer(f"m{number}", {"model": model}).save_checkpoint()
        for ckpt in Path(f"m{number}").glob("CKPT+*"):
            torch.save({"seen": number}, ckpt / "tokenizer.ckpt")
    found = run(
        *(capsys, "--base", "m0", "--finetuned", "m1", "m2"),
        *("--rule", "LinearAverage", "-o", "out/CKPT+mean"),
    )
    assert found["output"] == "out/CKPT+mean"
    assert torch.load("out/CKPT+mean/tokenizer.ckpt") == {"seen": 0}
    fresh = torch.nn.Linear(3, 2)
    Checkpointer("out", {"model": fresh}).recover_if_possible()
    mean = (models[1].weight + models[2].weight) / 2
    assert torch.allclose(fresh.weight, mean, atol=1e-6)
    assert sorted(p.name for p in Path("out").iterdir()) == ["CKPT+mean"]


def test_dry_run_says_what_each_pattern_matches(folder, capsys):
    before = there()
    found = run(
        *(capsys, "merge.yaml", "--dry-run", "--exclude", "[ctc.*]"),
        *("--scale", "encoder.0.*=0.5", "encoder.*=0.2"),
    )
    assert there() == before
    assert found["dry_run"] is True
    assert found["edited"] == ["encoder.0.w", "encoder.1.w"]
    assert sorted(found["copied"]) == ["count", "ctc.b"]
    assert found["patterns"]["exclude"] == {"ctc.*": ["ctc.b"]}
    assert found["patterns"]["scale"] == {
        "encoder.0.*": ["encoder.0.w"],
        "encoder.*": ["encoder.1.w"],
    }
    assert found["bytes"] == 4 * (56 + 64 + 9) + 8
    assert main(["merge", "merge.yaml", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "would write merged.safetensors" in text
    assert "TIES(density=0.3" in text


def test_placeholders_are_to_be_given(folder, capsys):
    Path("open.yaml").write_text(
        "base: !PLACEHOLDER\nfinetuned: us.safetensors\n"
        "rule: {name: DARE, drop: 0.5, then: {name: TIES, density: 1}}\n"
        "output: open.safetensors\n"
    )
    line = fails(capsys, "open.yaml")
    assert "open.yaml" in line and "--base" in line
    found = run(capsys, "open.yaml", "--base", "base.safetensors")
    assert found["rule"]["then"]["rule"] == "TIES"


def test_a_tag_never_builds_anything(folder, capsys):
    Path("evil.yaml").write_text(
        "base: base.safetensors\nfinetuned: [us.safetensors]\n"
        "rule: !new:pathlib.Path [made]\noutput: x.safetensors\n"
    )
    line = fails(capsys, "evil.yaml")
    assert "evil.yaml: line 3" in line and "no tags" in line
    Path("evil.yaml").write_text("!!python/object/apply:os.system ['true']\n")
    assert "no tags" in fails(capsys, "evil.yaml")


@pytest.mark.parametrize(
    "text, said",
    [
        ("", ["expected a mapping"]),
        ("- a\n", ["expected a mapping"]),
        ("a: [\n", ["not valid YAML"]),
        ("base: a\n", ["lacks finetuned, rule, output", "--finetuned"]),
        (
            "base: a\nfinetuned: b\nrule: TIES\noutput: c\nmodels: 1\n",
            ["unknown 'models'", "finetuned"],
        ),
        (
            "base: a\nfinetuned: [1]\nrule: TIES\noutput: c\n",
            ["finetuned", "got 1"],
        ),
        (
            "base: [a]\nfinetuned: b\nrule: TIES\noutput: c\n",
            ["base is a list"],
        ),
    ],
)
def test_bad_merge_files(folder, text, said):
    Path("bad.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_plan("bad.yaml")
    assert "bad.yaml" in str(error.value)
    for piece in said:
        assert piece in str(error.value)


@pytest.mark.parametrize(
    "words, said",
    [
        (("none.yaml",), ["none.yaml", "No such file"]),
        (("merge.yaml", "--rule.dense", "1"), ["'dense'", "density"]),
        (("merge.yaml", "--rule.density", "2"), ["density=2", "[0, 1]"]),
        (("merge.yaml", "--rule.name", "Mean"), ["'Mean'", "LinearAverage"]),
        (("merge.yaml", "--base.x", "2"), ["--base.x", "not a mapping"]),
        (("merge.yaml", "--colour", "red"), ["unknown option --colour"]),
        (("merge.yaml", "--base", "none.ckpt"), ["none.ckpt", "no such"]),
        (("merge.yaml", "--exclude", "[dec*]"), ["'dec*'", "matches no"]),
        (("merge.yaml", "--memory_limit", "lots"), ["'lots'", "300MB"]),
        (("merge.yaml", "--memory_limit", "1KB"), ["memory_limit"]),
        (("merge.yaml", "-o", "us.safetensors"), ["us.safetensors", "input"]),
        (("merge.yaml", "stray"), ["stray"]),
        (("merge.yaml", "--finetuned", "nan.safetensors"), ["nan", "ctc.b"]),
        (("merge.yaml", "--rule", "LinearAverage"), ["LinearAverage", "scale"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_changes_nothing(folder, capsys, words, said):
    bad = {name: t.clone() for name, t in open_state("us.safetensors").items()}
    bad["ctc.b"][3] = float("nan")
    save_state(bad, "nan.safetensors")
    try:
        line = fails(capsys, *words)
    except SystemExit as left:
        assert left.code == 2
        line = capsys.readouterr().err
    for piece in said:
        assert piece in line, line


def test_merging_safetensors_never_imports_torch(folder):
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "from speechbrain_taskarith.__main__ import main\n"
        "status = main(['merge', 'merge.yaml', '--json'])\n"
        "heavy = {'torch', 'speechbrain', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'{status} {heavy}' if status or heavy else 0)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["edited"] == 3
    assert Path("merged.safetensors.md").is_file()
