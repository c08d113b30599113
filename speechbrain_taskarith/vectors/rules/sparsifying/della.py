"""DELLA: DARE with drop rates by magnitude rank, then sign election."""

import math

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.workspace import (
    magnitude_bits,
    to_numpy,
)
from speechbrain_taskarith.vectors.rules.sparsifying.dare import Random
from speechbrain_taskarith.vectors.rules.sparsifying.ties import Merge


class DropByRank(Random):
    """What `DELLA` does to each vector (MagPrune), by DARE's random numbers."""

    def __init__(self, drop, epsilon, seed=0):
        super().__init__(drop, seed)
        drops = self.drop if isinstance(self.drop, list) else [self.drop]
        widest = 2 * min([1, *(min(p, 1 - p) for p in drops)])
        self.epsilon = checks.in_range("epsilon", epsilon, 0, widest)

    def granularity(self, shape):
        """See `Stage.granularity`: a row."""
        return math.prod(shape[1:] if len(shape) > 1 else shape)

    def apply(self, index, tau, place, work, out):
        """Multiply by `1 / (1 - p)` or 0."""
        drop = self.drops[index]
        if drop == 0:
            return tau
        row = self.granularity(place.shape)
        numbers = self.random_numbers(index, place)
        bits = to_numpy(magnitude_bits(tau, work)).reshape(-1, row)
        # One integer that sorts by magnitude and then by position.
        order = np.subtract(0x7FFFFFFF, bits, dtype=np.int64) << 32
        order |= np.arange(row)
        order.sort(axis=1)
        order &= 0xFFFFFFFF
        least = drop - self.epsilon / 2
        by_rank = least + self.epsilon / row * np.arange(row)
        chance = np.empty(bits.shape)
        np.put_along_axis(chance, order, by_rank[None], axis=1)
        chance = chance.reshape(-1)
        factor = np.where(numbers >= chance * 2**32, 1 / (1 - chance), 0)
        factor = work.from_numpy(factor.astype(np.float32))
        return work.xp.multiply(tau, factor, out=out)


class DELLA(Merge):
    """Drop by rank, elect sign, fuse.

    Deep et al. 2024 (arXiv 2406.11617, section 3): entries are dropped at
    random, the smaller the likelier, and the others enlarged; then sign
    election and the mean over the elected. Of the `n` magnitudes of a row
    (the weights that lead to one output; a vector is one row), the one of
    rank `r` (0: the largest; equal ones by position) is dropped with
    probability `p = drop - epsilon / 2 + (epsilon / n) r`, and otherwise
    divided by `1 - p`. Reference: `reference.della`.

    Arguments
    ---------
    drop : float or sequence of float
        Mean probability of being dropped, in [0, 1). A list: one for each
        vector.
    epsilon : float
        From the least to the greatest probability; `drop - epsilon / 2` and
        `drop + epsilon / 2` must lie in [0, 1].
    scale : float or dict
        See `Rule`.
    seed : int
        Not negative.
    elect : str
        `"mass"` as in the paper, `"count"` or `"none"`. With an election
        the result is longer than the mean (see docs/rules.md).
    weights : sequence of float or None
        See `Merge`.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.ones(1000)}
    >>> kept = DELLA(drop=0.7).combine([tau])["w"].count_nonzero()
    >>> 200 < kept < 400
    tensor(True)
    """

    def __init__(
        self,
        drop=0.7,
        epsilon=0.2,
        scale=1.0,
        seed=0,
        elect="mass",
        weights=None,
    ):
        combine = "sum" if elect == "none" else "disjoint_mean"
        stage = DropByRank(drop, epsilon, seed)
        super().__init__([stage], elect, combine, scale, weights)
        self.drop, self.epsilon = stage.drop, stage.epsilon
        self.seed = stage.seed
