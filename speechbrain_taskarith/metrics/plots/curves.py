"""Curves: WER against the scale of a task vector."""

from pathlib import Path

from speechbrain_taskarith.metrics.plots.look import (
    COLOURS,
    GREY,
    MARKERS,
    figure,
    label_axes,
    legend_below,
    require_content,
    several,
    spread,
)

_STAR = {"marker": "*", "markersize": 6, "color": "#000000"}
_RING = {
    "marker": "o",
    "markersize": 10,
    "markerfacecolor": "none",
    "markeredgecolor": "#D55E00",
    "markeredgewidth": 1.2,
}


def plot_scale_curve(
    curves,
    path,
    *,
    baseline=None,
    chosen=None,
    oracle=None,
    title="",
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
        point as well (on the curve of the data that are reported); a list
        of such pairs where each group of parameters has its own scale.
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
    require_content(curves)
    with figure(path) as axes:
        for i, (name, curve) in enumerate(curves.items()):
            scales = sorted(curve)
            means, deviations = zip(*(spread(curve[s]) for s in scales))
            draw_line(axes, scales, means, i, name)
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
            dashes = {"color": "0.35", "linestyle": "--", "linewidth": 0.8}
            label = f"baseline: {baseline:.1f}"
            axes.axhline(baseline, zorder=0, label=label, **dashes)
        # The oracle's ring lies around the star where they fall together.
        _mark(axes, oracle, "oracle", _RING, {"linewidth": 3.0, "alpha": 0.35})
        _mark(axes, chosen, "chosen", _STAR, {"linewidth": 0.8})
        label_axes(axes, xlabel, ylabel, title)
        legend_below(axes)
    return Path(path)


def draw_line(axes, x, y, number, name):
    """Draw a curve in the colour and with the marker of its number.

    Arguments
    ---------
    axes : matplotlib.axes.Axes
        Of a figure of `figure`.
    x, y : sequence of float
        The points.
    number : int or None
        From the eighth on the lines are dashed. None: grey, what it was
        before, as `plot_before_after` draws it.
    name : str
        In the legend.
    """
    if number is None:
        axes.plot(x, y, color=GREY, marker="x", label=name)
        return
    axes.plot(
        x,
        y,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle="-" if number < len(COLOURS) else "--",
        label=name,
    )


def _mark(axes, where, what, look, line):
    """Mark a scale by a line, and where its WER is known the point instead."""
    if where is None:
        return
    if isinstance(where, list) and several(where[0]):
        for point in where:
            _mark(axes, point, what, look, line)
        return
    scale, wer = where if several(where) else (where, None)
    if wer is None:
        colour = look.get("markeredgecolor", "#000000")
        label = f"{what}: {scale:g}"
        axes.axvline(scale, color=colour, label=label, zorder=1, **line)
    else:
        label = f"{what}: {scale:g} (WER {wer:.1f})"
        axes.plot([scale], [wer], linestyle="", label=label, zorder=5, **look)
