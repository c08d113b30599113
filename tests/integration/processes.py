"""Recipes as users run them: started, waited for, killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 6000  # the end of what a process said, in a failure's message


def environment():
    """Return what a user's shell would have, with one thread."""
    ours = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ours.pop("SB_LOG_LEVEL", None)  # SpeechBrain leaves it in this process
    return ours


def taskarith(*words):
    """Run our command line to its end; return its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "speechbrain_taskarith", *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-SHOWN:]
    return done.stdout


def texts_of(paths):
    """Read files of a running process, which may delete them meanwhile."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.append(path.read_text(encoding="utf-8"))
    return found


class Recipe:
    """A recipe's train.py, or its study.py.

    Arguments
    ---------
    folder : str
        Below `recipes`.
    flags : str
        What every run gets on its command line besides options.
    script : str
        What is run.
    """

    def __init__(self, folder, *flags, script="train.py"):
        self.folder, self.script = ROOT / "recipes" / folder, script
        self.flags = ("--device", "cpu", *flags)

    def start(self, output, options, hparams="train", ranks=1):
        """Start the script; return it as a `Started`.

        Arguments
        ---------
        output : pathlib.Path
            Its output folder; beside it, a log of what it says.
        options : dict
            Overrides of the hparams file, `--key value` each.
        hparams : str
            Name of the hparams file.
        ranks : int
            Processes of one training, by torchrun where there are several.
        """
        command, flags = [sys.executable], self.flags
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={ranks}"]
            flags = (*flags, "--distributed_backend", "gloo")
        command += [self.script, f"hparams/{hparams}.yaml"]
        for key, value in {**options, "output_folder": output}.items():
            command += [f"--{key}", str(value)]
        return Started([*command, *flags], self.folder, Path(f"{output}.log"))

    def run(self, output, options, *, fails=False, **more):
        """Run the script to its end; return what it said."""
        return self.start(output, options, **more).finish(fails=fails)

    def merge(self, folder):
        """Make one table of the seeds whose outputs a folder holds."""
        folder = Path(folder)
        command = [sys.executable, self.script, "--merge", str(folder)]
        log = Path(f"{folder}.merge.log")
        return Started(command, self.folder, log).finish()


class Started:
    """A process with all its children, and what they say.

    Arguments
    ---------
    command : list of str
        What to start.
    folder : pathlib.Path
        Where.
    log : pathlib.Path
        What it says goes to the end of this file: a pipe that nobody reads
        would stop it.
    """

    def __init__(self, command, folder, log):
        self.log = log
        with open(log, "a", encoding="utf-8") as stream:
            self._begin = stream.tell()
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(),
                stdout=stream,
                stderr=subprocess.STDOUT,
                # A group of its own, so that a kill reaches its children.
                start_new_session=True,
            )

    def said(self):
        """Return what it has said until now."""
        with open(self.log, "rb") as stream:
            stream.seek(self._begin)
            return stream.read().decode(errors="replace")

    def finish(self, fails=False, timeout=600):
        """Wait for its end, which is as expected; return what it said."""
        try:
            code = self._process.wait(timeout)
        except BaseException:
            self.kill()
            raise
        said = self.said()
        assert (code != 0) == fails, said[-SHOWN:]
        return said

    def kill_when(self, reached, timeout=600):
        """Kill it, children and all, as soon as it has got somewhere.

        Arguments
        ---------
        reached : callable
            Takes nothing; True when it is time.
        timeout : float
            Seconds after which that has failed.
        """
        deadline = time.monotonic() + timeout
        try:
            while not reached():
                assert self._process.poll() is None, (
                    "it ended before its kill: " + self.said()[-SHOWN:]
                )
                assert time.monotonic() < deadline, self.said()[-SHOWN:]
                time.sleep(0.02)
        finally:
            self.kill()

    def kill(self):
        """Kill it and its children without warning, if any are left."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:  # all have ended
            pass
        self._process.wait()
