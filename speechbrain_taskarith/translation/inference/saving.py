"""A trained translator into a folder, as a whole or not at all."""

import logging
from pathlib import Path

import torch
from safetensors.torch import save_file

from speechbrain_taskarith.translation.inference.describing import (
    MODULES,
    TRAINING_PART,
    read_section,
    store_encoders,
    write_description,
)
from speechbrain_taskarith.translation.inference.loading import (
    WEIGHTS,
    global_normalisers,
    load_folder,
    statistics_file,
)
from speechbrain_taskarith.translation.inference.vocabulary import (
    describe_labels,
)
from speechbrain_taskarith.utils.files import atomic_folder
from speechbrain_taskarith.utils.model_folder.description import (
    DESCRIPTION,
    FOLDER_KEY,
)

logger = logging.getLogger(__name__)


def save_translator(
    folder,
    translator,
    hyperparams,
    target_labels,
    source_labels=None,
    key="translator",
):
    """Store a trained translator in a folder that needs nothing else.

    The folder is read back and compared before it gets its name; an existing
    one is replaced as a whole, or stays. Call it on the main process, after the
    test, with the weights that were tested.

    Arguments
    ---------
    folder : str or pathlib.Path
        To be written.
    translator : dict
        A section of a recipe's YAML, as `load_hyperpyyaml` made it: `model`,
        and where they are used `features` and `normalize`; `search`, or
        `greedy_tokens`; `sample_rate`, `bos_index`, `eos_index`,
        `blank_index`; `languages`, a dict of target language: beginning token
        (without it, the model's own). Other plain values are stored as they
        are.
    hyperparams : str or pathlib.Path
        The YAML that made it, with the overrides there were:
        `create_experiment_directory` writes such a `hyperparams.yaml` into the
        output folder.
    target_labels : PieceLabels or WordLabels or CharacterLabels
        Labels of the decoder.
    source_labels : PieceLabels or WordLabels or CharacterLabels, optional
        Those of the CTC head, index 0 the blank. None: without transcripts.
    key : str
        The section's name.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    FileExistsError
        The folder holds something else.
    ValueError
        What cannot be stored, or does not come back as it was, by name.

    Example
    -------
    >>> save_translator(  # doctest: +SKIP
    ...     f"{hparams['output_folder']}/translator",
    ...     hparams["translator"],
    ...     f"{hparams['output_folder']}/hyperparams.yaml",
    ...     labels["target"],
    ...     labels["source"],
    ... )
    """
    folder = Path(folder)
    _check_folder(folder)
    modules = {
        name: translator[name]
        for name in MODULES
        if translator.get(name) is not None
    }
    if not isinstance(modules.get("model"), torch.nn.Module):
        raise ValueError(f"{key}: no `model`, the SpeechTranslationModel")
    section = read_section(hyperparams, key)
    # A tokenizer of many languages is known only after its training.
    known = getattr(modules["model"], "languages", None)
    languages = translator.get("languages") or getattr(known, "tokens", None)
    if languages:
        section["languages"] = dict(languages)
    with atomic_folder(folder) as temporary:
        labels = {
            "target_text": describe_labels(target_labels, temporary, "target")
        }
        if source_labels is not None:
            labels["source_text"] = describe_labels(
                source_labels, temporary, "source"
            )
        store_encoders(section, temporary)
        write_description(temporary / DESCRIPTION, section, labels)
        state = _state(modules)
        save_file(state, temporary / WEIGHTS)
        for name, module in global_normalisers(modules).items():
            save_file(
                {
                    "count": torch.tensor(module.count),
                    "glob_mean": module.glob_mean.cpu().contiguous(),
                    "glob_std": module.glob_std.cpu().contiguous(),
                },
                temporary / statistics_file(name),
            )
        _check_it_loads(temporary, modules, folder)
    logger.info(f"The translator is in {folder}")
    return folder


def _check_folder(folder):
    """Refuse to replace what is no translator."""
    if folder.is_dir() and any(folder.iterdir()):
        path = folder / DESCRIPTION
        if path.is_file() and FOLDER_KEY in path.read_text(encoding="utf-8"):
            return
        raise FileExistsError(
            f"{folder}: holds something that is no translator; give another "
            "folder, or remove it"
        )


def _state(modules):
    """Return all tensors by name; what modules share, once."""
    found, stored = {}, set()
    state = torch.nn.ModuleDict(modules).state_dict()
    for name, tensor in state.items():
        if name.startswith(f"model.{TRAINING_PART}."):
            continue
        if not torch.is_tensor(tensor):
            raise ValueError(
                f"{name}: a {type(tensor).__name__}, which is no tensor, cannot "
                "be stored"
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in stored:
            continue
        stored.add(place)
        found[name] = tensor.detach().cpu().contiguous().clone()
    return found


def _check_it_loads(temporary, modules, folder):
    """Read the folder back; it has to hold the same model."""
    with torch.random.fork_rng():
        try:
            loaded, _ = load_folder(temporary)
        except ValueError as error:
            if " is refused" not in str(error):
                raise
            text = str(error).replace(str(temporary), str(folder))
            logger.warning(
                f"{text}. SpeechTranslator.from_hparams loads this folder with "
                "trusted=True alone"
            )
            loaded, _ = load_folder(temporary, trusted=True)
    before, after = _state(modules), _state(loaded)
    wrong = sorted(set(before) ^ set(after)) or [
        name
        for name, tensor in before.items()
        if not torch.equal(tensor, after[name])
    ]
    if wrong:
        raise ValueError(
            f"{folder}: {wrong[0]} and {len(wrong) - 1} more tensor(s) do not "
            "come back as they were; is the model as its YAML describes it?"
        )
