"""The YAML of a translator, cut out of a recipe's."""

import inspect
import io
import pydoc
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from speechbrain_taskarith.fragments import fragment_text
from speechbrain_taskarith.translation.inference.loading import WEIGHTS
from speechbrain_taskarith.utils.hub.download import DESCRIPTIONS, local_path
from speechbrain_taskarith.utils.model_folder.description import FOLDER_KEY

MODULES = ("model", "features", "normalize")
# What is only wanted in training, and may be attached after the YAML was read.
TRAINING_PART = "noise"
_HEADER = (
    "A speech translator: SpeechTranslator.from_hparams(source=<this folder>)\n"
    "Written by save_translator of speechbrain_taskarith"
)
_FRAGMENT = "!apply:speechbrain_taskarith.fragment"


def read_section(hyperparams, key):
    """Return a section of a resolved YAML, a tree of nodes."""
    path = Path(hyperparams)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; create_experiment_directory writes it into "
            "the output folder"
        )
    tree = _resolved(path)
    if not isinstance(tree, dict) or not isinstance(tree.get(key), dict):
        raise ValueError(
            f"{path}: no section {key!r}; it names the parts of the translator"
        )
    _put_fragments_in(tree[key])
    return tree[key]


def _resolved(path):
    """Return a YAML's tree with what its references mean."""
    from hyperpyyaml import resolve_references
    from ruamel.yaml import YAML

    with open(path, encoding="utf-8") as stream:
        return YAML().load(resolve_references(stream))


def _put_fragments_in(section):
    """Put in the place of `<fragment.key>` what the fragment has there."""
    from hyperpyyaml import resolve_references
    from ruamel.yaml import YAML

    made = {}
    for node in _nodes(section):
        places = node.items() if isinstance(node, dict) else enumerate(node)
        for place, value in list(places):
            if _tag(value) != "!apply:getattr" or len(value) != 2:
                continue
            fragment, key = value
            if _tag(fragment) != _FRAGMENT:
                continue
            if id(fragment) not in made:
                text = fragment_text(**fragment)
                made[id(fragment)] = YAML().load(resolve_references(text))
            node[place] = made[id(fragment)][key]


def _tag(node):
    return getattr(getattr(node, "tag", None), "value", None)


def write_description(path, section, labels):
    """Write the YAML that makes the translator."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, TaggedScalar

    root = CommentedMap()
    root[FOLDER_KEY] = TaggedScalar("", tag="!PLACEHOLDER", style=None)
    root["modules"] = CommentedMap()
    for name, node in section.items():
        if name in MODULES:
            if node is not None:
                root["modules"][name] = node
        else:
            root[name] = node
    model = root["modules"]["model"]
    if isinstance(model, dict):
        model.pop(TRAINING_PART, None)
    for name, text in labels.items():
        root[name] = YAML().load(text)
    root.yaml_set_start_comment(_HEADER)
    text = io.StringIO()
    YAML().dump(root, text)
    path.write_text(text.getvalue(), encoding="utf-8")


# -- encoders of Hugging Face, whose configuration comes along ----------------


def store_encoders(section, folder):
    """Copy what wrappers read at their `source`, and make it their source.

    Weights are not copied: those of the model hold all of them.
    """
    from ruamel.yaml.comments import TaggedScalar

    number = 0
    for node in _nodes(section):
        # What makes an object: others may have a value of that name.
        made = isinstance(node, dict) and _tag(node)
        source = node.get("source") if made else None
        if not isinstance(source, str):
            continue
        # Where a wrapper keeps downloads; of a local source there are none.
        kept = node.get("save_path")
        origin = local_path(kept) if kept and Path(kept).exists() else None
        if origin is None or not (origin / "config.json").is_file():
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
    made = pydoc.locate((_tag(node) or "").removeprefix("!new:"))
    return made is not None and "weights" in inspect.signature(made).parameters


def _nodes(tree):
    """Yield every mapping and sequence of a tree once; it may be changed."""
    todo, seen = [tree], set()
    while todo:
        node = todo.pop()
        if id(node) in seen or not isinstance(node, dict | list):
            continue
        seen.add(id(node))
        yield node
        todo += node.values() if isinstance(node, dict) else node
