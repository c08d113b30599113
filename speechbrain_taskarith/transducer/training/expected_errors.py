"""Expected word errors and their gradient, of n-best lists and of samples."""

import itertools

import torch
from torch.nn.utils.rnn import pad_sequence

from speechbrain_taskarith.utils.lengths import Refusals, padding_mask


def min_wer_loss(log_probs, errors, mask=None):
    """Expected word errors over n-best lists, minus their mean.

    `L = mean_b sum_i P_bi (W_bi - mean_j W_bj)` with `P_b` the softmax of an
    utterance's log-probabilities: the expectation is restricted to the list.
    Subtracting the mean changes no gradient; that by `log_probs[b, i]` is
    `P_bi (W_bi - sum_j P_bj W_bj) / B`.

    Arguments
    ---------
    log_probs : torch.Tensor
        [B, N], log P(y_i | x).
    errors : torch.Tensor
        [B, N], numbers of word errors.
    mask : torch.Tensor or None
        [B, N], bool, True where there is a hypothesis; None: everywhere.
        Other values are ignored, even NaN.

    Returns
    -------
    torch.Tensor
        A scalar, in words.

    Raises
    ------
    ValueError
        Shapes that differ, an utterance without any hypothesis, or with none
        of a probability above 0.

    Example
    -------
    >>> log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    >>> loss = min_wer_loss(log_probs, torch.tensor([[0, 1, 2]]))
    >>> loss.backward()
    >>> log_probs.grad  # P_i (W_i - 0.7)
    tensor([[-0.3500,  0.0900,  0.2600]])
    """
    if mask is None:
        mask = torch.ones_like(log_probs, dtype=torch.bool)
    if not log_probs.shape == errors.shape == mask.shape:
        raise ValueError(
            f"log_probs {tuple(log_probs.shape)}, errors "
            f"{tuple(errors.shape)}, mask {tuple(mask.shape)}: expected one "
            "shape [batch, hypotheses]"
        )
    empty = ~mask.any(1)
    refusals = Refusals()
    refusals.add(
        empty,
        lambda: (
            f"row {int(empty.nonzero()[0])} has no hypothesis; an n-best list "
            "needs at least one (the empty sequence is one)"
        ),
        "an n-best list without a hypothesis",
    )
    never = ~empty & ~(mask & ~log_probs.isneginf()).any(1)
    refusals.add(
        never,
        lambda: (
            f"row {int(never.nonzero()[0])}: every hypothesis has the "
            "log-probability -inf, so that none is more likely than another; "
            "leave the utterance out, or look for what makes it impossible"
        ),
        "an n-best list of hypotheses that all have probability 0",
    )
    refusals.settle(wait=False)
    # Minus infinity, not 0: a missing hypothesis has probability 0.
    probs = log_probs.masked_fill(~mask, float("-inf")).softmax(1)
    errors = errors.to(probs.dtype).masked_fill(~mask, 0.0)
    mean = errors.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return (probs * (errors - mean)).sum(1).mean()


def sampled_loss(log_probs, errors, draws):
    """Return the gradient of expected errors, as a value of 0.

    Of sequences [B, N] that were drawn `draws` times [B, N]. The mean over
    draws of `(W_n - b_n) grad log P(y_n)`, with the mean of the other draws as
    `b_n` (leave-one-out): unbiased, whatever the number of draws.
    """
    draws = draws.to(log_probs.dtype)
    errors, total = errors.to(draws), draws.sum(1, keepdim=True)
    mean = (draws * errors).sum(1, keepdim=True) / total
    weights = draws * (errors - mean) / (total - 1.0)
    loss = (weights * log_probs).sum(1).mean()
    return loss - loss.detach()


def tables(log_probs, errors, scored):
    """Arrange scored hypotheses as [utterances, N]: log P, errors, mask."""
    lengths = [len(row) for row in itertools.compress(errors, scored)]
    mask = ~padding_mask(torch.tensor(lengths), max(lengths))
    errors = padded(errors, scored)
    log_probs = pad_sequence(log_probs.split(lengths), batch_first=True)
    return log_probs, errors.to(log_probs.device), mask.to(log_probs.device)


def padded(rows, scored):
    """Arrange lists of numbers, of scored utterances, as [utterances, N]."""
    rows = [torch.tensor(row) for row in itertools.compress(rows, scored)]
    return pad_sequence(rows, batch_first=True)


def expected_errors(errors, scored, lists):
    """Return the errors expected over n-best lists, summed over a batch."""
    # Where all are equal, that is the expected number too.
    total = sum(row[0] for row, differ in zip(errors, scored) if not differ)
    if lists is None:
        return total
    log_probs, counts, mask = lists
    log_probs = log_probs.detach().float()
    probs = log_probs.masked_fill(~mask, float("-inf")).softmax(1)
    return total + float((probs * counts).sum())
