"""Whether models and vectors fit one another: the one place that tells.

Patterns are applied before names are compared, so that excluding a head makes
models with two heads comparable. Nothing here imports torch unless an error
has to be explained.
"""

import warnings
from collections.abc import Mapping
from operator import attrgetter

import numpy as np

from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.utils.patterns import select
from speechbrain_taskarith.vectors.states.state import (
    is_extra,
    short,
    unreadable_error,
)

# They stay the base's unless asked for, since adding differences of
# variances can make a variance negative.
RUNNING_STATISTICS = ("running_mean", "running_var", "glob_mean", "glob_std")
_BLOCK = 1 << 20


def match_names(
    base,
    other,
    include=("*",),
    exclude=(),
    *,
    strict=True,
    partial=False,
    advice="",
):
    """Return the names that two states have in common, in the base's order.

    Both must hold the same names, with the same shapes, and numbers of a
    floating point type on both sides or on neither. `partial`:
    the base may hold more, as when a vector is applied.
    Otherwise it is a KeyError (names) or ValueError that ends with `advice`,
    or a warning where not `strict`.
    """
    ours, theirs = (
        {name: state.info(name) for name in state if not is_extra(name)}
        for state in (base, other)
    )
    unread = {**base.unreadable, **other.unreadable}
    chosen = select({**ours, **theirs, **unread}, include, exclude)
    unread = [name for name in chosen if name in unread]
    if partial:
        unread = [n for n in unread if n in theirs or n in other.unreadable]
    for state in (base, other):
        found = [name for name in unread if name in state.unreadable]
        if found and strict:
            raise unreadable_error(state, found)
    chosen = [n for n in chosen if n in {**ours, **theirs} and n not in unread]
    common = [name for name in chosen if name in ours and name in theirs]
    only_base = [n for n in chosen if n not in theirs and not partial]
    only_other = [n for n in chosen if n not in ours]
    kind = attrgetter("shape", "floating")
    unlike = [n for n in common if kind(ours[n]) != kind(theirs[n])]
    if not (only_base or only_other or unlike or unread):
        return common
    if strict:
        raise _misfit(base, other, only_base, only_other, unlike, advice)
    out = [*only_base, *only_other, *unlike, *unread]
    warnings.warn(f"left out of the task vector: {some(out)}", stacklevel=4)
    return [name for name in common if name not in set(unlike)]


def _misfit(base, other, only_base, only_other, unlike, advice):
    problems, remedies = [], []
    if only_base:
        problems.append(
            f"{other.label} lacks {some(only_base)} of {base.label}"
        )
    if only_other:
        problems.append(
            f"{base.label} lacks {some(only_other)} of {other.label}"
        )
    if problems:
        remedies.append(
            "take models of one architecture, or exclude these names "
            "(TaskVector.restrict)"
        )
    if unlike:
        name = unlike[0]
        one, two = base.info(name), other.info(name)
        if one.shape != two.shape:
            found = f"has shape {two.shape}, in {base.label} {one.shape}"
            remedies.append(
                "take models of one input window: this one holds positions"
                if "embed_positions" in name
                else "for a grown vocabulary align the rows by token first "
                "(align_vocabulary)"
            )
        else:
            found = f"is of type {two.dtype}, in {base.label} of {one.dtype}"
            remedies.append(
                "save both in one type (of quantised models restore the "
                "floating point weights)"
            )
        more = f" ({some(unlike)} in all)" if len(unlike) > 1 else ""
        problems.append(f"{other.label}: {name!r} {found}{more}")
    kind = KeyError if only_base or only_other else ValueError
    return kind(f"{'; '.join(problems)}. Remedy: {'; '.join(remedies)}{advice}")


def editable_names(base, other, include, exclude, buffers, **options):
    """Return what an edit of the base by another model or vector changes.

    Of two models all floating point parameters, of a vector (`partial`) its
    own. `options` are those of `match_names`.
    """
    if buffers not in ("base", "edit"):
        raise ValueError(f"buffers={buffers!r}: expected 'base' or 'edit'")
    names = match_names(base, other, include, exclude, **options)
    if not options.get("partial"):
        _check_codes(base, other, names, options.get("strict", True))
    names = [name for name in names if base.info(name).floating]
    if buffers == "base" and not options.get("partial"):
        names = [n for n in names if not n.endswith(RUNNING_STATISTICS)]
    if not names:
        what = "no floating point parameter is left to edit"
        raise ValueError(f"{base.label}: {what}")
    return names


def check_readable(state):
    """Raise unless all tensors can be copied into a result."""
    if state.unreadable:
        raise unreadable_error(
            state, list(state.unreadable), "take a model without it"
        )


def _check_codes(base, other, names, strict):
    """Raise for numbers that are no weights by themselves, and differ.

    Integers are not edited, which is right for counters and masks. Of
    quantised weights it would leave half a model behind.
    """
    for name in names:
        one, two = base.info(name), other.info(name)
        codes = one.dtype.startswith(("F8", "C")) or (
            one.dtype in ("I8", "U8") and len(one.shape) > 1
        )
        if not codes or (one == two and _same_bytes(base, name, other, name)):
            continue
        message = (
            f"{other.label}: {name!r} is of type {two.dtype} and differs from "
            f"{base.label}; quantised and complex numbers are not edited. "
            "Restore the floating point weights of both models, or exclude it"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=5)


def _same_bytes(one, name, two, other):
    """Compare two tensors of one type and shape, piece by piece."""
    info = one.info(name)
    for start in range(0, info.numel, _BLOCK):
        stop = min(start + _BLOCK, info.numel)
        size = (stop - start) * info.nbytes // info.numel
        left, right = np.empty((2, size), np.uint8)
        one.read_into(name, start, stop, left)
        two.read_into(other, start, stop, right)
        if not np.array_equal(left, right):
            return False
    return True


def check_alike(vectors, labels=None):
    """Raise unless vectors edit the same parameters, of the same shapes.

    They are mappings from name to what has a shape.
    """
    labels = labels or [f"task vector {i + 1}" for i in range(len(vectors))]
    first = vectors[0]
    for vector, label in zip(vectors[1:], labels[1:]):
        different = sorted(set(first.keys()) ^ set(vector.keys()))
        if different:
            raise KeyError(
                f"{labels[0]} and {label} edit different parameters: only one "
                f"of them has {some(different)}. Bring them to the same with "
                "restrict(), include or exclude"
            )
        for name in first.keys():
            one, other = tuple(first[name].shape), tuple(vector[name].shape)
            if one != other:
                two = f"{one} in {labels[0]} and {other} in {label}"
                raise ValueError(f"{name!r} has shape {two}")


def check_ancestry(base, fingerprint, label="this task vector", origin=None):
    """Raise unless a vector was taken from just these weights."""
    if fingerprint in base.fingerprints():
        return
    taken = "combines vectors of several bases"
    if fingerprint:
        taken = f"was taken from {short(fingerprint)}"
        taken += f" ({origin})" if origin else ""
    raise ValueError(
        f"{base.label} ({short(base.fingerprint)}) is not the base of "
        f"{label}, which {taken}. Apply it to its own base, or say "
        "any_base=True if another model is meant"
    )


def check_ties(base, names, scales=None):
    """Raise unless all names of one tensor are edited, and by one scale."""
    for name, origin in base.aliases.items():
        pair = f"{name!r} and {origin!r} are one tensor in {base.label}"
        if (name in names) != (origin in names):
            raise ValueError(
                f"{pair}, but only one of them is edited; include or exclude "
                "both"
            )
        if scales and name in names and scales[name] != scales[origin]:
            raise ValueError(
                f"{pair}, but get two scales; let one pattern match both"
            )


def check_tied_groups(rule, twins):
    """Raise where a rule merges the names of one tensor in two ways.

    `twins` is `{name: first name}`.
    """
    for name, origin in twins.items():
        if rule.group(name) != rule.group(origin):
            raise ValueError(
                f"{name!r} and {origin!r} are one tensor, but "
                f"{type(rule).__name__} has two rules for them; let one "
                "pattern match both"
            )


def check_tied_values(base, state, name):
    """Raise unless a name that the base ties has its origin's bytes here."""
    origin, aliases = base.aliases.get(name, name), state.aliases
    if name == origin or (
        name in aliases and aliases[name] == aliases.get(origin)
    ):
        return
    equal = state.info(name) == state.info(origin)
    equal = equal and _same_bytes(state, name, state, origin)
    if not equal:
        raise ValueError(
            f"{name!r} and {origin!r} are one tensor in {base.label}, but "
            f"two different ones in {state.label}; tie them there too, or "
            "exclude both"
        )


def differing_extra(base, other):
    """Return names of what is no weight and differs, or one of them lacks.

    Results have the base's.
    """
    sides = [
        {**state.extra, **{n: state[n] for n in state if is_extra(n)}}
        for state in (base, other)
    ]
    one, two = sides
    return [
        name
        for name in {**one, **two}
        if name not in one
        or name not in two
        or not _same_value(one[name], two[name])
    ]


def _same_value(one, two):
    """Compare plain values, and what holds some, also tensors and arrays."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(
            _same_value(one[key], two[key]) for key in one
        )
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        same = len(one) == len(two)
        return same and all(map(_same_value, one, two))
    shapes = [getattr(value, "shape", None) for value in (one, two)]
    if shapes[0] != shapes[1]:
        return False
    same = one == two
    return bool(same.all() if hasattr(same, "all") else same)


def not_finite_error(base, other, name):
    """Return the error that says whose numbers are not finite."""
    import torch

    for state in (base, other):
        finite = torch.isfinite(state[name].float().reshape(-1))
        if not finite.all():
            return ValueError(
                f"{state.label}: {name!r} holds NaN or infinity (first at "
                f"element {int(finite.int().argmin())}). The training that "
                "made it diverged: use an earlier checkpoint; or exclude this "
                "parameter if it is meant to be so"
            )
    return ValueError(
        f"{other.label}: {name!r} differs from {base.label} by more than "
        "float32 can hold; exclude this parameter"
    )
