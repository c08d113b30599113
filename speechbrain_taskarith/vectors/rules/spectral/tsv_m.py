"""TSV-M: task singular vectors, and its boosted variant."""

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.rules.spectral.matrices import (
    Spectral,
    side_by_side,
)


class TSVM(Spectral):
    """Task singular vectors, merged without interference.

    Gargiulo et al. 2025 (arXiv 2412.00081, algorithm 1), for each weight
    matrix: `tau_i = U_i S_i V_i^T`, of which the first `rank / N` singular
    triples are kept; the `U_i` of all vectors side by side, and the `V_i`,
    are replaced by the orthonormal matrices nearest to them (from the SVD
    `U = P D Q^T` that is `P Q^T`), and the result is `U_w S V_w^T`.
    Directions that several vectors share count once: of identical vectors
    comes the kept part of one, of opposite ones nothing, and `D` that is
    zero up to rounding takes no part. Reference: `reference.tsv_m`.

    Arguments
    ---------
    scale : float or dict
        See `Rule`; the paper's is 1.
    share : float or None
        Share of each vector's singular triples that is kept, in (0, 1];
        None: `1 / N`, as in the paper.
    precision, weights
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

    def __init__(
        self, scale=1.0, share=None, precision="float32", weights=None
    ):
        super().__init__(scale, precision, weights)
        self.share = share
        if share is not None:
            self.share = checks.positive_share("share", share)

    def _boost(self, sizes, xp):
        """Return all singular values of one vector, changed or not."""
        return sizes

    def merge_matrices(self, matrices, xp):
        """See `Spectral.merge_matrices`."""
        full = min(matrices[0].shape)
        share = self.share if self.share is not None else 1 / len(matrices)
        kept = max(1, int(full * share + 1e-9))
        parts = []
        for matrix in matrices:
            left, values, right = matrix.svd()
            values = self._boost(values, xp)
            parts.append((left[:, :kept], values[:kept], right[:kept]))
        left, values, right = side_by_side(parts, xp)
        if not len(values):
            return matrices[0].values * 0
        return (left * values) @ right


class BoostedTSVM(TSVM):
    """TSV-M with the small singular values raised.

    Carvalho et al. 2026 (arXiv 2603.05354): before
    TSV-M concatenates, each vector's singular values below the one at which
    the cumulated ones reach the share `beta` of their sum are raised to that
    one, so that a few directions do not carry everything (rank collapse).
    Directions that are only rounding are not raised. The study also replaces
    the SVD `P Q^T` by five Newton-Schulz steps towards it; here it is exact.
    Reference: `reference.boosted_tsv_m`.

    Arguments
    ---------
    scale : float or dict
        See `Rule`.
    beta : float
        Share of the sum, in (0, 1]; the study's best is 0.3. 1 raises
        nothing.
    energy : str
        What is cumulated: `"sum"`, the singular values, as in the code of
        Subspace Boosting (arXiv 2506.16506), where the idea is from;
        `"squares"`, their squares.
    share, precision, weights
        See `TSVM`.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.diag(torch.tensor([5.0, 4.0, 1.0]))}
    >>> BoostedTSVM(beta=0.6).combine([tau])["w"].diag()
    tensor([5., 4., 4.])
    """

    def __init__(
        self,
        scale=1.0,
        beta=0.3,
        energy="sum",
        share=None,
        precision="float32",
        weights=None,
    ):
        super().__init__(scale, share, precision, weights)
        self.beta = checks.positive_share("beta", beta)
        self.energy = checks.one_of("energy", energy, ("sum", "squares"))

    def _boost(self, sizes, xp):
        if not len(sizes) or self.beta == 1:
            return sizes
        energy = sizes if self.energy == "sum" else sizes**2
        reached = xp.cumsum(energy, 0) >= self.beta * energy.sum()
        # The first that reaches the share.
        floor = sizes[min(int((~reached).sum()), len(sizes) - 1)]
        return xp.where(sizes < floor, floor, sizes)
