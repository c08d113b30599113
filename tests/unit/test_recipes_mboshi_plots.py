"""The plots of the study of speech translation, from results that are made."""

import importlib
import sys

import pytest
from matplotlib.figure import Figure

FOLDER = "recipes/Mboshi/ST/joint"


@pytest.fixture
def report(monkeypatch, request):
    """Return the recipe's report.py as a module."""
    monkeypatch.syspath_prepend(request.config.rootpath / FOLDER)
    for name in ("report", "history"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("report")
    for name in ("report", "history"):
        sys.modules.pop(name, None)


def test_all_rows_have_a_bar_and_whole_methods_a_curve(
    report, tmp_path, monkeypatch
):
    drawn, save = {}, Figure.savefig

    def spy(figure, *arguments, **options):
        drawn[len(drawn)] = figure.axes[0]
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    bleu = {"asr": None, "mt": 5.0, "st": 1.0, "whole": 4.0, "no_shrink": 3.0}
    done = {
        row: {
            "scores": {} if score is None else {"BLEU": score},
            "epochs": [
                {"cpu_seconds": 60.0 * i, "BLEU": score} for i in (1, 2)
            ],
        }
        for row, score in bleu.items()
    }
    report.plot_scores(done, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "bleu.png",
        "bleu_against_time.csv",
        "bleu_against_time.png",
    }
    assert (tmp_path / "bleu_against_time.csv").read_text().splitlines() == [
        "row,cpu_minutes,bleu",
        *("st,1.000,1.00", "st,2.000,1.00"),
        *("whole,1.000,4.00", "whole,2.000,4.00"),
    ]
    bars, curves = drawn.values()
    assert [bar.get_width() for bar in bars.patches] == [5.0, 1.0, 4.0, 3.0]
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == ["MT", "ST", "whole method", "no shrink"]
    # Text models translate transcripts, which is another task.
    assert [bool(b.get_hatch()) for b in bars.patches] == [
        True, False, False, False
    ]  # fmt: skip
    assert [line.get_label() for line in curves.lines] == ["ST", "whole method"]
    assert list(curves.lines[0].get_xdata()) == [1.0, 2.0]


def test_without_a_translation_nothing_is_drawn(report, tmp_path):
    report.plot_scores({"asr": {"scores": {}, "epochs": []}}, tmp_path)
    assert not list(tmp_path.iterdir())
