"""Runs of stored elements as float32 arrays, and back.

NumPy knows no bfloat16, and torch is not to be needed here: a bfloat16 is the
upper half of a float32.
"""

import numpy as np

from speechbrain_taskarith.vectors.states.safetensors import ITEM_SIZE


def read_float32(state, name, start, stop, work, key):
    """Read elements of a tensor as float32.

    Arguments
    ---------
    state : State
        Where the tensor is.
    name : str
        The tensor, of a floating point type.
    start, stop : int
        The elements, in the flattened tensor.
    work : Workspace
        Its buffer `key` takes the result.
    key : str
        The buffer.

    Returns
    -------
    array
        float32, where the workspace's arrays live.
    """
    dtype, size = state.info(name).dtype, stop - start
    on_cpu = work.xp is np
    work.bytes_read += size * ITEM_SIZE[dtype]
    # A GPU's numbers are read to the CPU first.
    out = work.array(key, size) if on_cpu else np.empty(size, np.float32)
    if dtype == "F32":
        state.read_into(name, start, stop, out.view(np.uint8))
        return work.from_numpy(out)
    raw = work.bytes(f"{key} raw", size * ITEM_SIZE[dtype])
    state.read_into(name, start, stop, raw)
    if dtype == "BF16":
        bits = out.view(np.uint32)
        bits[:] = raw.view("<u2")
        bits <<= 16
    else:
        out[:] = raw.view({"F16": "<f2", "F64": "<f8"}[dtype])
    return work.from_numpy(out)


def to_stored(values, dtype, work):
    """Turn float32 values into the bytes of a floating point type.

    Arguments
    ---------
    values : numpy.ndarray
        float32.
    dtype : str
        `"F32"`, `"BF16"`, `"F16"` or `"F64"`.
    work : Workspace
        For buffers.

    Returns
    -------
    numpy.ndarray
        uint8; rounded to nearest, halves to even, as torch rounds.
    """
    if dtype == "F32":
        return values.view(np.uint8)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        odd = bits >> 16
        odd &= 1
        odd += 0x7FFF
        odd += bits
        odd >>= 16
        return odd.astype("<u2").view(np.uint8)
    kind = {"F16": "<f2", "F64": "<f8"}[dtype]
    # Too large for half precision becomes infinity, as in torch.
    with np.errstate(over="ignore"):
        return values.astype(kind).view(np.uint8)
