"""Tied names are one parameter, whichever of them a file holds."""

import pytest
import torch
from hugging_face_toy import save_whisper
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_taskarith.vectors import (
    TIES,
    SequentialEditor,
    TaskArithmetic,
    TaskVector,
    as_state,
    merge_checkpoints,
    open_state,
    save_state,
    search_scale,
    syn2real,
)

HEAD, TABLE = "proj_out.weight", "model.decoder.embed_tokens.weight"
# A folder of Hugging Face lacks the name that is tied; the others hold both.
FORMS = ("folder", "module", "pt", "ckpt", "save_model", "safetensors")


def forms(folder, model, name):
    """Return one Whisper in every form that it is stored in."""
    import safetensors.torch

    folder = folder / name
    model.save_pretrained(folder / "folder")
    torch.save(model.state_dict(), folder / "w.pt")
    Checkpointer(folder / "ckpt", {"model": model}).save_checkpoint(name="x")
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    save_state(model, folder / "w.safetensors")
    return {
        "folder": folder / "folder",
        "module": model,
        "pt": folder / "w.pt",
        "ckpt": folder / "ckpt",
        "save_model": folder / "model.safetensors",
        "safetensors": folder / "w.safetensors",
    }


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Return `base, tuned, fresh`: forms of two models, and a maker."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("whisper")
    kind = transformers.WhisperForConditionalGeneration
    start = save_whisper(folder / "start", "ForConditionalGeneration")

    def fresh():
        return kind.from_pretrained(start)

    tuned = fresh()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    base = forms(folder, fresh(), "base")
    return base, forms(folder, tuned, "tuned"), fresh


def check(model, expected):
    """Compare a model with another; its head is still its table."""
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_between_agrees(whisper, form):
    base, tuned, _ = whisper
    before = base["module"].state_dict()
    after = tuned["module"].state_dict()
    for other in FORMS:
        tau = TaskVector.between(base[form], tuned[other])
        names = set(open_state(base[form]) if form != "module" else before)
        assert set(tau) == names & {
            n for n in before if before[n].is_floating_point()
        }
        for name in tau:
            torch.testing.assert_close(tau[name], after[name] - before[name])


@pytest.mark.parametrize("encoding", ["lossless", "sparse", "int8"])
@pytest.mark.parametrize("taken", ["folder", "pt"])
def test_a_stored_vector_fits_every_form(whisper, tmp_path, taken, encoding):
    base, tuned, fresh = whisper
    tau = TaskVector.between(base[taken], tuned[taken])
    tau.save(tmp_path / "t.safetensors", encoding=encoding)
    tau = TaskVector.load(tmp_path / "t.safetensors")
    edited = fresh()
    tau.apply_(edited)
    if encoding != "int8":
        check(edited, tuned["module"])
    for form in FORMS:
        model = fresh()
        weights = tau.apply(base[form], any_base=True)
        if HEAD in weights:
            assert weights[HEAD] is weights[TABLE]
        model.load_state_dict(weights, strict=False)
        check(model, edited)
        path = tmp_path / f"{form}.safetensors"
        merge_checkpoints(
            base[form],
            [tmp_path / "t.safetensors", tuned["folder"]],
            TaskArithmetic(weights=[1.0, 0.0]),
            path,
            any_base=True,
            show_progress=False,
        )
        model.load_state_dict(dict(open_state(path)), strict=False)
        check(model, edited)
        # A vector of the result: the ties were stored.
        assert TaskVector.between(path, edited).norm() < 1e-4


def test_search_and_syn2real(whisper):
    base, tuned, fresh = whisper
    tau = TaskVector.between(base["folder"], tuned["folder"])

    def distance(model):
        gap = model.proj_out.weight - tuned["module"].proj_out.weight
        return float(gap.detach().norm())

    for form in FORMS:
        model = fresh()
        found = search_scale(model, base[form], tau, distance, [0.0, 0.5, 1.0])
        assert found.best == 1.0
        edited = syn2real(base[form], [(tuned["folder"], base["pt"])], scale=1)
        model.load_state_dict(edited, strict=False)
        check(model, tuned["module"])


@pytest.mark.parametrize(
    ("start", "learned"), [("folder", "module"), ("pt", "folder")]
)
def test_a_sequence(whisper, tmp_path, start, learned):
    base, tuned, fresh = whisper
    rule = TaskArithmetic(scale=1.0)
    with SequentialEditor(base[start], rule, tmp_path / "edits") as editor:
        editor.learn("x", tuned[learned])
    model = fresh()
    with SequentialEditor.resume(tmp_path / "edits", verify=True) as editor:
        model.load_state_dict(editor.state(), strict=False)
        check(model, tuned["module"])
        editor.undo("x")
        model.load_state_dict(editor.state(), strict=False)
        check(model, base["module"])


def test_a_choice_between_tied_names_cannot_be_applied(whisper, tmp_path):
    base, tuned, _ = whisper
    how = {"exclude": [HEAD]}
    whole = TaskVector.between(base["pt"], tuned["pt"])
    chosen = TaskVector.between(base["pt"], tuned["pt"], **how)
    chosen.save(tmp_path / "t.safetensors")
    for parted in (
        chosen,
        whole.restrict(**how),
        2 * chosen - chosen,
        TIES().combine([chosen]),
        TaskVector.load(tmp_path / "t.safetensors"),
    ):
        assert HEAD not in parted and TABLE in parted
        with pytest.raises(ValueError, match="include or exclude both"):
            parted.apply(base["pt"])
        with pytest.raises(ValueError, match="include or exclude both"):
            merge_checkpoints(base["pt"], [parted], TIES(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="include or exclude both"):
        merge_checkpoints(
            base["pt"], [tuned["pt"]], TIES(), tmp_path / "a.pt", **how
        )
    # Where nothing is tied there was no choice.
    chosen.apply(base["folder"], any_base=True)


def test_untied_in_one_model_only_is_refused(whisper, tmp_path):
    base, tuned, _ = whisper
    untied = {n: t.clone() for n, t in tuned["module"].state_dict().items()}
    untied[HEAD] += 1
    with pytest.raises(ValueError, match="two different ones"):
        TaskVector.between(base["pt"], untied)
    with pytest.raises(KeyError, match=HEAD):
        TaskVector.between(base["folder"], untied)


def test_ties_of_a_file_are_checked(tmp_path):
    import json

    import safetensors.torch

    shared = torch.ones(2)
    save_state({"a": shared, "b": shared}, tmp_path / "a.safetensors")
    assert open_state(tmp_path / "a.safetensors").aliases == {
        "a": "a",
        "b": "a",
    }
    for wrong in ("[1]", "{", json.dumps({"a": "c"}), json.dumps({"d": "a"})):
        safetensors.torch.save_file(
            {"a": torch.ones(2), "d": torch.ones(3)},
            tmp_path / "b.safetensors",
            {"tied_tensors": wrong},
        )
        with pytest.raises(ValueError, match=r"b.safetensors.*tied_tensors"):
            open_state(tmp_path / "b.safetensors")
    assert as_state({"a": shared, "b": shared.clone()}).aliases == {}
