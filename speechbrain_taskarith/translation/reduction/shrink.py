"""CTC shrink: one vector for every run of frames with the same best label."""

from typing import NamedTuple

import torch

from speechbrain_taskarith.translation.reduction.collapse import CollapseWatch
from speechbrain_taskarith.translation.reduction.lengths import (
    check_lengths,
    row_name,
)
from speechbrain_taskarith.translation.reduction.runs import (
    pool_runs,
    take_rows,
)
from speechbrain_taskarith.translation.reduction.segments import (
    Segments,
    _arrange,
    _begins,
    _check,
)
from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    padding_mask,
    relative_lengths,
)

POOLINGS = ("first", "mean", "weighted", "softmax")


class Shrunk(NamedTuple):
    """What `CTCShrink` returns.

    Arguments
    ---------
    x : torch.Tensor
        [B, S, d], one vector for every segment, 0 behind the last one.
    lens : torch.Tensor
        [B], their relative lengths.
    segments : Segments
        Where they come from.

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

    | pooling | vector of a segment |
    |---|---|
    | `"first"` | its first frame (the paper) |
    | `"mean"` | the mean |
    | `"weighted"` | `sum p_t x_t / sum p_t`, p the posterior of its label |
    | `"softmax"` | the same with `exp(p_t)` in the place of `p_t` |

    An utterance of blanks alone keeps one vector; no length is ever 0. A CTC
    head that has collapsed (blanks only, or a new label at every frame) is
    reported in the log, and with `uniform` such an utterance is cut evenly,
    so that translation goes on learning.

    Arguments
    ---------
    blank_index : int
        The blank.
    pooling : str
        See above.
    drop_blank : bool
        True: frames of blanks are left out.
    train_weights : bool
        True: weights pass gradient on to the CTC head (`"weighted"` and
        `"softmax"` only).
    capacity : int, optional
        Fixed number S of segments: nothing is asked of the device, and
        `torch.compile(..., fullgraph=True)` works. What an utterance has
        beyond it goes into its last segment. Lengths and NaN are then not
        checked and collapse is not reported (see `watch`).
    max_ratio : float
        More frames than this for every segment, over an utterance, is a
        collapse into blanks.
    min_ratio : float
        Fewer than this, over a batch, is a collapse into noise.
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
                "take 'weighted' or 'softmax'"
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
        x : torch.Tensor
            [B, T, d], encoder output.
        logits : torch.Tensor
            [B, T, V], scores of the CTC head on the same frames (logits or
            log-probabilities). Padding of both may hold anything, also NaN.
        lens : torch.Tensor
            [B], relative lengths.
        ids : sequence of str, optional
            The utterances' names, for errors.

        Returns
        -------
        Shrunk
            `x` [B, S, d], `lens` and `segments`.

        Raises
        ------
        ValueError
            Shapes that do not belong together, a blank that the head does not
            have, a length of 0, NaN among scores in use.
        """
        self._check_shapes(x, logits, lens)
        lengths = absolute_lengths(lens, x.shape[1])
        trained = logits if self.train_weights else logits.detach()
        # On a CPU several times faster than argmax, and it sees NaN.
        best, labels = trained.max(-1)
        segments = self._segments(best, labels, lengths, ids)
        out = self._pool(x, trained, best, segments)
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
        _check(labels, lengths, self.capacity)
        begins, inside = _begins(
            labels, lengths, self.drop_blank, self.blank_index
        )
        counts = begins.sum(1)
        blanks = lengths > counts * self.max_ratio
        if self.uniform is not None:
            begins, inside = self._cut_evenly(begins, inside, lengths, blanks)
            counts = torch.where(blanks, begins.sum(1), counts)
        width = self.capacity
        if width is None:
            width = self._ask(best, lengths, counts, blanks, ids)
        return _arrange(labels, lengths, begins, inside, width)

    def _cut_evenly(self, begins, inside, lengths, where):
        valid = ~padding_mask(lengths, begins.shape[1])
        steps = torch.arange(begins.shape[1], device=begins.device)
        even = (steps % self.uniform == 0) & valid
        where = where[:, None]
        return torch.where(where, even, begins), torch.where(
            where, valid, inside
        )

    def _ask(self, best, lengths, counts, blanks, ids):
        """Ask the device once for all that there is to know."""
        frames = best.shape[1]
        bad = ~best.detach().isfinite() & ~padding_mask(lengths, frames)
        asked = torch.stack(
            [
                counts.max(),
                lengths.min(),
                lengths.max(),
                bad.sum(),
                counts.sum(),
                lengths.sum(),
                blanks.sum(),
            ]
        )
        most, least, longest, wrong, segments, total, collapsed = asked.tolist()
        if least < 1 or longest > frames:
            check_lengths(lengths, frames, "features", ids)
        if wrong:
            row = int(bad.any(1).nonzero()[0])
            raise ValueError(
                f"the CTC head's scores of {row_name(row, ids)} are NaN or "
                f"infinite in {int(bad[row].sum())} frame(s): its features "
                "are, or training has diverged (lower the learning rate). "
                "InputGuard finds bad features beforehand"
            )
        self.watch.update(segments, total, collapsed, len(lengths))
        return most

    def _pool(self, x, logits, best, segments):
        if self.pooling == "first":
            return take_rows(x, segments.starts, segments.mask)
        offsets, ids = segments.offsets, segments.ids
        if self.pooling == "mean":
            each = segments.counts.clamp(min=1).to(x.dtype).reciprocal()
            weights = each.gather(1, ids.clamp(min=0))
        else:
            share = (best - logits.logsumexp(-1)).exp().to(x.dtype)
            if self.pooling == "softmax":
                share = share.exp()
            share = share.masked_fill(ids < 0, 0.0)
            total = pool_runs(
                share[..., None], torch.ones_like(share), offsets, ids
            )
            whole = total.squeeze(-1).gather(1, ids.clamp(min=0))
            # 1, not 0, where nothing is divided: 0 / 0 has no gradient.
            weights = share / whole.masked_fill(ids < 0, 1.0)
        weights = weights.masked_fill(ids < 0, 0.0)
        return pool_runs(x, weights, offsets, ids)
