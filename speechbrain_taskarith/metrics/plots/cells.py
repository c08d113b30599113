"""Matrices as cells: heat maps, WER after each step, WER over two scales."""

import math
from pathlib import Path

from speechbrain_taskarith.metrics.plots.look import (
    COLOURS,
    COLUMN,
    PAGE,
    SMALL,
    figure,
    legend_below,
    name_steps,
    set_title,
    spread,
    words,
    wrapped,
)
from speechbrain_taskarith.utils.optional import require

# How a point of a surface is framed.
_LINES = {
    "baseline": ("#000000", ":"),
    "chosen": ("#000000", "-"),
    "oracle": ("#D55E00", "--"),
}


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
    """Draw a matrix as an annotated heat map; one number alone as a bar.

    Arguments
    ---------
    values : list of list of float, or array [R, C]
        NaN cells stay empty.
    rows, columns : sequence of str
        R and C names.
    path : str or pathlib.Path
        `.png`, `.pdf` or `.svg`. Where the environment names further
        formats (`TASKARITH_PLOT_FORMATS=pdf,svg`), each plot is written in
        those too, beside it.
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
    if len(known) == 1:
        return _draw_number(
            values,
            rows,
            columns,
            path,
            title,
            f"{unit or 'value'}: {form}",
            limits,
        )
    texts = [form.format(value) for value in known]
    # Inches: every cell holds its figure, the rows' names beside them.
    names = 0.055 * max(len(words(name)) for name in rows) + 0.25 * bool(ylabel)
    wanted = 0.055 * max(map(len, texts)) + 0.16
    width = max(COLUMN, min(PAGE, 0.75 + names + wanted * len(columns)))
    side = (width - 0.75 - names) / len(columns)
    size = SMALL if side >= wanted else SMALL * max(0.6, side / wanted)
    fits = wrapped(columns, side) is not None
    longest = max(len(words(name)) for name in columns)
    below = 0.35 if fits else 0.2 + 0.04 * longest
    height = 0.3 * bool(title) + 0.25 * bool(xlabel) + below + 0.3 * len(rows)
    with figure(path, width, max(height, 1.3)) as axes:
        matplotlib = require("matplotlib", "plots", "plotting")
        colour_map = matplotlib.colormaps[colours].with_extremes(bad="0.95")
        image = axes.imshow(
            values, cmap=colour_map, vmin=low, vmax=high, aspect="auto"
        )
        name_steps(axes, columns, side)
        _write_cells(axes, values, rows, form, size)
        _label_cells(axes, xlabel, ylabel, title)
        _colour_bar(axes, image, unit)
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
    means = {point: spread(value)[0] for point, value in surface.items()}
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
    width = max(COLUMN, min(PAGE, 1.2 + 0.3 * len(xs)))
    size = SMALL * min(1.0, (width - 1.2) / (0.3 * len(xs)))
    with figure(path, width, 0.8 + 0.24 * len(ys)) as axes:
        look = {"cmap": colours, "vmin": low, "vmax": high}
        image = axes.imshow(values, origin="lower", aspect="auto", **look)
        axes.set_facecolor("0.9")
        name_steps(axes, [f"{x:g}" for x in xs], PAGE)
        _write_cells(axes, values, [f"{y:g}" for y in ys], "{:.1f}", size)
        _label_cells(axes, xlabel, ylabel, title)
        framed = []
        for what, point in marks.items():
            place = f"({point[0]:g}, {point[1]:g})"
            label = f"{what} {place}: {means[point]:.1f}"
            # One inside the other, where they fall together.
            inset = 0.05 + 0.08 * framed.count(point)
            framed.append(point)
            cell = xs.index(point[1]), ys.index(point[0])
            _frame(axes, cell, inset, *_LINES[what], label)
        _colour_bar(axes, image, unit, "max" if worst > high else "neither")
        if marks:
            legend_below(axes)
    return Path(path)


def plot_wer_matrix(
    matrix, domains, path, *, title="WER on each domain after each step"
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


def _write_cells(axes, values, rows, form, size):
    """Name the rows of an image and write each finite value into its cell."""
    (image,) = axes.get_images()
    axes.set_yticks(range(len(rows)), [words(name) for name in rows])
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
    set_title(axes, title)


def _colour_bar(axes, image, unit, extend="neither"):
    bar = axes.figure.colorbar(
        image, ax=axes, label=unit, fraction=0.05, pad=0.02, extend=extend
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, width=0.6)


def _draw_number(values, rows, columns, path, title, form, limits):
    """Draw the one number of a matrix as a bar on its scale."""
    [(row, column, value)] = [
        (rows[r], columns[c], value)
        for r, line in enumerate(values)
        for c, value in enumerate(line)
        if math.isfinite(value)
    ]
    with figure(path, COLUMN, 1.2) as axes:
        axes.barh([0], [value], 0.5, color=COLOURS[0])
        axes.axvline(0, color="0.35", linewidth=0.8)
        low, high = limits or (min(0.0, value), max(0.0, value))
        if low < high:
            axes.set_xlim(low, high)
        axes.set_yticks([0], [f"{words(row)} /\n{words(column)}"])
        axes.set_ylim(-0.6, 0.6)
        axes.set_xlabel(form.format(value))
        set_title(axes, title)
    return Path(path)


def _frame(axes, cell, inset, colour, line, label):
    """Frame a cell of an image, with a white rim that shows on dark ones."""
    patches = require("matplotlib.patches", "plots", "plotting")
    effects = require("matplotlib.patheffects", "plots", "plotting")
    corner, side = [place - 0.5 + inset for place in cell], 1 - 2 * inset
    look = {"fill": False, "edgecolor": colour, "linestyle": line}
    look["path_effects"] = [effects.withStroke(linewidth=2.6, foreground="w")]
    frame = {"linewidth": 1.3, "label": label, **look}
    axes.add_patch(patches.Rectangle(corner, side, side, **frame))


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
