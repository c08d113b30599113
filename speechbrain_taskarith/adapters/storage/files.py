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
from speechbrain_taskarith.adapters.checks import (
    VERSION,
    Fingerprints,
    base_state,
    check_base,
    check_file,
    fingerprint,
    frozen_fingerprints,
)
from speechbrain_taskarith.adapters.combination.base import (
    COMBINED_NAMES,
    names_as_tensor,
)
from speechbrain_taskarith.adapters.layer import KINDS, make_combination
from speechbrain_taskarith.utils.files import atomic_write

logger = logging.getLogger(__name__)

_KEY = "speechbrain_taskarith"
# In the header, of all its other entries. Not beside it: safetensors writes
# several texts in any order.
_CHECKSUM = "header_checksum"
# What a name that is None in a name map stands for.
_NEUTRAL = {
    "norm.weight": torch.ones_like,
    "norm.bias": torch.zeros_like,
    "down.bias": torch.zeros_like,
    "up.bias": torch.zeros_like,
}


class AdapterFiles(torch.nn.Module):
    """The part of `AdapterHandle` that writes and reads files."""

    encoder: torch.nn.Module
    #: What `AdapterHandle.freeze` has frozen: (name, module).
    _frozen: list
    _fingerprints: Fingerprints

    def base_fingerprint(self):
        """Return the SHA-256 of the encoder's state without the adapters.

        The statistics of an `InputNormalization` in it are part of the state.

        Returns
        -------
        str
            64 hexadecimal digits, over names, types, shapes and bytes: the
            same on every device.
        """
        return self._fingerprints.of(self.encoder, base_state(self.encoder))

    def frozen_fingerprints(self):
        """Return what `freeze` holds still beside the encoder.

        Returns
        -------
        list of dict
            `name`, `class` and `fingerprint` of each module that has
            weights or statistics: in front of the encoder they decide what
            the adapters see, behind it what is made of their output.
        """
        return frozen_fingerprints(self._frozen, self._fingerprints)

    def save_adapter(self, name, path):
        """Write one adapter to a file of its own, atomically.

        Arguments
        ---------
        name : str
            Which one. `ValueError` if unknown, or if it holds NaN.
        path : str or pathlib.Path
            `.safetensors`
        """
        self._save_adapter(name, path)

    def _save_adapter(self, name, path, **more):
        """Write one adapter, with more about it in the header."""
        members = [layer.bank[name] for layer in self.layers]
        header = {
            "kind": "adapter",
            "name": name,
            "bottleneck": members[0].bottleneck,
            **_settings(self.layers[0].bank),
            **more,
        }
        self._write(path, members, header)

    def load_adapter(self, path, name=None, *, name_map=None, any_base=False):
        """Load an adapter from a file; a new name adds one.

        Arguments
        ---------
        path : str or pathlib.Path
            `.safetensors`
        name : str or None
            Name to load it under; None for the file's. An adapter of that
            name is replaced.
        name_map : dict or None
            For files from other libraries: `{our name: theirs}` for
            `down.weight`, `down.bias`, `up.weight`, `up.bias`,
            `norm.weight`, `norm.bias`; `{layer}` in theirs stands for the
            number of the layer. None in place of theirs gives the value of
            a fresh adapter.
        any_base : bool
            True accepts an adapter that was trained on another base, beside
            other frozen modules, behind layers of other names, or in a
            dtype with more digits than that of the adapters here.

        Raises
        ------
        ValueError
            A damaged file, another base, another frozen module, other
            widths, layers or dtype, names that the file lacks, NaN. Nothing
            has changed then.
        """
        tensors, header = read_file(path)
        if name_map is None:
            check_file(self, path, tensors, header, "adapter", any_base)
            if not any_base:
                check_base(self, path, header)
        self._put_adapter(path, tensors, header, name, name_map)

    def _put_adapter(self, path, tensors, header, name, name_map=None):
        """Put what was read into the banks, see `load_adapter`."""
        if name_map is None:
            for what, value in _settings(self.layers[0].bank).items():
                if header.get(what, value) != value:
                    raise ValueError(
                        f"{path}: its {what} is {header[what]}, that of the "
                        f"adapters here is {value}; adapters of a bank share "
                        f"it, insert them with the {what} of the file"
                    )
            name = header["name"] if name is None else name
        elif name is None:
            raise ValueError(f"{path}: give the adapter a name")
        else:
            logger.warning(
                "%s: an adapter from another library; whether it was trained "
                "on this base cannot be checked",
                path,
            )
        states = [
            _layer_state(path, tensors, name_map, layer, i)
            for i, layer in enumerate(self.layers)
        ]
        for layer, state in zip(self.layers, states):
            width = state["down.weight"].shape[0]
            bank = layer.bank
            if name not in bank or bank[name].bottleneck != width:
                # A name that cannot be one is refused here, at the first layer.
                bank.add(name, width, replace=True).requires_grad_(False)
            bank[name].load_state_dict(state)
        self.unfold()

    def save_combination(self, path):
        """Write the combination and the names it combines, as `save_adapter`."""
        members = list(self._combinations().values())
        header = {
            "kind": "combination",
            "class": type(members[0]).__name__,
            "settings": members[0].settings(),
            "names": members[0].names,
        }
        self._write(path, members, header)

    def load_combination(self, path, *, any_base=False):
        """Load a combination from a file, as `load_adapter` loads an adapter.

        Its adapters must be loaded already: `ValueError` where one is missing,
        or for a damaged file, another base or width. Nothing has changed then.
        """
        tensors, header = read_file(path)
        check_file(self, path, tensors, header, "combination", any_base)
        if not any_base:
            check_base(self, path, header)
        self._put_combination(path, tensors, header)

    def _put_combination(self, path, tensors, header, like=None):
        """Put what was read behind the layers, see `load_combination`.

        `like`: a combination whose names, in their order, and whose way to
        compute are kept.
        """
        classes = {kind.__name__: kind for kind in KINDS.values()}
        if like is None and header["class"] not in classes:
            raise ValueError(
                f"{path}: a combination of the class {header['class']}, which "
                f"is not one of {', '.join(classes)}"
            )
        missing = [n for n in header["names"] if n not in self.names]
        if missing:
            raise ValueError(
                f"{path}: combines {', '.join(map(repr, missing))}, which are "
                "not here; load these adapters first (handle.load_adapter)"
            )
        if like is None:
            like = classes[header["class"]](**header["settings"])
            like.names = header["names"]
        made = [make_combination(like, layer.bank) for layer in self.layers]
        for i, new in enumerate(made):
            start = f"layers.{i}."
            state = {
                name.removeprefix(start): tensor
                for name, tensor in tensors.items()
                if name.startswith(start)
            }
            state[COMBINED_NAMES] = names_as_tensor(header["names"])
            try:
                new.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f"{path}: {error}") from None
        for layer, new in zip(self.layers, made):
            layer.combination = new

    def _write(self, path, members, header):
        if Path(path).suffix != ".safetensors":
            raise ValueError(
                f"{path}: expected a name that ends in .safetensors"
            )
        tensors = {
            f"layers.{i}.{name}": tensor.detach().cpu().contiguous()
            for i, member in enumerate(members)
            for name, tensor in member.state_dict().items()
            if name != COMBINED_NAMES  # the header has them
        }
        _require_finite(tensors, path)
        frozen = self.frozen_fingerprints()
        header = {
            "version": VERSION if frozen else 1,
            **header,
            "layers": self.layer_names,
            "d_model": [layer.bank.d_model for layer in self.layers],
            "base": self.base_fingerprint(),
            "checksum": fingerprint(tensors),
        }
        if frozen:
            header["frozen"] = frozen
        content = safetensors.torch.save(tensors, _metadata(header))
        with atomic_write(path) as stream:
            stream.write(content)


def _settings(bank):
    """Return what all adapters of a bank share."""
    return {
        "activation": repr(bank.activation),
        "layer_norm": bank.layer_norm,
        "eps": bank.eps,
    }


def _require_finite(tensors, path):
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path}: {name!r} holds NaN or infinity; the training run "
                "it comes from diverged, take an earlier checkpoint"
            )


def read_file(path):
    """Return tensors and our header, None in another library's file."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); it is damaged "
            "or half-written, fetch or save it again"
        ) from None
    _require_finite(tensors, path)
    text = metadata.get(_KEY)
    if text is None:
        return tensors, None
    try:
        header = _Header(json.loads(text)).of(path)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: its header cannot be read ({error}); it is damaged, "
            "fetch or save it again"
        ) from None
    # Files of earlier versions have none.
    written = header.pop(_CHECKSUM, None)
    if written not in (None, _checksum(header)):
        raise ValueError(
            f"{path}: its header does not match its checksum; it is damaged, "
            "fetch or save it again"
        )
    return tensors, header


def _metadata(header):
    header = {**header, _CHECKSUM: _checksum(header)}
    return {_KEY: json.dumps(header)}


class _Header(dict):
    """What a file says about itself; a missing entry is a damaged file."""

    def of(self, path):
        self.path = path
        return self

    def __missing__(self, key):
        raise ValueError(
            f"{self.path}: its header lacks {key!r}; it is damaged, fetch or "
            "save it again"
        )


def _checksum(header):
    return hashlib.sha256(json.dumps(header).encode()).hexdigest()


def _layer_state(path, tensors, name_map, layer, number):
    """Return one layer's state dict, checked for names and shapes."""
    width, layer_norm = layer.bank.d_model, layer.bank.layer_norm
    expected = list(layer.bank[layer.bank.names[0]].state_dict())
    keys = name_map
    if name_map is None:
        keys = {name: f"layers.{{layer}}.{name}" for name in expected}
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
                f"{layer.name!r}; it has {', '.join(sorted(tensors)[:5])}, ..."
            )
        found[name] = tensors[source]
    rows = found["down.weight"].shape[0] if found["down.weight"].dim() else 1
    like = BottleneckAdapter(
        width, max(rows, 1), torch.nn.Identity, layer_norm
    ).state_dict()
    for name in expected:
        if name not in found:
            found[name] = _NEUTRAL[name](like[name])
        elif found[name].shape != like[name].shape:
            raise ValueError(
                f"{path}: {name!r} of layer {layer.name!r} has the shape "
                f"{tuple(found[name].shape)}, expected "
                f"{tuple(like[name].shape)} for a width of {width}"
            )
    return found
