"""Plots for results, in one look: they fit a column of a paper."""

from speechbrain_taskarith.metrics.plots.bars import (
    plot_before_after,
    plot_by_layer,
    plot_by_row,
)
from speechbrain_taskarith.metrics.plots.cells import (
    plot_heat_map,
    plot_scale_surface,
    plot_wer_matrix,
)
from speechbrain_taskarith.metrics.plots.curves import (
    draw_line,
    plot_scale_curve,
)
from speechbrain_taskarith.metrics.plots.look import (
    COLOURS,
    COLUMN,
    MARKERS,
    PAGE,
    figure,
    label_axes,
    legend_below,
    words,
)

__all__ = [
    "COLOURS",
    "COLUMN",
    "MARKERS",
    "PAGE",
    "draw_line",
    "figure",
    "label_axes",
    "legend_below",
    "plot_before_after",
    "plot_by_layer",
    "plot_by_row",
    "plot_heat_map",
    "plot_scale_curve",
    "plot_scale_surface",
    "plot_wer_matrix",
    "words",
]
