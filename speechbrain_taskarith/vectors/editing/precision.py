"""States in other floating point types: wider inside, as asked for outside."""

import torch

from speechbrain_taskarith.vectors.checks import all_finite, floating
from speechbrain_taskarith.vectors.states.readers import as_state
from speechbrain_taskarith.vectors.states.safetensors import TORCH_NAME

_HALF = ("F16", "BF16")
#: Stands for the types of the base, tensor by tensor.
BASE = "base"


def widened(state):
    """Return a state whose half precision tensors are float32."""
    return cast(state, dict.fromkeys(half_types(state), torch.float32))


def types_of(dtype, state, base):
    """Return `{name: torch type}` of a state's floating point tensors.

    `dtype` is a type's name, `"base"`, or None for the types as they are;
    `base` says which those of the base are.
    """
    names = [name for name in state if state.info(name).floating]
    if dtype is None:
        return {}
    if dtype == BASE:
        return {name: _type(base, name) for name in names}
    return dict.fromkeys(names, getattr(torch, floating(dtype)))


def half_types(state):
    """Return `{name: torch type}` of a state's half precision tensors."""
    halves = (name for name in state if state.info(name).dtype in _HALF)
    return {name: _type(state, name) for name in halves}


def narrows(state, types):
    """Tell whether a cast to types rounds anything."""
    return any(
        dtype.itemsize < _type(state, name).itemsize
        for name, dtype in types.items()
        if name in state
    )


def cast(state, types):
    """Return a state with some tensors in other types, tied ones still tied.

    ValueError, which names the tensor, where a type cannot hold the numbers.
    """
    if all(types.get(name, t) == t for name, t in _types(state).items()):
        return state
    result = {}
    for name in state:
        origin = state.aliases.get(name, name)
        if origin not in result:
            tensor, dtype = state[origin], types.get(origin)
            result[origin] = tensor if dtype is None else tensor.to(dtype)
            # A mask may hold infinity; it stays.
            if not all_finite(result[origin]) and all_finite(tensor):
                raise ValueError(
                    f"{origin!r} is too large for {plain_type(dtype)}; take "
                    "another type (dtype='float32')"
                )
        result[name] = result[origin]
    found = as_state({name: result[name] for name in state})
    found.label = state.label
    return found


def origin_of(before, finetuned, types_for, started_from, given):
    """Return the state that fine-tuning started from, and its type's name.

    The state before, rounded to the type in which the fine-tuning got it (or
    None for its name): as told, or half precision where the fine-tuned state
    is stored so, or, of the types in which the state was given away, the one
    to which most numbers are nearer. `types_for` makes types by tensor of a
    name, as `types_of` does.
    """
    if started_from is not None:
        origin = cast(before, types_for(started_from, before))
        return origin, plain_type(started_from)
    types = half_types(finetuned)
    if narrows(before, types):
        names = sorted(map(plain_type, set(types.values())))
        return cast(before, types), ", ".join(names)
    best, margin = (before, None), 0
    for name in given:
        origin = cast(before, types_for(name, before))
        if (found := _votes(origin, before, finetuned)) > margin:
            best, margin = (origin, name), found
    return best


def plain_type(dtype):
    """Return a torch type's name."""
    return str(dtype).removeprefix("torch.")


def _votes(one, other, state):
    """Return for how many more numbers of a state `one` is nearer."""
    total = 0
    for name in one:
        info = one.info(name)
        if not (info.floating and name in state):
            continue
        if state.info(name).shape == info.shape:
            value = state[name].to(one[name].device).double()
            near = (value - one[name]).abs() - (value - other[name]).abs()
            total += int((near < 0).sum()) - int((near > 0).sum())
    return total


def _types(state):
    return {name: _type(state, name) for name in state}


def _type(state, name):
    return getattr(torch, TORCH_NAME[state.info(name).dtype])
