"""Gradient consistency: do two tasks agree about a layer?"""

import csv
import itertools
import logging

import torch

from speechbrain_taskarith.metrics import plot_heat_map
from speechbrain_taskarith.translation.distributed import names_of_all
from speechbrain_taskarith.translation.multitask.gradients import (
    isolated_gradients,
)
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.recoverable import JSONRecoverable

logger = logging.getLogger(__name__)


def gradient_consistency(losses, module, *, by="layer", across_processes=True):
    """Return the cosine between two tasks' gradients, part by part.

    1: the tasks agree, 0: they have nothing to do with one another, -1: what
    one learns the other forgets (arXiv 2311.03810, section 3). Read-only:
    `.grad`, random state and buffers stay as they are, and the losses' graphs
    are kept for `backward`.

    Arguments
    ---------
    losses : dict of str: torch.Tensor
        A scalar for each task; `ValueError` for fewer than two. Processes may
        hold different tasks: one that lacks a task counts as 0 for it.
    module : torch.nn.Module
        Its parameters are compared.
    by : str or callable
        `"layer"`: names up to their first number (`encoder.layers.0`), or up
        to the module that holds the parameter; `"module"`: the first part of
        the name (`encoder`); or a function of the parameter's name.
    across_processes : bool
        True: gradients are averaged over all processes first; all of them
        have to call this.

    Returns
    -------
    dict of str: dict of tuple: float
        `{part: {(task, other task): cosine}}`. A pair is left out where one of
        the two has no gradient or one that is not finite.

    Example
    -------
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> out = net(torch.ones(1, 2)).sum()
    >>> gradient_consistency({"st": out, "asr": -2 * out}, net)
    {'0': {('st', 'asr'): -1.0...}, '1': {('st', 'asr'): -1.0...}}
    """
    tasks = names_of_all(losses) if across_processes else list(losses)
    if len(tasks) < 2:
        raise ValueError(
            f"losses of {sorted(tasks)}: expected two tasks or more"
        )
    part_of, parts, parameters = _naming(by), {}, []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(part_of(name), []).append(len(parameters))
            parameters.append(parameter)
    grads = {
        task: isolated_gradients(
            losses.get(task, torch.zeros(())), parameters, across_processes
        )
        for task in tasks
    }
    table = {}
    for part, rows in parts.items():
        table[part] = {}
        for a, b in itertools.combinations(tasks, 2):
            cosine = _cosine(
                [grads[a][i] for i in rows], [grads[b][i] for i in rows]
            )
            if cosine is not None:
                table[part][a, b] = cosine
    return table


def _naming(by):
    if callable(by):
        return by
    if by == "layer":
        return _layer
    if by == "module":
        return lambda name: name.removeprefix("module.").partition(".")[0]
    raise ValueError(
        f"by {by!r}: expected 'layer', 'module' or a function of a name"
    )


def _layer(name):
    parts = name.removeprefix("module.").split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


def _cosine(a, b):
    """Return the cosine of two gradients in pieces, None without any."""
    dot = sum((x.double() * y.double()).sum() for x, y in zip(a, b))
    squares = [sum(g.double().square().sum() for g in x) for x in (a, b)]
    # One synchronisation with the device for all three.
    dot, first, second = torch.stack([dot, *squares]).tolist()
    size = (first * second) ** 0.5
    if not 0 < size < float("inf") or dot != dot:
        return None
    return max(-1.0, min(1.0, dot / size))


class ConsistencyProbe(JSONRecoverable):
    """Measure gradient consistency at intervals, into log, CSV and plot.

    A measurement costs about as much as a backward pass for each task; at the
    default interval that is some 2 % of the training time.

    Arguments
    ---------
    path : str or pathlib.Path, optional
        CSV file: `update,part,task,other,cosine`.
    interval : int
        Updates between measurements.
    by : str or callable
        As of `gradient_consistency`.

    Example
    -------
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> folder = getfixture("tmp_path")
    >>> probe = ConsistencyProbe(folder / "consistency.csv", interval=2)
    >>> for _ in range(4):
    ...     out = net(torch.ones(1, 2)).sum()
    ...     _ = probe.step({"st": out, "asr": 2 * out}, net)
    >>> print((folder / "consistency.csv").read_text().splitlines()[1])
    2,0,st,asr,1.0000
    >>> probe.plot(folder / "consistency.png", ("st", "asr")).name
    'consistency.png'
    """

    def __init__(self, path=None, interval=100, by="layer"):
        if interval < 1:
            raise ValueError(f"interval {interval}: expected at least 1")
        _naming(by)
        self.path, self.interval, self.by = path, interval, by
        self.updates = 0
        self.rows = []

    def step(self, losses, module):
        """Count an update, and measure when it is due.

        Arguments
        ---------
        losses, module
            As of `gradient_consistency`; fewer than two tasks are skipped.

        Returns
        -------
        dict or None
            As of `gradient_consistency` where it was measured.
        """
        self.updates += 1
        # All processes come to the same: else some would wait for the others.
        if self.updates % self.interval or len(names_of_all(losses)) < 2:
            return None
        table = gradient_consistency(losses, module, by=self.by)
        for part, pairs in table.items():
            for (task, other), cosine in pairs.items():
                self.rows.append([self.updates, part, task, other, cosine])
                logger.info(
                    f"update {self.updates}: consistency of {task} and "
                    f"{other} in {part}: {cosine:.3f}"
                )
        if self.path is not None:
            self._write()
        return table

    def _write(self):
        with atomic_write(self.path, "w") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["update", "part", "task", "other", "cosine"])
            writer.writerows([*row[:4], f"{row[4]:.4f}"] for row in self.rows)

    def plot(self, path, pair):
        """Draw the cosines of a pair of tasks: parts by updates.

        Arguments
        ---------
        path : str or pathlib.Path
            `.png`, `.pdf` or `.svg`.
        pair : tuple of str
            The two tasks; `ValueError` if they were never measured.

        Returns
        -------
        pathlib.Path
            The file.
        """
        cells = {
            (part, update): cosine
            for update, part, task, other, cosine in self.rows
            if {task, other} == set(pair)
        }
        if not cells:
            raise ValueError(
                f"no consistency of {pair[0]!r} and {pair[1]!r} was measured "
                f"in {self.updates} update(s)"
            )
        parts = list(dict.fromkeys(part for part, _ in cells))
        updates = sorted({update for _, update in cells})
        # A page holds some twenty columns.
        updates = updates[:: -(-len(updates) // 20)]
        nan = float("nan")
        return plot_heat_map(
            [[cells.get((p, u), nan) for u in updates] for p in parts],
            parts,
            updates,
            path,
            title=f"Gradient consistency of {pair[0]} and {pair[1]}",
            xlabel="update",
            colours="RdBu",
            limits=(-1, 1),
            form="{:.2f}",
            unit="cosine",
        )

    def state(self):
        """As `JSONRecoverable.state`: updates, and the rows of the CSV."""
        return {"updates": self.updates, "rows": self.rows}

    def restore(self, state):
        """As `JSONRecoverable.restore`."""
        self.updates, self.rows = state["updates"], state["rows"]
