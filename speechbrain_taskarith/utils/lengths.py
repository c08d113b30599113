"""Relative lengths made absolute, absolute ones relative, and their mask."""

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
        [B], int64, `round(lens * size)`; not checked: NaN becomes the least
        integer there is.

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
        [B, size], True at padding, on the device of `lengths`.

    Example
    -------
    >>> padding_mask(torch.tensor([2, 1]), 2).tolist()
    [[False, False], [False, True]]
    """
    steps = torch.arange(size, device=lengths.device)
    return steps >= lengths[:, None]
