"""Model Breadcrumbs: neither the outliers nor the negligible entries."""

import copy

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.thresholds import find_cuts
from speechbrain_taskarith.vectors.rules.sparsifying.ties import (
    Magnitude,
    Merge,
)


class Band(Magnitude):
    """Keep the share `density` of magnitudes below the largest, `gamma`."""

    def __init__(self, density, gamma, scope="tensor"):
        super().__init__(density, scope)
        self.gamma = checks.in_range("gamma", gamma, 0, 1)
        kept = (
            self.density if isinstance(self.density, list) else [self.density]
        )
        if max(kept, default=0) + self.gamma > 1 + 1e-9:
            raise ValueError(
                f"density={density} and gamma={gamma}: expected a sum of at "
                "most 1, since the shares kept and cut off on top do not "
                "overlap"
            )

    def prepare(self, stream):
        """Find both cuts of each vector, in one pass."""
        ready = copy.copy(self)
        kept = checks.one_each("density", self.density, stream.source.number)
        # Guard against 0.9 + 0.1 becoming 1.0000000000000002.
        inside = [min(share + self.gamma, 1) for share in kept]
        shares = [inside, self.gamma]
        ready.cuts, ready.outlier_cuts = find_cuts(stream, shares, self.scope)
        return ready


class Breadcrumbs(Merge):
    """Model Breadcrumbs: drop the negligible entries and the outliers.

    Davari and Belilovsky 2023 (arXiv 2312.06795, equations 2 and 3): in
    each tensor, the share `gamma` of the largest magnitudes and all but
    `density` of the rest are masked; the vectors are added. Reference:
    `reference.breadcrumbs`.

    Arguments
    ---------
    density : float or sequence of float
        Share that is kept, in [0, 1] (the paper's best keeps about 0.14). A
        list: one for each vector.
    gamma : float
        Share cut off on top, in [0, 1]; the two add up to at most 1.
    scale : float or dict
        See `Rule`.
    trim : str
        `"tensor"` as in the paper, or `"global"`.
    elect : str
        `"none"` as in the paper; `"mass"` or `"count"` elect signs and take
        the disjoint mean, as TIES does.
    weights : sequence of float or None
        See `Merge`.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.tensor([9.0, 0.1, 2.0, 1.0])}
    >>> Breadcrumbs(density=0.5, gamma=0.25).combine([tau])["w"]
    tensor([0., 0., 2., 1.])
    """

    def __init__(
        self,
        density=0.14,
        gamma=0.01,
        scale=1.0,
        trim="tensor",
        elect="none",
        weights=None,
    ):
        combine = "sum" if elect == "none" else "disjoint_mean"
        stages = [Band(density, gamma, trim)]
        super().__init__(stages, elect, combine, scale, weights)
        self.density, self.gamma = stages[0].density, stages[0].gamma
        self.trim = trim
