"""`finetuned - base`, and `base + scale * delta` with the cast back to the stored type."""

import copy
import math

import torch

from speechbrain_taskarith.vectors.checks import (
    all_finite,
    floating,
    overflow_error,
)
from speechbrain_taskarith.vectors.engine.workspace import add_scaled
from speechbrain_taskarith.vectors.states.names import (
    check_readable,
    check_tied_values,
    check_ties,
    not_finite_error,
)
from speechbrain_taskarith.vectors.states.readers import as_state

_HALF = (torch.float16, torch.bfloat16)
# What surely fits, with room for rounding; more is tried out.
_SAFE = 0.99 * torch.finfo(torch.float32).max
_SMALL = 1e30
# Elements worked on at a time: the piece of scaled vector stays in the cache,
# so that memory is passed three times (two tensors read, one written). A GPU
# wants larger pieces, for fewer launches.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 22}


def differences(base, finetuned, names):
    """Return `{name: finetuned - base}` in float32; tied names share one."""
    deltas = {}
    for name in names:
        origin = base.aliases.get(name, name)
        if origin in deltas:
            check_tied_values(base, finetuned, name)
            deltas[name] = deltas[origin]
            continue
        before = base[name]
        delta = finetuned[name].to(before.device).float() - before.float()
        if not all_finite(delta):
            raise not_finite_error(base, finetuned, name)
        deltas[name] = delta
    return deltas


def edit_into(tensor, base, delta, scale, name):
    """Write `base + scale * delta` into a tensor, in its own type.

    `base` has the tensor's shape and device and may be the tensor itself;
    `delta` is float32. A scale of 0 copies the base's values. ValueError,
    which names the parameter, where the type cannot hold the result.
    """
    with torch.no_grad():
        if scale == 0:
            tensor.copy_(base)
            return
        if not tensor.is_contiguous():
            out = torch.empty_like(delta)
            base = base.float()
            tensor.copy_(add_scaled(torch, base, delta, scale, out, out))
            if not all_finite(tensor):
                raise _overflow(name, tensor, scale)
            return
        chunk = _CHUNK.get(tensor.device.type, _CHUNK["cuda"])
        target, source = tensor.view(-1), base.reshape(-1)
        step = delta.reshape(-1)
        # float32: a program may have changed torch's default type.
        kind = {"dtype": torch.float32, "device": tensor.device}
        scratch = torch.empty((2, min(chunk, len(step))), **kind)
        direct = target.dtype == source.dtype == torch.float32
        # Finite where no part is NaN or infinite. Of a GPU's tensor it is
        # asked once, at the end.
        total = torch.zeros((), **kind)
        for start in range(0, len(step), chunk):
            part = slice(start, start + chunk)
            product, before = scratch[:, : len(step[part])]
            if direct:
                before, out = source[part], target[part]
                add_scaled(torch, before, step[part], scale, product, out)
            else:
                before.copy_(source[part])
                add_scaled(torch, before, step[part], scale, product, product)
                target[part] = product
            total += target[part].sum(dtype=torch.float32)
        # The sum may also be too large by itself.
        if not torch.isfinite(total) and not all_finite(target):
            raise _overflow(name, tensor, scale)


def _overflow(name, tensor, scale):
    return overflow_error(name, str(tensor.dtype).removeprefix("torch."), scale)


def edited(tau, base, scales, dtype=None):
    """Return `base + scale * tau` for all names of the base.

    In the base's types, or all floating point tensors in `dtype`; tied names
    share a tensor. `scales` is `{name: float}` for the names of the vector,
    which fits the base.
    """
    check_readable(base)
    check_tied_edits(tau, base, scales)
    dtype = dtype and getattr(torch, floating(dtype))
    result = {}
    for name in base:
        origin = base.aliases.get(name, name)
        if origin != name:
            result[name] = result[origin]
            continue
        tensor = base[name]
        kind = dtype if dtype and base.info(name).floating else tensor.dtype
        if name not in tau:
            result[name] = tensor.to(kind, copy=True)
            # A mask may hold infinity; it stays.
            changed = kind != tensor.dtype and not all_finite(result[name])
            if changed and all_finite(tensor):
                raise _overflow(name, result[name], 0)
            continue
        result[name] = torch.empty_like(tensor, dtype=kind)
        delta = tau[name].to(tensor.device)
        edit_into(result[name], tensor, delta, scales[name], name)
    return result | copy.deepcopy(base.extra)


def rounding_loss(tau, base, result, scales):
    """Return which share of an edit rounding to the stored types lost.

    Norm of `result - (base + scale * tau)` over that of `scale * tau`, in
    [0, about 1]; 0 for an edit that is 0, and in float32.
    """
    lost, moved, tau = 0.0, 0.0, tau.named_as(base)
    for name in tau:
        if result[name].dtype not in _HALF:
            continue
        if name not in base.aliases or base.aliases[name] == name:
            step = tau[name].double() * scales[name]
            exact = base[name].double() + step
            lost += float((result[name].double() - exact).square().sum())
            moved += float(step.square().sum())
    return math.sqrt(lost / moved) if moved else 0.0


def edit_in_place(tau, state, scales):
    """Add `scale * tau` to a state's tensors in place, tied ones once."""
    check_tied_edits(tau, state, scales)
    chosen = {}
    for name in tau:
        if scales[name]:
            chosen.setdefault(state.aliases.get(name, name), name)
    check_writable(state, chosen.values())
    # What is written cannot be taken back: what may overflow, or is not
    # finite, is tried out before anything changes.
    for name in chosen.values():
        tensor, delta = state[name], tau[name]
        if not tensor.numel():
            continue
        most = abs(scales[name]) * _largest(delta)
        # Weights in float32 are far from its end: not read for this.
        if tensor.dtype in _HALF or not most < _SMALL:
            most += _largest(tensor)
        # Also false for NaN.
        if not most < min(_SAFE, torch.finfo(tensor.dtype).max):
            delta = delta.to(tensor.device)
            trial = torch.empty_like(tensor)
            edit_into(trial, tensor, delta, scales[name], name)
    for name in chosen.values():
        tensor, delta = state[name], tau[name].to(state[name].device)
        edit_into(tensor, tensor, delta, scales[name], name)


def _largest(tensor):
    low, high = torch.stack(torch.aminmax(tensor.detach())).tolist()
    return max(-low, high)  # NaN, if there is one: then both are


def check_writable(state, names):
    """Raise unless the entries of a state's tensors can be set one by one."""
    for name in names:
        tensor = state[name]
        if any(n > 1 and not s for n, s in zip(tensor.shape, tensor.stride())):
            raise ValueError(
                f"{name!r}: several entries are one number in memory "
                "(expand()), which cannot be edited in place; nothing was "
                "changed. Give the module a copy: tensor.clone()"
            )


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


def each(function, first, *others):
    """Return `{name: function(entries)}`.

    Tied parameters share one tensor in a vector, and go on sharing it.
    """
    done, results = {}, {}
    for name in first:
        entries = [vector[name] for vector in (first, *others)]
        key = tuple(map(id, entries))
        if key not in done:
            done[key] = function(*entries)
        results[name] = done[key]
    return results
