"""Checks of what a rule is configured with.

Authors
 * speechbrain_taskarith contributors 2026
"""

import math
from collections.abc import Mapping


def in_range(name, value, low, high, *, open_high=False):
    """Return a number that lies in a range.

    Arguments
    ---------
    name : str
        The argument, for the error.
    value : float
        What was given.
    low, high : float
        The range, both ends allowed.
    open_high : bool
        True: `high` itself is not allowed.

    Returns
    -------
    float
        The value.

    Raises
    ------
    ValueError
        Out of range, NaN, or no number; it names argument and range.

    Example
    -------
    >>> in_range("density", 0.2, 0, 1)
    0.2
    >>> in_range("density", 20, 0, 1)
    Traceback (most recent call last):
    ValueError: density=20: expected a number in [0, 1]
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_high and value == high):
        end = ")" if open_high else "]"
        raise ValueError(
            f"{name}={value!r}: expected a number in [{low}, {high}{end}"
        )
    return value


def finite(name, value):
    """Return a finite number (see `in_range`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a finite number")
    return value


def scale(value):
    """Return a scale: a finite number, or `{pattern: finite number}`.

    Arguments
    ---------
    value : object
        What was given.

    Returns
    -------
    float or dict
        The same, as plain numbers.
    """
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("scale={}: expected at least one pattern")
        return {
            str(pattern): finite(f"scale[{pattern!r}]", number)
            for pattern, number in value.items()
        }
    return finite("scale", value)


def weights(value):
    """Return weights of vectors: None, or a list of finite numbers.

    Arguments
    ---------
    value : object
        What was given.

    Returns
    -------
    list of float, or None
        The same, as plain numbers.
    """
    if value is None:
        return None
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(
        value, "__iter__"
    ):
        raise ValueError(f"weights={value!r}: expected a list of numbers")
    return [finite(f"weights[{i}]", w) for i, w in enumerate(value)]


def one_of(name, value, allowed):
    """Return a value that is one of those allowed.

    Arguments
    ---------
    name : str
        What the argument is called.
    value : object
        What was given.
    allowed : sequence
        The values it may have.

    Returns
    -------
    object
        The value.
    """
    if value not in allowed:
        listed = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}={value!r}: expected one of {listed}")
    return value


def whole(name, value):
    """Return an integer that is not negative, such as a seed.

    Arguments
    ---------
    name : str
        What the argument is called.
    value : object
        What was given.

    Returns
    -------
    int
        The value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={value!r}: expected an integer >= 0")
    return value
