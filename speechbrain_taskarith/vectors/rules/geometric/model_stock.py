"""Model Stock: how far to go from the base towards the mean."""

import math

import numpy as np

from speechbrain_taskarith.vectors.rules.geometric.angular import (
    Angular,
    lengths_and_cosines,
)


class ModelStock(Angular):
    """Model Stock: from the mean towards the base, by the angle.

    `theta = t mean + (1 - t) base` with `t = N cos / (1 + (N - 1) cos)`
    (Jang et al. 2024, arXiv 2403.19522, equation 3), tensor by tensor;
    `cos` is the cosine of the mean angle over the pairs of vectors. Where
    they do not agree (`cos <= 0`), `t` is 0: the base stays. Reference:
    `reference.model_stock`.

    Arguments
    ---------
    scope : str
        `"tensor"` or `"global"`.
    scale : float or dict
        See `Rule`.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.tensor([3.0, 0.0])}
    >>> b = {"w": torch.tensor([3.0, 3.0])}
    >>> ModelStock().combine([a, b])["w"]
    tensor([2.4853, 1.2426])
    """

    min_vectors = 2

    def __init__(self, scope="tensor", scale=1.0):
        super().__init__(scope, "vectors", scale)

    def coefficients(self, table):
        """See `Angular.coefficients`."""
        number = len(table)
        _, cosines = lengths_and_cosines(table)
        angles = np.arccos(cosines[np.triu_indices(number, 1)])
        cosine = max(math.cos(angles.mean()), 0)
        t = number * cosine / (1 + (number - 1) * cosine)
        return np.full(number, t / number)
