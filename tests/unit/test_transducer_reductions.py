"""What the losses of utterances become, beside SpeechBrain's own loss."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from transducer_oracles import brute_force

from speechbrain_taskarith.transducer import (
    RNNTJoint,
    joint_transducer_loss,
    transducer_loss,
)

# Ragged, with a single frame and an empty target.
FRAMES, COUNTS = [5, 3, 1, 4], [3, 2, 2, 0]
# SpeechBrain's kernel in numba's simulator of CUDA; reads and prints JSON.
STOCK = """
import json, sys
import torch
from speechbrain.nnet.losses import transducer_loss
given = json.load(sys.stdin)
logits = torch.tensor(given["logits"], dtype=torch.float64).requires_grad_()
targets = torch.tensor(given["targets"], dtype=torch.int)
lens = torch.tensor(given["frames"]) / 5, torch.tensor(given["counts"]) / 3
found = {}
for reduction in ("mean", "sum", "none"):
    loss = transducer_loss(logits, targets, *lens, 0, reduction)
    weights = torch.arange(1.0, 1 + loss.numel()).reshape(loss.shape)
    (grad,) = torch.autograd.grad((weights * loss).sum(), logits)
    found[reduction] = loss.tolist(), grad.tolist()
print(json.dumps(found))
"""


def batch():
    made = torch.Generator().manual_seed(3)
    shape = (4, 5, 4, 5)
    logits = 2 * torch.randn(shape, dtype=torch.float64, generator=made)
    return logits.requires_grad_(), torch.randint(1, 5, (4, 3), generator=made)


def call(logits, targets, reduction, **options):
    lens = torch.tensor(FRAMES) / 5, torch.tensor(COUNTS) / 3
    return transducer_loss(
        logits, targets, *lens, 0, reduction=reduction, **options
    )


def log_probs(logits, targets):
    """log P of every utterance by its alignments, [B]."""
    rows = zip(logits, targets.tolist(), FRAMES, COUNTS)
    return torch.stack(
        [
            brute_force(x[:t, : u + 1].log_softmax(-1), y[:u], 0)
            for x, y, t, u in rows
        ]
    )


@pytest.fixture(scope="module")
def stock():
    """Values and gradients of SpeechBrain's loss on `batch`, by reduction."""
    pytest.importorskip("numba", reason="numba runs SpeechBrain's own kernel")
    logits, targets = batch()
    given = {
        "logits": logits.tolist(),
        "targets": targets.tolist(),
        "frames": FRAMES,
        "counts": COUNTS,
    }
    ran = subprocess.run(
        [sys.executable, "-c", STOCK],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def agrees(found, logits, value, grad):
    (by_found,) = torch.autograd.grad(found, logits)
    assert found.item() == pytest.approx(value, rel=1e-12)
    assert torch.allclose(by_found, grad, atol=1e-12)


def test_speechbrain_is_the_stock_kernels_mean(stock):
    logits, targets = batch()
    value, grad = stock["mean"]
    grad = torch.tensor(grad, dtype=torch.float64)
    agrees(call(logits, targets, "speechbrain"), logits, value, grad)
    # What the name alone would do: the gradient is that of the mean.
    (plain,) = torch.autograd.grad(call(logits, targets, "mean"), logits)
    assert torch.allclose(4 * plain, grad, atol=1e-12)


def test_stock_sum_and_none_have_our_gradients_but_other_values(stock):
    logits, targets = batch()
    frames = torch.tensor(FRAMES)
    for reduction in ("sum", "none"):
        value, grad = stock[reduction]
        losses = call(logits, targets, "none")
        by_frames = (losses / frames).detach()
        if reduction == "sum":
            by_frames, losses = by_frames.sum(), call(logits, targets, "sum")
        weights = torch.arange(1.0, 1 + losses.numel()).reshape(losses.shape)
        (ours,) = torch.autograd.grad((weights * losses).sum(), logits)
        assert torch.allclose(by_frames, torch.tensor(value).double())
        theirs = torch.tensor(grad, dtype=torch.float64)
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_speechbrain_is_the_formula(factor):
    logits, targets = batch()
    oracle = -log_probs(logits, targets)
    value = (oracle / torch.tensor(FRAMES)).mean().item()
    (grad,) = torch.autograd.grad(oracle.sum(), logits)
    found = factor * call(logits, targets, "speechbrain")
    agrees(found, logits, factor * value, factor * grad)


def test_speechbrain_in_another_backend():
    logits, targets = batch()
    logits = logits.detach().float().requires_grad_()
    found = [
        call(logits, targets, "speechbrain", backend=backend)
        for backend in ("torch", "torchaudio")
    ]
    grads = [torch.autograd.grad(x, logits)[0] for x in found]
    assert torch.allclose(*found) and torch.allclose(*grads, atol=2e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "speechbrain"])
def test_joint_loss_reduces_alike(reduction):
    torch.manual_seed(0)
    joint = RNNTJoint(8, 6, 16, 5).double()
    x = torch.randn(4, 5, 8, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 4, 6, dtype=torch.float64)
    _, targets = batch()
    lens = torch.tensor(FRAMES) / 5, torch.tensor(COUNTS) / 3
    logits = joint(x.unsqueeze(2), g.unsqueeze(1))
    found = (
        joint_transducer_loss(joint, x, g, targets, *lens, 0, reduction),
        call(logits, targets, reduction),
    )
    grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in found]
    assert torch.allclose(*found, rtol=1e-12)
    assert torch.allclose(*grads, atol=1e-12)


def test_no_alignment_is_infinite_under_speechbrain_too():
    logits, targets = batch()
    windows = torch.tensor([[0, 4]]).expand(4, 3, 2).clone()
    windows[0, 0] = 4
    windows[0, 1] = 0
    loss = call(logits, targets, "speechbrain", windows=windows)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == math.inf
    assert not grad[0].any() and grad[1].any() and grad.isfinite().all()


def test_an_unknown_reduction_lists_all():
    logits, targets = batch()
    with pytest.raises(ValueError, match="'none' or 'speechbrain'"):
        call(logits, targets, "speech_brain")


@pytest.mark.parametrize(
    "cost, wrong",
    [
        ("transducer_loss {blnk_index: 0}", "blnk_index"),
        ("joint_transducer_loss {blank_index: 0, buget: 1}", "buget"),
        ("MinWERLoss {n_bset: 4}", "n_bset"),
    ],
)
def test_a_misspelt_argument_is_named_at_the_first_batch(cost, wrong):
    """`!name:` keeps arguments for later; the first call refuses them."""
    text = f"cost: !name:speechbrain_taskarith.transducer.{cost}"
    kept = load_hyperpyyaml(text)["cost"]
    with pytest.raises(TypeError, match=wrong):
        kept(*batch(), torch.ones(4), torch.ones(4))


def test_a_misspelt_argument_of_an_object_is_named_at_loading():
    text = (
        "out: !new:speechbrain_taskarith.transducer.HATOutput\n"
        "    {input_size: 4, vocab_size: 5, blnk_index: 0}\n"
    )
    with pytest.raises(TypeError, match="HATOutput.*blnk_index|blnk_index"):
        load_hyperpyyaml(text)
