"""Edits in half precision: what overflows, what is rounded, other types."""

import functools

import pytest
import torch

from speechbrain_taskarith.vectors import (
    TaskArithmetic,
    TaskVector,
    as_state,
    merge_checkpoints,
    open_state,
    search_scale,
    syn2real,
)
from speechbrain_taskarith.vectors.application import rounding_loss

merge = functools.partial(merge_checkpoints, show_progress=False)

HALF = [torch.float16, torch.bfloat16]


def near_the_end(dtype):
    """Base and fine-tuned weights whose edit by scale 3 is too large."""
    largest = torch.finfo(dtype).max
    base = {"a": torch.zeros(3), "w": torch.tensor([0.9 * largest, 1.0])}
    tuned = {"a": torch.ones(3), "w": torch.tensor([0.95 * largest, 1.0])}
    return [{n: t.to(dtype) for n, t in s.items()} for s in (base, tuned)]


class TestOverflow:
    """`base + scale * vector` that the stored type cannot hold."""

    @pytest.mark.parametrize("dtype", [*HALF, torch.float32])
    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
    def test_merge(self, tmp_path, dtype, suffix):
        base, tuned = near_the_end(dtype)
        output = tmp_path / f"merged{suffix}"
        output.write_text("before")
        with pytest.raises(ValueError, match="'w': base .* 3 .* too large for"):
            merge(base, [tuned], TaskArithmetic(3.0), output)
        assert [p.name for p in tmp_path.iterdir()] == [output.name]
        assert output.read_text() == "before"

    @pytest.mark.parametrize("dtype", [*HALF, torch.float32])
    def test_in_memory(self, dtype):
        base, tuned = near_the_end(dtype)
        tau = TaskVector.between(base, tuned)
        for edit in (
            lambda: tau.apply(base, 3.0),
            lambda: TaskArithmetic(3.0)(base, [tau]),
            lambda: syn2real(base, [(tuned, base)], scale=3.0),
        ):
            with pytest.raises(ValueError, match="'w': base .* too large for"):
                edit()
        assert torch.isfinite(tau.apply(base, 1.0)["w"]).all()

    @pytest.mark.parametrize("dtype", HALF)
    def test_in_place_nothing_changes(self, dtype):
        base, tuned = near_the_end(dtype)
        module = torch.nn.ParameterDict(base)
        tau = TaskVector.between(base, tuned)
        with pytest.raises(ValueError, match="'w': base .* too large for"):
            tau.apply_(module, 3.0)
        for name, tensor in base.items():
            assert torch.equal(module[name], tensor)
        tau.apply_(module, 1.0)  # close to the end, and within
        assert torch.equal(module["w"].detach(), tuned["w"])

    def test_a_search_says_which_parameter(self, tmp_path):
        base, tuned = near_the_end(torch.float16)
        tau = TaskVector.between(base, tuned)
        module = torch.nn.ParameterDict(base)
        with pytest.raises(ValueError, match="'w': base"):
            search_scale(module, base, tau, lambda model: 1.0, [0.0, 3.0])
        assert torch.equal(module["w"].detach(), base["w"])

    def test_a_float32_output_holds_it(self, tmp_path):
        base, tuned = near_the_end(torch.float16)
        base["mask"] = tuned["mask"] = torch.tensor([0.0, -torch.inf]).half()
        base["steps"] = tuned["steps"] = torch.tensor(3)
        tau = TaskVector.between(base, tuned, exclude="mask")
        edited = tau.apply(base, 3.0, dtype="float32")
        expected = base["w"].float() + 3 * (tuned["w"].float() - base["w"])
        assert torch.equal(edited["w"], expected)
        assert edited["mask"].dtype == torch.float32
        assert edited["mask"].tolist() == [0.0, -torch.inf]
        assert edited["steps"].dtype == torch.int64
        rule, path = TaskArithmetic(3.0), tmp_path / "merged.safetensors"
        report = merge(
            base, [tuned], rule, path, exclude=["mask"], dtype=torch.float32
        )
        merged = open_state(path)
        for name, tensor in edited.items():
            assert torch.equal(merged[name], tensor)
            assert merged[name].dtype == tensor.dtype
        assert report.dtype == "float32" and report.rounding_loss == 0.0

    def test_copied_weights_that_do_not_fit(self, tmp_path):
        base = {"a": torch.zeros(1), "big": torch.tensor([1e6])}
        tuned = {"a": torch.ones(1), "big": torch.tensor([1e6])}
        tau = TaskVector.between(base, tuned, exclude="big")
        with pytest.raises(ValueError, match="'big'.*too large for float16"):
            tau.apply(base, dtype="float16")
        with pytest.raises(ValueError, match="'big'.*too large for float16"):
            merge(
                base, [tuned], TaskArithmetic(), tmp_path / "m.safetensors",
                exclude=["big"], dtype="float16",
            )  # fmt: skip
        with pytest.raises(ValueError, match="dtype='int8': expected one of"):
            tau.apply(base, dtype="int8")


@pytest.mark.parametrize("dtype", HALF)
def test_what_rounding_loses_is_reported(tmp_path, dtype):
    # Against the plain formula, in float64.
    torch.manual_seed(0)
    base = {f"w{n}": (0.05 * torch.randn(200, 300)).to(dtype) for n in "ab"}
    tuned = {
        name: tensor.float() + 2e-4 * torch.randn(tensor.shape)
        for name, tensor in base.items()
    }
    path = tmp_path / "merged.safetensors"
    reports = [
        merge(
            base, [tuned], TaskArithmetic(0.25), path,
            threads=threads, chunk=chunk,
        )
        for threads, chunk in ((1, 1 << 16), (3, 5000))
    ]  # fmt: skip
    merged, lost, moved = open_state(path), 0.0, 0.0
    for name, before in base.items():
        before = before.double()
        step = 0.25 * (tuned[name].double() - before)
        lost += (merged[name].double() - before - step).square().sum()
        moved += step.square().sum()
    expected = float((lost / moved).sqrt())
    assert expected > 0.2
    for report in reports:
        assert report.rounding_loss == pytest.approx(expected, rel=1e-3)
    tau = TaskVector.between(base, tuned)
    found = rounding_loss(
        tau, as_state(base), tau.apply(base, 0.25), dict.fromkeys(tau, 0.25)
    )
    assert found == pytest.approx(expected, rel=1e-3)
