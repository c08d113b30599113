"""Runs of equal labels: where they begin, and the way back to frames."""

from typing import NamedTuple

import torch

from speechbrain_taskarith.translation.reduction.lengths import check_lengths
from speechbrain_taskarith.translation.reduction.runs import _spread
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
        return cuts.masked_fill(_first_column(cuts), 0)

    def owners(self):
        """Give every frame a segment, dropped blanks too.

        Returns
        -------
        torch.Tensor
            [B, T], as `ids`; a dropped blank belongs to the segment before it
            (at the beginning: the first one), padding to -1.

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
        """Bring values of segments back to their frames.

        Arguments
        ---------
        values : torch.Tensor
            [B, S, d].

        Returns
        -------
        torch.Tensor
            [B, T, d], 0 for frames of no segment.

        Example
        -------
        >>> found = ctc_segments(torch.tensor([[5, 5, 6]]), torch.tensor([3]))
        >>> found.expand(torch.tensor([[[1.0], [2.0]]])).flatten().tolist()
        [1.0, 1.0, 2.0]
        """
        out = _spread(values, self.ids)
        return out.masked_fill((self.ids < 0)[..., None], 0.0)

    def seconds(self, frame_shift):
        """Return when segments begin and end.

        Arguments
        ---------
        frame_shift : float
            Seconds from frame to frame.

        Returns
        -------
        torch.Tensor
            [B, S, 2], in seconds.
        """
        ends = self.starts + self.counts
        return torch.stack([self.starts, ends], -1) * frame_shift


def ctc_segments(
    labels, lengths, *, drop_blank=False, blank_index=0, capacity=None
):
    """Find the runs of equal labels, for all utterances at once.

    A new segment begins where the label changes (runs of blanks are segments,
    too: a frame that was taken for a blank is not lost). No loop, and one
    question to the device, for the number of segments; with `capacity` none.

    Arguments
    ---------
    labels : torch.Tensor
        [B, T], integers: the best CTC label of every frame.
    lengths : torch.Tensor
        [B], absolute numbers of frames, 1 to T.
    drop_blank : bool
        True: frames of blanks belong to no segment. An utterance of blanks
        alone keeps its one run.
    blank_index : int
        The blank.
    capacity : int, optional
        Fixed number S of segments. What an utterance has beyond it is put
        into its last segment. Then lengths are not checked (that would be a
        question to the device).

    Returns
    -------
    Segments
        See there.

    Raises
    ------
    ValueError
        Shapes that do not fit, a length of 0 or beyond T (naming the row).

    Example
    -------
    >>> labels = torch.tensor([[0, 3, 3, 0, 3], [4, 4, 9, 9, 9]])
    >>> found = ctc_segments(labels, torch.tensor([5, 2]))
    >>> found.ids.tolist(), found.lengths.tolist()
    ([[0, 1, 1, 2, 3], [0, 0, -1, -1, -1]], [4, 1])
    """
    _check(labels, lengths, capacity)
    begins, inside = _begins(labels, lengths, drop_blank, blank_index)
    width = capacity
    if width is None:
        width = _width(begins, lengths, labels.shape[1])
    return _arrange(labels, lengths, begins, inside, width)


def _check(labels, lengths, capacity):
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


def _begins(labels, lengths, drop_blank, blank_index):
    """Return where segments begin, and which frames belong to one."""
    inside = ~padding_mask(lengths, labels.shape[1])
    changes = labels[:, 1:] != labels[:, :-1]
    begins = torch.cat([inside[:, :1], changes & inside[:, 1:]], 1)
    if drop_blank:
        spoken = inside & (labels != blank_index)
        # Never a length of 0: blanks alone stay one segment.
        inside = torch.where(spoken.any(1, keepdim=True), spoken, inside)
        begins = begins & inside
    return begins, inside


def _width(begins, lengths, size):
    """Ask the device, once, for the most segments, and check lengths."""
    counts = begins.sum(1)
    asked = torch.stack([counts.max(), lengths.min(), lengths.max()])
    most, least, longest = asked.tolist()
    if least < 1 or longest > size:
        check_lengths(lengths, size, "labels")
    return most


def _first_column(table):
    return torch.arange(table.shape[1], device=table.device) == 0


def _arrange(labels, lengths, begins, inside, width):
    """Put what was found into tables of a known width."""
    batch, frames = labels.shape
    order = begins.cumsum(1)
    found = order[:, -1]
    # Where no segment begins, or one too many, goes into a column behind.
    column = torch.where(begins, order - 1, width).clamp(max=width)
    steps = torch.arange(frames, device=labels.device).expand(batch, -1)
    starts = lengths[:, None].expand(-1, width + 1).contiguous().long()
    starts = starts.scatter(1, column, steps)[:, :width]
    ids = (order - 1).clamp(max=width - 1).masked_fill(~inside, -1)
    many = found.clamp(max=width)
    beyond = padding_mask(many, width)
    # Frames inside up to each cut: their differences are the counts.
    upto = torch.cat([torch.zeros_like(order[:, :1]), inside.cumsum(1)], 1)
    cuts = torch.cat([starts, lengths[:, None]], 1)
    counts = upto.gather(1, cuts).diff(dim=1)
    names = labels.gather(1, starts.clamp(max=frames - 1))
    return Segments(
        ids=ids,
        lengths=many,
        starts=starts,
        counts=counts,
        labels=names.masked_fill(beyond, -1),
        frame_lengths=lengths.long(),
    )
