"""The checkpointer: whole folders or none, and otherwise SpeechBrain's."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_taskarith.vectors import AtomicCheckpointer


class Breaks:
    """A recoverable whose saving is interrupted."""


def interrupted(obj, path):
    path.write_bytes(b"half")
    raise KeyboardInterrupt


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path):
    model = torch.nn.Linear(2, 2)
    saver = AtomicCheckpointer(tmp_path, {"model": model})
    saver.save_checkpoint(meta={"WER": 1.0})
    saver.add_recoverable("breaks", Breaks(), custom_save_hook=interrupted)
    with pytest.raises(KeyboardInterrupt):
        saver.save_checkpoint(meta={"WER": 2.0})
    again = AtomicCheckpointer(tmp_path, {"model": model})
    assert [c.meta["WER"] for c in again.list_checkpoints()] == [1.0]
    assert len(os.listdir(tmp_path)) == 1, "left-overs are swept away"


@pytest.mark.parametrize("act", ["train", "save"])
def test_what_a_kill_left_is_swept_by_who_writes(tmp_path, act):
    """Killed between taking a checkpoint's name away and deleting it."""
    model = torch.nn.Linear(2, 2)
    AtomicCheckpointer(tmp_path, {"model": model}).save_checkpoint(name="a")
    (tmp_path / ".partial-old-CKPT+b").mkdir()
    again = AtomicCheckpointer(tmp_path, {"model": model})
    again.recover_if_possible()
    assert len(os.listdir(tmp_path)) == 2, "who only reads changes nothing"
    if act == "train":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        again.add_recoverable("optimizer", optimizer)
    else:
        again.save_checkpoint(name="a")
    assert os.listdir(tmp_path) == ["CKPT+a"]


@pytest.mark.parametrize("end_of_epoch", [True, False])
def test_messages_name_the_folder_that_is_there(tmp_path, caplog, end_of_epoch):
    """A training's log is kept; what it names should be found."""
    model = torch.nn.Linear(1, 1)
    with caplog.at_level(logging.DEBUG):
        saver = AtomicCheckpointer(tmp_path, {"model": model})
        saved = saver.save_checkpoint(end_of_epoch=end_of_epoch)
    kind = "end-of-epoch" if end_of_epoch else "intra-epoch"
    assert f"Saved an {kind} checkpoint in {saved.path}" in caplog.text
    assert ".partial" not in caplog.text

    def full(obj, path):
        raise OSError(28, f"{path}: no space", str(path))

    saver.add_recoverable("full", Breaks(), custom_save_hook=full)
    with pytest.raises(OSError, match="CKPT.best/full.ckpt") as caught:
        saver.save_checkpoint(name="best")
    assert ".partial" not in str(caught.value)


def test_listing_does_not_slow_down_with_every_save(tmp_path, monkeypatch):
    """SpeechBrain's default list of keys grows by one at each call."""
    saver = AtomicCheckpointer(tmp_path, {"model": torch.nn.Linear(1, 1)})
    listed = []
    found = AtomicCheckpointer.list_checkpoints
    monkeypatch.setattr(
        AtomicCheckpointer,
        "list_checkpoints",
        lambda self: listed.append(1) or found(self),
    )
    counts = []
    for _ in range(3):
        listed.clear()
        saver.save_and_keep_only()
        counts.append(len(listed))
    assert len(set(counts)) == 1, counts


def test_fewer_than_no_checkpoints_cannot_be_kept(tmp_path):
    saver = AtomicCheckpointer(tmp_path, {"model": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="num_to_keep"):
        saver.delete_checkpoints(num_to_keep=-1)


def test_speechbrains_own_reads_what_ours_writes(tmp_path):
    model = torch.nn.Linear(2, 2)
    saved = AtomicCheckpointer(tmp_path, {"model": model}).save_checkpoint()
    other = torch.nn.Linear(2, 2)
    Checkpointer(tmp_path, {"model": other}).recover_if_possible()
    assert torch.equal(model.weight, other.weight)
    assert saved.paramfiles["model"].exists()
    assert saved.path.name.startswith("CKPT+")


def test_a_named_checkpoint_is_replaced(tmp_path):
    model = torch.nn.Linear(1, 1)
    saver = AtomicCheckpointer(tmp_path, {"model": model})
    for value in (1.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        saver.save_checkpoint(name="kept")
    assert os.listdir(tmp_path) == ["CKPT+kept"]
    torch.nn.init.zeros_(model.weight)
    saver.recover_if_possible()
    assert model.weight.item() == 2.0


@pytest.mark.parametrize("cls", [Checkpointer, AtomicCheckpointer])
@pytest.mark.parametrize(
    "rule",
    [
        {"num_to_keep": 2},
        {"num_to_keep": 1, "min_keys": ["WER"]},
        {"num_to_keep": 1, "max_keys": ["acc"]},
        {"num_to_keep": 0},
        {"num_to_keep": 1, "ckpt_predicate": lambda c: c.meta["WER"] > 2},
    ],
)
def test_keeps_what_speechbrain_keeps(tmp_path, cls, rule):
    """Both classes are held to one list, worked out by hand."""
    saver = cls(tmp_path, {"model": torch.nn.Linear(1, 1)})
    for number, (wer, acc) in enumerate([(3, 1), (1, 5), (2, 2), (4, 0)]):
        saver.save_checkpoint(
            meta={"WER": wer, "acc": acc, "unixtime": number}, name=str(number)
        )
    saver.delete_checkpoints(**rule)
    kept = sorted(path.name[-1] for path in tmp_path.iterdir())
    if "min_keys" in rule or "max_keys" in rule:
        assert kept == ["1", "3"]
    elif "ckpt_predicate" in rule:
        assert kept == ["1", "2", "3"]
    else:
        assert kept == ["2", "3"][: rule["num_to_keep"]]


SLOW_SAVER = """
import sys, time
import speechbrain as sb
_, run_opts, _ = sb.parse_arguments(
    ["none.yaml", "--device", "cpu", "--distributed_backend", "gloo"]
)
sb.utils.distributed.ddp_init_group(run_opts)
import torch
from speechbrain_taskarith.vectors import AtomicCheckpointer

def save(obj, path):
    # As SpeechBrain's Brain and schedulers: every process writes.
    time.sleep(0.5 * torch.distributed.get_rank())
    path.write_text("state")

saver = AtomicCheckpointer({folder!r})
saver.add_recoverable("slow", object(), custom_save_hook=save)
for number in (1, 2):
    saver.save_and_keep_only(meta={{"number": number}})
found = saver.list_checkpoints()
assert [c.meta["number"] for c in found] == [2], found
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_slow_process_still_finds_the_folder(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SLOW_SAVER.format(folder=str(tmp_path / "saved")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command, "--nproc_per_node=2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(os.listdir(tmp_path / "saved")) == 1
