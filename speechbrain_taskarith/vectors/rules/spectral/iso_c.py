"""Iso-C and Iso-CTS: a flat spectrum, so that no direction dominates."""

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.rules.spectral.matrices import (
    Matrix,
    Spectral,
    side_by_side,
)


class IsoC(Spectral):
    """Isotropic merging in the common subspace.

    Marczak et al. 2025 (arXiv 2502.04959, algorithm 1), for each weight
    matrix: the SVD of the sum of the vectors, every singular value replaced
    by their mean. Singular values that are zero up to the rounding of the
    stored weights stay zero and do not count for the mean (a sum of low
    rank, as of LoRAs, has no directions there). Reference:
    `reference.iso_c`.

    Arguments
    ---------
    scale : float or dict
        See `Rule`.
    precision, weights
        See `Spectral`.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.diag(torch.tensor([4.0, 0.0]))}
    >>> b = {"w": torch.diag(torch.tensor([0.0, 2.0]))}
    >>> IsoC().combine([a, b])["w"]
    tensor([[3., 0.],
            [0., 3.]])
    """

    def merge_matrices(self, matrices, xp):
        """See `Spectral.merge_matrices`."""
        total = sum(matrices[1:], start=matrices[0])
        left, values, right = total.svd()
        if not len(values):
            return total.values * 0
        return left @ right * values.mean()


class IsoCTS(Spectral):
    """Isotropic merging in common and task-specific subspaces.

    Marczak et al. 2025 (arXiv 2502.04959), for
    each weight matrix: the top singular triples of the vectors' sum span the
    common subspace; of each vector, what lies outside of it gives equally
    many triples more, so that all together are as many as the matrix has.
    The left singular vectors, and the right ones, are made orthonormal, and
    all singular values are replaced by their mean. Reference:
    `reference.iso_cts`.

    Arguments
    ---------
    scale : float or dict
        See `Rule`.
    common : float
        Share of the triples that are common ones, in [0, 1] (rounded so
        that the tasks' are equally many); the paper's is 0.8. 1 is `IsoC`.
    precision, weights
        See `Spectral`.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.diag(torch.tensor([4.0, 1.0]))}
    >>> IsoCTS().combine([a, a])["w"]
    tensor([[5., 0.],
            [0., 5.]])
    """

    def __init__(
        self, scale=1.0, common=0.8, precision="float32", weights=None
    ):
        super().__init__(scale, precision, weights)
        self.common = checks.in_range("common", common, 0, 1)

    def merge_matrices(self, matrices, xp):
        """See `Spectral.merge_matrices`."""
        total = sum(matrices[1:], start=matrices[0])
        full, number = min(total.shape), len(matrices)
        rest = full - int(full * self.common + 1e-9)
        each = min(round(rest / number), full // number)
        parts = [total.svd(full - each * number)]
        common = parts[0][0]
        for matrix in matrices if each else ():
            inside = common @ (common.T @ matrix.values)
            outside = Matrix(matrix.values - inside, matrix.least, xp)
            parts.append(outside.svd(each))
        left, values, right = side_by_side(parts, xp)
        if not len(values):
            return total.values * 0
        return left @ right * values.mean()
