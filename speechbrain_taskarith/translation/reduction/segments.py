"""Runs of equal labels: where they begin, and the way back to frames."""

from typing import NamedTuple

import torch

from speechbrain_taskarith.translation.input_guard import check_lengths
from speechbrain_taskarith.translation.reduction.pooling import spread_runs
from speechbrain_taskarith.utils.lengths import padding_mask


class Segments(NamedTuple):
    """The runs of equal labels of a batch, made by `ctc_segments`.

    Arguments
    ---------
    ids : torch.Tensor
        [B, T], the segment of every frame; -1 for padding and dropped blanks.
    lengths : torch.Tensor
        [B], number of segments, at least 1.
    starts : torch.Tensor
        [B, S], the first frame of every segment; the number of frames of the
        utterance beyond the last one.
    counts : torch.Tensor
        [B, S], frames of every segment, 0 beyond the last one.
    labels : torch.Tensor
        [B, S], their label, -1 beyond the last one.
    frame_lengths : torch.Tensor
        [B], number of frames.

    Example
    -------
    >>> found = ctc_segments(torch.tensor([[0, 0, 7, 7, 0]]), torch.tensor([5]))
    >>> found.starts.tolist(), found.counts.tolist(), found.labels.tolist()
    ([[0, 2, 4]], [[2, 2, 1]], [[0, 7, 0]])
    >>> found.seconds(0.04)[0].tolist()[1]  # begins and ends at
    [0.07..., 0.15...]
    >>> round(float(found.compression), 2)
    1.67
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    labels: torch.Tensor
    frame_lengths: torch.Tensor

    @property
    def mask(self):
        """[B, S], True where there is a segment."""
        return ~padding_mask(self.lengths, self.starts.shape[1])

    @property
    def compression(self):
        """[B], frames for every segment, on average."""
        return self.frame_lengths.float() / self.lengths.float()

    @property
    def offsets(self):
        """[B, S + 1], where to cut: frame 0, then starts, then the end."""
        cuts = torch.cat([self.starts, self.frame_lengths[:, None]], 1)
        # Dropped blanks at the beginning go with the first segment.
        first = torch.arange(cuts.shape[1], device=cuts.device) == 0
        return cuts.masked_fill(first, 0)

    def owners(self):
        """Give every frame a segment, [B, T], as `ids`, dropped blanks too.

        These belong to the segment before (at the beginning: the first one).

        Example
        -------
        >>> labels = torch.tensor([[0, 3, 0, 4]])
        >>> found = ctc_segments(labels, torch.tensor([4]), drop_blank=True)
        >>> found.ids.tolist(), found.owners().tolist()
        ([[-1, 0, -1, 1]], [[0, 0, 0, 1]])
        """
        outside = padding_mask(self.frame_lengths, self.ids.shape[1])
        owner = self.ids.cummax(1).values.clamp(min=0)
        return owner.masked_fill(outside, -1)

    def expand(self, values):
        """Bring values [B, S, d] back to frames, [B, T, d], as `ids` says.

        Frames of no segment get 0.

        Example
        -------
        >>> found = ctc_segments(torch.tensor([[5, 5, 6]]), torch.tensor([3]))
        >>> found.expand(torch.tensor([[[1.0], [2.0]]])).flatten().tolist()
        [1.0, 1.0, 2.0]
        """
        out = spread_runs(values, self.ids)
        return out.masked_fill((self.ids < 0)[..., None], 0.0)

    def seconds(self, frame_shift):
        """Return when segments begin and end, [B, S, 2], see `Segments`.

        In seconds; `frame_shift` are those from frame to frame.
        """
        ends = self.starts + self.counts
        return torch.stack([self.starts, ends], -1) * frame_shift


def ctc_segments(
    labels, lengths, *, drop_blank=False, blank_index=0, capacity=None
):
    """Find the runs of equal labels, for all utterances at once.

    A new segment begins where the label changes. Runs of blanks are segments,
    too: a frame that was taken for a blank is not lost. One synchronisation
    with the device, for the number of segments; with `capacity` none.

    Arguments
    ---------
    labels : torch.Tensor
        [B, T], integers: the best CTC label of every frame.
    lengths : torch.Tensor
        [B], absolute numbers of frames, 1 to T; else a `ValueError` names
        the row.
    drop_blank : bool
        True: frames of blanks belong to no segment. An utterance of blanks
        alone keeps its one run.
    blank_index : int
        The blank.
    capacity : int, optional
        Fixed number S of segments. What an utterance has beyond it goes into
        its last segment. Lengths are then asserted by the device, where
        that is a GPU: without the row's name, and without a wait.

    Returns
    -------
    Segments

    Example
    -------
    >>> labels = torch.tensor([[0, 3, 3, 0, 3], [4, 4, 9, 9, 9]])
    >>> found = ctc_segments(labels, torch.tensor([5, 2]))
    >>> found.ids.tolist(), found.lengths.tolist()
    ([[0, 1, 1, 2, 3], [0, 0, -1, -1, -1]], [4, 1])
    """
    starts, inside = find_starts(
        labels, lengths, drop_blank, blank_index, capacity
    )
    if capacity is None:
        # One transfer for the number of segments and the check of lengths.
        extremes = torch.stack(
            [starts.sum(1).max(), lengths.min(), lengths.max()]
        )
        capacity, shortest, longest = extremes.tolist()
        if shortest < 1 or longest > labels.shape[1]:
            check_lengths(lengths, labels.shape[1], "labels")
    else:
        check_lengths(lengths, labels.shape[1], "labels", wait=False)
    return make_segments(labels, lengths, starts, inside, capacity)


def find_starts(labels, lengths, drop_blank, blank_index, capacity=None):
    """Return which frames begin a segment, and which belong to one: [B, T]."""
    _check_shapes(labels, lengths, capacity)
    inside = ~padding_mask(lengths, labels.shape[1])
    changes = labels[:, 1:] != labels[:, :-1]
    starts = torch.cat([inside[:, :1], changes & inside[:, 1:]], 1)
    if drop_blank:
        spoken = inside & (labels != blank_index)
        # Never a length of 0: blanks alone stay one segment.
        inside = torch.where(spoken.any(1, keepdim=True), spoken, inside)
        starts = starts & inside
    return starts, inside


def _check_shapes(labels, lengths, capacity):
    if labels.dim() != 2 or labels.is_floating_point() or not labels.numel():
        raise ValueError(
            "labels: expected integers of shape [batch, frames] with at least "
            f"one frame, found {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if lengths.shape != labels.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"lengths: expected {len(labels)} absolute numbers of frames "
            f"(integers), found {lengths.dtype} of shape "
            f"{tuple(lengths.shape)}"
        )
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity {capacity}: expected at least 1 segment")


def make_segments(labels, lengths, starts, inside, capacity):
    """Put what `find_starts` found into tables of `capacity` columns."""
    batch, frames = labels.shape
    order = starts.cumsum(1)
    # Where no segment begins, or one too many, goes into a column behind.
    column = torch.where(starts, order - 1, capacity).clamp(max=capacity)
    steps = torch.arange(frames, device=labels.device).expand(batch, -1)
    first = lengths[:, None].expand(-1, capacity + 1).contiguous().long()
    first = first.scatter(1, column, steps)[:, :capacity]
    ids = (order - 1).clamp(max=capacity - 1).masked_fill(~inside, -1)
    count = order[:, -1].clamp(max=capacity)
    # Frames inside up to each cut: their differences are the counts.
    before = torch.cat([torch.zeros_like(order[:, :1]), inside.cumsum(1)], 1)
    cuts = torch.cat([first, lengths[:, None]], 1)
    label = labels.gather(1, first.clamp(max=frames - 1))
    return Segments(
        ids=ids,
        lengths=count,
        starts=first,
        counts=before.gather(1, cuts).diff(dim=1),
        labels=label.masked_fill(padding_mask(count, capacity), -1),
        frame_lengths=lengths.long(),
    )
