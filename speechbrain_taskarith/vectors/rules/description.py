"""Rules by name: made again from what `describe` wrote, or from plain values.

Only the rules listed here are made, so a text from elsewhere makes nothing
but rules.
"""

import difflib
import importlib
import inspect
from collections.abc import Mapping

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.rules.base import IN_MEMORY, Rule

# Each rule that has a name, and its file, which is imported when the rule is
# asked for: a merge by TIES loads no other rule.
RULES = {
    "TaskArithmetic": "averaging.arithmetic",
    "LinearAverage": "averaging.arithmetic",
    "TIES": "sparsifying.ties",
    "DARE": "sparsifying.dare",
    "DELLA": "sparsifying.della",
    "Breadcrumbs": "sparsifying.breadcrumbs",
    "PCB": "sparsifying.pcb",
    "SCE": "sparsifying.sce",
    "SLERP": "geometric.slerp",
    "MultiSLERP": "geometric.slerp",
    "Karcher": "geometric.karcher",
    "ModelStock": "geometric.model_stock",
    "Fisher": "averaging.fisher",
    "LiNeS": "by_layer.lines",
    "ByLayer": "by_layer.by_layer",
    "SelectiveAttention": "by_layer.selective_attention",
    "TSVM": "spectral.tsv_m",
    "BoostedTSVM": "spectral.tsv_m",
    "IsoC": "spectral.iso_c",
    "IsoCTS": "spectral.iso_c",
}
# Parts of rules: they have no name in a merge file.
_PARTS = {
    "Merge": "sparsifying.ties",
    "Magnitude": "sparsifying.ties",
    "Band": "sparsifying.breadcrumbs",
    "RandomDrop": "sparsifying.dare",
    "DropByRank": "sparsifying.della",
}
_OWN = "make the object yourself and pass it"


def rule_class(name):
    """Return a class of this package by its exact name."""
    file = (RULES | _PARTS)[name]
    return getattr(importlib.import_module(f"{__package__}.{file}"), name)


def from_description(description):
    """Make the rule again of a description (see `Rule.describe`).

    ValueError for a rule that this plugin does not have, arguments that it
    does not take, or values that no text can hold.

    Example
    -------
    >>> from_description({"rule": "TaskArithmetic", "scale": 0.4})
    TaskArithmetic(scale=0.4, weights=None)
    """
    key = "stage" if "stage" in description else "rule"
    arguments = dict(description)
    name = arguments.pop(key, None)
    if "module" in arguments or name not in RULES | _PARTS:
        raise ValueError(f"there is no {key} {name!r} in this package; {_OWN}")
    return _make(name, {n: _again(name, v) for n, v in arguments.items()})


def _again(name, value):
    if isinstance(value, Mapping) and ("rule" in value or "stage" in value):
        return from_description(value)
    if isinstance(value, Mapping):
        return {key: _again(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_again(name, item) for item in value]
    if value == IN_MEMORY:
        raise ValueError(
            f"{name} was given weights that were in memory; {_OWN}"
        )
    return value


def from_plain(description, scale=None):
    """Make a rule from a name or `{"name": ..., argument: value, ...}`.

    This is how merge files and the command line write rules. Upper and lower
    case, `-` and `_` do not count in names; an argument that is a rule
    (`then`, `inner_rule`, `default`, each of `rules`) is written the same
    way; `scale` replaces the rule's own. Raises ValueError for an unknown
    rule or argument.

    Example
    -------
    >>> from_plain({"name": "ties", "density": 0.5}, scale=0.6)
    TIES(density=0.5, scale=0.6, trim='global', elect='mass', weights=None)
    """
    if isinstance(description, str):
        description = {"name": description}
    arguments = dict(description) if isinstance(description, Mapping) else {}
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(
            f"rule: expected a name, or a mapping with 'name' and the rule's "
            f"arguments, e.g. {{name: TIES, density: 0.2}}; got {description!r}"
        )
    name = known_name(name)
    if scale is not None:
        arguments["scale"] = scale
    for part in ("then", "inner_rule", "default"):
        if isinstance(arguments.get(part), (str, Mapping)):
            arguments[part] = from_plain(arguments[part])
    if isinstance(arguments.get("rules"), Mapping):
        arguments["rules"] = {
            pattern: from_plain(part)
            for pattern, part in arguments["rules"].items()
        }
    return _make(name, arguments)


def known_name(text):
    """Return a rule's exact name; the nearest is named for an unknown one."""
    names = {name.lower(): name for name in RULES}
    plain = text.replace("_", "").replace("-", "").lower()
    if plain not in names:
        near = difflib.get_close_matches(plain, names, n=1)
        hint = f" Did you mean {names[near[0]]}?" if near else ""
        raise ValueError(
            f"unknown rule {text!r}; there are: {', '.join(RULES)}.{hint}"
        )
    return names[plain]


def _make(name, arguments):
    kind = rule_class(name)
    parameters = inspect.signature(kind).parameters
    for argument in arguments:
        if argument not in parameters:
            raise ValueError(
                f"rule {name} has no argument {argument!r}; it takes: "
                f"{', '.join(parameters) or 'none'}"
            )
    for argument, parameter in parameters.items():
        if parameter.default is parameter.empty and argument not in arguments:
            raise ValueError(f"rule {name} needs {argument}=...")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"rule {name}: {error}") from None


def with_each(rule, *, weights=None, densities=None):
    """Return a rule with a weight and a density for each vector.

    They become the rule's arguments `weights` and `density` (or `drop`, as
    `1 - density`), or those of the rule inside of it.

    Example
    -------
    >>> from speechbrain_taskarith.vectors import DARE, TIES
    >>> with_each(TIES(scale=0.5), weights=[1, 2], densities=[0.5, 0.25])
    TIES(density=[0.5, 0.25], scale=0.5, trim='global', elect='mass',
         weights=[1, 2])
    >>> with_each(DARE(0.5), weights=[1, 2], densities=[0.25, 0.75])
    DARE(drop=[0.75, 0.25], scale=1.0, seed=0,
         then={'rule': 'TaskArithmetic', 'scale': 1.0, 'weights': [1, 2]})
    """
    if densities is not None:
        densities = checks.shares("densities", densities)
        if not isinstance(densities, list):
            raise ValueError("densities: expected a list, one for each vector")
        drops = [1 - share for share in densities]
        given = {"density": densities, "drop": drops}
        rule = _replaced(rule, given, "densities")
    if weights is not None:
        given = {"weights": checks.weights(weights)}
        rule = _replaced(rule, given, "weights")
    return rule


def _replaced(rule, given, what):
    """Return the rule, made again with the first of the arguments it takes."""
    names = inspect.signature(type(rule)).parameters
    arguments = {name: getattr(rule, name) for name in names}
    found = [name for name in given if name in arguments]
    if found:
        arguments[found[0]] = given[found[0]]
        return type(rule)(**arguments)
    inside = False
    for name, value in arguments.items():
        if isinstance(value, Rule):
            arguments[name], inside = _replaced(value, given, what), True
        elif isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, Rule):
                    value = {**value, key: _replaced(inner, given, what)}
                    arguments[name], inside = value, True
    if not inside:
        raise ValueError(
            f"{what}: {type(rule).__name__} has none for each vector; it takes "
            f"{', '.join(names) or 'no arguments'}"
        )
    return type(rule)(**arguments)
