"""Checks of what a rule is configured with."""

import math
import numbers
from collections.abc import Mapping

# Largest number of float32, in which everything is computed: beyond it a
# factor is infinite, and infinity times zero is NaN.
_LARGEST = 3.4028234663852886e38


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
    if (
        not _is_number(value)
        or not low <= value <= high
        or (open_high and value == high)
    ):
        end = ")" if open_high else "]"
        raise ValueError(
            f"{name}={value!r}: expected a number in [{low}, {high}{end}"
        )
    return _plain(value)


def finite(name, value):
    """Return a number that is finite in float32 (see `in_range`)."""
    if not _is_number(value) or not is_finite(value):
        raise ValueError(
            f"{name}={value!r}: expected a finite number (at most 3.4e38, as "
            "float32 holds it)"
        )
    return _plain(value)


def is_finite(value):
    """Tell whether a number is finite in float32.

    Arguments
    ---------
    value : float
        A number.

    Returns
    -------
    bool
        False for NaN, infinity, and what float32 makes infinite.

    Example
    -------
    >>> is_finite(0.5), is_finite(1e39)
    (True, False)
    """
    return math.isfinite(value) and abs(value) <= _LARGEST


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


def _is_number(value):
    """True for Python's and NumPy's numbers, not for booleans."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _plain(value):
    """Return Python's own number: descriptions go into JSON and YAML."""
    if type(value) in (int, float):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


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
    whole = isinstance(value, numbers.Integral) and _is_number(value)
    if not whole or value < 0:
        raise ValueError(f"{name}={value!r}: expected an integer >= 0")
    return _plain(value)
