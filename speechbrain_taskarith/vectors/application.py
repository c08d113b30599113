"""Adding a task vector to weights, as a copy or in place.

Both ways give the same bytes (see `in_place.edit_into`).
"""

import torch

from speechbrain_taskarith.vectors.in_place import edit_into


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
    check_tied(tau, base, scales)
    result, done = {}, {}
    for name in base:
        origin = base.aliases.get(name, name)
        if origin in done:
            result[name] = done[origin]
            continue
        tensor = base[name]
        if scales.get(name, 0.0) == 0.0:
            result[name] = tensor.clone()
        else:
            step = tau[name].to(tensor.device) * scales[name]
            result[name] = tensor.float().add(step).to(tensor.dtype)
        done[origin] = result[name]
    return result


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

    Raises
    ------
    ValueError
        Two names of one tensor that would get different edits; nothing is
        changed then.
    """
    check_tied(tau, state, scales)
    seen = set()
    for name in tau:
        origin = state.aliases.get(name, name)
        if origin in seen or scales[name] == 0.0:
            continue
        seen.add(origin)
        tensor = state[name]
        edit_into(tensor, tensor, tau[name].to(tensor.device), scales[name])


def check_tied(tau, state, scales):
    """Raise unless the names of one tensor all get one edit.

    Arguments
    ---------
    tau : TaskVector
        What is to be added.
    state : State
        The weights, whose tied names count.
    scales : dict
        `{name: value}`, a scale or whatever decides it (its group).

    Raises
    ------
    ValueError
        Only one of two tied names is edited, or they get different vectors
        or scales.
    """
    for name, origin in state.aliases.items():
        if name == origin:
            continue
        pair = f"{name!r} and {origin!r} are one tensor in {state.label}"
        if (name in tau) != (origin in tau):
            raise ValueError(
                f"{pair}, but the task vector edits only one of them; "
                "include or exclude both"
            )
        if name not in tau:
            continue
        if scales[name] != scales[origin]:
            raise ValueError(
                f"{pair}, but get two scales; let one pattern match both"
            )
        one, other = tau[name], tau[origin]
        if one is not other and not torch.equal(one, other.to(one.device)):
            raise ValueError(
                f"{pair}, but the task vector has two different edits for "
                "them: it was taken from a model that does not tie them. "
                "Leave one name out of both (TaskVector.restrict, exclude) "
                "or tie the other model"
            )
