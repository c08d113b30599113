"""Transfer learning: an encoder's weights from another model's checkpoint.

Reading a checkpoint never executes anything in it.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.utils.patterns import as_tuple, matches, select
from speechbrain_taskarith.utils.patterns import rename as rename_all

#: Names of other packages' encoders in the place of ours, for `rename`.
RENAMED = {
    "torchaudio-emformer": {
        "emformer_layers.*.attention.emb_to_query.*": "layers.*.query.*",
        "emformer_layers.*.attention.emb_to_key_value.*": "layers.*.key_value.*",
        "emformer_layers.*.attention.out_proj.*": "layers.*.project.*",
        "emformer_layers.*.pos_ff.*": "layers.*.feed_forward.*",
        "emformer_layers.*.layer_norm_input.*": "layers.*.norm_in.*",
        "emformer_layers.*.layer_norm_output.*": "layers.*.norm_out.*",
    }
}


@dataclass(frozen=True)
class TransferReport:
    """Which weights were loaded, and which were not, by the encoder's names.

    Arguments
    ---------
    checkpoint : str
        Where the weights came from.
    loaded, missing : tuple of str
        Loaded; selected, but not in the checkpoint.
    unexpected : tuple of str
        Selected, in the checkpoint under the prefix, but not in the encoder.
    mismatched : tuple of str
        In both, with different shapes: `"name: (3, 4) there, (3, 5) here"`.
    left : tuple of str
        Not selected: they keep their values.

    Example
    -------
    >>> report = TransferReport("a.ckpt", ("w",), ("b",), (), (), ())
    >>> print(report)
    a.ckpt: 1 loaded, 1 missing, 0 unexpected, 0 of another shape, 0 left
    """

    checkpoint: str
    loaded: tuple
    missing: tuple
    unexpected: tuple
    mismatched: tuple
    left: tuple

    def __str__(self):
        return (
            f"{self.checkpoint}: {len(self.loaded)} loaded, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.mismatched)} of another shape, {len(self.left)} left"
        )


def transfer_encoder(
    checkpoint,
    encoder,
    *,
    prefix="",
    strict=True,
    layers=None,
    include=("*",),
    exclude=(),
    recoverable="model",
    rename=None,
) -> "TransferReport":
    """Load an encoder's weights from a checkpoint, and nothing else.

    Stage two of transfer learning: the encoder comes from a multilingual
    model; predictor, joint and vocabulary are new. With `layers`, only those
    layers are loaded; weights outside of layers stay as they are.

    Arguments
    ---------
    checkpoint : str or pathlib.Path or dict
        A `CKPT+...` folder of SpeechBrain, a save folder with several of them
        (the newest is read), a file of `torch.save` or `.safetensors`; or a
        state dict.
    encoder : torch.nn.Module
        The module to load into.
    prefix : str
        Prefix of the encoder's names in the checkpoint, e.g. `"0."` or
        `"encoder."`.
    strict : bool
        True raises an error where a selected weight is missing or has another
        shape, or where the checkpoint's encoder has selected weights that
        `encoder` has not. False loads what fits, and reports the rest.
    layers : iterable of int or None
        Numbers of the layers to load, e.g. those of a deeper model. Layers
        are the numbered modules of one class that have most of the weights:
        `encoder.layers.3`, not a front end's `conv_layers.3`. None loads
        everything, also outside of layers.
    include, exclude : str or sequence of str
        Anchored shell patterns on the encoder's own names.
    recoverable : str
        Recoverable to read from a SpeechBrain checkpoint folder.
    rename : dict or str or None
        `{pattern: replacement}` for names in the checkpoint, after the prefix;
        a `*` stands for what it matched. `"torchaudio-emformer"`: the weights
        of `torchaudio.models.Emformer`, made with `activation="gelu"`.

    Returns
    -------
    TransferReport
        Which weights were loaded, and which were not.

    Raises
    ------
    ValueError
        A fault when strict (nothing has been loaded then), a pattern or layer
        that matches nothing, a damaged file.
    FileNotFoundError
        No such checkpoint.

    Example
    -------
    >>> from speechbrain_taskarith.transducer import Emformer
    >>> there, here = (Emformer(8, 2, 16, 2, 4, 1, 8) for _ in range(2))
    >>> state = {f"encoder.{k}": v for k, v in there.state_dict().items()}
    >>> report = transfer_encoder(state, here, prefix="encoder.", layers=[0])
    >>> sorted({name.split(".")[1] for name in report.left})
    ['1']
    """
    state, source = _read_checkpoint(checkpoint, recoverable)
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    if rename is not None and found:
        found = _renamed(found, rename, source)
    if not found:
        raise ValueError(
            f"{source}: no name begins with {prefix!r}; there are "
            f"{some(state)}. Give the encoder's prefix"
        )
    names = encoder.state_dict()
    own = _tensors(names)
    selected = select(own, include, exclude)
    inside = _layers_of(encoder, own, layers)
    selected = [name for name in selected if inside(name)]
    include, exclude = as_tuple(include), as_tuple(exclude)
    only_there = (
        name
        for name in found
        if name not in own
        and inside(name)
        and any(matches(name, pattern) for pattern in include)
        and not any(matches(name, pattern) for pattern in exclude)
    )
    both = {name: found[name] for name in selected if name in found}
    loaded = {k: v for k, v in both.items() if v.shape == own[k].shape}
    report = TransferReport(
        source,
        tuple(loaded),
        missing=tuple(name for name in selected if name not in found),
        unexpected=tuple(only_there),
        mismatched=tuple(
            f"{k}: {tuple(v.shape)} there, {tuple(own[k].shape)} here"
            for k, v in both.items()
            if k not in loaded
        ),
        left=tuple(name for name in names if name not in set(selected)),
    )
    if strict:
        _raise_faults(report, prefix)
    encoder.load_state_dict(loaded, strict=False)
    return report


def _renamed(found, rename, source):
    """Return the checkpoint's weights under the encoder's names."""
    if isinstance(rename, str):
        if rename not in RENAMED:
            raise ValueError(
                f"rename={rename!r}: expected a dict, or one of "
                f"{', '.join(map(repr, RENAMED))}"
            )
        rename = RENAMED[rename]
    new = rename_all(found, rename, label=source)
    return {new[name]: tensor for name, tensor in found.items()}


def _layers_of(encoder, names, layers):
    """Return what tells whether a name is of these layers."""
    if layers is None:
        return lambda name: True
    layers, stack = set(layers), _stack(encoder)

    def number(name):
        if stack is None or not name.startswith(stack):
            return None
        match = re.match(r"\[?(\d+)\]?\.", name[len(stack) :])
        return match and int(match[1])

    there = {number(name) for name in names} - {None}
    if absent := layers - there:
        raise ValueError(
            f"layers {sorted(absent)}: the encoder has "
            f"{sorted(there) or 'none'}"
        )
    return lambda name: number(name) in layers


def _stack(encoder):
    """Return the prefix of the layers' numbers, or None.

    Of the modules whose numbered children are of one class, that with the
    most weights in them: not a front end's stack, nor one inside a layer.
    """
    sizes = {}
    for name, module in encoder.named_modules():
        children = defaultdict(int)
        for key, child in module.named_children():
            size = sum(weight.numel() for weight in child.parameters())
            if size and re.fullmatch(r"\[?\d+\]?", key):
                children[type(child)] += size
        if len(children) == 1:
            sizes[f"{name}." if name else ""] = sum(children.values())
    return max(sizes, key=sizes.get, default=None)


def _raise_faults(report, prefix):
    faults = [
        f"{what}: {some(names)}"
        for what, names in (
            ("missing there", report.missing),
            ("only there", report.unexpected),
            ("another shape", report.mismatched),
        )
        if names
    ]
    if faults:
        raise ValueError(
            f"{report.checkpoint} (prefix {prefix!r}) does not fit the "
            f"encoder; {'; '.join(faults)}. Nothing was loaded. Choose names "
            "by include, exclude or layers, or load what fits: strict=False"
        )


def _read_checkpoint(source, recoverable):
    """Return a state dict on the CPU, and its name for messages."""
    if isinstance(source, Mapping):
        return _tensors(source), "the given state dict"
    path = _checkpoint_file(Path(source), recoverable)
    read = _safetensors if path.suffix == ".safetensors" else _pickled
    return read(path), str(path)


def _tensors(state):
    """Leave out what is none: extra states of modules."""
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def _checkpoint_file(path, recoverable):
    """Find the file with the weights; in a save folder the newest counts."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; give a file, a CKPT+... folder or a "
            "save folder"
        )
    for folder in (path, *_newest_first(path)):
        for suffix in (".ckpt", ".safetensors"):
            file = folder / f"{recoverable}{suffix}"
            if file.is_file():
                return file
    raise FileNotFoundError(
        f"{path}: holds no {recoverable}.ckpt, itself or in a CKPT+... folder; "
        "name another recoverable, or the file itself"
    )


def _newest_first(folder):
    """List the complete CKPT+... folders of a save folder.

    SpeechBrain writes a folder's `CKPT.yaml` last; the time in it counts.
    """

    def saved(meta):
        text = meta.read_text(encoding="utf-8")
        found = re.search(r"^\s*unixtime\s*:\s*([\d.]+)\s*$", text, re.M)
        return float(found[1]) if found else meta.stat().st_mtime, meta

    metas = folder.glob("CKPT+*/CKPT.yaml")
    return [meta.parent for meta in sorted(metas, key=saved, reverse=True)]


def _safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}); fetch it again"
        ) from error


def _pickled(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises what it trips over
        raise ValueError(
            f"{path}: not readable as tensors alone (truncated, no checkpoint, "
            "or it holds code, which is refused): "
            f"{str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    # Training frameworks save a state dict under one of these.
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = _tensors(state) if isinstance(state, Mapping) else {}
    if not tensors:
        raise ValueError(
            f"{path}: holds no state dict; give the file of the model's weights"
        )
    return tensors
