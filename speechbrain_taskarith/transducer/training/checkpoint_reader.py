"""Reading a checkpoint's tensors, without executing anything in it."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

# What training frameworks put a state dict under.
_NESTED = ("state_dict", "model_state_dict", "model", "module")


def read_checkpoint(source, recoverable="model"):
    """Return a state dict, and how to call it in messages.

    Arguments
    ---------
    source : str or pathlib.Path or mapping
        See `transfer_encoder`.
    recoverable : str
        Whose weights, in a checkpoint folder.

    Returns
    -------
    state : dict of str: torch.Tensor
        On the CPU.
    shown : str
        The file's name.

    Raises
    ------
    FileNotFoundError
        Nothing there.
    ValueError
        A damaged file, or one that holds something else.

    Example
    -------
    >>> path = str(getfixture("tmpdir") / "model.ckpt")
    >>> torch.save({"w": torch.zeros(2)}, path)
    >>> read_checkpoint(path)[0]
    {'w': tensor([0., 0.])}
    """
    if isinstance(source, Mapping):
        return dict(source), "the given state dict"
    path = checkpoint_file(source, recoverable)
    if path.suffix == ".safetensors":
        state = _safetensors(path)
    else:
        state = _pickled(path)
    return state, str(path)


def checkpoint_file(source, recoverable="model"):
    """Find the file that holds the weights.

    Arguments
    ---------
    source : str or pathlib.Path
        A file, a checkpoint folder, or a folder of those (the newest counts).
    recoverable : str
        Whose weights.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    FileNotFoundError
        Nothing there, saying what was looked for.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such checkpoint. Give a file, a CKPT+... folder, or "
            "the save folder that holds them"
        )
    folders = [path, *newest_first(path)]
    for folder in folders:
        for suffix in (".ckpt", ".safetensors"):
            file = folder / f"{recoverable}{suffix}"
            if file.is_file():
                return file
    raise FileNotFoundError(
        f"{path}: holds no {recoverable}.ckpt, itself or in a CKPT+... folder; "
        "name another recoverable, or the file itself"
    )


def newest_first(folder):
    """List the whole checkpoints of a save folder.

    Arguments
    ---------
    folder : pathlib.Path
        The save folder.

    Returns
    -------
    list of pathlib.Path
        `CKPT+...` folders that SpeechBrain has finished writing (they have a
        `CKPT.yaml`, written last), by the time in it.
    """
    found = []
    for inside in folder.glob("CKPT+*"):
        meta = inside / "CKPT.yaml"
        if meta.is_file():
            found.append((_unixtime(meta), inside.name, inside))
    return [inside for _, _, inside in sorted(found, reverse=True)]


def _unixtime(meta):
    for line in meta.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "unixtime":
            try:
                return float(value)
            except ValueError:
                break
    return meta.stat().st_mtime


def _safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: no whole safetensors file ({error}); fetch it again"
        ) from error


def _pickled(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: not readable as tensors alone (truncated, no checkpoint, "
            "or it holds code, which is refused): "
            f"{str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = isinstance(state, Mapping) and {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise ValueError(
            f"{path}: holds no state dict (names and tensors); give the "
            "model's file"
        )
    return tensors
