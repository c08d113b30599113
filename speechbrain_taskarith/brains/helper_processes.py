"""Copies of a running script that work beside it."""

import contextlib
import os
import subprocess
import sys

# Set in the processes that were started to help another.
_HELPER = "TASKARITH_HELPER"


def is_helper():
    """Tell whether this process was started to help another.

    Returns
    -------
    bool
        True in what `helpers` has started: such a process prepares no data,
        shows no bars and writes no tables.

    Example
    -------
    >>> is_helper()
    False
    """
    return _HELPER in os.environ


@contextlib.contextmanager
def helpers(count):
    """Have copies of this script run beside the block.

    They get the same command line and find the work by themselves, e.g. in
    a `ModelFolder`. They are stopped where the block fails and waited for
    at its end. A helper that dies is not started again: what it was at is
    done by the others.

    Arguments
    ---------
    count : int
        How many; a helper itself starts none.

    Yields
    ------
    list of subprocess.Popen
        The processes.

    Example
    -------
    >>> with helpers(0) as started:  # in a script: hparams["processes"] - 1
    ...     len(started)
    0
    """
    started = []
    try:
        for number in range(0 if is_helper() else count):
            started.append(
                subprocess.Popen(
                    [sys.executable, *sys.argv],
                    env={**os.environ, _HELPER: str(number + 1)},
                )
            )
        yield started
    except BaseException:
        for helper in started:
            helper.terminate()
        raise
    finally:
        for helper in started:
            helper.wait()
