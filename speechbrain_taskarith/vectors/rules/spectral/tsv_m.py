"""TSV-M: task singular vectors; and what rules on whole matrices share.

A convolution's kernel is a matrix too, with its output channels as rows and
all else as columns. What is no matrix (biases, norms) is averaged.
"""

import math

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.workspace import weighted_sum
from speechbrain_taskarith.vectors.rules.base import Rule


class Spectral(Rule):
    """A rule on whole matrices.

    Arguments
    ---------
    scale : float or dict
        See `Rule`.
    precision : str
        Of the decompositions: `"float32"`, or `"float64"`, which takes
        about twice as long.
    """

    def __init__(self, scale=1.0, precision="float32"):
        super().__init__(scale)
        self.precision = checks.one_of(
            "precision", precision, ("float32", "float64")
        )

    def bytes_per_element(self, number):
        """See `Rule.bytes_per_element`: all matrices and their factors."""
        return 32 + (number + 8) * (4 if self.precision == "float32" else 8)

    def granularity(self, shape):
        """See `Rule.granularity`: whole tensors."""
        return math.prod(shape) if _is_matrix(shape) else 1

    def merge(self, vectors, place, work, source):
        """See `Rule.merge`."""
        xp, number = work.xp, source.number
        if not _is_matrix(place.shape):
            return weighted_sum(vectors, [1 / number] * number, place, work)
        dtype = getattr(xp, self.precision)
        rows = place.shape[0]
        matrices = [_as(tau, dtype, xp).reshape(rows, -1) for tau in vectors]
        merged = self.merge_matrices(matrices, xp).reshape(-1)
        return _as(merged, xp.float32, xp)

    def merge_matrices(self, matrices, xp):
        """Merge matrices `[rows, columns]`, of NumPy or torch (`xp`)."""
        raise NotImplementedError


def _is_matrix(shape):
    rows = shape[0] if shape else 1
    return len(shape) > 1 and rows > 1 and math.prod(shape) > rows


def _as(array, dtype, xp):
    """Return a copy in another type."""
    if hasattr(array, "astype"):
        return array.astype(dtype)
    return array.to(dtype, copy=True)


def svd(matrix, xp):
    """Return the thin singular value decomposition."""
    return xp.linalg.svd(matrix, full_matrices=False)


def rank_of(values, shape, xp):
    """Return how many singular values are not just rounding."""
    if not len(values) or not float(values[0]) > 0:
        return 0
    smallest = float(values[0]) * max(shape) * float(xp.finfo(values.dtype).eps)
    return int((values > smallest).sum())


class TSVM(Spectral):
    """Task singular vectors, merged without interference.

    Gargiulo et al. 2025 (arXiv 2412.00081, algorithm 1), for each weight
    matrix: `tau_i = U_i S_i V_i^T`, of which the first `rank / N` singular
    triples are kept; the `U_i` of all vectors side by side, and the `V_i`,
    are replaced by the orthonormal matrices nearest to them (from the SVD
    `U = P D Q^T` that is `P Q^T`), and the result is `U_w S V_w^T`.
    Reference: `reference.tsv_m`.

    Arguments
    ---------
    scale : float or dict
        See `Rule`; the paper's is 1.
    share : float or None
        Share of each vector's singular triples that is kept, in (0, 1];
        None: `1 / N`, as in the paper.
    precision : str
        See `Spectral`.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.diag(torch.tensor([4.0, 0.0]))}
    >>> b = {"w": torch.diag(torch.tensor([0.0, 2.0]))}
    >>> TSVM().combine([a, b])["w"]
    tensor([[4., 0.],
            [0., 2.]])
    """

    def __init__(self, scale=1.0, share=None, precision="float32"):
        super().__init__(scale, precision)
        if share is not None and not checks.in_range("share", share, 0, 1):
            raise ValueError("share=0: expected a number in (0, 1]")
        self.share = share

    def merge_matrices(self, matrices, xp):
        """See `Spectral.merge_matrices`."""
        full = min(matrices[0].shape)
        share = self.share if self.share is not None else 1 / len(matrices)
        kept = max(1, int(full * share + 1e-9))
        lefts, sizes, rights = [], [], []
        for matrix in matrices:
            left, values, right = svd(matrix, xp)
            # Directions without weight would only turn the others.
            rank = min(kept, rank_of(values, matrix.shape, xp))
            lefts.append(left[:, :rank])
            sizes.append(values[:rank])
            rights.append(right[:rank])
        values = xp.concatenate(sizes)
        if not len(values):
            return matrices[0] * 0
        left = _nearest_orthonormal(xp.concatenate(lefts, 1), xp)
        right = _nearest_orthonormal(xp.concatenate(rights, 0), xp)
        return (left * values) @ right


def _nearest_orthonormal(matrix, xp):
    """Return `P Q^T` of the SVD `P D Q^T`."""
    left, _, right = svd(matrix, xp)
    return left @ right
