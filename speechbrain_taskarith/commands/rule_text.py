"""Merging rules written as text: by name, with plain arguments.

Only rules of this plugin can be named, so a merge file from elsewhere makes
nothing but rules.
"""

import difflib
import inspect
from collections.abc import Mapping

# Parts and base classes, which take objects and are for code.
_FOR_CODE = ("Merge", "Rule", "Wrapper")


def rule_classes():
    """Return the rules that can be named.

    Returns
    -------
    dict
        `{name: class}`.
    """
    from speechbrain_taskarith.vectors import rules

    found = {}
    for name in rules.__all__:
        kind = getattr(rules, name)
        is_rule = inspect.isclass(kind) and issubclass(kind, rules.Rule)
        if is_rule and name not in _FOR_CODE:
            found[name] = kind
    return found


def make_rule(description, scale=None):
    """Make a rule out of plain values.

    Arguments
    ---------
    description : str or mapping
        A name, or `{"name": ..., argument: value, ...}`. Upper and lower
        case and underscores do not count in names. An argument that is a
        rule (`then`, `inner_rule`) is written the same way.
    scale : float, dict or None
        Replaces the rule's own.

    Returns
    -------
    Rule
        The rule.

    Raises
    ------
    ValueError
        An unknown rule or argument, a value out of range.

    Example
    -------
    >>> make_rule({"name": "ties", "density": 0.5}, scale=0.6)
    TIES(density=0.5, scale=0.6, trim='global', elect='mass')
    """
    kind, arguments = _read(description)
    if scale is not None:
        arguments["scale"] = scale
    parameters = inspect.signature(kind).parameters
    for name in arguments:
        if name not in parameters:
            raise ValueError(
                f"rule {kind.__name__} has no argument {name!r}; it takes: "
                f"{', '.join(parameters) or 'none'}"
            )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise ValueError(f"rule {kind.__name__} needs {name}=...")
    for name in ("then", "inner_rule"):
        if isinstance(arguments.get(name), (str, Mapping)):
            arguments[name] = make_rule(arguments[name])
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"rule {kind.__name__}: {error}") from None


def from_words(words, scale=None):
    """Make a rule out of `--rule NAME KEY=VALUE ...`.

    Arguments
    ---------
    words : list of str
        The name, then arguments; values are read as YAML.
    scale : float, dict or None
        Replaces the rule's own.

    Returns
    -------
    Rule
        The rule.

    Example
    -------
    >>> from_words(["DARE", "drop=0.9", "then={name: TIES, density: 1}"]).drop
    0.9
    """
    import yaml

    description = {"name": words[0]}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(
                f"--rule {words[0]} {word}: expected KEY=VALUE after the name"
            )
        try:
            description[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--rule {word}: the value is no YAML") from None
    return make_rule(description, scale)


def _read(description):
    if isinstance(description, str):
        description = {"name": description}
    if not isinstance(description, Mapping) or not isinstance(
        description.get("name"), str
    ):
        raise ValueError(
            f"rule: expected a name, or a mapping with 'name' and the rule's "
            f"arguments, e.g. {{name: TIES, density: 0.2}}; got {description!r}"
        )
    arguments = dict(description)
    name, classes = arguments.pop("name"), rule_classes()
    by_plain_name = {_plain(known): known for known in classes}
    known = by_plain_name.get(_plain(name))
    if known is None:
        near = difflib.get_close_matches(_plain(name), by_plain_name, n=1)
        hint = f" Did you mean {by_plain_name[near[0]]}?" if near else ""
        raise ValueError(
            f"unknown rule {name!r}; there are: {', '.join(classes)}.{hint}"
        )
    return classes[known], arguments


def _plain(name):
    return name.replace("_", "").replace("-", "").lower()
