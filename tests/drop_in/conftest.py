"""Fixtures of the runs in a SpeechBrain checkout, and their table."""

import os
from pathlib import Path

import pytest
import runner
from corpus import Corpus


def _checkout(config):
    given = config.getoption("--speechbrain") or os.environ.get(
        "SPEECHBRAIN_CHECKOUT"
    )
    return Path(given).resolve() if given else None


def pytest_ignore_collect(collection_path, config):
    """Leave out the runs without a checkout; one skipped test says so."""
    ours = collection_path.name.startswith("test_drop_in_")
    page = collection_path.name == "test_drop_in_page.py"
    return True if ours and not page and _checkout(config) is None else None


@pytest.fixture(scope="session")
def checkout(request):
    """SpeechBrain's repository."""
    path = _checkout(request.config)
    if path is None:
        pytest.skip(
            "NO RECIPE OF SPEECHBRAIN WAS RUN: git clone "
            "https://github.com/speechbrain/speechbrain, then "
            "SPEECHBRAIN_CHECKOUT=<folder> pytest tests/drop_in"
        )
    assert (path / "recipes" / "LibriSpeech").is_dir(), f"{path}: no recipes"
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The made utterances, and what recipes would download."""
    return Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _runs(request):
    """Pass the runs on to the table at the end, from any worker."""
    yield
    request.node.user_properties += [("drop_in", row) for row in runner.RUNS]
    runner.RUNS.clear()


def pytest_terminal_summary(terminalreporter):
    """Show every run: recipe, YAML, output, seconds, exit status."""
    rows = [
        row
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for key, row in report.user_properties
        if key == "drop_in"
    ]
    if rows:
        terminalreporter.section("recipes of SpeechBrain")
        for line in runner.table(rows):
            terminalreporter.write_line(line)
