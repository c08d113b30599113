"""The GPU that the tests run on, or the CPU in a rehearsal.

`TASKARITH_GPU_TESTS_ON=cpu` runs the same code on the CPU: it finds wrong
imports, names and numbers, but no mixed devices.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

REHEARSAL = os.environ.get("TASKARITH_GPU_TESTS_ON") == "cpu"
# "cpu:0" is the CPU by way of torch; "cpu" would be NumPy to `vectors`.
DEVICE = "cpu:0" if REHEARSAL else "cuda"
KIND = torch.device(DEVICE).type
HERE = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(
    not (HERE or REHEARSAL),
    reason="NO GPU: torch.cuda.is_available() is False, nothing was tested",
)
# What only a GPU has: kernels, its memory, waits.
only_gpu = pytest.mark.skipif(not HERE or REHEARSAL, reason="NO GPU")

for folder in ("unit", "integration"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
