"""What the rules share that look at angles between vectors.

All of them are weighted sums of the vectors whose weights follow from lengths
and angles alone. So one table of dot products for each tensor is all that
must be known beforehand, and the tensors themselves only stream by.
"""

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.workspace import (
    RUN,
    weighted_sum,
)
from speechbrain_taskarith.vectors.rules.base import Rule

# Below this angle (radians) two directions are taken as one: sin(x)/x is 1.
SAME = 1e-7


class Angular(Rule):
    """A weighted sum with weights from the table of dot products.

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

    whole_tensors = False

    def __init__(self, scope="tensor", of="vectors", scale=1.0):
        super().__init__(scale)
        self.scope = checks.one_of("scope", scope, ("tensor", "global"))
        self.of = checks.one_of("of", of, ("vectors", "weights"))

    def bytes_per_element(self, number):
        """See `Rule.bytes_per_element`: all vectors at once, for angles."""
        return 96 + 12 * number

    def coefficients(self, table):
        """Return the `N` vectors' weights for dot products `[N, N]`."""
        raise NotImplementedError

    def prepare(self, stream):
        """See `Rule.prepare`: weights by tensor, the base's last."""
        number, weights = stream.source.number, {}
        tables = _dot_products(stream, self.of == "weights")
        if self.scope == "global":
            tables = dict.fromkeys(tables, sum(tables.values()))
        for name, table in tables.items():
            if self.of == "weights":
                # Of base + vector, from the products of both.
                sums = np.hstack([np.eye(number), np.ones((number, 1))])
                given = list(self.coefficients(sums @ table @ sums.T))
                # Less the base, to which the result is added.
                weights[name] = [*given, sum(given) - 1]
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
    if with_base and source.base is None:
        raise ValueError(
            "this rule looks at the models' weights: pass the base too, as in "
            "rule(base, vectors) or combine(vectors, base=base)"
        )

    def visit(place, work):
        rows = []
        for index, tau in enumerate(stream.vectors(place, work)):
            row = work.array(f"row{index}", place.size)
            row[:] = tau
            rows.append(row)
        if with_base:
            rows.append(source.base_chunk(place, work))
        return list(_dot_tables(rows, place, work))

    places = stream.places(lambda shape: RUN)
    found = stream.passes.run(visit, places, "angles")
    stream.finite = True
    size = source.number + with_base
    tables = {name: np.zeros((size, size)) for name in source.shapes}
    for place, parts in zip(places, found):
        for part in parts:
            tables[place.name] += part
    return tables


def _dot_tables(vectors, place, work):
    """Yield a float64 table of dot products for every run of a chunk."""
    xp, number = work.xp, len(vectors)
    for begin in range(0, place.size, RUN):
        end = min(begin + RUN, place.size)
        wide = work.array("wide", number * (end - begin), "float64")
        wide = wide.reshape(number, end - begin)
        for row, tau in zip(wide, vectors):
            row[:] = tau[begin:end]
        product = work.array("product", end - begin, "float64")
        table = np.zeros((number, number))
        for i in range(number):
            for j in range(i + 1):
                xp.multiply(wide[i], wide[j], out=product)
                table[i, j] = table[j, i] = float(product.sum())
        yield table


def lengths_and_cosines(table):
    """Split a table of dot products into lengths and cosines."""
    lengths = np.sqrt(np.diag(table))
    safe = np.where(lengths > 0, lengths, 1)
    cosines = np.clip(table / safe[:, None] / safe, -1, 1)
    return lengths, cosines
