"""The YAML fragments that the plugin ships: found by name, changed by key."""

import difflib
import io
import numbers
from pathlib import Path


class Fragment(dict):
    """What a fragment makes: a dict whose keys are attributes, too.

    HyperPyYAML resolves `<reduction[shrink]>` in the text, before `!apply:`
    has made anything; `!ref <reduction.shrink>` reads the attribute later.

    Example
    -------
    >>> Fragment(pooling="first").pooling
    'first'
    """

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(
            _unknown(f"no key {name!r} in this fragment", name, self)
        )


def fragment(name, **overrides) -> Fragment:
    """Load a fragment of the plugin, wherever that is installed.

    Arguments
    ---------
    name : str
        As `taskarith fragments` lists it, e.g. `"models/looking_back"`.
    **overrides
        Other values for its keys. Numbers, texts and None are seen by all
        that refers to the key; anything else, e.g. a module by `!ref`, is
        taken as the object it is. A dict changes some arguments of an object
        of the fragment.

    Returns
    -------
    Fragment
        Every key of the fragment with its value or object. In YAML, name
        one by a dot: `!ref <reduction.shrink>`.

    Raises
    ------
    ValueError
        A fragment or a key that does not exist.

    Example
    -------
    >>> from hyperpyyaml import load_hyperpyyaml
    >>> loaded = load_hyperpyyaml('''
    ... reduction: !apply:speechbrain_taskarith.fragment
    ...     name: models/looking_back
    ...     d_model: 16
    ...     nhead: 2
    ...     pooling: mean
    ... modules:
    ...     looking_back: !ref <reduction.looking_back>
    ... ''')
    >>> loaded["reduction"]["shrink"].pooling
    'mean'
    >>> fragment("models/looking_back", poolng="mean")
    Traceback (most recent call last):
    ValueError: no key 'poolng' in fragment models/looking_back; did you ...
    """
    from hyperpyyaml import load_hyperpyyaml
    from ruamel.yaml import Loader

    text, objects = _text(name, overrides)

    class WithObjects(Loader):
        """Knows the objects among the overrides."""

    WithObjects.add_constructor(
        "!override", lambda _, node: objects[int(node.value)]
    )
    return Fragment(load_hyperpyyaml(text, loader=WithObjects))


def fragment_text(name, **overrides):
    """Return a fragment as a stream of YAML, with other plain values."""
    text, objects = _text(name, overrides)
    if objects:
        raise ValueError(
            f"fragment {name} with a {type(objects[0]).__name__} in the place "
            "of a plain value: it cannot be written down; name the parts "
            "without the fragment"
        )
    return text


def _text(name, overrides):
    """Return a fragment with other values, and the objects among these."""
    from ruamel.yaml import YAML

    path, objects = fragment_path(name), []
    tree = YAML().load(path.read_text(encoding="utf-8"))
    _override(tree, overrides, f"fragment {fragment_name(path)}", objects)
    text = io.StringIO()
    YAML().dump(tree, text)
    text.seek(0)
    text.name = str(path)  # what an !include: inside is relative to
    return text, objects


def fragments_folder():
    """Return the folder of the fragments: of the package, or a checkout's."""
    inside = Path(__file__).with_name("hparams")
    return inside if inside.is_dir() else Path(__file__).parents[1] / "hparams"


def fragment_names():
    """Return the names of all fragments, sorted."""
    return sorted(map(fragment_name, fragments_folder().rglob("*.yaml")))


def fragment_name(path):
    """Return the name of the fragment in a file of the folder."""
    return path.relative_to(fragments_folder()).with_suffix("").as_posix()


def fragment_path(name):
    """Return the file of a fragment, with or without `.yaml` in its name."""
    plain, names = str(name).removesuffix(".yaml"), fragment_names()
    if plain not in names:
        raise ValueError(_unknown(f"no fragment {name!r}", name, names))
    return fragments_folder() / f"{plain}.yaml"


def _override(node, overrides, where, objects):
    """Put other values into a tree of YAML nodes, where they have a key."""
    for key, value in overrides.items():
        # What an object of a class takes, that class knows.
        if key not in node and not (node.tag.value or "").startswith("!new:"):
            problem = f"no key {key!r} in {where}"
            raise ValueError(_unknown(problem, key, node))
        if isinstance(value, dict) and isinstance(node.get(key), dict):
            _override(node[key], value, f"{where}, {key}", objects)
        else:
            node[key] = _node(value, objects)


def _node(value, objects):
    """Return a value as YAML; of an object, a node that leads to it."""
    from ruamel.yaml.comments import TaggedScalar
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real):
        whole = isinstance(value, numbers.Integral)
        return int(value) if whole else float(value)
    if isinstance(value, str):
        return DoubleQuotedScalarString(value)
    objects.append(value)
    return TaggedScalar(str(len(objects) - 1), tag="!override")


def _unknown(problem, name, known):
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{problem}{hint} There are: {', '.join(known)}"
