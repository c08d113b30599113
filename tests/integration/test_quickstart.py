"""The quickstart's checks, its terminal output and its page of results."""

import csv
import importlib.util
import io
import re
import subprocess
import sys
import time

import pytest
import yaml
from digit_corpus import make_corpus
from processes import ROOT, environment
from rich.console import Console

from speechbrain_taskarith.metrics import Summary

SCRIPT = ROOT / "recipes" / "FSDD" / "ASR" / "quickstart.py"
DIGITS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.setenv("SB_LOG_LEVEL", "INFO")
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(data, output):
    """Start the quickstart; return what it says when it refuses."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--data", data, "--output", output],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "goes on" not in done.stderr
    # Nothing was synthesised or trained before.
    assert {p.name for p in output.iterdir()} <= {"prepared"}
    return done.stderr


def test_a_folder_without_recordings_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    said = refused(tmp_path / "data", tmp_path / "out")
    assert "expected the folder recordings/" in said


@pytest.mark.slow
def test_words_that_are_not_the_digits_are_refused(tmp_path_factory, tmp_path):
    data = make_corpus(tmp_path_factory, words=["ONE", "TWO", "SIX"])
    said = refused(data, tmp_path / "out")
    assert "expected the words EIGHT, FIVE, FOUR, NINE" in said
    assert "has ONE, SIX, TWO" in said
    with open(data / "manifest.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open(data / "manifest.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows({**row, "wrd": "HELLO WORLD"} for row in rows)
    said = refused(data, tmp_path / "other")
    assert "has HELLO WORLD" in said and "leave the data out" in said


@pytest.mark.slow
def test_other_accents_are_refused(tmp_path_factory, tmp_path):
    data = make_corpus(tmp_path_factory, speakers=1, words=DIGITS)
    said = refused(data, tmp_path / "out")
    assert "expected the accents BEL/French, DEU/German" in said
    assert "has USA/neutral" in said


def test_only_an_interrupted_study_is_said_to_go_on(quickstart):
    assert "goes on from where it was" in quickstart.reason(-9)
    assert "goes on" not in quickstart.reason(1)


def test_the_studies_are_quiet_whatever_the_level_was(
    quickstart, monkeypatch, tmp_path
):
    started = []

    def start(command, env, **others):
        started.append(env)

    monkeypatch.setattr(quickstart.subprocess, "Popen", start)
    monkeypatch.setenv("SB_LOG_LEVEL", "INFO")  # as SpeechBrain leaves it
    quickstart.start_study("syn2real", tmp_path, tmp_path, 0)
    assert started[0]["SB_LOG_LEVEL"] == "WARNING"
    assert "TASKARITH_PROGRESS" not in started[0]


# A study that ends when the other one has begun.
MEETS = """
import pathlib, sys, time
output = next(w for w in sys.argv if w.startswith("--output_folder="))
folder = pathlib.Path(output.split("=")[1]).parent
(folder / "{own}").touch()
end = time.monotonic() + 60
while not (folder / "{other}").exists():
    assert time.monotonic() < end, "alone"
    time.sleep(0.01)
print("table of {own}")
"""


def make_studies(quickstart, monkeypatch, folder, first, second):
    for name, script in zip(quickstart.STUDIES, (first, second)):
        (folder / "recipes" / name).mkdir(parents=True)
        (folder / "recipes" / name / "study.py").write_text(script)
    monkeypatch.setattr(quickstart, "HERE", folder / "recipes")
    return folder / "data", folder / "out", 0


def test_the_studies_run_side_by_side(quickstart, monkeypatch, tmp_path, capfd):
    scripts = (
        MEETS.format(own="a", other="b"),
        MEETS.format(own="b", other="a"),
    )
    quickstart.run_studies(
        *make_studies(quickstart, monkeypatch, tmp_path, *scripts)
    )
    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    # The first one has the terminal.
    assert sorted(lines[:2]) == ["== syn2real ==", "table of a"]
    assert lines[2:] == ["== sequential_editing ==", "table of b"]


def test_a_study_that_fails_ends_the_other(quickstart, monkeypatch, tmp_path):
    alive = "import os, sys, time; time.sleep(300)"
    studies = make_studies(
        quickstart, monkeypatch, tmp_path, "raise SystemExit(3)", alive
    )
    start = time.monotonic()
    with pytest.raises(SystemExit, match="syn2real failed with status 3"):
        quickstart.run_studies(*studies)
    assert time.monotonic() - start < 60


def runs(folder):
    """Write what the two studies leave behind."""
    syn2real = Summary(folder / "syn2real")
    chosen = {
        "baseline": None, "shrunk_target": "real_source",
        "real_source_mean": None, "mean_of_both": None,
        "joint": None, "edited": "real_source", "ensemble": "real_source",
        "two_scales": "real_source", "oracle": "real_target",
    }  # fmt: skip
    for number, (row, on) in enumerate(chosen.items()):
        value = 12.5 if row in ("edited", "ensemble") else 10.0 + number
        for metric in ("wer", "own_words", "shared_words"):
            syn2real.add(table="syn2real", row=row, metric=metric,
                         value=value, unit="%", selected_on=on)  # fmt: skip
        syn2real.add(table="syn2real", row=row,
                     metric="relative_reduction", value=-12.34,
                     selected_on=on)  # fmt: skip
    syn2real.note("`oracle`: a bound; `joint`: another row.")
    sequential = Summary(folder / "sequential_editing")
    for row in (
        "fine_tuning", "averaging_half", "task_arithmetic", "ties",
        "chosen_scale", "joint",
    ):  # fmt: skip
        for metric in ("average_wer", "bwt", "werr"):
            sequential.add(
                table="sequential_editing", row=row, metric=metric,
                value=-10.25,
                selected_on="valid_seen" if row == "chosen_scale" else None,
            )  # fmt: skip
    sequential.note("BWT: mean change of earlier domains; WERR: reduction.")
    for summary in (syn2real, sequential):
        (summary.folder / "plots").mkdir(parents=True)
        (summary.folder / "plots" / "scale.png").touch()
        summary.write()
    return syn2real, sequential


@pytest.mark.parametrize("study", ["syn2real", "sequential_editing"])
def test_the_tables_have_their_controls_in_eight_rows(study):
    class Plain(yaml.SafeLoader):
        """Reads an hparams file without making its objects."""

    Plain.add_multi_constructor("!", lambda loader, suffix, node: None)
    text = (SCRIPT.parent / study / "hparams/quickstart.yaml").read_text()
    rows = list(yaml.load(text, Plain)["rows"])
    assert len(rows) <= 8
    needed = {
        "syn2real": {"real_source_mean", "shrunk_target", "two_scales"},
        "sequential_editing": {"averaging_half", "fine_tuning", "joint"},
    }
    assert needed[study] <= set(rows)


def test_tables_fit_into_80_columns(tmp_path):
    for summary in runs(tmp_path):
        stream = io.StringIO()
        summary.print(Console(file=stream, width=80))
        lines = stream.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        words = stream.getvalue().split()
        for entry in summary.rows():
            row = entry["row"]
            row = "(ensemble)" if row == "ensemble" else row
            assert row in words, "no name is broken"
            assert entry["selected_on"] in [None, *words]
        shown = [line for line in lines if re.match(r" \w+ .*\d\.\d\d", line)]
        assert len(shown) == len({r["row"] for r in summary.rows()}) - (
            summary.tables == ["syn2real"]  # the ensemble is the edit
        )
        assert len(shown) <= 8
    assert words.count("ensemble") == 0


def test_the_page_explains_and_links(quickstart, tmp_path, capsys):
    runs(tmp_path)
    quickstart.summarise(tmp_path, simulated=True)
    page = (tmp_path / "results.md").read_text()
    for part in ("`oracle`: a bound", "BWT: mean", "WERR", "SIMULATED"):
        assert part in page
    assert "(syn2real/plots/scale.png)" in page
    assert page.count("edited (ensemble)") == 1
    assert (tmp_path / "summary.json").read_text().count('"ensemble"') == 4
    assert capsys.readouterr().out == ""
