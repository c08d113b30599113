"""One lazy, read-only view of weights, whatever they are stored in.

`state_readers` makes states out of files, `state_writers` writes them.
Nothing here imports torch until a tensor is asked for, so that tools which
only stream bytes stay small.
"""

import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from speechbrain_taskarith.vectors.states import fingerprint as fingerprints
from speechbrain_taskarith.vectors.states.safetensors import (
    ITEM_SIZE,
    TensorInfo,
    damaged,
)

# safetensors name -> torch name
_TORCH_NAME = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}

# Where training scripts put the weights inside a larger checkpoint.
NESTED = ("state_dict", "model_state_dict", "model", "module")

_HASH_BLOCK = 1 << 22


def torch_dtype(name):
    """Return the torch dtype for a safetensors dtype name.

    Arguments
    ---------
    name : str
        E.g. `"BF16"`.

    Returns
    -------
    torch.dtype
        E.g. `torch.bfloat16`.
    """
    import torch

    return getattr(torch, _TORCH_NAME[name])


def dtype_name(dtype):
    """Return the safetensors name of a torch dtype.

    Arguments
    ---------
    dtype : torch.dtype
        E.g. `torch.float32`.

    Returns
    -------
    str
        E.g. `"F32"`.

    Raises
    ------
    ValueError
        For quantised and complex128 tensors, which no format here stores.
    """
    plain = str(dtype).removeprefix("torch.")
    for name, torch_name in _TORCH_NAME.items():
        if torch_name == plain:
            return name
    raise ValueError(f"tensors of dtype {dtype} cannot be stored or edited")


def info_of(tensor):
    """Return the `TensorInfo` of a torch tensor.

    Arguments
    ---------
    tensor : torch.Tensor
        Any tensor.

    Returns
    -------
    TensorInfo
        Its dtype name and shape.
    """
    return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))


def raw_bytes(tensor):
    """Return a tensor's bytes as a NumPy array, without a copy on the CPU.

    Arguments
    ---------
    tensor : torch.Tensor
        Any tensor, on any device.

    Returns
    -------
    numpy.ndarray
        One-dimensional, uint8.
    """
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if not flat.numel():
        return np.empty(0, dtype=np.uint8)
    return flat.view(torch.uint8).numpy()


class FileHandle:
    """A file descriptor that closes with the last tensor that uses it.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class StoredTensor:
    """A tensor as a range of bytes in a file.

    Arguments
    ---------
    file : FileHandle
        The file.
    info : TensorInfo
        Dtype and shape.
    offset : int
        Of its first byte in the file.
    """

    def __init__(self, file, info, offset):
        self.file, self.info, self.offset = file, info, offset

    identity = None

    def read_into(self, start, buffer):
        """Fill a buffer (see `State.read_into`)."""
        position = self.offset + start * ITEM_SIZE[self.info.dtype]
        view = memoryview(buffer)
        while view:
            count = os.preadv(self.file.descriptor, [view], position)
            if not count:
                raise damaged(self.file.path, "ends before its last tensor")
            view, position = view[count:], position + count

    def tensor(self):
        """Return the tensor, mapped (see `State`)."""
        import torch

        info = self.info
        dtype = torch_dtype(info.dtype)
        if not info.numel:
            return torch.empty(info.shape, dtype=dtype)
        # A private mapping of just this tensor: lazily read, and writing to
        # it by mistake changes neither the file nor a later look.
        slack = self.offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(
            self.file.descriptor,
            info.nbytes + slack,
            access=mmap.ACCESS_COPY,
            offset=self.offset - slack,
        )
        flat = torch.frombuffer(
            mapped, dtype=dtype, count=info.numel, offset=slack
        )
        return flat.reshape(info.shape)


class _LoadedTensor:
    """A tensor that torch holds: of a module, a dict, or a mapped file."""

    def __init__(self, tensor):
        self._tensor = tensor.detach()
        self.info = info_of(tensor)

    @property
    def identity(self):
        # Two names are tied when they show the same memory the same way.
        t = self._tensor
        if not t.numel() or t.device.type == "meta":
            return None
        return (t.device, t.data_ptr(), tuple(t.shape), tuple(t.stride()))

    @cached_property
    def _bytes(self):
        return raw_bytes(self._tensor)

    def read_into(self, start, buffer):
        begin = start * ITEM_SIZE[self.info.dtype]
        buffer[:] = self._bytes[begin : begin + len(buffer)]

    def tensor(self):
        return self._tensor


class State(Mapping):
    """Weights by name: lazy, read-only.

    Made by `open_state` and `as_state`. Indexing gives torch tensors;
    `read_into` gives bytes to those who stream.

    Arguments
    ---------
    entries : dict
        `{name: tensor entry}`, internal.
    path : pathlib.Path or None
        Where the weights come from; None for a module or a dict.
    metadata : dict or None
        Texts stored beside the weights.
    check : callable or None
        What `verify` calls.

    Example
    -------
    >>> import torch
    >>> state = as_state(torch.nn.Linear(2, 3))
    >>> list(state), state["weight"].shape
    (['weight', 'bias'], torch.Size([3, 2]))
    """

    def __init__(self, entries, path=None, metadata=None, check=None):
        self._entries = entries
        self.path = path
        self.metadata = dict(metadata or {})
        self._check = check

    def __getitem__(self, name):
        return self._entry(name).tensor()

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)

    def __contains__(self, name):
        return name in self._entries

    # Comparing tensor by tensor is `fingerprint`'s work.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self):
        return f"State({self.label}, {len(self)} tensors)"

    @property
    def label(self):
        """What to call these weights in messages: the path, if any."""
        return str(self.path) if self.path else "weights in memory"

    def info(self, name):
        """Return dtype and shape of a tensor without reading it.

        Arguments
        ---------
        name : str
            The parameter's name.

        Returns
        -------
        TensorInfo
            Also `.numel`, `.nbytes`, `.floating`.
        """
        return self._entry(name).info

    def read_into(self, name, start, stop, buffer):
        """Read the raw bytes of elements `[start, stop)` into a buffer.

        May be called from several threads.

        Arguments
        ---------
        name : str
            The parameter's name.
        start, stop : int
            Range of elements of the flattened tensor.
        buffer : numpy.ndarray
            One-dimensional uint8, writable, of exactly as many bytes.
        """
        entry = self._entry(name)
        size = ITEM_SIZE[entry.info.dtype]
        if not 0 <= start <= stop <= entry.info.numel:
            raise IndexError(f"{name}: no elements [{start}, {stop})")
        if len(buffer) != (stop - start) * size:
            raise ValueError(
                f"{name}: the buffer holds {len(buffer)} bytes, "
                f"{(stop - start) * size} are to be read"
            )
        if stop > start:
            entry.read_into(start, buffer)

    @cached_property
    def aliases(self):
        """Tied tensors: `{name: first name of its group}`, ties only."""
        first, tied = {}, {}
        for name, entry in self._entries.items():
            if (identity := entry.identity) is None:
                continue
            origin = first.setdefault(identity, name)
            if origin != name:
                tied[name] = origin
                tied[origin] = origin
        return tied

    @cached_property
    def fingerprint(self):
        """SHA-256 over names, dtypes, shapes and bytes; equal weights have
        equal fingerprints in every format. Computed once, on first use."""
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(self.digest, self._entries))
        return fingerprints.combine(dict(zip(self._entries, digests)))

    def verify(self):
        """Check the bytes against the checksums that the file carries.

        Opening checks structure only (so that it stays lazy); what edits or
        merges weights calls this first.

        Raises
        ------
        ValueError
            The file was altered after it was written.
        """
        if self._check is not None:
            self._check(self)

    def digest(self, name):
        """Return a tensor's hash, a leaf of the fingerprint; thread-safe.

        Arguments
        ---------
        name : str
            The parameter's name.

        Returns
        -------
        bytes
            SHA-256 over name, dtype, shape and bytes.
        """
        entry = self._entry(name)
        digest = fingerprints.leaf(name, entry.info)
        step = _HASH_BLOCK // ITEM_SIZE[entry.info.dtype]
        buffer = np.empty(min(_HASH_BLOCK, entry.info.nbytes), np.uint8)
        for start in range(0, entry.info.numel, step):
            stop = min(start + step, entry.info.numel)
            part = buffer[: (stop - start) * ITEM_SIZE[entry.info.dtype]]
            entry.read_into(start, part)
            digest.update(part)
        return digest.digest()

    def _entry(self, name):
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(f"{self.label} holds no tensor {name!r}") from None


def is_running_statistic(name):
    """Tell whether a name is that of a running mean or variance.

    They stay the base's unless asked for, since adding differences of
    variances can make a variance negative.

    Arguments
    ---------
    name : str
        A tensor's name, as `torch.nn.BatchNorm1d` and its kin give it.

    Returns
    -------
    bool
        True for running statistics.

    Example
    -------
    >>> is_running_statistic("norm.running_var")
    True
    """
    return name.endswith(("running_mean", "running_var"))


def as_state(source):
    """Return a `State` for a path, a module, a mapping or a `State`.

    Arguments
    ---------
    source : str, pathlib.Path, torch.nn.Module, mapping of tensors, State
        A module wrapped by `DistributedDataParallel` is unwrapped, since
        vectors are keyed by the checkpoint's own names.

    Returns
    -------
    State
        A view: the tensors are not copied.

    Raises
    ------
    TypeError
        For anything else.
    ValueError
        A mapping without weights, or with an entry that is no tensor.

    Example
    -------
    >>> import torch
    >>> as_state({"w": torch.zeros(2, 3)}).info("w")
    TensorInfo(dtype='F32', shape=(2, 3))
    """
    if isinstance(source, State):
        return source
    if isinstance(source, (str, os.PathLike)):
        from speechbrain_taskarith.vectors.states.readers import open_state

        return open_state(source)
    if isinstance(source, Mapping):
        return from_mapping(source, "the mapping")
    if hasattr(source, "state_dict") and hasattr(source, "parameters"):
        if type(source).__name__ == "DistributedDataParallel":
            source = source.module
        return from_mapping(source.state_dict(), type(source).__name__)
    raise TypeError(
        "expected weights as a path, a torch.nn.Module, a mapping from name "
        f"to tensor or a State, got {type(source).__name__}"
    )


def from_mapping(content, label):
    """Make a state out of a mapping, which may be nested one level.

    Arguments
    ---------
    content : mapping
        From name to tensor, or with such a mapping under `state_dict`,
        `model_state_dict`, `model` or `module`.
    label : str
        What to call it in errors.

    Returns
    -------
    State
        A view.

    Raises
    ------
    ValueError
        No tensors there, or other things among them.
    """
    import torch

    for key in NESTED:
        inner = content.get(key)
        if isinstance(inner, Mapping) and inner:
            content = inner
            break
    entries = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            hint = (
                " (an optimizer's state)"
                if {"state", "param_groups"} <= set(content)
                else ""
            )
            raise ValueError(
                f"{label}: entry {name!r} is a {type(value).__name__}, "
                f"expected a tensor{hint}. Pass a state dict, or a mapping "
                f"that holds one under {', '.join(NESTED)}"
            )
        entries[str(name)] = _LoadedTensor(value)
    if not entries:
        raise ValueError(f"{label}: holds no tensors")
    return State(entries)
