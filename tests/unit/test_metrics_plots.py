"""Plots: what is drawn, files that are whole, input that cannot be drawn."""

import itertools
import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from speechbrain_taskarith.metrics import (
    plot_before_after,
    plot_by_layer,
    plot_by_row,
    plot_heat_map,
    plot_scale_curve,
    plot_scale_surface,
    plot_wer_matrix,
)
from speechbrain_taskarith.metrics.plots import draw_line, figure
from speechbrain_taskarith.vectors import plot_cosine_matrix, plot_layer_norms

CURVES = {"a": {0.4: 18.0, 0.0: 20.0, 0.2: 17.0}, "b": {0.0: 21.0, 0.4: 19.0}}


@pytest.fixture
def drawn(monkeypatch):
    """Axes that the plot functions drew on, when they are written."""
    seen, save = [], Figure.savefig

    def spy(figure, *arguments, **options):
        if figure.axes[0] not in seen:
            seen.append(figure.axes[0])
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


def legend(axes):
    [found] = axes.figure.legends
    return [text.get_text() for text in found.get_texts()]


def test_scale_curve_draws_its_points_in_order(tmp_path, drawn):
    path = plot_scale_curve(
        CURVES,
        tmp_path / "plots" / "scale.png",
        baseline=20.5,
        chosen=(0.2, 17.0),
        oracle=0.25,
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn
    line = axes.get_lines()[0]
    assert line.get_xdata() == pytest.approx([0.0, 0.2, 0.4])
    assert line.get_ydata() == pytest.approx([20.0, 17.0, 18.0])
    assert legend(axes) == [
        "a",
        "b",
        "baseline: 20.5",
        "oracle: 0.25",
        "chosen: 0.2 (WER 17.0)",
    ]
    assert [p.name for p in path.parent.iterdir()] == ["scale.png"]


def test_several_seeds_are_a_mean_with_a_band(tmp_path, drawn):
    values = {0.0: [20.0, 22.0, 27.0], 0.5: np.array([10.0, 11.0, 12.0])}
    plot_scale_curve({"a": values}, tmp_path / "s.png")
    (axes,) = drawn
    assert axes.get_lines()[0].get_ydata() == pytest.approx([23.0, 11.0])
    (band,) = axes.collections
    ys = band.get_paths()[0].vertices[:, 1]
    deviation = np.std([20.0, 22.0, 27.0], ddof=1)
    assert ys.min() == pytest.approx(10.0)
    assert ys.max() == pytest.approx(23.0 + deviation)


def test_scale_curve_takes_tensors(tmp_path, drawn):
    curve = {0.0: torch.tensor(3.0), 0.1: torch.tensor([2.0, 4.0])}
    plot_scale_curve({"a": curve}, tmp_path / "s.png")
    assert drawn[0].get_lines()[0].get_ydata() == pytest.approx([3.0, 3.0])


def test_wer_matrix_writes_every_figure(tmp_path, drawn):
    matrix = [[9.04, math.nan], [12.0, 20.06]]
    plot_wer_matrix(matrix, ["us", "French-Belgian"], tmp_path / "w.png")
    (axes,) = drawn
    assert [t.get_text() for t in axes.texts] == ["9.0", "12.0", "20.1"]
    assert [t.get_position() for t in axes.texts] == [(0, 0), (0, 1), (1, 1)]
    ticks = [t.get_text() for t in axes.get_xticklabels()]
    assert ticks == ["us", "French-Belgian"]
    assert {t.get_rotation() for t in axes.get_xticklabels()} == {0.0}


def test_text_can_be_read_on_its_cell(tmp_path, drawn):
    plot_heat_map(
        [[0, 1]], ["r"], ["a", "b"], tmp_path / "h.png", colours="gray"
    )
    assert [t.get_color() for t in drawn[0].texts] == ["white", "black"]


def test_equal_values_and_one_cell_can_be_drawn(tmp_path):
    assert plot_wer_matrix([[5.0]], ["us"], tmp_path / "one.png").exists()
    same = np.full((2, 2), 3.0)
    assert plot_wer_matrix(same, ["a", "b"], tmp_path / "same.png").exists()


@pytest.mark.parametrize("kind", ["bar", "line"])
def test_layers_keep_their_order_and_values(tmp_path, drawn, kind):
    values = {"a": {"l.2": 1.0, "l.10": 2.0}, "b": {"l.2": 3.0, "out": 4.0}}
    plot_by_layer(values, tmp_path / "l.png", kind=kind)
    (axes,) = drawn
    ticks = [t.get_text() for t in axes.get_xticklabels()]
    assert ticks == ["l.2", "l.10", "out"]
    assert legend(axes) == ["a", "b"]
    if kind == "bar":
        heights = [[r.get_height() for r in c] for c in axes.containers]
    else:
        heights = [line.get_ydata() for line in axes.get_lines()]
    expected = [[1, 2, math.nan], [3, math.nan, 4]]
    np.testing.assert_array_equal(np.array(heights, float), expected)


def test_one_model_needs_no_legend(tmp_path, drawn):
    plot_by_layer({"l.0": 1.0}, tmp_path / "l.png")
    assert drawn[0].figure.legends == []


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_same_results_same_bytes(tmp_path, suffix):
    first = plot_scale_curve(CURVES, tmp_path / f"a.{suffix}")
    second = plot_scale_curve(CURVES, tmp_path / f"b.{suffix}")
    assert first.read_bytes() == second.read_bytes()


def test_the_users_matplotlib_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_scale_curve(CURVES, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_a_failed_plot_leaves_the_old_file(tmp_path):
    path = tmp_path / "l.png"
    path.write_bytes(b"old")
    with pytest.raises((ValueError, TypeError)):
        plot_by_layer({"l": "no number"}, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["l.png"]


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a.jpg: cannot draw '.jpg'"):
        plot_scale_curve(CURVES, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_scale_curve({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing to draw for news"):
        plot_scale_curve({"news": {}}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="2 rows of .2. values"):
        plot_wer_matrix([[1, 2], [3, 4]], ["a"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="no finite value"):
        plot_wer_matrix([[math.nan]], ["a"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="kind is 'pie'"):
        plot_by_layer({"l": 1.0}, tmp_path / "a.png", kind="pie")
    assert not list(tmp_path.iterdir())


SURFACE = {
    (1.0, 0.0): 56.0,
    (1.0, 0.5): 50.0,
    (0.5, 0.0): [51.0, 52.0],
    (0.5, 0.5): 48.0,
    (0.0, 0.0): 59.0,
    (0.0, 0.5): float("nan"),
}


def frames(axes):
    """Return `{label: (column, row)}` of the framed cells' centres."""
    found = {}
    for patch in axes.patches:
        (x, y), side = patch.get_xy(), patch.get_width()
        assert patch.get_height() == pytest.approx(side)
        centre = round(x + side / 2, 6), round(y + side / 2, 6)
        found[patch.get_label()] = centre
    return found


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_surface_has_the_scales_on_its_axes(tmp_path, drawn, suffix):
    path = plot_scale_surface(
        SURFACE,
        tmp_path / f"surface.{suffix}",
        baseline=(1.0, 0.0),
        chosen=[0.5, 0.0],
        oracle=(0.5, 0.5),
    )
    assert path.stat().st_size
    axes = drawn[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "0.5", "1"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "0.5"]
    image = axes.get_images()[0]
    # The first scale upwards, the second to the right; seeds are a mean.
    shown = np.ma.filled(image.get_array(), np.nan)
    np.testing.assert_allclose(
        shown, [[59.0, np.nan], [51.5, 48.0], [56.0, 50.0]]
    )
    bottom, top = axes.get_ylim()
    assert bottom < top
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert texts[0, 2] == "56.0" and texts[0, 1] == "51.5"
    assert len(texts) == 5
    assert frames(axes) == {
        "baseline (1, 0): 56.0": (0, 2),
        "chosen (0.5, 0): 51.5": (0, 1),
        "oracle (0.5, 0.5): 48.0": (1, 1),
    }
    # The baseline is the middle of the colours.
    assert image.norm(56.0) == pytest.approx(0.5)
    assert image.norm(48.0) > 0


def test_surface_keeps_its_legend_off_the_cells(tmp_path, drawn):
    plot_scale_surface(
        SURFACE,
        tmp_path / "s.png",
        baseline=(1.0, 0.0),
        chosen=(0.5, 0.5),
        oracle=(0.5, 0.5),
    )
    axes = drawn[0]
    (legend,) = axes.figure.legends
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    cells = axes.get_window_extent(renderer)
    assert not legend.get_window_extent(renderer).overlaps(cells)
    # Two frames of one cell lie one inside the other.
    chosen, oracle = axes.patches[1:]
    assert chosen.get_width() > oracle.get_width() + 0.1
    below = axes.xaxis.get_tightbbox(renderer)
    assert not legend.get_window_extent(renderer).overlaps(below)


def test_one_hopeless_point_does_not_pale_the_surface(tmp_path, drawn):
    surface = {**SURFACE, (0.0, 0.5): 400.0}
    plot_scale_surface(surface, tmp_path / "s.png", baseline=(1.0, 0.0))
    image = drawn[0].get_images()[0]
    assert image.norm(56.0) - image.norm(48.0) > 0.3
    # Without anything better the worst gives the range.
    plot_scale_surface({(1, 0): 5.0, (1, 1): 7.0}, tmp_path / "t.png",
                       baseline=(1, 0))  # fmt: skip
    image = drawn[1].get_images()[0]
    assert (image.norm(5.0), image.norm(7.0)) == pytest.approx((0.5, 1.0))
    plot_scale_surface({(1, 0): 5.0}, tmp_path / "u.png", baseline=(1, 0))


@pytest.mark.parametrize(
    "surface, options, match",
    [
        ({}, {}, "no finite value"),
        ({(0, 0): math.nan}, {}, "no finite value"),
        (SURFACE, {"chosen": (0.7, 0.0)}, r"chosen=\(0.7, 0.0\)"),
        (SURFACE, {"baseline": (0.0, 0.5)}, "baseline=.*no value"),
        (SURFACE, {"oracle": (9, 9)}, "oracle="),
    ],
)
def test_surfaces_that_cannot_be_drawn(tmp_path, surface, options, match):
    with pytest.raises(ValueError, match=match):
        plot_scale_surface(surface, tmp_path / "s.png", **options)
    assert not list(tmp_path.iterdir())


ALL = {
    "curve": lambda path: plot_scale_curve(
        {"recordings of the left-out one (test)": CURVES["a"], "b": {0.1: 2}},
        path, baseline=20.5, chosen=(0.2, 17.0), oracle=(0.2, 17.0),
        title="A title that is longer than a column of a paper is wide, so "
        "that it has to be broken",
    ),
    "surface": lambda path: plot_scale_surface(
        SURFACE, path, baseline=(1.0, 0.0), chosen=(0.5, 0.5),
        oracle=(0.5, 0.5), title="A target that was left out",
    ),
    "matrix": lambda path: plot_wer_matrix(
        [[9.0, 12.3], [8.0, 100.4]], ["us", "French-Belgian"], path
    ),
    "cosines": lambda path: plot_cosine_matrix(
        torch.eye(3), ["news", "music_and_more", "weather"], path,
        title="A title that is longer than what is left beside the names",
    ),
    "layers": lambda path: plot_by_layer(
        {n: {f"encoder.layers.{i}": i for i in range(6)} for n in "ab"}, path
    ),
    "effect": lambda path: plot_before_after(
        {"us": {"baseline": [20.0, 22.0], "edited": [11.0, 12.0]},
         "French-Belgian": {"baseline": 30.0, "real_target": 10.0}},
        path, bounds=["real_target"],
    ),
    "rows": lambda path: plot_by_row(
        {"us": {"a row with a name that is longer than a line": [20.0, 22.0],
                "edited": [11.0, 12.0], "real_target": 100.0}},
        path, before="edited", ours=["edited"], bounds=["real_target"],
        title="Dutch, as actors speak it",
    ),
}  # fmt: skip


def shown(axis):
    """Return the labels of the ticks that are inside the axes."""
    low, high = sorted(axis.get_view_interval())
    pairs = zip(axis.get_ticklocs(), axis.get_ticklabels())
    return [text for place, text in pairs if low <= place <= high]


@pytest.mark.parametrize("name", ALL)
def test_every_plot_fits_a_column_and_nothing_overlaps(tmp_path, drawn, name):
    ALL[name](tmp_path / "plot.png")
    axes = drawn[0]
    figure = axes.figure
    assert figure.get_figwidth() * 2.54 == pytest.approx(8.5, abs=0.02)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    page = figure.get_window_extent(renderer)
    labels = [*shown(axes.xaxis), axes.xaxis.label]
    boxes = [
        text.get_window_extent(renderer) for text in labels if text.get_text()
    ]
    boxes += [found.get_window_extent(renderer) for found in figure.legends]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    # Titles, and figures in cells or above bars.
    inside = [t for t in axes.get_children() if isinstance(t, Text)]
    boxes += [t.get_window_extent(renderer) for t in inside if t.get_text()]
    boxes += [text.get_window_extent(renderer) for text in shown(axes.yaxis)]
    for box in boxes:
        # To a pixel.
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1
        assert page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1
    # Labels that fit are not turned, and none is smaller than 6 points.
    assert {t.get_rotation() for t in axes.get_xticklabels()} == {0.0}
    texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts]
    assert min(text.get_fontsize() for text in texts) >= 6
    assert not any("_" in text.get_text() for text in texts)


def test_chosen_and_oracle_are_seen_where_they_coincide(tmp_path, drawn):
    ALL["curve"](tmp_path / "c.png")
    points = {
        line.get_label().partition(":")[0]: line
        for line in drawn[0].get_lines()
        if line.get_linestyle() == "None"
    }
    star, ring = points["chosen"], points["oracle"]
    assert list(star.get_xydata()[0]) == list(ring.get_xydata()[0])
    assert ring.get_markerfacecolor() == "none"
    assert ring.get_markersize() > star.get_markersize() + 2


def test_further_formats_come_beside(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKARITH_PLOT_FORMATS", "pdf, svg")
    path = plot_scale_curve(CURVES, tmp_path / "a.png")
    assert path == tmp_path / "a.png"
    found = {p.suffix: p.read_bytes() for p in tmp_path.iterdir()}
    assert found[".pdf"].startswith(b"%PDF") and b"<svg" in found[".svg"]
    assert set(found) == {".png", ".pdf", ".svg"}
    monkeypatch.setenv("TASKARITH_PLOT_FORMATS", "eps")
    with pytest.raises(ValueError, match="TASKARITH_PLOT_FORMATS=eps"):
        plot_scale_curve(CURVES, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_one_number_is_no_heat_map(tmp_path, drawn):
    plot_cosine_matrix(
        torch.tensor([[1.0, -0.25], [-0.25, 1.0]]), "ab", tmp_path / "c.png"
    )
    plot_wer_matrix([[5.0]], ["us"], tmp_path / "w.png")
    for axes, value in zip(drawn, (-0.25, 5.0)):
        assert not axes.get_images()
        assert [bar.get_width() for bar in axes.patches] == [value]
    assert drawn[0].get_xlim() == (-1.0, 1.0)


def test_cosines_leave_out_what_is_known(tmp_path, drawn):
    matrix = torch.tensor([[1.0, 0.1, 0.2], [0.1, 1.0, 0.3], [0.2, 0.3, 1.0]])
    plot_cosine_matrix(matrix, ["a", "b", "c"], tmp_path / "c.png")
    axes = drawn[0]
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert texts == {(0, 0): "0.10", (0, 1): "0.20", (1, 1): "0.30"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "c"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b"]
    assert axes.get_images()[0].get_clim() == pytest.approx((-0.3, 0.3))


def test_layers_are_named_by_what_tells_them_apart(tmp_path, drawn):
    norms = {f"encoder.layers.{i}": 1.0 for i in range(24)}
    plot_layer_norms(norms, tmp_path / "l.png")
    axes = drawn[0]
    assert axes.get_xlabel() == "layer (of encoder.layers)"
    ticks = {
        place: text.get_text()
        for place, text in zip(axes.get_xticks(), axes.get_xticklabels())
    }
    assert all(text == str(place) for place, text in ticks.items())
    assert len(ticks) > 5


def test_effects_have_their_heights_errors_and_bounds(tmp_path, drawn):
    plot_before_after(
        {"us": {"before": [20.0, 24.0], "after": [10.0, 12.0]},
         "de": {"before": 30.0, "after": 25.0, "real": 20.0}},
        tmp_path / "e.png",
        intervals={"de": {"after": (22.0, 29.0)}},
        bounds=["real"],
    )  # fmt: skip
    axes = drawn[0]
    bars = [c for c in axes.containers if isinstance(c, BarContainer)]
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in bars}
    assert heights == {
        "before": [22.0, 30.0], "after": [11.0, 25.0], "real": [20.0]
    }  # fmt: skip
    ends = {
        tuple(segment[:, 1].round(6))
        for lines in axes.collections
        for segment in lines.get_segments()
    }
    two = math.sqrt(8.0), math.sqrt(2.0)
    assert ends == {
        (round(22 - two[0], 6), round(22 + two[0], 6)),
        (round(11 - two[1], 6), round(11 + two[1], 6)),
        (22.0, 29.0),
    }
    hatched = [c.get_label() for c in bars if c[0].get_hatch()]
    assert hatched == ["real"]
    # Bars of one domain stand together, in the order given.
    places = sorted((bar.get_x(), c.get_label()) for c in bars for bar in c)
    assert [label for _, label in places] == [
        "before", "after", "before", "after", "real"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="nothing to draw for us"):
        plot_before_after({"us": {}}, tmp_path / "x.png")


def test_rows_have_their_names_lengths_spreads_and_values(tmp_path, drawn):
    rows = {"before": [20.0, 24.0], "after": 10.0, "real": [4.0, 4.0]}
    plot_by_row(
        {"us": rows, "de": {"after": 30.0}},
        tmp_path / "r.png",
        before="before",
        ours=["after"],
        bounds=["real"],
    )
    us, de = drawn[0].figure.axes
    assert [bar.get_width() for bar in us.patches] == [22.0, 10.0, 4.0]
    assert [bar.get_y() + bar.get_height() / 2 for bar in us.patches] == [
        pytest.approx(place) for place in range(3)
    ]
    # The row that a panel lacks is left free there, not moved up.
    [other] = de.patches
    assert other.get_y() + other.get_height() / 2 == pytest.approx(1)
    assert us.get_xlim() == de.get_xlim() and us.get_ylim() == de.get_ylim()
    assert us.get_ylim()[0] > us.get_ylim()[1], "the first row is on top"
    assert [t.get_text() for t in us.get_yticklabels()] == list(rows)
    assert [t.get_text() for t in us.texts] == ["22.0", "10.0", "4.0"]
    assert [bool(bar.get_hatch()) for bar in us.patches] == [False, False, True]
    ends = [
        segment[:, 0].tolist()
        for lines in us.collections
        for segment in lines.get_segments()
    ]
    two = math.sqrt(8.0)
    assert ends == [pytest.approx([22 - two, 22 + two])]
    dashed = [line for line in us.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [22.0]
    assert not [line for line in de.lines if line.get_linestyle() == "--"]
    with pytest.raises(ValueError, match="nothing to draw for us"):
        plot_by_row({"us": {}}, tmp_path / "x.png")


def test_what_it_was_before_is_grey_and_small_bars_keep_a_decimal(
    tmp_path, drawn
):
    # So many rows that bars are narrow.
    rows = {f"row {n}": value for n, value in enumerate([9.0, 56.6] * 4)}
    plot_before_after(
        {str(place): rows for place in range(4)}, tmp_path / "b.png"
    )
    [axes] = drawn[0].figure.axes
    assert {t.get_text() for t in axes.texts} == {"9.0", "57"}
    with figure(tmp_path / "l.png") as axes:
        draw_line(axes, [0, 1], [3.0, 4.0], None, "before")
        draw_line(axes, [0, 1], [3.0, 2.0], 0, "after")
        before, after = axes.lines
    grey = to_rgb(before.get_color())
    assert len(set(grey)) == 1 and len(set(to_rgb(after.get_color()))) > 1
