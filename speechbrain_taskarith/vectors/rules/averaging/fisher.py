"""Averaging by Fisher information, which is read along with the vectors."""

import itertools

from speechbrain_taskarith.vectors.checks import all_finite
from speechbrain_taskarith.vectors.rules.base import Rule
from speechbrain_taskarith.vectors.states.readers import as_state


class Fisher(Rule):
    """Fisher-weighted averaging.

    `tau = sum_i F_i tau_i / sum_i F_i`, entry by entry, with the diagonal of
    each model's Fisher information (Matena and Raffel 2022, arXiv
    2111.09832, equation 4). Where all are zero, the plain mean. Reference:
    `reference.fisher`.

    Arguments
    ---------
    fishers : sequence of path or mapping
        One for each vector, in their order: `{name: tensor}`, not negative,
        with the shapes of the parameters.
    scale : float or dict
        See `Rule`.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.tensor([3.0, 0.0])}
    >>> b = {"w": torch.tensor([0.0, 3.0])}
    >>> fishers = [{"w": torch.tensor(f)} for f in ([1.0, 1.0], [3.0, 0.0])]
    >>> Fisher(fishers).combine([a, b])["w"]
    tensor([0.7500, 0.0000])
    """

    one_each = ("fishers",)
    whole_tensors = False

    def __init__(self, fishers, scale=1.0):
        super().__init__(scale)
        text = isinstance(fishers, (str, bytes))
        if text or not hasattr(fishers, "__iter__"):
            raise ValueError("fishers: expected a list, one for each vector")
        self.fishers = list(fishers)

    def prepare(self, stream):
        """See `Rule.prepare`: the weights, opened and checked."""
        shapes = stream.source.shapes
        states = [as_state(fisher) for fisher in self.fishers]
        for state, (name, shape) in itertools.product(states, shapes.items()):
            found = state.info(name).shape
            if found != shape:
                what = f"{name!r} has shape {found}, expected {shape}"
                raise ValueError(f"{state.label}: {what}")
        return states

    def merge(self, vectors, place, work, states):
        """See `Rule.merge`."""
        xp, size = work.xp, place.size
        total, mass = work.zeros("sum", size), work.zeros("mass", size)
        plain, part = work.zeros("plain", size), work.array("part", size)
        for state, tau in zip(states, vectors):
            fisher = work.read(state, place, "fisher")
            if not all_finite(fisher) or float(fisher.min()) < 0:
                raise ValueError(
                    f"{state.label}: {place.name!r} holds NaN, infinity or "
                    "negative numbers; Fisher information is the mean of "
                    "squared gradients"
                )
            xp.multiply(tau, fisher, out=part)
            xp.add(total, part, out=total)
            xp.add(mass, fisher, out=mass)
            xp.add(plain, tau, out=plain)
        none = mass == 0
        mass[none] = 1
        xp.divide(total, mass, out=total)
        total[none] = plain[none] / len(states)
        return total
