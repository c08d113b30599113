"""Pieces of error messages."""


def some(names, most=5):
    """Name a few of many parameters.

    Example
    -------
    >>> some("abc", most=2)
    '3 parameter(s) (a, b and 1 more)'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} parameter(s) ({', '.join(names[:most])}{more})"
