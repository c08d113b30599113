"""Weights of auxiliary tasks that fall with their gradient norms."""

import logging
import math

import torch

from speechbrain_taskarith.translation.losses.gathering import average_
from speechbrain_taskarith.translation.tasks.gradients import (
    isolated_gradients,
    trained_parameters,
)
from speechbrain_taskarith.utils.recoverable import JSONRecoverable

logger = logging.getLogger(__name__)

# Where each task's gradient is compared with that of the main task.
_PARTS = {"asr": ("acoustic",), "mt": ("textual", "decoder")}


class TaskNormWeights(JSONRecoverable):
    """Auxiliary tasks weigh less the smaller their share of the gradient.

    Every `interval` updates, with norms n of each task's own gradient on the
    parts of the model that it shares with the main task::

        w_asr *= min(1, n_asr / n_st)^k                      acoustic encoder
        w_mt  *= max over textual encoder, decoder of
                 min(1, n_mt / n_st)^(k / 2)

    (arXiv 2311.03810, section 4.3). A task whose weight falls below `floor`
    is computed no more, which is where training time goes down. The losses'
    own gradients are taken, before weights, averaged over the micro-batches
    of an update and over processes: neither the order of tasks nor
    accumulation nor the number of processes matters.

    A checkpoint recoverable: a resumed run goes on as if never stopped.

    Arguments
    ---------
    tasks : sequence of str
        Auxiliary tasks.
    main : str
        The main task, whose weight stays 1.
    interval : int
        Updates between measurements.
    floor : float
        Below this weight a task stops.
    exponent : float
        k. The paper leaves it open; decided: 1.
    parts : dict of str: sequence of str, optional
        `{task: names of parts}`; the exponent is divided by their number.
        By default as above; a task of another name takes `("shared",)`.
    initial : dict of str: float, optional
        Weights to begin with, 1 where not given.

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
        self.tasks, self.main = tasks, main
        self.interval, self.floor, self.exponent = interval, floor, exponent
        parts, initial = dict(parts or {}), dict(initial or {})
        for name in (*parts, *initial):
            self._known(name)
        self.parts = {
            task: tuple(parts.get(task) or _PARTS.get(task, ("shared",)))
            for task in tasks
        }
        self._weights = {task: float(initial.get(task, 1.0)) for task in tasks}
        self.updates = 0
        self.history = []
        self._sums = {}

    def _known(self, task):
        if task not in (*self.tasks, self.main):
            raise ValueError(
                f"unknown task {task!r}; known are {self.main!r} (main) and "
                f"{', '.join(map(repr, self.tasks)) or 'no other'}"
            )

    def __getitem__(self, task):
        """Return a task's weight, 0 where it has stopped."""
        self._known(task)
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
        """Whether the update at hand is one that measures."""
        return (self.updates + 1) % self.interval == 0 and len(self.active) > 1

    def total(self, losses):
        """Return the weighted sum of losses.

        Arguments
        ---------
        losses : dict of str: torch.Tensor
            A scalar for each task; a batch need not have all of them.

        Returns
        -------
        torch.Tensor
            A scalar.

        Raises
        ------
        ValueError
            A task that nobody knows of, or no task that has any weight.
        """
        total = None
        # Sorted: the order of rounding is not to hang on that of `tasks`.
        for task in (self.main, *sorted(self.tasks)):
            if task in losses and self[task] > 0:
                part = self[task] * losses[task]
                total = part if total is None else total + part
        for task in losses:
            self._known(task)
        if total is None:
            raise ValueError(
                f"losses of {sorted(losses) or 'no task'}, but computed are "
                f"only {', '.join(self.active)}: leave out batches of tasks "
                "that have stopped (`active`)"
            )
        return total

    def observe(self, losses, modules, share=1.0):
        """Take the gradients of a batch of the update that measures.

        Call it before `backward`, on every micro-batch while `due`.

        Arguments
        ---------
        losses : dict of str: torch.Tensor
            A scalar for each task, not weighted.
        modules : dict of str: torch.nn.Module or parameters
            `{part: module}`.
        share : float
            Of this batch in the update: 1 / grad_accumulation_factor.

        Raises
        ------
        ValueError
            A task that nobody knows of, a part that is missing.
        """
        for task in losses:
            self._known(task)
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
        every = list({id(p): p for ps in parts.values() for p in ps}.values())
        for task in self.active:
            loss = losses.get(task)
            if loss is None:
                loss = torch.zeros(())
            found = isolated_gradients(loss, every, across_processes=False)
            by_id = {id(p): g for p, g in zip(every, found)}
            for part, parameters in parts.items():
                if task != self.main and part not in self.parts[task]:
                    continue
                grads = [by_id[id(p)] * share for p in parameters]
                before = self._sums.get((task, part))
                self._sums[task, part] = (
                    grads
                    if before is None
                    else [a + b for a, b in zip(before, grads)]
                )

    def step(self):
        """Count an update of the optimizer, and change weights when due."""
        if self.due and self._sums:
            self._change()
        self._sums = {}
        self.updates += 1

    def _change(self):
        norms = {}
        for key in sorted(self._sums):
            average_(self._sums[key])
            squares = sum(
                float(g.double().square().sum()) for g in self._sums[key]
            )
            norms[key] = math.sqrt(squares) if squares >= 0 else math.nan
        ratios = {}
        for task in self.active[1:]:
            shares = [
                _ratio(
                    norms.get((task, p), 0.0), norms.get((self.main, p), 0.0)
                )
                for p in self.parts[task]
            ]
            # NaN is in the maximum, whatever Python's max does.
            ratios[task] = sum(shares) if _has_nan(shares) else max(shares)
        for task, ratio in ratios.items():
            if math.isnan(ratio):
                logger.warning(
                    "update %d: the gradient norm of %r or %r is not finite; "
                    "its weight stays as it is",
                    self.updates + 1,
                    task,
                    self.main,
                )
                continue
            self._weights[task] *= ratio ** (
                self.exponent / len(self.parts[task])
            )
            if self[task] == 0:
                logger.info(
                    "update %d: task %r has fallen below %g and stops",
                    self.updates + 1,
                    task,
                    self.floor,
                )
        self.history.append(
            {
                "update": self.updates + 1,
                "norms": {
                    f"{t}/{p}": n if math.isfinite(n) else None
                    for (t, p), n in norms.items()
                },
                "weights": dict(self._weights),
            }
        )

    def state(self):
        """Return what is kept.

        Returns
        -------
        dict
            Tasks, weights, updates and the history of all of it.
        """
        return {
            "tasks": list(self.tasks),
            "main": self.main,
            "weights": self._weights,
            "updates": self.updates,
            "history": self.history,
        }

    def restore(self, state):
        """Take back what `state` returned.

        Arguments
        ---------
        state : dict
            See `state`.

        Raises
        ------
        ValueError
            It is of other tasks.
        """
        tasks = state.get("tasks")
        if tasks is None or sorted(tasks) != sorted(self.tasks):
            raise ValueError(
                f"holds weights of the tasks {tasks}, expected "
                f"{list(self.tasks)}; begin a new output folder, or name the "
                "same tasks"
            )
        self._weights = {t: float(state["weights"][t]) for t in self.tasks}
        self.updates = int(state["updates"])
        self.history = list(state["history"])
        self._sums = {}


def _ratio(task, main):
    """Return the capped ratio; a main task without gradient sets no cap."""
    if not (math.isfinite(task) and math.isfinite(main)):
        return math.nan
    return min(1.0, task / main) if main > 0 else 1.0


def _has_nan(values):
    return any(math.isnan(value) for value in values)
