"""Chunks of tensors, and the buffers to work on them."""

import math
from typing import NamedTuple

import numpy as np

# Elements that are worked on at a time. A handful of float32 buffers of this
# size stay in a core's second-level cache, which is what makes a pass cost
# little more than reading the files; much smaller, Python's calls would show.
CHUNK = 1 << 16

# Sums over many elements (dot products) are taken over runs of this many and
# then added in order, so that they do not depend on the chunk size.
RUN = 1 << 14


class Place(NamedTuple):
    """A run of elements of one tensor.

    Arguments
    ---------
    index : int
        Its number in the order of the whole vector.
    name : str
        The tensor's name.
    shape : tuple of int
        The whole tensor's shape.
    start, stop : int
        The run `[start, stop)` in the flattened tensor.
    """

    index: int
    name: str
    shape: tuple
    start: int
    stop: int

    @property
    def size(self):
        """Number of elements."""
        return self.stop - self.start


def places(shapes, chunk=CHUNK, granularity=None):
    """Cut tensors into chunks.

    Arguments
    ---------
    shapes : dict
        `{name: shape}`, in the order of the vector.
    chunk : int
        Elements of a chunk; rounded down to whole units, at least one.
    granularity : callable or None
        `shape -> int`: smallest number of elements that a rule can work on
        (1, a row, a whole tensor).

    Returns
    -------
    list of Place
        They cover every element once, in order.

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

    Arguments
    ---------
    xp : module
        `numpy` or `torch`: where the arrays live.
    device : torch.device or None
        For torch.
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

    def array(self, key, size, dtype="float32"):
        """Return an uninitialised buffer.

        Arguments
        ---------
        key : str
            What it is for; the same key gives the same memory.
        size : int
            Number of elements.
        dtype : str
            Name of its type, one that NumPy and torch both know.

        Returns
        -------
        numpy.ndarray or torch.Tensor
            One-dimensional.
        """
        buffer = self._buffers.get((key, dtype))
        if buffer is None or len(buffer) < size:
            where = {} if self.xp is np else {"device": self.device}
            kind = getattr(self.xp, dtype)
            buffer = self.xp.empty(size, dtype=kind, **where)
            self._buffers[key, dtype] = buffer
        return buffer[:size]

    def bytes(self, key, size):
        """Return an uninitialised NumPy buffer of bytes (see `array`)."""
        buffer = self._buffers.get((key, "bytes"))
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[key, "bytes"] = np.empty(size, np.uint8)
        return buffer[:size]

    def zeros(self, key, size, dtype="float32"):
        """Return a buffer filled with zeros (see `array`)."""
        buffer = self.array(key, size, dtype)
        buffer[:] = 0
        return buffer

    def number(self, value):
        """Return a float32 scalar array, for `maximum` and `minimum`.

        Arguments
        ---------
        value : float
            The number.

        Returns
        -------
        array
            Of no dimension.
        """
        buffer = self._buffers.get(("number", value))
        if buffer is None:
            buffer = self.array(f"number {value}", 1)
            buffer[:] = value
            buffer = self._buffers["number", value] = buffer.reshape(())
        return buffer

    def from_numpy(self, array):
        """Bring a NumPy array to where this workspace's arrays live.

        Arguments
        ---------
        array : numpy.ndarray
            Any array.

        Returns
        -------
        array
            NumPy, or torch on the device.
        """
        if self.xp is np:
            return array
        return self.xp.from_numpy(array).to(self.device)


def to_numpy(array):
    """Return an array of either kind as NumPy, without a copy on the CPU.

    Arguments
    ---------
    array : array
        NumPy or torch.

    Returns
    -------
    numpy.ndarray
        The same numbers.
    """
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()
