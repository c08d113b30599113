"""Task vectors as files: safetensors with a header that says how to read them."""

import json
from pathlib import Path

import torch

from speechbrain_taskarith.vectors.encodings import decode, encode
from speechbrain_taskarith.vectors.states.readers import open_state
from speechbrain_taskarith.vectors.states.safetensors import damaged
from speechbrain_taskarith.vectors.states.writers import save_state

# The entry of the safetensors metadata that makes weights a task vector.
HEADER = "task_vector"


def write_vector(tau, path, encoding):
    """Store a vector, atomically; see `TaskVector.save`.

    Arguments
    ---------
    tau : TaskVector
        The vector.
    path : str or pathlib.Path
        Must end in `.safetensors`.
    encoding : str
        See `encodings.encode`.

    Returns
    -------
    pathlib.Path
        The path.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a task vector is stored as .safetensors")
    tensors, layout = encode(tau, encoding)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path}: {name!r} holds NaN or infinity as {encoding}; "
                "nothing was written. Look for a scale that is too large, or "
                "store it lossless"
            )
    content = {
        "version": 1,
        "layout": layout,
        "base_fingerprint": tau.base_fingerprint,
        "metadata": tau.metadata,
    }
    return save_state(tensors, path, metadata={HEADER: json.dumps(content)})


def read_vector(path):
    """Read what `write_vector` wrote; see `TaskVector.load`.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.

    Returns
    -------
    deltas : dict
        `{name: float32 tensor}`.
    base_fingerprint : str or None
        Of the weights the vector was taken from.
    metadata : dict
        What was kept with it.
    """
    stored = open_state(path)
    text = stored.metadata.get(HEADER)
    if text is None:
        raise ValueError(
            f"{path}: holds weights, no task vector; make one with "
            "TaskVector.between(base, finetuned)"
        )
    stored.verify()
    try:
        header = json.loads(text)
        deltas = decode(stored, header["layout"])
        base_fingerprint = header["base_fingerprint"]
        metadata = header["metadata"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"is no whole task vector ({error})") from None
    for name, delta in deltas.items():
        if not torch.isfinite(delta).all():
            raise damaged(path, f"{name!r} holds NaN or infinity")
    return deltas, base_fingerprint, metadata
