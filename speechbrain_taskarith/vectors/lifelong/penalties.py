"""Lifelong methods that add a term to the loss: EWC and LwF."""

import contextlib
import copy
import math
import random

import torch

from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask
from speechbrain_taskarith.utils.training import keep_modes
from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning


class EWC(FineTuning):
    """Elastic weight consolidation, online.

    After each task the diagonal of the (empirical) Fisher information is
    measured as the mean over utterances of the squared gradient of that
    one utterance's log-likelihood, `F_i = mean_n (d log p(y_n|x_n) /
    d theta_i)^2`. Gradients of a batch's mean would be too small by up to
    the batch size. The penalty is

    `strength / 2 * sum_i F_i (theta_i - theta*_i)^2`

    around the last task's weights `theta*` (Kirkpatrick et al., "Overcoming
    catastrophic forgetting in neural networks", 2017, eq. 3), with one
    running Fisher `F <- decay F + F_new` instead of one for each task
    (Schwarz et al., "Progress & Compress", 2018, section 3.1).

    Arguments
    ---------
    strength : float
        Weight of the penalty, at least 0.
    decay : float
        What stays of the older Fisher at each task, 0 to 1.
    samples, seed : int
        How many utterances the Fisher is measured on, and the seed of their
        choice.

    Example
    -------
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> method = EWC(strength=2.0)
    >>> loss = lambda x: 0.5 * (model(torch.tensor([x])) - 1.0).square().sum()
    >>> method.consolidate(model, [1.0, 3.0], loss)  # gradients -1 and -3
    >>> method.fisher["weight"].item()
    5.0
    >>> _ = torch.nn.init.constant_(model.weight, 2.0)
    >>> method.penalty(model, None, None, None).item()
    20.0
    """

    changes_training = True

    def __init__(self, strength=1.0, decay=1.0, samples=200, seed=0):
        checks.in_range("strength", strength, 0, math.inf)
        checks.in_range("decay", decay, 0, 1)
        checks.in_range("samples", samples, 1, math.inf)
        self.strength, self.decay = float(strength), float(decay)
        self.samples, self.seed = int(samples), seed
        self.fisher, self.anchor, self.tasks = {}, {}, 0

    def penalty(self, model, forward, log_probs, lens):
        """As `FineTuning.penalty`; None before the first Fisher."""
        if not self.fisher:
            return None
        parameters = dict(model.named_parameters())
        if not parameters.keys() & self.fisher.keys():
            raise ValueError(
                f"EWC measured {next(iter(self.fisher))!r}, and no parameter "
                f"has its name or another's ({next(iter(parameters))!r} has "
                "not): give the model that it measured, and both times "
                "without what wraps it (DDP, torch.compile)"
            )
        total = 0.0
        for name, parameter in parameters.items():
            if name in self.fisher and parameter.requires_grad:
                # In half precision both factors may be 0.
                wide = torch.promote_types(parameter.dtype, torch.float32)
                moved = parameter.to(wide)
                fisher = self.fisher[name].to(moved)
                if fisher.shape != moved.shape:
                    raise ValueError(
                        f"{name!r} has the shape {tuple(moved.shape)}, and "
                        f"{tuple(fisher.shape)} when EWC measured it; keep "
                        "its size, or begin without this memory"
                    )
                moved = moved - self.anchor[name].to(moved)
                total = total + (fisher * moved.square()).sum()
        return 0.5 * self.strength * total

    def consolidate(self, model, items, loss):
        """Measure the Fisher on the domain just learned; move the anchor."""
        chosen = list(items)
        random.Random(f"fisher {self.seed} {self.tasks}").shuffle(chosen)
        chosen = chosen[: self.samples]
        if not chosen:
            raise ValueError("EWC needs at least one utterance of the domain")
        parameters = dict(model.named_parameters())
        new = {
            name: torch.zeros_like(p, dtype=torch.float32)
            for name, p in parameters.items()
        }
        # Every parameter counts, also one that the next task will freeze.
        frozen = [p for p in parameters.values() if not p.requires_grad]
        try:
            with keep_modes(model), _differentiable(model):
                model.eval().requires_grad_(True)
                for item in chosen:
                    gradients = torch.autograd.grad(
                        loss(item),
                        list(parameters.values()),
                        allow_unused=True,
                    )
                    for name, gradient in zip(parameters, gradients):
                        if gradient is not None:
                            new[name] += gradient.detach().float().square()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        for name, value in new.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"the Fisher information of {name!r} is not finite: an "
                    "utterance has an infinite loss, most often one that is "
                    "too short for its transcript"
                )
            value /= len(chosen)
            if name in self.fisher:
                value += self.decay * self.fisher[name].to(value)
        self.fisher = new
        self.anchor = {n: p.detach().clone() for n, p in parameters.items()}
        self.tasks += 1

    def state_dict(self):
        """Return Fisher, anchor and the number of tasks."""
        state = {f"fisher.{n}": v for n, v in self.fisher.items()}
        state |= {f"anchor.{n}": v for n, v in self.anchor.items()}
        return {**state, "tasks": self.tasks}

    def load_state_dict(self, state):
        """Take them back."""
        self.fisher, self.anchor = (
            {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)}
            for p in ("fisher.", "anchor.")
        )
        self.tasks = int(state["tasks"])


def _differentiable(model):
    """Without cuDNN where it has no gradient: recurrent layers not in training."""
    modules = model.modules()
    if any(isinstance(module, torch.nn.RNNBase) for module in modules):
        return torch.backends.cudnn.flags(enabled=False)
    return contextlib.nullcontext()


class LwF(FineTuning):
    """Learning without forgetting: keep the old model's answers.

    On the new domain's own utterances the model stays close to what it
    answered before the task:

    `strength * T^2 * mean_n mean_t KL(p_old^(1/T) || p^(1/T))`

    over utterances `n` and their valid frames `t` (so that equal shards of a
    batch average to the whole), both distributions at temperature `T` (Li and
    Hoiem, "Learning without forgetting", 2017; the factor `T^2` after Hinton
    et al., 2015). KL and not cross-entropy: their difference, the old model's
    entropy, has no gradient, and the KL is 0 at the start. The old model is
    the one that the task starts from; nothing is stored between tasks.

    Arguments
    ---------
    strength : float
        Weight of the term, at least 0.
    temperature : float
        Above 0; larger gives weight to the unlikely classes.

    Example
    -------
    >>> model = torch.nn.Linear(3, 4)
    >>> method = LwF()
    >>> method.before_task(model, task=2)
    >>> x = torch.rand(2, 5, 3)
    >>> forward = lambda net: net(x).log_softmax(-1)
    >>> method.penalty(model, forward, forward(model), torch.ones(2)).item()
    0.0
    """

    changes_training = True

    def __init__(self, strength=1.0, temperature=2.0):
        checks.in_range("strength", strength, 0, math.inf)
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, expected above 0")
        self.strength, self.temperature = float(strength), float(temperature)
        self.teacher = None

    def before_task(self, model, task):
        """As `FineTuning.before_task`: copies the model, from task 2 on."""
        self.teacher = None
        if task > 1:
            self.teacher = copy.deepcopy(model).eval().requires_grad_(False)

    def penalty(self, model, forward, log_probs, lens):
        """As `FineTuning.penalty`: the distillation term, from task 2 on."""
        del model
        if self.teacher is None:
            return None
        with torch.no_grad():
            old = forward(self.teacher)
        steps = log_probs.shape[1]
        absolute = absolute_lengths(lens.to(log_probs.device), steps)
        padded = padding_mask(absolute, steps)
        # A padded frame may hold anything; afterwards its gradient would too.
        old, new = (
            part.masked_fill(padded[..., None], 0) / self.temperature
            for part in (old, log_probs)
        )
        old, new = old.log_softmax(-1), new.log_softmax(-1)
        # A class that the old model excludes adds nothing (0 log 0 = 0).
        apart = (old - new).masked_fill(old.isneginf(), 0)
        total = (old.exp() * apart).sum((1, 2))
        weight = self.strength * self.temperature**2
        return weight * (total / (~padded).sum(1).clamp_min(1)).mean()
