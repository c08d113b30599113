"""What the rules on whole matrices share.

A convolution's kernel is a matrix too, with its output channels as rows and
all else as columns. What is no matrix (biases, norms) is averaged.

Which singular values are more than rounding does not depend on the type that
is computed in, but on the types that the numbers came in. A weight `w` that
is stored with a relative step `eps` is off by about `0.21 eps w` (a uniform
error within the step, over the magnitudes between two powers of two), and so
is its difference from the base. The base is not off: training began with the
stored numbers. A matrix of independent errors has singular values up to about
`sigma (sqrt(rows) + sqrt(columns))`.
"""

import math

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.workspace import (
    EPS,
    to_numpy,
    weighted_sum,
)
from speechbrain_taskarith.vectors.rules.base import Rule, each_weight

_ERROR = 0.21
# How many times the expected rounding a singular value must be.
_SAFETY = 3.0
# Error of a decomposition in float32, as a share of the matrix's norm, for
# each root of its longer side.
_COMPUTED = 4 * EPS["F32"]
# Without the base, matrices of this side or more are looked at for numbers of
# fewer than 12 bits.
_LARGE, _SAMPLE = 32, 4096
# Directions whose singular value in `nearest_orthonormal` is a smaller share
# than this of the largest (the root of float32's step) lie in the others' span.
_SUPPORT = 3.5e-4


class Spectral(Rule):
    """A rule on whole matrices.

    Arguments
    ---------
    scale : float or dict
        See `Rule`.
    precision : str
        Of the decompositions: `"float32"`, or `"float64"`, which takes
        about twice as long.
    weights : sequence of float or None
        A factor for each vector, before anything else; None: all 1.
    """

    one_each = ("weights",)

    def __init__(self, scale=1.0, precision="float32", weights=None):
        super().__init__(scale)
        self.precision = checks.one_of(
            "precision", precision, ("float32", "float64")
        )
        self.weights = checks.weights(weights)

    def bytes_per_element(self, number):
        """See `Rule.bytes_per_element`: all matrices and their factors."""
        return 32 + (number + 8) * (4 if self.precision == "float32" else 8)

    def granularity(self, shape):
        """See `Rule.granularity`: whole tensors."""
        return math.prod(shape) if _is_matrix(shape) else 1

    def prepare(self, stream):
        """See `Rule.prepare`: the vectors' source and the weights."""
        return stream.source, each_weight(self, stream.source.number)

    def merge(self, vectors, place, work, prepared):
        """See `Rule.merge`."""
        xp, (source, weights) = work.xp, prepared
        if not _is_matrix(place.shape):
            shares = [weight / len(weights) for weight in weights]
            return weighted_sum(vectors, shares, place, work)
        dtype = getattr(xp, self.precision)
        rows = place.shape[0]
        # Of the weights that the vectors are differences of, if known.
        size, base = 0.0, source.base
        known = base is not None and place.name in base
        if known:
            size = float(xp.linalg.norm(source.base_chunk(place, work)))
        matrices = []
        for index, (tau, weight) in enumerate(zip(vectors, weights)):
            values = _as(tau, dtype, xp).reshape(rows, -1)
            if not known and min(values.shape) >= _LARGE and _coarse(tau):
                raise ValueError(
                    f"{type(self).__name__}: the vectors' {place.name!r} has "
                    "few significant bits, as differences of half-precision "
                    "weights have. Which of its singular values are more "
                    "than rounding depends on the base: give it, as in "
                    "combine(vectors, base=base) or rule(base, vectors)"
                )
            of_weight, of_vector = source.rounding(index, place.name)
            own = float(xp.linalg.norm(values))
            if not own:
                # What was not trained was not rounded either.
                of_weight = 0.0
            if known and _coarse_weights(source, index, place, work):
                stored = EPS[base.info(place.name).dtype]
                of_weight = max(of_weight, stored)
            error = math.hypot(of_weight * size, of_vector * own)
            error *= _ERROR / math.sqrt(place.size)
            sides = sum(map(math.sqrt, values.shape))
            computed = _COMPUTED * math.sqrt(max(values.shape)) * own
            least = abs(weight) * math.hypot(_SAFETY * error * sides, computed)
            matrices.append(Matrix(values * weight, least, xp))
        merged = self.merge_matrices(matrices, xp).reshape(-1)
        return _as(merged, xp.float32, xp)

    def merge_matrices(self, matrices, xp):
        """Merge `Matrix` objects of NumPy or torch (`xp`)."""
        raise NotImplementedError


class Matrix:
    """A matrix, and the `least` singular value that is not just rounding."""

    def __init__(self, values, least, xp):
        self.values, self.least, self.xp = values, least, xp

    shape = property(lambda self: self.values.shape)

    def __add__(self, other):
        least = math.hypot(self.least, other.least)
        return Matrix(self.values + other.values, least, self.xp)

    def svd(self, rank=None):
        """Return the thin decomposition down to the least singular value.

        Of at most `rank` singular values.
        """
        svd = self.xp.linalg.svd
        left, sizes, right = svd(self.values, full_matrices=False)
        found = int((sizes > self.least).sum())
        rank = found if rank is None else min(rank, found)
        return left[:, :rank], sizes[:rank], right[:rank]


def _coarse(tau):
    """Tell whether most numbers have fewer than 12 significant bits."""
    bits = to_numpy(tau[tau != 0][:_SAMPLE]).view(np.int32)
    mantissas = bits & 0x7FFFFF | 0x800000
    lowest = mantissas & -mantissas
    return len(bits) > 0 and np.median(lowest) > 1 << 12


def _coarse_weights(source, index, place, work):
    """Tell whether a half-precision base was tuned in half precision.

    A vector's type does not say so: differences are stored as float32.
    """
    if EPS[source.base.info(place.name).dtype] == EPS["F32"]:
        return False
    # Of the vector itself: stages before the rule may have scaled it.
    tau = source.vector(index, place, work)
    base, changed = source.base_chunk(place, work), tau != 0
    return _coarse(base[changed][:_SAMPLE] + tau[changed][:_SAMPLE])


def _is_matrix(shape):
    rows = shape[0] if shape else 1
    return len(shape) > 1 and rows > 1 and math.prod(shape) > rows


def _as(array, dtype, xp):
    """Return a copy in another type."""
    if hasattr(array, "astype"):
        return array.astype(dtype)
    return array.to(dtype, copy=True)


def nearest_orthonormal(matrix, xp):
    """Return `P_r Q_r^T` of the SVD `P D Q^T`: the nearest orthonormal matrix.

    Only the `r` directions that the columns (or rows) do span take part. In
    the others the nearest matrix is not unique, and rounding would choose.
    """
    left, sizes, right = xp.linalg.svd(matrix, full_matrices=False)
    rank = int((sizes > _SUPPORT * float(sizes[0])).sum())
    return left[:, :rank] @ right[:rank]


def side_by_side(parts, xp):
    """Join singular triples `(U, S, V^T)` of several matrices.

    `U` and `V^T` of all become orthonormal, unless there is no triple at all.
    """
    lefts, sizes, rights = zip(*parts)
    left, right = xp.concatenate(lefts, 1), xp.concatenate(rights, 0)
    values = xp.concatenate(sizes)
    if len(values):
        left = nearest_orthonormal(left, xp)
        right = nearest_orthonormal(right, xp)
    return left, values, right
