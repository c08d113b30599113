"""Lengths and targets: made absolute once, and checked where that is done."""

import torch

from speechbrain_taskarith.utils.lengths import Refusals, padding_mask


def checked_lengths(lens, shape, what, least=1, refusals=None, wait=True):
    """Return `round(lens * size)`, int64, of relative lengths [B].

    `shape`: (B, size). Refuses lengths that are not B, NaN, below `least` steps
    or beyond `size`; `what` they are lengths of is for the message. With
    `refusals`, the caller settles those.
    """
    lens = torch.as_tensor(lens)
    if lens.dim() != 1:
        raise ValueError(
            f"{what} lengths: expected one relative length per utterance, "
            f"shape [batch], found {tuple(lens.shape)}"
        )
    batch, size = shape
    if len(lens) != batch:
        raise ValueError(
            f"{what} lengths: {len(lens)} for {batch} utterances; expected one "
            "for each"
        )
    # As `absolute_lengths`, but NaN stays NaN, and so is refused anywhere.
    steps = (lens.double() * size).round()
    bad = ~((steps >= least) & (steps <= size))

    def explain():
        row = int(bad.nonzero()[0])
        return (
            f"{what} length of row {row} is {float(lens[row]):g}, which makes "
            f"{float(steps[row]):g} of {size} steps; expected relative "
            f"lengths in (0, 1] with at least {least} step(s). Absolute "
            "lengths have to be divided by the padded length first."
        )

    own = Refusals() if refusals is None else refusals
    own.add(bad, explain, f"{what} lengths outside of (0, 1]")
    if refusals is None:
        own.settle(wait)
    return steps.long()


def check_targets(
    targets, labels, blank_index, vocab_size, max_labels=None, refusals=None
):
    """Refuse targets [B, U] (`labels` [B] of them count) that no lattice holds.

    `vocab_size` may be None: not known. `max_labels` is the longest target for
    which there are scores. Settles `refusals` of the lengths in the same wait.
    """
    if not len(targets):
        raise ValueError(
            "an empty batch: a loss is a mean over utterances, and there is "
            "none; leave the batch out"
        )
    vocab_size = 2**31 if vocab_size is None else vocab_size
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
    refusals = Refusals() if refusals is None else refusals
    if max_labels is not None:
        _refuse_long(labels, max_labels, refusals)
    targets = targets.long()  # a byte has no vocab_size to be compared with
    bad = (targets == blank_index) | (targets < 0) | (targets >= vocab_size)
    bad &= ~padding_mask(labels.to(targets.device), targets.shape[1])

    def explain():
        row, column = bad.nonzero()[0].tolist()
        value = int(targets[row, column])
        why = (
            "is the blank, which is never a target (are padded labels "
            "counted, or blank and padding mixed up?)"
            if value == blank_index
            else f"is outside of the vocabulary of {vocab_size}; do output "
            "layer and tokenizer belong together?"
        )
        return f"targets: row {row}, label {column}: {value} {why}"

    refusals.add(bad, explain, "targets hold blanks or unknown labels")
    refusals.settle()


def _refuse_long(labels, max_labels, refusals):
    def explain():
        row = int(labels.argmax())
        return (
            f"targets of row {row} hold {int(labels[row])} labels, but the "
            f"scores have room for {max_labels} (their third dimension must be "
            "the longest target + 1: feed the predictor a blank, then targets)"
        )

    refusals.add(labels > max_labels, explain, "targets longer than scores")


def check_vocabulary(vocab_size, blank_index):
    """Refuse a vocabulary without labels, or a blank outside it."""
    if vocab_size < 2 or not 0 <= blank_index < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size}, blank_index {blank_index}: expected "
            "one label beside the blank or more, and blank_index below that"
        )
