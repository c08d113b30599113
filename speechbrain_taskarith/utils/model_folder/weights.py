"""The weights of a model in a folder: tensors alone, and all that fit."""

from pathlib import Path

from speechbrain_taskarith.utils.model_folder.description import DESCRIPTION


def load_weights(module, folder, names, remedy):
    """Load the first file there is of `names` into a module, strictly.

    `remedy` says how such a file is made. Tensors that the module shares may
    be stored once.
    """
    folder = Path(folder)
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder / names[0]}: no such file; {remedy}")
    path = found[0]
    try:
        found = module.load_state_dict(read_tensors(path), strict=False)
        shared = _shared(module, found.missing_keys)
        wrong = [f"missing: {n}" for n in found.missing_keys if n not in shared]
        wrong += [f"left over: {name}" for name in found.unexpected_keys]
        if wrong:
            raise ValueError("; ".join(wrong))
    except Exception as error:  # an unpickler raises what it trips over
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: these weights do not fit {folder / DESCRIPTION}, or the "
            f"file is damaged: {text}"
        ) from error


def _shared(module, names):
    """Return those names whose tensors have others, too, not among them."""
    state = module.state_dict()
    loaded = {
        tensor.data_ptr()
        for name, tensor in state.items()
        if name not in names and tensor.numel()
    }
    return {
        name
        for name in names
        if name in state and state[name].data_ptr() in loaded
    }


def read_tensors(path):
    """Return what is in a file of tensors."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if Path(path).suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: the file is damaged ({error})") from error
