"""Rules that change something about another rule: DARE and LiNeS."""

import re

from speechbrain_taskarith.utils.patterns import matches, require_match
from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.trimming import RandomDrop
from speechbrain_taskarith.vectors.rules.base import Rule
from speechbrain_taskarith.vectors.rules.description import scales_by_parameter
from speechbrain_taskarith.vectors.rules.elementwise import TaskArithmetic

# "layers.3.", "blocks.3.", "conv_layers.3.", GPT's "h.3."
LAYERS = r"(?:^|\.)(?:\w*layers?|\w*blocks?|h)\.(\d+)(?:\.|$)"


class Wrapper(Rule):
    """A rule that changes something about another rule."""

    inner = None

    @property
    def stages(self):
        """See `Rule`."""
        return self.inner.stages

    @property
    def fewest(self):
        """See `Rule`."""
        return self.inner.fewest

    @property
    def most(self):
        """See `Rule`."""
        return self.inner.most

    @property
    def whole_tensors(self):
        """See `Rule`."""
        return self.inner.whole_tensors

    @property
    def carries_nan(self):
        """See `Rule`."""
        return self.inner.carries_nan

    def bytes_per_element(self, number):
        """See `Rule.bytes_per_element`."""
        return self.inner.bytes_per_element(number)

    def granularity(self, shape):
        """See `Rule.granularity`."""
        return self.inner.granularity(shape)

    def prepare(self, stream):
        """See `Rule.prepare`."""
        return self.inner.prepare(stream)

    def merge(self, vectors, place, work, prepared):
        """See `Rule.merge`."""
        return self.inner.merge(vectors, place, work, prepared)


class DARE(Wrapper):
    """Drop entries at random and rescale, then another rule.

    Yu et al. 2023 (arXiv 2311.03099): each entry of each vector is dropped
    with probability `drop`, the others are divided by `1 - drop`. Which
    ones depends on the seed, the vector's number, the tensor's name and the
    entry's index, and on nothing else (see `sparsify.RandomDrop`).

    Arguments
    ---------
    drop : float
        Probability, in [0, 1).
    scale : float or dict
        See `Rule`. It is DARE's scale that counts; `then` keeps its own for
        itself, which must be 1.
    seed : int
        Not negative.
    then : Rule or None
        What to do with the vectors afterwards, e.g.
        `TIES(density=1)` for the combination known as DARE-TIES. None: task
        arithmetic.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.ones(100_000)}
    >>> merged = DARE(drop=0.9).combine([tau])["w"]
    >>> merged.unique(), bool(abs(merged.mean() - 1) < 0.05)
    (tensor([ 0., 10.]), True)
    """

    def __init__(self, drop, scale=1.0, seed=0, then=None):
        self.drop, self.seed = drop, seed
        self.scale = checks.scale(scale)
        self.then = then if then is not None else TaskArithmetic()
        if not isinstance(self.then, Rule):
            raise TypeError(f"then={then!r}: expected a rule")
        if scales_by_parameter(self.then):
            raise ValueError(
                f"then={self.then!r} scales by the parameter, which would be "
                "left out; put it outside: LiNeS(DARE(...), slope=...)"
            )
        if self.then.scale != 1:
            raise ValueError(
                f"then={self.then!r} has a scale of its own; give the scale "
                "to DARE"
            )
        self._drop = RandomDrop(drop, seed)

    @property
    def inner(self):
        """The rule after dropping."""
        return self.then

    @property
    def stages(self):
        """See `Rule`."""
        return (self._drop, *self.then.stages)


class LiNeS(Wrapper):
    """Layer-increasing scale: deep layers are edited more than early ones.

    Wang et al. 2024 (arXiv 2410.17146, equation 3): the scale in layer `l`
    of `L` is `alpha + slope * l / (L - 1)`, where `alpha` is the inner
    rule's scale. The layer of a parameter is the first number that follows
    a word for layers in its name (`encoder.layers.3.ffn.weight`: 3). Names
    that lead up to the number the same way form one stack, and each stack
    (an encoder's, a decoder's) goes from `alpha` to `alpha + slope` by
    itself. Other parameters (front-ends, embeddings) count as a first
    layer, or as a last one where `top` says so (heads).

    Arguments
    ---------
    inner_rule : Rule
        What merges the vectors; its scale, a number, is `alpha`.
    slope : float
        What the last layer gets more than the first.
    top : sequence of str
        Shell patterns of the parameters that count as a last layer.
    layers : str
        Regular expression of what leads up to a layer's number, the number
        being its one group.

    Example
    -------
    >>> rule = LiNeS(TaskArithmetic(scale=0.2), slope=0.6, top=["out.*"])
    >>> names = ["conv.w", "layers.0.w", "layers.1.w", "layers.2.w", "out.w"]
    >>> [round(s, 3) for s in rule.scales(names).values()]
    [0.2, 0.2, 0.5, 0.8, 0.8]
    """

    def __init__(self, inner_rule, slope, top=(), layers=LAYERS):
        if not isinstance(inner_rule, Rule):
            raise TypeError(f"inner_rule={inner_rule!r}: expected a rule")
        if scales_by_parameter(inner_rule):
            raise ValueError(
                f"inner_rule={inner_rule!r} scales by the parameter itself, "
                "which would be left out; use one LiNeS"
            )
        if isinstance(inner_rule.scale, dict):
            raise ValueError(
                "inner_rule: expected a scale that is one number; LiNeS "
                "itself makes it depend on the layer"
            )
        self.inner_rule = inner_rule
        self.slope = checks.finite("slope", slope)
        self.top = [top] if isinstance(top, str) else list(top)
        self.layers = layers
        self.scale = inner_rule.scale

    @property
    def inner(self):
        """The rule that merges."""
        return self.inner_rule

    def scales(self, names):
        """See `Rule.scales`."""
        names = list(names)
        depths = relative_depths(names, self.layers)
        for pattern in self.top:
            require_match(names, pattern)
        for name in names:
            if any(matches(name, pattern) for pattern in self.top):
                depths[name] = 1.0
        alpha = float(self.scale)
        return {n: alpha + self.slope * d for n, d in depths.items()}


def relative_depths(names, layers=LAYERS):
    """Find how deep each parameter lies in its stack, from its name.

    Arguments
    ---------
    names : sequence of str
        Parameter names.
    layers : str
        See `LiNeS`.

    Returns
    -------
    dict
        `{name: l / (L - 1)}`, from 0 to 1; 0 for parameters of no stack and
        of a stack of one layer.

    Raises
    ------
    ValueError
        No name has a layer.

    Example
    -------
    >>> relative_depths(["enc.layers.0.w", "enc.layers.1.w", "conv.w"])
    {'enc.layers.0.w': 0.0, 'enc.layers.1.w': 1.0, 'conv.w': 0.0}
    """
    found, highest = {}, {}
    for name in names:
        match = re.search(layers, name)
        if match:
            stack, layer = name[: match.start(1)], int(match.group(1))
            found[name] = stack, layer
            highest[stack] = max(highest.get(stack, 0), layer)
    if not found:
        raise ValueError(
            f"LiNeS: no parameter name has a layer in the sense of {layers!r}; "
            f"names look like: {', '.join(list(names)[:3])}. Pass layers="
        )
    return {
        name: found[name][1] / max(highest[found[name][0]], 1)
        if name in found
        else 0.0
        for name in names
    }
