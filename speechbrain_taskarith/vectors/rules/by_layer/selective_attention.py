"""Selective attention merging: queries, keys and values, layer by layer."""

from speechbrain_taskarith.utils.patterns import as_tuple, matches
from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.workspace import weighted_sum
from speechbrain_taskarith.vectors.rules.base import Rule
from speechbrain_taskarith.vectors.rules.by_layer.lines import (
    LAYERS,
    find_layers,
)

# Hugging Face and fairseq; SpeechBrain and torch, which keep all three in one
# parameter; SpeechBrain's wrapped attention.
ATTENTION = ("*q_proj*", "*k_proj*", "*v_proj*", "*in_proj_*")


class SelectiveAttention(Rule):
    """Selective attention (SA) merging of a target and a general model.

    Shankar et al. 2025 (arXiv 2501.08468), made for child
    speech. Two vectors: the first of the model for the target domain, with
    little data, the second of one for general speech. The queries, keys and
    values of layer `i` of `L` (from 1) are mixed, `l_i tau_1 + (1 - l_i)
    tau_2` with `l_i = mix^(alpha i / L)`: lower layers stay with the target
    domain, higher ones take more of the general model. All else is the
    target domain's. The exponent's form is that of the authors' later
    release; in the paper's own scripts it is chosen for groups of layers.
    Reference: `reference.selective_attention`.

    Arguments
    ---------
    mix : float
        In [0, 1]; 1: the first model. To be chosen on development data.
    alpha : float
        How much the last layer differs from the first, not negative; 0.2 in
        the authors' release.
    attention : sequence of str
        Shell patterns of the parameters that make queries, keys and values.
    layers : str
        Regular expression of what leads up to a layer's number, see `LiNeS`.
    scale : float or dict
        See `Rule`.

    Example
    -------
    >>> import torch
    >>> names = [f"layers.{i}.q_proj.weight" for i in range(2)] + ["out.w"]
    >>> child = {name: torch.tensor([1.0]) for name in names}
    >>> adult = {name: torch.tensor([0.0]) for name in names}
    >>> merged = SelectiveAttention(mix=0.25, alpha=1.0).combine([child, adult])
    >>> [round(merged[name].item(), 3) for name in names]
    [0.5, 0.25, 1.0]
    """

    min_vectors, max_vectors = 2, 2
    whole_tensors = False

    def __init__(
        self, mix, alpha=0.2, attention=ATTENTION, layers=LAYERS, scale=1.0
    ):
        super().__init__(scale)
        self.mix = checks.in_range("mix", mix, 0, 1)
        self.alpha = checks.in_range("alpha", alpha, 0, 1e6)
        self.attention = list(as_tuple(attention))
        self.layers = layers

    def prepare(self, stream):
        """See `Rule.prepare`: the first vector's share in each parameter."""
        names = list(stream.source.shapes)
        found = {
            name: depth
            for name, depth in find_layers(names, self.layers).items()
            if any(matches(name, pattern) for pattern in self.attention)
        }
        shares = dict.fromkeys(names, 1.0)
        for name, (layer, number) in found.items():
            shares[name] = self.mix ** (self.alpha * (layer + 1) / number)
        if not found and self.mix < 1:
            patterns = ", ".join(self.attention)
            raise ValueError(
                f"SelectiveAttention: no parameter of a layer matches "
                f"{patterns}; names look like: {', '.join(names[:3])}. Pass "
                "attention="
            )
        return shares

    def merge(self, vectors, place, work, shares):
        """See `Rule.merge`."""
        share = shares[place.name]
        return weighted_sum(vectors, [share, 1 - share], place, work)
