"""What all plots share: size, type, colours, legend, and names for readers."""

import contextlib
import os
import re
import textwrap
from pathlib import Path
from statistics import fmean, stdev

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
#: What it was before the method.
GREY = "0.65"
#: One marker per curve, for print without colour.
MARKERS = "os^Dv<>"
#: Widths in inches: of a column (8.5 cm) and of a page (17.5 cm).
COLUMN, PAGE = 3.35, 6.9
#: Points: small, but read in print at the size drawn.
SIZE = 8
SMALL = 7
_SUFFIXES = (".png", ".pdf", ".svg")
#: Further formats to write beside each plot, e.g. `pdf` or `pdf,svg`.
FORMATS = "TASKARITH_PLOT_FORMATS"

# Names of rows that are no words with underscores between them.
_WORDS = {
    "averaging_half": "mean of old and new",
    "averaging_one_over_t": "running mean (1/t)",
    "dare_ties": "DARE + TIES",
    "edited": "edited (SYN2REAL)",
    "edited_both": "edited, both scales",
    "fine_tuning": "fine-tuning",
    "joint": "joint training",
    "lwf": "LwF",
    "multi_task": "multi-task",
    "oracle": "oracle (best on test)",
    "real_target": "real target (bound)",
    "task_arithmetic_paper": "task arithmetic, paper's scale",
    "ties_paper": "TIES, paper's scale",
}
_CAPITALS = frozenset(
    "asr bleu bwt cer ctc dare ewc mt slerp st ties wer".split()
)


def words(name):
    """Return how a row's or file's name is written for a reader.

    Arguments
    ---------
    name : str
        As in tables: `fine_tuning`.

    Returns
    -------
    str
        The method's usual name, or the name without underscores.

    Example
    -------
    >>> words("fine_tuning"), words("valid_seen"), words("st_from_mt")
    ('fine-tuning', 'valid seen', 'ST from MT')
    """
    name = str(name)
    if "." in name:  # of a parameter or a file
        return name
    parts = [p.upper() if p in _CAPITALS else p for p in name.split("_")]
    return _WORDS.get(name, " ".join(parts))


@contextlib.contextmanager
def figure(path, width=COLUMN, height=2.0, panels=None):
    """Open a figure that is written, atomically, when the block ends.

    Gives its axes; with `panels` a list of so many, side by side. Where
    `TASKARITH_PLOT_FORMATS` names further formats (`pdf,svg`), those are
    written beside it.
    """
    paths = _outputs(Path(path))
    matplotlib = require("matplotlib", "plots", "plotting")
    figures = require("matplotlib.figure", "plots", "plotting")
    require("matplotlib.backends.backend_agg", "plots", "plotting")
    cycle = require("cycler", "plots", "plotting").cycler(color=COLOURS)
    style = {
        "font.size": SIZE,
        "axes.titlesize": SIZE,
        "axes.labelsize": SIZE,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "legend.fontsize": SMALL,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "axes.prop_cycle": cycle,
        "axes.titlelocation": "left",
        "lines.linewidth": 1.2,
        "lines.markersize": 3.5,
        "hatch.linewidth": 0.5,
        # Type that journals accept, and text that can be searched.
        "pdf.fonttype": 42,
        "svg.hashsalt": "speechbrain_taskarith",
    }
    with matplotlib.rc_context(style):
        # A Figure of its own, not pyplot's: no display, no global list of
        # figures to leak from, safe in threads.
        drawn = figures.Figure(figsize=(width, height), layout="constrained")
        if panels is None:
            yield drawn.add_subplot()
        else:
            grid = drawn.subplots(
                1, panels, squeeze=False, sharex=True, sharey=True
            )
            yield list(grid[0])
        for output in paths:
            _write(drawn, output)


def _outputs(path):
    """Return the path and those of further formats, or raise."""
    further = os.environ.get(FORMATS, "").replace(",", " ").split()
    suffixes = [path.suffix, *(f".{form.lstrip('.')}" for form in further)]
    for number, suffix in enumerate(suffixes):
        if suffix.lower() not in _SUFFIXES:
            where = f"{FORMATS}={os.environ[FORMATS]}" if number else path
            raise ValueError(
                f"{where}: cannot draw {suffix!r} files, use "
                f"one of {', '.join(_SUFFIXES)}"
            )
    return [path.with_suffix(suffix) for suffix in dict.fromkeys(suffixes)]


def _write(drawn, path):
    suffix = path.suffix.lower()
    # Without a date the same results give the same bytes.
    dated = {".pdf": "CreationDate", ".svg": "Date"}.get(suffix)
    metadata = {dated: None} if dated else None
    with atomic_write(path, "wb") as stream:
        drawn.savefig(stream, format=suffix[1:], dpi=300, metadata=metadata)


def legend_below(axes, handles=None):
    """Put the legend under the plot, where it hides no point.

    Arguments
    ---------
    axes : matplotlib.axes.Axes
        Of a figure of `figure`.
    handles : list or None
        What to list; None: all that has a label.
    """
    handles = handles or axes.get_legend_handles_labels()[0]
    labels = [handle.get_label() for handle in handles]
    if not labels:
        return
    drawn = axes.figure
    # Characters in a line; a key takes as much as five.
    room = drawn.get_figwidth() * 72 / (0.52 * SMALL)
    across = max(1, int(room // (max(map(len, labels)) + 5)))
    rows = -(-len(labels) // across)
    # The plot keeps its own height.
    drawn.set_figheight(drawn.get_figheight() + 0.05 + 0.135 * rows)
    drawn.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(across, len(labels)),
        frameon=False,
        handlelength=1.6,
        columnspacing=1.2,
        labelspacing=0.3,
        borderaxespad=0.2,
    )


def wrapped(names, width, size=SMALL):
    """Return names broken into lines that fit a width in inches, or None.

    None where a single word does not fit: then labels have to be turned.
    """
    room = int(width * 72 / (0.52 * size) - 0.8)
    shown = [words(name) for name in names]
    parts = [word for name in shown for word in re.split(r"\s|(?<=-)", name)]
    if not parts or max(map(len, parts)) > room:
        return None
    lines = [
        textwrap.wrap(name, room, break_long_words=False) for name in shown
    ]
    if max(map(len, lines)) > 3:
        return None
    return ["\n".join(found) for found in lines]


def name_steps(axes, names, width, size=SMALL, every=1):
    """Name every n-th step of the x axis; turned only where they do not fit.

    `width`: inches for each name.
    """
    fitting = wrapped(names, width, size)
    shown = fitting or [words(name) for name in names]
    turned = {} if fitting else {"rotation": 40, "rotation_mode": "anchor"}
    side = "center" if fitting else "right"
    places = range(0, every * len(names), every)
    axes.set_xticks(places, shown, ha=side, fontsize=size, **turned)


def label_axes(axes, xlabel, ylabel, title):
    """Label axes with values on y, and draw faint lines to read them by."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    set_title(axes, title)
    axes.yaxis.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def set_title(axes, title):
    """Set a title, broken into lines that fit beside the names of y."""
    if title:
        names = [len(text.get_text()) for text in axes.get_yticklabels()]
        left = 0.35 + 0.055 * max(4, *names, 4)
        room = (axes.figure.get_figwidth() - left) * 72 / (0.54 * SIZE)
        axes.set_title("\n".join(textwrap.wrap(title, max(int(room), 12))))


def spread(value):
    """Return mean and sample standard deviation of one or more values."""
    values = [float(v) for v in (value if several(value) else [value])]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def several(value):
    """Tell whether a value is a list or an array of them."""
    # Tensors without a dimension have a __len__ that only raises.
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def require_content(curves):
    """Raise unless there are curves, and each has a point."""
    empty = [name for name, curve in curves.items() if not curve]
    if not curves or empty:
        which = f" for {', '.join(map(str, empty))}" if empty else ""
        raise ValueError(
            f"nothing to draw{which}; give at least one point per curve"
        )
