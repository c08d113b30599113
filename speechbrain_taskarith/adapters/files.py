"""Adapters and combinations as files of their own.

safetensors with what they belong to beside the numbers: the base's
fingerprint, layers, widths, activation, a checksum. Everything is checked
before anything in the model is touched.
"""

import hashlib
import json
import logging
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from speechbrain_taskarith.adapters.bank import BottleneckAdapter
from speechbrain_taskarith.adapters.layer import KINDS, make_combination
from speechbrain_taskarith.utils.files import atomic_write

logger = logging.getLogger(__name__)

_KEY = "speechbrain_taskarith"
_VERSION = 1
# What a name that is None in a name map stands for.
_NEUTRAL = {
    "norm.weight": torch.ones_like,
    "norm.bias": torch.zeros_like,
    "down.bias": torch.zeros_like,
    "up.bias": torch.zeros_like,
}


def fingerprint(module, without=None):
    """Return the SHA-256 over a module's state, or a mapping of tensors.

    64 hexadecimal digits, the same on every device. Names that start with
    `without` do not count.

    Example
    -------
    >>> fingerprint({"w": torch.zeros(2)})[:8]
    '46e37e83'
    """
    state = module if isinstance(module, dict) else module.state_dict()
    root = hashlib.sha256()
    for name in sorted(state):
        if without is not None and name.startswith(without):
            continue
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor):
            continue
        shape = ",".join(map(str, tensor.shape))
        dtype = str(tensor.dtype).removeprefix("torch.")
        leaf = hashlib.sha256(f"{name}\0{dtype}\0{shape}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        leaf.update(flat.view(torch.uint8).numpy())
        root.update(leaf.digest())
    return root.hexdigest()


# ----------------------------------------------------------------- writing


def save_adapter(handle, name, path):
    """See `AdapterHandle.save_adapter`."""
    members = [layer.bank[name] for layer in handle.layers]
    bank = handle.layers[0].bank
    about = {
        "kind": "adapter",
        "name": name,
        "bottleneck": members[0].bottleneck,
        "activation": repr(bank.activation),
        "layer_norm": bank.layer_norm,
        "eps": bank.eps,
    }
    _write(handle, path, members, about)


def save_combination(handle, members, path):
    """See `AdapterHandle.save_combination`."""
    about = {
        "kind": "combination",
        "class": type(members[0]).__name__,
        "settings": members[0].settings(),
        "names": members[0].names,
    }
    _write(handle, path, members, about)


def _write(handle, path, members, about):
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    tensors = {
        f"layers.{i}.{name}": tensor.detach().cpu().contiguous()
        for i, member in enumerate(members)
        for name, tensor in member.state_dict().items()
    }
    _require_finite(tensors, path)
    about = {
        "version": _VERSION,
        **about,
        "layers": handle.layer_names,
        "d_model": [layer.bank.d_model for layer in handle.layers],
        "base": handle.base_fingerprint(),
        "checksum": fingerprint(tensors),
    }
    content = safetensors.torch.save(tensors, {_KEY: json.dumps(about)})
    with atomic_write(path) as stream:
        stream.write(content)


def _require_finite(tensors, path):
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path}: {name!r} holds NaN or infinity; the training run "
                "it comes from diverged, take an earlier checkpoint"
            )


# ----------------------------------------------------------------- reading


def _read(path):
    """Return tensors and what the file says of itself (None if foreign)."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            text = (file.metadata() or {}).get(_KEY)
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); it is damaged "
            "or half-written, fetch or save it again"
        ) from None
    _require_finite(tensors, path)
    return tensors, None if text is None else json.loads(text)


def _check(path, tensors, about, handle, kind, any_base):
    """Raise where a file of ours does not belong to this encoder."""
    if about is None or about.get("kind") != kind:
        found = "a file of others" if about is None else about.get("kind")
        raise ValueError(
            f"{path}: expected {kind}, found {found}"
            + ("; give a name_map to read it" if kind == "adapter" else "")
        )
    if about["version"] > _VERSION:
        raise ValueError(
            f"{path}: written by a later version (format {about['version']}, "
            f"known is {_VERSION}); update this package"
        )
    if fingerprint(tensors) != about["checksum"]:
        raise ValueError(
            f"{path}: its checksum does not fit its content; it is damaged, "
            "fetch or save it again"
        )
    width = [layer.bank.d_model for layer in handle.layers]
    if about["d_model"] != width:
        raise ValueError(
            f"{path}: made for {len(about['d_model'])} layers of width "
            f"{_short(about['d_model'])}, but this encoder has adapters "
            f"behind {len(width)} of width {_short(width)}"
        )
    here = handle.base_fingerprint()
    if about["base"] != here and not any_base:
        raise ValueError(
            f"{path}: trained on another base (fingerprint "
            f"{about['base'][:12]}, this encoder has {here[:12]}); load that "
            "base's weights first, or say any_base=True"
        )


def _short(widths):
    return ", ".join(map(str, sorted(set(widths))))


def load_adapter(handle, path, name, name_map, any_base):
    """See `AdapterHandle.load_adapter`."""
    tensors, about = _read(path)
    if name_map is None:
        _check(path, tensors, about, handle, "adapter", any_base)
        _check_bank(path, about, handle.layers[0].bank)
        name = about["name"] if name is None else name
        keys = {n: f"layers.{{layer}}.{n}" for n in _names(handle)}
    else:
        keys = dict(name_map)
        if name is None:
            raise ValueError(f"{path}: give the adapter a name")
        logger.warning(
            "%s: an adapter of others; whether it was trained on this base "
            "cannot be checked",
            path,
        )
    states = [
        _layer_state(path, tensors, keys, handle, i)
        for i in range(len(handle.layers))
    ]
    for layer, state in zip(handle.layers, states):
        width = state["down.weight"].shape[0]
        bank = layer.bank
        if name not in bank or bank[name].bottleneck != width:
            # A name that cannot be one is refused here, at the first layer.
            bank.add(name, width, replace=True).requires_grad_(False)
        bank[name].load_state_dict(state)
    handle.unfold()


def _names(handle):
    bank = handle.layers[0].bank
    return list(bank[bank.names[0]].state_dict())


def _check_bank(path, about, bank):
    mine = {
        "activation": repr(bank.activation),
        "layer_norm": bank.layer_norm,
        "eps": bank.eps,
    }
    for what, value in mine.items():
        if about[what] != value:
            raise ValueError(
                f"{path}: its {what} is {about[what]}, that of the adapters "
                f"here is {value}; adapters of a bank share it, insert them "
                f"with the {what} of the file"
            )


def _layer_state(path, tensors, keys, handle, number):
    """Return one layer's state dict, checked for names and shapes."""
    bank, wanted = handle.layers[number].bank, _names(handle)
    if set(keys) != set(wanted):
        raise ValueError(
            f"{path}: the name map is of {', '.join(sorted(keys))}, expected "
            f"{', '.join(sorted(wanted))}"
        )
    found = {}
    for name in wanted:
        if keys[name] is None and name in _NEUTRAL:
            continue
        theirs = str(keys[name]).replace("{layer}", str(number))
        if theirs not in tensors:
            raise ValueError(
                f"{path}: no tensor {theirs!r} for {name!r} of layer "
                f"{handle.layer_names[number]!r}; it has "
                f"{', '.join(sorted(tensors)[:5])}, ..."
            )
        found[name] = tensors[theirs]
    rows = found["down.weight"].shape[0] if found["down.weight"].dim() else 1
    like = BottleneckAdapter(
        bank.d_model, max(rows, 1), torch.nn.Identity, bank.layer_norm
    ).state_dict()
    for name, tensor in found.items():
        if tensor.shape != like[name].shape:
            raise ValueError(
                f"{path}: {name!r} of layer {handle.layer_names[number]!r} "
                f"has the shape {tuple(tensor.shape)}, expected "
                f"{tuple(like[name].shape)} for a width of {bank.d_model}"
            )
    for name in wanted:
        if name not in found:
            found[name] = _NEUTRAL[name](like[name])
    return found


def load_combination(handle, path, any_base):
    """See `AdapterHandle.load_combination`."""
    tensors, about = _read(path)
    _check(path, tensors, about, handle, "combination", any_base)
    classes = {kind.__name__: kind for kind in KINDS.values()}
    if about["class"] not in classes:
        raise ValueError(
            f"{path}: a combination of the class {about['class']}, which is "
            f"not one of {', '.join(classes)}"
        )
    missing = [n for n in about["names"] if n not in handle.names]
    if missing:
        raise ValueError(
            f"{path}: combines {', '.join(map(repr, missing))}, which are "
            "not here; load these adapters first (handle.load_adapter)"
        )
    template = classes[about["class"]](**about["settings"])
    made = [
        make_combination(template, layer.bank, about["names"])
        for layer in handle.layers
    ]
    for i, new in enumerate(made):
        start = f"layers.{i}."
        state = {
            name[len(start) :]: tensor
            for name, tensor in tensors.items()
            if name.startswith(start)
        }
        try:
            new.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path}: {error}") from None
    for layer, new in zip(handle.layers, made):
        layer.combination = new
