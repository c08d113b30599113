"""Sums over contiguous runs of frames, in one kernel.

`embedding_bag` reads its input once and writes one row for every run; its own
backward sorts indices, so the gradient is written down here. Padding lies in a
bag of its own that nobody reads: not even NaN in it can reach a run.

Shapes: `x` [B, T, d]; `weights` [B, T], 0 for frames of no run; `offsets`
[B, S + 1], int64, the first frame of every run, then where the utterance ends,
not decreasing; `ids` [B, T], int64, the run of every frame, -1 for none.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def pool_runs(x, weights, offsets, ids):
    """Return `out[b, s] = sum of weights[b, t] x[b, t] over run s`.

    [B, S, d], 0 for runs without frames; differentiable by `x` and `weights`.
    """
    return _Pool.apply(x, weights.to(x.dtype), offsets, ids)


def take_rows(x, positions, keep):
    """Return `x[b, positions[b, s]]`, zero where not kept; differentiable.

    Positions ([B, S], int64) differ from one another where `keep` is True.
    """
    return _Take.apply(x, positions, keep)


def sum_runs(x, weights, offsets):
    """Return what `pool_runs` does, without a gradient."""
    batch, frames, width = x.shape
    runs = offsets.shape[1] - 1
    # On a CPU a quarter less time than with 64 bits.
    small = batch * frames < 2**31
    index = torch.int32 if small else torch.int64
    out = F.embedding_bag(
        torch.arange(batch * frames, dtype=index, device=x.device),
        x.reshape(batch * frames, width),
        _flat_rows(offsets, frames).to(index),
        mode="sum",
        per_sample_weights=weights.reshape(-1),
    )
    # The last bag of an utterance is its padding.
    return out.view(batch, runs + 1, width)[:, :runs]


def spread_runs(values, ids):
    """Give each frame the row of its run; of no run: that of the first."""
    rows = _flat_rows(ids.clamp(min=0), values.shape[1])
    out = values.reshape(-1, values.shape[-1]).index_select(0, rows)
    return out.view(*ids.shape, -1)


def _flat_rows(positions, size):
    """Turn positions within utterances into rows of all of them."""
    first = torch.arange(len(positions), device=positions.device) * size
    return (positions + first[:, None]).reshape(-1)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, offsets, ids):
        ctx.save_for_backward(x, weights, ids)
        return sum_runs(x, weights, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weights, ids = ctx.saved_tensors
        spread = spread_runs(grad, ids)
        outside = ids < 0
        grad_x = grad_weights = None
        if ctx.needs_input_grad[1]:
            # Filled, not multiplied: x may be NaN in the padding.
            grad_weights = (spread * x).sum(-1).masked_fill(outside, 0.0)
        if ctx.needs_input_grad[0]:
            grad_x = spread.mul_(weights.masked_fill(outside, 0.0)[..., None])
        return grad_x, grad_weights, None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, keep):
        frames, width = x.shape[1:]
        ctx.save_for_backward(positions, keep)
        ctx.shape = x.shape
        rows = _flat_rows(positions.clamp(max=frames - 1), frames)
        out = x.reshape(-1, width).index_select(0, rows)
        # Not in place: torch.compile would lose the gradient.
        return out.view(len(x), -1, width).masked_fill(~keep[..., None], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        positions, keep = ctx.saved_tensors
        batch, frames, width = ctx.shape
        # What is not kept goes to a row behind the last.
        rows = _flat_rows(positions, frames)
        rows = rows.masked_fill(~keep.reshape(-1), batch * frames)
        grad_x = grad.new_zeros(batch * frames + 1, width)
        grad_x = grad_x.index_copy(0, rows, grad.reshape(-1, width))
        return grad_x[:-1].view(ctx.shape), None, None
