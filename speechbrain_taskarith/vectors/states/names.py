"""Whether models and vectors fit one another: the one place that tells.

Patterns are applied before names are compared, so that excluding a head makes
models with two heads comparable. Nothing here imports torch unless an error
has to be explained.
"""

import itertools
import logging
import warnings
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.utils.patterns import select
from speechbrain_taskarith.vectors.states.state import State, short

logger = logging.getLogger(__name__)

# They stay the base's unless asked for, since adding differences of
# variances can make a variance negative.
RUNNING_STATISTICS = ("running_mean", "running_var", "glob_mean", "glob_std")
_BLOCK = 1 << 20

# Names that DistributedDataParallel and torch.compile put in between.
_WRAPPERS = {"module", "_orig_mod"}
# Where SpeechBrain's wrappers and Hugging Face's task models hold the encoder.
HOLDERS = {
    "model",
    "wav2vec2",
    "wav2vec2_bert",
    "hubert",
    "wavlm",
    "data2vec_audio",
    "unispeech",
    "unispeech_sat",
}
# The names of torch.nn.utils.weight_norm, and of its successor.
_WEIGHT_NORM = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
# Output layers of Hugging Face's task models (CTC, pre-training, classes,
# generation), which their encoders go without.
HEADS = {
    "lm_head",
    "proj_out",
    "quantizer",
    "project_q",
    "project_hid",
    "final_proj",
    "label_embs_concat",
    "projector",
    "classifier",
}
# Tables that SpeechBrain's wrappers compute, and no file of weights holds.
CONSTANTS = {"_mel_filters"}


class Pairs(NamedTuple):
    """Which names of two models mean the same, see `pair_names`."""

    names: dict  # {name: the other's name}
    missing: list  # names that the other lacks
    heads: list  # output layers and constants that only the other has
    unknown: list  # the other's remaining names


def pair_names(names, others, ties=None):
    """Pair the names of two models that differ by what they are wrapped in.

    A wrapper puts one prefix before all names (`model.`, `wav2vec2.`); the
    pair of prefixes is taken under which most names agree. `ties` is
    `State.aliases`: a name that is missing stands for the one it is tied to.
    """
    names, others = list(names), list(others)
    ours, theirs = _unwrapped(names), _unwrapped(others)
    start, other_start = _prefixes(ours, theirs)
    found = {
        name.removeprefix(other_start): other
        for name, other in theirs.items()
        if name.startswith(other_start)
    }
    pairs = {
        name: found[plain.removeprefix(start)]
        for plain, name in ours.items()
        if plain.startswith(start) and plain.removeprefix(start) in found
    }
    of_tied = {(ties or {}).get(name): found for name, found in pairs.items()}
    missing = []
    for name in names:
        if name in pairs:
            continue
        origin = (ties or {}).get(name)
        if origin is not None and origin in of_tied:
            pairs[name] = of_tied[origin]
        else:
            missing.append(name)
    used, outer = set(pairs.values()), set(other_start.split("."))
    left = {n: plain for plain, n in theirs.items() if n not in used}
    heads = [n for n, plain in left.items() if _is_head(plain, outer)]
    unknown = [n for n in left if n not in heads]
    return Pairs(pairs, missing, heads, unknown)


def _unwrapped(names):
    """Return `{name without wrappers, weight norm in new form: name}`."""
    plain = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        parts[-1:] = [_WEIGHT_NORM.get(part, part) for part in parts[-1:]]
        plain[".".join(parts)] = name
    # Where `module` is a layer's own name.
    return plain if len(plain) == len(names) else {n: n for n in names}


def _prefixes(ours, theirs):
    """Return the two prefixes under which most names agree; short ones win."""
    best, choice = 0, ("", "")
    candidates = [
        (one, two) for one in _starts(ours) for two in _starts(theirs)
    ]
    for start, other in sorted(candidates, key=lambda two: sum(map(len, two))):
        inner = {n[len(start) :] for n in ours if n.startswith(start)}
        found = sum(
            n[len(other) :] in inner for n in theirs if n.startswith(other)
        )
        if found > best:
            best, choice = found, (start, other)
    return choice


def _starts(names):
    """Return the prefixes of names that are wrappers' (`""`, `model.`, ...)."""
    starts = {""}
    for name in names:
        parts = name.split(".")[:-1]
        outer = list(itertools.takewhile(HOLDERS.__contains__, parts))
        for depth in range(1, len(outer) + 1):
            starts.add(".".join(outer[:depth]) + ".")
    return starts


def _is_head(name, outer):
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in outer:
        del parts[0]
    return parts[0] in HEADS or parts[0] in CONSTANTS


def renaming(base, other):
    """Return the `Pairs` if only wrappers tell two models' names apart.

    None where the names are the same, or have another reason to differ.
    """
    if set(base) == set(other):
        return None
    pairs = pair_names(base, other, base.aliases)
    differ = any(name != found for name, found in pairs.names.items())
    constants = CONSTANTS & {*pairs.missing, *pairs.heads}
    return pairs if pairs.names and (differ or constants) else None


def renamed(state, entries):
    """Return a state's weights as other `entries`; it is their `source`."""
    result = State(
        entries, state.path, state.metadata, lambda _: state.verify()
    )
    result.label, result.source = state.label, state
    return result


def under_names_of(base, other, *, partial=False):
    """Return a state under the base's names, if wrappers tell them apart.

    As the checkpoint of SpeechBrain's wrapper and the Hugging Face folder it
    started from. Output layers and constants that only one of them has count
    as not trained: the base's are taken (`partial`, for vectors: left out).
    Otherwise `other` as it is: where it does not fit, `match_names` says so.
    """
    pairs = renaming(base, other)
    if pairs is None:
        return other
    untrained = set(pair_names(other, base).heads).intersection(pairs.missing)
    entries = {n: other.entries[found] for n, found in pairs.names.items()}
    entries |= {name: other.entries[name] for name in pairs.unknown}
    if partial:
        untrained = ()
    entries |= {name: base.entries[name] for name in untrained}
    message = f"{other.label}: read under the names of {base.label}"
    if untrained:
        message += f"; not in it, taken as untrained: {some(untrained)}"
    if pairs.heads:
        message += f"; left out: {some(pairs.heads)}"
    heads = {*untrained, *pairs.heads} - CONSTANTS
    logger.log(logging.WARNING if heads else logging.INFO, message)
    return renamed(other, entries)


def match_names(
    base,
    other,
    include=("*",),
    exclude=(),
    *,
    strict=True,
    partial=False,
    same_types=False,
    advice="",
):
    """Return the names that two states have in common, in the base's order.

    Both must hold the same names, with the same shapes, and numbers of a
    floating point type on both sides or on neither (`same_types`: the same
    dtype). `partial`: the base may hold more, as when a vector is applied.
    Otherwise it is a KeyError (names) or ValueError that ends with `advice`,
    or a warning where not `strict`.
    """
    ours = {name: base.info(name) for name in base}
    theirs = {name: other.info(name) for name in other}
    chosen = select({**ours, **theirs}, include, exclude)
    common = [name for name in chosen if name in ours and name in theirs]
    only_base = [n for n in chosen if n not in theirs and not partial]
    only_other = [n for n in chosen if n not in ours]
    kind = tuple if same_types else attrgetter("shape", "floating")
    unlike = [n for n in common if kind(ours[n]) != kind(theirs[n])]
    if not (only_base or only_other or unlike):
        return common
    if strict:
        raise _misfit(base, other, only_base, only_other, unlike, advice)
    out = [*only_base, *only_other, *unlike]
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
                "for a grown vocabulary align the rows by token first "
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
    names = [name for name in names if base.info(name).floating]
    if buffers == "base" and not options.get("partial"):
        names = [n for n in names if not n.endswith(RUNNING_STATISTICS)]
    if not names:
        what = "no floating point parameter is left to edit"
        raise ValueError(f"{base.label}: {what}")
    return names


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


def check_tied_values(base, state, name):
    """Raise unless a name that the base ties has its origin's bytes here."""
    origin, aliases = base.aliases.get(name, name), state.aliases
    if name == origin or (
        name in aliases and aliases[name] == aliases.get(origin)
    ):
        return
    info = state.info(name)
    equal = info == state.info(origin)
    for start in range(0, info.numel if equal else 0, _BLOCK):
        stop = min(start + _BLOCK, info.numel)
        size = (stop - start) * info.nbytes // info.numel
        one, other = np.empty((2, size), np.uint8)
        state.read_into(name, start, stop, one)
        state.read_into(origin, start, stop, other)
        equal = equal and np.array_equal(one, other)
    if not equal:
        raise ValueError(
            f"{name!r} and {origin!r} are one tensor in {base.label}, but "
            f"two different ones in {state.label}; tie them there too, or "
            "exclude both"
        )


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
