"""The merging rules that look at angles between vectors.

All of them are weighted sums of the vectors whose weights follow from lengths
and angles alone, so that one table of dot products for each tensor is all
that must be known beforehand: the tensors themselves only stream by.
"""

import math

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.kernels import dot_table, weighted_sum
from speechbrain_taskarith.vectors.engine.workspace import RUN
from speechbrain_taskarith.vectors.rules.base import Rule, check_weights

SCOPES = ("tensor", "global")
OF = ("vectors", "weights")

# Below this angle (radians) two directions are taken as one: sin(x)/x is 1.
_SAME = 1e-7


class Angular(Rule):
    """A weighted sum with weights from the table of dot products.

    Subclasses give `coefficients(table)`.

    Arguments
    ---------
    scope : str
        `"tensor"`: angles between the vectors' tensors, one by one;
        `"global"`: between whole vectors.
    of : str
        `"vectors"`: the rule is applied to the task vectors; `"weights"`:
        to the models' weights, base plus vector, as merging tools do (then
        the base must be given).
    scale : float or dict
        See `Rule`.
    """

    def __init__(self, scope="tensor", of="vectors", scale=1.0):
        self.scope = checks.one_of("scope", scope, SCOPES)
        self.of = checks.one_of("of", of, OF)
        self.scale = checks.scale(scale)

    def bytes_per_element(self, number):
        """See `Rule.bytes_per_element`: all vectors at once, for angles."""
        return 96 + 12 * number

    def coefficients(self, table):
        """Return the weight of each vector.

        Arguments
        ---------
        table : numpy.ndarray
            float64 `[N, N]`, the dot products.

        Returns
        -------
        sequence of float
            `N` weights.
        """
        raise NotImplementedError

    def prepare(self, stream):
        """See `Rule.prepare`: weights by tensor, the base's last."""
        number, weights = stream.source.number, {}
        tables = _dot_products(stream, self.of == "weights")
        if self.scope == "global":
            total = sum(tables.values())
            tables = dict.fromkeys(tables, total)
        for name, table in tables.items():
            if self.of == "weights":
                # Of base + vector, from the products of both.
                sums = np.hstack([np.eye(number), np.ones((number, 1))])
                found = list(self.coefficients(sums @ table @ sums.T))
                # Less the base, to which the result is added.
                weights[name] = [*found, sum(found) - 1]
            else:
                weights[name] = list(self.coefficients(table))
        return stream, weights

    def merge(self, vectors, place, work, prepared):
        """See `Rule.merge`."""
        stream, weights = prepared
        weights = weights[place.name]
        total = weighted_sum(vectors, weights, place, work)
        if self.of == "weights" and weights[-1] != 0:
            base = stream.source.base_chunk(place, work)
            part = work.array("part", place.size)
            work.xp.multiply(base, float(weights[-1]), out=part)
            work.xp.add(total, part, out=total)
        return total


def _dot_products(stream, with_base):
    """Return `{name: table}` of all dot products, the base's last."""
    source = stream.source
    if with_base:
        source.require_base()

    def visit(place, work):
        rows = []
        for index, tau in enumerate(stream.vectors(place, work)):
            row = work.array(f"row{index}", place.size)
            row[:] = tau
            rows.append(row)
        if with_base:
            rows.append(source.base_chunk(place, work))
        return dot_table(rows, place, work, RUN)

    spots = stream.places(lambda shape: RUN)
    found = stream.passes.run(visit, spots, "angles")
    stream.finite = True
    size = source.number + with_base
    tables = {name: np.zeros((size, size)) for name in source.shapes}
    for place, parts in zip(spots, found):
        for part in parts:
            tables[place.name] += part
    return tables


def _lengths_and_cosines(table):
    """Split a table of dot products into lengths and cosines."""
    lengths = np.sqrt(np.diag(table))
    safe = np.where(lengths > 0, lengths, 1)
    cosines = np.clip(table / safe[:, None] / safe, -1, 1)
    return lengths, cosines


class SLERP(Angular):
    """Spherical linear interpolation between two vectors.

    From the first (`t = 0`) to the second (`t = 1`) along the arc between
    them (Shoemake 1985): `sin((1-t) w)/sin(w) a + sin(t w)/sin(w) b` with
    the angle `w` between them. Vectors of one direction, or of opposite
    ones, have no such arc: there, and where one is zero, it is linear
    interpolation.

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

    fewest, most = 2, 2

    def __init__(self, t, scope="tensor", of="vectors", scale=1.0):
        super().__init__(scope, of, scale)
        self.t = checks.in_range("t", t, 0, 1)

    def coefficients(self, table):
        """See `Angular.coefficients`."""
        lengths, cosines = _lengths_and_cosines(table)
        angle = math.acos(cosines[0, 1])
        sine = math.sin(angle)
        if min(lengths) == 0 or sine < _SAME:
            return 1 - self.t, self.t
        return (
            math.sin((1 - self.t) * angle) / sine,
            math.sin(self.t * angle) / sine,
        )


class Karcher(Angular):
    """The Riemannian mean of the vectors' directions.

    The point of the unit sphere from which the squared angles to the
    vectors' directions are smallest (Karcher 1977; Grove and Karcher 1973),
    found by averaging in the tangent space and going there, again and
    again; the length is the mean of the lengths. Zero vectors count for the
    length only.

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
        self.iterations = checks.whole("iterations", iterations)
        self.tolerance = checks.in_range("tolerance", tolerance, 0, 1)

    def coefficients(self, table):
        """See `Angular.coefficients`."""
        shares = np.array(check_weights(self, self.weights, len(table)))
        if shares.sum() <= 0:
            raise ValueError(f"weights={self.weights}: expected a sum above 0")
        shares = shares / shares.sum()
        lengths, cosines = _lengths_and_cosines(table)
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
    if size < _SAME:
        # Directions that cancel: every start is as good, the mean is zero.
        return np.zeros(len(shares))
    mean = shares / size
    for _ in range(iterations):
        along = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(along)
        sines = np.sqrt(1 - along**2)
        # The logarithm: of each direction what is orthogonal to the mean,
        # made as long as the angle.
        stretch = np.where(
            sines > _SAME, angles / np.where(sines > 0, sines, 1), 1
        )
        step = shares * stretch
        step = step - (step @ along) * mean
        size = math.sqrt(max(step @ cosines @ step, 0))
        if size <= tolerance:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / math.sqrt(mean @ cosines @ mean)
    return mean


class MultiSLERP(Karcher):
    """The N-model form of SLERP.

    One step of the Karcher mean: the directions are averaged in the tangent
    space at their normalised weighted sum, and the average is carried back
    to the sphere (barycentric interpolation, Buss and Fillmore 2001).

    Arguments
    ---------
    weights : sequence of float or None
        One for each vector, not negative; None: all equal.
    scope, of, scale
        See `Angular`.

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


class ModelStock(Angular):
    """Model Stock: from the mean towards the base, by the angle.

    `theta = t mean + (1 - t) base` with `t = N cos / (1 + (N - 1) cos)`
    (Jang et al. 2024, arXiv 2403.19522, equation 3), tensor by tensor;
    `cos` is the cosine of the mean angle over the pairs of vectors. Where
    they do not agree (`cos <= 0`), `t` is 0: the base stays.

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

    fewest = 2

    def __init__(self, scope="tensor", scale=1.0):
        super().__init__(scope, "vectors", scale)

    def coefficients(self, table):
        """See `Angular.coefficients`."""
        number = len(table)
        _, cosines = _lengths_and_cosines(table)
        angles = np.arccos(cosines[np.triu_indices(number, 1)])
        cosine = max(math.cos(angles.mean()), 0)
        t = number * cosine / (1 + (number - 1) * cosine)
        return np.full(number, t / number)
