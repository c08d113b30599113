"""`kill -9` in the middle of everything that writes, some inside the rename.

    python tests/kill/kill_writers.py --kills 50

For each writer a child is killed at a random moment, or by itself right
before or right after one of its calls that change the disk (the final rename
above all). Afterwards the old or the new content stands whole under the final
name; the next run succeeds, and leaves what a run that nobody killed leaves.
"""

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import tqdm.auto
from kill_training import Training

from speechbrain_taskarith.__main__ import main as taskarith
from speechbrain_taskarith.adapters import insert_adapters
from speechbrain_taskarith.utils import files
from speechbrain_taskarith.vectors import (
    TIES,
    SequentialEditor,
    TaskArithmetic,
    TaskVector,
    merge_checkpoints,
    open_state,
    save_checkpoint,
    save_state,
)

# Calls that change the disk, ours and Python's for us.
_CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "pwrite")
_CALLS += ("posix_fallocate", "ftruncate", "truncate", "open")
_RENAMES = ("replace", "_exchange")


def weights(seed, size=200):
    noise = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(size, size, generator=noise),
        "b": torch.randn(size, generator=noise),
    }


def read(path):
    """Return a file's or folder's fingerprint, all checksums compared."""
    state = open_state(path)
    state.verify()
    return state.fingerprint


class Writer:
    """Something that writes `out` in a folder; the old content is there."""

    output = "out.safetensors"

    def prepare(self, folder):
        """Write inputs, and the old content."""
        save_state(weights(0), folder / "base.safetensors")
        save_state(weights(1), folder / "tuned.safetensors")
        self.old(folder / self.output)

    def old(self, path):
        save_state(weights(9), path)

    def work(self, folder):
        """Write the new content."""

    def follow(self, folder):
        """Be the next run."""
        self.work(folder)

    def content(self, folder):
        """Return something that tells old and new content apart."""
        return read(folder / self.output)


class Merge(Writer):
    def __init__(self, output):
        self.output = output

    def old(self, path):
        if path.name.startswith("CKPT+"):
            save_checkpoint({"model": weights(9)}, path)
        else:
            super().old(path)

    def work(self, folder):
        base, tuned = folder / "base.safetensors", folder / "tuned.safetensors"
        if self.output.startswith("CKPT+"):
            words = ["merge", "--base", base, "--finetuned", tuned, tuned]
            words += ["--rule", "TIES", "-o", folder / self.output]
            words += ["--overwrite", "--threads=1", "--no-progress"]
            assert taskarith(list(map(str, words))) == 0
        else:
            merge_checkpoints(
                base, [tuned, tuned], TIES(0.3), folder / self.output,
                threads=1, show_progress=False,
            )  # fmt: skip


class Apply(Merge):
    def prepare(self, folder):
        super().prepare(folder)
        tau = TaskVector.between(weights(0), weights(1))
        tau.save(folder / "tau.safetensors")

    def work(self, folder):
        words = [
            "apply",
            folder / "base.safetensors",
            folder / "tau.safetensors",
        ]
        words += ["-o", folder / self.output, "--overwrite", "--no-progress"]
        assert taskarith(list(map(str, words))) == 0


class Save(Writer):
    def __init__(self, output):
        self.output = output

    def work(self, folder):
        save_state(weights(1), folder / self.output, metadata={"run": "new"})


class Link(Save):
    """The output is a link to a file elsewhere."""

    def old(self, path):
        (path.parent / "store").mkdir()
        target = path.parent / "store" / self.output
        save_state(weights(9), target)
        path.symlink_to(target)

    def content(self, folder):
        assert (folder / self.output).is_symlink()
        return super().content(folder)


class Vector(Writer):
    def old(self, path):
        TaskVector.between(weights(0), weights(2)).save(path)

    def work(self, folder):
        tau = TaskVector.between(weights(0), weights(1))
        tau.save(folder / self.output, encoding="int8")

    def content(self, folder):
        tau = TaskVector.load(folder / self.output)
        return float(tau["b"].sum())


class Learn(Writer):
    """A third edit; whether it is there after a kill, the log says."""

    def prepare(self, folder):
        with SequentialEditor(
            weights(0), TaskArithmetic(0.5), folder / "edits"
        ) as editor:
            for number in (1, 2):
                editor.learn(f"d{number}", weights(number))

    def work(self, folder):
        with SequentialEditor.resume(folder / "edits") as editor:
            if len(editor.log) < 3:
                editor.learn("d3", weights(3))

    def content(self, folder):
        editor = SequentialEditor.resume(
            folder / "edits", read_only=True, verify=True
        )
        state = editor.state()
        return len(editor.log), editor.fingerprint, float(state["a"].sum())


class Undo(Learn):
    def work(self, folder):
        with SequentialEditor.resume(folder / "edits") as editor:
            if len(editor.log) == 2:
                editor.undo("d1")


class Adapter(Writer):
    def _handle(self, seed):
        torch.manual_seed(seed)
        layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))
        encoder = torch.nn.ModuleDict({"layers": layers})
        for parameter in encoder.parameters():
            torch.nn.init.zeros_(parameter)
        return insert_adapters(encoder, ["us"], d_model=64, bottleneck=32)

    def prepare(self, folder):
        self._handle(1).save_adapter("us", folder / self.output)

    def work(self, folder):
        self._handle(2).save_adapter("us", folder / self.output)

    def content(self, folder):
        handle = self._handle(3)
        handle.load_adapter(folder / self.output, name="us")
        state = handle.layers[0].bank.state_dict()
        return sum(float(tensor.sum()) for tensor in state.values())


WRITERS = {
    "merge safetensors": Merge("out.safetensors"),
    "merge ckpt": Merge("out.ckpt"),
    "merge CKPT+": Merge("CKPT+out"),
    "apply ckpt": Apply("out.ckpt"),
    "apply CKPT+": Apply("CKPT+out"),
    "vector": Vector(),
    "edit learn": Learn(),
    "edit undo": Undo(),
    "save safetensors": Save("out.safetensors"),
    "save ckpt": Save("out.ckpt"),
    "save Hugging Face": Save("out"),
    "save through a link": Link("out.safetensors"),
    "adapter save": Adapter(),
    "training": Training(begun=1),
    "training's first epoch": Training(begun=0),
}


def listing(folder):
    """Return all names below a folder, and those of left-overs."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    # Copies of states save time: a kill may cost one, not leave one too many.
    copies = [n for n in names if n.startswith("edits/states/")]
    assert len(copies) <= 2, copies
    names = [n for n in names if not n.startswith("edits/states")]
    found = [*names, *copies]
    return names, [n for n in found if files.TEMPORARY_PREFIX in n]


def child(work, *arguments, die=None):
    """Fork a child that works; return its id. `die`: (call, when)."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        # That of the parent is shared: killed with it, it would be held.
        for kind in (tqdm.std.tqdm, tqdm.auto.tqdm):
            kind.set_lock(threading.RLock())
        if die is not None:
            _die_at(*die)
        work(*arguments)
        code = 0
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(code)


def _die_at(number, when, renames_only):
    """Have this process kill itself before or after its n-th disk call."""
    count = 0

    def lethal(call):
        def wrapped(*arguments, **more):
            nonlocal count
            count += 1
            if count == number and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **more)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in () if renames_only else _CALLS:
        if name != "replace" and hasattr(os, name):
            setattr(os, name, lethal(getattr(os, name)))
    os.replace = lethal(os.replace)
    files._exchange = lethal(files._exchange)


def ended(pid):
    """Wait for a child; tell whether it was killed. A failure is an error."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise AssertionError(f"the run failed ({code})")
    return code != 0


def kill_writer(writer, kills, seed, folder):
    """Kill a writer so many times; return what was found, by outcome."""
    rng = random.Random(seed)
    whole = folder / "whole"
    whole.mkdir()
    writer.prepare(whole)
    old = writer.content(whole)
    begin = time.monotonic()
    assert not ended(child(writer.work, whole))
    seconds = time.monotonic() - begin
    new = writer.content(whole)
    assert not ended(child(writer.follow, whole))
    last, names = writer.content(whole), listing(whole)
    assert new != old and not names[1], names
    found = {"old": 0, "new": 0, "killed": 0, "in rename": 0, "runs": 0}
    span = {True: 1, False: 40}
    while found["killed"] < kills:
        found["runs"] += 1
        assert found["runs"] < 20 * kills, found
        place = folder / str(found["runs"])
        place.mkdir()
        writer.prepare(place)
        kind = rng.choice(("moment", "rename", "rename", "call"))
        if kind == "moment":
            pid = child(writer.work, place)
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        else:
            renames = kind == "rename"
            number = rng.randint(1, span[renames])
            when = rng.choice(("before", "after"))
            die = (number, when, renames)
            pid = child(writer.work, place, die=die)
        killed = ended(pid)
        if kind == "moment":
            seconds *= 1.1 if killed else 0.7
        elif killed:
            span[renames] = max(span[renames], number + 1)
        else:
            span[renames] = max(1, number - 1)
        found["killed"] += killed
        found["in rename"] += killed and kind == "rename"
        now = writer.content(place)
        assert now in (old, new), (kind, now)
        found["old" if now == old else "new"] += killed
        # The next run, of a new process.
        assert not ended(child(writer.follow, place))
        assert writer.content(place) == last
        assert listing(place) == names, (kind, listing(place), names)
        shutil.rmtree(place)
    return found


def run(kills, names=None, seed=0, report=print):
    """Kill each writer so many times; an AssertionError where one fails."""
    torch.set_num_threads(1)
    for name in names or WRITERS:
        folder = Path(tempfile.mkdtemp())
        try:
            report(name, kill_writer(WRITERS[name], kills, seed, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writer", nargs="+", choices=WRITERS)
    options = parser.parse_args()
    run(options.kills, options.writer, options.seed)


if __name__ == "__main__":
    # One warning a run is too many; set here, where nothing else is tested.
    logging.getLogger("speechbrain_taskarith").setLevel(logging.ERROR)
    main()
