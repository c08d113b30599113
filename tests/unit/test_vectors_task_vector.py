"""Task vectors: algebra, application, ancestry, storage."""

import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.torch import save_file

from speechbrain_taskarith.vectors import (
    SequentialEditor,
    TaskArithmetic,
    TaskVector,
    as_state,
    cosine_matrix,
    merge_checkpoints,
    open_state,
    search_scale,
    sign_agreement,
    syn2real,
)
from speechbrain_taskarith.vectors.encodings import ENCODINGS, decode, encode


class Net(torch.nn.Module):
    """Two linear maps that share weights, a BatchNorm and a counter."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = torch.nn.Linear(6, 6)
        self.decoder = torch.nn.ModuleDict(
            {"encoder_attn": torch.nn.Linear(6, 6)}
        )
        self.norm = torch.nn.BatchNorm1d(6)
        self.tied = torch.nn.Linear(6, 6, bias=False)
        self.tied.weight = self.encoder.weight


def tuned(base, seed=1, dtype=None):
    """A copy with every floating point number moved."""
    net = Net()
    net.load_state_dict(base.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in (*net.parameters(), net.norm.running_var):
            tensor.add_(0.1 * torch.rand_like(tensor))
        net.norm.num_batches_tracked.fill_(5)
    return net if dtype is None else net.to(dtype)


def test_difference_and_application_against_numpy():
    base = Net()
    after = tuned(base)
    tau = TaskVector.between(base, after)
    edited = tau.apply(base, 0.3)
    for name, before in base.state_dict().items():
        before, end = before.numpy(), after.state_dict()[name].numpy()
        if "running" in name or before.dtype != np.float32:
            assert name not in tau
            assert np.array_equal(edited[name].numpy(), before)
            continue
        assert np.array_equal(tau[name].numpy(), end - before)
        # In float32, product and sum rounded one after the other.
        expected = before + np.float32(0.3) * (end - before)
        assert np.array_equal(edited[name].numpy(), expected)


def test_full_scale_gives_back_the_finetuned_up_to_rounding():
    base, after = Net(), tuned(Net())
    edited = TaskVector.between(base, after).apply(base)
    for name, parameter in after.named_parameters():
        torch.testing.assert_close(
            edited[name], parameter.detach(), rtol=3e-7, atol=3e-8
        )


def test_scale_zero_is_the_base_bit_for_bit():
    base = Net()
    edited = TaskVector.between(base, tuned(base)).apply(base, 0.0)
    assert as_state(edited).fingerprint == as_state(base).fingerprint
    edited["encoder.weight"].add_(1)  # what was returned is the caller's
    assert not torch.equal(edited["encoder.weight"], base.encoder.weight)


def test_in_place_equals_apply_bit_for_bit():
    base, net = Net(), Net()
    tau = TaskVector.between(base, tuned(base))
    tau.apply_(net, 0.37)
    expected = tau.apply(base, 0.37)
    assert as_state(net).fingerprint == as_state(expected).fingerprint
    tau.apply_(net, -0.37)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(
            parameter, base.get_parameter(name), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    ("dtype", "value", "scale"),
    [
        (torch.float32, 3e38, 10.0),
        (torch.float32, float("nan"), 1.0),
        (torch.float64, float("inf"), 1.0),
        (torch.float64, 3e38, 10.0),
        (torch.float16, float("nan"), 1.0),
        (torch.bfloat16, 3e38, 10.0),
    ],
)
def test_in_place_changes_nothing_where_it_fails(dtype, value, scale):
    net = torch.nn.Linear(2, 2).to(dtype)
    before = as_state(net).fingerprint
    tau = TaskVector(
        {"weight": torch.ones(2, 2), "bias": torch.tensor([value, 1.0])}
    )
    with pytest.raises(ValueError, match="'bias'.*too large"):
        tau.apply_(net, scale)
    assert as_state(net).fingerprint == before


def test_expanded_buffers_are_named_and_nothing_changes():
    net = torch.nn.Linear(2, 2)
    net.register_buffer("gain", torch.ones(1).expand(3))
    before = as_state(net).fingerprint
    tau = TaskVector({"weight": torch.ones(2, 2), "gain": torch.ones(3)})
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for edit in (
        lambda: tau.apply_(net),
        lambda: search_scale(net, base, tau, len, [1.0]),
    ):
        with pytest.raises(ValueError, match=r"'gain'.*expand\(\).*clone"):
            edit()
        assert as_state(net).fingerprint == before


def test_a_vector_without_parameters_is_not_stored(tmp_path):
    with pytest.raises(ValueError, match="tau.safetensors.*no parameter"):
        TaskVector({}).save(tmp_path / "tau.safetensors")


def test_in_place_over_many_chunks(monkeypatch):
    from speechbrain_taskarith.vectors import application

    monkeypatch.setattr(application, "_CHUNK", {"cpu": 7, "cuda": 7})
    test_in_place_equals_apply_bit_for_bit()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_edited_in_float32(dtype):
    base = Net().to(dtype)
    after = tuned(Net()).to(dtype)
    tau = TaskVector.between(base, after)
    name = "encoder.weight"
    x, y = base.state_dict()[name].double(), after.state_dict()[name].double()
    assert tau[name].dtype == torch.float32
    assert torch.equal(tau[name].double(), y - x)
    edited = tau.apply(base, 0.5)
    assert edited[name].dtype == dtype
    assert torch.equal(edited[name], (x + 0.5 * (y - x)).to(dtype))
    net = Net().to(dtype)
    tau.apply_(net, 0.5)
    assert torch.equal(net.encoder.weight, edited[name])


def test_tied_tensors_count_once():
    """As in a file, which holds one of their names."""
    base = Net()
    models = [tuned(base), tuned(base, seed=2)]
    taus, alone = [], []
    for model in models:
        tau = TaskVector.between(base, model)
        taus.append(tau)
        alone.append(TaskVector({n: tau[n] for n in tau if n != "tied.weight"}))
    one, other = taus
    assert one["tied.weight"].any() and len(one) == len(alone[0]) + 1
    assert one.norm() == alone[0].norm()
    assert one.dot(other) == alone[0].dot(alone[1])
    assert one.cosine(other) == alone[0].cosine(alone[1])
    assert torch.equal(cosine_matrix(taus), cosine_matrix(alone))
    assert torch.equal(sign_agreement(taus), sign_agreement(alone))
    # Of another one they may be two.
    apart = dict(other) | {"tied.weight": other["tied.weight"] + 1}
    assert one.dot(apart) != one.dot(other)
    flat = [
        torch.cat([v[n].double().flatten() for n in one]) for v in (one, apart)
    ]
    cosine = torch.cosine_similarity(*flat, dim=0).item()
    assert one.cosine(apart) == pytest.approx(cosine)


def test_tied_tensors_are_edited_once_and_stay_tied():
    base = Net()
    tau = TaskVector.between(base, tuned(base))
    edited = tau.apply(base, 1.0)
    assert edited["tied.weight"] is edited["encoder.weight"]
    for vector in (tau, -tau, tau + tau, 2 * tau):
        assert vector["tied.weight"] is vector["encoder.weight"]
    net = Net()
    tau.apply_(net, 1.0)
    assert torch.equal(net.encoder.weight, edited["encoder.weight"])
    assert net.tied.weight is net.encoder.weight
    with pytest.raises(ValueError, match="two scales"):
        tau.apply(base, {"tied.*": 0.1, "*": 0.2})
    with pytest.raises(ValueError, match="only one of them"):
        tau.restrict(exclude=["tied.*"]).apply(base)
    apart = {k: v.clone() for k, v in tuned(base).state_dict().items()}
    apart["tied.weight"] += 1
    with pytest.raises(ValueError, match="two different ones"):
        TaskVector.between(base, apart)


def test_running_statistics_on_demand():
    base, after = Net(), tuned(Net())
    tau = TaskVector.between(base, after, buffers="edit")
    assert "norm.running_var" in tau
    assert "norm.num_batches_tracked" not in tau
    with pytest.raises(ValueError, match="buffers"):
        TaskVector.between(base, after, buffers="drop")


def test_patterns_are_anchored():
    base = Net()
    tau = TaskVector.between(base, tuned(base), include=["encoder.*"])
    assert set(tau) == {"encoder.weight", "encoder.bias"}
    scales = TaskVector.between(base, tuned(base)).scales(
        {"encoder.*": 0.1, "*.bias": 0.2}
    )
    assert scales["encoder.bias"] == 0.1
    assert scales["decoder.encoder_attn.bias"] == 0.2
    assert scales["decoder.encoder_attn.weight"] == 0.0
    for wrong in ({"include": ["enc"]}, {"exclude": ["layers.*"]}):
        with pytest.raises(ValueError, match="matches no parameter"):
            TaskVector.between(base, tuned(base), **wrong)
    with pytest.raises(ValueError, match="matches no parameter"):
        tau.apply(base, {"decoder.*": 1.0})


def test_keys_and_shapes_that_differ():
    base = Net().state_dict()
    less = {k: v for k, v in base.items() if k != "encoder.bias"}
    with pytest.raises(KeyError, match="encoder.bias"):
        TaskVector.between(base, less)
    with pytest.raises(KeyError, match="encoder.bias"):
        TaskVector.between(less, base)
    assert "encoder.bias" not in TaskVector.between(
        base, less, exclude=["encoder.bias"]
    )
    wide = dict(base, **{"encoder.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match=re.escape("(6,)")):
        TaskVector.between(base, wide)
    with pytest.warns(UserWarning, match="encoder.bias"):
        tau = TaskVector.between(base, wide, strict=False)
    assert "encoder.bias" not in tau
    full = TaskVector.between(base, tuned(Net()))
    with pytest.raises(KeyError, match="lacks.*encoder.bias"):
        full.apply(less, any_base=True)
    with pytest.raises(ValueError, match="vocabulary"):
        full.apply(wide, any_base=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_not_finite_is_refused(value, side):
    states = {"base": Net(), "finetuned": tuned(Net())}
    with torch.no_grad():
        states[side].encoder.bias[2] = value
    with pytest.raises(ValueError, match="encoder.bias.*NaN or infinity"):
        TaskVector.between(states["base"], states["finetuned"])


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scale_must_be_finite(scale):
    base = Net()
    tau = TaskVector.between(base, tuned(base))
    net = Net()
    for call in (
        lambda: tau.apply(base, scale),
        lambda: tau.apply_(net, {"*": scale}),
        lambda: tau * scale,
    ):
        with pytest.raises(ValueError, match="finite"):
            call()
    assert as_state(net).fingerprint == as_state(base).fingerprint


def test_ancestry():
    base, other = Net(), Net(seed=4)
    tau = TaskVector.between(base, tuned(base))
    with pytest.raises(ValueError, match="not the base of this task vector"):
        tau.apply(other)
    assert tau.apply(other, any_base=True)
    second = TaskVector.between(other, tuned(other))
    assert (tau + tau).base_fingerprint == as_state(base).fingerprint
    assert (tau + second).base_fingerprint is None
    with pytest.raises(ValueError, match="several bases"):
        (tau + second).apply(base)


def vectors_of(draw_shape=(3, 4)):
    element = st.floats(-1e3, 1e3, width=32)
    return hnp.arrays(np.float32, draw_shape, elements=element).map(
        lambda a: TaskVector({"w": torch.from_numpy(a.copy())}, "f" * 64)
    )


@settings(deadline=None, max_examples=60)
@given(vectors_of(), vectors_of(), st.floats(-4, 4, width=32))
def test_algebra(a, b, factor):
    assert torch.equal((a + b)["w"], (b + a)["w"])
    assert torch.equal((a - b)["w"], (-(b - a))["w"])
    assert torch.equal((factor * a)["w"], (a * factor)["w"])
    negative = -a
    assert torch.equal((-negative)["w"], a["w"])
    assert (a - a).norm() == 0.0
    x, y = a["w"].double().numpy(), b["w"].double().numpy()
    np.testing.assert_allclose(a.norm(), np.linalg.norm(x), rtol=1e-12)
    length = np.linalg.norm(x) * np.linalg.norm(y)
    expected = (x * y).sum() / length if length else 0.0
    np.testing.assert_allclose(a.cosine(b), expected, atol=1e-9)
    assert -1.0 <= a.cosine(b) <= 1.0
    mean = TaskVector.mean([a, b, a])["w"].double().numpy()
    np.testing.assert_allclose(mean, (x + y + x) / 3, rtol=1e-5, atol=1e-3)


def test_numbers_of_numpy_and_sum():
    tau = TaskVector({"w": torch.tensor([1.0, -2.0])}, "b")
    for factor in (np.float64(0.5), np.float32(0.5), np.int64(2)):
        for product in (factor * tau, tau * factor):
            assert isinstance(product, TaskVector)
            assert torch.equal(product["w"], float(factor) * tau["w"])
    total = sum([tau, 2 * tau])
    assert torch.equal(total["w"], 3 * tau["w"])
    assert total.base_fingerprint == "b"
    with pytest.raises(TypeError):
        1 + tau


def test_a_long_history_is_shortened(tmp_path):
    # A moving average over many vectors, as of an EMA.
    taus = [
        TaskVector({"w": torch.ones(1)}, "b", {"finetuned": f"run {n}"})
        for n in range(3)
    ]
    mean = taus[0]
    for step in range(500):
        mean = 0.99 * mean + 0.01 * taus[step % 3]
    for _ in range(20):
        mean = (mean + mean) / 2
    path = mean.save(tmp_path / "mean.safetensors")
    assert path.stat().st_size < 50_000
    found = str(TaskVector.load(path).metadata)
    assert all(f"run {n}" in found for n in range(3))
    assert torch.allclose(mean["w"], torch.ones(1))


def test_different_parameters_do_not_mix():
    a = TaskVector({"w": torch.ones(2)})
    with pytest.raises(KeyError, match="v, w"):
        a + TaskVector({"v": torch.ones(2)})
    with pytest.raises(ValueError, match="shape"):
        a + TaskVector({"w": torch.ones(3)})
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError, match="floating"):
        TaskVector({"w": torch.ones(2, dtype=torch.int32)})
    with pytest.raises(ValueError, match="no task vectors"):
        TaskVector.mean([])


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        elements=st.floats(-(2.0**99), 2.0**99, width=32) | st.just(-0.0),
    ),
    st.sampled_from(ENCODINGS),
)
def test_encodings(array, encoding):
    delta = torch.from_numpy(np.array(array))
    back = decode(*encode({"x.weight": delta}, encoding))["x.weight"]
    assert back.shape == delta.shape and back.dtype == torch.float32
    x, y = array.astype(np.float64), back.double().numpy()
    if encoding in ("lossless", "sparse"):
        assert back.numpy().tobytes() == np.array(array).tobytes()
    elif encoding.endswith("bf16"):
        assert np.all(np.abs(x - y) <= np.abs(x) * 2.0**-8 + 1e-38)
    elif array.size:
        rows = x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(1, -1)
        if encoding == "sparse-int8":
            rows = x.reshape(1, -1)
        bound = np.abs(rows).max(axis=1, keepdims=True) / 127 * 0.5001 + 1e-38
        assert np.all(np.abs(rows - y.reshape(rows.shape)) <= bound)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_saved_equals_loaded(tmp_path, encoding):
    base = Net()
    tau = TaskVector.between(base, tuned(base))
    path = tau.save(tmp_path / "tau.safetensors", encoding=encoding)
    again = TaskVector.load(path)
    assert again.base_fingerprint == tau.base_fingerprint
    assert again.metadata == tau.metadata
    assert set(again) == set(tau)
    tolerance = 0 if encoding in ("lossless", "sparse") else 1e-3
    for name in tau:
        error = (again[name] - tau[name]).abs().max()
        assert error <= tolerance, name
    # What is loaded from a lossy file is stored again without further loss.
    second = TaskVector.load(
        again.save(tmp_path / "b.safetensors", encoding=encoding)
    )
    if "int8" not in encoding:
        assert all(torch.equal(second[n], again[n]) for n in tau)


def altered_header(path, change, checksum=True):
    """Save a vector's file again with another header."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    header = json.loads(metadata["task_vector"])
    change(header)
    metadata["task_vector"] = text = json.dumps(header)
    if checksum:
        checksum = hashlib.sha256(text.encode()).hexdigest()
        metadata["task_vector_checksum"] = checksum
    else:
        metadata.pop("task_vector_checksum", None)
    save_file(tensors, path, metadata)


def both_readers(path):
    """Read a vector as it is loaded, and as a merge streams it."""
    output = path.with_name("merged.safetensors")
    yield lambda: TaskVector.load(path)
    yield lambda: merge_checkpoints(
        {"w": torch.zeros(2)},
        [path],
        TaskArithmetic(),
        output,
        any_base=True,
        show_progress=False,
    )
    assert not output.exists()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "change, text",
    [
        ({"version": 99}, "format version 99; known are 1 to 2"),
        ({"version": "2"}, "format version '2'"),
        ({"version": True}, "format version True"),
        ({"layout": {"w": {"as": "int6", "shape": [2]}}}, "encoding 'int6'"),
        ({"layout": {"w": {"shape": [2]}}}, "not a complete task vector"),
        ({"layout": None}, "not a complete task vector"),
    ],
)
def test_a_header_that_cannot_be_read(tmp_path, encoding, change, text):
    tau = TaskVector({"w": torch.tensor([0.01, -2.0])}, "b")
    path = tau.save(tmp_path / "tau.safetensors", encoding=encoding)
    altered_header(path, lambda header: header.update(change))
    for read in both_readers(path):
        with pytest.raises(ValueError, match=text):
            read()


def test_a_header_without_its_checksum(tmp_path):
    tau = TaskVector({"w": torch.tensor([0.01, -2.0])}, "b")
    path = tau.save(tmp_path / "tau.safetensors")
    altered_header(
        path, lambda header: header.update(base_fingerprint="c"), checksum=False
    )
    for read in both_readers(path):
        with pytest.raises(ValueError, match="does not match its checksum"):
            read()
    # The first format had none.
    altered_header(
        path, lambda header: header.update(version=1), checksum=False
    )
    again = TaskVector.load(path)
    assert again.base_fingerprint == "c" and torch.equal(again["w"], tau["w"])


def test_small_encodings_are_small(tmp_path):
    torch.manual_seed(0)
    delta = torch.randn(400, 500)
    delta[torch.rand_like(delta) < 0.8] = 0.0
    tau = TaskVector({"w": delta})
    size = {
        e: tau.save(tmp_path / f"{e}.safetensors", encoding=e).stat().st_size
        for e in ENCODINGS
    }
    full = size["lossless"]
    assert full / size["bf16"] > 1.95 and full / size["int8"] > 3.7
    assert full / size["sparse"] > 4.0 and full / size["sparse-bf16"] > 7.0
    assert full / size["sparse-int8"] > 11.0


def test_damaged_vector_is_refused(tmp_path):
    base = Net()
    path = tmp_path / "tau.safetensors"
    TaskVector.between(base, tuned(base)).save(path)
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[-9] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="tau.safetensors"):
        TaskVector.load(path)
    path.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="tau.safetensors"):
        TaskVector.load(path)
    other = tmp_path / "weights.safetensors"
    from speechbrain_taskarith.vectors import save_state

    save_state(base, other)
    with pytest.raises(ValueError, match="no task vector"):
        TaskVector.load(other)
    with pytest.raises(ValueError, match=".safetensors"):
        TaskVector.between(base, tuned(base)).save(tmp_path / "tau.pt")
    with pytest.raises(ValueError, match="unknown encoding"):
        TaskVector.between(base, tuned(base)).save(path, encoding="zip")


def test_applies_on_the_module_s_device(device):
    base = Net().to(device)
    tau = TaskVector.between(base, tuned(Net()).to(device))
    net = Net().to(device)
    tau.to("cpu").apply_(net, 0.5)
    assert net.encoder.weight.device == torch.device(device)
    torch.testing.assert_close(
        net.encoder.weight.detach().cpu(),
        tau.to("cpu").apply(Net(), 0.5)["encoder.weight"],
    )


@pytest.mark.parametrize("encoding", ["sparse", "int8"])
def test_layout_that_does_not_fit_names_the_parameter(encoding):
    tensors, layout = encode({"w": torch.ones(4, 4)}, encoding)
    layout["w"]["shape"] = [9, 9]
    with pytest.raises(ValueError, match="^w: "):
        decode(tensors, layout)


def as_a_model(vector, tmp_path):
    """Every call that takes a model, with a task vector in its place."""
    base, tuned = {"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}
    tau, rule = TaskVector.between(base, tuned), TaskArithmetic()
    module = torch.nn.ParameterDict(base)
    output = tmp_path / "out.safetensors"
    return [
        lambda: TaskVector.between(base, vector),
        lambda: TaskVector.between(vector, base),
        lambda: tau.apply(vector, any_base=True),
        lambda: rule(vector, [tau], any_base=True),
        lambda: merge_checkpoints(vector, [tuned], rule, output),
        lambda: syn2real(vector, [(tuned, base)]),
        lambda: syn2real(base, [(vector, base)]),
        lambda: search_scale(module, vector, tau, len, [1.0]),
        lambda: SequentialEditor(vector, rule, tmp_path / "edits"),
    ]


def test_a_task_vector_is_no_model(tmp_path):
    base, tuned = {"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}
    tau = TaskVector.between(base, tuned)
    path = tau.save(tmp_path / "tau.safetensors")
    for vector in (tau, path, str(path), open_state(path)):
        for wrong in as_a_model(vector, tmp_path):
            with pytest.raises(ValueError, match="where a model is expected"):
                wrong()
    with SequentialEditor(base, TaskArithmetic(), tmp_path / "e") as editor:
        with pytest.raises(ValueError, match="where a model is expected"):
            editor.learn("german", path)
        assert editor.log == []
