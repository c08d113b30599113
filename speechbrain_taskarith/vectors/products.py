"""Inner products of task vectors, in float64."""

import math

import torch

from speechbrain_taskarith.vectors.sharing.stored_vector import StoredVector
from speechbrain_taskarith.vectors.states.readers import as_state
from speechbrain_taskarith.vectors.states.state import State


def ties_of(vector):
    """Return tied names, as `State.aliases`; of a lazy mapping none."""
    known = isinstance(vector, (dict, State, StoredVector)) and len(vector)
    return as_state(vector).aliases if known else {}


def counted(vectors, names):
    """Yield the names that count in products: of tied ones the first.

    Names that are tied in the first vector count apart where another vector
    holds two tensors.
    """
    ties, first = ties_of(vectors[0]), {}
    for name in names:
        twin = first.setdefault(ties.get(name, name), name)
        if twin == name or not all(
            torch.equal(vector[name], vector[twin]) for vector in vectors
        ):
            yield name


def inner(one, other, names):
    """Return the inner product of two vectors over some names."""

    def dot(first, second):
        second = second.to(first.device).reshape(-1).double()
        return torch.dot(first.reshape(-1).double(), second).item()

    return math.fsum(dot(one[name], other[name]) for name in names)
