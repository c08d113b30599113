"""Norms of the tasks' gradients on what they share, over several updates."""

import logging
import math
import statistics

import torch

from speechbrain_taskarith.translation.distributed import average_
from speechbrain_taskarith.translation.multitask.gradients import (
    isolated_gradients,
    trained_parameters,
)

logger = logging.getLogger(__name__)

MEASURED = ("all", "attention")
# Attention to another sequence: SpeechBrain's name, and transformers'.
_CROSS = ("multihead_attn", "encoder_attn")


def measured_groups(source, measured, part):
    """Return lists of parameters; a part's norm is the mean of their norms.

    `"all"`: one list of all that train. `"attention"`: the output projection
    of every self-attention that trains, each on its own.
    """
    if measured == "all":
        return [trained_parameters(source)]
    if not isinstance(source, torch.nn.Module):
        raise ValueError(
            f"part {part!r}: measured='attention' finds layers by their "
            "names; expected a module, found parameters"
        )
    found = [
        parameter
        for name, parameter in source.named_parameters()
        if name.endswith("out_proj.weight")
        and not any(cross in name for cross in _CROSS)
    ]
    if not found:
        raise ValueError(
            f"part {part!r} has no self-attention (a parameter named "
            "...out_proj.weight): use measured='all'"
        )
    return [[parameter] for parameter in trained_parameters(found)]


class GradientNorms:
    """A list of norms for each task and part, one norm an update.

    `lists` has the keys `task/part`. With `joint` the main task's norm is that
    of the whole weighted sum, as it stands in `.grad` after `backward`, under
    `main+task/part`: of updates that held both tasks. All norms are then of
    weighted losses, otherwise of unweighted ones, each task alone.
    """

    def __init__(self, main, joint, measured):
        self.main, self.joint, self.measured = main, joint, measured
        self.clear()

    def clear(self, lists=None):
        """Begin anew, or from the lists of a measurement in progress."""
        self.lists = lists or {}
        self.drop_unfinished()

    def drop_unfinished(self):
        """Forget the gradients of an update that has not ended."""
        self._sums, self._sizes = {}, {}

    def observe(self, losses, modules, parts_of, share):
        """Add a batch's gradients of each task in `parts_of`, on its parts."""
        parts = dict.fromkeys(p for ps in parts_of.values() for p in ps)
        groups = {
            part: measured_groups(modules[part], self.measured, part)
            for part in parts
        }
        self._sizes = {
            part: [len(group) for group in listed]
            for part, listed in groups.items()
        }
        flat = {part: sum(listed, []) for part, listed in groups.items()}
        # All parts of a task in one pass over its graph.
        shared = trained_parameters(p for ps in flat.values() for p in ps)
        for task in (self.main, *parts_of):
            loss = losses.get(task, torch.zeros(()))
            grads = isolated_gradients(loss, shared, across_processes=False)
            by_id = {id(p): g for p, g in zip(shared, grads)}
            for part, parameters in flat.items():
                wanted = self.joint or task == self.main
                if not wanted and part not in parts_of[task]:
                    continue
                scaled = [by_id[id(p)] * share for p in parameters]
                if before := self._sums.get((task, part)):
                    scaled = [a + b for a, b in zip(before, scaled)]
                self._sums[task, part] = scaled

    def end_update(self, update, parts_of, weights):
        """Add an update's norms to the lists; all processes have to call it."""
        sums, self._sums = self._sums, {}
        norms = {}
        for task, part in sorted(sums):
            average_(sums[task, part])
            norm = self._norm(sums[task, part], part)
            if not math.isfinite(norm):
                logger.warning(
                    f"update {update}: the gradient norm of {task!r} on "
                    f"{part!r} is not finite; it is left out of the task "
                    "weights"
                )
            elif norm > 0:
                norms[task, part] = norm
        if not self.joint:
            for (task, part), norm in norms.items():
                self._append(f"{task}/{part}", norm)
            return
        for task, parts in parts_of.items():
            for part in parts:
                if {(task, part), (self.main, part)} <= set(norms):
                    own = weights[task] * norms[task, part]
                    self._append(f"{task}/{part}", own)
                    whole = self._whole(sums, part, weights)
                    self._append(self._main_key(task, part), whole)

    def _norm(self, grads, part):
        """Return the mean over groups; in one transfer from the device."""
        if not grads:
            return 0.0
        squares = torch.stack([g.double().square().sum() for g in grads])
        sizes = self._sizes[part]
        each = [float(s.sum()) for s in squares.cpu().split(sizes)]
        return statistics.fmean(map(math.sqrt, each))

    def _whole(self, sums, part, weights):
        """Return the norm of the weighted sum of all tasks' gradients."""
        total = None
        for task, other in sorted(sums):
            if other == part:
                scaled = [weights[task] * g for g in sums[task, part]]
                total = (
                    scaled
                    if total is None
                    else [a + b for a, b in zip(total, scaled)]
                )
        return self._norm(total, part)

    def _append(self, key, norm):
        self.lists.setdefault(key, []).append(norm)

    def _main_key(self, task, part):
        main = f"{self.main}+{task}" if self.joint else self.main
        return f"{main}/{part}"

    def _pair(self, task, part):
        keys = (f"{task}/{part}", self._main_key(task, part))
        return [self.lists.get(key, []) for key in keys]

    def unseen(self, task, parts):
        """Return which of a task and the main one had no gradient at all."""
        pairs = [self._pair(task, part) for part in parts]
        had = [any(pair[i] for pair in pairs) for i in range(2)]
        return [t for t, seen in zip((task, self.main), had) if not seen]

    def seen(self, task, parts):
        """Return in how many updates a task and the main one were measured."""
        return max(min(map(len, self._pair(task, part))) for part in parts)

    def ratio(self, task, part, standard_errors):
        """Return the certain part of task / main, None if not measured."""
        own, main = self._pair(task, part)
        if not own or not main:
            return None
        ratio = statistics.fmean(own) / statistics.fmean(main)
        error = math.hypot(_relative_error(own), _relative_error(main))
        doubt = math.exp(min(standard_errors * error, 99.0))
        if ratio < 1:
            return min(1.0, ratio * doubt)
        return max(1.0, ratio / doubt)

    def means(self):
        """Return the mean of every list."""
        return {key: statistics.fmean(n) for key, n in self.lists.items()}


def _relative_error(norms):
    """Return the standard error of a mean, as a share of it."""
    if len(norms) < 2:
        return 0.0
    error = statistics.stdev(norms) / math.sqrt(len(norms))
    return error / statistics.fmean(norms)
