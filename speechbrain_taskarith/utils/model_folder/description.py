"""The YAML that describes a model in a folder: it makes a model, no more."""

import inspect
import pydoc
from pathlib import Path

DESCRIPTION = "hyperparams.yaml"
# A key that becomes the folder itself, wherever that is.
FOLDER_KEY = "model_folder"

# Where the classes that a description may name are defined.
_MODULES = (
    "speechbrain_taskarith.transducer",
    "speechbrain_taskarith.translation",
    "speechbrain_taskarith.data.text",
    "speechbrain.lobes",
    "speechbrain.nnet",
    "speechbrain.processing",
    "speechbrain.decoders",
    "torch.nn",
)
# What may be imported to find them.
_IMPORTED = ("speechbrain_taskarith", *_MODULES)
# What they pass on to transformers could ask for code of a hub's.
_WRAPPERS = tuple(
    f"speechbrain.integrations.huggingface.{name}"
    for name in ("wav2vec2.Wav2Vec2", "hubert.HuBERT", "whisper.Whisper")
)
_HARMLESS = ("!ref", "!copy", "!PLACEHOLDER", "!tuple")
_PLAIN = "tag:yaml.org,2002:"
_PLAIN_KINDS = ("map", "seq", "str", "int", "float", "bool", "null", "merge")


def read_description(folder, trusted=False, needs="", overrides=None):
    """Make what a folder's `hyperparams.yaml` describes, a dict.

    `needs` says what else such a folder holds, for an error. A description
    that would do more than make models is refused, unless it is `trusted`.
    `overrides` are other values, as HyperPyYAML takes them.
    """
    path = Path(folder) / DESCRIPTION
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; that of a model holds "
            f"{DESCRIPTION}{needs}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; the folder of a model holds "
            f"{DESCRIPTION}{needs}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from None
    keys = check_description(text, path, trusted)
    overrides = dict(overrides or {})
    if FOLDER_KEY in keys:
        overrides[FOLDER_KEY] = str(folder)
    from hyperpyyaml import load_hyperpyyaml

    try:
        return load_hyperpyyaml(text, overrides)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} names a file that is not there: {error}"
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        text = " ".join(str(error).split())[:500]
        raise ValueError(f"{path}: cannot make the model: {text}") from error


def check_description(text, path, trusted=False):
    """Return a YAML's keys; refuse one that would do more than make models.

    Only classes of a few packages are made, no function is called, nothing
    else is included.

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
        raise ValueError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected keys and values")
    # An alias leads to a node again, even to one that it is in.
    todo, seen = [] if trusted else [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        _check_tag(node, path)
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            todo += [part for pair in node.value for part in pair]
    return [key.value for key, _ in root.value]


def _check_tag(node, path):
    if node.tag in _HARMLESS or node.tag.removeprefix(_PLAIN) in _PLAIN_KINDS:
        return
    where = f"{path}, line {node.start_mark.line + 1}"
    kind, _, name = node.tag.partition(":")
    importable = _within(name, _IMPORTED) or name in _WRAPPERS
    if kind in ("!new", "!name") and importable:
        # What the name leads to may come from elsewhere, by way of imports.
        found = pydoc.locate(name)
        if found is None:
            raise ValueError(f"{where}: there is no {name}")
        if inspect.isclass(found):
            origin = f"{found.__module__}.{found.__qualname__}"
            if origin in _WRAPPERS and kind == "!new":
                return _check_arguments(node, found, where)
            if _within(origin):
                return None
    raise ValueError(
        f"{where}: {node.tag!r} is refused: a model's description makes "
        f"objects (!new:) of classes in {', '.join(_MODULES)}, and nothing else"
    )


def _check_arguments(node, found, where):
    """Refuse what a wrapper would pass on, e.g. `trust_remote_code`."""
    known = inspect.signature(found).parameters
    named = [n for n, p in known.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    given = [getattr(key, "value", "") for key, _ in _pairs(node)]
    for name in given:
        if name not in named:
            raise ValueError(
                f"{where}: {found.__name__} with {name!r} is refused; it "
                f"takes {', '.join(named)}"
            )


def _pairs(node):
    pairs = node.value if isinstance(node.value, list) else []
    # Arguments in a list have no names, and go to the named ones.
    return [pair for pair in pairs if isinstance(pair, tuple)]


def _within(name, modules=_MODULES):
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
