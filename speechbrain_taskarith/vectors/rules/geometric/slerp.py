"""Interpolation along the arc between vectors: of two, and of N."""

import math

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.rules.geometric.angular import (
    SAME,
    Angular,
    lengths_and_cosines,
)
from speechbrain_taskarith.vectors.rules.geometric.karcher import Karcher


class SLERP(Angular):
    """Spherical linear interpolation between two vectors.

    From the first (`t = 0`) to the second (`t = 1`) along the arc between
    them (Shoemake 1985): `sin((1-t) w)/sin(w) a + sin(t w)/sin(w) b` with
    the angle `w` between them. Vectors of one direction, or of opposite
    ones, have no such arc: there, and where one is zero, it is linear
    interpolation. Reference: `reference.slerp`.

    Arguments
    ---------
    t : float
        In [0, 1].
    scope, of, scale
        See `Angular`.

    Example
    -------
    >>> import torch
    >>> a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    >>> SLERP(0.5).combine([a, b])["w"]
    tensor([0.7071, 0.7071])
    """

    min_vectors, max_vectors = 2, 2

    def __init__(self, t, scope="tensor", of="vectors", scale=1.0):
        super().__init__(scope, of, scale)
        self.t = checks.in_range("t", t, 0, 1)

    def coefficients(self, table):
        """See `Angular.coefficients`."""
        lengths, cosines = lengths_and_cosines(table)
        angle = math.acos(cosines[0, 1])
        sine = math.sin(angle)
        if min(lengths) == 0 or sine < SAME:
            return 1 - self.t, self.t
        return (
            math.sin((1 - self.t) * angle) / sine,
            math.sin(self.t * angle) / sine,
        )


class MultiSLERP(Karcher):
    """The N-model form of SLERP.

    One step of the Karcher mean: the directions are averaged in the tangent
    space at their normalised weighted sum, and the average is carried back
    to the sphere (barycentric interpolation, Buss and Fillmore 2001).
    Reference: `reference.multi_slerp`.

    Arguments
    ---------
    weights, scope, of, scale
        See `Karcher`.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.tensor([3.0, 0.0])}
    >>> b = {"w": torch.tensor([0.0, 3.0])}
    >>> MultiSLERP().combine([a, b])["w"]
    tensor([2.1213, 2.1213])
    """

    def __init__(self, weights=None, scope="tensor", of="vectors", scale=1.0):
        super().__init__(weights, 1, 0.0, scope, of, scale)
