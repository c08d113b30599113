"""`base + scale * delta` with the cast back to the stored type."""

import torch

from speechbrain_taskarith.vectors.engine.workspace import add_scaled
from speechbrain_taskarith.vectors.states.names import (
    check_tied_values,
    check_ties,
)
from speechbrain_taskarith.vectors.states.readers import as_state

# Elements worked on at a time: the piece of scaled vector stays in the cache,
# so that memory is passed three times (two tensors read, one written). A GPU
# wants larger pieces, for fewer launches.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 22}


def edit_into(tensor, base, delta, scale):
    """Write `base + scale * delta` into a tensor, in its own type.

    `base` has the tensor's dtype, shape and device and may be the tensor
    itself; `delta` is float32. A scale of 0 copies the base's bytes.
    """
    with torch.no_grad():
        if scale == 0:
            tensor.copy_(base)
            return
        if not tensor.is_contiguous():
            out = torch.empty_like(delta)
            base = base.float()
            tensor.copy_(add_scaled(torch, base, delta, scale, out, out))
            return
        chunk = _CHUNK.get(tensor.device.type, _CHUNK["cuda"])
        target, source = tensor.view(-1), base.reshape(-1)
        step = delta.reshape(-1)
        # float32: a program may have changed torch's default type.
        kind = {"dtype": torch.float32, "device": tensor.device}
        scratch = torch.empty((2, min(chunk, len(step))), **kind)
        for start in range(0, len(step), chunk):
            part = slice(start, start + chunk)
            product, before = scratch[:, : len(step[part])]
            if target.dtype == torch.float32:
                before, out = source[part], target[part]
                add_scaled(torch, before, step[part], scale, product, out)
            else:
                before.copy_(source[part])
                add_scaled(torch, before, step[part], scale, product, product)
                target[part] = product


def edited(tau, base, scales):
    """Return `base + scale * tau` for all names of the base.

    In the base's types; tied names share a tensor. `scales` is
    `{name: float}` for the names of the vector, which fits the base.
    """
    check_tied_edits(tau, base, scales)
    result = {}
    for name in base:
        origin = base.aliases.get(name, name)
        if origin != name:
            result[name] = result[origin]
            continue
        tensor = base[name]
        if name not in tau:
            result[name] = tensor.clone()
            continue
        result[name] = torch.empty_like(tensor)
        delta = tau[name].to(tensor.device)
        edit_into(result[name], tensor, delta, scales[name])
    return result


def edit_in_place(tau, state, scales):
    """Add `scale * tau` to a state's tensors in place, tied ones once."""
    check_tied_edits(tau, state, scales)
    seen = set()
    for name in tau:
        origin = state.aliases.get(name, name)
        if origin in seen or scales[name] == 0.0:
            continue
        seen.add(origin)
        tensor = state[name]
        edit_into(tensor, tensor, tau[name].to(tensor.device), scales[name])


def check_tied_edits(tau, state, scales):
    """Raise unless the names of one tensor all get one edit.

    `scales` is `{name: scale}`, or whatever decides the scale (its group).
    """
    check_ties(state, tau, scales)
    tied = [name for name in tau if name in state.aliases]
    if tied:
        deltas = as_state({name: tau[name] for name in tied})
        deltas.label = "the task vector"
        for name in tied:
            check_tied_values(state, deltas, name)
