"""Speech translation on a GPU: the same numbers, and no waiting for the host.

pytest tests/gpu -o addopts=
"""

import pytest
import torch
from machine import DEVICE, KIND, needs_gpu, only_gpu

# isort: split
from translation_toy import shrink_batch, toy_batch, toy_model

from speechbrain_taskarith.translation import (
    CTCShrink,
    LookingBack,
    TranslationObjective,
)

pytestmark = needs_gpu
POOLINGS = ("first", "mean", "weighted", "softmax")
LENS = [130, 1, 70, 120]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_shrink_is_that_of_the_cpu_and_deterministic(pooling):
    x, logits, lens = shrink_batch(LENS, width=64)
    train = pooling in ("weighted", "softmax")
    shrink = CTCShrink(pooling=pooling, train_weights=train)
    found = []
    for device in ("cpu", DEVICE, DEVICE):
        a = x.to(device, copy=True).requires_grad_()
        b = logits.to(device, copy=True).requires_grad_()
        out = shrink(a, b, lens.to(device))
        out.x.square().sum().backward()
        grads = [a.grad] + ([b.grad] if train else [])
        found.append([out.x.cpu(), *(g.cpu() for g in grads)])
    for host, one, two in zip(*found):
        torch.testing.assert_close(one, host)
        assert torch.equal(one, two)


@only_gpu
@pytest.mark.parametrize("pooling", POOLINGS)
def test_fixed_capacity_never_waits_for_the_host(pooling):
    x, logits, lens = (
        t.to(DEVICE) for t in shrink_batch(LENS, width=64, dtype=torch.float32)
    )
    x.requires_grad_()
    shrink = CTCShrink(pooling=pooling, capacity=80)
    look = LookingBack(64, 4, window=1).to(DEVICE)
    look(shrink(x, logits, lens), x, lens).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        look(shrink(x, logits, lens), x, lens).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("window", [None, 0, 2])
def test_looking_back_is_that_of_the_cpu(window, monkeypatch):
    name = (
        "speechbrain_taskarith.translation.reduction.looking_back.DENSE_BELOW"
    )
    monkeypatch.setattr(name, 0)
    x, logits, lens = shrink_batch(LENS, width=64)
    look = LookingBack(64, 4, dropout=0.0, window=window).double()
    shrunk = CTCShrink()(x, logits, lens)
    expected = look(shrunk, x, lens)
    x, logits, lens = x.to(DEVICE), logits.to(DEVICE), lens.to(DEVICE)
    found = look.to(DEVICE)(CTCShrink()(x, logits, lens), x, lens)
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains(dtype):
    model = toy_model().to(DEVICE)
    inputs, targets = (
        {k: v.to(DEVICE) for k, v in part.items()} for part in toy_batch()
    )
    with torch.autocast(KIND, dtype, enabled=dtype != torch.float32):
        out = model(tasks=("st", "asr", "mt"), **inputs)
        losses = TranslationObjective(0)(out, **targets)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
