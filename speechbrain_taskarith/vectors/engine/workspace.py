"""Chunks of tensors, the buffers to work on them, and arithmetic on chunks.

Written against the operators that NumPy and torch share (`xp`), into buffers,
so that a chunk's numbers stay in the cache from one operation to the next.
"""

import math
from typing import NamedTuple

import numpy as np

from speechbrain_taskarith.vectors.checks import all_finite
from speechbrain_taskarith.vectors.states.safetensors import ITEM_SIZE

# Elements that are worked on at a time. A handful of float32 buffers of this
# size stay in a core's second-level cache, which is what makes a pass cost
# little more than reading the files; much smaller, Python's calls would show.
CHUNK = 1 << 16
# On a GPU, which wants much work at once.
DEVICE_CHUNK = 1 << 23

# Bits of a float32 that is infinite; those of NaN are more, all others less.
INFINITE = 0x7F800000

# Sums over many elements (dot products) are taken over runs of this many and
# then added in order, so that they do not depend on the chunk size.
RUN = 1 << 14


# Relative step of the stored types; all is read as float32.
EPS = {"F64": 2.0**-23, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


class Place(NamedTuple):
    """Where a chunk lies: elements `[start, stop)` of a flattened tensor."""

    index: int  # in the order of the whole vector
    name: str
    shape: tuple  # of the whole tensor
    start: int
    stop: int

    size = property(lambda self: self.stop - self.start)


def places(shapes, chunk=CHUNK, granularity=None):
    """Cut tensors (`{name: shape}`) into chunks, in order.

    `granularity(shape)` is the smallest number of elements that a rule can
    work on (1, a row, a whole tensor); chunks are whole multiples of it.

    Example
    -------
    >>> [(p.name, p.start, p.stop) for p in places({"w": (5,)}, chunk=2)]
    [('w', 0, 2), ('w', 2, 4), ('w', 4, 5)]
    """
    found = []
    for name, shape in shapes.items():
        numel = math.prod(shape)
        unit = max(1, granularity(shape)) if granularity else 1
        step = max(chunk // unit, 1) * unit
        for start in range(0, numel, step):
            stop = min(start + step, numel)
            found.append(Place(len(found), name, tuple(shape), start, stop))
    return found


class Workspace:
    """Buffers of one thread, used again for every chunk.

    Its arrays are NumPy's, or torch's on a device (`xp`). The same key gives
    the same memory; contents are what was left there.
    """

    def __init__(self, xp=np, device=None):
        self.xp, self.device = xp, device
        self._buffers = {}
        # What a rule learns about a chunk besides the result: whether it
        # waits for the sign that prevails in the whole vector, how many more
        # elements are positive than negative; and that sign (-1, 0, 1).
        self.unresolved, self.tally, self.majority = False, 0, None
        # Which place the base's buffer holds, and bytes read from files.
        self.place, self.bytes_read = None, 0

    def array(self, key, size, dtype="float32", xp=None):
        """Return a buffer; `dtype` is a name that NumPy and torch know."""
        buffer = self._buffers.get((key, dtype))
        if buffer is None or len(buffer) < size:
            xp = xp or self.xp
            where = {} if xp is np else {"device": self.device}
            buffer = xp.empty(size, dtype=getattr(xp, dtype), **where)
            self._buffers[key, dtype] = buffer
        return buffer[:size]

    def bytes(self, key, size):
        """Return a NumPy buffer of bytes."""
        return self.array(key, size, "uint8", np)

    def zeros(self, key, size, dtype="float32"):
        """Return a buffer filled with zeros."""
        buffer = self.array(key, size, dtype)
        buffer[:] = 0
        return buffer

    def from_numpy(self, array):
        """Bring a NumPy array to where this workspace's arrays live."""
        if self.xp is np:
            return array
        return self.xp.from_numpy(array).to(self.device)

    def read(self, state, place, key):
        """Read a chunk of a floating point tensor as float32.

        NumPy knows no bfloat16, and torch is not to be needed here: a
        bfloat16 is the upper half of a float32.
        """
        dtype, size = state.info(place.name).dtype, place.size
        run = place.name, place.start, place.stop
        self.bytes_read += size * ITEM_SIZE[dtype]
        # A GPU's numbers are read to the CPU first.
        on_cpu = self.xp is np
        out = self.array(key, size) if on_cpu else np.empty(size, np.float32)
        if dtype == "F32":
            state.read_into(*run, out.view(np.uint8))
        else:
            raw = self.bytes(f"{key} raw", size * ITEM_SIZE[dtype])
            state.read_into(*run, raw)
            if dtype == "BF16":
                bits = out.view(np.uint32)
                bits[:] = raw.view("<u2")
                bits <<= 16
            else:
                out[:] = raw.view({"F16": "<f2", "F64": "<f8"}[dtype])
        return out if on_cpu else self.from_numpy(out)


def magnitude_bits(values, work):
    """Return the bits of `|values|` (float32) as int32.

    For finite numbers their order is that of the magnitudes, and integers
    compare, count and sort faster; NaN and infinity are `INFINITE` or more.
    """
    xp = work.xp
    bits = work.array("bits", len(values), "int32")
    return xp.bitwise_and(values.view(xp.int32), 0x7FFFFFFF, out=bits)


def weighted_sum(vectors, weights, place, work):
    """Return `sum_i w_i tau_i` of a chunk, in the buffer `sum`.

    Each of the float32 vectors need be valid only until the next is taken.
    """
    xp = work.xp
    total = work.array("sum", place.size)
    for number, (weight, tau) in enumerate(zip(weights, vectors)):
        if number == 0:
            xp.multiply(tau, float(weight), out=total)
        elif weight == 1:
            xp.add(total, tau, out=total)
        else:
            part = work.array("part", place.size)
            xp.multiply(tau, float(weight), out=part)
            xp.add(total, part, out=total)
    return total


def add_scaled(xp, base, delta, scale, product, out):
    """Write `base + scale * delta` (float32) into `out`, and return it.

    All edits come through here: in memory, in place and streamed. The product
    is rounded before it is added: a fused multiply-add would give other last
    bits on other machines. Both buffers may be the same.
    """
    xp.multiply(delta, scale, out=product)
    return xp.add(base, product, out=out)


# Bits of the two-byte types without the sign; infinity and NaN are these or
# more.
_INFINITE_HALF = {"F16": 0x7C00, "BF16": 0x7F80}


def stored_finite(values, stored, dtype):
    """Tell whether the bytes that `to_stored` made of values are finite."""
    if dtype in _INFINITE_HALF:
        bits = stored.view("<u2") & 0x7FFF
        return not len(bits) or int(bits.max()) < _INFINITE_HALF[dtype]
    # The fastest look: a dot product carries NaN and infinity. It may also be
    # too large itself.
    values = to_numpy(values)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(values, values)):
            return True
    return all_finite(values)


def rounding(values, stored, dtype):
    """Return the sum of squares of what `to_stored` rounded away."""
    if dtype not in _INFINITE_HALF:
        return 0.0
    kept = stored.view("<f2" if dtype == "F16" else "<u2")
    if dtype == "BF16":
        kept = (kept.astype(np.uint32) << 16).view(np.float32)
    lost = to_numpy(values) - kept
    return float(np.dot(lost, lost))


def to_numpy(array):
    """Return an array of either kind as NumPy, without a copy on the CPU."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def to_stored(values, dtype):
    """Turn float32 values into the bytes of a floating point type.

    Rounded to nearest, halves to even, as torch rounds.
    """
    values = to_numpy(values)
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
