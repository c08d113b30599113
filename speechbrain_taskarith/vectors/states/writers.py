"""Writing weights: safetensors, torch files, sharded Hugging Face folders.

All writing is atomic. SpeechBrain checkpoint folders, which hold more than
weights, are written by `checkpoint_folder`.
"""

import errno
import json
import shutil
from pathlib import Path

import numpy as np

from speechbrain_taskarith.utils.files import (
    atomic_folder,
    atomic_write,
    write_json,
)
from speechbrain_taskarith.vectors.states.readers import TORCH_SUFFIXES
from speechbrain_taskarith.vectors.states.safetensors import (
    ITEM_SIZE,
    SafetensorsWriter,
)
from speechbrain_taskarith.vectors.states.state import as_state

_BLOCK = 1 << 22
# Kept out of a Hugging Face folder that is written after another one: these
# hold the old weights.
_WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
)


def save_state(
    state, path, *, metadata=None, shard_size=5_000_000_000, like=None
):
    """Write weights; the form follows from the path. Atomic.

    Arguments
    ---------
    state : mapping, torch.nn.Module, State or path
        What to write. Tied tensors stay tied in torch files; the other forms
        hold each name's bytes.
    path : str or pathlib.Path
        `x.safetensors`; `x.ckpt`, `x.pt`, `x.pth` or `x.bin` (a plain state
        dict by `torch.save`); a name that starts with `CKPT+` (a SpeechBrain
        checkpoint folder with the recoverable `model`); any other name
        without suffix is a Hugging Face folder.
    metadata : dict or None
        Plain values to keep beside the weights: in the header of a
        safetensors file, in `CKPT.yaml`, else in `<path>.json`.
    shard_size : int
        Largest file of a Hugging Face folder, in bytes.
    like : str, pathlib.Path or None
        For a folder: another one whose further content is taken along
        (Hugging Face: `config.json`, feature extractor, tokenizer;
        SpeechBrain: the other recoverables, see `save_checkpoint`).

    Returns
    -------
    pathlib.Path
        The path written.

    Raises
    ------
    ValueError
        An unknown suffix.
    OSError
        Naming the path (a full disk, ...); what stood there is unchanged.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.vectors import open_state
    >>> path = str(getfixture("tmpdir") / "model.safetensors")
    >>> _ = save_state({"w": torch.ones(2)}, path, metadata={"step": 3})
    >>> open_state(path)["w"], open_state(path).metadata["step"]
    (tensor([1., 1.]), '3')
    """
    path, state = Path(path), as_state(state)
    if path.suffix == ".safetensors":
        _save_safetensors(state, path, metadata)
    elif path.suffix in TORCH_SUFFIXES:
        _save_torch(state, path, metadata)
    elif path.name.startswith("CKPT+"):
        from speechbrain_taskarith.vectors.states.speechbrain_folder import (
            save_checkpoint,
        )

        save_checkpoint({"model": state}, path, like=like, metadata=metadata)
    elif not path.suffix or path.is_dir():
        _save_folder(state, path, metadata, shard_size, like)
    else:
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}; expected .safetensors, "
            f"{', '.join(TORCH_SUFFIXES)}, a folder, or a CKPT+ folder"
        )
    return path


def as_text(metadata):
    """Return metadata as the texts that a safetensors header may hold.

    Arguments
    ---------
    metadata : dict or None
        Plain values.

    Returns
    -------
    dict
        Texts as they are, everything else as JSON.
    """
    return {
        str(key): value if isinstance(value, str) else json.dumps(value)
        for key, value in (metadata or {}).items()
    }


def _save_safetensors(state, path, metadata, names=None):
    names = list(state) if names is None else names
    # The fingerprint in the header is what `State.verify` checks.
    header = {"format": "pt", **as_text(metadata)}
    if len(names) == len(state):
        header["fingerprint"] = state.fingerprint
    infos = {name: state.info(name) for name in names}
    with SafetensorsWriter(path, infos, header) as out:
        for name, info in infos.items():
            size = ITEM_SIZE[info.dtype]
            step = _BLOCK // size
            for start in range(0, info.numel, step):
                stop = min(start + step, info.numel)
                buffer = np.empty((stop - start) * size, np.uint8)
                state.read_into(name, start, stop, buffer)
                out.write(name, start, buffer)


def _save_torch(state, path, metadata):
    import torch

    # One tensor object per tied group: torch.save then keeps them tied. A
    # view is saved alone, not with the whole storage it lies in.
    kept = {}
    for name in state:
        origin = state.aliases.get(name, name)
        if origin not in kept:
            kept[origin] = _alone(state[origin])
    content = {n: kept[state.aliases.get(n, n)] for n in state}
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
    if metadata:
        write_json(f"{path}.json", dict(metadata))


def _alone(tensor):
    tensor = tensor.detach().cpu()
    size = tensor.numel() * tensor.element_size()
    whole = tensor.untyped_storage().nbytes()
    return tensor.contiguous() if size == whole else tensor.clone()


def _save_folder(state, path, metadata, shard_size, like):
    shards = _shards(state, shard_size)
    with atomic_folder(path) as folder:
        if like is not None:
            _copy_other_files(Path(like), folder)
        if len(shards) == 1:
            names = ["model.safetensors"]
        else:
            total = len(shards)
            names = [
                f"model-{i + 1:05d}-of-{total:05d}.safetensors"
                for i in range(total)
            ]
        for file, members in zip(names, shards):
            _save_safetensors(state, folder / file, metadata, members)
        if len(shards) > 1:
            size = sum(state.info(name).nbytes for name in state)
            index = {
                "metadata": {"total_size": size},
                "weight_map": {
                    name: file
                    for file, members in zip(names, shards)
                    for name in members
                },
            }
            write_json(folder / "model.safetensors.index.json", index)


def _shards(state, shard_size):
    shards, filled = [[]], 0
    for name in state:
        size = state.info(name).nbytes
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _copy_other_files(source, folder):
    for file in source.iterdir():
        if file.is_file() and not any(file.match(p) for p in _WEIGHT_FILES):
            shutil.copy2(file, folder / file.name)
