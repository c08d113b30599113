"""Fixtures of all tests: the device and the real recordings."""

import os
import sys
from pathlib import Path

import pytest

# Tests import what the recipes on digits share as the recipes do.
sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes" / "FSDD"))
# What must hold on disk is checked by one file, in made recipes and in
# SpeechBrain's.
sys.path.append(str(Path(__file__).resolve().parent / "drop_in"))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda:0")
    parser.addoption(
        "--speechbrain",
        help="a checkout of SpeechBrain, whose recipes tests/drop_in runs",
    )


@pytest.fixture
def device(request):
    """The device to test on, as SpeechBrain's own tests take it."""
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def shared_data():
    """Folder of the real recordings; skips where they are not beside us."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TASKARITH_SHARED", default))
    if not (folder / "fsdd" / "manifest.csv").exists():
        pytest.skip(
            f"REAL RECORDINGS ABSENT: {folder} holds no fsdd/manifest.csv "
            "(set TASKARITH_SHARED)"
        )
    return folder
