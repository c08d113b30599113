"""Weights of auxiliary tasks that fall with their gradient norms."""

import logging
import math

from speechbrain_taskarith.translation.multitask.history import describe
from speechbrain_taskarith.translation.multitask.norms import (
    MEASURED,
    GradientNorms,
)
from speechbrain_taskarith.utils.recoverable import JSONRecoverable

logger = logging.getLogger(__name__)

RULES = ("isolated", "joint", "none")
# Where each task's gradient is compared with that of the main task.
SHARED_PARTS = {"asr": ("acoustic",), "mt": ("textual", "decoder")}


class TaskNormWeights(JSONRecoverable):
    """Auxiliary tasks weigh less the smaller their share of the gradient.

    Every `interval` updates, with norms n of gradients on the parts of the
    model that a task shares with the main one::

        w_asr *= (n_asr / n_st)^k                            acoustic encoder
        w_mt  *= max over textual encoder, decoder of
                 (n_mt / n_st)^(k / 2)

    (arXiv 2311.03810, section 4.3), and no weight grows beyond 1. A task whose
    weight falls below `floor` is no longer computed, which saves training
    time. Three rules say what the norms are:

    - `"isolated"`: n_asr and n_mt are of the task's own loss, n_st of the main
      loss alone. This is the method.
    - `"joint"`: n_asr and n_mt are of the weighted loss, n_st of the whole
      weighted sum, as in the authors' code, which leaves each gradient in the
      next.
    - `"none"`: weights stay; tasks end by `last_update` alone.

    With `"joint"` the auxiliary gradient is in both norms: where "st" holds
    0.3 of the loss of "asr" and no gradient points against it, the first ratio
    is 1 / 1.3 at most, and later ones are less. Weights fall by construction,
    whatever the tasks are to one another. The authors' settings are
    `norms="joint", exponent="growing", measured="attention", average=1,
    last_update={"asr": 20000, "mt": 30000}, warm_up=3000`.

    Gradients are averaged over the micro-batches of an update and over
    processes: neither the order of tasks nor accumulation nor the number of
    processes matters. Norms are means over `average` updates, the last before
    a multiple of `interval`, and a ratio counts as far as it is certain: it is
    moved towards 1 by `standard_errors` of its own. Noise alone stops no task.
    Where a task was not in all of these batches, measuring goes on until each
    task was seen as often, for ten times as many updates at most. A task that
    was not seen (by `"joint"`: in one update with the main task), or whose
    norm was always 0 or not finite, keeps its weight; a warning says so.

    `history` holds every measurement: update, rule, exponent, norms, ratios,
    weights, and the tasks that have stopped; `plot_task_weights` draws it.
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
    exponent : float or str
        k. `"growing"`: `floor(updates / interval)`, 1, 2, 3, ...
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
    norms : str
        The rule, see above; None is `"none"`.
    last_update : dict of str: int, optional
        `{task: update}` after which a task ends in any case.
    warm_up : int
        Updates at the beginning in which the main task has weight 0 and is not
        computed, nor anything measured: auxiliary tasks train alone.
    measured : str
        `"all"`: norms are of all parameters of a part. `"attention"`: the mean
        over its layers of the norm at the self-attention's output projection.

    Example
    -------
    >>> import torch
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
        norms="isolated",
        last_update=None,
        warm_up=0,
        measured="all",
    ):
        self.tasks, self.main = tuple(tasks), main
        self.norms = "none" if norms is None else norms
        self.interval, self.floor, self.exponent = interval, floor, exponent
        self.average = min(average, interval)
        self.standard_errors, self.warm_up = standard_errors, warm_up
        self.last_update = dict(last_update or {})
        _check_settings(self, measured)
        # A part that is frozen has no gradient however long one waits.
        self._patience = min(interval - self.average, 9 * self.average)
        parts, initial = dict(parts or {}), dict(initial or {})
        for name in (*parts, *initial, *self.last_update):
            self._check_task(name)
        if main in {*parts, *initial}:
            raise ValueError(
                f"parts {parts}, initial {initial}: {main!r} is the main task, "
                "whose weight is 1 and which takes the parts of the others; "
                "expected auxiliary tasks"
            )
        self.parts = {
            task: tuple(parts.get(task) or SHARED_PARTS.get(task, ("shared",)))
            for task in self.tasks
        }
        self._weights = {t: float(initial.get(t, 1.0)) for t in self.tasks}
        self._most = {t: max(1.0, w) for t, w in self._weights.items()}
        self.updates = 0
        self.history = []
        # The measurement in progress, and for how long it has been overdue.
        self._norms = GradientNorms(main, self.norms == "joint", measured)
        self._late = 0

    def _check_task(self, task):
        if task not in (*self.tasks, self.main):
            raise ValueError(
                f"unknown task {task!r}; known are {self.main!r} (main) and "
                f"{', '.join(map(repr, self.tasks)) or 'no other'}"
            )

    def __getitem__(self, task):
        """Return a task's weight, 0 where it has stopped or not begun."""
        self._check_task(task)
        if task == self.main:
            return 0.0 if self.warming_up else 1.0
        weight = self._weights[task]
        return weight if weight >= self.floor else 0.0

    @property
    def active(self):
        """Names of the tasks that are to be computed now, main first."""
        return tuple(t for t in (self.main, *self.tasks) if self[t] > 0)

    @property
    def warming_up(self):
        """Whether the main task has yet to begin, see `warm_up`."""
        # With no auxiliary task left there would be nothing to train.
        return self.updates < self.warm_up and bool(self._auxiliary)

    @property
    def _auxiliary(self):
        """Parts of the auxiliary tasks that are active, by task."""
        return {t: self.parts[t] for t in self.tasks if self[t] > 0}

    @property
    def due(self):
        """Whether this update measures gradients."""
        if self.norms == "none" or self.warming_up or not self._auxiliary:
            return False
        opens = self.interval - self.average
        return bool(self._late or self.updates % self.interval >= opens)

    def total(self, losses):
        """Return the weighted sum of losses.

        Arguments
        ---------
        losses : dict of str: torch.Tensor
            A scalar for each task; a batch need not have all of them. An
            unknown task is a `ValueError`, and no task with any weight. While
            warming up, that of the main task alone counts as 0.

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
        if not weighted and self.warming_up and self.main in losses:
            return 0.0 * losses[self.main]
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
        wanted = {p for parts in self._auxiliary.values() for p in parts}
        if missing := sorted(wanted - set(modules)):
            raise ValueError(
                f"modules lack {missing}; given are {sorted(modules)}. Each "
                "part is what tasks share: acoustic encoder, textual encoder, "
                "decoder"
            )
        self._norms.observe(losses, modules, self._auxiliary, share)

    def drop_unfinished(self):
        """Forget what was observed since the last `step`.

        For an epoch that ends within an update, whose gradients are dropped.
        """
        self._norms.drop_unfinished()

    def step(self):
        """Count an update of the optimizer, and change weights when due."""
        weights = {task: self[task] for task in (self.main, *self.tasks)}
        self._norms.end_update(self.updates + 1, self._auxiliary, weights)
        warmed_up = not self.warming_up
        self.updates += 1
        ends = self._late or self.updates % self.interval == 0
        if ends and warmed_up and self._auxiliary and self.norms != "none":
            seen = self._norms.seen
            enough = min(seen(t, p) for t, p in self._auxiliary.items())
            if enough >= self.average or self._late >= self._patience:
                self._change()
                self._norms.clear()
                self._late = 0
            else:
                self._late += 1
        self._end_tasks()

    def _change(self):
        k = self.exponent
        if k == "growing":
            k = self.updates // self.interval
        before, found = self._auxiliary, {}
        for task, parts in before.items():
            ratios = [
                self._norms.ratio(task, part, self.standard_errors)
                for part in parts
            ]
            ratios = [ratio for ratio in ratios if ratio is not None]
            if not ratios:
                self._warn_not_measured(task)
                continue
            found[task] = max(ratios)
            weight = self._weights[task] * found[task] ** (k / len(parts))
            self._weights[task] = min(weight, self._most[task])
        self._record(k, self._norms.means(), found)

    def _end_tasks(self):
        """End the tasks whose last update is over."""
        over = [
            task
            for task in self._auxiliary
            if self.updates >= self.last_update.get(task, math.inf)
        ]
        for task in over:
            self._weights[task] = 0.0
        if over:
            self._record(None, {}, {})

    def _record(self, exponent, norms, ratios):
        entry = {
            "update": self.updates,
            "rule": self.norms,
            "exponent": exponent,
            "norms": norms,
            "ratios": ratios,
            "weights": dict(self._weights),
            "stopped": sorted(set(self.tasks) - set(self.active)),
        }
        self.history.append(entry)
        logger.info(describe(entry))

    def _warn_not_measured(self, task):
        parts = self.parts[task]
        unseen = self._norms.unseen(task, parts) or (task, self.main)
        remedy = "use a longer interval, or gradient accumulation"
        if self.norms == "joint":
            remedy = "the rule 'joint' needs both tasks in one update"
        logger.warning(
            f"update {self.updates}: task {task!r} is not measured, and its "
            f"weight stays {self._weights[task]:.3g}: no gradient of "
            f"{' and '.join(map(repr, unseen))} in the last "
            f"{self.average + self._late} update(s) on "
            f"{', '.join(parts)}. Either no batch held the task ({remedy}), "
            "or its loss trains nothing there (frozen parameters, transcripts "
            "longer than the frames)"
        )

    def state(self):
        """As `JSONRecoverable.state`: tasks, weights, updates and history."""
        return {
            "tasks": list(self.tasks),
            "main": self.main,
            "rule": self.norms,
            "weights": self._weights,
            "updates": self.updates,
            "history": self.history,
            "norms": self._norms.lists,
            "late": self._late,
        }

    def restore(self, state):
        """As `JSONRecoverable.restore`; refuses other tasks and rules."""
        tasks = state.get("tasks")
        if tasks is None or sorted(tasks) != sorted(self.tasks):
            raise ValueError(
                f"holds weights of the tasks {tasks}, expected "
                f"{list(self.tasks)}; use a new output folder, or the same "
                "tasks"
            )
        if state.get("rule", self.norms) != self.norms:
            raise ValueError(
                f"holds weights by the rule {state['rule']!r}, expected "
                f"{self.norms!r}; use a new output folder, or the same rule"
            )
        self._weights = {t: float(state["weights"][t]) for t in self.tasks}
        self.updates = int(state["updates"])
        self.history = list(state["history"])
        self._norms.clear(dict(state.get("norms", {})))
        self._late = int(state.get("late", 0))


def _check_settings(weights, measured):
    """Refuse settings that cannot be, by name."""
    w = weights
    if w.main in w.tasks or len(set(w.tasks)) < len(w.tasks):
        raise ValueError(
            f"tasks {w.tasks}, main {w.main!r}: expected different auxiliary "
            "tasks, and the main one apart"
        )
    growing = w.exponent == "growing"
    if not growing and (isinstance(w.exponent, str) or not w.exponent >= 0):
        raise ValueError(
            f"exponent {w.exponent!r}: expected a number from 0, or 'growing'"
        )
    if w.norms not in RULES or measured not in MEASURED:
        raise ValueError(
            f"norms {w.norms!r}, measured {measured!r}: expected norms one of "
            f"{RULES}, measured one of {MEASURED}"
        )
    if w.interval < 1 or not 0 <= w.floor < 1 or w.average < 1:
        raise ValueError(
            f"interval {w.interval}, floor {w.floor}, average {w.average}: "
            "expected interval and average from 1, floor from 0 to below 1"
        )
    if w.warm_up < 0 or not 0 <= w.standard_errors < math.inf:
        raise ValueError(
            f"warm_up {w.warm_up}, standard_errors {w.standard_errors}: "
            "expected both from 0, finite"
        )
    for task, update in w.last_update.items():
        if task == w.main or not update >= 1:
            raise ValueError(
                f"last_update {w.last_update}: expected an auxiliary task and "
                f"an update from 1, not {task!r} and {update!r}"
            )
