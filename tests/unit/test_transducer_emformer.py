"""Emformer: both paths agree, padding never leaks, the future stays unseen."""

import pytest
import torch
from speechbrain.utils.streaming import infer_dependency_matrix

from speechbrain_taskarith.transducer import Emformer, TimeReduction

# Segment, right context, left context, memory.
SHAPES = [
    (4, 1, 8, 0),
    (4, 1, 8, 3),
    (3, 0, 0, 0),
    (5, 2, 7, 2),
    (1, 3, 2, 1),
    (4, 6, 3, 1),
    (2, 1, 0, 2),
]


def encoder(shape, layers=3, width=16):
    torch.manual_seed(0)
    return Emformer(width, 4, 32, layers, *shape).double().eval()


def streamed(model, x, lens=None):
    size, ahead = model.segment_length, model.right_context
    context, parts = model.make_streaming_context(len(x)), []
    for t in range(0, x.shape[1], size):
        chunk = x[:, t : t + size + ahead]
        left = None
        if lens is not None:
            left = (lens - t).clamp(0, chunk.shape[1]) / chunk.shape[1]
        parts.append(model.forward_streaming(chunk, context, left))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("time", [1, 4, 11, 12, 13])
def test_streaming_equals_parallel_equals_singles(shape, time):
    model = encoder(shape)
    frames = torch.tensor([time, max(1, time // 2), max(1, time - 1)])
    x = torch.randn(3, time, 16, dtype=torch.float64)
    for b, count in enumerate(frames):
        x[b, count:] = float("nan")
    whole = model(x, frames / time)
    assert whole.isfinite().all()
    assert torch.allclose(streamed(model, x, frames), whole, atol=1e-10)
    for b, count in enumerate(frames.tolist()):
        alone = model(x[b : b + 1, :count])[0]
        assert torch.allclose(alone, whole[b, :count], atol=1e-10)
        assert not whole[b, count:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_stay_out_of_padding(shape):
    model = encoder(shape)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    out = model(x, torch.tensor([1.0, 4 / 9]))
    # The sum of a normalised frame is a constant: weigh it.
    (out * torch.arange(16)).sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1, 4:].any() and x.grad[1, :4].any()


@pytest.mark.parametrize("shape", [(2, 1, 3, 0), (2, 1, 3, 2)])
def test_gradcheck(shape):
    torch.manual_seed(0)
    model = Emformer(4, 2, 6, 2, *shape).double().eval()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    lens = torch.tensor([1.0, 0.6])
    assert torch.autograd.gradcheck(lambda v: model(v, lens), (x,))


@pytest.mark.parametrize("stream", [False, True])
def test_reach_is_bounded_on_both_sides(stream):
    torch.manual_seed(0)
    layers = 3
    model = Emformer(8, 2, 16, layers, 4, 2, 6, 0).eval()
    path = (lambda x: streamed(model, x)) if stream else model
    seen = infer_dependency_matrix(path, (1, 32, 8))
    for out in range(32):
        start = out // 4 * 4
        frames = seen[:, out].nonzero().flatten()
        # Look-ahead does not add up over layers; the past does.
        last = min(31, start + 4 + 2 - 1)
        assert frames.max() == last
        assert frames.min() >= start - layers * (6 + 3)
    alone = encoder((4, 0, 0, 0))
    seen = infer_dependency_matrix(lambda x: alone(x.double()), (1, 12, 16))
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    assert torch.equal(seen, blocks)


def test_memory_reaches_beyond_the_left_context():
    near = infer_dependency_matrix(
        lambda x: encoder((2, 0, 2, 0), 1)(x.double()), (1, 16, 16)
    )
    far = infer_dependency_matrix(
        lambda x: encoder((2, 0, 2, 4), 1)(x.double()), (1, 16, 16)
    )
    assert near[:, 15].nonzero().min() == 12
    assert far[:, 15].nonzero().min() == 14 - 4 * 2


def test_bad_input():
    with pytest.raises(ValueError, match="does not divide"):
        Emformer(10, 4, 16, 1, 4, 1, 4)
    with pytest.raises(ValueError, match="segment_length 0"):
        Emformer(8, 4, 16, 1, 0, 1, 4)
    model = encoder((4, 1, 8, 0))
    with pytest.raises(ValueError, match=r"\[batch, frames, 16\]"):
        model(torch.zeros(2, 5, 15).double())
    with pytest.raises(ValueError, match="at least one frame"):
        model(torch.zeros(2, 0, 16).double())
    with pytest.raises(ValueError, match="chunk of 6 frames; expected 5"):
        context = model.make_streaming_context(1)
        model.forward_streaming(torch.zeros(1, 6, 16).double(), context)
    with pytest.raises(ValueError, match="length of row 0"):
        model(torch.zeros(1, 5, 16).double(), torch.zeros(1))


def test_time_reduction_ignores_padding():
    torch.manual_seed(0)
    reduce = TimeReduction(5, 7, factor=4)
    x, frames = torch.randn(3, 11, 5), torch.tensor([11, 6, 8])
    dirty = x.clone()
    for b, count in enumerate(frames):
        dirty[b, count:] = float("nan")
    out, lens = reduce(dirty, frames / 11)
    assert (lens * out.shape[1]).tolist() == [3.0, 2.0, 2.0]
    for b, count in enumerate(frames.tolist()):
        alone, _ = reduce(x[b : b + 1, :count])
        assert torch.allclose(alone[0], out[b, : alone.shape[1]], atol=1e-6)
    stack = torch.nn.functional.pad(x[1, 4:6].flatten(), (0, 10))
    assert torch.allclose(out[1, 1], reduce.linear(stack), atol=1e-6)
