"""What a run leaves behind: rows, means, files, merged runs."""

import csv
import io
import json
import logging

import numpy as np
import pytest
import torch

from speechbrain_taskarith.metrics import Summary, merge_summaries

KEYS = "table row metric value unit split seed selected_on".split()


def add(summary, value, seed=None, **changes):
    fields = {"table": "t", "row": "edited", "metric": "wer", **changes}
    summary.add(value=value, seed=seed, **fields)


def read(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_rows_have_exactly_the_fixed_keys(tmp_path):
    summary = Summary(tmp_path)
    add(summary, 12, selected_on="synthetic_target")
    summary.write()
    assert read(tmp_path) == [
        {
            "table": "t",
            "row": "edited",
            "metric": "wer",
            "value": 12.0,
            "unit": "%",
            "split": "test",
            "seed": None,
            "selected_on": "synthetic_target",
        }
    ]
    assert list(read(tmp_path)[0]) == KEYS


def test_several_seeds_get_mean_and_sample_std(tmp_path):
    summary = Summary(tmp_path)
    values = [11.0, 14.5, 12.25]
    for seed in (2, 0, 1):
        add(summary, values[seed], seed, selected_on=f"dev{seed % 2}")
    summary.write()
    rows = read(tmp_path)
    assert [row["seed"] for row in rows] == [0, 1, 2, "mean", "std"]
    assert [row["value"] for row in rows[:3]] == values
    assert rows[3]["value"] == pytest.approx(np.mean(values))
    assert rows[4]["value"] == pytest.approx(np.std(values, ddof=1))
    assert rows[3]["selected_on"] == "dev0; dev1"
    assert all(list(row) == KEYS for row in rows)


def test_one_seed_has_no_spread(tmp_path):
    summary = Summary(tmp_path)
    add(summary, 3.0, seed=7)
    assert [row["seed"] for row in summary.rows()] == [7]
    assert summary.value("t", "edited", "wer") == 3.0
    with pytest.raises(KeyError, match="'std'"):
        summary.value("t", "edited", "wer", seed="std")


def test_splits_and_rows_are_averaged_apart(tmp_path):
    summary = Summary(tmp_path)
    for seed in (0, 1):
        for row in ("a", "b"):
            for split in ("valid", "test"):
                value = 100 * seed + 10 * (row == "b") + (split == "test")
                add(summary, value, seed, row=row, split=split)
    assert summary.value("t", "a", "wer", split="valid") == 50
    assert summary.value("t", "b", "wer", split="test") == 61
    text = summary.markdown()
    assert "split" in text and "valid" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(tmp_path, value):
    summary = Summary(tmp_path)
    with pytest.raises(ValueError, match="t / edited / wer: value is"):
        add(summary, value)
    assert summary.rows() == []


def test_numbers_of_other_packages_become_plain(tmp_path):
    summary = Summary(tmp_path)
    add(summary, np.float32(1.5), seed=np.int64(0))
    add(summary, torch.tensor(2.5), seed=1)
    summary.write()
    assert [row["value"] for row in read(tmp_path)[:2]] == [1.5, 2.5]
    with pytest.raises(TypeError, match="expected a number"):
        add(summary, "much", seed=2)


def test_a_result_is_added_once(tmp_path):
    summary = Summary(tmp_path)
    add(summary, 3.0, seed=0)
    add(summary, 3.0, seed=0)
    assert len(summary.rows()) == 1
    with pytest.raises(ValueError, match="value 3.0 instead of 4.0"):
        add(summary, 4.0, seed=0)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"table": "a/b"}, "name a file"),
        ({"table": "../x"}, "name a file"),
        ({"row": ""}, "row is ''"),
        ({"metric": "novel"}, "no usual unit"),
        ({"seed": 0.5}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"selected_on": True}, "selected_on is True"),
    ],
)
def test_bad_rows_are_refused(tmp_path, changes, text):
    with pytest.raises(ValueError, match=text):
        add(Summary(tmp_path), 1.0, **changes)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_the_metrics_of_translation_have_a_unit(tmp_path, metric):
    summary = Summary(tmp_path)
    add(summary, 1.0, metric=metric)
    assert summary.rows()[0]["unit"] == "points"


def test_units_do_not_mix(tmp_path):
    summary = Summary(tmp_path)
    add(summary, 1.0, metric="novel", unit="ms")
    with pytest.raises(ValueError, match="use one unit in a table"):
        add(summary, 1.0, row="other", metric="novel", unit="s")
    add(summary, 1.0, table="elsewhere", metric="novel", unit="s")


def test_csv_holds_the_same_rows(tmp_path):
    summary = Summary(tmp_path)
    for seed in (0, 1):
        add(summary, 1 / 3 + seed, seed)
        add(summary, 5, seed, table="other", row='odd, "name"')
    summary.write()
    rows = read(tmp_path)
    for table in ("t", "other"):
        text = (tmp_path / f"{table}.csv").read_text(encoding="utf-8")
        got = list(csv.DictReader(io.StringIO(text)))
        expected = [row for row in rows if row["table"] == table]
        assert [float(row["value"]) for row in got] == [
            row["value"] for row in expected
        ]
        assert [row["row"] for row in got] == [r["row"] for r in expected]
        assert [row["seed"] for row in got] == ["0", "1", "mean", "std"]


def test_tables_show_mean_spread_source_and_oracle(tmp_path):
    summary = Summary(tmp_path, title="On digits")
    summary.note("The recorded side is simulated.")
    for seed, (baseline, edited, best) in enumerate(
        [(20, 17, 16.5), (21, 19, 18)]
    ):
        add(summary, baseline, seed, row="baseline")
        add(summary, edited, seed, selected_on="synthetic_target")
        add(summary, best, seed, row="best", selected_on="real_target")
        add(summary, 752640, seed, metric="trained_parameters")
    text = summary.markdown()
    assert text.startswith("# On digits\n\nThe recorded side is simulated.")
    assert "sample standard deviation (divisor n - 1) over seeds 0, 1" in text
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert cells[""] == ["wer (%)", "trained parameters", "chosen on"]
    assert cells["baseline"] == ["20.50 ± 0.71", "–", ""]
    assert cells["edited"][0] == "18.00 ± 1.41"
    assert cells["edited"][1].startswith("752,640")
    assert cells["edited"][2] == "synthetic_target"
    assert cells["best (oracle)"][2] == "real_target"


def test_a_missing_seed_shows(tmp_path, caplog):
    summary = Summary(tmp_path)
    for seed in (0, 1, 2):
        add(summary, 20 + seed, seed, row="baseline")
    for seed in (0, 1):
        add(summary, 10 + seed, seed)
    with caplog.at_level(logging.WARNING):
        summary.write()
    assert "edited / wer on test is missing for seeds [2]" in caplog.text
    assert "(n=2)" in summary.markdown()
    assert "(n=3)" not in summary.markdown()


def test_runs_are_counted_against_the_seeds_that_the_caption_names(
    tmp_path,
):
    summary = Summary(tmp_path)
    for row, seed in (("a", 0), ("b", 1), ("b", 2)):
        add(summary, float(seed), seed, row=row)
    page = summary.markdown()
    assert "over seeds 0, 1, 2" in page
    assert "1.50 ± 0.71 (n=2)" in page and "0.00 (n=1)" in page


def test_print_shows_the_tables_and_brackets(tmp_path):
    from rich.console import Console

    summary = Summary(tmp_path)
    add(summary, 12.348, row="ties [bold]", seed=0)
    out = io.StringIO()
    summary.print(Console(file=out, width=100))
    assert "ties [bold]" in out.getvalue()
    assert "12.35" in out.getvalue()
    assert "Measured on: test. One run, seed 0." in out.getvalue()


def test_plots_are_shown_in_the_results(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "scale.png").write_bytes(b"")
    assert "![scale](plots/scale.png)" in Summary(tmp_path).markdown()


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    summary = Summary(tmp_path)
    add(summary, 1.0, seed=0)
    summary.write()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    add(summary, 2.0, seed=1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="could not write"):
        summary.write()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_written_equals_loaded(tmp_path):
    summary = Summary(tmp_path)
    for seed in (0, 1):
        add(summary, 0.1 + seed, seed, selected_on="dev")
    summary.write()
    assert Summary.load(tmp_path).rows() == summary.rows()
    assert Summary.load(tmp_path / "summary.json").rows() == summary.rows()


def write_run(folder, seed, value):
    summary = Summary(folder)
    add(summary, value, seed)
    summary.write()
    return folder


def test_runs_merge_into_one_table(tmp_path):
    values = {0: 3.0, 1: 5.0, 2: 10.0}
    runs = [write_run(tmp_path / str(s), s, v) for s, v in values.items()]
    merged = merge_summaries(runs, tmp_path / "all")
    merged.write()
    assert merged.value("t", "edited", "wer") == 6.0
    std = merged.value("t", "edited", "wer", seed="std")
    assert std == pytest.approx(np.std(list(values.values()), ddof=1))
    # A merged summary merges again: its mean rows are not taken for runs.
    runs = [tmp_path / "all", write_run(tmp_path / "3", 3, 2.0)]
    again = merge_summaries(runs, tmp_path / "more")
    assert again.value("t", "edited", "wer") == 5.0


def test_runs_with_the_same_seed_do_not_merge(tmp_path):
    runs = [write_run(tmp_path / n, 0, v) for n, v in [("a", 1), ("b", 2)]]
    with pytest.raises(ValueError, match="b: .*must differ in their seed"):
        merge_summaries(runs, tmp_path / "all")
    with pytest.raises(ValueError, match="no runs"):
        merge_summaries([], tmp_path / "all")


@pytest.mark.parametrize(
    "content, text",
    [
        ("[{", "expected JSON"),
        ("{}", "list of rows"),
        ('[{"table": "t"}]', "row 1 does not have the keys"),
    ],
)
def test_damaged_summaries_are_named(tmp_path, content, text):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=text) as caught:
        Summary.load(tmp_path)
    assert str(tmp_path / "summary.json") in str(caught.value)


def test_nan_in_a_file_is_refused(tmp_path):
    write_run(tmp_path, 0, 1.0)
    path = tmp_path / "summary.json"
    path.write_text(path.read_text().replace("1.0", "NaN"))
    with pytest.raises(ValueError, match="row 1.*value is nan"):
        Summary.load(tmp_path)


def test_a_run_that_did_not_finish_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has finished"):
        Summary.load(tmp_path)


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.001, "0.00"), (-0.006, "-0.01"), (2.005, "2.00")]
)
def test_nothing_has_no_sign(tmp_path, value, shown):
    summary = Summary(tmp_path)
    summary.add(table="t", row="r", metric="wer", value=value, unit="%")
    summary.write()
    text = (tmp_path / "results.md").read_text()
    assert text.split("|")[-2].strip() == shown, text
