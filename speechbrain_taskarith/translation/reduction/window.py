"""Attention of segments to the frames around them, linear in the frames.

Seen from the frames: frame t of run r may be looked at by the segments r - w
to r + w and by no other, so its 2 w + 1 scores are all there is. Sums over
the frames of a run then give numerators and denominators of the softmax.
"""

import torch
import torch.nn.functional as F

from speechbrain_taskarith.translation.reduction.runs import _pooled, _spread

# Bytes of keys worked on at a time: of two megabytes most stays in a cache.
_CACHED = 2**21


def windowed_attention(q, k, v, segments, window, dropout=0.0):
    """Attend from each segment to its own frames and those of w neighbours.

    `softmax(q . k / sqrt(d)) v` with all other scores taken as -infinity.

    Arguments
    ---------
    q : torch.Tensor
        [B, H, S, d], one query for every segment.
    k, v : torch.Tensor
        [B, H, T, d], finite in the padding too.
    segments : Segments
        Which frames are whose.
    window : int
        Neighbours w on either side.
    dropout : float
        Probability that a weight is dropped.

    Returns
    -------
    torch.Tensor
        [B, H, S, d], 0 behind the last segment.

    Example
    -------
    >>> from .segments import ctc_segments
    >>> found = ctc_segments(torch.tensor([[1, 1, 2]]), torch.tensor([3]))
    >>> q, k = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 3, 1)
    >>> v = torch.tensor([1.0, 3.0, 8.0]).view(1, 1, 3, 1)
    >>> windowed_attention(q, k, v, found, window=0).flatten().tolist()
    [2.0, 8.0]
    """
    heads, runs = q.shape[1:3]
    # Sums over runs: in float32 at least.
    kind = torch.promote_types(q.dtype, torch.float32)
    given, (q, k, v) = q.dtype, (part.to(kind) for part in (q, k, v))
    steps = [o for o in range(-window, window + 1) if abs(o) < runs]
    kept = None
    if dropout:
        shape = (len(steps), len(q) * heads, k.shape[2])
        kept = F.dropout(torch.ones(shape, device=k.device).to(k), dropout)
    counts = segments.lengths.repeat_interleave(heads)
    out = _Windowed.apply(
        (q * q.shape[-1] ** -0.5).flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        segments.owners().repeat_interleave(heads, 0),
        segments.offsets.repeat_interleave(heads, 0),
        counts,
        kept,
        steps,
    )
    return out.view_as(q).to(given)


def window_mask(segments, window):
    """Mark which frames a segment may look at.

    Arguments
    ---------
    segments : Segments
        Which frames are whose.
    window : int
        Neighbours on either side.

    Returns
    -------
    torch.Tensor
        [B, S, T], True where it may. Rows behind the last segment are all
        True in the first frame, so that no softmax is empty.

    Example
    -------
    >>> from .segments import ctc_segments
    >>> found = ctc_segments(torch.tensor([[1, 1, 2]]), torch.tensor([3]))
    >>> window_mask(found, 0).int().tolist()
    [[[1, 1, 0], [0, 0, 1]]]
    """
    owners = segments.owners()[:, None]
    runs = torch.arange(segments.starts.shape[1], device=owners.device)
    near = (owners - runs[:, None]).abs() <= window
    near = near & (owners >= 0)
    first = torch.arange(owners.shape[2], device=owners.device) == 0
    beyond = ~segments.mask[..., None]
    return torch.where(beyond, first, near)


def _moved(table, step):
    """Return `out[:, s] = table[:, s + step]`, 0 outside."""
    if step == 0:
        return table
    behind = (0, 0) * (table.dim() - 2)
    if step > 0:
        return F.pad(table[:, step:], (*behind, 0, step))
    return F.pad(table[:, :step], (*behind, -step, 0))


class _Windowed(torch.autograd.Function):
    """All offsets in one function, some rows at a time.

    Rows are utterances times heads. On a CPU so many at a time as stay in
    its caches; memory that is asked for anew costs more than the sums.
    """

    @staticmethod
    def forward(ctx, q, k, v, ids, offsets, counts, kept, steps):
        ctx.steps = steps
        out = torch.empty_like(q)
        top, below = (q.new_empty(q.shape[:2]) for _ in range(2))
        for rows in _pieces(k):
            table = _Table(ids[rows], offsets[rows], counts[rows], q.shape[1])
            scores = table.scores(q[rows], k[rows], steps)
            high = table.highest(scores, steps)
            above = total = 0.0
            for i, (o, score) in enumerate(zip(steps, scores)):
                # What run r gives to segment r + o.
                weight = score.sub_(table.at_frames(_moved(high, o))).exp_()
                total = total + _moved(table.sums(weight), -o)
                if kept is not None:
                    weight = weight * kept[i, rows]
                given = _pooled(v[rows], weight, table.offsets)
                above = above + _moved(given, -o)
            # A segment looks at its own frames at least; behind: 0 / 1.
            total = total.masked_fill(table.beyond, 1.0)
            torch.div(above, total[..., None], out=out[rows])
            top[rows], below[rows] = high, total
        ctx.save_for_backward(
            q, k, v, ids, offsets, counts, kept, out, top, below
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, ids, offsets, counts, kept, out, top, below = ctx.saved_tensors
        by_q, by_k, by_v = map(torch.zeros_like, (q, k, v))
        for rows in _pieces(k):
            table = _Table(ids[rows], offsets[rows], counts[rows], q.shape[1])
            scores = table.scores(q[rows], k[rows], ctx.steps)
            given = grad[rows].masked_fill(table.beyond[..., None], 0.0)
            mean = (given * out[rows]).sum(-1)
            for i, (o, score) in enumerate(zip(ctx.steps, scores)):
                high, total = _moved(top[rows], o), _moved(below[rows], o)
                weight = score.sub_(table.at_frames(high)).exp_()
                # 0 where there is no segment, whose total is 0 here.
                weight /= table.at_frames(total + (total == 0))
                far = _spread(_moved(given, o), table.ids)
                by_weight = (far * v[rows]).sum(-1)
                if kept is not None:
                    by_weight = by_weight * kept[i, rows]
                by_score = weight * (
                    by_weight - table.at_frames(_moved(mean, o))
                )
                if kept is not None:
                    weight = weight * kept[i, rows]
                by_v[rows].addcmul_(far, weight[..., None])
                near = _spread(_moved(q[rows], o), table.ids)
                by_k[rows].addcmul_(near, by_score[..., None])
                back = _pooled(k[rows], by_score, table.offsets)
                by_q[rows] += _moved(back, -o)
        return by_q, by_k, by_v, None, None, None, None, None


def _pieces(k):
    """Yield slices of rows to work on together."""
    rows = len(k)
    if k.device.type == "cpu":
        rows = max(1, _CACHED // max(1, k[0].numel() * k.element_size()))
    for first in range(0, len(k), rows):
        yield slice(first, first + rows)


class _Table:
    """The runs of some rows."""

    def __init__(self, ids, offsets, counts, runs):
        self.ids, self.offsets, self.counts = ids, offsets, counts
        self.runs = runs
        every = torch.arange(runs, device=ids.device)
        self.beyond = every >= counts[:, None]
        self.rows = ids.clamp(min=0)

    def scores(self, q, k, steps):
        """Return, for every offset, the scores of all frames."""
        return [
            self.masked(_spread(_moved(q, o), self.ids).mul_(k).sum(-1), o)
            for o in steps
        ]

    def masked(self, score, step):
        """Put -infinity where segment `run + step` does not exist."""
        target = self.ids + step
        wrong = (self.ids < 0) | (target < 0)
        wrong = wrong | (target >= self.counts[:, None])
        return score.masked_fill_(wrong, float("-inf"))

    def highest(self, scores, steps):
        """Return every segment's highest score."""
        top = scores[0].new_full((len(self.ids), self.runs), float("-inf"))
        for score, step in zip(scores, steps):
            best = torch.full_like(top, float("-inf"))
            best.scatter_reduce_(1, self.rows, score, "amax")
            if step > 0:
                top[:, step:] = torch.maximum(top[:, step:], best[:, :-step])
            elif step < 0:
                top[:, :step] = torch.maximum(top[:, :step], best[:, -step:])
            else:
                top = torch.maximum(top, best)
        return top.masked_fill(self.beyond, 0.0)

    def at_frames(self, values):
        """Give every frame the value of its run."""
        return values.gather(1, self.rows)

    def sums(self, weight):
        """Sum weights over every run."""
        ones = torch.ones_like(weight)
        return _pooled(weight[..., None], ones, self.offsets).squeeze(-1)
