"""One way to show progress for everything that takes long."""

import os
import sys


def is_watched():
    """Tell whether bars are shown: on a terminal, or where one asked."""
    asked = os.environ.get("TASKARITH_PROGRESS", "0") not in ("", "0")
    return asked or sys.stderr.isatty()


def progress(
    iterable=None, *, total=None, desc=None, unit="it", show_progress=True
):
    """Wrap an iterable in a bar, or make one to be moved by `.update(n)`.

    The bar goes to standard error, so that piped results stay clean. It is
    quiet where nobody watches (not a terminal) unless
    `TASKARITH_PROGRESS=1` is set.

    Example
    -------
    >>> list(progress([1, 2], desc="adding", show_progress=False))
    [1, 2]
    """
    from tqdm import tqdm

    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        disable=not (show_progress and is_watched()),
    )
