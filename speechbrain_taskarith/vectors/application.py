"""Adding a task vector to weights, as a copy or in place.

Both ways give the same bytes: the product and the sum are rounded one after
the other, since a fused multiply-add would give other last bits than the
merge engine, and on other machines.

Authors
 * speechbrain_taskarith contributors 2026
"""

import torch

# Elements edited at a time: a scratch buffer of this size stays in the cache,
# so that an edit in place reads two tensors and writes one, no more.
_CHUNK = 1 << 19


def edited(tau, base, scales):
    """Return `base + scale * tau` for all names of the base.

    Arguments
    ---------
    tau : TaskVector
        What to add; it fits (`TaskVector.check_fits`).
    base : State
        The weights to edit; they stay as they are.
    scales : dict
        `{name: float}` for the parameters of the vector.

    Returns
    -------
    dict
        `{name: tensor}` in the base's dtypes; tied names share a tensor.

    Raises
    ------
    ValueError
        Two names of one tensor that would get different edits.
    """
    result, done = {}, {}
    for name in base:
        origin = base.aliases.get(name, name)
        if origin in done:
            _check_same_edit(tau, scales, name, done[origin])
            result[name] = result[done[origin]]
            continue
        done[origin] = name
        tensor = base[name]
        if scales.get(name, 0.0) == 0.0:
            result[name] = tensor.clone()
            continue
        step = tau[name].to(tensor.device) * scales[name]
        result[name] = tensor.float().add(step).to(tensor.dtype)
    return result


@torch.no_grad()
def edit_in_place(tau, state, scales):
    """Add `scale * tau` to tensors in place, tied ones once.

    Arguments
    ---------
    tau : TaskVector
        What to add; it fits.
    state : State
        The tensors to change, of a module.
    scales : dict
        `{name: float}`.
    """
    seen = set()
    for name in tau:
        origin = state.aliases.get(name, name)
        if origin in seen or scales[name] == 0.0:
            continue
        seen.add(origin)
        _add_scaled_(state[name], tau[name], scales[name])


def _check_same_edit(tau, scales, name, twin):
    """Raise unless two tied names get the same edit and so stay tied."""
    if (name in tau) != (twin in tau):
        raise ValueError(
            f"{name!r} and {twin!r} are one tensor in the base, but the task "
            "vector edits only one of them; include or exclude both"
        )
    if scales.get(name) != scales.get(twin):
        raise ValueError(
            f"{name!r} and {twin!r} are one tensor in the base, but get two "
            "scales; let one pattern match both"
        )


def _add_scaled_(tensor, delta, scale):
    """`tensor += scale * delta` with the bytes that `edited` would give."""
    delta = delta.to(tensor.device)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        tensor.copy_(tensor.float().add_(delta * scale))
        return
    target, source = tensor.view(-1), delta.reshape(-1)
    scratch = torch.empty(min(_CHUNK, target.numel()))
    for start in range(0, target.numel(), _CHUNK):
        part = target[start : start + _CHUNK]
        step = scratch[: part.numel()]
        torch.mul(source[start : start + _CHUNK], scale, out=step)
        if part.dtype == torch.float32:
            part.add_(step)
        else:
            part.copy_(step.add_(part.float()))
