"""`ln_init="match"`: a LayerNorm that starts as nearly none.

With `z = (o - mean(o)) / s` and `s = sqrt(var(o) + eps)` of each frame,
`LN(o) = g z + c`. For each channel, g and c are those of least squares of o
on z over the valid frames of the first batch in training.
"""

import contextvars
from typing import NamedTuple

import torch

# A channel whose z hardly varies tells nothing of g. It is pulled to the mean
# of s then, with which LN returns a frame of that spread as it is, and has a
# gradient gain of 1 on zeros.
_FLOOR = 1e-9


class Pass(NamedTuple):
    """What hooks know of the pass that they are in."""

    valid: torch.Tensor | None  # [B, T], False at padding; None: all count
    #: The module that calls the layers adds up the sums of several processes.
    is_deferred: bool


#: The `Pass` of a combination behind a layer, None for one that runs alone.
PASS = contextvars.ContextVar("pass of an encoder", default=None)


def is_distributed():
    """Tell whether several processes train together."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def frame_sums(o, eps, valid=None):
    """Return [6, d] of o [..., d]: the sums of 1, s, z, o, z z, z o."""
    o = o.detach().double()  # differences of large sums
    if valid is None:
        valid = o.new_ones(o.shape[:-1], dtype=torch.bool)
    one = valid.unsqueeze(-1)
    o = torch.where(one, o, 0.0)
    z = o - o.mean(-1, keepdim=True)
    s = (z.square().mean(-1, keepdim=True) + eps).sqrt()
    z = z / s
    parts = (one.expand_as(o), (one * s).expand_as(o), z, o, z * z, z * o)
    return torch.stack([part.flatten(0, -2).sum(0) for part in parts])


def least_squares(sums):
    """Return gain and bias [2, d] from `frame_sums`; NaN without frames."""
    s, z, o, zz, zo = sums[1:] / sums[0]
    gain = (zo - z * o + _FLOOR * s) / (zz - z * z + _FLOOR)
    return torch.stack((gain, o - gain * z))
