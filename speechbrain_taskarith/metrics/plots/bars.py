"""Bars: an effect by domain, and one number for each layer."""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path

from speechbrain_taskarith.metrics.plots.curves import draw_line
from speechbrain_taskarith.metrics.plots.look import (
    COLOURS,
    COLUMN,
    GREY,
    PAGE,
    SIZE,
    SMALL,
    figure,
    label_axes,
    legend_below,
    name_steps,
    require_content,
    several,
    spread,
    words,
    wrapped,
)


def plot_before_after(
    domains,
    path,
    *,
    intervals=None,
    bounds=(),
    title="",
    ylabel="WER (%)",
):
    """Draw an effect: on each domain a bar before, and bars after.

    Arguments
    ---------
    domains : dict of str: dict of str: float
        `{domain: {name of a row: value}}`, the first row is what it was
        before (grey). A list of values (several seeds) is drawn as its mean
        with one sample standard deviation up and down, and a dot for each.
    path
        See `plot_heat_map`, also for what is returned.
    intervals : dict or None
        `{domain: {name of a row: (low, high)}}`, ends of error bars in place
        of deviations, e.g. of `confidence_interval`.
    bounds : sequence of str
        Rows that no one may choose or have (an oracle, the target's own
        recordings): drawn hatched.
    title, ylabel : str
        Above and beside the plot.

    Raises
    ------
    ValueError
        No domain, or none of its rows.

    Example
    -------
    >>> path = getfixture("tmp_path") / "effect.png"
    >>> rows = {"baseline": [60.0, 61.0], "edited": [51.0, 52.5]}
    >>> plot_before_after({"Dutch": rows}, path).name
    'effect.png'
    """
    require_content(domains)
    rows = list(
        dict.fromkeys(row for found in domains.values() for row in found)
    )
    intervals = intervals or {}
    share = 0.84 / len(rows)
    width = max(COLUMN, min(PAGE, 0.6 + 0.2 * len(domains) * len(rows)))
    bar = (width - 0.6) / len(domains) * share
    colours = [GREY, *(COLOURS * len(rows))]
    with figure(path, width, 2.1) as axes:
        for i, row in enumerate(rows):
            places, tops = [], []
            for d, (domain, found) in enumerate(domains.items()):
                if row not in found:
                    continue
                x = d + (i + 0.5) * share - 0.42
                mean, deviation = spread(found[row])
                ends = (mean - deviation, mean + deviation)
                low, high = intervals.get(domain, {}).get(row, ends)
                places.append(x)
                tops.append((mean, low, high, found[row]))
            look = {"color": colours[i], "label": words(row)}
            if row in bounds:
                look |= {"color": "white", "edgecolor": colours[i]}
                look |= {"hatch": "////", "linewidth": 0.8}
            axes.bar(places, [top[0] for top in tops], share * 0.92, **look)
            for x, (mean, low, high, values) in zip(places, tops):
                _top(axes, x, mean, low, high, values, bar)
        name_steps(axes, list(domains), (width - 0.6) / len(domains))
        axes.tick_params(axis="x", length=0)
        label_axes(axes, "", ylabel, title)
        axes.margins(y=0.12)
        legend_below(axes)
    return Path(path)


def _top(axes, x, mean, low, high, values, width):
    """Draw the error bar of a bar, its seeds, and its value above them."""
    highest = mean
    if high > low:
        ends = [[mean - low], [high - mean]]
        axes.errorbar(
            [x], [mean], ends, color="0.15", capsize=1.8, linewidth=0.8
        )
        highest = high
    if several(values) and len(values) > 1:
        dots = [float(value) for value in values]
        axes.plot([x] * len(dots), dots, ".", color="0.15", markersize=2)
        highest = max(highest, *dots)
    # Three digits and a point need about this many inches.
    few = width > 0.22 or abs(mean) < 9.95
    text = f"{mean:.1f}" if few else f"{mean:.0f}"
    axes.annotate(
        text,
        (x, highest),
        xytext=(0, 1.5),
        textcoords="offset points",
        ha="center",
        fontsize=SMALL - 1,
    )


def plot_by_row(
    domains,
    path,
    *,
    before=None,
    ours=(),
    bounds=(),
    title="",
    xlabel="WER (%)",
):
    """Draw what each row of a table has, its name beside its bar.

    For more rows than a legend can tell apart; `plot_before_after` is for few.

    Arguments
    ---------
    domains : dict of str: dict of str: float
        `{domain: {name of a row: value}}`, a panel for each domain. A list of
        values (several seeds) is drawn as its mean with one sample standard
        deviation to both sides, and a dot for each.
    path
        See `plot_heat_map`, also for what is returned.
    before : str or None
        The row that others are held against: a dashed line in its panel.
    ours : sequence of str
        Rows that are drawn in colour; the others are grey.
    bounds : sequence of str
        Rows that no one may choose or have: drawn hatched.
    title, xlabel : str
        Above and under the plot.

    Raises
    ------
    ValueError
        No domain, or none of its rows.

    Example
    -------
    >>> path = getfixture("tmp_path") / "rows.png"
    >>> rows = {"baseline": [60.0, 61.0], "edited": [51.0, 52.5]}
    >>> plot_by_row({"Dutch": rows}, path, ours=["edited"]).name
    'rows.png'
    """
    require_content(domains)
    rows = list(
        dict.fromkeys(row for found in domains.values() for row in found)
    )
    # The names take a third of the width or less.
    width, room = (COLUMN, 20) if len(domains) == 1 else (PAGE, 34)
    names = [
        "\n".join(textwrap.wrap(words(row), room, break_long_words=False))
        for row in rows
    ]
    lines = sum(name.count("\n") + 1 for name in names)
    height = 0.55 + 0.07 * len(rows) + 0.13 * max(lines, len(rows))
    with figure(path, width, height, panels=len(domains)) as panels:
        for axes, (domain, found) in zip(panels, domains.items()):
            for place, row in enumerate(rows):
                if row in found:
                    look = {"color": COLOURS[0] if row in ours else "0.7"}
                    if row in bounds:
                        look = {"color": "white", "edgecolor": "0.5"}
                        look |= {"hatch": "////", "linewidth": 0.8}
                    _row(axes, place, found[row], look, row in ours)
            if before in found:
                mean, _ = spread(found[before])
                dashes = {"linestyle": "--", "linewidth": 0.8}
                axes.axvline(mean, color="0.35", zorder=0, **dashes)
            axes.set_title(domain if len(domains) > 1 else "")
            axes.set_xlabel(xlabel)
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(rows)), names)
        for label, row in zip(panels[0].get_yticklabels(), rows):
            label.set_fontweight("bold" if row in ours else "normal")
        panels[0].set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        if title:
            panels[0].figure.suptitle(title, fontsize=SIZE)
    return Path(path)


def _row(axes, place, value, look, bold):
    """Draw the bar of a row, its spread, its seeds and its mean beside it."""
    mean, deviation = spread(value)
    dots = [float(v) for v in (value if several(value) else [value])]
    axes.barh([place], [mean], 0.74, **look)
    if deviation:
        axes.errorbar(
            [mean], [place], xerr=[deviation],
            color="0.15", capsize=1.8, linewidth=0.8,
        )  # fmt: skip
    if len(dots) > 1:
        axes.plot(dots, [place] * len(dots), ".", color="0.15", markersize=2)
    # In a column of their own, where no line crosses them.
    axes.text(
        1.02,
        place,
        f"{mean:.1f}",
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=SMALL,
        fontweight="bold" if bold else "normal",
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
    require_content(groups)
    layers = list(dict.fromkeys(x for group in groups.values() for x in group))
    names, shared = _without_shared(layers)
    if shared:
        xlabel = f"{xlabel} ({shared})" if xlabel else shared
    share = 0.8 / len(groups)
    step = 0.12 * max(len(groups), 2) if kind == "bar" else 0.14
    width = max(COLUMN, min(PAGE, 0.7 + step * len(layers)))
    # As many names as can be read.
    room = (width - 0.7) / len(layers)
    # Every second, third or fourth, if so they need not be turned.
    most = max(1, int((width - 0.7) / 0.14))
    every = next(
        (k for k in range(1, 5) if wrapped(names[::k], room * k) is not None),
        -(-len(layers) // most),
    )
    fits = wrapped(names[::every], room * every) is not None
    longest = 0 if fits else max(len(words(name)) for name in names)
    with figure(path, width, 2.0 + min(0.035 * longest, 1.5)) as axes:
        for i, (name, group) in enumerate(groups.items()):
            heights = [float(group.get(layer, math.nan)) for layer in layers]
            if kind == "bar":
                left = [x + (i + 0.5) * share - 0.4 for x in range(len(layers))]
                colour = COLOURS[i % len(COLOURS)]
                axes.bar(left, heights, share, color=colour, label=words(name))
            else:
                draw_line(axes, range(len(layers)), heights, i, words(name))
        name_steps(axes, names[::every], room * every, every=every)
        label_axes(axes, xlabel, ylabel, title)
        if not single:
            legend_below(axes)
    return Path(path)


def _without_shared(names):
    """Return names without the dotted parts that all begin with, and these."""
    parts = [str(name).split(".") for name in names]
    count = 0
    while len(parts) > 1 and all(
        len(p) > count + 1 and p[count] == parts[0][count] for p in parts
    ):
        count += 1
    shared = ".".join(parts[0][:count])
    return [".".join(p[count:]) for p in parts], shared and f"of {shared}"
