"""Rules as text and back, and what those who apply one ask of it.

A user's own rule need be no `Rule`: an object with
`combine(vectors) -> TaskVector`, and maybe a `scale`, will do.
"""

import glob
import inspect
import os
from collections.abc import Mapping

# Stands for an argument that is too large for a text.
_IN_MEMORY = "weights in memory"


def describe_rule(rule):
    """Return a rule's class and arguments in plain types.

    Arguments
    ---------
    rule : object or None
        A rule.

    Returns
    -------
    dict
        What `Rule.describe` gives; for other objects class and module.

    Example
    -------
    >>> from speechbrain_taskarith.vectors import TaskArithmetic
    >>> describe_rule(TaskArithmetic(scale=0.4))["scale"]
    0.4
    """
    if rule is None:
        return {"rule": "none"}
    if hasattr(rule, "describe"):
        return rule.describe()
    kind = rule if inspect.isroutine(rule) else type(rule)
    return {"rule": kind.__qualname__, "module": kind.__module__}


def describe(thing, key):
    """Write down an object that keeps its arguments as attributes.

    Arguments
    ---------
    thing : Rule or Stage
        Has an attribute for each argument of its class.
    key : str
        What it is: `"rule"` or `"stage"`.

    Returns
    -------
    dict
        `{key: class name, argument: value, ...}`, plain types.
    """
    description = {key: type(thing).__name__}
    for name in inspect.signature(type(thing)).parameters:
        description[name] = _plain(getattr(thing, name))
    return description


def build_rule(description):
    """Build a rule of this package from what `describe_rule` wrote.

    Nothing that the text names is imported: only rules of this package are
    known by name.

    Arguments
    ---------
    description : dict
        As written.

    Returns
    -------
    object
        The rule.

    Raises
    ------
    ValueError
        It is no rule of this package, or has arguments that text cannot
        hold: pass the rule itself.
    """
    if "module" in description:
        raise ValueError(
            f"rule {description['rule']!r} is none of this package's; pass "
            "the rule itself, set up as it was"
        )
    return from_description(description)


def from_description(description):
    """Make a rule again from what `Rule.describe` wrote.

    Arguments
    ---------
    description : dict
        `{"rule": class name, argument: value, ...}`.

    Returns
    -------
    Rule
        The same rule.

    Raises
    ------
    ValueError
        A rule that this plugin does not have, or arguments that it does not
        take, or that no text can hold.

    Example
    -------
    >>> from_description({"rule": "TaskArithmetic", "scale": 0.4})
    TaskArithmetic(scale=0.4, weights=None)
    """
    from speechbrain_taskarith.vectors import rules
    from speechbrain_taskarith.vectors.engine import trimming as sparsify

    def again(value):
        if isinstance(value, Mapping) and "rule" in value:
            return from_description(value)
        if isinstance(value, Mapping) and "stage" in value:
            return _build(sparsify, sparsify.Stage, "stage", value, again)
        if isinstance(value, (list, tuple)):
            return [again(item) for item in value]
        if value == _IN_MEMORY:
            raise ValueError(
                f"{description.get('rule')} was given weights that were in "
                "memory; make the object yourself and pass it"
            )
        return value

    return _build(rules, rules.Rule, "rule", description, again)


def combine(rule, vectors, base):
    """Make one vector of several by a rule, on the given base.

    Arguments
    ---------
    rule : object
        Has `combine`.
    vectors : list of TaskVector
        At least one.
    base : State
        What the result will be applied to; passed on to rules that look at
        it.

    Returns
    -------
    TaskVector
        Before the scale.
    """
    if not callable(getattr(rule, "combine", None)):
        raise TypeError(
            f"rule: expected an object with combine(vectors), e.g. TIES(), "
            f"got {type(rule).__name__}"
        )
    if "base" in inspect.signature(rule.combine).parameters:
        return rule.combine(vectors, base=base)
    return rule.combine(vectors)


def scale_of(rule, vector):
    """Return the scale that a rule gives to a combined vector.

    Arguments
    ---------
    rule : object or None
        A rule; one without a `scale` scales by 1.
    vector : TaskVector
        What the scale is for.

    Returns
    -------
    float or dict
        One number, or `{pattern: number}`; a rule whose scale follows from
        the parameter (`LiNeS`) gives a pattern for each.
    """
    if scales_by_parameter(rule):
        scales = rule.scales(list(vector))
        return {glob.escape(name): scale for name, scale in scales.items()}
    scale = getattr(rule, "scale", None)
    return 1.0 if scale is None else scale


def scales_by_parameter(rule):
    """Tell whether a rule's scale follows from the parameter's name.

    Arguments
    ---------
    rule : object or None
        A rule.

    Returns
    -------
    bool
        True for `LiNeS` and its kin.
    """
    from speechbrain_taskarith.vectors.rules.base import Rule

    return isinstance(rule, Rule) and type(rule).scales is not Rule.scales


def _build(module, kind, key, description, again):
    """Make an object of a class that a module has, by its name."""
    found = getattr(module, str(description.get(key)), None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(
            f"no {key} {description.get(key)!r} here; make the object "
            "yourself and pass it"
        )
    arguments = {n: again(v) for n, v in description.items() if n != key}
    try:
        return found(**arguments)
    except TypeError as error:
        raise ValueError(f"{description}: {error}") from None


def _plain(value):
    if hasattr(value, "describe"):
        return value.describe()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        plain = all(isinstance(v, (int, float)) for v in value.values())
        return dict(value) if plain else _IN_MEMORY
    return str(value) if isinstance(value, os.PathLike) else repr(value)
