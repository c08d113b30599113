"""Folders with several networks: all of them in one run, or one by name."""

import warnings

import cli_support as cli
import pytest
import torch
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_taskarith.vectors import (
    TIES,
    SequentialEditor,
    TaskArithmetic,
    TaskVector,
    merge_checkpoints,
    open_state,
)


def networks(value):
    """An encoder and a head, as recipes of CTC name them, and others."""
    encoder, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *head.parameters()):
            parameter.fill_(value)
    normalize = InputNormalization(norm_type="global")
    normalize(torch.ones(2, 3, 4) * value, torch.ones(2))
    return {"wav2vec2": encoder, "model": head, "normalize": normalize}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("A", 1.0), ("B", 2.0), ("C", 4.0)):
        Checkpointer(name, networks(value)).save_checkpoint(name="x")


def check(folder, value):
    """Load a folder as a recipe does."""
    found = networks(9.0)
    Checkpointer(folder, found).recover_if_possible()
    for name in ("wav2vec2", "model"):
        for parameter in found[name].parameters():
            torch.testing.assert_close(
                parameter, torch.full_like(parameter, value)
            )
    assert (found["normalize"].glob_mean == 1).all()


@pytest.mark.parametrize("which", ["all", "wav2vec2,model", "model, wav2vec2"])
def test_the_command_line_edits_all(tmp_path, capsys, which):
    how = ["--recoverable", which]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = cli.run_json(
            capsys, "vector", "A", "B", "-o", "v.safetensors", *how
        )
        assert (made["tensors"], made["parameters"]) == (4, 30)
        words = "apply A v.safetensors --scale 0.5 -o applied/CKPT+e"
        cli.run(*words.split(), *how)
        words = "merge --base A --finetuned B C --rule TaskArithmetic -o"
        cli.run(*words.split(), "merged/CKPT+e", *how, "--scale", "0.5")
    check("applied", 1.5)
    check("merged", 3.0)
    scale = ["--scale", "wav2vec2.*=1", "model.*=0"]
    words = "apply A v.safetensors -o parts/CKPT+e"
    cli.run(*words.split(), *scale, *how)
    found = networks(9.0)
    Checkpointer("parts", found).recover_if_possible()
    assert float(found["wav2vec2"].bias.detach()[0]) == 2.0
    assert float(found["model"].bias.detach()[0]) == 1.0
    for words in (
        "apply A v.safetensors -o e.ckpt",
        "merge --base A --finetuned B --rule TIES -o e.safetensors",
        "merge --base A --finetuned B --rule TIES -o e.ckpt",
    ):
        said = cli.fails(capsys, *words.split(), *how)
        assert "wav2vec2" in said and "CKPT+" in said


def test_python_edits_all(tmp_path):
    rule, how = TaskArithmetic(0.5), {"recoverable": "all", "progress": False}
    report = merge_checkpoints("A", ["B", "C"], rule, "m/CKPT+e", **how)
    assert (report.edited, report.parameters) == (4, 30)
    check("m", 3.0)
    with pytest.raises(ValueError, match=r"wav2vec2.*CKPT\+"):
        merge_checkpoints("A", ["B"], rule, "m.ckpt", **how)
    both = [open_state(folder, recoverable="all") for folder in "AB"]
    tau = TaskVector.between(*both)
    assert torch.equal(tau["model.bias"], torch.ones(2))
    with SequentialEditor(both[0], TIES(density=1.0), "edits") as editor:
        editor.learn("b", both[1])
    cli.run(
        *"edit export edits -o e/CKPT+e --like A --recoverable".split(),
        "model,wav2vec2",
    )
    check("e", 2.0)


def test_without_a_word_one_is_taken_and_the_others_named(capsys):
    with pytest.warns(UserWarning, match=r"wav2vec2 \(20 parameters\).*all"):
        merge_checkpoints("A", ["B"], TIES(), "m.ckpt", show_progress=False)
    assert len(open_state("m.ckpt")) == 2
    cli.run("vector", "A", "B", "-o", "v.safetensors")
    assert "wav2vec2 (20 parameters)" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="'wav2vec'"):
        open_state("A", recoverable="wav2vec,model")


def test_all_of_one_is_that_one(tmp_path):
    one = {"encoder": torch.nn.Linear(2, 2)}
    Checkpointer("one", one).save_checkpoint(name="x")
    assert set(open_state("one", recoverable="all")) == {"weight", "bias"}
