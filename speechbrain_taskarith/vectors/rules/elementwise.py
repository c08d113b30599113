"""The merging rules that work entry by entry.

Most published rules are three steps put together: what is dropped from each
vector (`sparsify`), which sign an entry takes (elect), and how the entries
become one (combine). `Merge` is that; TIES, Breadcrumbs and DELLA are names
for some of its settings.
"""

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.kernels import weighted_sum
from speechbrain_taskarith.vectors.engine.trimming import (
    Band,
    DropByRank,
    Magnitude,
)
from speechbrain_taskarith.vectors.rules.base import Rule, check_weights

ELECT = ("none", "mass", "count")
COMBINE = ("sum", "mean", "disjoint_mean")


class Merge(Rule):
    """Drop, elect, combine: the rule that most others are settings of.

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

    Example
    -------
    >>> import torch
    >>> vectors = [{"w": torch.tensor(v)} for v in ([2.0, 1.0], [4.0, -3.0])]
    >>> Merge(elect="mass", combination="disjoint_mean").combine(vectors)["w"]
    tensor([ 3., -3.])
    """

    def __init__(self, sparsify=(), elect="none", combination="sum", scale=1.0):
        self.sparsify = tuple(sparsify)
        self.elect = checks.one_of("elect", elect, ELECT)
        self.combination = checks.one_of("combination", combination, COMBINE)
        self.scale = checks.scale(scale)

    @property
    def stages(self):
        """See `Rule`."""
        return self.sparsify

    def prepare(self, stream):
        """See `Rule.prepare`: the number of vectors."""
        return stream.source.number

    def merge(self, vectors, place, work, number):
        """See `Rule.merge`."""
        if number == 1:
            # Sign and number of the entries that take part are its own.
            return next(vectors)
        if self.elect == "none" and self.combination != "disjoint_mean":
            total = weighted_sum(vectors, [1] * number, place, work)
            if self.combination == "mean":
                work.xp.divide(total, float(number), out=total)
            return total
        sides = _Sides(vectors, place, work, number)
        if self.elect == "none":
            return sides.mean_of_nonzero()
        up, down = sides.elect(self.elect)
        return sides.combine(up, down, self.combination, number)


class _Sides:
    """Of a chunk, sum and number of the entries of either sign."""

    def __init__(self, vectors, place, work, number):
        xp, size = work.xp, place.size
        self.work, self.size = work, size
        # Counts of up to 255 vectors fit in a byte.
        self.kind = "uint8" if number < 256 else "int32"
        self.plus, self.minus = (
            work.zeros("plus", size),
            work.zeros("minus", size),
        )
        self.pluses = work.zeros("pluses", size, self.kind)
        self.minuses = work.zeros("minuses", size, self.kind)
        part = work.array("part", size)
        sign = work.array("sign", size, "bool")
        for tau in vectors:
            # `tau * (tau > 0)` is faster than a maximum, and what is left
            # of `tau` without it is the negative part, exactly.
            xp.greater(tau, 0, out=sign)
            xp.add(self.pluses, sign.view(xp.uint8), out=self.pluses)
            xp.multiply(tau, sign, out=part)
            xp.add(self.plus, part, out=self.plus)
            xp.subtract(tau, part, out=part)
            xp.add(self.minus, part, out=self.minus)
            xp.less(tau, 0, out=sign)
            xp.add(self.minuses, sign.view(xp.uint8), out=self.minuses)

    def elect(self, how):
        """Return where the positive and where the negative sign wins."""
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
        ups, downs = xp.count_nonzero(up), xp.count_nonzero(down)
        work.tally = int(ups) - int(downs)
        if int(ups) + int(downs) < self.size:
            self._undecided(up, down)
        return up, down

    def _undecided(self, up, down):
        """Let entries that cancel exactly take the sign that prevails."""
        work, xp = self.work, self.work.xp
        some = work.array("some", self.size, "bool")
        xp.logical_or(up, down, out=some)
        # Entries that are zero in all vectors need no sign.
        some = ~some & (self.pluses > 0)
        if not some.any():
            return
        if work.majority is None:
            work.unresolved = True
        elif work.majority > 0:
            xp.logical_or(up, some, out=up)
        elif work.majority < 0:
            xp.logical_or(down, some, out=down)

    def combine(self, up, down, how, number):
        """Return the sum or mean over the side that won."""
        xp = self.work.xp
        xp.multiply(self.plus, up, out=self.plus)
        xp.multiply(self.minus, down, out=self.minus)
        total = xp.add(self.plus, self.minus, out=self.plus)
        if how == "mean":
            return xp.divide(total, float(number), out=total)
        if how == "sum":
            return total
        xp.multiply(self.pluses, up.view(xp.uint8), out=self.pluses)
        xp.multiply(self.minuses, down.view(xp.uint8), out=self.minuses)
        return self._over(total)

    def mean_of_nonzero(self):
        """Return the mean over the entries that are not zero."""
        total = self.work.xp.add(self.plus, self.minus, out=self.plus)
        return self._over(total)

    def _over(self, total):
        """Divide by the counts, at least 1."""
        xp, counts = self.work.xp, self.pluses
        xp.add(counts, self.minuses, out=counts)
        none = self.work.array("sign", self.size, "bool")
        xp.less(counts, 1, out=none)
        xp.add(counts, none.view(xp.uint8), out=counts)
        floats = self.work.array("part", self.size)
        floats[:] = counts
        return xp.divide(total, floats, out=total)


class TaskArithmetic(Merge):
    """Task arithmetic: the sum of the vectors.

    `theta = theta_base + scale * sum_i w_i tau_i` (Ilharco et al. 2023,
    arXiv 2212.04089, section 2). With one vector and a scale below 1 this
    is interpolation between base and fine-tuned model.

    Arguments
    ---------
    scale : float or dict
        See `Rule`.
    weights : sequence of float or None
        One for each vector; None: all 1.

    Example
    -------
    >>> import torch
    >>> rule = TaskArithmetic(scale=0.5)
    >>> base = {"w": torch.ones(2)}
    >>> rule(base, [{"w": torch.ones(2)}, {"w": torch.tensor([0.0, 2.0])}])
    {'w': tensor([1.5000, 2.5000])}
    """

    def __init__(self, scale=1.0, weights=None):
        super().__init__(scale=scale)
        self.weights = checks.weights(weights)

    carries_nan = True

    def prepare(self, stream):
        """See `Rule.prepare`: the weights."""
        return check_weights(self, self.weights, stream.source.number)

    def merge(self, vectors, place, work, weights):
        """See `Rule.merge`."""
        return weighted_sum(vectors, weights, place, work)


class LinearAverage(TaskArithmetic):
    """The weighted mean of the fine-tuned models (model soup).

    `theta = sum_i w_i theta_i / sum_i w_i`, which is the base plus the
    weighted mean of the vectors (Wortsman et al. 2022, arXiv 2203.05482).

    Arguments
    ---------
    weights : sequence of float or None
        One for each vector, of any sum but zero; None: all equal.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.tensor([3.0, 0.0])}
    >>> b = {"w": torch.tensor([0.0, 3.0])}
    >>> LinearAverage(weights=[1, 3]).combine([a, b])["w"]
    tensor([0.7500, 2.2500])
    """

    def __init__(self, weights=None):
        super().__init__(weights=weights)

    def prepare(self, stream):
        """See `Rule.prepare`: the weights, of sum 1."""
        weights = super().prepare(stream)
        total = sum(weights)
        if total == 0:
            raise ValueError(
                f"weights={self.weights}: expected a sum other than zero"
            )
        return [weight / total for weight in weights]


class TIES(Merge):
    """Trim, elect sign, disjoint merge.

    Yadav et al. 2023 (arXiv 2306.01708, algorithm 1): keep of each vector
    the largest magnitudes, elect for each entry the sign of larger total
    magnitude, take the mean over the entries that have this sign. With one
    vector this is magnitude trimming.

    Arguments
    ---------
    density : float
        Share of the entries that is kept, in [0, 1]: exactly
        `round(density * numel)`; of equal magnitudes the first. (The
        sequential editing paper, arXiv 2406.17935, uses 0.5.)
    scale : float or dict
        See `Rule`.
    trim : str
        `"global"`: of the whole vector, as in the paper; `"tensor"`: of
        each tensor, as some tools do.
    elect : str
        `"mass"`: sign of the sum; `"count"`: the sign that more have. An
        undecided entry takes the sign that prevails in the whole vector.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.tensor([0.1, -3.0, 2.0, 0.0])}
    >>> TIES(density=0.5).combine([tau])["w"]
    tensor([ 0., -3.,  2.,  0.])
    """

    def __init__(self, density=0.2, scale=1.0, trim="global", elect="mass"):
        super().__init__(
            [Magnitude(density, trim)],
            checks.one_of("elect", elect, ("mass", "count")),
            "disjoint_mean",
            scale,
        )
        self.density, self.trim = density, trim


class Breadcrumbs(Merge):
    """Model Breadcrumbs: drop the negligible entries and the outliers.

    Davari and Belilovsky 2023 (arXiv 2312.06795, equations 2 and 3): in
    each tensor, the share `gamma` of the largest magnitudes and all but
    `density` of the rest are masked; the vectors are added.

    Arguments
    ---------
    density : float
        Share that is kept, in [0, 1] (the paper's best keeps about 0.14).
    gamma : float
        Share cut off on top, in [0, 1]; the two add up to at most 1.
    scale : float or dict
        See `Rule`.
    trim : str
        `"tensor"` as in the paper, or `"global"`.
    elect : str
        `"none"` as in the paper; `"mass"` or `"count"` elect signs and take
        the disjoint mean, as TIES does.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.tensor([9.0, 0.1, 2.0, 1.0])}
    >>> Breadcrumbs(density=0.5, gamma=0.25).combine([tau])["w"]
    tensor([0., 0., 2., 1.])
    """

    def __init__(
        self, density=0.14, gamma=0.01, scale=1.0, trim="tensor", elect="none"
    ):
        combine = "sum" if elect == "none" else "disjoint_mean"
        stages = [Band(density, gamma, trim)]
        super().__init__(stages, elect, combine, scale)
        self.density, self.gamma, self.trim = density, gamma, trim


class DELLA(Merge):
    """Drop by rank, elect sign, fuse.

    Deep et al. 2024 (arXiv 2406.11617): entries are dropped at random, the
    smaller the likelier (see `sparsify.DropByRank`), the others enlarged;
    then sign election and the mean over the elected.

    Arguments
    ---------
    drop : float
        Mean probability of being dropped, in [0, 1).
    epsilon : float
        From the least to the greatest probability.
    scale : float or dict
        See `Rule`.
    seed : int
        Not negative.
    elect : str
        `"mass"` as in the paper, `"count"` or `"none"`.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.ones(1000)}
    >>> kept = DELLA(drop=0.7).combine([tau])["w"].count_nonzero()
    >>> 200 < kept < 400
    tensor(True)
    """

    def __init__(self, drop=0.7, epsilon=0.2, scale=1.0, seed=0, elect="mass"):
        combine = "sum" if elect == "none" else "disjoint_mean"
        stages = [DropByRank(drop, epsilon, seed)]
        super().__init__(stages, elect, combine, scale)
        self.drop, self.epsilon, self.seed = drop, epsilon, seed
