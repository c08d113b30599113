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
    header = {
        "kind": "adapter",
        "name": name,
        "bottleneck": members[0].bottleneck,
        **_settings(handle.layers[0].bank),
    }
    _write(handle, path, members, header)


def _settings(bank):
    """Return what all adapters of a bank share."""
    return {
        "activation": repr(bank.activation),
        "layer_norm": bank.layer_norm,
        "eps": bank.eps,
    }


def save_combination(handle, members, path):
    """See `AdapterHandle.save_combination`."""
    header = {
        "kind": "combination",
        "class": type(members[0]).__name__,
        "settings": members[0].settings(),
        "names": members[0].names,
    }
    _write(handle, path, members, header)


def _write(handle, path, members, header):
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    tensors = {
        f"layers.{i}.{name}": tensor.detach().cpu().contiguous()
        for i, member in enumerate(members)
        for name, tensor in member.state_dict().items()
    }
    _require_finite(tensors, path)
    header = {
        "version": _VERSION,
        **header,
        "layers": handle.layer_names,
        "d_model": [layer.bank.d_model for layer in handle.layers],
        "base": handle.base_fingerprint(),
        "checksum": fingerprint(tensors),
    }
    content = safetensors.torch.save(tensors, {_KEY: json.dumps(header)})
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
    """Return tensors and our header, None in another library's file."""
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


def _check(path, tensors, header, handle, kind, any_base):
    """Raise where a file of ours does not belong to this encoder."""
    if header is None or header.get("kind") != kind:
        found = (
            "another library's file" if header is None else header.get("kind")
        )
        raise ValueError(
            f"{path}: expected {kind}, found {found}"
            + ("; give a name_map to read it" if kind == "adapter" else "")
        )
    if header["version"] > _VERSION:
        raise ValueError(
            f"{path}: written by a later version (format {header['version']}, "
            f"known is {_VERSION}); update this package"
        )
    if fingerprint(tensors) != header["checksum"]:
        raise ValueError(
            f"{path}: its checksum does not match its content; it is damaged, "
            "fetch or save it again"
        )
    width = [layer.bank.d_model for layer in handle.layers]
    if header["d_model"] != width:
        raise ValueError(
            f"{path}: made for {len(header['d_model'])} layers of width "
            f"{_short(header['d_model'])}, but this encoder has adapters "
            f"behind {len(width)} of width {_short(width)}"
        )
    base = handle.base_fingerprint()
    if header["base"] != base and not any_base:
        raise ValueError(
            f"{path}: trained on another base (fingerprint "
            f"{header['base'][:12]}, this encoder has {base[:12]}); load that "
            "base's weights first, or pass any_base=True"
        )


def _short(widths):
    return ", ".join(map(str, sorted(set(widths))))


def load_adapter(handle, path, name, name_map, any_base):
    """See `AdapterHandle.load_adapter`."""
    tensors, header = _read(path)
    if name_map is None:
        _check(path, tensors, header, handle, "adapter", any_base)
        _check_bank(path, header, handle.layers[0].bank)
        name = header["name"] if name is None else name
        keys = {n: f"layers.{{layer}}.{n}" for n in _parts(handle)}
    else:
        keys = dict(name_map)
        if name is None:
            raise ValueError(f"{path}: give the adapter a name")
        logger.warning(
            "%s: an adapter from another library; whether it was trained "
            "on this base cannot be checked",
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


def _check_bank(path, header, bank):
    for what, value in _settings(bank).items():
        if header[what] != value:
            raise ValueError(
                f"{path}: its {what} is {header[what]}, that of the adapters "
                f"here is {value}; adapters of a bank share it, insert them "
                f"with the {what} of the file"
            )


def _parts(handle):
    """Return the names of an adapter's tensors."""
    bank = handle.layers[0].bank
    return list(bank[bank.names[0]].state_dict())


def _layer_state(path, tensors, keys, handle, number):
    """Return one layer's state dict, checked for names and shapes."""
    bank, expected = handle.layers[number].bank, _parts(handle)
    if set(keys) != set(expected):
        raise ValueError(
            f"{path}: name_map has {', '.join(sorted(keys))}, expected "
            f"{', '.join(sorted(expected))}"
        )
    found = {}
    for name in expected:
        if keys[name] is None and name in _NEUTRAL:
            continue
        source = str(keys[name]).replace("{layer}", str(number))
        if source not in tensors:
            raise ValueError(
                f"{path}: no tensor {source!r} for {name!r} of layer "
                f"{handle.layer_names[number]!r}; it has "
                f"{', '.join(sorted(tensors)[:5])}, ..."
            )
        found[name] = tensors[source]
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
    for name in expected:
        if name not in found:
            found[name] = _NEUTRAL[name](like[name])
    return found


def load_combination(handle, path, any_base):
    """See `AdapterHandle.load_combination`."""
    tensors, header = _read(path)
    _check(path, tensors, header, handle, "combination", any_base)
    classes = {kind.__name__: kind for kind in KINDS.values()}
    if header["class"] not in classes:
        raise ValueError(
            f"{path}: a combination of the class {header['class']}, which is "
            f"not one of {', '.join(classes)}"
        )
    missing = [n for n in header["names"] if n not in handle.names]
    if missing:
        raise ValueError(
            f"{path}: combines {', '.join(map(repr, missing))}, which are "
            "not here; load these adapters first (handle.load_adapter)"
        )
    template = classes[header["class"]](**header["settings"])
    made = [
        make_combination(template, layer.bank, header["names"])
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
