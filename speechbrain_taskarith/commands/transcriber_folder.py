"""A recogniser out of a folder: its description in YAML, and its weights.

The YAML may make models and nothing else: only classes of a few packages are
made, no function is called, nothing else is included.
"""

import inspect
import pickle
import pydoc
from pathlib import Path

DESCRIPTION = "hyperparams.yaml"
KEY = "transcriber"
WEIGHTS = ("transcriber.ckpt", "transcriber.safetensors")

# Where the classes that a description may name are defined.
_MODULES = (
    "speechbrain_taskarith.transducer",
    "speechbrain.lobes",
    "speechbrain.nnet",
    "speechbrain.processing",
    "torch.nn",
)
_HARMLESS = ("!ref", "!copy", "!PLACEHOLDER", "!tuple")
_PLAIN = "tag:yaml.org,2002:"
_PLAIN_KINDS = ("map", "seq", "str", "int", "float", "bool", "null")
_FOLDER_KEY = "model_folder"


def load_transcriber(folder, device="cpu"):
    """Make a recogniser and load its weights.

    Arguments
    ---------
    folder : str or pathlib.Path
        With `hyperparams.yaml`, whose key `transcriber` is a
        `StreamingTransducer`, and `transcriber.ckpt`, its state dict. A key
        `model_folder: !PLACEHOLDER` becomes the folder itself.
    device : str
        Where to.

    Returns
    -------
    StreamingTransducer
        In evaluation mode.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        The YAML makes something else than models, the weights do not fit.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; the folder of a model holds "
            f"{DESCRIPTION} and {WEIGHTS[0]}"
        )
    text = path.read_text(encoding="utf-8")
    names_folder = _FOLDER_KEY in check_description(text, path)
    from hyperpyyaml import load_hyperpyyaml

    overrides = {_FOLDER_KEY: str(folder)} if names_folder else {}
    found = load_hyperpyyaml(text, overrides)
    if KEY not in found:
        raise ValueError(f"{path}: no key {KEY!r}; it names the recogniser")
    transcriber = found[KEY]
    if not callable(getattr(transcriber, "stream", None)):
        raise ValueError(
            f"{path}: {KEY!r} is a {type(transcriber).__name__}; expected a "
            "speechbrain_taskarith.transducer.StreamingTransducer"
        )
    _load_weights(transcriber, folder)
    return transcriber.to(device).eval()


def check_description(text, path):
    """Refuse a YAML that would do more than make models.

    Arguments
    ---------
    text : str
        The YAML.
    path : str or pathlib.Path
        For messages.

    Returns
    -------
    list of str
        The keys at the top.

    Raises
    ------
    ValueError
        Naming the tag and the line.

    Example
    -------
    >>> check_description("a: !new:torch.nn.Linear [3, 4]", "m.yaml")
    ['a']
    >>> check_description("a: !apply:os.getcwd []", "m.yaml")
    Traceback (most recent call last):
      ...
    ValueError: m.yaml, line 1: '!apply:os.getcwd' is refused...
    """
    import yaml

    try:
        root = yaml.compose(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML ({error})") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected keys and values")
    todo = [root]
    while todo:
        node = todo.pop()
        _check_tag(node, path)
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            todo += [part for pair in node.value for part in pair]
    return [key.value for key, _ in root.value]


def _check_tag(node, path):
    if node.tag in _HARMLESS:
        return
    if node.tag.removeprefix(_PLAIN) in _PLAIN_KINDS:
        return
    kind, _, name = node.tag.partition(":")
    if kind == "!new" and _within(name):
        # What the name leads to may come from elsewhere, by way of imports.
        found = pydoc.locate(name)
        if found is None:
            line = node.start_mark.line + 1
            raise ValueError(f"{path}, line {line}: there is no {name}")
        if inspect.isclass(found) and _within(found.__module__):
            return
    raise ValueError(
        f"{path}, line {node.start_mark.line + 1}: {node.tag!r} is refused: "
        "a model's description makes objects (!new:) of classes in "
        f"{', '.join(_MODULES)}, and nothing else"
    )


def _within(name):
    return any(f"{name}.".startswith(f"{module}.") for module in _MODULES)


def _load_weights(transcriber, folder):
    import torch

    path = next(
        (folder / name for name in WEIGHTS if (folder / name).is_file()), None
    )
    if path is None:
        raise FileNotFoundError(
            f"{folder / WEIGHTS[0]}: no such file; save the recogniser's "
            "weights there: torch.save(transcriber.state_dict(), ...)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        transcriber.load_state_dict(state)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: these weights do not fit {folder / DESCRIPTION}, or the "
            f"file is damaged: {text}"
        ) from error
