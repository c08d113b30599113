"""Sums over contiguous runs of frames, in one kernel.

`embedding_bag` reads its input once and writes one row for every run; its own
backward sorts indices, so the gradient is written down here. Padding lies in a
bag of its own that nobody reads: not even NaN in it can reach a run.
"""

import torch
import torch.nn.functional as F


def pool_runs(x, weights, offsets, ids):
    """Return `out[b, s] = sum of weights[b, t] x[b, t] over run s`.

    Arguments
    ---------
    x : torch.Tensor
        [B, T, d].
    weights : torch.Tensor
        [B, T], 0 for frames that belong to no run.
    offsets : torch.Tensor
        [B, S + 1], int64: first frame of every run, then where the
        utterance ends; not decreasing.
    ids : torch.Tensor
        [B, T], int64: the run of every frame, -1 for none.

    Returns
    -------
    torch.Tensor
        [B, S, d], 0 for runs without frames. Differentiable by `x` and, where
        they ask for it, by `weights`.

    Example
    -------
    >>> x = torch.tensor([[[1.0], [2.0], [4.0]]])
    >>> offsets, ids = torch.tensor([[0, 2, 3]]), torch.tensor([[0, 0, 1]])
    >>> pool_runs(x, torch.ones(1, 3), offsets, ids).flatten().tolist()
    [3.0, 4.0]
    """
    return _Pool.apply(x, weights.to(x.dtype), offsets, ids)


def take_rows(x, positions, keep):
    """Return `x[b, positions[b, s]]`, zero where not kept.

    Arguments
    ---------
    x : torch.Tensor
        [B, T, d].
    positions : torch.Tensor
        [B, S], int64, different from one another where kept.
    keep : torch.Tensor
        [B, S], bool.

    Returns
    -------
    torch.Tensor
        [B, S, d]. Differentiable by `x`.

    Example
    -------
    >>> x = torch.tensor([[[1.0], [2.0], [4.0]]])
    >>> take_rows(x, torch.tensor([[2, 9]]), torch.tensor([[True, False]]))
    tensor([[[4.],
             [0.]]])
    """
    return _Take.apply(x, positions, keep)


def _flat_rows(positions, size):
    """Turn positions within utterances into rows of all of them."""
    first = torch.arange(len(positions), device=positions.device) * size
    return (positions + first[:, None]).reshape(-1)


def _pooled(x, weights, offsets):
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


def _spread(runs, ids):
    """Return each frame the row of its run; of no run: that of the first."""
    rows = _flat_rows(ids.clamp(min=0), runs.shape[1])
    out = runs.reshape(-1, runs.shape[-1]).index_select(0, rows)
    return out.view(*ids.shape, -1)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, offsets, ids):
        ctx.save_for_backward(x, weights, ids)
        return _pooled(x, weights, offsets)

    @staticmethod
    def backward(ctx, grad):
        x, weights, ids = ctx.saved_tensors
        spread = _spread(grad, ids)
        outside = ids < 0
        by_weights = None
        if ctx.needs_input_grad[1]:
            # Filled, not multiplied: x may be NaN in the padding.
            by_weights = (spread * x).sum(-1).masked_fill(outside, 0.0)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = spread.mul_(weights.masked_fill(outside, 0.0)[..., None])
        return by_x, by_weights, None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, keep):
        batch, frames, width = x.shape
        ctx.save_for_backward(positions, keep)
        ctx.shape = x.shape
        rows = _flat_rows(positions.clamp(max=frames - 1), frames)
        out = x.reshape(-1, width).index_select(0, rows)
        # Not in place: torch.compile would lose the gradient.
        return out.view(batch, -1, width).masked_fill(~keep[..., None], 0.0)

    @staticmethod
    def backward(ctx, grad):
        positions, keep = ctx.saved_tensors
        batch, frames, width = ctx.shape
        # What is not kept goes to a row behind the last.
        rows = _flat_rows(positions, frames)
        rows = rows.masked_fill(~keep.reshape(-1), batch * frames)
        by_x = grad.new_zeros(batch * frames + 1, width)
        by_x = by_x.index_copy(0, rows, grad.reshape(-1, width))
        return by_x[:-1].view(ctx.shape), None, None
