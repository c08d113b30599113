"""Start from a text-translation model."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

PARTS = ("source_embedding", "textual", "decoder")


def initialise_from_text_translation(model, source, parts=PARTS):
    """Take textual encoder and decoder from a trained text-translation model.

    The other model is of the same class, trained with `tasks=("mt",)`; its
    acoustic encoder does not matter. Nothing is loaded unless all of it fits.

    Arguments
    ---------
    model : SpeechTranslationModel
        To be initialised.
    source : str or pathlib.Path or mapping or torch.nn.Module
        The other model, its state dict, a file of it (`.ckpt`, `.pt`,
        `.safetensors`), or a SpeechBrain `CKPT+...` folder with `model.ckpt`.
    parts : sequence of str
        Modules to take.

    Returns
    -------
    list of str
        The names of the tensors taken.

    Raises
    ------
    FileNotFoundError
        No such file, or no `model.ckpt` in the folder.
    ValueError
        A damaged file; tensors that are missing, left over, or of another
        shape, by name.

    Example
    -------
    >>> class Tiny(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.decoder = torch.nn.Linear(1, 1)
    >>> trained, fresh = Tiny(), Tiny()
    >>> initialise_from_text_translation(fresh, trained, ["decoder"])
    ['decoder.weight', 'decoder.bias']
    >>> torch.equal(fresh.decoder.weight, trained.decoder.weight)
    True
    """
    state, shown = _read(source)
    state = {name.removeprefix("module."): t for name, t in state.items()}
    prefixes = tuple(f"{part}." for part in parts)

    def selected(tensors):
        # Positions are computed, and may be of another length.
        return {
            name: tensor
            for name, tensor in tensors.items()
            if name.startswith(prefixes) and not name.endswith("positions.pe")
        }

    wanted, found = selected(model.state_dict()), selected(state)
    faults = [f"missing: {n}" for n in wanted if n not in found]
    faults += [f"left over: {n}" for n in found if n not in wanted]
    faults += [
        f"{n}: {tuple(found[n].shape)}, expected {tuple(t.shape)}"
        for n, t in wanted.items()
        if n in found and found[n].shape != t.shape
    ]
    if faults or not wanted:
        raise ValueError(
            f"{shown} does not fit the parts {', '.join(parts)}: "
            f"{'; '.join(faults[:5]) or 'the model has none of them'}"
            f"{f' and {len(faults) - 5} more' if len(faults) > 5 else ''}. "
            "Both models need the same sizes and vocabularies"
        )
    model.load_state_dict(found, strict=False)
    return list(wanted)


def _read(source):
    if isinstance(source, torch.nn.Module):
        return source.state_dict(), type(source).__name__
    if isinstance(source, Mapping):
        return dict(source), "the given state dict"
    path = Path(source)
    if path.is_dir():
        path = path / "model.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; give the file of a state dict, or a "
            "CKPT+... folder that holds model.ckpt"
        )
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises what it trips over
        raise ValueError(
            f"{path}: not readable as tensors alone (truncated, no checkpoint, "
            "or it holds code, which is refused)"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds no state dict")
    tensors = {n: t for n, t in state.items() if isinstance(t, torch.Tensor)}
    return tensors, str(path)
