"""Checks of lengths, and how to name an utterance in a message."""


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
    >>> import torch
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
