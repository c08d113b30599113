"""Lengths and targets: made absolute once, and checked where that is done."""

import torch

from speechbrain_taskarith.utils.lengths import padding_mask


def checked_lengths(lens, size, what, least=1):
    """Turn relative lengths into numbers of steps, and check them.

    Arguments
    ---------
    lens : torch.Tensor
        [B], relative lengths in (0, 1].
    size : int
        Steps of the padded tensor.
    what : str
        What they are lengths of, for the error.
    least : int
        The smallest length allowed.

    Returns
    -------
    torch.Tensor
        [B], int64, `round(lens * size)`.

    Raises
    ------
    ValueError
        A length that is NaN, below `least` or beyond the tensor, naming its
        row.

    Example
    -------
    >>> checked_lengths(torch.tensor([1.0, 0.5]), 7, "input").tolist()
    [7, 4]
    """
    lens = torch.as_tensor(lens)
    if lens.dim() != 1:
        raise ValueError(
            f"{what} lengths: expected one relative length per utterance, "
            f"shape [batch], found {tuple(lens.shape)}"
        )
    # In float64: 0.3 in float32 times a long tensor may round elsewhere.
    steps = (lens.double() * size).round()
    good = (steps >= least) & (steps <= size)
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise ValueError(
            f"{what} length of row {row} is {float(lens[row]):g}, which makes "
            f"{float(steps[row]):g} of {size} steps; expected relative "
            f"lengths in (0, 1] with at least {least} step(s). Absolute "
            "lengths have to be divided by the padded length first."
        )
    return steps.long()


def check_targets(targets, labels, blank_index, vocab_size, most=None):
    """Refuse targets that no lattice can hold.

    Arguments
    ---------
    targets : torch.Tensor
        [B, U], label indices.
    labels : torch.Tensor
        [B], how many of them count.
    blank_index : int
        The blank.
    vocab_size : int
        Number of labels, blank included.
    most : int or None
        The longest target that the scores have room for.

    Raises
    ------
    ValueError
        Naming the row and what is wrong with it.
    """
    if not 0 <= blank_index < vocab_size:
        raise ValueError(
            f"blank_index {blank_index} is outside of the {vocab_size} scores "
            f"of the output layer; expected 0 to {vocab_size - 1}"
        )
    if targets.dim() != 2 or targets.is_floating_point():
        raise ValueError(
            "targets: expected label indices of shape [batch, labels], found "
            f"{targets.dtype} of shape {tuple(targets.shape)}"
        )
    if len(targets) != len(labels):
        raise ValueError(
            f"{len(targets)} rows of targets but {len(labels)} lengths"
        )
    longest = int(labels.max()) if len(labels) else 0
    if most is not None and longest > most:
        row = int(labels.argmax())
        raise ValueError(
            f"targets of row {row} hold {longest} labels, but the scores have "
            f"room for {most} (their third dimension must be the longest "
            "target + 1: feed the predictor a blank and then the targets)"
        )
    used = ~padding_mask(labels.to(targets.device), targets.shape[1])
    bad = (targets == blank_index) | (targets < 0) | (targets >= vocab_size)
    bad = bad & used
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        value = int(targets[row, column])
        why = (
            "is the blank, which never is a target (is padding counted as "
            "labels, or blank and padding mixed up?)"
            if value == blank_index
            else f"is outside of the vocabulary of {vocab_size}; the output "
            "layer and the tokenizer do not belong together"
        )
        raise ValueError(f"targets: row {row}, label {column}: {value} {why}")


def reduced(losses, reduction):
    """Reduce losses of utterances.

    Arguments
    ---------
    losses : torch.Tensor
        [B].
    reduction : str
        `"mean"` over the batch (`"batchmean"` is the same), `"sum"` or
        `"none"`.

    Returns
    -------
    torch.Tensor
        A scalar, or [B].

    Raises
    ------
    ValueError
        Another word.
    """
    if reduction in ("mean", "batchmean"):
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    if reduction == "none":
        return losses
    raise ValueError(
        f"reduction {reduction!r}: expected 'mean' (over the batch), 'sum' "
        "or 'none'"
    )


def check_vocabulary(vocab_size, blank_index):
    """Refuse a vocabulary without labels, or a blank outside it.

    Arguments
    ---------
    vocab_size : int
        Number of scores: labels and blank.
    blank_index : int
        Index of the blank.

    Raises
    ------
    ValueError
        Saying what was expected.
    """
    if vocab_size < 2 or not 0 <= blank_index < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size}, blank_index {blank_index}: expected "
            "at least one label beside the blank, and the blank's index "
            "below vocab_size"
        )
