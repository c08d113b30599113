"""Types that are no plain floating point numbers: refused by name."""

import json

import numpy as np
import pytest
import torch

from speechbrain_taskarith.vectors import (
    TaskArithmetic,
    TaskVector,
    as_state,
    merge_checkpoints,
    open_state,
    save_state,
)

FLOATS = torch.tensor([[0.5, -0.25]])
OTHERS = {
    "int8": torch.tensor([[127, -64]], dtype=torch.int8),
    "bool": torch.tensor([[True, False]]),
    "complex64": torch.tensor([[1 + 2j, 3 - 1j]]),
    "float8_e4m3fn": FLOATS.to(torch.float8_e4m3fn),
    "float8_e5m2": FLOATS.to(torch.float8_e5m2),
    "float8_e8m0fnu": FLOATS.abs().to(torch.float8_e8m0fnu),
    "int64": torch.tensor([[1, 2]]),
}
CODES = [name for name in OTHERS if name not in ("bool", "int64")]


def changed(tensor):
    """Return a tensor of the type with other values."""
    return torch.cat([tensor[:, 1:], tensor[:, :1]], dim=1)


def attempts(tmp_path, base, tuned, **how):
    """The ways that weights are subtracted."""
    torch.save(base, tmp_path / "base.ckpt")
    torch.save(tuned, tmp_path / "tuned.ckpt")
    pair = tmp_path / "base.ckpt", tmp_path / "tuned.ckpt"
    rule, out = TaskArithmetic(1.0), tmp_path / "out.ckpt"
    return (
        lambda: TaskVector.between(base, tuned, **how).apply(base),
        lambda: TaskVector.between(*pair, **how).apply(pair[0]),
        lambda: merge_checkpoints(
            pair[0], [pair[1]], rule, out, show_progress=False, **how
        ),
    )


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("swap", [False, True])
def test_against_floats(tmp_path, kind, swap):
    states = [
        {"q.w": FLOATS, "v": torch.zeros(2)},
        {"q.w": OTHERS[kind], "v": torch.ones(2)},
    ]
    base, tuned = states[::-1] if swap else states
    for act in attempts(tmp_path, base, tuned):
        with pytest.raises(ValueError, match=r"'q\.w' is of type"):
            act()
    for act in attempts(tmp_path, base, tuned, exclude=["q.*"]):
        act()


@pytest.mark.parametrize("kind", CODES)
def test_codes_that_differ(tmp_path, kind):
    base = {"q.w": OTHERS[kind], "v": torch.zeros(2)}
    tuned = {"q.w": changed(OTHERS[kind]), "v": torch.ones(2)}
    for act in attempts(tmp_path, base, tuned):
        with pytest.raises(ValueError, match=r"'q\.w'.*exclude"):
            act()
    with pytest.warns(UserWarning, match=r"'q\.w'"):
        assert list(TaskVector.between(base, tuned, strict=False)) == ["v"]
    # Equal ones, and those excluded, are the base's.
    same = {**tuned, "q.w": OTHERS[kind].clone()}
    for other, how in ((same, {}), (tuned, {"exclude": ["q.w"]})):
        for act in attempts(tmp_path, base, other, **how):
            act()
        for result in (
            TaskVector.between(base, other, **how).apply(base),
            open_state(tmp_path / "out.ckpt"),
        ):
            bits = result["q.w"].view(torch.uint8)
            assert torch.equal(bits, OTHERS[kind].view(torch.uint8))
            assert torch.equal(result["v"], torch.ones(2))


def test_counters_and_masks_stay_the_base_s():
    base = {"n": torch.tensor(3), "m": torch.tensor([True]), "w": FLOATS}
    tuned = {"n": torch.tensor(9), "m": torch.tensor([False]), "w": FLOATS}
    assert list(TaskVector.between(base, tuned)) == ["w"]


def unreadable():
    """Tensors that are not read, by what the error calls them."""
    return {
        "qint8": torch.quantize_per_tensor(FLOATS, 0.1, 0, torch.qint8),
        "complex128": torch.ones(2, dtype=torch.complex128),
        "float8_e4m3fnuz": FLOATS.to(torch.float8_e4m3fnuz),
        "sparse_coo": FLOATS.to_sparse(),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*:UserWarning")
@pytest.mark.parametrize("kind", unreadable())
def test_what_torch_alone_knows_is_named(tmp_path, kind):
    base = {"a.q": unreadable()[kind], "w": torch.zeros(2)}
    tuned = {"a.q": unreadable()[kind], "w": torch.ones(2)}
    state = as_state(base)
    assert list(state) == ["w"] and kind in state.unreadable["a.q"]
    for act in (
        lambda: state["a.q"],
        lambda: TaskVector.between(base, tuned),
        lambda: TaskVector.between({"w": FLOATS[0]}, tuned),
        lambda: save_state(base, tmp_path / "a.ckpt"),
        lambda: merge_checkpoints(
            base, [tuned], TaskArithmetic(1.0), tmp_path / "a.ckpt"
        ),
    ):
        with pytest.raises(ValueError, match=rf"'a\.q' is of .*{kind}"):
            act()
    tau = TaskVector.between(base, tuned, exclude=["a.q"])
    assert torch.equal(tau["w"], torch.ones(2))
    with pytest.raises(ValueError, match=r"'a\.q'"):
        tau.apply(base)
    with pytest.raises(ValueError, match="a.q"):
        as_state({"a.q": unreadable()[kind]})
    assert not list(tmp_path.iterdir())


def test_in_place_leaves_quantised_tensors_alone():
    model = torch.nn.Linear(2, 1, bias=False)
    model.register_buffer("q", unreadable()["qint8"])
    tau = TaskVector({"weight": torch.ones(1, 2)})
    before = model.weight.detach().clone()
    tau.apply_(model, 0.5)
    assert torch.equal(model.weight, before + 0.5)


def write_safetensors(path, tensors):
    """Write a file by the format's description: `{name: (dtype, shape)}`."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("dtype", "size"), [("F4", 4), ("F6_E2M3", 6), ("F8_E4M3FNUZ", 8)]
)
def test_small_floats_of_safetensors(tmp_path, dtype, size):
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        floats = np.full(2, value, "<f4").tobytes()
        packed = ("F32", [2], floats), (dtype, [2, 4], bytes(size))
        write_safetensors(
            tmp_path / f"{name}.safetensors", dict(zip(("w", "q"), packed))
        )
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    state = open_state(base)
    assert torch.equal(state["w"], torch.zeros(2))
    with pytest.raises(ValueError, match=f"'q' is of type {dtype}.*exclude"):
        state["q"]
    with pytest.raises(ValueError, match=f"'q' is of type {dtype}.*exclude"):
        TaskVector.between(base, tuned)
    tau = TaskVector.between(base, tuned, exclude=["q"])
    assert torch.equal(tau["w"], torch.ones(2))
    # A size that its shape does not say, and a type that nobody knows.
    for wrong in ((dtype, [2, 5], bytes(size)), ("F3", [8], bytes(8))):
        write_safetensors(base, {"q": wrong})
        with pytest.raises(ValueError, match=r"base\.safetensors: tensor 'q'"):
            open_state(base)


def test_scales_of_eight_bits_are_read(tmp_path):
    write_safetensors(
        tmp_path / "a.safetensors",
        {"s": ("F8_E8M0", [2], bytes([127, 128])), "w": ("F32", [0], b"")},
    )
    assert open_state(tmp_path / "a.safetensors")["s"].float().tolist() == [
        1.0,
        2.0,
    ]


def test_conjugates_are_written_as_they_read(tmp_path):
    z = torch.tensor([1 + 2j])
    save_state({"z": z.conj(), "n": z.conj().imag}, tmp_path / "a.ckpt")
    assert open_state(tmp_path / "a.ckpt")["z"].tolist() == [1 - 2j]
    assert (
        as_state({"n": z.conj().imag}).fingerprint
        == as_state({"n": torch.tensor([-2.0])}).fingerprint
    )
