"""Putting adapters into an encoder by layer name.

The encoder's code does not change: forward hooks on its layers add the
adapters' output.
"""

import collections
import logging

import torch

from speechbrain_taskarith.adapters.bank import AdapterBank
from speechbrain_taskarith.adapters.handle import AdapterHandle
from speechbrain_taskarith.adapters.layer import CHILD
from speechbrain_taskarith.utils.patterns import (
    as_tuple,
    matches,
    require_match,
)

logger = logging.getLogger(__name__)

# Called `layers` as well, and no layers of an encoder: wav2vec2's front-end
# convolutions, SpeechBrain's input projections, decoders.
NOT_ENCODER_LAYERS = (
    "*conv_layers.*",
    "*custom_*_module.*",
    "decoder.*",
    "*.decoder.*",
)


def insert_adapters(
    encoder,
    names,
    *,
    layers="*layers.*",
    d_model=None,
    bottleneck=256,
    combination=None,
    exclude=NOT_ENCODER_LAYERS,
    activation=torch.nn.SiLU,
    layer_norm=True,
) -> "AdapterHandle":
    """Put a bank of adapters behind every layer of an encoder.

    The encoder is frozen, its running statistics too. It computes what it
    did before, bit for bit, until `handle.use(...)` or `handle.train_*`.
    If an error is raised, nothing has changed.

    Arguments
    ---------
    encoder : torch.nn.Module
        SpeechBrain's (Conformer, Branchformer, Transformer, a whole
        `TransformerASR`, a wrapped HuggingFace model), `transformers`'
        (Whisper, wav2vec2, wav2vec2-conformer, HuBERT), or any other whose
        layers return [B, T, d], or a tuple that starts with it. Wrappers
        that can run under `no_grad` need `freeze: False`.
    names : sequence of str
        The tasks, at least one.
    layers : str or sequence of str
        Anchored shell patterns on module names. Where matches are nested,
        only the outermost is a layer.
    d_model : int or None
        Width d of the layers' output; None reads it off the layers'
        normalisation.
    bottleneck : int
        Width of each adapter.
    combination : None, str, Combination or callable
        `"mean"`, `"weighted_mean"`, `"fusion"`; an instance, whose settings
        every layer takes; or a function that makes one from a bank (`!name:`
        in YAML).
    exclude : str or sequence of str
        Patterns of module names that are no layers.
    activation, layer_norm
        See `BottleneckAdapter`.

    Returns
    -------
    AdapterHandle
        To choose, train, save and remove the adapters.

    Raises
    ------
    ValueError
        A pattern without a match, a width other than the layers', bad names,
        an unknown combination, or an encoder that has adapters already.

    Example
    -------
    >>> encoder = torch.nn.TransformerEncoder(
    ...     torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ... )
    >>> adapters = insert_adapters(encoder, ["us", "german"], bottleneck=4)
    >>> adapters.layer_names
    ['layers.0', 'layers.1']
    >>> parameters = adapters.train_extraction("us")
    >>> sum(p.numel() for p in parameters)  # of 2 layers
    184
    >>> encoder(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """
    if any(child == CHILD for child, _ in encoder.named_children()):
        raise ValueError(
            "the encoder has adapters already: add to them with "
            "handle.add_adapter(name), or remove them with handle.remove()"
        )
    found = find_layers(encoder, layers, exclude)
    banks = []
    for name, layer in found:
        width = layer_width(name, layer, d_model)
        bank = AdapterBank(names, width, bottleneck, activation, layer_norm)
        like = next(
            (p for p in layer.parameters() if p.is_floating_point()), None
        )
        if like is not None:
            bank.to(like)
        banks.append(bank)
    handle = AdapterHandle(encoder, found, banks, combination)
    logger.info(
        "%d adapter(s) of width %d behind each of %d layers: %s",
        len(banks[0].names),
        bottleneck,
        len(found),
        ", ".join(name for name, _ in found),
    )
    return handle


def find_layers(encoder, layers, exclude=()):
    """Return `(name, module)` of the outermost modules whose names fit.

    Patterns in `exclude` need not match; one in `layers` that matches nothing
    is an error.
    """
    modules = {name: m for name, m in encoder.named_modules() if name}
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
    return [(name, modules[name]) for name in chosen]


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
                "to read its width off; give d_model"
            )
        return widths.most_common(1)[0][0]
    if widths and d_model not in widths:
        raise ValueError(
            f"d_model is {d_model}, but layer {name!r} has the width "
            f"{', '.join(map(str, sorted(widths)))}; leave d_model out, or "
            "choose other layers"
        )
    return d_model
