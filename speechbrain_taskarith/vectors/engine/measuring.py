"""What a run took: time by step, and memory."""

import threading
import time


class Timed:
    """Notes the wall time of a block.

    Arguments
    ---------
    steps : dict
        Where the seconds are written.
    name : str
        Under which name.
    """

    def __init__(self, steps, name):
        self.steps, self.name = steps, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.steps[self.name] = time.perf_counter() - self.start


class MemoryWatch:
    """Samples the process's anonymous memory from a thread of its own.

    Arguments
    ---------
    interval : float
        Seconds between two looks.
    """

    def __init__(self, interval=0.02):
        self.interval, self.peak = interval, None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._look()
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        if self.peak is not None:
            self._thread.join()

    def _run(self):
        while not self._stop.wait(self.interval):
            self._look()

    def _look(self):
        try:
            with open("/proc/self/status", "rb") as stream:
                for line in stream:
                    if line.startswith(b"RssAnon:"):
                        now = int(line.split()[1]) * 1024
                        self.peak = max(self.peak or 0, now)
                        return
        except OSError:
            pass
