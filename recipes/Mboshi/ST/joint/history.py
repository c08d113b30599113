"""The training time, and the scores after every epoch."""

import contextlib
import time

from speechbrain_taskarith.utils.recoverable import JSONRecoverable


class TrainingHistory(JSONRecoverable):
    """Seconds of training, and scores after every epoch; a recoverable.

    Only updates count: no validation, checkpoints, loading of data, or
    measurements of gradient consistency. A resumed run continues from its
    checkpoint.

    Example
    -------
    >>> history = TrainingHistory()
    >>> with history.counting():
    ...     with history.paused():
    ...         time.sleep(0.01)
    >>> history.seconds < 0.01
    True
    """

    def __init__(self):
        self.seconds = self.cpu_seconds = 0.0
        self.epochs = []

    @contextlib.contextmanager
    def counting(self, sign=1):
        """Add the time that the block takes; with -1 subtract it."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds += sign * (time.perf_counter() - wall)
            self.cpu_seconds += sign * (time.process_time() - cpu)

    def paused(self):
        """Do not count the time of a block within `counting`."""
        return self.counting(sign=-1)

    def end_of_epoch(self, epoch, stats):
        """Record the validation scores of an epoch."""
        self.epochs.append(
            {
                "epoch": epoch,
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                **stats,
            }
        )

    def state(self):
        """Return `seconds`, `cpu_seconds` and `epochs`."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "epochs": list(self.epochs),
        }

    def restore(self, state):
        """Restore what `state` returned."""
        self.seconds = state["seconds"]
        self.cpu_seconds = state["cpu_seconds"]
        self.epochs = state["epochs"]


def seconds_to(epochs, key, target, unit="seconds"):
    """Return the time at the end of the first epoch that reached a score.

    `unit` is `"seconds"` or `"cpu_seconds"`. None: it was never reached.

    Example
    -------
    >>> epochs = [{"BLEU": 1.0, "seconds": 5.0}, {"BLEU": 3.0, "seconds": 9.0}]
    >>> seconds_to(epochs, "BLEU", 2.0), seconds_to(epochs, "BLEU", 4.0)
    (9.0, None)
    """
    for epoch in epochs:
        if epoch[key] >= target:
            return epoch[unit]
    return None
