"""Plots for results: WER against scale, heat maps, values by layer."""

import contextlib
import math
from collections.abc import Mapping
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
#: One marker per curve, for print without colour.
MARKERS = "os^Dv<>"
# How a point of a surface is framed.
_LINES = {
    "baseline": ("#000000", ":"),
    "chosen": ("#000000", "-"),
    "oracle": ("#D55E00", "--"),
}
_SUFFIXES = (".png", ".pdf", ".svg")


@contextlib.contextmanager
def figure(path, width=6.4, height=4.2):
    """Open a figure that is written, atomically, when the block ends."""
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
            metadata = {dated: None} if dated else None
            drawn.savefig(stream, format=suffix[1:], dpi=150, metadata=metadata)


def legend_beside(axes):
    """Put the legend beside the axes, where it hides no point."""
    axes.legend(
        frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9
    )


def plot_scale_curve(
    curves,
    path,
    *,
    baseline=None,
    chosen=None,
    oracle=None,
    title="WER against scale",
    xlabel="scale",
    ylabel="WER (%)",
):
    """Draw WER against the scale of the task vector.

    Arguments
    ---------
    curves : dict of str: dict of float: float
        `{name: {scale: WER in %}}`; a list of values at a scale (several
        seeds) is drawn as its mean, with a band of one sample standard
        deviation where a scale has two values or more.
    path
        See `plot_heat_map`, also for what is returned.
    baseline : float or None
        WER without the edit, drawn as a dashed line.
    chosen : float, tuple, list of tuple or None
        The chosen scale (a vertical line), or `(scale, WER)` to mark the
        point as well; a list of such pairs where each group of parameters
        has its own scale.
    oracle : float, tuple, list of tuple or None
        The best scale on the test data in the same form, drawn apart: it
        is an upper bound that no one may choose.
    title, xlabel, ylabel : str
        Above, under and beside the plot.

    Raises
    ------
    ValueError
        No curve, or a curve without a point.

    Example
    -------
    >>> path = getfixture("tmp_path") / "scale.png"
    >>> plot_scale_curve(
    ...     {"news": {0: 20.0, 0.2: 17.5, 0.4: 19.0}}, path,
    ...     baseline=20.0, chosen=(0.2, 17.5),
    ... ).name
    'scale.png'
    """
    _require_curves(curves)
    with figure(path) as axes:
        for i, (name, curve) in enumerate(curves.items()):
            scales = sorted(curve)
            means, deviations = zip(*(_spread(curve[s]) for s in scales))
            _line(axes, scales, means, i, name)
            if any(deviations):
                axes.fill_between(
                    scales,
                    [m - s for m, s in zip(means, deviations)],
                    [m + s for m, s in zip(means, deviations)],
                    color=COLOURS[i % len(COLOURS)],
                    alpha=0.15,
                    linewidth=0,
                )
        if baseline is not None:
            dashes = {"color": "0.35", "linestyle": "--", "linewidth": 1}
            label = f"baseline: {baseline:.2f}"
            axes.axhline(baseline, zorder=0, label=label, **dashes)
        _mark(axes, chosen, "chosen", "#000000", "*", "-")
        _mark(axes, oracle, "oracle", "#CC79A7", "X", ":")
        _label(axes, xlabel, ylabel, title)
        legend_beside(axes)
    return Path(path)


def plot_heat_map(
    values,
    rows,
    columns,
    path,
    *,
    title="",
    xlabel="",
    ylabel="",
    colours="viridis",
    limits=None,
    form="{:.1f}",
    unit="",
):
    """Draw a matrix as an annotated heat map.

    Arguments
    ---------
    values : list of list of float, or array [R, C]
        NaN cells stay empty.
    rows, columns : sequence of str
        R and C names.
    path : str or pathlib.Path
        `.png`, `.pdf` or `.svg`.
    title : str
        Above the plot.
    xlabel, ylabel : str
        What the columns and the rows are.
    colours : str
        A matplotlib colour map.
    limits : tuple of float or None
        Values at the ends of the colour map; None takes the data's.
    form : str
        Format of the figures in the cells.
    unit : str
        Beside the colour bar.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    ValueError
        Names that do not fit the matrix, or no value at all.

    Example
    -------
    >>> path = getfixture("tmp_path") / "matrix.png"
    >>> plot_heat_map([[1.0, 0.2]], ["a"], ["a", "b"], path).name
    'matrix.png'
    """
    values = [[float(value) for value in row] for row in values]
    _require_matrix(values, rows, columns)
    known = [v for row in values for v in row if math.isfinite(v)]
    low, high = limits or (min(known), max(known))
    side = 0.62
    longest = max(len(str(name)) for name in (*rows, *columns))
    # Wide enough for the title too; every cell holds its figure.
    width = max(1.8 + side * len(columns) + 0.07 * longest, 4.2)
    height = max(1.3 + side * 0.8 * len(rows) + 0.05 * longest, 2.6)
    with figure(path, width, height) as axes:
        matplotlib = require("matplotlib", "plots", "plotting")
        colour_map = matplotlib.colormaps[colours].with_extremes(bad="0.95")
        image = axes.imshow(
            values, cmap=colour_map, vmin=low, vmax=high, aspect="auto"
        )
        # About eight characters fit under a cell.
        turned = max(len(str(name)) for name in columns) > 8
        _name_steps(axes, columns, 40 if turned else 0)
        _write_cells(axes, values, rows, form, 9 if len(columns) <= 10 else 7)
        _label_cells(axes, xlabel, ylabel, title)
        axes.figure.colorbar(image, ax=axes, label=unit, fraction=0.05)
    return Path(path)


def plot_scale_surface(
    surface,
    path,
    *,
    baseline=None,
    chosen=None,
    oracle=None,
    title="",
    ylabel="scale of the target vector",
    xlabel="scale of the difference",
    unit="WER (%)",
):
    """Draw WER over two scales, as cells with the figure in each.

    With a baseline, what is better than it is blue and what is worse is red;
    the palest cells are like it. The points are frames around their cells.

    Arguments
    ---------
    surface : dict of (float, float): float
        `{(scale on the y axis, scale on the x axis): WER in %}`; of a list of
        values (several seeds) the mean is drawn. NaN and points that are
        missing stay empty.
    path
        See `plot_heat_map`, also for what is returned.
    baseline, chosen, oracle : tuple of float or None
        Points of the surface: the one to compare with, of SYN2REAL (1, 0);
        the one chosen on development data; and the best on the test data, a
        bound that no one may choose.
    title, ylabel, xlabel, unit : str
        Above the plot, beside and under it, and beside the colour bar.

    Raises
    ------
    ValueError
        No finite value, or a point that is not in the surface.

    Example
    -------
    >>> path = getfixture("tmp_path") / "surface.png"
    >>> surface = {(1, 0): 56, (1, 0.5): 50, (0.5, 0): 51, (0.5, 0.5): 48}
    >>> plot_scale_surface(
    ...     surface, path, baseline=(1, 0), chosen=(0.5, 0.5)
    ... ).name
    'surface.png'
    """
    means = {point: _spread(value)[0] for point, value in surface.items()}
    ys, xs = (sorted({point[axis] for point in means}) for axis in (0, 1))
    values = [[means.get((y, x), math.nan) for x in xs] for y in ys]
    known = [v for v in means.values() if math.isfinite(v)]
    if not known:
        raise ValueError("the surface holds no finite value; nothing to draw")
    best, worst = min(known), max(known)
    marks = {"baseline": baseline, "chosen": chosen, "oracle": oracle}
    marks = {what: tuple(point) for what, point in marks.items() if point}
    for what, point in marks.items():
        if not math.isfinite(means.get(point, math.nan)):
            raise ValueError(f"{what}={point}: no value at this point")
    low, high, colours = best, worst, "YlOrRd"
    if baseline:
        # As far up as down: one hopeless point would pale all others. Farther
        # than the best, on whose cell frame and figure are to be seen.
        middle = means[marks["baseline"]]
        reach = 1.5 * (middle - best) or worst - middle or 1.0
        low, high, colours = middle - reach, middle + reach, "RdBu_r"
    width = max(1.6 + 0.44 * len(xs), 3.6)
    with figure(path, width, max(1.7 + 0.34 * len(ys), 3.4)) as axes:
        look = {"cmap": colours, "vmin": low, "vmax": high}
        image = axes.imshow(values, origin="lower", aspect="auto", **look)
        axes.set_facecolor("0.9")
        _name_steps(axes, [f"{x:g}" for x in xs], 0)
        _write_cells(axes, values, [f"{y:g}" for y in ys], "{:.1f}", 8)
        _label_cells(axes, xlabel, ylabel, title)
        framed = []
        for what, point in marks.items():
            label = f"{what} ({point[0]:g}, {point[1]:g}): {means[point]:.1f}"
            # One inside the other, where they fall together.
            inset = 0.05 + 0.08 * framed.count(point)
            framed.append(point)
            cell = xs.index(point[1]), ys.index(point[0])
            _frame(axes, cell, inset, *_LINES[what], label)
        beside = {"label": unit, "fraction": 0.05}
        beside["extend"] = "max" if worst > high else "neither"
        axes.figure.colorbar(image, ax=axes, **beside)
        if marks:
            below = {"loc": "outside lower center", "frameon": False}
            axes.figure.legend(fontsize=9, **below)
    return Path(path)


def plot_wer_matrix(
    matrix, domains, path, *, title="WER (%) on each domain after each step"
):
    """Draw the WER on every domain after every step of a sequence.

    `matrix` [N, N] holds WER in % as `LifelongMatrix.rows()` gives them,
    NaN where not measured; `domains` the N names in the order learned. The
    rest is as `plot_heat_map`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "matrix.png"
    >>> nan = float("nan")
    >>> plot_wer_matrix([[9.0, nan], [12.0, 20.0]], ["us", "de"], path).name
    'matrix.png'
    """
    return plot_heat_map(
        matrix,
        domains,
        domains,
        path,
        title=title,
        xlabel="tested on",
        ylabel="after learning",
        # Pale where good, dark where bad.
        colours="YlOrRd",
        unit="WER (%)",
    )


def plot_by_layer(
    values, path, *, kind="bar", title="", ylabel="", xlabel="layer"
):
    """Draw one number per layer, for one model or several side by side.

    Arguments
    ---------
    values : dict of str: float, or dict of str: dict of str: float
        `{layer: value}`, or `{name: {layer: value}}`. Layers keep the order
        in which they first appear.
    path, title
        See `plot_heat_map`, also for what is returned.
    kind : str
        `"bar"` or `"line"` (easier to read from about five names on).
    ylabel, xlabel : str
        What the values and the layers are.

    Raises
    ------
    ValueError
        Nothing to draw, or another kind.

    Example
    -------
    >>> path = getfixture("tmp_path") / "norms.png"
    >>> plot_by_layer({"encoder.0": 1.5, "encoder.1": 2.0}, path).name
    'norms.png'
    """
    if kind not in ("bar", "line"):
        raise ValueError(f"kind is {kind!r}, expected 'bar' or 'line'")
    single = not any(isinstance(v, Mapping) for v in values.values())
    groups = {"": values} if single else values
    _require_curves(groups)
    layers = list(dict.fromkeys(x for group in groups.values() for x in group))
    share = 0.8 / len(groups)
    longest = max(len(str(layer)) for layer in layers)
    width = max(6.4, 0.28 * len(layers) + 1.5)
    with figure(path, width, 3.4 + min(0.06 * longest, 2)) as axes:
        for i, (name, group) in enumerate(groups.items()):
            heights = [float(group.get(layer, math.nan)) for layer in layers]
            if kind == "bar":
                left = [x + (i + 0.5) * share - 0.4 for x in range(len(layers))]
                colour = COLOURS[i % len(COLOURS)]
                axes.bar(left, heights, share, color=colour, label=name)
            else:
                _line(axes, range(len(layers)), heights, i, name)
        _name_steps(axes, layers, 50 if longest * len(layers) > 70 else 0)
        _label(axes, xlabel, ylabel, title)
        if not single:
            legend_beside(axes)
    return Path(path)


def _write_cells(axes, values, rows, form, size):
    """Name the rows of an image and write each finite value into its cell."""
    (image,) = axes.get_images()
    axes.set_yticks(range(len(rows)), [str(name) for name in rows])
    centred = {"ha": "center", "va": "center", "fontsize": size}
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if not math.isfinite(value):
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            # Luminance (ITU-R BT.601) decides whether black or white text
            # can be read on the cell.
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            colour = "black" if light else "white"
            axes.text(c, r, form.format(value), color=colour, **centred)


def _label_cells(axes, xlabel, ylabel, title):
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, wrap=True)


def _frame(axes, cell, inset, colour, line, label):
    """Frame a cell of an image, with a white rim that shows on dark ones."""
    patches = require("matplotlib.patches", "plots", "plotting")
    effects = require("matplotlib.patheffects", "plots", "plotting")
    corner, side = [place - 0.5 + inset for place in cell], 1 - 2 * inset
    look = {"fill": False, "edgecolor": colour, "linestyle": line}
    look["path_effects"] = [effects.withStroke(linewidth=3.6, foreground="w")]
    frame = {"linewidth": 1.8, "label": label, **look}
    axes.add_patch(patches.Rectangle(corner, side, side, **frame))


def _line(axes, x, y, i, name):
    """Draw the i-th curve in its own colour, with its own marker."""
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    axes.plot(x, y, color=colour, marker=marker, markersize=4, label=name)


def _name_steps(axes, names, angle):
    axes.set_xticks(
        range(len(names)),
        [str(name) for name in names],
        rotation=angle,
        ha="right" if angle else "center",
        rotation_mode="anchor" if angle else "default",
    )


def _label(axes, xlabel, ylabel, title):
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.yaxis.grid(True, color="0.9")
    axes.set_axisbelow(True)


def _spread(value):
    """Return mean and sample standard deviation of one or more values."""
    values = [float(v) for v in (value if _several(value) else [value])]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _several(value):
    # Tensors without a dimension have a __len__ that only raises.
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def _mark(axes, where, what, colour, marker, line):
    if where is None:
        return
    if isinstance(where, list) and _several(where[0]):
        for point in where:
            _mark(axes, point, what, colour, marker, line)
        return
    scale, wer = where if _several(where) else (where, None)
    label = f"{what}: {scale:g}"
    if wer is not None:
        star = {"markersize": 11, "markeredgecolor": "white", "zorder": 5}
        label += f" ({wer:.2f})"
        axes.plot([scale], [wer], marker, color=colour, label=label, **star)
        label = None
    thin = {"linestyle": line, "linewidth": 0.8, "alpha": 0.6, "zorder": 1}
    axes.axvline(scale, color=colour, label=label, **thin)


def _require_curves(curves):
    empty = [name for name, curve in curves.items() if not curve]
    if not curves or empty:
        which = f" for {', '.join(map(str, empty))}" if empty else ""
        raise ValueError(
            f"nothing to draw{which}; give at least one point per curve"
        )


def _require_matrix(values, rows, columns):
    lengths = {len(row) for row in values}
    if len(values) != len(rows) or lengths != {len(columns)}:
        raise ValueError(
            f"the matrix has {len(values)} rows of {sorted(lengths)} values, "
            f"the names are {len(rows)} for rows and {len(columns)} for "
            "columns"
        )
    if not any(math.isfinite(v) for row in values for v in row):
        raise ValueError("the matrix holds no finite value; nothing to draw")
