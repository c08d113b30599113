"""TIES: trim each vector, elect a sign for each entry, merge what agrees.

Most published rules are settings of these three steps. `Merge` is the general
form; TIES, Breadcrumbs and DELLA are settings of it.
"""

import copy

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.thresholds import find_cuts
from speechbrain_taskarith.vectors.engine.workspace import (
    magnitude_bits,
    weighted_sum,
)
from speechbrain_taskarith.vectors.rules.base import Rule, Stage, each_weight

_COMBINE = ("sum", "mean", "disjoint_mean")


class Magnitude(Stage):
    """Keep the largest magnitudes only, as `TIES` does (`scope`: `trim`)."""

    one_each = ("density",)

    def __init__(self, density, scope="global"):
        self.density = checks.shares("density", density)
        self.scope = checks.one_of("trim", scope, ("global", "tensor"))

    # Where each vector is cut, `{name: Cut}`; what is above the second cuts
    # does not survive either.
    cuts = outlier_cuts = None

    def prepare(self, stream):
        """Find where each vector is cut."""
        kept = checks.one_each("density", self.density, stream.source.number)
        if all(share == 1 for share in kept):
            return self
        ready = copy.copy(self)
        (ready.cuts,) = find_cuts(stream, [kept], self.scope)
        return ready

    def apply(self, index, tau, place, work, out):
        """Multiply by the mask of what survives."""
        if self.cuts is None:
            return tau
        bits = magnitude_bits(tau, work)
        mask = self.cuts[index][place.name].mask(bits, place, work)
        if self.outlier_cuts is not None:
            # The outliers are part of what is above the first cut.
            cut = self.outlier_cuts[index][place.name]
            top = cut.mask(bits, place, work, "top")
            work.xp.not_equal(mask, top, out=mask)
        return work.xp.multiply(tau, mask, out=out)


class Merge(Rule):
    """Drop, elect, combine: the rule that TIES and others are settings of.

    Arguments
    ---------
    sparsify : sequence of Stage
        What is done to each vector alone, in this order.
    elect : str
        Which sign an entry takes; entries of the other sign are left out.
        `"none"`: all take part; `"mass"`: the sign of the entries' sum;
        `"count"`: the sign that more of them have. Where that is undecided
        (a sum of zero), the sign that prevails among all decided entries of
        the whole vector.
    combination : str
        `"sum"`; `"mean"`: the sum divided by the number of vectors;
        `"disjoint_mean"`: divided by the number of entries that take part
        and are not zero.
    scale : float or dict
        See `Rule`.
    weights : sequence of float or None
        A factor for each vector, after it was made sparse and before the
        election. Both means are then weighted ones: divided by the weights
        of what takes part (where these cancel, not divided), as mergekit
        does. None: all 1.

    Example
    -------
    >>> import torch
    >>> vectors = [{"w": torch.tensor(v)} for v in ([2.0, 1.0], [4.0, -3.0])]
    >>> Merge(elect="mass", combination="disjoint_mean").combine(vectors)["w"]
    tensor([ 3., -3.])
    """

    one_each = ("weights",)
    whole_tensors = False

    def __init__(
        self,
        sparsify=(),
        elect="none",
        combination="sum",
        scale=1.0,
        weights=None,
    ):
        super().__init__(scale)
        self.weights = checks.weights(weights)
        self.stages = self.sparsify = tuple(sparsify)
        self.elect = checks.one_of("elect", elect, ("none", "mass", "count"))
        self.combination = checks.one_of("combination", combination, _COMBINE)

    def prepare(self, stream):
        """See `Rule.prepare`: the weights."""
        return each_weight(self, stream.source.number)

    def merge(self, vectors, place, work, weights):
        """See `Rule.merge`."""
        if weights == [1]:
            # Its entries agree with themselves, and their mean is theirs.
            return next(vectors)
        if self.elect == "none" and self.combination != "disjoint_mean":
            total = weighted_sum(vectors, weights, place, work)
            if self.combination == "mean":
                work.xp.divide(total, float(sum(weights) or 1), out=total)
            return total
        signs = _Signs(vectors, place, work, weights)
        if self.elect != "none":
            signs.elect(self.elect)
        return signs.combine(self.combination, sum(weights) or 1)


class _Signs:
    """Sum and number of a chunk's positive and of its negative entries."""

    def __init__(self, vectors, place, work, weights):
        xp, size = work.xp, place.size
        self.work, self.size = work, size
        # Counts of up to 255 vectors fit in a byte.
        kind = "uint8" if len(weights) < 256 else "int32"
        self.plus = work.zeros("plus", size)
        self.minus = work.zeros("minus", size)
        self.pluses = work.zeros("pluses", size, kind)
        self.minuses = work.zeros("minuses", size, kind)
        # Of unequal weights not only the number counts.
        self.weighted = any(weight != 1 for weight in weights)
        if self.weighted:
            self.up_mass = work.zeros("up mass", size)
            self.down_mass = work.zeros("down mass", size)
        part = work.array("part", size)
        sign = work.array("sign", size, "bool")
        for tau, weight in zip(vectors, weights):
            if weight != 1:
                product = work.array("weighted", size)
                tau = xp.multiply(tau, float(weight), out=product)
            # `tau * (tau > 0)` is faster than a maximum, and what is left
            # of `tau` without it is the negative part, exactly.
            xp.greater(tau, 0, out=sign)
            xp.add(self.pluses, sign.view(xp.uint8), out=self.pluses)
            self._weigh("up_mass", sign, weight, part)
            xp.multiply(tau, sign, out=part)
            xp.add(self.plus, part, out=self.plus)
            xp.subtract(tau, part, out=part)
            xp.add(self.minus, part, out=self.minus)
            xp.less(tau, 0, out=sign)
            xp.add(self.minuses, sign.view(xp.uint8), out=self.minuses)
            self._weigh("down_mass", sign, weight, part)

    def _weigh(self, side, sign, weight, part):
        if self.weighted:
            mass, xp = getattr(self, side), self.work.xp
            xp.multiply(sign, float(weight), out=part)
            xp.add(mass, part, out=mass)

    def elect(self, how):
        """Leave out the entries of the sign that loses."""
        work, xp = self.work, self.work.xp
        if how == "mass":
            balance = work.array("balance", self.size)
            xp.add(self.plus, self.minus, out=balance)
            left, right = balance, 0
        else:
            left, right = self.pluses, self.minuses
        up = work.array("up", self.size, "bool")
        down = work.array("down", self.size, "bool")
        xp.greater(left, right, out=up)
        xp.less(left, right, out=down)
        ups, downs = int(xp.count_nonzero(up)), int(xp.count_nonzero(down))
        work.tally = ups - downs
        if ups + downs < self.size:
            self._elect_undecided(up, down)
        xp.multiply(self.plus, up, out=self.plus)
        xp.multiply(self.minus, down, out=self.minus)
        xp.multiply(self.pluses, up.view(xp.uint8), out=self.pluses)
        xp.multiply(self.minuses, down.view(xp.uint8), out=self.minuses)
        if self.weighted:
            xp.multiply(self.up_mass, up, out=self.up_mass)
            xp.multiply(self.down_mass, down, out=self.down_mass)

    def _elect_undecided(self, up, down):
        """Give entries that cancel exactly the whole vector's majority sign.

        It is known only after all chunks: the engine comes back then.
        """
        work, xp = self.work, self.work.xp
        undecided = work.array("some", self.size, "bool")
        xp.logical_or(up, down, out=undecided)
        # Entries that are zero in all vectors need no sign.
        undecided = ~undecided & (self.pluses > 0)
        if not undecided.any():
            return
        if work.majority is None:
            work.unresolved = True
        elif work.majority > 0:
            xp.logical_or(up, undecided, out=up)
        elif work.majority < 0:
            xp.logical_or(down, undecided, out=down)

    def combine(self, how, number):
        """Return sum or mean of the entries that take part."""
        xp, counts = self.work.xp, self.pluses
        total = xp.add(self.plus, self.minus, out=self.plus)
        if how == "sum":
            return total
        if how == "mean":
            return xp.divide(total, float(number), out=total)
        floats = self.work.array("part", self.size)
        if self.weighted:
            xp.add(self.up_mass, self.down_mass, out=floats)
            floats[floats == 0] = 1
            return xp.divide(total, floats, out=total)
        # Divide by how many take part, at least 1.
        xp.add(counts, self.minuses, out=counts)
        none = self.work.array("sign", self.size, "bool")
        xp.less(counts, 1, out=none)
        xp.add(counts, none.view(xp.uint8), out=counts)
        floats[:] = counts
        return xp.divide(total, floats, out=total)


class TIES(Merge):
    """Trim, elect sign, disjoint merge.

    Yadav et al. 2023 (arXiv 2306.01708, algorithm 1): keep of each vector
    the largest magnitudes, elect for each entry the sign of larger total
    magnitude, take the mean over the entries that have this sign. With one
    vector this is magnitude trimming. Reference: `reference.ties`.

    Arguments
    ---------
    density : float or sequence of float
        Share of the entries that is kept, in [0, 1]: exactly
        `round(density * numel)`; of equal magnitudes the first. A list: one
        for each vector. (The sequential editing paper, arXiv 2406.17935,
        uses 0.5.)
    scale : float or dict
        See `Rule`.
    trim : str
        `"global"`: of the whole vector, as in the paper; `"tensor"`: of
        each tensor, as some tools do.
    elect : str
        `"mass"`: sign of the sum; `"count"`: the sign that more have. An
        undecided entry takes the sign that prevails in the whole vector.
    weights : sequence of float or None
        See `Merge`.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.tensor([0.1, -3.0, 2.0, 0.0])}
    >>> TIES(density=0.5).combine([tau])["w"]
    tensor([ 0., -3.,  2.,  0.])
    """

    def __init__(
        self,
        density=0.2,
        scale=1.0,
        trim="global",
        elect="mass",
        weights=None,
    ):
        checks.one_of("elect", elect, ("mass", "count"))
        stages = [Magnitude(density, trim)]
        super().__init__(stages, elect, "disjoint_mean", scale, weights)
        self.density, self.trim = stages[0].density, trim
