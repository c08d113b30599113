"""One figure: drawn without a display, written whole or not at all.

Matplotlib's global state stays untouched, so that a user's own style and
figures stay as they are.
"""

import contextlib
from pathlib import Path

from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.optional import require

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
#: One marker per curve, for print without colour.
MARKERS = "os^Dv<>"
_SUFFIXES = (".png", ".pdf", ".svg")


@contextlib.contextmanager
def figure(path, width=6.4, height=4.2):
    """Open a figure that is written, atomically, when the block ends.

    Arguments
    ---------
    path : str or pathlib.Path
        `.png`, `.pdf` or `.svg`.
    width : float
        In inches.
    height : float
        In inches.

    Yields
    ------
    matplotlib.axes.Axes
        To draw on.

    Raises
    ------
    ValueError
        Another suffix.
    ImportError
        Without matplotlib, naming the extra to install.

    Example
    -------
    >>> path = getfixture("tmp_path") / "line.png"
    >>> with figure(path) as axes:
    ...     _ = axes.plot([0, 1], [2, 3])
    >>> path.stat().st_size > 0
    True
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"{path}: cannot draw {path.suffix!r} files, use one of "
            f"{', '.join(_SUFFIXES)}"
        )
    matplotlib = require("matplotlib", "plots", "plotting")
    figures = require("matplotlib.figure", "plots", "plotting")
    require("matplotlib.backends.backend_agg", "plots", "plotting")
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "svg.hashsalt": "speechbrain_taskarith",
    }
    with matplotlib.rc_context(style):
        # A Figure of its own, not pyplot's: no display, no global list of
        # figures to leak from, safe in threads.
        drawn = figures.Figure(figsize=(width, height), layout="constrained")
        yield drawn.add_subplot()
        # Without a date the same results give the same bytes.
        dated = {".pdf": "CreationDate", ".svg": "Date"}.get(suffix)
        with atomic_write(path, "wb") as stream:
            drawn.savefig(
                stream,
                format=suffix[1:],
                dpi=150,
                metadata={dated: None} if dated else None,
            )


def legend_beside(axes):
    """Put the legend beside the axes, where it hides no point.

    Arguments
    ---------
    axes : matplotlib.axes.Axes
        With labelled curves.
    """
    axes.legend(
        frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9
    )
