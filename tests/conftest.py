"""Fixtures of all tests: the device, real recordings, and quiet runs.

Authors
 * speechbrain_taskarith contributors 2026
"""

import os
from pathlib import Path

import pytest

# Tests never ask a hub, and run the same with any number of cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda:0")


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


@pytest.fixture(scope="session", autouse=True)
def _lazy_modules_hold_still():
    """Keep hypothesis from importing speechbrain's lazy modules.

    It asks every module for its `__file__`; speechbrain answers by importing
    optional packages (k2 and the like) and raises where they are missing.
    """
    from speechbrain.utils.importutils import LazyModule

    LazyModule.__file__ = None
