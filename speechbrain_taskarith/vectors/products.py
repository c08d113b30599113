"""Inner products of task vectors, in float64."""

import math

import torch

from speechbrain_taskarith.vectors.states.names import check_alike
from speechbrain_taskarith.vectors.states.readers import as_state


def counted(one, other):
    """Return the names that count in a product: of tied ones the first."""
    check_alike([one, other])
    ties = as_state(one).aliases if len(one) else {}
    # The other may hold two tensors.
    return [
        name
        for name in one
        if ties.get(name, name) == name
        or not torch.equal(other[name], other[ties[name]])
    ]


def inner(one, other, names):
    """Return the inner product of two vectors over some names."""

    def dot(first, second):
        second = second.to(first.device).reshape(-1).double()
        return torch.dot(first.reshape(-1).double(), second).item()

    return math.fsum(dot(one[name], other[name]) for name in names)
