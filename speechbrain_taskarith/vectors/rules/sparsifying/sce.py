"""SCE: select where the vectors differ, weigh them, erase what disagrees."""

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.rules.base import Rule


class SCE(Rule):
    """Select, calculate, erase.

    Wan et al. 2024 (arXiv 2408.07990, FuseChat), tensor by
    tensor: of the entries that differ, the share `density` with the largest
    variance over the vectors is selected; each vector's weight is its mean
    square there; entries whose sign is not that of the sum are erased, and
    the rest is averaged with the weights. What no vector differs in is
    dropped. Reference: `reference.sce`.

    Arguments
    ---------
    density : float
        Share of the entries, in [0, 1]; 1 selects all, also equal ones.
    scale : float or dict
        See `Rule`.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.tensor([2.0, 1.0, 0.0])}
    >>> b = {"w": torch.tensor([-1.0, 1.0, 0.0])}
    >>> SCE(density=0.5).combine([a, b])["w"]
    tensor([0., 0., 0.])
    >>> SCE().combine([a, b])["w"]
    tensor([2., 1., 0.])
    """

    min_vectors = 2

    def __init__(self, density=1.0, scale=1.0):
        super().__init__(scale)
        self.density = checks.in_range("density", density, 0, 1)

    def bytes_per_element(self, number):
        """See `Rule.bytes_per_element`: in float64."""
        return 64 + 48 * number

    def merge_tensor(self, name, deltas, base=None):
        """See `Rule.merge_tensor`."""
        import torch

        taus = torch.stack(deltas).double().reshape(len(deltas), -1)
        if self.density < 1:
            # Less the first: exactly zero where all are equal.
            apart = taus - taus[0]
            variance = (apart - apart.mean(dim=0)).square().mean(dim=0)
            kept = int(variance.count_nonzero() * self.density)
            taus *= _largest(variance, kept)
        sign = torch.where(taus.sum(dim=0) >= 0, 1, -1)
        weights = taus.square().mean(dim=1, keepdim=True)
        weights = weights * (taus.sign() == sign)
        mass = weights.sum(dim=0)
        merged = (weights * taus).sum(dim=0) / mass.where(mass > 0, 1)
        return merged.reshape(deltas[0].shape)


def _largest(values, number):
    """Return the mask of the largest values; of equal ones the first."""
    if not number:
        return values < 0
    least = values.kthvalue(len(values) - number + 1).values
    mask = values > least
    equal = (values == least).nonzero()[: number - int(mask.sum())]
    mask[equal] = True
    return mask
