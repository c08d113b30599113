"""`EditingCheckpointer` on models whose state dicts hold more than weights.

Tied tensors (Whisper's output layer), extra states, counters in the base's
file: the law holds, stock SpeechBrain reads the result, a run goes on.
"""

import copy

import pytest
import torch
from checks import law, weights
from hugging_face_toy import save_whisper
from speechbrain.utils.checkpoints import Checkpointer, average_checkpoints

from speechbrain_taskarith.vectors import (
    DARE,
    TIES,
    Breadcrumbs,
    EditingCheckpointer,
    IsoC,
    LiNeS,
    TaskArithmetic,
    TaskVector,
    as_state,
    open_state,
    save_state,
)
from speechbrain_taskarith.vectors.engine.inputs import MergeInputs
from speechbrain_taskarith.vectors.engine.output import edit_in_memory

EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "proj_out.weight"


class Counting(torch.nn.Module):
    """With an extra state."""

    def __init__(self, seen=0):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.seen = seen

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def editing(folder, model, base, rule=None):
    rule = rule or TaskArithmetic(scale=0.4)
    return EditingCheckpointer(folder, {"model": model}, base=base, rule=rule)


def train(checkpointer, model, steps=1):
    """Fit without a Brain; return the checkpoints' folder."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer.recover_if_possible(weights="finetuned")
    for step in range(steps):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return checkpointer.save_checkpoint().path


# -- ties ----------------------------------------------------------------------


def whisper(folder):
    transformers = pytest.importorskip("transformers")
    kind = transformers.WhisperForConditionalGeneration
    return kind.from_pretrained(folder)


@pytest.fixture
def hugging_face(tmp_path):
    return save_whisper(tmp_path / "base", "ForConditionalGeneration")


def forms(folder, tmp_path):
    """The same base in every form, with and without the tied name."""
    model = whisper(folder)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    return {
        "folder": folder,
        "tied.ckpt": save_state(model, tmp_path / "tied.ckpt"),
        "apart.ckpt": save_state(state, tmp_path / "apart.ckpt"),
        "apart": save_state(state, tmp_path / "apart.safetensors"),
    }


@pytest.mark.parametrize("form", ["folder", "tied.ckpt", "apart.ckpt", "apart"])
def test_tied_tensors_are_edited_once(tmp_path, hugging_face, form):
    base = forms(hugging_face, tmp_path)[form]
    model = whisper(hugging_face)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    # Counting the embedding twice would move the threshold.
    rule = TIES(density=0.3, scale=0.6)
    checkpointer = editing(tmp_path / "save", model, base, rule)
    path = train(checkpointer, model)
    edited, tuned = weights(path / "model.ckpt"), model.state_dict()
    once = {n: before[n].double() for n in before if n != HEAD}
    vector = {n: tuned[n].double() - once[n] for n in once}
    flat = torch.cat([delta.flatten() for delta in vector.values()])
    cut = flat.abs().topk(round(0.3 * len(flat))).values.min()
    for name, delta in vector.items():
        expected = once[name] + 0.6 * delta * (delta.abs() >= cut)
        torch.testing.assert_close(edited[name].double(), expected)
    assert torch.equal(edited[HEAD], edited[EMBEDDING])
    for file in ("model.ckpt", "model.finetuned.ckpt"):
        assert open_state(path / file).aliases[HEAD] == EMBEDDING
    # Stock SpeechBrain reads it, and a test by ours.
    for stock in (True, False):
        fresh = whisper(hugging_face)
        if stock:
            kind = Checkpointer(tmp_path / "save", {"model": fresh})
        else:
            kind = editing(tmp_path / "save", fresh, base, rule)
        kind.recover_if_possible()
        assert fresh.proj_out.weight is fresh.model.decoder.embed_tokens.weight
        assert torch.equal(fresh.proj_out.weight, edited[EMBEDDING])


def test_a_tied_run_goes_on_and_averages(tmp_path, hugging_face):
    model = whisper(hugging_face)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    checkpointer = editing(tmp_path / "save", model, hugging_face)
    law(train(checkpointer, model), base, "model", 0.4)
    # Another process.
    model = whisper(hugging_face)
    checkpointer = editing(tmp_path / "save", model, hugging_face)
    second = train(checkpointer, model, steps=2)
    law(second, base, "model", 0.4)
    found = checkpointer.find_checkpoints()
    assert len(found) == 2
    model.load_state_dict(average_checkpoints(found, "model"))
    kept = checkpointer.save_checkpoint(name="mean").path
    law(kept, base, "model", 0.4)
    finetuned = weights(kept / "model.finetuned.ckpt")
    # SpeechBrain's own mean adds what is tied twice, and then counts it once.
    one, two = (weights(c.paramfiles["model.finetuned"]) for c in found)
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    torch.testing.assert_close(finetuned, mean)
    assert open_state(kept / "model.finetuned.ckpt").aliases[HEAD] == EMBEDDING


def test_two_values_for_a_tied_tensor_are_refused(tmp_path, hugging_face):
    model = whisper(hugging_face)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state[HEAD] += 1
    base = save_state(state, tmp_path / "apart.safetensors")
    checkpointer = editing(tmp_path / "save", model, base)
    with pytest.raises(ValueError, match=r"proj_out.*are one tensor in"):
        checkpointer.recover_if_possible(weights="finetuned")
    assert not list((tmp_path / "save").glob("CKPT+*"))


def test_what_the_base_ties_may_be_trained_apart(tmp_path, hugging_face):
    path = save_state(whisper(hugging_face), tmp_path / "tied.ckpt")
    assert open_state(path).aliases
    model = whisper(hugging_face)
    model.proj_out.weight = torch.nn.Parameter(model.proj_out.weight.clone())
    base = {n: t.clone() for n, t in model.state_dict().items()}
    kept = train(editing(tmp_path / "save", model, path), model)
    law(kept, base, "model", 0.4)
    edited = weights(kept / "model.ckpt")
    assert not torch.equal(edited[HEAD], edited[EMBEDDING])


# -- what is no tensor ---------------------------------------------------------


def base_of(form, folder, model):
    """The base of a run, with or without its own extra state."""
    if form == "start":
        return form
    content = copy.deepcopy(model.state_dict())
    if form == "a mapping with counters":
        content |= {"step": 5, "note": "of another toolkit"}
    if form == "without":
        del content["_extra_state"]
        return save_state(content, folder / "base.safetensors")
    if form == "in a wrapper":
        content = {f"module.{name}": value for name, value in content.items()}
    torch.save(content, folder / "base.pt")
    return folder / "base.pt"


@pytest.mark.parametrize(
    "form",
    ["plain", "start", "without", "in a wrapper", "a mapping with counters"],
)
def test_an_extra_state_is_the_base_s_where_edited(tmp_path, form):
    """As running statistics are; training goes on from its own."""
    model = Counting(seen=3)
    tensors = {
        name: tensor.clone()
        for name, tensor in as_state(model).to_dict().items()
        if name != "_extra_state"
    }
    base = base_of(form, tmp_path, model)
    checkpointer = editing(tmp_path / "save", model, base)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer.recover_if_possible(weights="finetuned")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model.seen = 8
    path = checkpointer.save_checkpoint().path
    kept = [
        torch.load(path / f"model{end}.ckpt", weights_only=True)
        for end in ("", ".finetuned")
    ]
    # What the base lacks stays as trained.
    seen = 8 if form == "without" else 3
    found = [content.pop("_extra_state")["seen"] for content in kept]
    assert found == [seen, 8]
    for name, tensor in tensors.items():
        moved = tensor + 0.4 * (kept[1][name] - tensor)
        expected = moved if tensor.is_floating_point() else tensor
        torch.testing.assert_close(kept[0][name], expected)
    for kind, expected in (("edited", seen), ("finetuned", 8)):
        fresh = Counting(seen=99)
        again = editing(tmp_path / "save", fresh, base)
        again.recover_if_possible(weights=kind)
        assert fresh.seen == expected
    stock = Counting(seen=99)
    Checkpointer(tmp_path / "save", {"model": stock}).recover_if_possible()
    assert stock.seen == seen
    # Another scale after the training: the edit is made again.
    fresh = Counting(seen=99)
    rule = TaskArithmetic(scale=1.0)
    editing(tmp_path / "save", fresh, base, rule).recover_if_possible()
    assert fresh.seen == seen
    torch.testing.assert_close(fresh.linear.weight, model.linear.weight)


def test_weights_with_an_extra_state_from_outside(tmp_path):
    model = Counting()
    base = save_state(model, tmp_path / "base.ckpt")
    checkpointer = editing(tmp_path / "save", model, base)
    kept = train(checkpointer, model)
    checkpointer.find_checkpoints()
    # One of ours is known again, by its tensors.
    model.load_state_dict(torch.load(kept / "model.ckpt"))
    assert checkpointer.save_checkpoint().path
    other = Counting(seen=7)
    model.load_state_dict(other.state_dict())
    assert model.seen == 7
    with pytest.raises(RuntimeError, match="loaded from outside"):
        checkpointer.save_checkpoint()


def test_an_extra_state_that_is_a_tensor(tmp_path):
    """Its length may differ from the base's, as Transformer Engine's does."""

    class Scaled(torch.nn.Linear):
        history = torch.ones(3)

        def get_extra_state(self):
            return self.history

        def set_extra_state(self, state):
            self.history = state

    model = Scaled(2, 2)
    base = save_state(model, tmp_path / "base.ckpt")
    model.history = torch.ones(5)
    before = model.weight.detach().clone()
    path = train(editing(tmp_path / "save", model, base), model)
    edited = weights(path / "model.ckpt")
    expected = before + 0.4 * (model.weight - before)
    torch.testing.assert_close(edited["weight"], expected.detach())
    assert torch.equal(edited["_extra_state"], torch.ones(3))


def test_an_extra_state_in_a_vector_of_the_run(tmp_path):
    """What the run leaves behind is an ordinary checkpoint."""
    model = Counting(seen=3)
    base = save_state(model, tmp_path / "base.ckpt")
    kept = train(editing(tmp_path / "save", model, base), model)
    tau = TaskVector.between(base, kept / "model.finetuned.ckpt")
    edited = tau.apply(base, 0.4)
    found = open_state(kept)
    assert found.extra == {"_extra_state": {"seen": 3}}
    for name in found:
        torch.testing.assert_close(found[name], edited[name])


# -- one pass ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "rule",
    [
        TaskArithmetic(scale={"a.*": 0.3, "tied": 0.3, "b": -1.0}),
        TIES(density=0.3, scale=0.6),
        TIES(density=0.3, trim="tensor"),
        DARE(0.5, scale=0.5),
        Breadcrumbs(),
        IsoC(),
        LiNeS(TaskArithmetic(), slope=1.0),
    ],
    ids=repr,
)
def test_an_edit_in_one_pass_is_the_vector_s(dtype, rule):
    """Bit for bit what the rule makes of the vector in memory."""
    noise = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)

    def weights_of(step):
        matrix = torch.randn(300, 400, generator=noise).to(kind)
        state = {
            "a.layers.0.weight": matrix,
            "a.layers.1.weight": torch.randn(9, 8, generator=noise).to(kind),
            "b": torch.randn(5, generator=noise).to(kind),
            "running_mean": torch.randn(2, generator=noise),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(float(step)),
            "steps": torch.tensor(step),
            "_extra_state": {"step": step},
        }
        return state | {"tied": matrix}

    base, tuned = as_state(weights_of(1)), as_state(weights_of(2))
    inputs = MergeInputs(base, [tuned])
    found = edit_in_memory(inputs, rule, inputs.scales(rule))
    expected = rule(base, [TaskVector.between(base, tuned)])
    assert list(found) == list(expected)
    for name, tensor in found.items():
        if name == "_extra_state":
            assert tensor == {"step": 1}
            continue
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    assert found["tied"] is found["a.layers.0.weight"]
