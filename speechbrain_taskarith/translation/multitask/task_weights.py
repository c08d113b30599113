"""Weights of auxiliary tasks that fall with their gradient norms."""

import logging
import math
import statistics

import torch

from speechbrain_taskarith.translation.distributed import average_
from speechbrain_taskarith.translation.multitask.gradients import (
    isolated_gradients,
    trained_parameters,
)
from speechbrain_taskarith.utils.recoverable import JSONRecoverable

logger = logging.getLogger(__name__)

# Where each task's gradient is compared with that of the main task.
SHARED_PARTS = {"asr": ("acoustic",), "mt": ("textual", "decoder")}


class TaskNormWeights(JSONRecoverable):
    """Auxiliary tasks weigh less the smaller their share of the gradient.

    Every `interval` updates, with norms n of each task's own gradient on the
    parts of the model that it shares with the main task::

        w_asr *= (n_asr / n_st)^k                            acoustic encoder
        w_mt  *= max over textual encoder, decoder of
                 (n_mt / n_st)^(k / 2)

    (arXiv 2311.03810, section 4.3), and no weight grows beyond 1. A task whose
    weight falls below `floor` is no longer computed, which saves training
    time. Gradients are those of the unweighted losses, averaged over the
    micro-batches of an update and over processes: neither the order of tasks
    nor accumulation nor the number of processes matters.

    Norms are means over `average` updates, the last before a multiple of
    `interval`, and a ratio counts as far as it is certain: it is moved towards
    1 by `standard_errors` of its own. Noise alone stops no task. Where a task
    was not in all of these batches, measuring goes on until each task was seen
    as often, for ten times as many updates at most. A task that was not seen, or whose
    norm was always 0 or not finite, keeps its weight; a warning says so.

    A checkpoint recoverable: a resumed run continues as if never stopped.

    Arguments
    ---------
    tasks : sequence of str
        Auxiliary tasks.
    main : str
        The main task, whose weight stays 1.
    interval : int
        Updates between measurements.
    floor : float
        Weight below which a task stops.
    exponent : float
        k. The paper leaves it open; decided: 1.
    parts : dict of str: sequence of str, optional
        `{task: names of parts}`; the exponent is divided by their number.
        By default as above; a task of another name takes `("shared",)`.
    initial : dict of str: float, optional
        Weights to begin with, 1 where not given.
    average : int
        Updates that a measurement averages, `interval` at most.
    standard_errors : float
        See above. 0: the ratio as it was measured, as with `average` 1, of
        which no standard error is known.

    Example
    -------
    >>> shared = torch.nn.Linear(2, 1)
    >>> weights = TaskNormWeights(["asr"], interval=1)
    >>> for _ in range(2):
    ...     out = shared(torch.ones(1, 2)).sum()
    ...     losses = {"st": out, "asr": 0.5 * out}
    ...     if weights.due:
    ...         weights.observe(losses, {"acoustic": shared})
    ...     weights.total(losses).backward()   # optimizer.step() and so on
    ...     weights.step()
    >>> weights["asr"], weights.active
    (0.25, ('st', 'asr'))
    """

    def __init__(
        self,
        tasks=("asr", "mt"),
        main="st",
        interval=5000,
        floor=0.1,
        exponent=1.0,
        parts=None,
        initial=None,
        average=10,
        standard_errors=3.0,
    ):
        tasks = tuple(tasks)
        if main in tasks or len(set(tasks)) < len(tasks):
            raise ValueError(
                f"tasks {tasks}, main {main!r}: expected different auxiliary "
                "tasks, and the main one apart"
            )
        if interval < 1 or not 0 <= floor < 1 or not exponent >= 0:
            raise ValueError(
                f"interval {interval}, floor {floor}, exponent {exponent}: "
                "expected interval from 1, floor from 0 to below 1, exponent "
                "from 0"
            )
        if average < 1 or not 0 <= standard_errors < math.inf:
            raise ValueError(
                f"average {average}, standard_errors {standard_errors}: "
                "expected average from 1, standard_errors from 0, finite"
            )
        self.average = min(average, interval)
        # A part that is frozen has no gradient however long one waits.
        self._patience = min(interval - self.average, 9 * self.average)
        self.standard_errors = standard_errors
        self.tasks, self.main = tasks, main
        self.interval, self.floor, self.exponent = interval, floor, exponent
        parts, initial = dict(parts or {}), dict(initial or {})
        for name in (*parts, *initial):
            self._check_task(name)
        self.parts = {
            task: tuple(parts.get(task) or SHARED_PARTS.get(task, ("shared",)))
            for task in tasks
        }
        self._weights = {task: float(initial.get(task, 1.0)) for task in tasks}
        self._most = {t: max(1.0, w) for t, w in self._weights.items()}
        self.updates = 0
        self.history = []
        self._grad_sums = {}
        # Norms of this measurement, and for how long it has been overdue.
        self._norms, self._late = {}, 0

    def _check_task(self, task):
        if task not in (*self.tasks, self.main):
            raise ValueError(
                f"unknown task {task!r}; known are {self.main!r} (main) and "
                f"{', '.join(map(repr, self.tasks)) or 'no other'}"
            )

    def __getitem__(self, task):
        """Return a task's weight, 0 where it has stopped."""
        self._check_task(task)
        if task == self.main:
            return 1.0
        weight = self._weights[task]
        return weight if weight >= self.floor else 0.0

    @property
    def active(self):
        """Names of the tasks that are still to be computed, main first."""
        return (self.main, *(t for t in self.tasks if self[t] > 0))

    @property
    def due(self):
        """Whether this update measures gradients."""
        opens = self.interval - self.average
        measures = self._late or self.updates % self.interval >= opens
        return bool(measures) and len(self.active) > 1

    def total(self, losses):
        """Return the weighted sum of losses.

        Arguments
        ---------
        losses : dict of str: torch.Tensor
            A scalar for each task; a batch need not have all of them. An
            unknown task is a `ValueError`, and no task with any weight.

        Returns
        -------
        torch.Tensor
            A scalar.
        """
        for task in losses:
            self._check_task(task)
        # Sorted: rounding must not depend on the order of `tasks`.
        weighted = [
            self[task] * losses[task]
            for task in (self.main, *sorted(self.tasks))
            if task in losses and self[task] > 0
        ]
        if not weighted:
            raise ValueError(
                f"losses of {sorted(losses) or 'no task'}, but only "
                f"{', '.join(self.active)} are active: leave out batches of "
                "tasks that have stopped"
            )
        return sum(weighted)

    def observe(self, losses, modules, share=1.0):
        """Take the gradients of a batch, in an update that measures.

        Call it before `backward`, on every micro-batch while `due`.

        Arguments
        ---------
        losses : dict of str: torch.Tensor
            A scalar for each task, not weighted.
        modules : dict of str: torch.nn.Module or parameters
            `{part: module}`; `ValueError` where one is missing.
        share : float
            Of this batch in the update: 1 / grad_accumulation_factor.
        """
        for task in losses:
            self._check_task(task)
        wanted = [p for t in self.active[1:] for p in self.parts[t]]
        if missing := sorted(set(wanted) - set(modules)):
            raise ValueError(
                f"modules lack {missing}; given are {sorted(modules)}. Each "
                "part is what tasks share: acoustic encoder, textual encoder, "
                "decoder"
            )
        parts = {
            p: trained_parameters(modules[p]) for p in dict.fromkeys(wanted)
        }
        # All parts of a task in one pass over its graph.
        shared = trained_parameters(p for ps in parts.values() for p in ps)
        for task in self.active:
            loss = losses.get(task, torch.zeros(()))
            grads = isolated_gradients(loss, shared, across_processes=False)
            by_id = {id(p): g for p, g in zip(shared, grads)}
            for part, parameters in parts.items():
                if task != self.main and part not in self.parts[task]:
                    continue
                scaled = [by_id[id(p)] * share for p in parameters]
                if before := self._grad_sums.get((task, part)):
                    scaled = [a + b for a, b in zip(before, scaled)]
                self._grad_sums[task, part] = scaled

    def step(self):
        """Count an update of the optimizer, and change weights when due."""
        self._add_norms()
        self._grad_sums = {}
        self.updates += 1
        ended = self._late or self.updates % self.interval == 0
        if not ended or len(self.active) == 1:
            return
        enough = all(self._seen(task) >= self.average for task in self.active)
        if enough or self._late >= self._patience:
            self._change()
            self._norms, self._late = {}, 0
        else:
            self._late += 1

    def _add_norms(self):
        """Add the norms of an update, those of all processes."""
        for task, part in sorted(self._grad_sums):
            grads = self._grad_sums[task, part]
            average_(grads)
            # In one transfer: a GPU is waited for once, not for each.
            each = [g.double().square().sum() for g in grads]
            squares = sum(torch.stack(each).tolist()) if each else 0.0
            if not math.isfinite(squares):
                logger.warning(
                    f"update {self.updates + 1}: the gradient norm of "
                    f"{task!r} on {part!r} is not finite; it is left out of "
                    "the task weights"
                )
            elif squares > 0:
                norms = self._norms.setdefault(f"{task}/{part}", [])
                norms.append(math.sqrt(squares))

    def _seen(self, task):
        """Return in how many updates a task had a gradient."""
        return max(
            (
                len(n)
                for key, n in self._norms.items()
                if key[: len(task) + 1] == f"{task}/"
            ),
            default=0,
        )

    def _change(self):
        for task in self.active[1:]:
            parts = self.parts[task]
            ratios = [self._ratio(task, part) for part in parts]
            ratios = [ratio for ratio in ratios if ratio is not None]
            if not ratios:
                self._warn_not_measured(task)
                continue
            weight = self._weights[task]
            weight *= max(ratios) ** (self.exponent / len(parts))
            self._weights[task] = min(weight, self._most[task])
            if self[task] == 0:
                logger.info(
                    f"update {self.updates}: task {task!r} has fallen below "
                    f"{self.floor:g} and stops"
                )
        self.history.append(
            {
                "update": self.updates,
                "norms": {
                    k: statistics.fmean(n) for k, n in self._norms.items()
                },
                "weights": dict(self._weights),
            }
        )

    def _ratio(self, task, part):
        """Return the certain part of a ratio, None if it was not measured."""
        norms = [self._norms.get(f"{t}/{part}") for t in (task, self.main)]
        if None in norms:
            return None
        own, main = map(statistics.fmean, norms)
        ratio = own / main
        error = math.hypot(*map(_relative_error, norms))
        doubt = math.exp(min(self.standard_errors * error, 99.0))
        if ratio < 1:
            return min(1.0, ratio * doubt)
        return max(1.0, ratio / doubt)

    def _warn_not_measured(self, task):
        tasks = (task, self.main)
        unseen = [t for t in tasks if not self._seen(t)] or tasks
        logger.warning(
            f"update {self.updates}: task {task!r} is not measured, and its "
            f"weight stays {self._weights[task]:.3g}: no gradient of "
            f"{' and '.join(map(repr, unseen))} in the last "
            f"{self.average + self._late} update(s) on "
            f"{', '.join(self.parts[task])}. Either no batch held the task "
            "(use a longer interval, or gradient accumulation), or its loss "
            "trains nothing there (frozen parameters, transcripts longer "
            "than the frames)"
        )

    def state(self):
        """As `JSONRecoverable.state`: tasks, weights, updates and history."""
        return {
            "tasks": list(self.tasks),
            "main": self.main,
            "weights": self._weights,
            "updates": self.updates,
            "history": self.history,
            "norms": self._norms,
            "late": self._late,
        }

    def restore(self, state):
        """As `JSONRecoverable.restore`; refuses the weights of other tasks."""
        tasks = state.get("tasks")
        if tasks is None or sorted(tasks) != sorted(self.tasks):
            raise ValueError(
                f"holds weights of the tasks {tasks}, expected "
                f"{list(self.tasks)}; use a new output folder, or the same "
                "tasks"
            )
        self._weights = {t: float(state["weights"][t]) for t in self.tasks}
        self.updates = int(state["updates"])
        self.history = list(state["history"])
        self._grad_sums = {}
        self._norms = dict(state.get("norms", {}))
        self._late = int(state.get("late", 0))


def _relative_error(norms):
    """Return the standard error of a mean, as a share of it."""
    if len(norms) < 2:
        return 0.0
    error = statistics.stdev(norms) / math.sqrt(len(norms))
    return error / statistics.fmean(norms)
