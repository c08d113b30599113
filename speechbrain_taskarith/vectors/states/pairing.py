"""Two models whose names differ by what they are wrapped in, or by ties.

Which names mean the same: `DistributedDataParallel` and `torch.compile`,
SpeechBrain's wrappers of Hugging Face models, weight norm old and new, and
names of one tensor of which a file holds only some.
"""

import itertools
import logging
from typing import NamedTuple

from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.vectors.states.state import renamed

logger = logging.getLogger(__name__)

# Names that wrappers put in between: torch.compile, sharding, checkpointing.
_HIDDEN = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
# And DistributedDataParallel and AveragedModel; a layer may be called so too.
_MODULE = "module"
_WRAPPERS = {_MODULE, *_HIDDEN}
# What AveragedModel counts beside the module.
_AVERAGED = "n_averaged"
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
# Some published encoders come without it; only their own augmentation, which
# SpeechBrain's wrappers turn off, reads it.
UNTRAINED = "masked_spec_embed"


class Pairs(NamedTuple):
    """Which names of two models mean the same, see `pair_names`."""

    names: dict  # {name: the other's name}
    missing: list  # names that the other lacks
    heads: list  # output layers and constants that only the other has
    unknown: list  # the other's remaining names
    tied: list = ()  # further names of the other for what is in `names`


def pair_names(names, others, ties=None, other_ties=None):
    """Pair the names of two models that differ by what they are wrapped in.

    A wrapper puts one prefix before all names (`model.`, `wav2vec2.`); the
    pair of prefixes is taken under which most names agree. `ties` are
    `State.aliases` of each: a name that one lacks stands for the one that it
    is tied to in the other.
    """
    other_ties = other_ties or {}
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
    groups = {other_ties[name] for name in used if name in other_ties}
    tied = [name for name in left if other_ties.get(name) in groups]
    left = {name: plain for name, plain in left.items() if name not in tied}
    heads = [n for n, plain in left.items() if _is_head(plain, outer)]
    unknown = [n for n in left if n not in heads]
    return Pairs(pairs, missing, heads, unknown, tied)


def without_wrappers(state):
    """Return stored weights under the names of the module that was wrapped."""
    held = (state.entries, state.extra, state.unreadable)
    names = [name for part in held for name in part]
    plain = {name: _join(name, _HIDDEN) for name in names}
    start = f"{_MODULE}."
    while True:
        inner = [n for n in plain if plain[n] != _AVERAGED]
        if not inner or not all(plain[n].startswith(start) for n in inner):
            break
        plain = {n: plain[n].removeprefix(start) for n in inner}
    clash = len(set(plain.values())) < len(plain)
    if clash or all(plain.get(name) == name for name in names):
        return state
    entries, extra, unreadable = (
        {plain[name]: part[name] for name in part if name in plain}
        for part in held
    )
    result = renamed(state, entries)
    result.extra, result.unreadable = extra, unreadable
    return result


def module_names(module, names):
    """Return `{name: name without the wrappers that a live module has}`."""
    import torch

    wrappers = (
        torch.nn.parallel.DistributedDataParallel,
        torch.nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
    )
    counts, inside = set(), set()
    for path, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, wrappers):
            start = f"{path}." if path else ""
            inside.add(start + _MODULE)
            counts.add(start + _AVERAGED)
    plain = {}
    for name in names:
        parts = name.split(".")
        steps = itertools.accumulate(parts, "{}.{}".format)
        kept = [
            part
            for part, step in zip(parts, steps)
            if part not in _HIDDEN and step not in inside
        ]
        if name not in counts:
            plain[name] = ".".join(kept)
    return plain


def _join(name, without):
    """Return a dotted name without some of its parts."""
    return ".".join(part for part in name.split(".") if part not in without)


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
    """Return the `Pairs` if wrappers or ties tell two models' names apart.

    None where the names are the same, or have another reason to differ.
    """
    if set(base) == set(other):
        return None
    pairs = pair_names(base, other, base.aliases, other.aliases)
    differ = any(name != found for name, found in pairs.names.items())
    differ = differ or bool(pairs.tied)
    constants = CONSTANTS & {*pairs.missing, *pairs.heads}
    return pairs if pairs.names and (differ or constants) else None


def under_names_of(base, other, *, partial=False, parted=()):
    """Return a state under the base's names, if wrappers or ties differ.

    As the checkpoint of SpeechBrain's wrapper and the Hugging Face folder it
    started from. Names that one of them ties are one parameter, whichever of
    them the other holds. Output layers and constants that only one of them has count
    as not trained: the base's are taken (`partial`, for vectors: left out).
    Otherwise `other` as it is: where it does not fit, `match_names` says so.
    """
    pairs = renaming(base, other)
    if pairs is None:
        return other
    untrained = set(pair_names(other, base).heads).intersection(pairs.missing)
    entries = {n: other.entries[found] for n, found in pairs.names.items()}
    entries |= {name: other.entries[name] for name in pairs.unknown}
    entries = {n: entries[n] for n in entries if n not in parted}
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
    result = renamed(other, entries)
    result.extra = _extra_under(pairs, other.extra)
    return result


def vector_under_names_of(base, vector, parted):
    """Return `{name: the vector's name}` under a base's; None: as they are.

    `vector` is a State of its tensors, `parted` are names to leave out.
    """
    ties = base.aliases.items()
    split = any((one in vector) != (two in vector) for one, two in ties)
    if vector.keys() <= base.keys() and not split:
        return None
    pairs = renaming(base, vector)
    if pairs is None:
        return None
    names = {**pairs.names, **{name: name for name in pairs.unknown}}
    return {n: found for n, found in names.items() if n not in parted}


def _extra_under(pairs, extra):
    """Give extra states the names of the modules that they belong to."""
    modules = {
        found.rpartition(".")[0]: name.rpartition(".")[0]
        for name, found in pairs.names.items()
    }
    result = {}
    for name, value in extra.items():
        module, _, end = name.rpartition(".")
        there = modules.get(module, module)
        result[f"{there}.{end}" if there else end] = value
    return result
