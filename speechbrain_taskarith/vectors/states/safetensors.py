"""The safetensors format, read and written piece by piece.

The `safetensors` package gives whole tensors; merging models in bounded
memory needs a range of elements of one tensor at a time, into buffers that
are used again, from several threads, without importing torch. The format is
eight bytes of header length, a JSON header, the bytes: small enough to hold
here, and the tests read every file of ours with the package and the other
way round.
"""

import errno
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from speechbrain_taskarith.utils.files import (
    destination,
    fsync_directory,
    temporary_file,
    write_at,
    write_error,
)

# The dtypes that the format knows and that we handle: bytes per element, and
# torch's name.
_DTYPES = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
    "U16": (2, "uint16"),
    "U32": (4, "uint32"),
    "U64": (8, "uint64"),
    "C64": (8, "complex64"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
}
ITEM_SIZE = {name: size for name, (size, _) in _DTYPES.items()}
TORCH_NAME = {name: torch_name for name, (_, torch_name) in _DTYPES.items()}
# The dtypes that are edited.
FLOATING = ("F64", "F32", "F16", "BF16")

# Metadata of our files: the hash of all tensors, and that there is one.
FINGERPRINT, CHECKED = "fingerprint", "checked_by"

# What a header that is not ours may raise on the way.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
# The package refuses longer headers too: a length read from a damaged file
# must not make us allocate the machine's memory.
_LONGEST_HEADER = 100_000_000


class TensorInfo(NamedTuple):
    """Safetensors dtype (`"F32"`, `"BF16"`, ...) and shape of a tensor."""

    dtype: str
    shape: tuple

    numel = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.numel * ITEM_SIZE[self.dtype])
    # Only these types are edited.
    floating = property(lambda self: self.dtype in FLOATING)


def damaged(path, what):
    """Return the error for a file that is not what its name says."""
    return ValueError(
        f"{path}: {what}. The file is truncated, altered or of another "
        "format; copy it again from its source or write it again."
    )


def read_header(path):
    """Read and check a header: `{name: (TensorInfo, offset)}`, metadata.

    Offsets are in bytes from the start of the file, in the order of the file.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise damaged(path, f"has {size} bytes, too few for a header")
        length = int.from_bytes(start, "little")
        if length > min(size - 8, _LONGEST_HEADER):
            what = f"its header claims {length} bytes, {size - 8} are there"
            raise damaged(path, what)
        text = stream.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        for value in metadata.values():
            if not isinstance(value, str):
                raise ValueError(f"its metadata holds {value!r}, expected text")
        entries = {}
        for name, entry in header.items():
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if not isinstance(dtype, str):
                raise ValueError(f"dtype {dtype!r}")
            for number in (*shape, begin, end):
                if type(number) is not int or number < 0:
                    raise ValueError(f"{number!r} is not a size")
            entries[name] = (TensorInfo(dtype, shape), begin, end)
    except _UNREADABLE as error:
        raise damaged(path, f"its header cannot be read ({error})") from None
    # Tensors lie one behind the other, without gaps, up to the end.
    tensors, expected = {}, 0
    for name in sorted(entries, key=lambda name: entries[name][1:]):
        info, begin, end = entries[name]
        if info.dtype not in ITEM_SIZE:
            raise damaged(path, f"tensor {name!r} has dtype {info.dtype!r}")
        if begin != expected or end - begin != info.nbytes:
            what = f"tensor {name!r} does not lie where its shape says"
            raise damaged(path, what)
        expected = end
        tensors[name] = (info, 8 + length + begin)
    if (said := 8 + length + expected) != size:
        raise damaged(path, f"has {size} bytes, its header says {said}")
    return tensors, metadata


class SafetensorsWriter:
    """Write a safetensors file tensor by tensor, or range by range.

    The file has its final size from the start (so a full disk is found
    before the work) and a temporary name until `close`. `write` may be
    called from several threads.

    `tensors` is `{name: TensorInfo}`, in the order to be written. Texts of
    the `metadata` may be replaced at `close` by others of the same length (a
    hash known only at the end). `temporary` is where the file lies until
    then; what was written so far can be read there.
    """

    def __init__(self, path, tensors, metadata=None):
        self.path = Path(path)
        self.metadata = dict(metadata or {})
        # Widest elements first keeps every tensor aligned, as the package
        # itself writes them.
        order = sorted(tensors, key=lambda n: -ITEM_SIZE[tensors[n].dtype])
        self.tensors = {name: tensors[name] for name in order}
        header = self._header()
        self._data_start = len(header)
        self._offsets, end = {}, self._data_start
        for name, info in self.tensors.items():
            self._offsets[name] = end
            end += info.nbytes
        self._target = destination(self.path)
        self._file, self.temporary = temporary_file(self._target)
        try:
            _allocate(self._file, end)
            write_at(self._file, header, 0)
        except OSError as error:
            self.abort()
            raise write_error(error, self.path) from error

    def write(self, name, start, data):
        """Write a tensor's elements from `start` on, as bytes of its dtype."""
        info = self.tensors[name]
        offset = start * ITEM_SIZE[info.dtype]
        data = memoryview(data).cast("B")
        if offset + len(data) > info.nbytes:
            raise ValueError(f"{self.path}: too many bytes for {name!r}")
        try:
            write_at(self._file, data, self._offsets[name] + offset)
        except OSError as error:
            raise write_error(error, self.path) from error

    def close(self, **metadata):
        """Give the file its final name, and metadata of the same length."""
        try:
            if metadata:
                self.metadata.update(metadata)
                header = self._header()
                if len(header) != self._data_start:
                    raise ValueError("metadata at close must keep its length")
                write_at(self._file, header, 0)
            os.fsync(self._file)
            os.replace(self.temporary, self._target)
        except OSError as error:
            self.abort()
            raise write_error(error, self.path) from error
        os.close(self._file)
        self._file = None
        fsync_directory(self._target.parent)

    def abort(self):
        """Remove the temporary file; what stood under the name stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self.temporary.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.abort()
        elif self._file is not None:
            self.close()

    def _header(self):
        header, begin = {}, 0
        if self.metadata:
            # Says that there is a fingerprint, should its name be damaged.
            marks = (
                {CHECKED: FINGERPRINT} if FINGERPRINT in self.metadata else {}
            )
            header["__metadata__"] = {**self.metadata, **marks}
        for name, info in self.tensors.items():
            header[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [begin, begin + info.nbytes],
            }
            begin += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _allocate(descriptor, size):
    """Reserve the file's space now, so that a full disk shows at once."""
    if not hasattr(os, "posix_fallocate"):
        os.ftruncate(descriptor, size)
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        # Some file systems cannot reserve; there the write fails.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
