"""Which modules of an encoder are layers, and the banks that go behind them."""

import collections
import logging

import torch

from speechbrain_taskarith.adapters.bank import AdapterBank
from speechbrain_taskarith.adapters.layer import CHILD
from speechbrain_taskarith.utils.patterns import (
    as_tuple,
    matches,
    require_match,
)

logger = logging.getLogger(__name__)

#: Of most encoders. What has no LayerNorm with weights is left out.
USUAL_LAYERS = "*layers.*"

# Called `layers` as well, and no layers of an encoder: wav2vec2's front-end
# convolutions, what may follow it, SpeechBrain's input projections, decoders.
NOT_ENCODER_LAYERS = (
    "adapter.*",
    "*.adapter.*",
    "*conv_layers.*",
    "*custom_*_module.*",
    "decoder.*",
    "*.decoder.*",
)


def require_bare(encoder):
    """Raise where an encoder has adapters already."""
    if any(child == CHILD for child, _ in encoder.named_children()):
        raise ValueError(
            "the encoder has adapters already: add to them with "
            "handle.add_adapter(name), or remove them with handle.remove()"
        )


def make_banks(
    layers, names, bottleneck, activation, layer_norm, *, d_model=None
):
    """Return a bank for every one of `find_layers`, in its place and type."""
    banks = []
    for name, layer in layers:
        width = layer_width(name, layer, d_model)
        bank = AdapterBank(names, width, bottleneck, activation, layer_norm)
        like = next(
            (p for p in layer.parameters() if p.is_floating_point()), None
        )
        if like is not None:
            # Half precision, and less, does not train.
            double = like.dtype == torch.float64
            bank.to(like.device, like.dtype if double else torch.float32)
        banks.append(bank)
    return banks


def find_layers(encoder, layers, exclude=()):
    """Return `(name, module)` of the outermost modules whose names fit.

    Patterns in `exclude` need not match; one in `layers` that matches nothing
    is an error. Adapters of an encoder inside this one are no layers.
    """
    modules = {
        name: m
        for name, m in encoder.named_modules()
        if name and CHILD not in name.split(".")
    }
    exclude = as_tuple(exclude)
    names = [n for n in modules if not any(matches(n, p) for p in exclude)]
    patterns = as_tuple(layers)
    for pattern in patterns:
        require_match(names, pattern, "module")
    chosen = []
    # Parents come before their children.
    for name in names:
        inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if not inside and any(matches(name, p) for p in patterns):
            chosen.append(name)
    found = [(name, modules[name]) for name in chosen]
    if layers != USUAL_LAYERS:
        return found
    others = {n.rpartition(".")[0] for n, m in found if not _is_normed(m)}
    usual = [(n, m) for n, m in found if n.rpartition(".")[0] not in others]
    if usual and others:
        logger.info(
            "no adapters behind the members of %s, which have no LayerNorm "
            "with weights; name them by layers to adapt them, too",
            ", ".join(sorted(others)),
        )
    return usual or found


def _is_normed(layer):
    """Tell whether a layer has a LayerNorm with weights."""
    return any(
        isinstance(m, torch.nn.LayerNorm) and m.elementwise_affine
        for m in layer.modules()
    )


def layer_width(name, layer, d_model=None):
    """Return the width that most of a layer's normalisations have.

    `d_model` is the width where it is known: one of them has to have it.
    """
    widths = collections.Counter(
        module.normalized_shape[-1]
        for module in layer.modules()
        if isinstance(module, torch.nn.LayerNorm)
    )
    if d_model is None:
        if not widths:
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) has no LayerNorm "
                "to read its width off; give d_model, or choose other modules "
                "by layers"
            )
        return widths.most_common(1)[0][0]
    if widths and d_model not in widths:
        raise ValueError(
            f"d_model is {d_model}, but layer {name!r} has the width "
            f"{', '.join(map(str, sorted(widths)))}; leave d_model out, or "
            "choose other layers"
        )
    return d_model
