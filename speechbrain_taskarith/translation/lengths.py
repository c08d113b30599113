"""Relative lengths made absolute once, masks, and how to name an utterance.

Authors
 * speechbrain_taskarith contributors 2026
"""

import torch


def absolute_lengths(lens, size):
    """Turn relative lengths into numbers of steps, without asking the device.

    Arguments
    ---------
    lens : torch.Tensor
        [B], relative lengths in (0, 1].
    size : int
        Steps of the padded tensor.

    Returns
    -------
    torch.Tensor
        [B], int64, `round(lens * size)`; not checked, see `check_lengths`.

    Example
    -------
    >>> absolute_lengths(torch.tensor([1.0, 0.5]), 7).tolist()
    [7, 4]
    """
    # In float64: 0.3 in float32 times a long tensor may round elsewhere.
    return (lens.double() * size).round().long()


def relative_lengths(lengths, size):
    """Turn numbers of steps into SpeechBrain's relative lengths.

    Arguments
    ---------
    lengths : torch.Tensor
        [B], numbers of steps.
    size : int
        Steps of the padded tensor.

    Returns
    -------
    torch.Tensor
        [B], float32 in (0, 1].

    Example
    -------
    >>> relative_lengths(torch.tensor([4, 2]), 4).tolist()
    [1.0, 0.5]
    """
    return lengths.float() / max(size, 1)


def padding_mask(lengths, size):
    """Mark what is padding.

    Arguments
    ---------
    lengths : torch.Tensor
        [B], numbers of steps.
    size : int
        Steps of the padded tensor.

    Returns
    -------
    torch.Tensor
        [B, size], True at padding.

    Example
    -------
    >>> padding_mask(torch.tensor([2, 1]), 2).tolist()
    [[False, False], [False, True]]
    """
    steps = torch.arange(size, device=lengths.device)
    return steps >= lengths[:, None]


def row_name(row, ids=None):
    """Name a row of a batch in a message.

    Arguments
    ---------
    row : int
        Its position.
    ids : sequence of str, optional
        The utterances' names.

    Returns
    -------
    str
        `"utterance <id>"`, or `"row <n> of the batch"`.

    Example
    -------
    >>> row_name(1, ["a", "b"]), row_name(1)
    ("utterance 'b'", 'row 1 of the batch')
    """
    return (
        f"row {row} of the batch" if ids is None else f"utterance {ids[row]!r}"
    )


def check_lengths(lengths, size, what, ids=None):
    """Refuse lengths of zero, beyond the tensor, or NaN.

    Arguments
    ---------
    lengths : torch.Tensor
        [B], from `absolute_lengths`.
    size : int
        Steps of the padded tensor.
    what : str
        What they are lengths of.
    ids : sequence of str, optional
        The utterances' names.

    Raises
    ------
    ValueError
        Naming the utterance and its length.

    Example
    -------
    >>> check_lengths(torch.tensor([3, 0]), 3, "features", ["a", "b"])
    Traceback (most recent call last):
        ...
    ValueError: features of utterance 'b' have a length of 0, expected 1 to 3...
    """
    listed = lengths.tolist()
    for row, length in enumerate(listed):
        if not 1 <= length <= size:
            # NaN becomes the least integer there is.
            shown = "NaN" if length < -(2**62) else length
            raise ValueError(
                f"{what} of {row_name(row, ids)} have a length of {shown}, "
                f"expected 1 to {size} steps (lengths are relative to the "
                "padded tensor, in (0, 1]). Take the utterance out of the "
                "data, or let InputGuard(skip_bad=True) leave it out"
            )
