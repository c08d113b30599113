"""`kill -9` at any moment of an edit, a merge or a training loses nothing.

A child process, forked from this one (which has torch imported, so that a kill
costs milliseconds), does the work and reports what is done over a pipe. It is
killed with SIGKILL in two ways: at random moments, and, by a sweep, right
before each single call that changes the disk. Afterwards everything that was
reported must be there, and going on must end where an uninterrupted run ends.
"""

import os
import random
import select
import signal
import struct
import threading
import time
import traceback

import pytest
import speechbrain as sb
import torch
import tqdm.auto

from speechbrain_taskarith.vectors import (
    TIES,
    EditingCheckpointer,
    SequentialEditor,
    TaskArithmetic,
    as_state,
    merge_checkpoints,
    open_state,
    save_checkpoint,
    save_state,
)
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    find_checkpoint_folder,
)

# Every way that our code (and Python's, for us) changes the disk.
_DISK_CALLS = (
    "replace",
    "rename",
    "unlink",
    "remove",
    "rmdir",
    "mkdir",
    "fsync",
    "pwrite",
    "posix_fallocate",
    "ftruncate",
)


def in_child(work, die_before=None):
    """Fork; the child runs `work(report)`. Returns its id and its pipe."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        os.close(reader)
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        own_progress_lock()
        if die_before is not None:
            _die_before_call(die_before)
        work(lambda number: os.write(writer, struct.pack("i", number)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def own_progress_lock():
    """Leave the lock of tqdm, which logging takes, to the parent.

    It is shared across a fork: a child killed with it would hold it for ever.
    """
    for kind in (tqdm.std.tqdm, tqdm.auto.tqdm):
        kind.set_lock(threading.RLock())


def _die_before_call(number):
    """Have this process kill itself before its n-th disk call."""
    count = 0

    def lethal(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count > number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in _DISK_CALLS:
        setattr(os, name, lethal(getattr(os, name)))


def collect(pid, reader, kill_after=None):
    """Wait for a child, or kill it; return (was it killed, its reports)."""
    if kill_after is not None:
        # Wait on the pipe too: a child that ends early ends the wait.
        deadline = time.monotonic() + kill_after
        reports = b""
        while (left := deadline - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0]:
                part = os.read(reader, 4096)
                if not part:
                    break
                reports += part
        os.kill(pid, signal.SIGKILL)
    else:
        reports = b""
    while part := os.read(reader, 4096):
        reports += part
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the child failed ({code})"
    numbers = [n for (n,) in struct.iter_unpack("i", reports)]
    return code != 0, numbers


def run_once(work):
    """Run to the end in a child; return its reports and its seconds."""
    start = time.monotonic()
    killed, reports = collect(*in_child(work))
    assert not killed
    return reports, time.monotonic() - start


class Moments:
    """Random moments within a work whose length is learned as we go.

    How long it took once is only a first guess: under a changing load of the
    machine it may be several times too long (every child ends before its kill)
    or too short (none gets anywhere). A kill widens the span a little and an
    end narrows it, so that about four children of five are killed.
    """

    def __init__(self, seed, seconds):
        self.random, self.span = random.Random(seed), seconds

    def draw(self):
        return self.random.uniform(0, self.span)

    def learn(self, killed):
        self.span *= 1.1 if killed else 0.7


def files(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name != ".lock"
    )


# -- editing -------------------------------------------------------------------


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(40, 50, generator=generator),
        "b": torch.randn(60, generator=generator),
        "n": torch.tensor(seed),
    }


ACTS = [
    lambda e: e.learn("german", weights(1)),
    lambda e: e.learn("greek", weights(2)),
    lambda e: e.undo("greek"),
    lambda e: e.learn("french", weights(3), scale=0.2),
    lambda e: e.reorder(["french", "german"]),
    lambda e: e.learn("greek", weights(4)),
    lambda e: e.undo("german"),
]


def edit(folder):
    """The work: start or resume, go on where the log ends, report."""

    def work(report):
        with SequentialEditor.open(
            weights(0), TIES(density=0.4, scale=0.6), folder, encoding="int8"
        ) as editor:
            report(len(editor.history) - 1)
            for number in range(len(editor.history) - 1, len(ACTS)):
                ACTS[number](editor)
                report(number + 1)

    return work


@pytest.fixture(scope="module")
def uninterrupted_edits(tmp_path_factory):
    """Fingerprint after each act, final files, and how long it takes."""
    folder = tmp_path_factory.mktemp("edits") / "e"
    fingerprints = []
    with SequentialEditor(
        weights(0), TIES(density=0.4, scale=0.6), folder, encoding="int8"
    ) as editor:
        fingerprints.append(editor.fingerprint)
        for act in ACTS:
            act(editor)
            fingerprints.append(editor.fingerprint)
    again = tmp_path_factory.mktemp("again") / "e"
    _, seconds = run_once(edit(again))
    return fingerprints, files(folder), seconds


def check_edits(folder, reports, uninterrupted):
    """What was reported is there; going on ends where it should."""
    fingerprints, final_files, _ = uninterrupted
    if reports:
        with SequentialEditor.resume(folder) as editor:
            done = len(editor.history) - 1
            assert done in (reports[-1], reports[-1] + 1)
            assert editor.fingerprint == fingerprints[done]
            state = as_state(editor.state())
            assert state.fingerprint == fingerprints[done]
    edit(folder)(lambda number: None)
    with SequentialEditor.resume(folder) as editor:
        assert editor.fingerprint == fingerprints[-1]
    assert files(folder) == final_files


def test_editing_killed_at_random_moments(tmp_path, uninterrupted_edits):
    moments, kills, attempts = Moments(1, uninterrupted_edits[2]), 0, 0
    while kills < 30:
        attempts += 1
        assert attempts < 100
        folder = tmp_path / str(attempts)
        pid, reader = in_child(edit(folder))
        killed, reports = collect(pid, reader, kill_after=moments.draw())
        moments.learn(killed)
        kills += killed
        check_edits(folder, reports, uninterrupted_edits)


def test_editing_killed_before_each_call_to_the_disk(
    tmp_path, uninterrupted_edits
):
    for number in range(10**6):
        folder = tmp_path / str(number)
        pid, reader = in_child(edit(folder), die_before=number)
        killed, reports = collect(pid, reader)
        if not killed:
            break
        # Checking each takes long; all of the first and a share of the rest.
        if number < 12 or number % 4 == 0:
            check_edits(folder, reports, uninterrupted_edits)
    assert number > 20


def test_editing_killed_again_and_again(tmp_path, uninterrupted_edits):
    """One folder, killed until it is done: no progress is ever lost."""
    folder, last = tmp_path / "e", 0
    moments = Moments(2, uninterrupted_edits[2] / 8)
    for _ in range(200):
        pid, reader = in_child(edit(folder))
        killed, reports = collect(pid, reader, kill_after=moments.draw())
        moments.learn(killed)
        if reports:
            assert reports[-1] >= last
            last = reports[-1]
        if not killed:
            break
    else:
        pytest.fail("it never came to an end")
    check_edits(folder, [len(ACTS)], uninterrupted_edits)


# -- merging -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_merging_killed_at_random_moments(tmp_path, suffix):
    parents = [
        save_state(weights(seed), tmp_path / f"{seed}.safetensors")
        for seed in range(4)
    ]
    output = tmp_path / "out" / f"merged.{suffix}"

    def work(report):
        merge_checkpoints(
            parents[0],
            parents[1:],
            TIES(density=0.3),
            output,
            show_progress=False,
            threads=1,
        )
        report(1)

    _, seconds = run_once(work)
    expected = open_state(output).fingerprint
    old = save_state(weights(9), tmp_path / "out" / f"old.{suffix}")
    old_fingerprint = open_state(old).fingerprint
    moments, kills = Moments(3, seconds), 0
    for attempt in range(100):
        # In turn into nothing and over an older result.
        if attempt % 2:
            output.unlink(missing_ok=True)
        else:
            save_state(weights(9), output)
        pid, reader = in_child(work)
        killed, reports = collect(pid, reader, kill_after=moments.draw())
        moments.learn(killed)
        kills += killed
        if reports:
            assert open_state(output).fingerprint == expected
        elif output.exists():
            # Whole: the old one, or the new one just before its report.
            found = open_state(output)
            found.verify()
            assert found.fingerprint in (expected, old_fingerprint)
        run_once(work)
        assert open_state(output).fingerprint == expected
        if kills >= 6:
            break
    assert kills >= 6


def test_replacing_a_checkpoint_killed_before_each_call(tmp_path):
    """There is a whole checkpoint at any moment: the old or the new one."""
    old, new = as_state(weights(1)), as_state(weights(2))

    def work(folder):
        path = folder / "CKPT+merged"
        return lambda report: report(
            len(save_checkpoint({"model": new}, path).name)
        )

    for number in range(10**6):
        folder = tmp_path / str(number)
        save_checkpoint({"model": old}, folder / "CKPT+merged")
        pid, reader = in_child(work(folder), die_before=number)
        killed, reports = collect(pid, reader)
        found = open_state(find_checkpoint_folder(folder))
        found.verify()
        wanted = (new,) if reports else (old, new)
        assert found.fingerprint in [state.fingerprint for state in wanted]
        work(folder)(lambda number: None)
        found = open_state(find_checkpoint_folder(folder))
        assert found.fingerprint == new.fingerprint
        if not killed:
            break
    assert number > 5


# -- training ------------------------------------------------------------------


class Tiny(sb.Brain):
    """A small Brain whose epochs are reported when their checkpoint stands."""

    def compute_forward(self, batch, stage):
        return self.modules.model(self.modules.norm(batch[0]))

    def compute_objectives(self, predictions, batch, stage):
        return (predictions - batch[1]).square().mean()

    def on_stage_end(self, stage, loss, epoch=None):
        if stage == sb.Stage.VALID:
            self.checkpointer.save_and_keep_only(
                meta={"WER": float(loss)}, num_to_keep=1, min_keys=["WER"]
            )
            self.report(epoch)


EPOCHS = 6


def train(folder, base):
    """The work: build, fit (which resumes), evaluate, report the result."""

    def work(report):
        torch.manual_seed(0)
        modules = {
            "model": torch.nn.Linear(4, 4),
            "norm": sb.processing.features.InputNormalization(),
        }
        counter = sb.utils.epoch_loop.EpochCounter(EPOCHS)
        checkpointer = EditingCheckpointer(
            folder,
            {
                "model": modules["model"],
                "normalizer": modules["norm"],
                "counter": counter,
            },
            edited="model",
            base=base,
            rule=TaskArithmetic(scale=0.4),
        )
        brain = Tiny(
            modules,
            lambda parameters: torch.optim.Adam(parameters, lr=0.05),
            {},
            {"device": "cpu", "noprogressbar": True},
            checkpointer,
        )
        brain.report = report
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(4, 3, 6, 4, generator=generator)
        data = torch.utils.data.DataLoader(
            [(part, part.flip(-1) * 2) for part in x], batch_size=None
        )
        brain.fit(counter, data, data)
        brain.evaluate(data, min_key="WER")
        save_state(modules["model"], folder.parent / "final.safetensors")
        report(EPOCHS + 1)

    return work


def test_training_killed_at_random_moments(tmp_path):
    torch.manual_seed(1)
    base = save_state(torch.nn.Linear(4, 4), tmp_path / "base.ckpt")
    whole = tmp_path / "whole" / "save"
    reports, seconds = run_once(train(whole, base))
    assert reports == [*range(1, EPOCHS + 1), EPOCHS + 1]
    expected = open_state(whole.parent / "final.safetensors").fingerprint
    moments, kills = Moments(4, seconds), 0
    for run in range(50):
        folder = tmp_path / str(run) / "save"
        last = 0
        for _ in range(60):
            pid, reader = in_child(train(folder, base))
            killed, reports = collect(pid, reader, kill_after=moments.draw())
            moments.learn(killed)
            kills += killed
            last = max([last, *reports])
            if 0 < last <= EPOCHS:
                check_checkpoints(folder, base, last)
            if not killed:
                break
        final = open_state(folder.parent / "final.safetensors")
        assert final.fingerprint == expected
        left = [p.name for p in folder.iterdir() if p.name != ".lock"]
        assert all(name.startswith("CKPT+") for name in left)
        if kills >= 15:
            break
    assert kills >= 15


def check_checkpoints(folder, base, epoch):
    """Every checkpoint that is listed loads; the reported epoch is there."""
    model = torch.nn.Linear(4, 4)
    counter = sb.utils.epoch_loop.EpochCounter(EPOCHS)
    checkpointer = EditingCheckpointer(
        folder,
        {
            "model": model,
            "counter": counter,
            "normalizer": sb.processing.features.InputNormalization(),
        },
        edited="model",
        base=base,
        rule=TaskArithmetic(scale=0.4),
    )
    found = checkpointer.find_checkpoints()
    assert found
    for checkpoint in found:
        for kind in ("edited", "finetuned"):
            checkpointer.load_checkpoint(checkpoint, weights=kind)
    checkpointer.recover_if_possible()
    assert counter.current >= epoch
