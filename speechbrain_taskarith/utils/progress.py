"""One way to show progress for everything that takes long."""

import os
import sys


def progress(iterable=None, *, total=None, desc=None, unit="it", enable=True):
    """Wrap an iterable (or make a manual bar) that shows its progress.

    The bar goes to standard error, so that piped results stay clean, and it
    is quiet where nobody watches (not a terminal) unless
    `TASKARITH_PROGRESS=1` is set.

    Arguments
    ---------
    iterable : iterable or None
        What to go through; None makes a bar to be moved by `.update(n)`.
    total : int or None
        Number of steps, where the iterable does not know.
    desc : str or None
        Short text in front of the bar.
    unit : str
        What a step is called.
    enable : bool
        False shows nothing.

    Returns
    -------
    tqdm.tqdm
        Also a context manager.

    Example
    -------
    >>> list(progress([1, 2], desc="adding", enable=False))
    [1, 2]
    """
    from tqdm import tqdm

    watched = sys.stderr.isatty() or os.environ.get("TASKARITH_PROGRESS")
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        disable=not (enable and watched),
    )
