"""What the task weights did: a table and a plot of their history."""

import csv

from speechbrain_taskarith.metrics.plots import (
    MARKERS,
    figure,
    legend_below,
)
from speechbrain_taskarith.utils.files import atomic_write

COLUMNS = ("update", "rule", "exponent", "task", "ratio", "weight")


def describe(entry):
    """Return an entry of the history as a line for the log."""
    tasks = []
    for task, weight in entry["weights"].items():
        ratio = entry["ratios"].get(task)
        shown = "" if ratio is None else f" (ratio {ratio:.3g})"
        stopped = " and stopped" if task in entry["stopped"] else ""
        tasks.append(f"{task} {weight:.3g}{shown}{stopped}")
    return (
        f"update {entry['update']}: task weights by the rule "
        f"{entry['rule']!r}: {', '.join(tasks)}"
    )


def write_task_weights(history, path):
    """Write the history of task weights as a CSV file, a row a task and entry.

    Its columns are update, rule, exponent, task, ratio (of the task's gradient
    norm to the main one's; empty where it was not measured) and weight (0 once
    the task has stopped).

    Arguments
    ---------
    history : list of dict
        `TaskNormWeights.history`.
    path : str or pathlib.Path
        The file.

    Example
    -------
    >>> from speechbrain_taskarith.translation import TaskNormWeights
    >>> weights = TaskNormWeights(["asr"], norms="none", last_update={"asr": 2})
    >>> for _ in range(2):
    ...     weights.step()
    >>> path = getfixture("tmp_path") / "weights.csv"
    >>> write_task_weights(weights.history, path)
    >>> print(path.read_text().splitlines()[1])
    2,none,,asr,,0.0000
    """
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for entry in history:
            for task in entry["weights"]:
                ratio = entry["ratios"].get(task)
                writer.writerow(
                    [
                        entry["update"],
                        entry["rule"],
                        entry["exponent"],
                        task,
                        "" if ratio is None else f"{ratio:.4f}",
                        f"{_weight(entry, task):.4f}",
                    ]
                )


def plot_task_weights(history, path, title=None):
    """Draw the weights of the auxiliary tasks, and their ratios, by updates.

    Arguments
    ---------
    history : list of dict
        `TaskNormWeights.history`; `ValueError` if it is empty.
    path : str or pathlib.Path
        `.png`, `.pdf` or `.svg`.
    title : str, optional
        By default the rule.

    Example
    -------
    >>> from speechbrain_taskarith.translation import TaskNormWeights
    >>> weights = TaskNormWeights(["asr"], norms="none", last_update={"asr": 2})
    >>> for _ in range(2):
    ...     weights.step()
    >>> path = getfixture("tmp_path") / "weights.png"
    >>> plot_task_weights(weights.history, path)
    >>> path.exists()
    True
    """
    if not history:
        raise ValueError(
            "no history of task weights: nothing was measured yet, or the "
            "rule is 'none', which measures nothing"
        )
    updates = [entry["update"] for entry in history]
    with figure(path) as axes:
        for number, task in enumerate(sorted(history[0]["weights"])):
            weights = [_weight(entry, task) for entry in history]
            look = {
                "color": f"C{number}",
                "marker": MARKERS[number % len(MARKERS)],
                "markersize": 3,
            }
            axes.step(
                [0, *updates], [1.0, *weights], where="post", label=task, **look
            )
            measured = [
                (entry["update"], entry["ratios"][task])
                for entry in history
                if task in entry["ratios"]
            ]
            if measured:
                axes.plot(
                    *zip(*measured),
                    linestyle=":",
                    label=f"{task}, ratio",
                    **look,
                )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("update")
        axes.set_ylabel("task weight")
        axes.set_title(title or f"task weights, rule {history[0]['rule']}")
        legend_below(axes)


def _weight(entry, task):
    return 0.0 if task in entry["stopped"] else entry["weights"][task]
