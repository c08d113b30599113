"""The Karcher mean: the vectors' mean direction on the sphere."""

import math

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.rules.base import each_weight
from speechbrain_taskarith.vectors.rules.geometric.angular import (
    SAME,
    Angular,
    lengths_and_cosines,
)


class Karcher(Angular):
    """The Riemannian mean of the vectors' directions.

    The point of the unit sphere from which the squared angles to the
    vectors' directions are smallest (Karcher 1977; Grove and Karcher 1973),
    found by averaging in the tangent space and going there, again and
    again; the length is the mean of the lengths. Zero vectors count for the
    length only. Reference: `reference.karcher`.

    Arguments
    ---------
    weights : sequence of float or None
        One for each vector, not negative; None: all equal.
    iterations : int
        At most so many steps.
    tolerance : float
        Steps (in radians) smaller than this end the search.
    scope, of, scale
        See `Angular`.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.tensor([3.0, 0.0])}
    >>> b = {"w": torch.tensor([0.0, 3.0])}
    >>> Karcher().combine([a, b])["w"]
    tensor([2.1213, 2.1213])
    """

    one_each = ("weights",)

    def __init__(
        self,
        weights=None,
        iterations=100,
        tolerance=1e-10,
        scope="tensor",
        of="vectors",
        scale=1.0,
    ):
        super().__init__(scope, of, scale)
        self.weights = checks.weights(weights)
        if any(weight < 0 for weight in self.weights or ()):
            raise ValueError(f"weights={weights}: expected none below zero")
        if self.weights and sum(self.weights) == 0:
            raise ValueError(f"weights={weights}: expected a sum above 0")
        self.iterations = checks.whole("iterations", iterations)
        self.tolerance = checks.in_range("tolerance", tolerance, 0, 1)

    def coefficients(self, table):
        """See `Angular.coefficients`."""
        shares = np.array(each_weight(self, len(table)))
        shares = shares / shares.sum()
        lengths, cosines = lengths_and_cosines(table)
        length = shares @ lengths
        shares = np.where(lengths > 0, shares, 0)
        if shares.sum() == 0:
            return np.zeros(len(table))
        shares = shares / shares.sum()
        mean = _karcher_mean(cosines, shares, self.iterations, self.tolerance)
        return length * mean / np.where(lengths > 0, lengths, 1)


def _karcher_mean(cosines, shares, iterations, tolerance):
    """Return the mean direction as coefficients of the unit vectors."""
    size = math.sqrt(max(shares @ cosines @ shares, 0))
    if size < SAME:
        # Directions that cancel: every start is as good, the mean is zero.
        return np.zeros(len(shares))
    mean = shares / size
    for _ in range(iterations):
        along = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(along)
        sines = np.sqrt(1 - along**2)
        # The logarithm: of each direction what is orthogonal to the mean,
        # made as long as the angle.
        safe = np.where(sines > 0, sines, 1)
        step = shares * np.where(sines > SAME, angles / safe, 1)
        step = step - (step @ along) * mean
        size = math.sqrt(max(step @ cosines @ step, 0))
        if size <= tolerance:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / math.sqrt(mean @ cosines @ mean)
    return mean
