"""Adapters on a GPU: the same numbers, and launches that do not grow.

pytest tests/gpu -o addopts=
"""

import pytest
import torch
from machine import DEVICE, KIND, needs_gpu, only_gpu

# isort: split
from adapters_toy import ToyEncoder, make_bank, scramble

from speechbrain_taskarith.adapters import (
    AdapterMean,
    AdapterWeightedMean,
    AudioAdapterFusion,
    insert_adapters,
)

pytestmark = needs_gpu
KINDS = (AdapterMean, AdapterWeightedMean, AudioAdapterFusion)


def launches(function):
    """Return how many kernels a call starts."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        function()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        for event in profile.events()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["collapsed", "folded"])
def test_the_same_numbers(kind, form):
    bank = make_bank(8, 64, 16)
    combination = kind(bank).double()
    scramble(combination)
    x = torch.randn(2, 30, 64)
    expected = combination(x.double(), "loop")
    bank.float().to(DEVICE)
    combination.float().to(DEVICE)
    with torch.no_grad():
        got = combination(x.to(DEVICE), form).cpu().double()
    assert (got - expected).norm() < 1e-3 * expected.norm()


@only_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["collapsed", "folded"])
def test_launches_do_not_depend_on_the_number(kind, form):
    counts = set()
    for number in (2, 4, 16):
        bank = make_bank(number, 64, 16, dtype=torch.float32).to(DEVICE)
        bank.requires_grad_(False)
        combination = kind(bank).to(DEVICE)
        x = torch.randn(2, 30, 64, device=DEVICE)

        def run(combination=combination, x=x):
            with torch.no_grad():
                combination(x, form)

        counts.add(launches(run))
    assert len(counts) == 1, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", ["us", "combined", "mixed"])
def test_an_encoder_trains(dtype, choice):
    encoder = ToyEncoder().to(DEVICE)
    handle = insert_adapters(
        encoder, ["us", "german"], bottleneck=4, combination="fusion"
    )
    scramble(handle)
    handle.train_composition("MT-A")
    handle.use(["us", None, "german"] if choice == "mixed" else choice)
    with torch.autocast(KIND, dtype, enabled=dtype != torch.float32):
        out = encoder(torch.randn(3, 7, 4, device=DEVICE))
        out.float().square().mean().backward()
    found = [p.grad for p in handle.parameters() if p.grad is not None]
    assert found and all(torch.isfinite(g).all() for g in found)
