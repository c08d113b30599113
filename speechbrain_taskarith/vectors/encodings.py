"""How a task vector is stored: as safetensors, from exact to small.

Each encoding turns `{name: float32 tensor}` into plain safetensors tensors
and a layout that says how to read them back. The layout is text, so that a
file can be understood without this plugin.
"""

import math
from pathlib import Path

import numpy as np
import torch

from speechbrain_taskarith.vectors.checks import all_finite
from speechbrain_taskarith.vectors.engine.vector_header import (
    ENCODINGS,
    read_vector_header,
    vector_metadata,
)
from speechbrain_taskarith.vectors.states.readers import as_state, open_state
from speechbrain_taskarith.vectors.states.safetensors import damaged
from speechbrain_taskarith.vectors.states.writers import save_safetensors

# Behind a parameter's name; never part of one, since modules join by dots.
_MASK, _VALUES, _SCALE = "::mask", "::values", "::scale"


def encode(deltas, encoding="lossless"):
    """Turn a vector's tensors into those stored, and their layout.

    `"lossless"`: float32 as it is. `"bf16"`: rounded to nearest, half the
    size. `"int8"`: a quarter; one scale a row of the first dimension,
    `x ~ scale * q` with `q` in [-127, 127], so the error is at most half a
    scale. `"sparse"`: one bit an element and the non-zero float32 values:
    exact, and small for a trimmed vector. `"sparse-bf16"`, `"sparse-int8"`:
    the same with smaller values (one scale a tensor). The layout is
    `{name: {"as": encoding, "shape": [...]}}`.

    Example
    -------
    >>> stored, layout = encode({"w": torch.tensor([0.0, 2.0])}, "sparse")
    >>> sorted(stored), decode(stored, layout)["w"]
    (['w::mask', 'w::values'], tensor([0., 2.]))
    """
    if encoding not in ENCODINGS:
        known = ", ".join(ENCODINGS)
        raise ValueError(f"unknown encoding {encoding!r}; expected {known}")
    tensors, layout, first = {}, {}, {}
    for name, delta in deltas.items():
        origin = first.setdefault(id(delta), name)
        if origin != name:
            # Tied parameters share what is stored.
            layout[name] = layout[origin]
            for end in ("", _MASK, _VALUES, _SCALE):
                if origin + end in tensors:
                    tensors[name + end] = tensors[origin + end]
            continue
        delta = delta.detach().to("cpu", torch.float32).contiguous()
        layout[name] = {"as": encoding, "shape": list(delta.shape)}
        if encoding.startswith("sparse"):
            tensors.update(_to_sparse(name, delta, encoding))
        elif encoding == "int8":
            rows = delta.reshape(1, -1)
            if delta.ndim > 1 and delta.numel():
                rows = delta.reshape(delta.shape[0], -1)
            tensors[name], tensors[name + _SCALE] = _to_int8(rows)
        else:
            dtype = torch.bfloat16 if encoding == "bf16" else torch.float32
            tensors[name] = delta.to(dtype)
    return tensors, layout


def decode(tensors, layout):
    """Turn what `encode` returned back into `{name: float32 tensor}`."""
    deltas = {}
    for name, entry in layout.items():
        form, shape = entry["as"], tuple(entry["shape"])
        try:
            if form.startswith("sparse"):
                flat = _from_sparse(name, tensors, form, shape)
            elif form == "int8":
                flat = tensors[name].float() * tensors[name + _SCALE][:, None]
            else:
                # A mapped tensor would keep the file open; a vector owns
                # its numbers.
                flat = tensors[name].to(torch.float32, copy=True)
            deltas[name] = flat.reshape(shape)
        except (LookupError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name}: the stored layout ({form}, {shape}) does not fit "
                f"the stored tensors ({error})"
            ) from None
    return deltas


def write_vector(tau, path, encoding):
    """Store a vector, atomically; see `TaskVector.save`."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a task vector is stored as .safetensors")
    if not len(tau):
        raise ValueError(
            f"{path}: the task vector holds no parameter; nothing was "
            "written. Look at what was restricted or excluded"
        )
    tensors, layout = encode(tau, encoding)
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ValueError(
                f"{path}: {name!r} holds NaN or infinity as {encoding}; "
                "nothing was written. Look for a scale that is too large, or "
                "store it lossless"
            )
    header = vector_metadata(layout, tau.base_fingerprint, tau.metadata)
    save_safetensors(as_state(tensors), path, header)
    return path


def read_vector(path):
    """Return deltas, base fingerprint and metadata that a file holds."""
    stored = open_state(path)
    header = read_vector_header(stored)
    if header is None:
        raise ValueError(
            f"{path}: holds weights, no task vector; make one with "
            "TaskVector.between(base, finetuned)"
        )
    stored.verify()
    layout, *others = header
    try:
        deltas = decode(stored, layout)
    except (ValueError, KeyError, TypeError) as error:
        what = f"is not a complete task vector ({error})"
        raise damaged(path, what) from None
    for name in deltas:
        end = "" if name in stored else _MASK
        origin = stored.aliases.get(name + end, name + end)
        deltas[name] = deltas[origin.removesuffix(end)]
    for name, delta in deltas.items():
        if not all_finite(delta):
            raise damaged(path, f"{name!r} holds NaN or infinity")
    return deltas, *others


def _to_int8(rows):
    if not rows.numel():
        ones = torch.ones(rows.shape[0], dtype=torch.float32)
        return rows.to(torch.int8), ones
    scale = rows.abs().amax(dim=1) / 127
    # A row of zeros has no scale of its own; any will do. Where a scale
    # underflows to a subnormal the quotient may leave the range: clamp.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    quantised = (rows / scale[:, None]).round().clamp_(-127, 127)
    return quantised.to(torch.int8), scale


def _to_sparse(name, delta, encoding):
    flat = delta.reshape(-1)
    # By bit pattern: -0.0 is kept, so that "sparse" is exact to the bit.
    mask = flat.view(torch.int32) != 0
    values = flat[mask]
    stored = {name + _MASK: torch.from_numpy(np.packbits(mask.numpy()))}
    if encoding == "sparse-int8":
        values, stored[name + _SCALE] = _to_int8(values.reshape(1, -1))
    elif encoding == "sparse-bf16":
        values = values.to(torch.bfloat16)
    stored[name + _VALUES] = values.reshape(-1)
    return stored


def _from_sparse(name, tensors, form, shape):
    count = math.prod(shape)
    packed = tensors[name + _MASK].numpy()
    if packed.size != (count + 7) // 8:
        raise ValueError(f"mask has {packed.size} bytes")
    mask = torch.from_numpy(np.unpackbits(packed, count=count)).bool()
    values = tensors[name + _VALUES].float()
    if int(mask.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values for {int(mask.sum())} bits")
    if form == "sparse-int8":
        values = values * tensors[name + _SCALE]
    flat = torch.zeros(count, dtype=torch.float32)
    flat[mask] = values
    return flat
