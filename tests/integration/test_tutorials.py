"""The tutorials run from top to bottom, with tiny models and made speech.

What they claim is asserted in their cells; here is what a reader must not
see: errors, warnings, cells without an effect, paths of one machine.
"""

import importlib.util
import json
import re

import pytest
from house import ROOT
from tiny_whisper import save_tiny_whisper

pytest.importorskip("nbclient", reason="needs the extra: pip install .[tutorials]")
pytest.importorskip("ipykernel", reason="needs the extra: pip install .[tutorials]")

FOLDER = ROOT / "docs" / "tutorials"
