"""The command line: what each verb writes, says, and refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_support import (
    fails,
    make_models,
    make_vectors,
    run,
    run_json,
    there,
    weights,
)

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.commands import VERBS
from speechbrain_taskarith.utils.hub.cards import read_card
from speechbrain_taskarith.vectors import TaskVector, open_state, save_state
from speechbrain_taskarith.vectors.rules.description import RULES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a base and two fine-tuned models, as the present one."""
    monkeypatch.chdir(tmp_path)
    make_models()
    return tmp_path


def test_vector_holds_the_difference(folder, capsys):
    found = run_json(
        capsys, "vector", "base.ckpt", "us.ckpt", "-o", "us.safetensors"
    )
    tau, before, after = (
        TaskVector.load("us.safetensors"),
        weights(),
        weights(seed=1),
    )
    edited = {"encoder.layers.0.weight", "encoder.layers.1.weight", "ctc.bias"}
    assert set(tau) == edited
    for name in edited:
        assert torch.equal(tau[name], after[name] - before[name])
    assert found["parameters"] == 12 + 16 + 5
    assert found["norm"] == pytest.approx(tau.norm())
    card = read_card("us.safetensors")
    prints = [parent["fingerprint"] for parent in card["parents"]]
    assert prints == [
        open_state("base.ckpt").fingerprint,
        open_state("us.ckpt").fingerprint,
    ]


def test_vector_of_chosen_parameters(folder, capsys):
    run(
        *("vector", "base.ckpt", "us.ckpt", "-o", "enc.safetensors"),
        *("--include", "encoder.*", "--exclude", "*.0.*"),
    )
    assert list(TaskVector.load("enc.safetensors")) == [
        "encoder.layers.1.weight"
    ]


def test_vector_buffers_are_edited_when_asked_for(folder):
    words = ("vector", "base.ckpt", "us.ckpt", "-o", "b.safetensors")
    run(*words, "--buffers", "edit")
    assert "encoder.norm.running_var" in TaskVector.load("b.safetensors")


def test_apply_adds_the_scaled_vector(folder):
    make_vectors()
    run("apply", "base.ckpt", "us.safetensors", "-o", "e.ckpt", "--scale", 0.4)
    before, after, edited = weights(), weights(seed=1), torch.load("e.ckpt")
    for name in ("encoder.layers.0.weight", "ctc.bias"):
        expected = before[name] + 0.4 * (after[name] - before[name])
        assert torch.allclose(edited[name], expected, atol=1e-7)
    for name in ("encoder.norm.running_var", "ctc.steps"):
        assert torch.equal(edited[name], before[name])
    assert "Edited model" in Path("e.ckpt.md").read_text()


def test_apply_mean_and_any_base_is_syn2real(folder):
    make_vectors()
    torch.save(weights(shift=1.0), "target.ckpt")
    run(
        *("apply", "target.ckpt", "us.safetensors", "de.safetensors"),
        *("--mean", "--any-base", "--scale", "0.2", "-o", "t.safetensors"),
    )
    name = "encoder.layers.1.weight"
    mean = (weights(seed=1)[name] + weights(seed=2)[name]) / 2
    expected = weights(shift=1.0)[name] + 0.2 * (mean - weights()[name])
    found = open_state("t.safetensors")[name]
    assert torch.allclose(found, expected, atol=1e-6)


def test_apply_scale_by_pattern(folder, capsys):
    make_vectors()
    words = ("apply", "base.ckpt", "us.safetensors", "-o", "e.ckpt")
    scales = ("--scale", "encoder.layers.0.*=1", "encoder.*=0.5")
    dry = run_json(capsys, *words, *scales, "--dry-run")
    assert dry["patterns"] == {
        "encoder.layers.0.*": ["encoder.layers.0.weight"],
        "encoder.*": ["encoder.layers.1.weight"],
    }
    assert dry["changed"] == 2
    run(*words, *scales)
    edited, before, after = torch.load("e.ckpt"), weights(), weights(seed=1)
    name = "encoder.layers.0.weight"
    assert torch.allclose(edited[name], after[name], atol=1e-6)
    name = "encoder.layers.1.weight"
    half = (before[name] + after[name]) / 2
    assert torch.allclose(edited[name], half, atol=1e-6)
    assert torch.equal(edited["ctc.bias"], before["ctc.bias"])


def test_apply_takes_a_checkpoints_other_files_along(folder):
    from speechbrain.utils.checkpoints import Checkpointer

    class Normaliser:
        pass

    model = torch.nn.Linear(2, 1)
    checkpointer = Checkpointer("save", {"model": model})
    checkpointer.save_checkpoint(name="one")
    extra = next(Path("save").glob("CKPT+*")) / "normalizer.ckpt"
    torch.save({"count": 3}, extra)
    tuned = {n: t + 1 for n, t in model.state_dict().items()}
    torch.save(tuned, "tuned.ckpt")
    run("vector", "save", "tuned.ckpt", "-o", "t.safetensors")
    run("apply", "save", "t.safetensors", "-o", "merged/CKPT+edited")
    assert torch.load("merged/CKPT+edited/normalizer.ckpt") == {"count": 3}
    fresh = torch.nn.Linear(2, 1)
    Checkpointer("merged", {"model": fresh}).recover_if_possible()
    assert torch.allclose(fresh.bias, model.bias + 1)


def test_plot_writes_both_plots(folder, capsys):
    make_vectors()
    taus = ("us.safetensors", "de.safetensors")
    found = run_json(capsys, "plot", "cosine", *taus, "-o", "c.png")
    us, de = map(TaskVector.load, taus)
    assert found["values"][0][1] == pytest.approx(us.cosine(de))
    found = run_json(
        capsys,
        *("plot", "layers", *taus, "-o", "l.png"),
        *("--relative-to", "base.ckpt", "--names", "US", "German"),
    )
    assert set(found["values"]) == {"US", "German"}
    for name in ("c.png", "l.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")


def test_inspect_says_what_a_vector_is(folder, capsys):
    make_vectors()
    run(
        *("apply", "base.ckpt", "us.safetensors", "-o", "trim.safetensors"),
        *("--rule", "TIES", "density=0.2"),
    )
    shown = run_json(capsys, "inspect", "us.safetensors", "base.ckpt")
    vector, model = shown["files"]
    tau = TaskVector.load("us.safetensors")
    assert vector["form"] == "task vector"
    assert vector["norm"] == pytest.approx(tau.norm())
    assert vector["base_fingerprint"] == model["fingerprint"]
    assert vector["density"] == 1.0
    squares = sum(norm**2 for norm in vector["layer_norms"].values())
    assert squares == pytest.approx(tau.norm() ** 2)
    assert model["form"] == "torch file"
    assert model["dtypes"] == {"F32": 37, "I64": 1}
    shown = run_json(
        capsys,
        "inspect",
        "base.ckpt",
        "--tensors",
        "*.bias",
        "--no-fingerprint",
    )
    assert shown["files"][0]["contents"] == {"ctc.bias": ["F32", [5]]}
    assert "fingerprint" not in shown["files"][0]


def test_inspect_shows_provenance_of_every_form(folder, capsys):
    make_vectors()
    outputs = ("a.ckpt", "b.safetensors", "CKPT+c", "hf")
    for output in outputs:
        run("apply", "base.ckpt", "us.safetensors", "-o", output)
        (entry,) = run_json(capsys, "inspect", output)["files"]
        text = json.dumps(entry["metadata"])
        if output != "hf":
            assert open_state("base.ckpt").fingerprint in text, output
        capsys.readouterr()
        run("inspect", output)
        assert output in capsys.readouterr().out
    assert Path("hf/README.md").is_file()


def test_tied_tensors_are_shown_and_stay_tied(folder, capsys):
    shared = torch.ones(2, 2)
    torch.save({"in.w": shared, "out.w": shared}, "tied.ckpt")
    torch.save({"in.w": shared + 1, "out.w": shared + 1}, "tuned.ckpt")
    words = ["tied.ckpt", "tuned.ckpt", "-o", "t.safetensors"]
    assert run_json(capsys, "vector", *words)["parameters"] == 4
    run("vector", *words[:-1], "s.safetensors", "--encoding", "sparse")
    for stored in ("t.safetensors", "s.safetensors"):
        (entry,) = run_json(capsys, "inspect", stored)["files"]
        assert (entry["parameters"], entry["density"]) == (4, 1.0)
    run("apply", "tied.ckpt", "t.safetensors", "-o", "e.ckpt")
    (entry,) = run_json(capsys, "inspect", "e.ckpt")["files"]
    assert entry["tied"] == [["in.w", "out.w"]]
    assert entry["parameters"] == 4


@pytest.mark.parametrize(
    "words",
    [
        ("vector", "base.ckpt", "us.ckpt", "-o", "new.safetensors"),
        ("apply", "base.ckpt", "us.safetensors", "-o", "new.ckpt"),
        ("plot", "cosine", "us.safetensors", "-o", "new.png"),
    ],
    ids=lambda words: words[0],
)
def test_dry_run_writes_nothing(folder, capsys, words):
    make_vectors()
    before = there(folder)
    found = run_json(capsys, *words, "--dry-run")
    assert found["dry_run"] is True and found["output"].startswith("new")
    run(*words, "--dry-run")
    assert "would write new" in capsys.readouterr().out
    assert there(folder) == before


def test_what_stands_there_is_replaced_only_when_asked(folder, capsys):
    make_vectors()
    words = ("apply", "base.ckpt", "us.safetensors", "-o", "e.ckpt")
    run(*words)
    line = fails(capsys, *words, "--scale", "0.5")
    assert "e.ckpt" in line and "--overwrite" in line
    run(*words, "--scale", "0.5", "--overwrite")
    line = fails(capsys, *words[:-1], "base.ckpt", "--overwrite")
    assert "base.ckpt" in line and "input" in line


@pytest.mark.parametrize("output", ["runs", "CKPT+a"])
@pytest.mark.parametrize("inside", ["base.ckpt", "sub/us.safetensors"])
def test_no_folder_is_replaced_over_an_input(folder, capsys, output, inside):
    make_vectors()
    taken = Path(output, inside)
    taken.parent.mkdir(parents=True)
    shutil.move(taken.name, taken)
    two = ["base.ckpt", "us.safetensors"]
    two = [str(taken) if path == taken.name else path for path in two]
    line = fails(capsys, "apply", *two, "-o", output, "--overwrite")
    assert output in line and "holds) an input" in line
    assert taken.is_file()


@pytest.mark.parametrize(
    "words",
    [
        ("vector", "base.ckpt", "us.ckpt", "-o", "new.safetensors"),
        ("apply", "base.ckpt", "us.safetensors", "-o", "new.safetensors"),
        ("merge", "--base", "base.ckpt", "--finetuned", "us.ckpt")
        + ("--rule", "TIES", "-o", "new.safetensors"),
    ],
    ids=lambda words: words[0],
)
def test_notes_beside_an_output_are_seen_before_it_is_written(
    folder, capsys, words
):
    make_vectors()
    Path("new.safetensors.md").write_text("mine")
    before = there(folder)
    assert "new.safetensors.md" in fails(capsys, *words)
    assert there(folder) == before
    # Those of another name are nobody's.
    run(*words[:-1], "other.safetensors")


def test_usage_errors_leave_with_status_2(folder, capsys):
    for words in (
        ["fly"],
        [],
        ["vector", "base.ckpt"],
        ["vector", "a", "b", "-o", "c", "--densty", "1"],
        ["plot", "pie", "x", "-o", "y.png"],
    ):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        assert "usage: taskarith" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb",
    ["vector", "apply", "syn2real", "merge", "rules", "inspect", "plot"]
    + ["edit"]
    + [f"edit {a}" for a in ("learn", "undo", "reorder", "log", "export")],
)
def test_help_shows_examples(verb, capsys):
    with pytest.raises(SystemExit) as left:
        main([*verb.split(), "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"taskarith {verb} " in text.partition("examples:")[2]


READING = ("--recoverable", "--include", "--exclude", "--any-base", "--threads")


@pytest.mark.parametrize(
    "verb", ["vector", "apply", "syn2real", "merge", "edit learn"]
)
def test_verbs_read_and_edit_by_the_same_options(verb, capsys):
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    text = capsys.readouterr().out
    assert [option for option in READING if f"  {option}" not in text] == []


def test_chosen_parameters_are_edited_by_every_verb(folder, capsys):
    make_vectors()
    chosen = ("--include", "encoder.*", "--exclude", "*.0.*", "--threads", "1")
    words = {
        "apply": ("apply", "base.ckpt", "us.safetensors", "-o", "a.ckpt"),
        "merge": ("merge", "--base", "base.ckpt", "--finetuned", "us.ckpt")
        + ("--rule", "TaskArithmetic", "-o", "m.ckpt"),
        "edit": ("edit", "learn", "edits", "us", "us.ckpt")
        + ("--base", "base.ckpt", "--rule", "TaskArithmetic"),
    }
    for verb in words.values():
        run(*verb, *chosen)
    run("edit", "export", "edits", "-o", "e.ckpt")
    before, after = weights(), weights(seed=1)
    for path in ("a.ckpt", "m.ckpt", "e.ckpt"):
        edited = torch.load(path)
        for name, tensor in edited.items():
            expected = after if name == "encoder.layers.1.weight" else before
            assert torch.allclose(tensor, expected[name], atol=1e-6), name
    # The log keeps the patterns for the edits that follow.
    run("edit", "learn", "edits", "de", "de.ckpt")
    run("edit", "export", "edits", "-o", "f.ckpt")
    assert torch.equal(torch.load("f.ckpt")["ctc.bias"], before["ctc.bias"])
    line = fails(
        capsys, *words["apply"][:-1], "n.ckpt", "--include", "decoder.*"
    )
    assert "'decoder.*' matches no" in line
    line = fails(capsys, *words["apply"][:-1], "n.ckpt", "--threads", "0")
    assert "--threads 0" in line


@pytest.mark.parametrize(
    "words, said",
    [
        (("apply", "a", "b", "-o", "c", "--scael", "1"), "mean --scale?"),
        (("merge", "m.yaml", "--recoverble", "x"), "mean --recoverable?"),
        (("merge", "--base", "a", "--rul.density", "1"), "mean --rule?"),
        (("vector", "a", "b", "-o", "c", "--rule.x=1"), "option --rule.x"),
        (("inspect", "a", "--any_base=maybe"), "option --any_base"),
        (("rules", "TIES", "DARE"), "unexpected argument 'DARE'"),
    ],
)
def test_an_option_that_is_none_is_named_with_the_nearest(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for verb, (_, summary) in VERBS.items():
        assert re.search(rf"^ +{verb} +{summary[:20]}", text, re.M), verb


def test_rules_are_listed_with_arguments_and_papers(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    found = run_json(capsys, "rules")["rules"]
    assert [rule["rule"] for rule in found] == list(RULES)
    ties = found[[rule["rule"] for rule in found].index("TIES")]
    assert ties["paper"] == "Yadav et al. 2023, arXiv 2306.01708"
    assert ties["summary"] == "Trim, elect sign, disjoint merge."
    assert ties["arguments"][0] == {
        "name": "density",
        "required": False,
        "default": 0.2,
    }
    assert all(rule["paper"][-1].isdigit() for rule in found)
    run("rules")
    text = capsys.readouterr().out
    assert "DARE(drop, scale=1.0, seed=0, then=None)" in text
    run("rules", "model_stock")
    text = capsys.readouterr().out
    assert text.startswith("ModelStock(scope='tensor', scale=1.0)")
    assert "equation 3" in text and "reference.model_stock" in text
    assert "Did you mean TIES?" in fails(capsys, "rules", "TEIS")


def test_warnings_are_one_line_each(folder, capsys):
    torch.save({**weights(), "head.weight": torch.ones(1)}, "other.ckpt")
    run(
        *("vector", "base.ckpt", "other.ckpt", "-o", "x.safetensors"),
        "--not-strict",
    )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("taskarith: warning: left out")
    assert "head.weight" in said[0]


def test_the_program_itself(folder):
    command = [sys.executable, "-m", "speechbrain_taskarith"]
    ran = subprocess.run(
        [*command, "inspect", "base.ckpt", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=_environment(),
    )
    assert json.loads(ran.stdout)["files"][0]["tensors"] == 5
    ran = subprocess.run(
        [*command, "inspect", "none.ckpt"],
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "Traceback" not in ran.stderr


def _environment():
    import os

    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root}


def test_lora_becomes_a_vector(folder):
    peft = pytest.importorskip("peft")

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 4)

    torch.manual_seed(2)
    network = Network()
    torch.save(network.state_dict(), "plain.ckpt")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"])
    adapted = peft.get_peft_model(network, config)
    lora = adapted.base_model.model.layer
    torch.nn.init.normal_(lora.lora_B["default"].weight)
    adapted.save_pretrained("lora")
    run("vector", "plain.ckpt", "lora", "--lora", "-o", "l.safetensors")
    delta = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    found = TaskVector.load("l.safetensors")
    assert list(found) == ["layer.weight"]
    assert torch.allclose(found["layer.weight"], 1.5 * delta, atol=1e-6)


def test_hugging_face_folder_keeps_its_other_files(folder):
    Path("hub").mkdir()
    Path("hub/config.json").write_text('{"model_type": "none"}')
    save_state(weights(), "hub/model.safetensors")
    run("vector", "hub", "us.ckpt", "-o", "t.safetensors")
    run("apply", "hub", "t.safetensors", "-o", "edited")
    assert Path("edited/config.json").read_text() == '{"model_type": "none"}'
    assert set(open_state("edited")) == set(weights())


def test_a_folder_may_have_a_dot_in_its_name(folder, capsys):
    Path("hub-v1.5").mkdir()
    Path("hub").mkdir()
    Path("hub/config.json").write_text('{"model_type": "none"}')
    save_state(weights(), "hub/model.safetensors")
    run("vector", "hub", "us.ckpt", "-o", "t.safetensors")
    words = ["apply", "hub", "t.safetensors", "-o"]
    run(*words, "hub-v1.5", "--overwrite")
    assert Path("hub-v1.5/config.json").exists()
    # Without a folder the suffix is a mistake, which a dry run finds too.
    line = fails(capsys, *words, "hub-v1.6", "--dry-run")
    assert "unknown suffix '.6'" in line and "must exist" in line


def test_progress_is_shown_on_stderr_only(folder, capsys, monkeypatch):
    monkeypatch.setenv("TASKARITH_PROGRESS", "1")
    words = ("vector", "base.ckpt", "us.ckpt", "-o", "us.safetensors")
    run(*words, "--json")
    said = capsys.readouterr()
    json.loads(said.out)
    assert "storing" in said.err and "2/2" in said.err
    run(*words, "--overwrite", "--no-progress")
    assert capsys.readouterr().err == ""
