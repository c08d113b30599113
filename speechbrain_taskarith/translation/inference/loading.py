"""A translator's folder: what is in it, and how it is loaded."""

import contextlib
from pathlib import Path

import torch
from speechbrain.processing.features import InputNormalization

from speechbrain_taskarith.utils.hub.download import (
    DESCRIPTIONS,
    is_hub_name,
    shared_folder,
)
from speechbrain_taskarith.utils.model_folder.description import (
    DESCRIPTION,
    read_description,
)
from speechbrain_taskarith.utils.model_folder.weights import (
    load_weights,
    read_tensors,
)

WEIGHTS = "model.safetensors"
# What save_translator writes; nothing else of a hub's folder is downloaded.
FILES = (
    DESCRIPTION,
    "*.safetensors",
    "*.txt",
    *DESCRIPTIONS,
    *(f"*/{pattern}" for pattern in DESCRIPTIONS),
)
_WRITTEN = "save_translator writes it"


def load_folder(source, trusted=False, savedir=None, overrides=None):
    """Return modules and other values of a translator's folder, with weights."""
    folder = Path(source)
    if is_hub_name(source):
        folder = shared_folder(source, FILES, local_dir=savedir)
    path = folder / DESCRIPTION
    needs = f", {WEIGHTS} and a vocabulary; save_translator writes one"
    with _quiet_transformers():
        made = read_description(folder, trusted, needs, overrides)
    modules = made.pop("modules", None)
    if not isinstance(modules, dict) or not isinstance(
        modules.get("model"), torch.nn.Module
    ):
        raise ValueError(
            f"{path}: no key `modules` with a `model`; save_translator writes "
            "such a file"
        )
    if not callable(made.get("target_text")):
        raise ValueError(
            f"{path}: no vocabulary of the target language (`target_text`, "
            "labels to text); save_translator writes it where it is given "
            "target_labels"
        )
    modules = {name: one for name, one in modules.items() if one is not None}
    load_weights(torch.nn.ModuleDict(modules), folder, [WEIGHTS], _WRITTEN)
    for name, module in global_normalisers(modules).items():
        load_statistics(module, folder / statistics_file(name))
    return modules, made


def global_normalisers(modules):
    """Return those modules that keep statistics, which are no tensors of it."""
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, InputNormalization)
        and module.norm_type == "global"
    }


def statistics_file(name):
    """Return the file of a normaliser's statistics."""
    return f"{name}.safetensors"


def load_statistics(module, path):
    """Load what `InputNormalization` measured in training."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_WRITTEN}")
    found = read_tensors(path)
    wanted = {"count", "glob_mean", "glob_std"}
    if set(found) != wanted:
        raise ValueError(
            f"{path}: expected {', '.join(sorted(wanted))}, found "
            f"{', '.join(sorted(found)) or 'nothing'}"
        )
    module.count = int(found["count"])
    module.glob_mean, module.glob_std = found["glob_mean"], found["glob_std"]


@contextlib.contextmanager
def _quiet_transformers():
    """Let transformers not report weights that are loaded a moment later."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
