"""The gradient of each task alone, and aggregators that combine them."""

import inspect

import torch

from speechbrain_taskarith.translation.distributed import (
    average_,
    names_of_all,
    shares_of,
)
from speechbrain_taskarith.utils.optional import require


def isolated_gradients(loss, parameters, across_processes=True):
    """Return a loss's own gradient; `.grad` is neither read nor written.

    The graph is kept, for `backward` to follow. Gradients come in the order
    of `parameters`, 0 where the loss does not depend on one; with
    `across_processes` all processes have to call this.
    """
    parameters = list(parameters)
    grads = _own_gradients(loss, parameters)
    return _filled(grads, parameters, across_processes)


def _own_gradients(loss, parameters):
    if not loss.requires_grad or not parameters:
        return [None] * len(parameters)
    # Hooks of DDP sit where gradients are accumulated: not reached.
    return torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True
    )


def _filled(grads, parameters, across_processes):
    grads = [
        torch.zeros_like(p) if g is None else g.detach().clone()
        for p, g in zip(parameters, grads)
    ]
    if across_processes:
        average_(grads)
    return grads


def trained_parameters(source):
    """Return what gets gradients of a module or some parameters, each once."""
    if isinstance(source, torch.nn.Module):
        source = source.parameters()
    return list(dict.fromkeys(p for p in source if p.requires_grad))


class GradientAggregator:
    """Put the gradients of several tasks together with a torchjd aggregator.

    PCGrad, MGDA, CAGrad, UPGrad, AlignedMTL, ... take the place of the
    weighted sum. Each task's own gradient becomes a row of a matrix (averaged
    over processes), and the aggregator's vector is added to `.grad`, as
    `backward` would do. It costs one backward pass for every task.

    Arguments
    ---------
    name : str
        A class of `torchjd.aggregation`, such as `"PCGrad"`, in upper or
        lower case. Some need packages of their own, which an `ImportError`
        names.
    **settings : object
        Of that class; some have to be given (`"CAGrad"`: `c`), else a
        `ValueError` names them.

    Example
    -------
    >>> try:
    ...     pcgrad = GradientAggregator("PCGrad")
    ... except ImportError:
    ...     pcgrad = None                   # the extra is not installed
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> if pcgrad is not None:
    ...     pcgrad.backward({"st": weight.sum(), "asr": -weight[0]}, [weight])
    ...     assert weight.grad is not None

    In a YAML, `TranslationBrain` finds it as `aggregator`::

        aggregator: !new:speechbrain_taskarith.translation.GradientAggregator
            name: PCGrad
    """

    def __init__(self, name, **settings):
        aggregation = require(
            "torchjd.aggregation", "translation", f"the aggregator {name!r}"
        )
        classes = {
            key.lower(): value
            for key, value in vars(aggregation).items()
            if inspect.isclass(value)
            and issubclass(value, aggregation.Aggregator)
            and not inspect.isabstract(value)
            # Not the base classes, which are given objects of torchjd's.
            and not key.endswith("WeightedAggregator")
        }
        if name.lower() not in classes:
            known = sorted(c.__name__ for c in classes.values())
            raise ValueError(
                f"torchjd has no aggregator {name!r}; it has {', '.join(known)}"
            )
        self.name = name
        self.aggregator = _make(classes[name.lower()], settings)

    def backward(self, losses, parameters):
        """Add the aggregated gradient to `.grad`.

        Arguments
        ---------
        losses : dict of str: torch.Tensor
            A scalar for each task; `ValueError` without any. Processes may
            hold different tasks: one that lacks a task counts as 0 for it.
        parameters : torch.nn.Module or iterable of torch.nn.Parameter
            What is trained. Parameters of one task alone take part, too: the
            other rows are 0 there.
        """
        for parameter, part, *_ in self._combined(losses, parameters):
            if parameter.grad is None:
                parameter.grad = part.clone()
            else:
                parameter.grad += part

    def total(self, losses, parameters, scale=1.0):
        """Return the sum of losses, with the aggregated gradient as its own.

        For a loop that calls `backward` itself, as `Brain.fit_batch` does: with
        a gradient scaler, accumulation and DDP as ever. Where there are
        several processes, their gradients have to be averaged, as DDP does.

        Arguments
        ---------
        losses, parameters
            As of `backward`.
        scale : float
            Gradients are computed of losses times this, and divided by it:
            that of a gradient scaler.

        Returns
        -------
        torch.Tensor
            A scalar; 0, without a gradient, in a process that has no loss.
        """
        found = self._combined(losses, parameters, scale)
        zero = torch.zeros(())
        value = sum((loss.detach() for loss in losses.values()), zero)
        # Linear in the parameters, so that its gradient is the aggregated one.
        # DDP takes what no loss of this process depends on for done, and a
        # second gradient would be an error: the others make up for it.
        products = [
            (p * (part / share)).sum().to(value)
            for p, part, here, share in found
            if here
        ]
        if not products:
            return value
        linear = torch.stack(products).sum()
        return value + (linear - linear.detach())

    def _combined(self, losses, parameters, scale=1.0):
        """Return, for each parameter that a loss of any process reaches:

        it, its gradient, whether a loss of this process does, and the share
        of the processes where one does.
        """
        tasks = sorted(names_of_all(losses))
        if not tasks:
            raise ValueError("no losses: expected one for each task")
        parameters = trained_parameters(parameters)
        rows, reached = [], [False] * len(parameters)
        for task in tasks:
            loss = losses.get(task, torch.zeros(()))
            grads = _own_gradients(loss * scale, parameters)
            reached = [r or g is not None for r, g in zip(reached, grads)]
            grads = _filled(grads, parameters, across_processes=True)
            row = torch.cat([g.reshape(-1).float() for g in grads])
            rows.append(row / scale)
        whole = self.aggregator(torch.stack(rows))
        parts = whole.split([p.numel() for p in parameters])
        return [
            (parameter, part.view_as(parameter).to(parameter), here, share)
            for parameter, part, here, share in zip(
                parameters, parts, reached, shares_of(reached, whole.device)
            )
            if share
        ]


def _make(kind, settings):
    """Make an aggregator; say what it lacks."""
    try:
        inspect.signature(kind).bind(**settings)
    except TypeError as error:
        raise ValueError(
            f"GradientAggregator({kind.__name__!r}): {error}; torchjd has "
            f"{kind.__name__}{inspect.signature(kind)}"
        ) from None
    try:
        return kind(**settings)
    except ImportError as error:
        raise ImportError(
            f"GradientAggregator({kind.__name__!r}): {error}"
        ) from error
