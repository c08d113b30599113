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
from torch.nn.functional import logsigmoid

NORMALIZATIONS = ("softmax", "hat")


def accumulate_type(dtype):
    """Return the type to normalise in: float32 at least.

    Arguments
    ---------
    dtype : torch.dtype
        Type of the scores.

    Returns
    -------
    torch.dtype
        float64 for float64, otherwise float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def transitions(scores, targets, blank_index, normalization="softmax"):
    """Return log-probabilities of blank and target out of rows of scores.

    Arguments
    ---------
    scores : torch.Tensor
        [R, V], raw. **Overwritten** where it has its final type already.
    targets : torch.Tensor
        [R], the label that may come next; any index but the blank's where
        none does.
    blank_index : int
        The blank.
    normalization : str
        `"softmax"` or `"hat"`.

    Returns
    -------
    blank, label, norm : torch.Tensor
        [R] each. `norm` is the logarithm of the (labels') normaliser, which
        `scores_gradient_` wants back.

    Example
    -------
    >>> scores = torch.tensor([[2.0, 1.0, 1.0]])
    >>> one = torch.tensor([1])
    >>> blank, label, _ = transitions(scores.clone(), one, 0)
    >>> bool((blank.exp() + 2 * label.exp()).isclose(torch.ones(1)))
    True
    >>> blank, label, _ = transitions(scores.clone(), one, 0, "hat")
    >>> bool((blank.exp() + 2 * label.exp()).isclose(torch.ones(1)))
    True
    """
    scores = scores.to(accumulate_type(scores.dtype))
    blank = scores[:, blank_index].clone()
    label = scores.gather(1, targets[:, None]).squeeze(1)
    if normalization == "hat":
        scores[:, blank_index] = float("-inf")
    # As logsumexp, without a second copy of the scores.
    largest = scores.amax(1)
    norm = scores.sub_(largest[:, None]).exp_().sum(1).log_() + largest
    if normalization == "hat":
        return logsigmoid(blank), label - norm + logsigmoid(-blank), norm
    return blank - norm, label - norm, norm


def scores_gradient_(
    scores, targets, norm, by_blank, by_label, blank_index, normalization
):
    """Turn rows of scores into the gradient by them, in place.

    Arguments
    ---------
    scores : torch.Tensor
        [R, V], as given to `transitions`. Overwritten.
    targets : torch.Tensor
        [R].
    norm : torch.Tensor
        [R], as `transitions` returned it.
    by_blank, by_label : torch.Tensor
        [R], gradients by its first two results.
    blank_index : int
        The blank.
    normalization : str
        `"softmax"` or `"hat"`.

    Returns
    -------
    torch.Tensor
        [R, V], of the scores' type.
    """
    dtype = scores.dtype
    scores = scores.to(norm.dtype)
    if normalization == "hat":
        z = scores[:, blank_index].clone()
        # The blank takes no part in the labels' softmax.
        scores.sub_(norm[:, None]).exp_().mul_(-by_label[:, None])
        scores[:, blank_index] = by_blank * torch.sigmoid(
            -z
        ) - by_label * torch.sigmoid(z)
    else:
        scores.sub_(norm[:, None]).exp_().mul_(-(by_blank + by_label)[:, None])
        scores[:, blank_index] += by_blank
    scores.scatter_add_(1, targets[:, None], by_label[:, None])
    return scores.to(dtype)


def next_labels(targets, labels, blank_index):
    """Return the label that may come next at every u, safe to index with.

    Arguments
    ---------
    targets : torch.Tensor
        [B, U].
    labels : torch.Tensor
        [B], how many count.
    blank_index : int
        The blank.

    Returns
    -------
    torch.Tensor
        [B, U + 1], int64. Where nothing comes next: any label but the blank.
    """
    batch, most = targets.shape
    other = 1 if blank_index == 0 else 0
    following = targets.new_full((batch, most + 1), other, dtype=torch.long)
    columns = torch.arange(most, device=targets.device)
    used = columns < labels.to(targets.device)[:, None]
    following[:, :most] = torch.where(used, targets.long(), other)
    return following


# Elements of a piece: small enough for a cache, and for 32-bit indices.
_PIECE = 2**22


def dense_transitions(logits, following, blank_index, normalization, usable):
    """`transitions` of a whole [B, T, U + 1, V], a piece at a time.

    Only what a lattice can reach is read; the gradient elsewhere is 0, also
    where padding holds NaN.

    Arguments
    ---------
    logits : torch.Tensor
        [B, T, U + 1, V], raw scores; left as they are.
    following : torch.Tensor
        [B, U + 1], as `next_labels` returns it.
    blank_index : int
        The blank.
    normalization : str
        `"softmax"` or `"hat"`.
    usable : torch.Tensor
        [B, T, U + 1], bool, the nodes in use.

    Returns
    -------
    blank, label : torch.Tensor
        [B, T, U + 1]; 0 where nothing is in use.
    """
    return _DenseTransitions.apply(
        logits, following, blank_index, normalization, usable
    )


class _DenseTransitions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, following, blank_index, normalization, usable):
        shape, size = logits.shape[:3], logits.shape[-1]
        kind = accumulate_type(logits.dtype)
        blank, label, norm = (
            torch.zeros(shape, dtype=kind, device=logits.device)
            for _ in range(3)
        )
        for where in _pieces(usable, size, _PIECE):
            b, _, u = where
            # Indexing copies, so that what is overwritten is ours.
            blank[where], label[where], norm[where] = transitions(
                logits.detach()[where],
                following[b, u],
                blank_index,
                normalization,
            )
        ctx.save_for_backward(logits, following, norm, usable)
        ctx.how = blank_index, normalization
        return blank, label

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_blank, by_label):
        logits, following, norm, usable = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for where in _pieces(usable, logits.shape[-1], _PIECE):
            b, _, u = where
            grad[where] = scores_gradient_(
                logits[where],
                following[b, u],
                norm[where],
                by_blank[where],
                by_label[where],
                *ctx.how,
            )
        return grad, None, None, None, None


def _pieces(usable, size, elements):
    """Yield index triples of the marked nodes, some rows at a time."""
    rows = max(1, elements // size)
    nodes = usable.nonzero()
    for start in range(0, len(nodes), rows):
        yield nodes[start : start + rows].unbind(1)
