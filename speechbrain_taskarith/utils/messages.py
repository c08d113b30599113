"""Pieces of error messages, and refusals that a GPU need not wait for."""

import os

import torch


def some(names, most=5):
    """Name a few of many parameters.

    Example
    -------
    >>> some("abc", most=2)
    '3 parameter(s) (a, b and 1 more)'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} parameter(s) ({', '.join(names[:most])}{more})"


class Refusals:
    """What makes a batch bad, asked of the device once.

    On the CPU `add` refuses at once. For tensors on a device `settle` waits for
    the answers, in one transfer, and then refuses by name; with `wait=False`
    the device asserts them itself, on CUDA, and the host goes on.

    Example
    -------
    >>> refusals = Refusals()
    >>> lengths = torch.tensor([3, 0])
    >>> refusals.add(lengths < 1, lambda: "row 1 is empty", "empty rows")
    Traceback (most recent call last):
        ...
    ValueError: row 1 is empty
    """

    def __init__(self):
        self._flags, self._reasons = [], []

    def add(self, bad, explain, what):
        """Refuse where `bad` [...] holds, by the message of `explain()`.

        `what` is wrong is for an assertion, which knows no rows.
        """
        if bad.device.type == "cpu":
            if bool(bad.any()):
                raise ValueError(explain())
        else:
            self._flags.append(bad.any())
            self._reasons.append((explain, what))

    def settle(self, wait=True):
        """Refuse the first that is bad."""
        flags, reasons = self._flags, self._reasons
        self._flags, self._reasons = [], []
        if not flags:
            return
        # Who debugs with this wants the names, and waits anyway.
        blocking = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        if not wait and flags[0].device.type == "cuda" and not blocking:
            for flag, (_, what) in zip(flags, reasons):
                torch._assert_async(
                    ~flag, f"{what}; CUDA_LAUNCH_BLOCKING=1 names the row"
                )
            return
        for bad, (explain, _) in zip(torch.stack(flags).tolist(), reasons):
            if bad:
                raise ValueError(explain())
