"""Attention of segments to the frames around them, linear in the frames.

Seen from the frames: frame t of run r may be looked at by the segments r - w
to r + w and by no other, so its 2 w + 1 scores are all there is. Sums over
the frames of a run then give numerators and denominators of the softmax.
"""

import torch
import torch.nn.functional as F

from speechbrain_taskarith.translation.reduction.pooling import (
    spread_runs,
    sum_runs,
)

# Bytes of keys worked on at a time: of two megabytes most stays in a cache.
CACHED = 2**21


def windowed_attention(q, k, v, segments, window, dropout=0.0):
    """Attend from each segment to its own frames and those of w neighbours.

    `softmax(q . k / sqrt(d)) v` with all other scores taken as -infinity; q
    [B, H, S, d], k and v [B, H, T, d], finite in the padding too. Returns
    [B, H, S, d], 0 behind the last segment.
    """
    heads, runs = q.shape[1:3]
    # Sums over runs: in float32 at least.
    dtype = torch.promote_types(q.dtype, torch.float32)
    returned, (q, k, v) = q.dtype, (part.to(dtype) for part in (q, k, v))
    shifts = [o for o in range(-window, window + 1) if abs(o) < runs]
    mask = None
    if dropout:
        shape = (len(shifts), len(q) * heads, k.shape[2])
        mask = F.dropout(torch.ones(shape, device=k.device).to(k), dropout)
    out = _Windowed.apply(
        (q * q.shape[-1] ** -0.5).flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        segments.owners().repeat_interleave(heads, 0),
        segments.offsets.repeat_interleave(heads, 0),
        segments.lengths.repeat_interleave(heads),
        mask,
        shifts,
    )
    return out.view_as(q).to(returned)


def window_mask(segments, window):
    """Mark which frames a segment may look at: [B, S, T].

    Rows behind the last segment are True in the first frame, so that no
    softmax is empty.
    """
    owners = segments.owners()[:, None]
    runs = torch.arange(segments.starts.shape[1], device=owners.device)
    near = (owners - runs[:, None]).abs() <= window
    near = near & (owners >= 0)
    first = torch.arange(owners.shape[2], device=owners.device) == 0
    return torch.where(segments.mask[..., None], near, first)


def _shifted(values, shift, outside=0.0):
    """Return `out[:, s] = values[:, s + shift]`, `outside` beyond the ends."""
    # A negative number crops.
    padding = (0, 0) * (values.dim() - 2) + (-shift, shift)
    return F.pad(values, padding, value=outside) if shift else values


class _Windowed(torch.autograd.Function):
    """All shifts in one function, some rows at a time.

    Rows are utterances times heads. On a CPU so many at a time as stay in
    its caches; memory that is asked for anew costs more than the sums.
    """

    @staticmethod
    def forward(ctx, q, k, v, ids, offsets, counts, mask, shifts):
        ctx.shifts = shifts
        out = torch.empty_like(q)
        maxima, totals = (q.new_empty(q.shape[:2]) for _ in range(2))
        for rows in _chunks(k):
            runs = _Runs(ids[rows], offsets[rows], counts[rows], q.shape[1])
            scores = runs.scores(q[rows], k[rows], shifts)
            maximum = runs.maximum(scores, shifts)
            numerator = total = 0.0
            for i, (shift, score) in enumerate(zip(shifts, scores)):
                # What run r gives to segment r + shift.
                weight = score.sub_(runs.at_frames(_shifted(maximum, shift)))
                weight = weight.exp_()
                total = total + _shifted(runs.sum(weight), -shift)
                if mask is not None:
                    weight = weight * mask[i, rows]
                part = sum_runs(v[rows], weight, runs.offsets)
                numerator = numerator + _shifted(part, -shift)
            # A segment looks at its own frames at least; behind: 0 / 1.
            total = total.masked_fill(runs.beyond, 1.0)
            torch.div(numerator, total[..., None], out=out[rows])
            maxima[rows], totals[rows] = maximum, total
        ctx.save_for_backward(
            q, k, v, ids, offsets, counts, mask, out, maxima, totals
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, ids, offsets, counts, mask, out, maxima, totals = (
            ctx.saved_tensors
        )
        grad_q, grad_k, grad_v = map(torch.zeros_like, (q, k, v))
        for rows in _chunks(k):
            runs = _Runs(ids[rows], offsets[rows], counts[rows], q.shape[1])
            scores = runs.scores(q[rows], k[rows], ctx.shifts)
            grad_out = grad[rows].masked_fill(runs.beyond[..., None], 0.0)
            mean = (grad_out * out[rows]).sum(-1)
            for i, (shift, score) in enumerate(zip(ctx.shifts, scores)):
                maximum = _shifted(maxima[rows], shift)
                total = _shifted(totals[rows], shift)
                weight = score.sub_(runs.at_frames(maximum)).exp_()
                # 0 where there is no segment, whose total is 0 here.
                weight /= runs.at_frames(total + (total == 0))
                grad_frames = spread_runs(_shifted(grad_out, shift), runs.ids)
                grad_weight = (grad_frames * v[rows]).sum(-1)
                if mask is not None:
                    grad_weight = grad_weight * mask[i, rows]
                grad_score = weight * (
                    grad_weight - runs.at_frames(_shifted(mean, shift))
                )
                if mask is not None:
                    weight = weight * mask[i, rows]
                grad_v[rows].addcmul_(grad_frames, weight[..., None])
                query = spread_runs(_shifted(q[rows], shift), runs.ids)
                grad_k[rows].addcmul_(query, grad_score[..., None])
                part = sum_runs(k[rows], grad_score, runs.offsets)
                grad_q[rows] += _shifted(part, -shift)
        return grad_q, grad_k, grad_v, None, None, None, None, None


def _chunks(k):
    """Yield slices of rows to work on together."""
    rows = len(k)
    if k.device.type == "cpu":
        rows = max(1, CACHED // max(1, k[0].numel() * k.element_size()))
    for first in range(0, len(k), rows):
        yield slice(first, first + rows)


class _Runs:
    """The runs of some rows: frame to run, where to cut, how many there are."""

    def __init__(self, ids, offsets, counts, size):
        self.ids, self.offsets, self.counts = ids, offsets, counts
        self.beyond = torch.arange(size, device=ids.device) >= counts[:, None]
        self.index = ids.clamp(min=0)

    def scores(self, q, k, shifts):
        """Return, for every shift, the scores of all frames."""
        found = []
        for shift in shifts:
            query = spread_runs(_shifted(q, shift), self.ids)
            score = query.mul_(k).sum(-1)
            target = self.ids + shift
            missing = (self.ids < 0) | (target < 0)
            missing = missing | (target >= self.counts[:, None])
            found.append(score.masked_fill_(missing, float("-inf")))
        return found

    def maximum(self, scores, shifts):
        """Return every segment's highest score."""
        top = scores[0].new_full(self.beyond.shape, float("-inf"))
        for score, shift in zip(scores, shifts):
            best = torch.full_like(top, float("-inf"))
            best.scatter_reduce_(1, self.index, score, "amax")
            top = top.maximum(_shifted(best, -shift, float("-inf")))
        return top.masked_fill(self.beyond, 0.0)

    def at_frames(self, values):
        """Give every frame the value of its run."""
        return values.gather(1, self.index)

    def sum(self, weight):
        """Sum weights over every run."""
        ones = torch.ones_like(weight)
        return sum_runs(weight[..., None], ones, self.offsets).squeeze(-1)
