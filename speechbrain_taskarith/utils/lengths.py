"""Relative lengths made absolute, absolute ones relative, and their mask.

Lengths are [B]; relative ones are SpeechBrain's, in (0, 1], of a padded
tensor of `size` steps.
"""

import torch


def absolute_lengths(lens, size):
    """Return `round(lens * size)`, int64, without a device synchronisation.

    Not checked: NaN becomes the least integer there is.

    >>> absolute_lengths(torch.tensor([1.0, 0.5]), 7).tolist()
    [7, 4]
    """
    # In float64: 0.3 in float32 times a long tensor may round elsewhere.
    return (lens.double() * size).round().long()


def relative_lengths(lengths, size):
    """Return absolute lengths as relative ones, float32.

    >>> relative_lengths(torch.tensor([4, 2]), 4).tolist()
    [1.0, 0.5]
    """
    return lengths.float() / max(size, 1)


def padding_mask(lengths, size):
    """Return [B, size], True at padding, from absolute lengths.

    >>> padding_mask(torch.tensor([2, 1]), 2).tolist()
    [[False, False], [False, True]]
    """
    return torch.arange(size, device=lengths.device) >= lengths[:, None]
