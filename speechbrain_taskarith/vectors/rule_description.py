"""What those who apply rules ask of one: its text, its vector, its scale.

A user's own rule need be no `Rule`: an object with
`combine(vectors) -> TaskVector`, and maybe a `scale`, will do.

Authors
 * speechbrain_taskarith contributors 2026
"""

import glob
import inspect


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
    from .rule import from_description

    if "module" in description:
        raise ValueError(
            f"rule {description['rule']!r} is none of this package's; pass "
            "the rule itself, set up as it was"
        )
    return from_description(description)


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
    from .rule import Rule

    if isinstance(rule, Rule) and type(rule).scales is not Rule.scales:
        scales = rule.scales(list(vector))
        return {glob.escape(name): scale for name, scale in scales.items()}
    scale = getattr(rule, "scale", None)
    return 1.0 if scale is None else scale
