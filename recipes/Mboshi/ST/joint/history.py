"""How long training took, and how good the model was after every epoch."""

import contextlib
import time

from speechbrain_taskarith.utils.recoverable import JSONRecoverable


class TrainingHistory(JSONRecoverable):
    """Seconds of training, and scores after every epoch; a recoverable.

    Counted are updates alone: no validation, no checkpoints, no loading of
    data, no measurements of gradient consistency. A resumed run counts on
    from its checkpoint.

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
        """Count the time that the block takes.

        Arguments
        ---------
        sign : int
            -1 takes it away.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds += sign * (time.perf_counter() - wall)
            self.cpu_seconds += sign * (time.process_time() - cpu)

    def paused(self):
        """Do not count the time that a block within takes.

        Returns
        -------
        context manager
            For a `with` within `counting`.
        """
        return self.counting(sign=-1)

    def end_of_epoch(self, epoch, stats):
        """Keep the scores of an epoch.

        Arguments
        ---------
        epoch : int
            Its number.
        stats : dict of str: float
            On development data.
        """
        self.epochs.append(
            {
                "epoch": epoch,
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                **stats,
            }
        )

    def state(self):
        """Return all of it in plain types.

        Returns
        -------
        dict
            `seconds`, `cpu_seconds`, `epochs`.
        """
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "epochs": list(self.epochs),
        }

    def restore(self, state):
        """Take back what `state` returned.

        Arguments
        ---------
        state : dict
            See `state`.
        """
        self.seconds = state["seconds"]
        self.cpu_seconds = state["cpu_seconds"]
        self.epochs = state["epochs"]


def seconds_to(epochs, key, target, what="seconds"):
    """Return the training time until a score was first reached.

    Arguments
    ---------
    epochs : list of dict
        Of `TrainingHistory`.
    key : str
        The score, e.g. `"BLEU"`.
    target : float
        To be reached.
    what : str
        `"seconds"` or `"cpu_seconds"`.

    Returns
    -------
    float or None
        At the end of the first epoch that reached it; None: never.

    Example
    -------
    >>> epochs = [{"BLEU": 1.0, "seconds": 5.0}, {"BLEU": 3.0, "seconds": 9.0}]
    >>> seconds_to(epochs, "BLEU", 2.0), seconds_to(epochs, "BLEU", 4.0)
    (9.0, None)
    """
    for epoch in epochs:
        if epoch[key] >= target:
            return epoch[what]
    return None
