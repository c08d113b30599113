"""What a stored task vector says about itself; read without torch.

A text in the file's metadata: format version, how each tensor is encoded, the
base it was taken from, its history. A checksum of the text lies beside it, as
one of the tensors does.
"""

import hashlib
import json

from speechbrain_taskarith.vectors.states.safetensors import damaged
from speechbrain_taskarith.vectors.states.state import TASK_VECTOR

ENCODINGS = ("lossless", "bf16", "int8")
ENCODINGS += ("sparse", "sparse-bf16", "sparse-int8")

_VERSION = 2
# Version 1 had no checksum of the header.
_CHECKSUM = f"{TASK_VECTOR}_checksum"


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
    return {TASK_VECTOR: text, _CHECKSUM: _checksum(text)}


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
    if version > 1 and state.metadata.get(_CHECKSUM) != _checksum(text):
        raise damaged(where, "its header does not match its checksum")
    if unknown := sorted(forms - {*ENCODINGS}, key=str):
        raise damaged(
            where,
            f"unknown encoding {unknown[0]!r}, not {', '.join(ENCODINGS)}",
        )
    return found


def _checksum(text):
    return hashlib.sha256(text.encode()).hexdigest()
