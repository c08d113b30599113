"""Checks of numbers: what rules and edits are configured with, and weights."""

import math
import numbers
import re
from collections.abc import Mapping

from speechbrain_taskarith.utils.patterns import first_match, require_match
from speechbrain_taskarith.vectors.states.safetensors import (
    FLOATING,
    TORCH_NAME,
)

# Largest number of float32, in which everything is computed: beyond it a
# factor is infinite, and infinity times zero is NaN.
_LARGEST = 3.4028234663852886e38
# Beyond this a number of threads is a slip of the pen.
MOST_THREADS = 1024


def finite(name, value):
    """Return a number that is finite in float32, in Python's own type."""
    number = _number(value)
    # Also false for NaN.
    if number is None or not abs(number) <= _LARGEST:
        raise ValueError(
            f"{name}={value!r}: expected a finite number (at most 3.4e38, as "
            "float32 holds it)"
        )
    return number


def in_range(name, value, low, high, *, open_high=False):
    """Return a number in `[low, high]`, or in `[low, high)`."""
    number = _number(value)
    inside = number is not None and low <= number <= high
    if not inside or (open_high and number == high):
        end = ")" if open_high else "]"
        raise ValueError(
            f"{name}={value!r}: expected a number in [{low}, {high}{end}"
        )
    return number


def positive_share(name, value):
    """Return a number in `(0, 1]`."""
    number = in_range(name, value, 0, 1)
    if not number:
        raise ValueError(f"{name}={value!r}: expected a number in (0, 1]")
    return number


def whole(name, value):
    """Return an integer that is not negative, such as a seed."""
    number = _number(value)
    if type(number) is not int or number < 0:
        raise ValueError(f"{name}={value!r}: expected an integer >= 0")
    return number


def threads(value):
    """Return a number of threads, at least 1."""
    return whole("threads", in_range("threads", value, 1, MOST_THREADS))


def bytes_of(name, value):
    """Return a number of bytes, which may be a text with a unit.

    Example
    -------
    >>> bytes_of("limit", "300MB"), bytes_of("limit", "2 KiB")
    (300000000, 2048)
    """
    if not isinstance(value, str):
        return in_range(name, value, 0, math.inf)
    found = re.fullmatch(
        r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)(i?)B?\s*", value, re.I
    )
    if not found:
        raise ValueError(
            f"{name}: {value!r}; expected bytes, or e.g. 300MB, 1GiB"
        )
    number, unit, binary = found.groups()
    power = " KMGT".index(unit.upper()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _number(value):
    """Return Python's own number (for JSON and YAML), or None for others.

    NumPy's numbers and tensors of no dimension count, booleans do not.
    """
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if type(value) in (int, float):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def scale(value):
    """Return a scale in plain types: a finite number or `{pattern: number}`."""
    if not isinstance(value, Mapping):
        return finite("scale", value)
    if not value:
        raise ValueError("scale={}: expected at least one pattern")
    return {
        str(pattern): finite(f"scale[{pattern!r}]", number)
        for pattern, number in value.items()
    }


def scale_by_name(value, names, default=0.0):
    """Return `{name: float}` for a scale; the first pattern that fits wins.

    Names that fit no pattern get the default; a pattern that fits no name is
    an error.
    """
    value, names = scale(value), list(names)
    if not isinstance(value, dict):
        return dict.fromkeys(names, float(value))
    for pattern in value:
        require_match(names, pattern)
    return {name: float(first_match(name, value, default)) for name in names}


def weights(value):
    """Return weights of vectors: None, or a list of finite numbers."""
    if value is None:
        return None
    text = isinstance(value, (str, bytes, Mapping))
    if text or not hasattr(value, "__iter__"):
        raise ValueError(f"weights={value!r}: expected a list of numbers")
    return [finite(f"weights[{i}]", w) for i, w in enumerate(value)]


def shares(name, value, *, open_high=False):
    """Return a share in `[0, 1]` (or `[0, 1)`), or a list of one a vector."""
    high = {"open_high": open_high}
    if isinstance(value, (str, bytes, Mapping)) or (
        getattr(value, "shape", None) == () or not hasattr(value, "__iter__")
    ):
        return in_range(name, value, 0, 1, **high)
    return [
        in_range(f"{name}[{i}]", v, 0, 1, **high) for i, v in enumerate(value)
    ]


def one_each(name, value, number):
    """Return a list of one value a vector, of such a list or of one value."""
    if not isinstance(value, list):
        return [value] * number
    if len(value) != number:
        raise ValueError(
            f"{name}: {len(value)} entries for {number} task vectors; "
            "expected one for each"
        )
    return value


def one_of(name, value, allowed):
    """Return a value that is one of those allowed."""
    if value not in allowed:
        listed = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}={value!r}: expected one of {listed}")
    return value


def floating(dtype):
    """Return the plain name of a floating point type that can be stored."""
    name = str(dtype).removeprefix("torch.")
    return one_of("dtype", name, [TORCH_NAME[code] for code in FLOATING])


def overflow_error(name, dtype, scale):
    """Return the error for an edit that the stored type cannot hold."""
    hint = " or write float32 (dtype='float32')" * dtype.endswith("float16")
    return ValueError(
        f"{name!r}: base + {scale:g} * vector is too large for {dtype} and "
        f"became NaN or infinity. Use a smaller scale{hint}"
    )


def all_finite(values):
    """Tell whether an array (NumPy or torch) holds no NaN or infinity."""
    if 0 in values.shape:
        return True
    # Both reductions carry a NaN to their result.
    low, high = values.min(), values.max()
    return bool(low > -math.inf) and bool(high < math.inf)
