"""LiNeS: a scale that grows with depth, around any other rule."""

import re

from speechbrain_taskarith.utils.patterns import matches, require_match
from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.rules.wrapper import Wrapper

# "layers.3.", "blocks.3.", "conv_layers.3.", GPT's "h.3."
LAYERS = r"(?:^|\.)(?:\w*layers?|\w*blocks?|h)\.(\d+)(?:\.|$)"


class LiNeS(Wrapper):
    """Layer-increasing scale: deep layers are edited more than early ones.

    Wang et al. 2024 (arXiv 2410.17146, equation 3): the scale in layer `l`
    of `L` is `alpha + slope * l / (L - 1)`, where `alpha` is the inner
    rule's scale. The layer of a parameter is the first number that follows
    a word for layers in its name (`encoder.layers.3.ffn.weight`: 3). Names
    that lead up to the number the same way form one stack, and each stack
    (an encoder's, a decoder's) goes from `alpha` to `alpha + slope` by
    itself. Other parameters (front-ends, embeddings) count as a first
    layer, or as a last one where `top` says so (heads). Layers that are
    not edited do not count: of the first six of twelve the sixth is the last.
    Reference: `reference.lines`.

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
    >>> from speechbrain_taskarith.vectors import TaskArithmetic
    >>> rule = LiNeS(TaskArithmetic(scale=0.2), slope=0.6, top=["out.*"])
    >>> names = ["conv.w", "layers.0.w", "layers.1.w", "layers.2.w", "out.w"]
    >>> [round(s, 3) for s in rule.scales(names).values()]
    [0.2, 0.2, 0.5, 0.8, 0.8]
    """

    def __init__(self, inner_rule, slope, top=(), layers=LAYERS):
        self.inner = self.inner_rule = check_rule(inner_rule, "inner_rule")
        if inner_rule.scales_by_parameter():
            raise ValueError(
                f"inner_rule={inner_rule!r} scales by the parameter itself, "
                "which would be left out; use one LiNeS"
            )
        if isinstance(inner_rule.scale, dict):
            raise ValueError(
                "inner_rule: expected a scale that is one number; LiNeS "
                "itself makes it depend on the layer"
            )
        self.scale = inner_rule.scale
        self.slope = checks.finite("slope", slope)
        self.top = [top] if isinstance(top, str) else list(top)
        self.layers = layers

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
    """Return `{name: l / (L - 1)}`: how deep each parameter lies in its stack.

    0 for parameters of no stack and of a stack of one layer.

    Example
    -------
    >>> relative_depths(["enc.layers.0.w", "enc.layers.1.w", "conv.w"])
    {'enc.layers.0.w': 0.0, 'enc.layers.1.w': 1.0, 'conv.w': 0.0}
    """
    found = find_layers(names, layers)
    if not found:
        raise ValueError(
            f"LiNeS: no parameter name has a layer in the sense of {layers!r}; "
            f"names look like: {', '.join(list(names)[:3])}. Pass layers="
        )
    depths = dict.fromkeys(names, 0.0)
    for name, (layer, number) in found.items():
        depths[name] = layer / max(number - 1, 1)
    return depths


def find_layers(names, layers=LAYERS):
    """Return `{name: (layer, number of layers in its stack)}`, from 0.

    Without parameters of no stack.
    """
    found, highest = {}, {}
    for name in names:
        match = re.search(layers, name)
        if match:
            stack, layer = name[: match.start(1)], int(match[1])
            found[name] = stack, layer
            highest[stack] = max(highest.get(stack, 0), layer)
    return {n: (layer, highest[s] + 1) for n, (s, layer) in found.items()}
