"""What `torch.save` writes: tensors only, mapped where possible."""

import errno
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.hub.cards import (
    KEY,
    card_path,
    read_card,
    write_card,
)
from speechbrain_taskarith.vectors.states.safetensors import damaged
from speechbrain_taskarith.vectors.states.state import (
    PLAIN,
    from_mapping,
    inside,
)

# Bytes of a tensor up to which a view may be larger than its file.
_ENDLESS = 1 << 28

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def open_torch_file(path, shown_as=None, metadata=None, key=None):
    """Open a state dict, maybe nested; `shown_as` is the folder it is of."""
    content = load_torch_file(path)
    if key is not None and isinstance(content, Mapping):
        content = inside(content, key, str(path))
    if not isinstance(content, Mapping):
        where = f" under {key!r}" if key else ""
        raise ValueError(
            f"{path}: holds a {type(content).__name__}{where}, expected a state "
            "dict (a mapping from parameter name to tensor)"
        )
    if {"glob_mean", "glob_std"} <= set(content):
        raise ValueError(
            f"{path}: holds the statistics of an input normaliser, no "
            "weights; pool_normalizers combines those"
        )

    def check(_):
        # The CRC-32 that torch stores with every tensor.
        try:
            if not zipfile.is_zipfile(path):
                return
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except (OSError, MemoryError):
            raise
        except Exception as error:
            # Also what a damaged name or version makes it raise.
            what = f"is not a complete archive ({error})"
            raise damaged(path, what) from None
        if bad is not None:
            raise damaged(path, f"the checksum of {bad!r} does not fit")

    return from_mapping(content, str(path), shown_as or path, metadata, check)


def load_torch_file(path):
    """Load a file on the CPU; a pickle that would execute code is refused."""
    import pickle

    import torch

    with open(path, "rb") as stream:
        # Only the zip form can be mapped; the form of torch < 1.6 is read.
        mapped = stream.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(
            path, map_location="cpu", mmap=mapped, weights_only=True
        )
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors and plain values, or is damaged"
        if called := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"loading it would call {called[1]}, code in the file"
        raise ValueError(
            f"{path}: refused: {reason}. Save the plain state dict (tensors "
            "only) with torch.save and use that file."
        ) from None
    except OSError:
        raise  # the machine's fault, not the file's
    except MemoryError:
        reason = "not enough memory to read it, or its sizes are damaged"
        raise OSError(errno.ENOMEM, reason, str(path)) from None
    except Exception as error:
        # The unpickler raises whatever the bytes make it trip over: an
        # IndexError for a counter's text.
        reason = str(error).strip().splitlines()[0] if str(error) else error
        raise damaged(path, f"torch cannot read it ({reason})") from None
    _refuse_endless(content, path)
    return content


def _refuse_endless(content, path):
    """Refuse tensors that repeat a few stored numbers without end.

    A view with stride 0 may claim any size; one flipped bit is enough.
    """
    import torch

    most = max(_ENDLESS, 16 * Path(path).stat().st_size)
    waiting = [(str(path), content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, torch.Tensor) and (
            value.numel() * value.element_size() > most
        ):
            shape = tuple(value.shape)
            raise damaged(
                path, f"{name} claims the shape {shape}, far beyond the file"
            )


def save_torch_file(state, path, metadata=None):
    """Write a plain state dict; metadata goes to its card, `<path>.md`."""
    import torch

    # One tensor object per tied group: torch.save then keeps them tied. A
    # view is saved alone, not with the whole storage it lies in.
    tensors = {}
    for name in state:
        origin = state.aliases.get(name, name)
        if origin not in tensors:
            tensor = state[origin].cpu()
            size = tensor.numel() * tensor.element_size()
            alone = size == tensor.untyped_storage().nbytes()
            tensors[origin] = tensor.contiguous() if alone else tensor.clone()
    content = {n: tensors[state.aliases.get(n, n)] for n in state}
    content |= _stored_extra(state, path)
    with atomic_write(path) as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # torch wraps a failing write (a full disk) in its own error.
            raise OSError(
                errno.EIO,
                f"torch.save could not write ({str(error).splitlines()[0]}); "
                "is the disk full? Nothing under this name was changed",
                str(path),
            ) from error
    card = card_path(path)
    if metadata:
        write_card(card, {KEY: dict(metadata)}, f"# {Path(path).name}\n")
    elif read_card(path):
        # It told of the weights that stood here before.
        card.unlink()


def _stored_extra(state, path):
    """Return what is no tensor, in types that are read without code."""
    import numpy as np
    import torch

    def stored(value, name):
        if isinstance(value, Mapping):
            return {stored(k, name): stored(v, name) for k, v in value.items()}
        if isinstance(value, (list, tuple, set)):
            kind = next(k for k in (list, tuple, set) if isinstance(value, k))
            return kind(stored(entry, name) for entry in value)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, (torch.Tensor, *PLAIN)):
            return value
        raise ValueError(
            f"{path}: the entry {name!r} of {state.label} holds a "
            f"{type(value).__name__}, which cannot be read again without "
            "executing code. Let get_extra_state return tensors, numbers, "
            "texts, lists and dicts"
        )

    return {name: stored(value, name) for name, value in state.extra.items()}
