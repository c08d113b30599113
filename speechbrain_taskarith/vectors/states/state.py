"""One lazy, read-only view of weights, whatever they are stored in.

`readers` makes states out of files, `writers` writes them. Nothing here
imports torch until a tensor is asked for, so that tools which only stream
bytes stay small.
"""

import copy
import hashlib
import mmap
import os
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np

from speechbrain_taskarith.utils.patterns import rename as rename_all
from speechbrain_taskarith.vectors.states.safetensors import (
    ITEM_SIZE,
    TORCH_NAME,
    TensorInfo,
    damaged,
)

_SAFETENSORS_NAME = {name: key for key, name in TORCH_NAME.items()}

# Where training scripts put the weights inside a larger checkpoint.
NESTED = ("state_dict", "model_state_dict", "model", "module")

# The entry of the metadata that makes stored tensors a task vector.
TASK_VECTOR = "task_vector"
CHECKSUM = f"{TASK_VECTOR}_checksum"

# What torch calls what a module stores besides tensors (`get_extra_state`).
EXTRA_STATE = "_extra_state"
# What a module's counters and settings may be.
PLAIN = (type(None), bool, int, float, complex, str, bytes)

_HASH_BLOCK = 1 << 22


class OpenFile:
    """A file that stays open while anything holds a tensor of it."""

    def __init__(self, path):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError(
            f"{self.path}: is open here, and cannot be sent to another "
            "process; send the path, and open it there"
        )


class StoredTensor(NamedTuple):
    """A tensor as a range of bytes in an open file."""

    file: OpenFile
    info: TensorInfo
    offset: int  # of its first byte in the file

    # Files hold each name's bytes: no tensor is tied to another.
    identity = None

    def read_into(self, start, buffer):
        """Fill a buffer of bytes, from element `start` on."""
        position = self.offset + start * ITEM_SIZE[self.info.dtype]
        view = memoryview(buffer)
        while view:
            count = os.preadv(self.file.descriptor, [view], position)
            if not count:
                raise damaged(self.file.path, "ends before its last tensor")
            view, position = view[count:], position + count

    def tensor(self):
        """Return it as a torch tensor."""
        import torch

        info = self.info
        dtype = getattr(torch, TORCH_NAME[info.dtype])
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
        run = {"count": info.numel, "offset": slack}
        return torch.frombuffer(mapped, dtype=dtype, **run).reshape(info.shape)


class LoadedTensor:
    """A tensor that torch holds: of a module, a dict, or a mapped file."""

    def __init__(self, tensor):
        plain = str(tensor.dtype).removeprefix("torch.")
        self._tensor = tensor.detach().resolve_conj().resolve_neg()
        self.info = TensorInfo(_SAFETENSORS_NAME[plain], tuple(tensor.shape))

    identity = property(lambda self: memory_identity(self._tensor))

    @cached_property
    def _bytes(self):
        import torch

        flat = self._tensor.to("cpu").contiguous().reshape(-1)
        if not flat.numel():
            return np.empty(0, dtype=np.uint8)
        # The stride of a single element may be any.
        flat = flat.as_strided(flat.shape, (1,))
        return flat.view(torch.uint8).numpy()

    def read_into(self, start, buffer):
        """See `StoredTensor.read_into`."""
        begin = start * ITEM_SIZE[self.info.dtype]
        buffer[:] = self._bytes[begin : begin + len(buffer)]

    def tensor(self):
        """Return it."""
        return self._tensor


def memory_identity(tensor):
    """Return what two tensors share that show the same memory the same way.

    None for tensors without memory of their own (empty, meta).
    """
    if not tensor.numel() or tensor.device.type == "meta":
        return None
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return tensor.device, tensor.data_ptr(), shape, stride


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
        What `verify` calls with this state.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.vectors import as_state
    >>> state = as_state(torch.nn.Linear(2, 3))
    >>> list(state), state["weight"].shape
    (['weight', 'bias'], torch.Size([3, 2]))
    """

    def __init__(self, entries, path=None, metadata=None, check=None):
        self.entries = entries
        self.path = path
        # What to call these weights in messages.
        self.label = str(path) if path else "weights in memory"
        self.metadata = dict(metadata or {})
        self._check = check
        # The stored weights that these are under other names (`renamed`).
        self.source = None
        # Names of the module they were opened for that they do not cover.
        self.left_out = ()
        # Entries of the state dict that are no tensors. They are carried
        # along; they are neither edited nor part of the fingerprint.
        self.extra = {}
        # Recoverables whose weights these are together, each under its name.
        self.networks = ()
        # Tensors of types or layouts that are not read, and why.
        self.unreadable = {}

    def __getitem__(self, name):
        self.info(name)
        return self.entries[name].tensor()

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)

    def __contains__(self, name):
        return name in self.entries

    # Comparing tensor by tensor is `fingerprint`'s work.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self):
        return f"State({self.label}, {len(self)} tensors)"

    def info(self, name):
        """Return a tensor's dtype and shape, without reading it.

        See `TensorInfo`: also `.numel`, `.nbytes`, `.floating`.
        """
        try:
            return self.entries[name].info
        except KeyError:
            if name in self.unreadable:
                raise unreadable_error(self, [name]) from None
            raise KeyError(f"{self.label} holds no tensor {name!r}") from None

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
        info = self.info(name)
        size = ITEM_SIZE[info.dtype]
        if not 0 <= start <= stop <= info.numel:
            raise IndexError(f"{name}: no elements [{start}, {stop})")
        if len(buffer) != (stop - start) * size:
            raise ValueError(
                f"{name}: the buffer holds {len(buffer)} bytes, "
                f"{(stop - start) * size} are to be read"
            )
        if stop > start:
            self.entries[name].read_into(start, buffer)

    def rename(self, rename=None, prefix=None) -> "State":
        """Return these weights under other names.

        Arguments
        ---------
        rename : dict or None
            `{pattern: replacement}`, after the prefix is gone: the first
            pattern that fits a name wins, `*` in the replacement stands for
            what `*` in the pattern does; other names stay.
        prefix : str or None
            What stands in front of the names that are wanted, and is taken
            away; names without it are left out.

        Returns
        -------
        State
            Lazy, of the same tensors. ValueError where a pattern or the
            prefix fits no name, or two names become one.

        Example
        -------
        >>> import torch
        >>> from speechbrain_taskarith.vectors import as_state
        >>> state = as_state({"enc.w.g": torch.ones(1), "head": torch.ones(1)})
        >>> list(state.rename({"*.g": "*.gain"}, prefix="enc."))
        ['w.gain']
        """
        held = (self.entries, self.extra, self.unreadable)
        names = [name for part in held for name in part]
        new = rename_all(names, rename, prefix, self.label)
        entries, extra, unreadable = (
            {new[name]: part[name] for name in part if name in new}
            for part in held
        )
        result = renamed(self, entries)
        result.extra, result.unreadable = extra, unreadable
        result.networks = ()
        return result

    @cached_property
    def aliases(self):
        """Tied tensors: `{name: first name of its group}`, ties only."""
        first, tied = {}, {}
        for name, entry in self.entries.items():
            # Of what has no memory of its own: names of one entry.
            identity = entry.identity or id(entry)
            origin = first.setdefault(identity, name)
            if origin != name:
                tied[name] = tied[origin] = origin
        return tied

    def to_dict(self):
        """Return a copy as a state dict.

        Returns
        -------
        dict
            `{name: tensor}`; tied tensors stay tied, and what is no tensor
            (`extra`) comes along.
        """
        origins = {name: self.aliases.get(name, name) for name in self}
        copies = {name: self[name].clone() for name in set(origins.values())}
        result = {name: copies[origin] for name, origin in origins.items()}
        return result | copy.deepcopy(self.extra)

    @cached_property
    def fingerprint(self):
        """SHA-256 over names, dtypes, shapes and bytes; equal weights have
        equal fingerprints in every format. Computed once, on first use."""
        if sum(e.info.nbytes for e in self.entries.values()) < _HASH_BLOCK:
            # Starting threads would take longer than hashing.
            digests = list(map(self.digest, self.entries))
        else:
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                digests = list(pool.map(self.digest, self.entries))
        return fingerprint_of(dict(zip(self.entries, digests)))

    def digest(self, name):
        """Return a tensor's hash, a leaf (see `fingerprint`); thread-safe.

        SHA-256 over name, dtype, shape and bytes, as bytes.
        """
        info, entry = self.info(name), self.entries[name]
        dtype, shape = info
        start = f"{name}\0{dtype}\0{','.join(map(str, shape))}\0"
        digest = hashlib.sha256(start.encode())
        step = _HASH_BLOCK // ITEM_SIZE[dtype]
        buffer = np.empty(min(_HASH_BLOCK, info.nbytes), np.uint8)
        for start in range(0, info.numel, step):
            stop = min(start + step, info.numel)
            part = buffer[: (stop - start) * ITEM_SIZE[dtype]]
            entry.read_into(start, part)
            digest.update(part)
        return digest.digest()

    def fingerprints(self):
        """Give the fingerprints that a vector of these weights may carry.

        Returns
        -------
        iterator of str
            The own one, then that under the names they are stored by; each
            is computed when it is asked for.
        """
        yield self.fingerprint
        if self.source is not None:
            yield from self.source.fingerprints()

    def verify(self):
        """Check the bytes against the checksums that the file carries.

        Opening checks structure only (so that it stays lazy); what edits or
        merges weights calls this first. ValueError for an altered file.
        """
        if self._check is not None:
            self._check(self)


def fingerprint_of(digests):
    """Make a fingerprint out of `{name: State.digest}`, in any order.

    A hash over one hash a tensor: threads may hash tensors side by side.
    """
    root = hashlib.sha256()
    for name in sorted(digests):
        root.update(digests[name])
    return root.hexdigest()


def short(fingerprint):
    """Return the first 12 digits, enough for people and messages."""
    return fingerprint[:12] if fingerprint else "none"


def renamed(state, entries):
    """Return a state's weights as other `entries`; it is their `source`."""
    result = State(
        entries, state.path, state.metadata, lambda _: state.verify()
    )
    result.label, result.source = state.label, state
    result.extra, result.unreadable = state.extra, state.unreadable
    result.networks = state.networks
    return result


def unreadable_error(state, names, remedy="exclude it"):
    """Return the error for tensors that cannot be read."""
    name = names[0]
    more = f" ({len(names)} such tensors)" if len(names) > 1 else ""
    return ValueError(
        f"{state.label}: {name!r} is {state.unreadable[name]}{more}, which is "
        f"neither read nor edited. Restore floating point weights, or {remedy}"
    )


def _unreadable(tensor):
    """Return why a tensor cannot be read, or None."""
    if str(tensor.layout) != "torch.strided":
        return f"of layout {tensor.layout}"
    if str(tensor.dtype).removeprefix("torch.") not in _SAFETENSORS_NAME:
        return f"of type {tensor.dtype}"
    return None


def is_extra(name):
    """Tell whether a name is one of a module's extra state, never edited."""
    return name.rpartition(".")[2] == EXTRA_STATE


def inside(content, key, label):
    """Return what lies under `model.state_dict` in nested mappings."""
    if key in content:
        return content[key]
    parts = key.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        inner = content.get(".".join(parts[:depth]))
        if isinstance(inner, Mapping):
            return inside(inner, ".".join(parts[depth:]), label)
    there = ", ".join(map(str, list(content)[:9]))
    raise KeyError(f"{label}: holds no {key!r}; there are: {there}")


def from_mapping(content, label, path=None, metadata=None, check=None):
    """Make a state of a mapping, which may be nested one level (`NESTED`).

    Entries that are no tensors go to `State.extra`, if they are a module's
    extra state or plain values; others are refused, since what is meant may
    be inside.
    """
    import torch

    for key in NESTED:
        inner = content.get(key)
        if isinstance(inner, Mapping) and inner:
            content = inner
            break
    optimizer = {"state", "param_groups"} <= set(content)
    entries, extra, unreadable = {}, {}, {}
    for name, value in content.items():
        name = str(name)
        if isinstance(value, torch.Tensor):
            if found := _unreadable(value):
                unreadable[name] = found
            else:
                entries[name] = LoadedTensor(value)
        elif is_extra(name) or (_is_plain(value) and not optimizer):
            extra[name] = value
        else:
            hint = " (an optimizer's state)" if optimizer else ""
            raise ValueError(
                f"{label}: entry {name!r} is a {type(value).__name__}, "
                f"expected a tensor{hint}. Pass a state dict, or a mapping "
                f"that holds one under {', '.join(NESTED)}"
            )
    state = State(entries, path, metadata, check)
    state.extra, state.unreadable = extra, unreadable
    if not entries:
        if unreadable:
            raise unreadable_error(state, list(unreadable), "use others")
        raise ValueError(f"{label}: holds no tensors")
    return state


def _is_plain(value):
    """Tell whether a value is plain data, without a tensor anywhere in it."""
    if isinstance(value, Mapping):
        optimizer = {"state", "param_groups"} <= set(value)
        return not optimizer and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    # NumPy's numbers, but no arrays: those may be weights.
    return isinstance(value, (*PLAIN, np.generic))
