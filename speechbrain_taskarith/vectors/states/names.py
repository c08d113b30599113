"""Subtracting weights, and whether weights and a vector fit."""

import warnings

import torch

from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.utils.patterns import select
from speechbrain_taskarith.vectors.states.fingerprint import short
from speechbrain_taskarith.vectors.states.state import is_running_statistic


def subtract(base, finetuned, include, exclude, strict, buffers):
    """Return `theta_finetuned - theta_base` by parameter, in float32.

    The arguments are those of `TaskVector.between`, which documents them.

    Arguments
    ---------
    base, finetuned : State
        The weights before and after.
    include, exclude : sequence of str
        Anchored shell patterns on parameter names.
    strict : bool
        Whether what is on one side only is an error.
    buffers : str
        `"base"` or `"edit"`.

    Returns
    -------
    dict
        `{name: tensor}`; tied names share a tensor.
    """
    if buffers not in ("base", "edit"):
        raise ValueError(f"buffers={buffers!r}: expected 'base' or 'edit'")
    base.verify()
    finetuned.verify()
    # Patterns first: excluding a head makes models with two heads comparable.
    everything = [*base, *(name for name in finetuned if name not in base)]
    chosen = select(everything, include, exclude)
    names = _common_names(base, finetuned, chosen, strict)
    deltas = {}
    for name in _editable(base, names, buffers):
        origin = base.aliases.get(name, name)
        if origin in deltas and origin != name:
            _check_tied(name, origin, finetuned)
            deltas[name] = deltas[origin]
            continue
        before = base[name]
        delta = finetuned[name].to(before.device).float() - before.float()
        if not torch.isfinite(delta).all():
            raise _not_finite(name, base, finetuned)
        deltas[name] = delta
    return deltas


def check_fits(tau, base):
    """Raise unless weights hold all parameters of a vector, in its shapes.

    Arguments
    ---------
    tau : TaskVector
        The vector.
    base : State
        The weights to be edited.
    """
    missing = [name for name in tau if name not in base]
    if missing:
        raise KeyError(
            f"{base.label} lacks {some(missing)} of the task vector. Is it "
            "another model, or wrapped (names with 'module.')? Edit fewer "
            "parameters with TaskVector.restrict"
        )
    for name, delta in tau.items():
        dtype, shape = base.info(name).dtype, base.info(name).shape
        if not base.info(name).floating:
            raise ValueError(
                f"{base.label}: {name!r} is of type {dtype}, which a task "
                "vector cannot edit without losing it to rounding; restore "
                "floating point weights first (quantised models), or leave "
                "the name out with TaskVector.restrict"
            )
        if tuple(delta.shape) != shape:
            raise ValueError(
                f"{base.label}: {name!r} has shape {shape}, the task vector "
                f"{tuple(delta.shape)}; for a grown vocabulary align the "
                "rows by token first (align_vocabulary)"
            )


def check_ancestry(tau, base):
    """Raise unless a vector was taken from just these weights.

    Arguments
    ---------
    tau : TaskVector
        The vector.
    base : State
        The weights to be edited.
    """
    if tau.base_fingerprint == base.fingerprint:
        return
    taken = (
        f"was taken from {short(tau.base_fingerprint)} "
        f"({tau.metadata.get('base', 'path unknown')})"
        if tau.base_fingerprint
        else "combines vectors of several bases"
    )
    raise ValueError(
        f"{base.label} ({short(base.fingerprint)}) is not the base of this "
        f"task vector, which {taken}. Apply it to its own base, or say "
        "any_base=True if another model is meant"
    )


def _common_names(base, finetuned, names, strict):
    missing = [name for name in names if name not in finetuned]
    extra = [name for name in names if name not in base]
    common = [name for name in names if name in base and name in finetuned]
    unequal = [
        name
        for name in common
        if base.info(name).shape != finetuned.info(name).shape
    ]
    if strict and (missing or extra):
        sides = []
        if missing:
            sides.append(f"only {base.label} holds {some(missing)}")
        if extra:
            sides.append(f"only {finetuned.label} holds {some(extra)}")
        raise KeyError(
            f"the two models differ: {'; '.join(sides)}. Compare models of "
            "one architecture, exclude these names, or say strict=False to "
            "leave them out"
        )
    if strict and unequal:
        name = unequal[0]
        raise ValueError(
            f"shapes differ for {some(unequal)}: {name!r} is "
            f"{base.info(name).shape} in {base.label} and "
            f"{finetuned.info(name).shape} in {finetuned.label}. For a grown "
            "vocabulary use align_vocabulary, or say strict=False to leave "
            "these out"
        )
    if missing or extra or unequal:
        warnings.warn(
            f"left out of the task vector: {some(missing + extra + unequal)}",
            stacklevel=4,
        )
    return [name for name in common if name not in unequal]


def _editable(base, names, buffers):
    chosen = [name for name in names if base.info(name).floating]
    if buffers == "base":
        chosen = [name for name in chosen if not is_running_statistic(name)]
    if not chosen:
        raise ValueError(
            f"{base.label}: no floating point parameter is left to subtract"
        )
    return chosen


def _check_tied(name, origin, finetuned):
    if not torch.equal(finetuned[name], finetuned[origin]):
        raise ValueError(
            f"{name!r} and {origin!r} are one tensor in the base and two "
            f"different ones in {finetuned.label}; exclude one of them"
        )


def _not_finite(name, base, finetuned):
    for state in (base, finetuned):
        if not torch.isfinite(state[name]).all():
            return ValueError(
                f"{state.label}: {name!r} holds NaN or infinity. The training "
                "that made it diverged: use an earlier checkpoint; or exclude "
                "this parameter if it is meant to be so"
            )
    return ValueError(
        f"{finetuned.label}: {name!r} differs from {base.label} by more than "
        "float32 can hold; exclude this parameter"
    )
