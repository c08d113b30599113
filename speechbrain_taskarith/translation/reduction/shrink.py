"""CTC shrink: one vector for every run of frames with the same best label."""

import logging
from collections import Counter
from typing import NamedTuple

import torch

from speechbrain_taskarith.translation.input_guard import (
    check_lengths,
    utterance_name,
)
from speechbrain_taskarith.translation.reduction.pooling import (
    pool_runs,
    take_rows,
)
from speechbrain_taskarith.translation.reduction.segments import (
    Segments,
    find_starts,
    make_segments,
)
from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    padding_mask,
    relative_lengths,
)

logger = logging.getLogger(__name__)

POOLINGS = ("first", "mean", "weighted", "softmax")
# Which occurrences of a warning are logged: fewer and fewer.
WARN_AT = {1, 10, 100, 1000, 10000, 100000}


class Shrunk(NamedTuple):
    """What `CTCShrink` returns.

    Arguments
    ---------
    x : torch.Tensor
        [B, S, d], one vector for every segment, 0 behind the last one.
    lens : torch.Tensor
        [B], their relative lengths.
    segments : Segments
        The frames each vector comes from.

    Example
    -------
    >>> shrunk = CTCShrink()(
    ...     torch.rand(1, 5, 8), torch.rand(1, 5, 4), torch.ones(1)
    ... )
    >>> shrunk.segments.frame_lengths.tolist()
    [5]
    """

    x: torch.Tensor
    lens: torch.Tensor
    segments: Segments


class CTCShrink(torch.nn.Module):
    """Shorten encoder output to one vector for every CTC label.

    A new segment begins where the best label of the CTC head changes. Runs of
    blanks are segments too, which keeps errors of the head from propagating
    (arXiv 2311.03810, section 4.1; compression by mean and by weights:
    Gaido et al. 2021, arXiv 2102.01578).

    The vector of a segment, by `pooling`:

    - `"first"`: its first frame (the paper);
    - `"mean"`: the mean;
    - `"weighted"`: `sum p_t x_t / sum p_t`, p the posterior of its label;
    - `"softmax"`: the same with `exp(p_t)` in the place of `p_t`.

    An utterance of blanks alone keeps one vector; no length is ever 0. A CTC
    head that has collapsed (blanks only, or a new label at every frame) is
    reported in the log, and with `uniform` such an utterance is cut evenly,
    so that translation goes on learning.

    Arguments
    ---------
    blank_index, drop_blank
        See `ctc_segments`.
    pooling : str
        See above.
    train_weights : bool
        True: weights pass gradient on to the CTC head (`"weighted"` and
        `"softmax"` only).
    capacity : int, optional
        See `ctc_segments`; `torch.compile(..., fullgraph=True)` works then,
        NaN is not checked, and collapse not reported (see `watch`).
    max_ratio, min_ratio : float
        More than `max_ratio` frames a segment, over an utterance, is a
        collapse into blanks; fewer than `min_ratio`, over a batch, a
        collapse into noise.
    uniform : int, optional
        Frames of a segment where an utterance has collapsed into blanks.
        None: it is left as it is.

    Example
    -------
    >>> shrink = CTCShrink(blank_index=0, pooling="mean")
    >>> logits = torch.nn.functional.one_hot(
    ...     torch.tensor([[0, 2, 2, 2, 0], [1, 1, 2, 0, 0]])
    ... ).float()
    >>> x = torch.arange(10.0).reshape(2, 5, 1)
    >>> shrunk = shrink(x, logits, torch.tensor([1.0, 0.6]))
    >>> shrunk.x.squeeze(-1).tolist(), shrunk.lens.tolist()
    ([[0.0, 2.0, 4.0], [5.5, 7.0, 0.0]], [1.0, 0.66...])
    >>> shrunk.segments.compression.tolist()
    [1.66..., 1.5]
    """

    def __init__(
        self,
        blank_index=0,
        pooling="first",
        drop_blank=False,
        train_weights=False,
        capacity=None,
        max_ratio=64.0,
        min_ratio=1.05,
        uniform=None,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: expected one of {POOLINGS}")
        if train_weights and pooling not in ("weighted", "softmax"):
            raise ValueError(
                f"train_weights: pooling {pooling!r} has no weights to train; "
                "use 'weighted' or 'softmax'"
            )
        if uniform is not None and not 1 <= uniform <= max_ratio:
            raise ValueError(
                f"uniform {uniform}: expected 1 to max_ratio ({max_ratio:g}) "
                "frames"
            )
        self.blank_index = blank_index
        self.pooling = pooling
        self.drop_blank = drop_blank
        self.train_weights = train_weights
        self.capacity = capacity
        self.max_ratio = max_ratio
        self.uniform = uniform
        self.watch = CollapseWatch(min_ratio, max_ratio, uniform is not None)

    def forward(self, x, logits, lens, ids=None):
        """Shrink a batch.

        Arguments
        ---------
        x, logits : torch.Tensor
            [B, T, d], encoder output, and [B, T, V], scores of the CTC head
            on the same frames (logits or log-probabilities); padding is
            ignored, even NaN.
        lens : torch.Tensor
            [B], relative lengths.
        ids : sequence of str, optional
            The utterances' names, for errors.

        Returns
        -------
        Shrunk

        Raises
        ------
        ValueError
            Shapes that do not belong together, a blank that the head does not
            have, a length of 0, NaN among the valid scores.
        """
        self._check_shapes(x, logits, lens)
        lengths = absolute_lengths(lens, x.shape[1])
        scores = logits.detach()
        if self.train_weights:
            # NaN in the padding would come back as a gradient.
            outside = padding_mask(lengths, logits.shape[1])[..., None]
            scores = logits.masked_fill(outside, 0.0)
        # On a CPU several times faster than argmax, and it sees NaN.
        best, labels = scores.max(-1)
        segments = self._segments(best, labels, lengths, ids)
        out = self._pool(x, scores, best, segments)
        shrunk_lens = relative_lengths(segments.lengths, out.shape[1])
        return Shrunk(out, shrunk_lens, segments)

    def _check_shapes(self, x, logits, lens):
        if x.dim() != 3 or logits.dim() != 3 or lens.dim() != 1:
            raise ValueError(
                "expected x [batch, frames, d], logits [batch, frames, labels]"
                f" and lens [batch], found {tuple(x.shape)}, "
                f"{tuple(logits.shape)} and {tuple(lens.shape)}"
            )
        if x.shape[:2] != logits.shape[:2] or len(lens) != len(x):
            raise ValueError(
                f"x has {x.shape[0]} utterances of {x.shape[1]} frames, "
                f"logits {logits.shape[0]} of {logits.shape[1]}, and there are "
                f"{len(lens)} lengths; the CTC head has to score the same "
                "frames that are shrunk"
            )
        if not 0 <= self.blank_index < logits.shape[2]:
            raise ValueError(
                f"blank_index {self.blank_index} is outside of the "
                f"{logits.shape[2]} labels of the CTC head"
            )

    def _segments(self, best, labels, lengths, ids):
        starts, inside = find_starts(
            labels, lengths, self.drop_blank, self.blank_index, self.capacity
        )
        counts = starts.sum(1)
        # Of the frames in segments: one word in a long silence is no collapse.
        collapsed = inside.sum(1) > counts * self.max_ratio
        if self.uniform is not None:
            valid = ~padding_mask(lengths, starts.shape[1])
            steps = torch.arange(starts.shape[1], device=starts.device)
            even = (steps % self.uniform == 0) & valid
            starts = torch.where(collapsed[:, None], even, starts)
            inside = torch.where(collapsed[:, None], valid, inside)
            counts = torch.where(collapsed, starts.sum(1), counts)
        size = self.capacity
        if size is None:
            size = self._check(best, lengths, counts, collapsed, ids)
        else:
            frames = starts.shape[1]
            check_lengths(lengths, frames, "features", ids, wait=False)
        return make_segments(labels, lengths, starts, inside, size)

    def _check(self, best, lengths, counts, collapsed, ids):
        """Check a batch and return its most segments, in one transfer."""
        frames = best.shape[1]
        bad = ~best.detach().isfinite() & ~padding_mask(lengths, frames)
        figures = (
            *(counts.max(), lengths.min(), lengths.max(), bad.sum()),
            *(counts.sum(), lengths.sum(), collapsed.sum()),
        )
        size, shortest, longest, wrong, *totals = torch.stack(figures).tolist()
        if shortest < 1 or longest > frames:
            check_lengths(lengths, frames, "features", ids)
        if wrong:
            row = int(bad.any(1).nonzero()[0])
            raise ValueError(
                f"the CTC head's scores of {utterance_name(row, ids)} are NaN "
                f"or infinite in {int(bad[row].sum())} frame(s): either its "
                "features are (InputGuard finds them) or training has "
                "diverged (lower the learning rate)"
            )
        self.watch.update(*totals, utterances=len(lengths))
        return size

    def _pool(self, x, scores, best, segments):
        if self.pooling == "first":
            return take_rows(x, segments.starts, segments.mask)
        offsets, ids = segments.offsets, segments.ids
        if self.pooling == "mean":
            weights = segments.counts.clamp(min=1).to(x.dtype).reciprocal()
            weights = weights.gather(1, ids.clamp(min=0))
        else:
            share = (best - scores.logsumexp(-1)).exp().to(x.dtype)
            if self.pooling == "softmax":
                share = share.exp()
            share = share.masked_fill(ids < 0, 0.0)
            total = pool_runs(
                share[..., None], torch.ones_like(share), offsets, ids
            )
            total = total.squeeze(-1).gather(1, ids.clamp(min=0))
            # 1, not 0, where nothing is divided: 0 / 0 has no gradient.
            weights = share / total.masked_fill(ids < 0, 1.0)
        weights = weights.masked_fill(ids < 0, 0.0)
        return pool_runs(x, weights, offsets, ids)


class CollapseWatch:
    """Counts batches whose CTC labels are of no use for shrinking."""

    def __init__(self, min_ratio, max_ratio, cut_evenly):
        if not 1 <= min_ratio < max_ratio:
            raise ValueError(
                f"min_ratio {min_ratio:g}, max_ratio {max_ratio:g}: expected "
                "1 <= min_ratio < max_ratio (frames for every segment)"
            )
        self.min_ratio, self.max_ratio = min_ratio, max_ratio
        self.remedy = (
            "they are cut evenly instead"
            if cut_evenly
            else "little is left of them (uniform=8 would cut them evenly)"
        )
        self._warned = Counter()
        self.reset()

    def reset(self):
        """Forget the statistics, e.g. at the end of an epoch."""
        self._seen = Counter()

    def update(self, segments, frames, collapsed, utterances):
        """Count a batch, and warn where the head has collapsed."""
        self._seen.update(
            segments=segments,
            frames=frames,
            collapsed=collapsed,
            utterances=utterances,
            batches=1,
        )
        if collapsed:
            self._warn(
                "blanks",
                f"{collapsed} of {utterances} utterance(s) are almost nothing "
                f"but blanks to the CTC head (more than {self.max_ratio:g} "
                f"frames a segment): {self.remedy}. Usual early in training; "
                "later it means that the CTC loss is too weak or the learning "
                "rate too high.",
            )
        # Of single frames nothing can be said.
        elif frames < self.min_ratio * segments and frames > 2 * utterances:
            self._seen["noise"] += 1
            self._warn(
                "noise",
                "the CTC head has a new label at almost every frame "
                f"({segments} segments of {frames} frames): nothing gets "
                "shorter. It is untrained, or its labels do not fit the "
                "encoder.",
            )

    def _warn(self, kind, message):
        self._warned[kind] += 1
        if self._warned[kind] in WARN_AT:
            logger.warning("%s (time %d)", message, self._warned[kind])

    def statistics(self):
        """Return what was seen since the last `reset`.

        `compression`: frames for every segment; `blank_utterances`: how many
        collapsed into blanks, in %; `noise_batches`: how many batches into
        noise, in %.
        """
        seen = self._seen
        return {
            "compression": seen["frames"] / max(1, seen["segments"]),
            "blank_utterances": 100.0
            * seen["collapsed"]
            / max(1, seen["utterances"]),
            "noise_batches": 100.0 * seen["noise"] / max(1, seen["batches"]),
        }
