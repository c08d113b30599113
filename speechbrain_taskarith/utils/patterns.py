"""Shell-style patterns on parameter names, anchored at both ends.

`encoder.*` matches `encoder.norm.weight` and not `decoder.0.encoder_attn`;
`layers.1.*` does not match `layers.10.*`, since a dot is a dot.
"""

import difflib
import fnmatch
import functools
import re


@functools.lru_cache(maxsize=4096)
def _compiled(pattern):
    return re.compile(fnmatch.translate(pattern))


def matches(name, pattern):
    """Tell whether a whole name fits a pattern (case counts).

    Arguments
    ---------
    name : str
        A parameter's full name.
    pattern : str
        `*` any run of characters, `?` one character, `[abc]` one of these.

    Returns
    -------
    bool
        True where the whole name fits.

    Example
    -------
    >>> matches("layers.1.weight", "layers.1.*")
    True
    >>> matches("layers.10.weight", "layers.1.*")
    False
    >>> matches("decoder.0.encoder_attn.weight", "encoder*")
    False
    """
    return _compiled(pattern).match(name) is not None


def select(names, include=("*",), exclude=(), what="parameter"):
    """Return the names that are included and not excluded, in order.

    Arguments
    ---------
    names : iterable of str
        All names.
    include : str or sequence of str
        A name is taken when it fits one of these patterns.
    exclude : str or sequence of str
        ... and none of these.
    what : str
        What the names are, for the error.

    Returns
    -------
    list of str
        The chosen names.

    Raises
    ------
    ValueError
        A pattern that fits no name: most often a misspelling, and silently
        ignored it would leave the model unedited.

    Example
    -------
    >>> select(["a.weight", "a.bias", "b.weight"], exclude=["*.bias"])
    ['a.weight', 'b.weight']
    """
    names = list(names)
    include, exclude = as_tuple(include), as_tuple(exclude)
    for pattern in include + exclude:
        # "*" over no names at all is an empty model, not a misspelling.
        if pattern != "*":
            require_match(names, pattern, what)
    return [
        name
        for name in names
        if any(matches(name, p) for p in include)
        and not any(matches(name, p) for p in exclude)
    ]


def first_match(name, table, default=None):
    """Return the value of the first pattern that a name fits.

    Arguments
    ---------
    name : str
        A parameter's full name.
    table : dict
        `{pattern: value}`, tried in the order written.
    default : object
        What to return when none fits.

    Returns
    -------
    object
        The value.

    Example
    -------
    >>> first_match("enc.0.bias", {"enc.*": 0.3, "*": 0.1})
    0.3
    """
    for pattern, value in table.items():
        if matches(name, pattern):
            return value
    return default


def require_match(names, pattern, what="parameter"):
    """Raise when a pattern fits none of the names.

    Arguments
    ---------
    names : sequence of str
        All names.
    pattern : str
        The pattern.
    what : str
        What the names are, for the error.

    Raises
    ------
    ValueError
        Naming the pattern and the names nearest to it.
    """
    if any(matches(name, pattern) for name in names):
        return
    near = difflib.get_close_matches(
        pattern.replace("*", ""), list(names), n=3, cutoff=0.0
    )
    raise ValueError(
        f"pattern {pattern!r} matches no {what} name. Patterns are anchored "
        "shell patterns on the whole name (add a '*' in front or behind to "
        f"leave an end open); names look like: {', '.join(near) or 'none'}"
    )


def as_tuple(patterns):
    """Return one pattern or several as a tuple.

    Arguments
    ---------
    patterns : str or sequence of str
        One pattern, or some.

    Returns
    -------
    tuple of str
        The patterns.
    """
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
