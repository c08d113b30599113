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
    """One adapter of width N b, which a weighted sum of adapters is."""

    down: torch.Tensor  # [N b, d]
    shift: torch.Tensor  # [N b]
    up: torch.Tensor  # [d, N b], with the weights in it
    bias: torch.Tensor  # [d]


class FoldedFusion(NamedTuple):
    """Attention over adapters with all fixed products taken."""

    down: torch.Tensor  # [N b, d]: D
    shift: torch.Tensor  # [N b]: c
    score: torch.Tensor  # [N b + N, d]: rows of A, then of E
    score_bias: torch.Tensor  # [N b + N]: a, then e
    up: torch.Tensor  # [d, N b]: U^T
    offset: torch.Tensor  # [N, d]: S


def product(x, weight, bias=None):
    """Return `x weight^T + bias`, as `F.linear`, by the faster library.

    On some CPUs (AMD's with AVX-512) oneDNN multiplies single precision 2.5
    times as fast as what torch takes by default; it has no gradient. The
    last bits may differ from those of `F.linear`.
    """
    if (
        _has_onednn(weight)
        and x.dtype == torch.float32
        and x.numel()
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or weight.requires_grad)
        )
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
    """
    weights = {
        name: torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        for name, weight in folded._asdict().items()
        if name in ("down", "score", "up") and _has_onednn(weight)
    }
    return folded._replace(**weights)


def _has_onednn(weight):
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and takes_onednn()
    )


def takes_onednn():
    """Tell whether oneDNN's own product can be called: not in a graph."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
