"""A trained translator into a folder, as a whole or not at all."""

import io
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

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
from speechbrain_taskarith.utils.optional import DESCRIPTIONS, local_path

logger = logging.getLogger(__name__)

_MODULES = ("model", "features", "normalize")
_HEADER = (
    "A speech translator: SpeechTranslator.from_hparams(source=<this folder>)\n"
    "Written by save_translator of speechbrain_taskarith"
)
# What is only wanted in training, and may be attached after the YAML was read.
_TRAINING_PART = "noise"


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
        The YAML that made it, with overrides and includes resolved:
        `create_experiment_directory` writes `hyperparams.yaml` into the output
        folder.
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
        for name in _MODULES
        if translator.get(name) is not None
    }
    if not isinstance(modules.get("model"), torch.nn.Module):
        raise ValueError(f"{key}: no `model`, the SpeechTranslationModel")
    section = _section(hyperparams, key)
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
        _store_encoders(section, temporary)
        _write_description(temporary / DESCRIPTION, section, labels)
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


def _section(hyperparams, key):
    """Return a section of a resolved YAML, a tree of nodes."""
    from ruamel.yaml import YAML

    path = Path(hyperparams)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; create_experiment_directory writes it into "
            "the output folder"
        )
    tree = YAML().load(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict) or not isinstance(tree.get(key), dict):
        raise ValueError(
            f"{path}: no section {key!r}; it names the parts of the translator"
        )
    return tree[key]


def _write_description(path, section, labels):
    """Write the YAML that makes the translator."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, TaggedScalar

    root = CommentedMap()
    root[FOLDER_KEY] = TaggedScalar("", tag="!PLACEHOLDER", style=None)
    root["modules"] = CommentedMap()
    for name, node in section.items():
        if name in _MODULES:
            if node is not None:
                root["modules"][name] = node
        else:
            root[name] = node
    model = root["modules"]["model"]
    if isinstance(model, dict):
        model.pop(_TRAINING_PART, None)
    for name, text in labels.items():
        root[name] = YAML().load(text)
    root.yaml_set_start_comment(_HEADER)
    text = io.StringIO()
    YAML().dump(root, text)
    path.write_text(text.getvalue(), encoding="utf-8")


def _state(modules):
    """Return all tensors by name; what modules share, once."""
    found, stored = {}, set()
    state = torch.nn.ModuleDict(modules).state_dict()
    for name, tensor in state.items():
        if name.startswith(f"model.{_TRAINING_PART}."):
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


# -- encoders of Hugging Face, whose configuration comes along ----------------


def _store_encoders(section, folder):
    """Copy what wrappers read at their `source`, and make it their source.

    Weights are not copied: those of the model hold all of them.
    """
    from ruamel.yaml.comments import TaggedScalar

    number = 0
    for node in _nodes(section):
        source = node.get("source")
        if not isinstance(source, str):
            continue
        origin = local_path(node.get("save_path") or source)
        if not (origin / "config.json").is_file():
            origin = local_path(source)
        name = f"encoder{number or ''}"
        number += 1
        target = folder / name
        target.mkdir()
        for pattern in DESCRIPTIONS:
            for path in origin.glob(pattern):
                shutil.copyfile(path, target / path.name)
        where = f"<{FOLDER_KEY}>/{name}"
        for argument in ("source", "save_path"):
            if argument in node:
                node[argument] = TaggedScalar(where, tag="!ref", style=None)
        if _takes_no_weights(node):
            node["weights"] = False
        else:
            # SpeechBrain's wrappers look for a file of weights.
            empty = {"unused": torch.zeros(1)}
            save_file(empty, target / WEIGHTS, metadata={"format": "pt"})


def _takes_no_weights(node):
    import inspect
    import pydoc

    made = pydoc.locate((node.tag.value or "").removeprefix("!new:"))
    return made is not None and "weights" in inspect.signature(made).parameters


def _nodes(tree):
    """Yield every mapping of a tree of nodes once."""
    todo, seen = [tree], set()
    while todo:
        node = todo.pop()
        if id(node) in seen or not isinstance(node, dict | list):
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            yield node
            todo += node.values()
        else:
            todo += node
