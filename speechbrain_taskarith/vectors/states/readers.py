"""Opening stored weights, whatever form they are stored in.

`open_state` reads SpeechBrain checkpoint folders, `.ckpt/.pt/.pth/.bin`,
safetensors, and (sharded) Hugging Face folders. Nothing here executes code
found in a file.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from speechbrain_taskarith.utils.files import read_json
from speechbrain_taskarith.vectors.states.safetensors import (
    damaged,
    read_header,
)
from speechbrain_taskarith.vectors.states.state import (
    FileHandle,
    State,
    StoredTensor,
    from_mapping,
)

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def open_state(path, *, recoverable=None):
    """Open stored weights lazily, without executing anything.

    Arguments
    ---------
    path : str or pathlib.Path
        One of: a SpeechBrain checkpoint folder (`CKPT+...`), or a folder of
        such folders (the newest is taken); a `.ckpt`, `.pt`, `.pth` or
        `.bin` file of `torch.save` (the weights may lie inside under
        `state_dict`, `model_state_dict`, `model` or `module`); a
        `.safetensors` file; a Hugging Face folder, sharded or not.
    recoverable : str or None
        In a SpeechBrain folder, whose weights; by default `model`, or else
        the only recoverable that is a state dict.

    Returns
    -------
    State
        Lazy, read-only, memory-mapped.

    Raises
    ------
    FileNotFoundError
        Nothing stands there; or a shard or recoverable is missing.
    ValueError
        Damaged, of an unknown format, or a pickle with more than tensors.

    Example
    -------
    >>> import torch
    >>> path = str(getfixture("tmpdir") / "model.ckpt")
    >>> torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    >>> open_state(path).info("weight")
    TensorInfo(dtype='F32', shape=(3, 2))
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, recoverable)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such checkpoint. Expected a CKPT+ folder, a folder "
            "that holds some, a Hugging Face folder, or a .ckpt, .pt, .bin "
            "or .safetensors file"
        )
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch(path)
    raise ValueError(
        f"{path}: unknown suffix {path.suffix!r}; expected one of "
        f".safetensors, {', '.join(TORCH_SUFFIXES)}"
    )


def _open_safetensors(path):
    tensors, metadata = read_header(path)
    file = FileHandle(path)
    entries = {
        name: StoredTensor(file, info, offset)
        for name, (info, offset) in tensors.items()
    }
    return State(entries, path, metadata, _fingerprint_check(path, metadata))


def _fingerprint_check(path, metadata):
    """Make the check for files that carry the fingerprint we wrote."""

    def check(state):
        if metadata.get("fingerprint", state.fingerprint) != state.fingerprint:
            raise damaged(path, "its tensors are not those it was written with")

    return check if "fingerprint" in metadata else None


def _open_torch(path):
    content = load_torch_file(path)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, expected a state "
            "dict (a mapping from parameter name to tensor)"
        )
    state = from_mapping(content, str(path))
    state.path, state._check = path, _archive_check(path)
    return state


def load_torch_file(path):
    """Load what `torch.save` wrote, tensors only, mapped where possible.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.

    Returns
    -------
    object
        Its content, on the CPU.

    Raises
    ------
    ValueError
        Truncated or altered, or a pickle that would execute code.
    """
    import pickle

    import torch

    mapped = True
    with open(path, "rb") as stream:
        # Only the zip form can be mapped; the form of torch < 1.6 is read.
        mapped = stream.read(4) == b"PK\x03\x04"
    try:
        return torch.load(
            path, map_location="cpu", mmap=mapped, weights_only=True
        )
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"loading it would call {called[1]}, code stored in the file"
            if called
            else "it holds more than tensors and plain values, or is damaged"
        )
        raise ValueError(
            f"{path}: refused: {reason}. Save the plain state dict (tensors "
            "only) with torch.save and use that file."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else error
        raise damaged(path, f"torch cannot read it ({reason})") from None


def _archive_check(path):
    """Make the check of the CRC-32 that torch stores with every tensor."""

    def check(_):
        import zipfile

        if not zipfile.is_zipfile(path):
            return
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, EOFError) as error:
            raise damaged(path, f"is no whole archive ({error})") from None
        if bad is not None:
            raise damaged(path, f"the checksum of {bad!r} does not fit")

    return check


def _open_folder(folder, recoverable):
    if (folder / "CKPT.yaml").exists():
        return _open_checkpoint(folder, recoverable)
    newest = newest_checkpoint(folder)
    if newest is not None:
        return _open_checkpoint(newest, recoverable)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{stem}.index.json").exists():
            return _open_shards(folder, folder / f"{stem}.index.json")
        if (folder / stem).exists():
            state = open_state(folder / stem)
            state.path = folder
            return state
    raise ValueError(
        f"{folder}: holds no weights that can be read. Expected CKPT.yaml "
        "or CKPT+ folders (SpeechBrain), or model.safetensors, "
        "pytorch_model.bin or their .index.json (Hugging Face)"
    )


# Under this key of CKPT.yaml stands what this package knows of a checkpoint.
META_KEY = "taskarith"


def is_whole(folder, meta=None):
    """Tell whether all files that a checkpoint was written with are there.

    Deleting a checkpoint takes its files away one by one; a process killed
    meanwhile leaves a folder that looks like a checkpoint and is none.

    Arguments
    ---------
    folder : pathlib.Path
        A `CKPT+` folder.
    meta : dict or None
        Its `CKPT.yaml`, where it was read already.

    Returns
    -------
    bool
        True also for checkpoints that list no files (SpeechBrain's own).
    """
    if meta is None:
        meta = read_checkpoint_meta(folder)
    ours = meta.get(META_KEY)
    files = ours.get("files", ()) if isinstance(ours, dict) else ()
    return all((Path(folder) / file).exists() for file in files)


def newest_checkpoint(folder):
    """Find the newest whole SpeechBrain checkpoint in a save folder.

    Arguments
    ---------
    folder : str or pathlib.Path
        A folder that may hold `CKPT+...` folders.

    Returns
    -------
    pathlib.Path or None
        The newest by the time in `CKPT.yaml`; a folder without that file,
        or without one that it lists, is none.
    """
    found = []
    for candidate in Path(folder).glob("CKPT+*"):
        if (candidate / "CKPT.yaml").exists():
            meta = read_checkpoint_meta(candidate)
            if is_whole(candidate, meta):
                time = meta.get("unixtime", 0)
                found.append((time, candidate.name, candidate))
    return max(found)[-1] if found else None


def read_checkpoint_meta(folder):
    """Read a checkpoint's `CKPT.yaml`, plain types only.

    Arguments
    ---------
    folder : str or pathlib.Path
        A `CKPT+...` folder.

    Returns
    -------
    dict
        What stands there (`unixtime`, scores, provenance).

    Raises
    ------
    ValueError
        No YAML, or YAML that would make Python objects.
    """
    import yaml

    path = Path(folder) / "CKPT.yaml"
    try:
        # Listing a folder reads all of these: libyaml's reader, ten times as
        # fast, where it is there.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        meta = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise damaged(path, f"is no plain YAML ({error})") from None
    if not isinstance(meta or {}, dict):
        raise damaged(path, f"holds a {type(meta).__name__}, no entries")
    return meta or {}


def _open_checkpoint(folder, recoverable):
    if recoverable is None and (folder / "model.ckpt").exists():
        recoverable = "model"
    if recoverable is not None:
        path = folder / f"{recoverable}.ckpt"
        if not path.exists():
            there = sorted(p.stem for p in folder.glob("*.ckpt"))
            raise FileNotFoundError(
                f"{folder}: no recoverable {recoverable!r}; it holds: "
                f"{', '.join(there) or 'none'}"
            )
        state = _open_torch(path)
    else:
        state = _only_state(folder)
    state.path = folder
    state.metadata = {
        str(key): str(value)
        for key, value in read_checkpoint_meta(folder).items()
    }
    return state


def _only_state(folder):
    """Open the one recoverable of a checkpoint that is a state dict."""
    found = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            found.append((path, _open_torch(path)))
        except ValueError:
            continue
    if len(found) != 1:
        names = ", ".join(path.stem for path, _ in found) or "none"
        raise ValueError(
            f"{folder}: expected a recoverable called 'model' or exactly one "
            f"that is a state dict; these are: {names}. Name one: "
            "open_state(path, recoverable=...), or pass the .ckpt file"
        )
    return found[0][1]


def _open_shards(folder, index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise damaged(index, "holds no 'weight_map'")
    shards = {}
    for file in sorted(set(weight_map.values())):
        # A file name from outside must not lead out of the folder.
        if Path(file).name != file:
            raise damaged(index, f"names a shard outside its folder: {file}")
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file}: shard is missing")
        shards[file] = open_state(folder / file)
    entries = {}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise damaged(folder / file, f"lacks {name!r}, which is indexed")
        entries[name] = shards[file]._entries[name]

    def check(_):
        for shard in shards.values():
            shard.verify()

    return State(entries, folder, check=check)
