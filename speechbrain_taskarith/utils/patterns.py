"""Shell-style patterns on parameter names, anchored at both ends.

`encoder.*` matches `encoder.norm.weight` and not `decoder.0.encoder_attn`;
`layers.1.*` does not match `layers.10.*`, since a dot is a dot.
"""

import difflib
import itertools
import re
from fnmatch import fnmatchcase, translate


def matches(name, pattern):
    """Tell whether a whole name fits a pattern; case counts.

    `*` is any run of characters, `?` one, `[abc]` one of these. A name fits
    itself, also with brackets in it.

    Example
    -------
    >>> matches("layers.3.w", "layers.[34].w"), matches("a.[3].w", "a.[3].w")
    (True, True)
    """
    return name == pattern or fnmatchcase(name, pattern)


def select(names, include=("*",), exclude=(), what="parameter"):
    """Return the names that are included and not excluded, in order.

    A pattern that fits no name is an error: most often it is misspelt, and
    ignoring it would leave the model unedited without a word.

    Example
    -------
    >>> select(["a.weight", "a.bias", "b.weight"], exclude=["*.bias"])
    ['a.weight', 'b.weight']
    """
    names = list(names)
    include, exclude = as_tuple(include), as_tuple(exclude)
    for pattern in include + exclude:
        require_match(names, pattern, what)
    return [
        name
        for name in names
        if any(matches(name, p) for p in include)
        and not any(matches(name, p) for p in exclude)
    ]


def first_match(name, table, default=None):
    """Return the value of the first pattern of a table that a name fits.

    Example
    -------
    >>> first_match("enc.0.bias", {"enc.*": 0.3, "*": 0.1})
    0.3
    """
    hits = (value for pattern, value in table.items() if matches(name, pattern))
    return next(hits, default)


def fitting(names, pattern):
    """Tell whether a pattern fits any of some names."""
    # "*" over no names at all is an empty model, not a misspelling.
    return pattern == "*" or any(matches(name, pattern) for name in names)


def require_match(names, pattern, what="parameter"):
    """Raise ValueError, with the nearest names, if a pattern fits none."""
    if fitting(names, pattern):
        return
    plain = pattern.replace("*", "")
    near = difflib.get_close_matches(plain, list(names), n=3, cutoff=0.0)
    raise ValueError(
        f"pattern {pattern!r} matches no {what} name. Patterns are anchored "
        "shell patterns on the whole name (add a '*' in front or behind to "
        f"leave an end open); names look like: {', '.join(near) or 'none'}"
    )


def replace(names, table):
    """Return `{name: new name}` by a table `{pattern: replacement}`.

    The first pattern that fits a name wins; names that fit none stay. Each
    `*` of a replacement stands for what that of the pattern stands for, in
    order.

    Example
    -------
    >>> replace(["a.g", "b.w"], {"*.g": "*.norm.gain", "b.*": "c.*"})
    {'a.g': 'a.norm.gain', 'b.w': 'c.w'}
    """
    compiled = {}
    for pattern, replacement in table.items():
        if replacement.count("*") > pattern.count("*"):
            raise ValueError(
                f"rename: {replacement!r} has more '*' than {pattern!r}, "
                "which says what they stand for"
            )
        # What `translate` puts around its result is cut off.
        parts = [translate(part)[4:-3] for part in pattern.split("*")]
        compiled[pattern] = re.compile("(.*)".join(parts), re.DOTALL)
    renamed = {}
    for name in names:
        renamed[name] = name
        for pattern, replacement in table.items():
            if found := compiled[pattern].fullmatch(name):
                parts = replacement.split("*")
                filled = itertools.zip_longest(
                    parts, found.groups()[: len(parts) - 1], fillvalue=""
                )
                renamed[name] = "".join(itertools.chain(*filled))
                break
    return renamed


def rename(names, table=None, prefix=None, label="the model"):
    """Return `{name: new name}`: a prefix is taken away, then `replace`.

    Names without the prefix are left out. ValueError where a pattern or the
    prefix fits no name, or two names become one.

    Example
    -------
    >>> rename(["enc.w.g", "head"], {"*.g": "*.gain"}, prefix="enc.")
    {'enc.w.g': 'w.gain'}
    """
    names, start = list(names), prefix or ""
    plain = {n: n[len(start) :] for n in names if n.startswith(start)}
    if not plain:
        require_match(names, f"{prefix}*")
    table = {str(k): str(v) for k, v in (table or {}).items()}
    for pattern in table:
        require_match(plain.values(), pattern)
    new = replace(plain.values(), table)
    first = {}
    for name, inner in plain.items():
        other = first.setdefault(new[inner], name)
        if other != name:
            raise ValueError(
                f"{label}: rename makes {new[inner]!r} of both {other!r} and "
                f"{name!r}"
            )
    return {name: new[inner] for name, inner in plain.items()}


def as_tuple(patterns):
    """Return one pattern or several as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
