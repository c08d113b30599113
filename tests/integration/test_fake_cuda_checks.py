"""Bad input on a GPU that is not there, and the page that lists the waits."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda

from speechbrain_taskarith.transducer import (
    Emformer,
    RNNTJoint,
    joint_transducer_loss,
    min_wer_loss,
    transducer_loss,
)
from speechbrain_taskarith.translation import CTCShrink, ctc_segments

ROOMS = ("adapters", "transducer", "translation", "vectors")
PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
PLACE = rf"`((?:{'|'.join(ROOMS)}|speechbrain)\.[\w.]+)`"


def emformer(put, lens):
    return put(Emformer(6, 2, 16, 1, 4, 1, 4))(put(torch.randn(2, 6, 6)), lens)


def shrink(put, lens):
    x, logits = put(torch.randn(2, 6, 4)), put(torch.randn(2, 6, 3))
    return CTCShrink(capacity=4)(x, logits, lens)


def segments(put, lens):
    labels, lengths = put(torch.ones(2, 6).long()), (lens * 6).long()
    return ctc_segments(labels, lengths, capacity=4)


@pytest.mark.parametrize("case", [emformer, shrink, segments])
@pytest.mark.parametrize("wrong", [float("nan"), 1.5, 0.0])
def test_the_device_asserts_what_the_host_does_not_wait_for(
    case, wrong, monkeypatch
):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    lens = torch.tensor([1.0, wrong])
    with FakeCuda() as mode:
        case(mode.put, mode.put(torch.tensor([1.0, 0.5])))
        with pytest.raises(RuntimeError, match="=1 names the row"):
            case(mode.put, mode.put(lens))
        assert not mode.waits
        # Who debugs gets the name.
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
        with pytest.raises(ValueError, match="row 1"):
            case(mode.put, mode.put(lens))
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING")
    with pytest.raises(ValueError, match="row 1"):
        case(lambda value: value, lens)


def test_an_empty_list_is_asserted():
    mask = torch.tensor([[True, True], [False, False]])
    with FakeCuda() as mode:
        scores, mask_there = mode.put(torch.zeros(2, 2)), mode.put(mask)
        with pytest.raises(RuntimeError, match="without a hypothesis"):
            min_wer_loss(scores, scores, mask_there)
        assert not mode.waits
    with pytest.raises(ValueError, match="row 1 has no hypothesis"):
        min_wer_loss(torch.zeros(2, 2), torch.zeros(2, 2), mask)


GOOD = {"lens": [1.0, 0.5], "targets": [[1, 2], [3, 0]], "labels": [1.0, 0.5]}
BAD = [
    ({"lens": [1.0, 1.5]}, "input length of row 1 is 1.5"),
    ({"labels": [1.0, float("nan")]}, "target length of row 1"),
    ({"targets": [[1, 2], [9, 0]]}, "row 1, label 0: 9 is outside"),
    ({"targets": [[0, 2], [3, 0]]}, "row 0, label 0: 0 is the blank"),
]


@pytest.mark.parametrize("changed, message", BAD)
@pytest.mark.parametrize("dense", [True, False])
def test_losses_name_the_row_in_one_wait(changed, message, dense):
    lens, targets, labels = map(torch.tensor, {**GOOD, **changed}.values())
    with FakeCuda() as mode:
        put = mode.put
        inputs = put(targets), put(lens), put(labels), 0
        with pytest.raises(ValueError, match=message):
            if dense:
                transducer_loss(put(torch.randn(2, 4, 3, 5)), *inputs)
            else:
                x, g = torch.randn(2, 4, 6), torch.randn(2, 3, 5)
                joint = put(RNNTJoint(6, 5, 8, 5))
                with torch.no_grad():
                    joint_transducer_loss(joint, put(x), put(g), *inputs)
        asked = [operation for operation, _ in mode.waits]
    # The answers in one transfer; then the row, for the message.
    assert asked.count("tolist") <= 2 and "nonzero" in asked


def test_on_the_cpu_lengths_and_targets_cost_no_wait():
    with FakeCuda() as mode:
        logits = mode.put(torch.randn(2, 4, 3, 5))
        lens, targets, labels = map(torch.tensor, GOOD.values())
        transducer_loss(logits, targets, lens, labels, 0)
        assert {place for _, place in mode.waits if "check" in place} == set()


def test_the_page_lists_the_waits():
    tables = [
        importlib.import_module(f"test_fake_cuda_{room}").WAITS
        for room in ROOMS
    ]
    waits = {p for table in tables for case in table.values() for p in case}
    section = PAGE.read_text(encoding="utf-8").partition("## Host syncs")[2]
    listed = set(re.findall(PLACE, section))
    # Of merging the page names what all do; a rule's own are in the table.
    own = {p for p in waits - listed if p.startswith("vectors.")}
    assert listed == waits - own
