"""The transducer room on CUDA: equal to the CPU, beyond 2**31 scores."""

import pytest
import torch
from machine import DEVICE, needs_gpu, only_gpu

from speechbrain_taskarith.transducer import (
    Emformer,
    HATJoint,
    LSTMPredictor,
    MinWERLoss,
    RNNTJoint,
    TransducerBeamSearch,
    TransducerGreedySearch,
    joint_transducer_loss,
    transducer_loss,
)

pytestmark = needs_gpu


def batch(device, dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, 6, 11, generator=made)
    targets = torch.randint(1, 11, (3, 5), generator=made)
    lens = torch.tensor([1.0, 0.5, 0.75]), torch.tensor([1.0, 0.4, 0.0])
    logits = logits.to(device, dtype).requires_grad_()
    return logits, targets.to(device), *(one.to(device) for one in lens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_equals_cpu(dtype):
    results = []
    for device in ("cpu", DEVICE):
        logits, *rest = batch(device, dtype)
        loss = transducer_loss(logits, *rest, 0, "none")
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        results.append((loss.cpu(), grad.float().cpu()))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-2)


@pytest.mark.parametrize("backend", ["torchaudio", "numba"])
def test_backends_agree(backend):
    if backend == "numba":
        if not torch.cuda.is_available():
            pytest.skip("NO GPU: numba's loss runs on CUDA only")
        pytest.importorskip("numba.cuda")
    logits, *rest = batch(DEVICE)
    found = []
    for name in ("torch", backend):
        loss = transducer_loss(logits, *rest, 0, "none", backend=name)
        grad = torch.autograd.grad(loss.sum(), logits)[0]
        found.append((loss, grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-3)


@only_gpu
@pytest.mark.parametrize("kind", [RNNTJoint, HATJoint])
def test_more_than_two_to_the_31_scores(kind):
    torch.manual_seed(0)
    joint = kind(64, 64, 128, 5001, blank_index=0).to(DEVICE)
    x = torch.randn(16, 500, 64, device=DEVICE, requires_grad=True)
    g = torch.randn(16, 101, 64, device=DEVICE, requires_grad=True)
    y = torch.randint(1, 5001, (16, 100), device=DEVICE)
    one = torch.ones(16, device=DEVICE)
    assert 16 * 500 * 101 * 5001 > 2**31
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = joint_transducer_loss(joint, x, g, y, one, one, 0, "none")
    whole.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30
    part = joint_transducer_loss(
        joint, x[15:], g[15:], y[15:], one[:1], one[:1], 0, "none"
    )
    assert torch.allclose(part, whole[15:], rtol=1e-5)
    assert x.grad.isfinite().all() and g.grad.isfinite().all()


def test_searches_equal_cpu():
    torch.manual_seed(0)
    predictor = LSTMPredictor(9, 4, 5, num_layers=1)
    joint = RNNTJoint(6, 5, 8, 9)
    joint.output.weight.data *= 6
    x, lens = 2 * torch.randn(4, 15, 6), torch.tensor([1.0, 0.4, 0.8, 1.0])
    for search in (
        TransducerBeamSearch(predictor, joint, 0, 4, 2),
        TransducerGreedySearch(predictor, joint, 0),
    ):
        here = search.cpu().decode(x, lens)
        there = search.to(DEVICE).decode(x.to(DEVICE), lens.to(DEVICE))
        assert [[h.tokens for h in each] for each in here] == [
            [h.tokens for h in each] for each in there
        ]


def test_min_wer_and_emformer_train():
    torch.manual_seed(0)
    encoder = Emformer(16, 4, 32, 2, 4, 1, 8, 1).to(DEVICE)
    predictor = LSTMPredictor(9, 4, 5, num_layers=1).to(DEVICE)
    joint = HATJoint(16, 5, 8, 9, 0).to(DEVICE)
    loss = MinWERLoss(TransducerBeamSearch(predictor, joint, 0))
    x, lens = torch.randn(3, 21, 16).to(DEVICE), torch.ones(3).to(DEVICE)
    y = torch.randint(1, 9, (3, 4)).to(DEVICE)
    loss(encoder(x, lens), lens, y, lens).backward()
    assert encoder.layers[0].query.weight.grad.isfinite().all()
