"""Entries of a state dict that are no tensors: carried, never edited."""

import copy
import warnings

import cli_support as cli
import numpy as np
import pytest
import torch
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_taskarith import transducer
from speechbrain_taskarith.vectors import (
    TIES,
    SequentialEditor,
    TaskArithmetic,
    TaskVector,
    TaskVectorPretrainer,
    align_vocabulary,
    as_state,
    merge_checkpoints,
    open_state,
    save_checkpoint,
    save_state,
)


class Gain(torch.nn.Linear):
    """A layer whose extra state is whatever it is given."""

    extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def recogniser(shift=0.0):
    """A tiny streaming recogniser with a normaliser and an extra state."""
    torch.manual_seed(0)
    predictor = transducer.LSTMPredictor(5, 4, 6, num_layers=1)
    joint = transducer.RNNTJoint(16, 6, 8, 5)
    normalize = InputNormalization(norm_type="global")
    normalize(torch.randn(2, 9, 20), torch.ones(2))
    model = transducer.StreamingTransducer(
        transducer.LocalFbank(n_mels=20),
        transducer.Emformer(16, 4, 32, 1, 4, 1, 8),
        transducer.TransducerGreedySearch(predictor, joint, 0),
        detokenize=lambda tokens: " ".join(map(str, tokens)),
        frontend=transducer.TimeReduction(20, 16, factor=4),
        normalize=normalize,
    ).eval()
    model.gain = Gain(2, 2)
    model.gain.extra = {"seen": 3}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift
    return model


def test_a_streaming_recogniser_has_a_vector():
    model = recogniser()
    tau = TaskVector.between(model, copy.deepcopy(model))
    assert tau.norm() == 0
    assert set(tau) == {
        name
        for name in model.state_dict()
        if not name.startswith("normalize.") and name != "gain._extra_state"
    }
    tuned = recogniser(0.5)
    tuned.normalize.glob_mean += 1
    edited = TaskVector.between(model, tuned).apply(model, 0.5)
    fresh = recogniser(0.1)
    fresh.normalize.glob_mean *= 0
    fresh.load_state_dict(edited, strict=True)
    # The normaliser is the base's: statistics are no weights.
    assert torch.equal(fresh.normalize.glob_mean, model.normalize.glob_mean)
    for one, other in zip(fresh.parameters(), model.parameters()):
        torch.testing.assert_close(one, other + 0.25)
    # A copy: the edited model's statistics are its own.
    fresh.normalize.glob_mean += 7
    assert not torch.equal(fresh.normalize.glob_mean, model.normalize.glob_mean)


@pytest.mark.parametrize("output", ["merged.ckpt", "CKPT+merged", "a.pt"])
def test_merged_recognisers_load_strictly(tmp_path, output):
    base = recogniser()
    for number in (1, 2):
        torch.save(recogniser(number).state_dict(), tmp_path / f"{number}.ckpt")
    parents = [tmp_path / "1.ckpt", tmp_path / "2.ckpt"]
    merge_checkpoints(
        base,
        parents,
        TaskArithmetic(0.5),
        tmp_path / output,
        show_progress=False,
    )
    fresh = recogniser(9)
    fresh.normalize.glob_mean *= 0
    path = tmp_path / output
    path = path / "model.ckpt" if path.is_dir() else path
    fresh.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert torch.equal(fresh.normalize.glob_mean, base.normalize.glob_mean)
    for one, other in zip(fresh.parameters(), base.parameters()):
        torch.testing.assert_close(one, other + 1.5)


@pytest.mark.parametrize("output", ["merged.safetensors", "folder"])
def test_safetensors_cannot_hold_an_extra_state(tmp_path, output):
    base, tuned = recogniser(), recogniser(1)
    with pytest.raises(ValueError, match=r"_extra_state.*\.ckpt"):
        merge_checkpoints(
            base, [tuned], TIES(), tmp_path / output, show_progress=False
        )
    with pytest.raises(ValueError, match=r"_extra_state.*\.ckpt"):
        save_state(base, tmp_path / output)
    assert not list(tmp_path.iterdir())
    # Nothing asks for a counter when it loads weights.
    with pytest.warns(UserWarning, match="step"):
        save_state({"w": torch.ones(1), "step": 5}, tmp_path / output)
    assert list(open_state(tmp_path / output)) == ["w"]


def test_the_command_line_edits_a_recogniser(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Checkpointer(
            f"results/{number}", {"model": recogniser(number)}
        ).save_checkpoint(name="x")
    file = next((tmp_path / "results/0").glob("*/model.ckpt"))
    looked = cli.run_json(capsys, "inspect", file)["files"][0]
    assert looked["extra"] == ["gain._extra_state"]
    cli.run("vector", "results/0", "results/1", "-o", "one.safetensors")
    cli.run("apply", "results/0", "one.safetensors", "-o", "CKPT+applied")
    words = "merge --base results/0 --finetuned results/1 results/2".split()
    words += "--rule TaskArithmetic --scale 0.5 -o".split()
    cli.run(*words, "CKPT+merged")
    cli.run(*words, "merged.ckpt")
    assert "_extra_state" in cli.fails(capsys, *words, "merged.safetensors")
    words = "edit learn edits".split()
    rule = "--base results/0 --rule TIES density=1 --scale 0.5".split()
    cli.run(*words, "one", "results/1", *rule)
    cli.run("edit", "export", "edits", "-o", "learned.ckpt")
    cli.run("edit", "undo", "edits", "one")
    cli.run("edit", "export", "edits", "-o", "undone.ckpt")
    shifts = {
        "CKPT+applied/model.ckpt": 1,
        "CKPT+merged/model.ckpt": 1.5,
        "merged.ckpt": 1.5,
        "learned.ckpt": 0.5,
        "undone.ckpt": 0,
    }
    base = recogniser()
    for path, shift in shifts.items():
        fresh = recogniser(9)
        fresh.normalize.glob_mean *= 0
        fresh.load_state_dict(torch.load(path, weights_only=True))
        assert torch.equal(fresh.normalize.glob_mean, base.normalize.glob_mean)
        for one, other in zip(fresh.parameters(), base.parameters()):
            torch.testing.assert_close(one, other + shift)


def test_a_recipe_s_pretrainer_starts_from_an_edited_recogniser(tmp_path):
    base = recogniser()
    torch.save(base.state_dict(), tmp_path / "base.ckpt")
    tau = TaskVector.between(base, recogniser(1.0))
    tau.save(tmp_path / "v.safetensors")
    fresh = recogniser(9.0)
    fresh.normalize.glob_mean *= 0
    pretrainer = TaskVectorPretrainer(
        loadables={"model": torch.compile(fresh)},
        paths={"model": str(tmp_path / "base.ckpt")},
        vectors={"model": [str(tmp_path / "v.safetensors")]},
        rule=TaskArithmetic(0.5),
        collect_in=tmp_path / "collected",
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    assert torch.equal(fresh.normalize.glob_mean, base.normalize.glob_mean)
    for one, other in zip(fresh.parameters(), base.parameters()):
        torch.testing.assert_close(one, other + 0.5)


@pytest.mark.parametrize(
    "extra", [None, {"seen": 3}, [1.5, "a"], {"mean": torch.ones(2)}]
)
def test_any_extra_state_is_carried(tmp_path, extra):
    layer = torch.nn.Sequential(Gain(2, 2))
    layer[0].extra = extra
    save_state(layer, tmp_path / "a.ckpt")
    edited = TaskVector.between(layer, tmp_path / "a.ckpt").apply(layer)
    for state in (edited, torch.load(tmp_path / "a.ckpt", weights_only=True)):
        fresh = torch.nn.Sequential(Gain(2, 2))
        fresh.load_state_dict(state)
        assert str(fresh[0].extra) == str(extra)
    editor = SequentialEditor(layer, TIES(), tmp_path / "edits")
    editor.learn("us", layer)
    assert str(editor.state()["0._extra_state"]) == str(extra)
    editor.close()
    with SequentialEditor.resume(tmp_path / "edits") as editor:
        assert str(editor.state()["0._extra_state"]) == str(extra)


def test_an_extra_state_that_is_a_tensor_is_not_edited():
    """As Transformer Engine's, which differs in length."""
    base = {"w": torch.zeros(2), "_extra_state": torch.ones(3)}
    tuned = {"w": torch.ones(2), "_extra_state": torch.ones(5) * 9}
    tau = TaskVector.between(base, tuned)
    assert list(tau) == ["w"]
    assert torch.equal(tau.apply(base)["_extra_state"], torch.ones(3))


def test_counters_beside_weights():
    base = {"w": torch.zeros(2), "step": 5, "note": None, "shape": [1, (2,)]}
    tau = TaskVector.between(base, {"w": torch.ones(2), "step": 9})
    assert list(tau) == ["w"] and "step" not in as_state(base)
    assert tau.apply(base)["step"] == 5 and tau.apply(base)["note"] is None
    (aligned, _), _ = align_vocabulary(
        [base, {"w": torch.ones(1)}], [["a", "b"], ["b"]], "w"
    )
    assert aligned["step"] == 5


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    layer = Gain(2, 2)
    layer.extra = {"path": tmp_path}
    with pytest.raises(ValueError, match=r"_extra_state.*PosixPath"):
        save_state(layer, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="_extra_state"):
        save_checkpoint({"model": layer}, tmp_path / "CKPT+a")
    assert not list(tmp_path.iterdir())


def test_other_checkpoints_stay_refused(tmp_path):
    weights = {"w": torch.ones(1)}
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    refused = {
        "epoch": {"epoch": 3, "loss": 0.5},
        "optimizer": adam.state_dict(),
        "inside": {"loss": torch.tensor(1.0), "optimizer": adam.state_dict()},
        "nested": {"loss": torch.tensor(1.0), "ema": weights},
        "listed": {"loss": torch.tensor(1.0), "layers": [torch.ones(2)]},
    }
    for name, content in refused.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=f"{name}.pt"):
            open_state(tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match="'v' is a ndarray"):
        as_state({"w": torch.ones(1), "v": np.ones(3)})


def test_a_normaliser_is_no_network(tmp_path):
    normalize = InputNormalization(norm_type="global")
    normalize(torch.randn(2, 9, 4), torch.ones(2))
    Checkpointer(
        tmp_path, {"encoder": torch.nn.Linear(2, 2), "normalize": normalize}
    ).save_checkpoint(name="x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(open_state(tmp_path)) == {"weight", "bias"}
    with pytest.raises(ValueError, match="normaliser"):
        open_state(tmp_path, recoverable="normalize")


def differing(folder):
    """Write a base and two models of which one has another extra state."""
    for name, seen, step in (("base", 3, 1), ("same", 3, 1), ("other", 4, 2)):
        model = torch.nn.Sequential(Gain(2, 2), Gain(2, 2))
        model[0].extra = {"seen": seen, "scale": torch.tensor([1.0, step])}
        model[1].extra = [1, (2,)]
        torch.save({**model.state_dict(), "step": step}, folder / f"{name}.pt")
    return ["0._extra_state", "step"]


@pytest.mark.parametrize("output", ["out.ckpt", "CKPT+out"])
def test_what_stays_the_base_s_is_reported(
    tmp_path, monkeypatch, capsys, output
):
    monkeypatch.chdir(tmp_path)
    names, line = differing(tmp_path), "kept from the base, though it differs"

    def said(*words):
        """Return what is reported by a run, and on its card."""
        dry = cli.run_json(capsys, *words, "--overwrite", "--dry-run")
        result = cli.run_json(capsys, *words, "--overwrite")
        path = tmp_path / words[-1]
        card = path / "README.md" if path.is_dir() else f"{path}.md"
        text = (tmp_path / card).read_text()
        found = result["extra_of_base"]
        assert dry["extra_of_base"] == found
        assert ("Kept from the base" in text) == bool(found)
        assert all(name in text for name in found)
        return sorted(found)

    for model, expected in (("same", []), ("other", names)):
        vector = ["vector", "base.pt", f"{model}.pt"]
        assert said(*vector, "-o", f"{model}.safetensors") == expected
        apply = ["apply", "base.pt", f"{model}.safetensors"]
        assert said(*apply, "-o", output) == expected
    merge = ["merge", "--base", "base.pt", "--rule", "TaskArithmetic"]
    merge += ["--finetuned", "same.pt"]
    for last in ("other.pt", "other.safetensors"):
        assert said(*merge, last, "-o", output) == names
    found = torch.load(
        output if output.endswith(".ckpt") else f"{output}/model.ckpt",
        weights_only=True,
    )
    assert found["0._extra_state"]["seen"] == 3
    cli.run(*merge, "other.pt", "-o", "again.ckpt")
    assert line in capsys.readouterr().out
    learn = ["edit", "learn", "edits", "other", "other.pt", "--base"]
    learn += ["base.pt", "--rule", "TIES", "density=1"]
    dry = cli.run_json(capsys, *learn, "--dry-run")
    assert dry["extra_of_base"] == sorted(names)
    assert cli.run_json(capsys, *learn)["extra_of_base"] == sorted(names)


def test_extra_states_are_compared_under_the_base_s_names(tmp_path):
    inner = Gain(2, 2)
    inner.extra = {"seen": 1}
    base = {"model.layer." + n: t for n, t in inner.state_dict().items()}
    inner.extra = {"seen": 2}
    other = {"model.model.layer." + n: t for n, t in inner.state_dict().items()}
    report = merge_checkpoints(
        base, [base, other], TaskArithmetic(), tmp_path / "o.ckpt"
    )
    assert report.extra_of_base == ["model.layer._extra_state"]
    assert open_state(tmp_path / "o.ckpt").extra == {
        "model.layer._extra_state": {"seen": 1}
    }
