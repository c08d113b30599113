"""What computes on a GPU equals what computes on the CPU.

pytest tests/gpu -o addopts=
"""

import copy

import pytest
import torch
from machine import DEVICE, needs_gpu

from speechbrain_taskarith.vectors import (
    DARE,
    DELLA,
    SLERP,
    TIES,
    TSVM,
    Breadcrumbs,
    Fisher,
    IsoC,
    Karcher,
    LinearAverage,
    LiNeS,
    ModelStock,
    SequentialEditor,
    TaskArithmetic,
    TaskVector,
    merge_checkpoints,
    open_state,
    reestimate_statistics,
    search_scale,
    search_scales,
    syn2real,
)

pytestmark = needs_gpu


class Net(torch.nn.Module):
    """Matrices, a kernel, a scalar, BatchNorm, integers, and a tie."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.ModuleList(
            [torch.nn.Linear(24, 24) for _ in range(3)]
        )
        self.conv = torch.nn.Conv1d(24, 24, 3)
        self.norm = torch.nn.BatchNorm1d(24)
        self.gain = torch.nn.Parameter(torch.rand(()))
        self.table = torch.nn.Embedding(40, 24)
        self.out = torch.nn.Linear(24, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.norm(self.conv(x.transpose(1, 2)))
        return self.out(self.gain * x.transpose(1, 2))


def tuned(base, seed, dtype=None):
    """A model near another one."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base).cpu()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * noise.to(parameter.dtype)
    return model


def fishers(base, number):
    generator = torch.Generator().manual_seed(99)
    return [
        {
            name: torch.rand(tensor.shape, generator=generator)
            for name, tensor in base.state_dict().items()
            if tensor.is_floating_point()
        }
        for _ in range(number)
    ]


RULES = {
    "linear": lambda base: LinearAverage(weights=[1, 3]),
    "arithmetic": lambda base: TaskArithmetic(0.4),
    "ties": lambda base: TIES(0.3),
    "ties by tensor and count": lambda base: TIES(
        0.3, trim="tensor", elect="count"
    ),
    "dare": lambda base: DARE(0.5, seed=1),
    "dare ties": lambda base: DARE(0.5, then=TIES(1)),
    "breadcrumbs": lambda base: Breadcrumbs(0.4, 0.1),
    "della": lambda base: DELLA(),
    "slerp": lambda base: SLERP(0.3),
    "slerp of weights": lambda base: SLERP(0.3, of="weights"),
    "karcher": lambda base: Karcher(scope="global"),
    "stock": lambda base: ModelStock(),
    "fisher": lambda base: Fisher(fishers(base, 2)),
    "lines": lambda base: LiNeS(TaskArithmetic(0.2), slope=0.4),
    "tsv-m": lambda base: TSVM(precision="float64"),
    "iso-c": lambda base: IsoC(precision="float64"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_the_merge_engine(rule, dtype, tmp_path):
    base = Net().to(dtype)
    models = [tuned(base, seed) for seed in (1, 2)]
    made, results = RULES[rule](base), {}
    for device in ("cpu", DEVICE):
        output = tmp_path / f"{device.replace(':', '')}.safetensors"
        merge_checkpoints(
            base,
            models,
            made,
            output,
            device=device,
            show_progress=False,
            chunk=500,
        )
        results[device] = open_state(output)
    for name, tensor in results["cpu"].items():
        other = results[DEVICE][name]
        assert other.dtype == tensor.dtype
        # float32 sums and products in another order, then one rounding.
        rtol = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(other, tensor, rtol=rtol, atol=1e-6)
    assert torch.equal(
        results[DEVICE]["norm.running_var"], base.norm.running_var
    )


@pytest.mark.parametrize("rule", RULES)
def test_rules_on_vectors_in_memory(rule):
    base = Net()
    vectors = [TaskVector.between(base, tuned(base, s)) for s in (1, 2)]
    made = RULES[rule](base)
    expected = made.combine(vectors, base=base)
    there = [vector.to(DEVICE) for vector in vectors]
    # The base may be on either device.
    for model in (base, copy.deepcopy(base).to(DEVICE)):
        found = made.combine(there, base=model)
        for name, delta in expected.items():
            assert found[name].device.type == torch.device(DEVICE).type
            torch.testing.assert_close(
                found[name].cpu(), delta, rtol=1e-5, atol=1e-6
            )


def test_vectors_on_two_devices():
    base = Net()
    one, two = (TaskVector.between(base, tuned(base, s)) for s in (1, 2))
    expected = TIES(0.5).combine([one, two])
    for pair in ([one.to(DEVICE), two], [one, two.to(DEVICE)]):
        found = TIES(0.5).combine(pair)
        for name in expected:
            torch.testing.assert_close(found[name].cpu(), expected[name])
        assert (pair[0] + pair[1]).norm() == pytest.approx(
            (one + two).norm(), rel=1e-6
        )
        assert pair[0].cosine(pair[1]) == pytest.approx(
            one.cosine(two), abs=1e-9
        )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize("vector_on", ["cpu", DEVICE])
def test_editing_in_place_gives_the_bytes_of_apply(dtype, vector_on):
    base = Net().to(dtype)
    tau = TaskVector.between(base, tuned(base, 1)).to(vector_on)
    expected = tau.apply(base, {"layers.*": 0.3, "*": 0.7})
    module = copy.deepcopy(base).to(DEVICE)
    tau.apply_(module, {"layers.*": 0.3, "*": 0.7})
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.cpu(), expected[name].cpu()), name
    assert module.out.weight is module.table.weight
    moved = copy.deepcopy(base).to(DEVICE)
    for name, tensor in tau.apply(moved, 0.3, any_base=True).items():
        # Copies stay where the base is, tied ones tied.
        assert tensor.device == moved.state_dict()[name].device


def test_fingerprints_do_not_depend_on_the_device():
    base = Net()
    tau = TaskVector.between(base, tuned(base, 1))
    moved = copy.deepcopy(base).to(DEVICE)
    again = TaskVector.between(moved, tuned(base, 1))
    assert again.base_fingerprint == tau.base_fingerprint
    tau.apply(moved)  # the base is the base, wherever it lies


def test_the_scale_search_restores_a_model_on_the_device():
    base = Net()
    model = copy.deepcopy(base).to(DEVICE)
    tau = TaskVector.between(base, tuned(base, 1))
    aim = tau.apply(base, 0.5)["layers.0.weight"].to(DEVICE)

    def wer(model):
        assert model.gain.device.type == torch.device(DEVICE).type
        return (model.layers[0].weight - aim).abs().sum().item()

    search = search_scale(
        model, base, tau, wer, [0.25, 0.5, 0.75], show_progress=False
    )
    assert search.best == 0.5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), base.state_dict()[name])


def test_two_scales_are_searched_and_applied_on_the_device():
    base = Net()
    target, real, synthetic = (tuned(base, seed) for seed in (1, 2, 3))
    vectors = {
        "target_scale": TaskVector.between(base, target),
        "scale": TaskVector.between(synthetic, real),
    }
    how = {"target_scale": 0.5, "scale": 0.25}
    here = syn2real(target, (real, synthetic), base=base, **how)
    # Models on two devices.
    there = syn2real(
        copy.deepcopy(target).to(DEVICE),
        (copy.deepcopy(real).to(DEVICE), synthetic),
        base=base,
        **how,
    )
    for name, tensor in here.items():
        assert there[name].device.type == torch.device(DEVICE).type
        torch.testing.assert_close(there[name].cpu(), tensor)
    model, aim = copy.deepcopy(base).to(DEVICE), there["layers.0.weight"]

    def wer(model):
        return (model.layers[0].weight - aim).abs().sum().item()

    search = search_scales(
        *(model, base, vectors, wer, [0.25, 0.5]),
        baseline={"target_scale": 1.0},
        outside=target,
        hopeless=None,
        show_progress=False,
    )
    assert search.best == how
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), base.state_dict()[name])


def test_a_sequence_of_edits_of_models_on_the_device(tmp_path):
    base = Net()
    states = []
    for folder, device in (("a", "cpu"), ("b", DEVICE)):
        start = copy.deepcopy(base).to(device)
        finetuned = tuned(base, 1).to(device)
        with SequentialEditor(start, TIES(0.5), tmp_path / folder) as editor:
            states.append(editor.learn("one", finetuned, scale=0.5))
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name].cpu()), name


def test_statistics_are_estimated_on_the_device():
    base = Net()
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(4, 30, 24, generator=generator) for _ in range(3)]
    found = []
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(base).to(device)
        moved = [batch.to(device) for batch in batches]
        assert reestimate_statistics(model, moved) == 1
        found.append(model.norm.running_var.cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_nan_on_the_device_is_blamed_on_its_file(tmp_path):
    base, bad = Net(), Net()
    with torch.no_grad():
        bad.layers[1].weight[3, 3] = float("nan")
    for rule in (TIES(0.5), TaskArithmetic()):
        with pytest.raises(ValueError, match=r"layers\.1\.weight"):
            merge_checkpoints(
                base,
                [bad],
                rule,
                tmp_path / "x.safetensors",
                device=DEVICE,
                show_progress=False,
            )
    assert not list(tmp_path.iterdir())
