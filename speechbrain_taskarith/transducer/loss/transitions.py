"""Out of many scores, the two that a lattice needs: blank and next label.

The rest of the vocabulary enters through its normaliser only. Both forms of
the output are here, on rows of scores, and their derivatives:

- `"softmax"`, RNN-T: `log_softmax` over blank and labels.
- `"hat"`, hybrid autoregressive transducer (Variani 2020, arXiv 2003.07705,
  equations 8 and 9): `P(blank) = sigmoid(z_blank)`, and the labels share the
  rest by a softmax of their own. `log(1 - P(blank))` is `logsigmoid(-z)`: the
  logarithm of `1 - sigmoid(z)` has no gradient left from z = 17 on in float32.
"""

import torch
from torch.nn.functional import logsigmoid, pad

from speechbrain_taskarith.utils.lengths import padding_mask


def accumulate_type(dtype):
    """Return the type in which scores are normalised: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def next_labels(targets, labels, blank_index):
    """Return the label [B, U + 1] that may come next at every u.

    Where none does, any label but the blank: safe to index with.
    """
    other = 1 if blank_index == 0 else 0
    padding = padding_mask(labels.to(targets.device), targets.shape[1])
    return pad(targets.long().masked_fill(padding, other), (0, 1), value=other)


def transitions(scores, following, blank_index, normalization="softmax"):
    """Return log-probabilities of blank and next label out of rows of scores.

    `scores` [R, V] are raw and **overwritten** where they have their final
    type already; `following` [R] is the label that may come next. Returns
    `blank, label, norm`, [R] each; `scores_gradient_` needs `norm`, the
    logarithm of the (labels') normaliser.
    """
    scores = scores.to(accumulate_type(scores.dtype))
    blank = scores[:, blank_index].clone()
    label = scores.gather(1, following[:, None]).squeeze(1)
    if normalization == "hat":
        scores[:, blank_index] = float("-inf")
    # As logsumexp, without a second copy of the scores.
    # Finite: where no score is, all transitions are minus infinity, not NaN.
    least = torch.finfo(scores.dtype).min
    largest = scores.amax(1).clamp_(min=least)
    norm = scores.sub_(largest[:, None]).exp_().sum(1).log_() + largest
    norm = norm.clamp_(min=least)
    if normalization == "hat":
        return logsigmoid(blank), label - norm + logsigmoid(-blank), norm
    return blank - norm, label - norm, norm


def scores_gradient_(
    scores, following, norm, by_blank, by_label, blank_index, normalization
):
    """Turn rows of scores [R, V] into the gradient by them, in place.

    `by_blank` and `by_label` [R] are the gradients by the first two results
    of `transitions`, `norm` is its third.
    """
    dtype = scores.dtype
    scores = scores.to(norm.dtype)
    if normalization == "hat":
        z = scores[:, blank_index].clone()
        # The blank takes no part in the labels' softmax.
        scores.sub_(norm[:, None]).exp_().mul_(-by_label[:, None])
        blank = by_blank * torch.sigmoid(-z) - by_label * torch.sigmoid(z)
        scores[:, blank_index] = blank
    else:
        scores.sub_(norm[:, None]).exp_().mul_(-(by_blank + by_label)[:, None])
        scores[:, blank_index] += by_blank
    scores.scatter_add_(1, following[:, None], by_label[:, None])
    return scores.to(dtype)


# Elements of a piece: small enough for a cache, and for 32-bit indices.
_PIECE = 2**22


class _DenseTransitions(torch.autograd.Function):
    """`transitions` of a whole [B, T, U + 1, V], a piece at a time.

    Only `usable` nodes [B, T, U + 1] are read; elsewhere transitions and
    gradient are 0, also where padding holds NaN. `logits` stay as they are.
    """

    @staticmethod
    def forward(ctx, logits, following, blank_index, normalization, usable):
        shape, size = logits.shape[:3], logits.shape[-1]
        dtype = accumulate_type(logits.dtype)
        blank, label, norm = (
            torch.zeros(shape, dtype=dtype, device=logits.device)
            for _ in range(3)
        )
        # Kept for backward: to count them again, a GPU would be waited for.
        every = usable.nonzero()
        for nodes in _pieces(every, size):
            b, _, u = nodes
            # Indexing copies, so that the copy may be overwritten.
            blank[nodes], label[nodes], norm[nodes] = transitions(
                logits.detach()[nodes],
                following[b, u],
                blank_index,
                normalization,
            )
        ctx.save_for_backward(logits, following, norm, every)
        ctx.options = blank_index, normalization
        return blank, label

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_blank, by_label):
        logits, following, norm, every = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for nodes in _pieces(every, logits.shape[-1]):
            b, _, u = nodes
            grad[nodes] = scores_gradient_(
                logits[nodes],
                following[b, u],
                norm[nodes],
                by_blank[nodes],
                by_label[nodes],
                *ctx.options,
            )
        return grad, None, None, None, None


dense_transitions = _DenseTransitions.apply


def _pieces(nodes, vocab_size):
    """Yield index triples (b, t, u) of nodes [R, 3], some at a time."""
    rows = max(1, _PIECE // vocab_size)
    for start in range(0, len(nodes), rows):
        yield nodes[start : start + rows].unbind(1)
