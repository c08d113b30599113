"""Iso-C: the summed vectors with a flat spectrum."""

from speechbrain_taskarith.vectors.rules.spectral.tsv_m import (
    Spectral,
    rank_of,
    svd,
)


class IsoC(Spectral):
    """Isotropic merging in the common subspace.

    Marczak et al. 2025 (arXiv 2502.04959, algorithm 1), for each weight
    matrix: the SVD of the sum of the vectors, every singular value replaced
    by their mean. Singular values that are zero up to rounding stay zero
    and do not count for the mean (a sum of low rank, as of LoRAs, has no
    directions there). Reference: `reference.iso_c`.

    Arguments
    ---------
    scale : float or dict
        See `Rule`.
    precision : str
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
        left, values, right = svd(total, xp)
        rank = rank_of(values, total.shape, xp)
        if not rank:
            return total
        return left[:, :rank] @ right[:rank] * values[:rank].mean()
