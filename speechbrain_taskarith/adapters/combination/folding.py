"""Frozen combinations, multiplied out: three matrix products and no more.

With normalised input n and input x, over all adapters' hidden entries side
by side (Audio-AdapterFusion, its weights multiplied out)::

    h = act(D n + c)                              [N b]
    s = softmax(sum_b (A x + a) h + (E x + e))    [N], attention only
    o = U^T (s h) + S^T s                         [d]

with `A = U W_K^T W_Q`, `U <- U W_V^T` and so on. That is `6 d N b` floating
point operations a frame; `4 d N b` is the least, adapters without attention.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class FoldedAverage(NamedTuple):
    """One adapter of width N b, which a weighted sum of adapters is.

    Arguments
    ---------
    down : torch.Tensor
        [N b, d]
    shift : torch.Tensor
        [N b]
    up : torch.Tensor
        [d, N b], with the weights in it.
    bias : torch.Tensor
        [d]
    """

    down: torch.Tensor
    shift: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    def __call__(self, bank, x):
        """Return the weighted sum of the adapters' outputs.

        Arguments
        ---------
        bank : AdapterBank
            For its activation and LN.
        x : torch.Tensor
            [..., d]

        Returns
        -------
        torch.Tensor
            [..., d]
        """
        hidden = product(bank.normalise(x), self.down, self.shift)
        return product(bank.activation(hidden), self.up, self.bias)


class FoldedFusion(NamedTuple):
    """Attention over adapters with all fixed products taken.

    Arguments
    ---------
    down : torch.Tensor
        [N b, d]
    shift : torch.Tensor
        [N b]
    score : torch.Tensor
        [N b + N, d]: rows of `A` for hidden entries, then of `E`.
    score_bias : torch.Tensor
        [N b + N]: `a`, then `e`.
    up : torch.Tensor
        [d, N b]: `U^T`
    offset : torch.Tensor
        [N, d]: `S`
    running : bool
        Whether scores are averaged over the frames so far.
    """

    down: torch.Tensor
    shift: torch.Tensor
    score: torch.Tensor
    score_bias: torch.Tensor
    up: torch.Tensor
    offset: torch.Tensor
    running: bool = False

    def __call__(self, bank, x):
        """Return the attended sum of the adapters' outputs.

        Arguments
        ---------
        bank : AdapterBank
            For its activation and LN.
        x : torch.Tensor
            [..., d]

        Returns
        -------
        tuple of torch.Tensor
            [..., d], and the attention weights, [..., N].
        """
        number = self.offset.shape[0]
        hidden = product(bank.normalise(x), self.down, self.shift)
        hidden = bank.activation(hidden)
        scores = product(x, self.score, self.score_bias)
        # Without a graph, what is a temporary may be written over.
        free = not (hidden.requires_grad or scores.requires_grad)
        gate, plain = scores.split((hidden.shape[-1], number), dim=-1)
        gate = gate.mul_(hidden) if free else gate * hidden
        scores = sum_of_parts(gate, number) + plain
        if self.running:
            scores = running_mean(scores)
        weights = scores.softmax(-1)
        hidden = hidden.unflatten(-1, (number, -1))
        gain = weights.to(hidden.dtype).unsqueeze(-1)
        hidden = hidden.mul_(gain) if free else hidden * gain
        context = product(hidden.flatten(-2), self.up)
        offset = torch.matmul(weights.to(hidden.dtype), self.offset)
        return context + offset, weights


def product(x, weight, bias=None):
    """Return `x weight^T + bias`, as `F.linear`, by the faster library.

    On some CPUs (AMD's with AVX-512) oneDNN multiplies single precision 2.5
    times as fast as what torch takes by default; it has no gradient.

    Arguments
    ---------
    x : torch.Tensor
        [..., d]
    weight : torch.Tensor
        [e, d], plain or from `packed`.
    bias : torch.Tensor or None
        [e]

    Returns
    -------
    torch.Tensor
        [..., e]; the last bits may differ from `F.linear`.

    Example
    -------
    >>> x, weight = torch.randn(3, 4), torch.randn(2, 4)
    >>> torch.allclose(product(x, weight), x @ weight.T, atol=1e-5)
    True
    """
    if (
        _has_onednn(weight)
        and x.dtype == torch.float32
        and x.numel()
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or weight.requires_grad)
        )
        and not torch.is_autocast_enabled("cpu")
    ):
        return torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, "none", [], ""
        )
    if weight.is_mkldnn:
        weight = weight.to_dense()
    return F.linear(x, weight, bias)


def packed(folded):
    """Return folded weights in oneDNN's own order, where that is used.

    The order is otherwise made at every call, which for a chunk of some
    frames takes as long as the product.

    Arguments
    ---------
    folded : FoldedAverage or FoldedFusion
        Plain weights.

    Returns
    -------
    FoldedAverage or FoldedFusion
        The same numbers.

    Example
    -------
    >>> plain = FoldedAverage(*(torch.randn(2, 2) for _ in range(4)))
    >>> weight = packed(plain).down
    >>> weight = weight.to_dense() if weight.is_mkldnn else weight
    >>> torch.equal(weight, plain.down)
    True
    """
    weights = {
        name: torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        for name, weight in folded._asdict().items()
        if name in ("down", "score", "up") and _has_onednn(weight)
    }
    return folded._replace(**weights)


def _has_onednn(weight):
    """Tell whether oneDNN multiplies by this weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def sum_of_parts(values, number):
    """Sum the entries of each of N equal parts, in single precision or more.

    Arguments
    ---------
    values : torch.Tensor
        [..., N b]
    number : int
        N

    Returns
    -------
    torch.Tensor
        [..., N], at least float32: scores in half would lose the softmax.

    Example
    -------
    >>> sum_of_parts(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
    tensor([3., 7.])
    """
    exact = torch.promote_types(values.dtype, torch.float32)
    return values.unflatten(-1, (number, -1)).sum(-1, dtype=exact)


def running_mean(scores):
    """Average over the frames so far, itself included.

    Arguments
    ---------
    scores : torch.Tensor
        [..., T, N], float32 or more.

    Returns
    -------
    torch.Tensor
        [..., T, N]; no frame depends on a later one.

    Example
    -------
    >>> running_mean(torch.tensor([[2.0], [4.0], [9.0]])).flatten()
    tensor([2., 3., 5.])
    """
    frames = scores.shape[-2]
    count = torch.arange(
        1, frames + 1, dtype=scores.dtype, device=scores.device
    )
    return scores.cumsum(-2) / count.unsqueeze(-1)
