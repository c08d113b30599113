"""What a stored task vector says about itself; read without torch.

A text in the file's metadata: format version, how each tensor is encoded, the
base it was taken from, its history. A checksum of the text lies beside it, as
one of the tensors does.
"""

import hashlib
import json

from speechbrain_taskarith.utils.patterns import replace
from speechbrain_taskarith.vectors.states.safetensors import damaged
from speechbrain_taskarith.vectors.states.state import CHECKSUM, TASK_VECTOR

ENCODINGS = ("lossless", "bf16", "int8")
ENCODINGS += ("sparse", "sparse-bf16", "sparse-int8")

_VERSION = 2
# Version 1 had no checksum of the header.
# Vectors that a history names, at most.
_LONGEST_HISTORY = 64
# Where it notes names that were left out by choice, see `parted`.
_PARTED = "parted"
# Where it notes what is no tensor and differs from the base's, which stays.
KEPT_EXTRA = "extra_of_base"


def vector_metadata(layout, base_fingerprint, history):
    """Return the metadata that make stored tensors a task vector."""
    text = json.dumps(
        {
            "version": _VERSION,
            "layout": layout,
            "base_fingerprint": base_fingerprint,
            "metadata": history,
        }
    )
    return {TASK_VECTOR: text, CHECKSUM: _checksum(text)}


def read_vector_header(state):
    """Return `layout, base_fingerprint, metadata`; None for plain weights.

    ValueError for a header that is damaged, or of a later version.
    """
    text = state.metadata.get(TASK_VECTOR)
    if text is None:
        return None
    where = state.label
    try:
        header = json.loads(text)
        version, layout = header["version"], header["layout"]
        found = layout, header["base_fingerprint"], header["metadata"]
        forms = {entry["as"] for entry in layout.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"is not a complete task vector ({error!r})"
        raise damaged(where, what) from None
    if type(version) is not int or not 1 <= version <= _VERSION:
        raise ValueError(
            f"{where}: a task vector of format version {version!r}; known are "
            f"1 to {_VERSION}. Update this package, or save the vector again"
        )
    if version > 1 and state.metadata.get(CHECKSUM) != _checksum(text):
        raise damaged(where, "its header does not match its checksum")
    if unknown := sorted(forms - {*ENCODINGS}, key=str):
        raise damaged(
            where,
            f"unknown encoding {unknown[0]!r}, not {', '.join(ENCODINGS)}",
        )
    return found


def _checksum(text):
    return hashlib.sha256(text.encode()).hexdigest()


def bounded(history):
    """Where a history has grown long, keep what it began with alone."""

    def nodes(one):
        yield one
        for parent in one.get("parents", ()):
            yield from nodes(parent)

    if sum(1 for _ in nodes(history)) <= _LONGEST_HISTORY:
        return dict(history)
    origins = {}
    for one in nodes(history):
        if "parents" not in one:
            origins.setdefault(json.dumps(one, default=str), one)
    kept = list(origins.values())[: _LONGEST_HISTORY - 1]
    return {**history, "parents": kept, "shortened": True}


def parted(aliases, names, history=None):
    """Return the entry that notes a choice between tied names.

    A vector may lack one of two names that a model ties since its base did:
    then an edit of one is an edit of both. Or it was left out by a pattern:
    then it is not. `aliases` is `State.aliases`.
    """
    taken = {aliases[name] for name in names if name in aliases}
    found = {n for n, o in aliases.items() if o in taken and n not in names}
    found.update((history or {}).get(_PARTED, ()))
    return {_PARTED: sorted(found)} if found else {}


def renamed_parted(history, rename=None, prefix=None):
    """Return a history whose `parted` names are others, see `State.rename`."""
    result = dict(history)
    if _PARTED in result:
        plain = [name.removeprefix(prefix or "") for name in result[_PARTED]]
        result[_PARTED] = sorted(replace(plain, rename or {}).values())
    if "parents" in result:
        result["parents"] = [
            renamed_parted(parent, rename, prefix)
            for parent in result["parents"]
        ]
    return result


def kept_extra_in(history):
    """Return the extra states that models of a vector had otherwise."""
    found = set(history.get(KEPT_EXTRA, ()))
    found.update(*map(kept_extra_in, history.get("parents", ())))
    return sorted(found)


def parted_in(history):
    """Return what a vector, or those it was made of, are `parted` from."""
    found = frozenset(history.get(_PARTED, ()))
    return found.union(*map(parted_in, history.get("parents", ())))
