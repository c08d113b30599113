"""Every public module, loss, search and rule: as on the CPU, and no new waits.

The cases of tests/integration/test_fake_cuda_*.py, on a device that is there.
"""

import warnings

import pytest
import torch
from machine import DEVICE, KIND, needs_gpu, only_gpu

# isort: split
import test_fake_cuda_adapters
import test_fake_cuda_transducer
import test_fake_cuda_translation
import test_fake_cuda_vectors
from torch.utils._pytree import tree_leaves

ROOMS = (
    test_fake_cuda_adapters,
    test_fake_cuda_transducer,
    test_fake_cuda_translation,
    test_fake_cuda_vectors,
)
CASES = {name: case for room in ROOMS for name, case in room.CASES.items()}
WAITS = {name: waits for room in ROOMS for name, waits in room.WAITS.items()}
# Another generator draws there.
DRAWN = ("TransducerSampler", "MinWERLoss, sampled")


def put(value):
    """Move to the device, without counting that as a wait."""
    if KIND != "cuda":
        return value.to(DEVICE)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        return value.to(DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_cpu(name):
    torch.manual_seed(0)
    expected = CASES[name](lambda value: value)
    torch.manual_seed(0)
    found = CASES[name](put)
    if name in DRAWN:
        return
    for one, other in zip(
        tree_leaves(found), tree_leaves(expected), strict=True
    ):
        if not isinstance(one, torch.Tensor):
            assert one == other
            continue
        assert one.device.type == KIND
        torch.testing.assert_close(
            one.detach().cpu(), other.detach(), rtol=1e-3, atol=1e-4
        )


@only_gpu
@pytest.mark.parametrize("name", [n for n, waits in WAITS.items() if not waits])
def test_never_waits(name):
    torch.manual_seed(0)
    CASES[name](put)  # kernels and workspaces are made
    torch.manual_seed(0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            CASES[name](put)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert not waits, [f"{w.filename}:{w.lineno}" for w in waits]


WRONG = """
import torch
from speechbrain_taskarith.transducer import Emformer
x, lens = torch.randn(2, 6, 6).cuda(), torch.tensor([1.0, 1.5]).cuda()
Emformer(6, 2, 16, 1, 4, 1, 4).cuda()(x, lens)
torch.cuda.synchronize()
"""


@only_gpu
@pytest.mark.parametrize(
    "blocking, message", [("0", "names the row"), ("1", "row 1")]
)
def test_the_device_asserts_wrong_lengths(blocking, message):
    import os
    import subprocess
    import sys

    # In a process of its own: an assertion leaves the device unusable.
    done = subprocess.run(
        [sys.executable, "-c", WRONG],
        env={**os.environ, "CUDA_LAUNCH_BLOCKING": blocking},
        capture_output=True,
        text=True,
    )
    assert done.returncode and message in done.stderr + done.stdout
