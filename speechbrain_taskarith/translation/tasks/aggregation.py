"""Aggregators of task gradients, by the name they have in torchjd."""

import inspect

import torch

from speechbrain_taskarith.translation.tasks.gradients import (
    isolated_gradients,
    trained_parameters,
)
from speechbrain_taskarith.utils.optional import require


class GradientAggregator:
    """Put the gradients of several tasks together with a torchjd aggregator.

    PCGrad, MGDA, CAGrad, UPGrad, AlignedMTL, ... take the place of the
    weighted sum. Each task's own gradient becomes a row of a matrix (averaged
    over processes), and the aggregator's vector is added to `.grad`, as
    `backward` would do. It costs one backward pass for every task.

    Arguments
    ---------
    name : str
        A class of `torchjd.aggregation`, such as `"PCGrad"`; the case of
        letters does not count.
    **settings : object
        Of that class.

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
    """

    def __init__(self, name, **settings):
        room = require(
            "torchjd.aggregation", "translation", f"the aggregator {name!r}"
        )
        classes = {
            key.lower(): value
            for key, value in vars(room).items()
            if inspect.isclass(value)
            and issubclass(value, room.Aggregator)
            and not inspect.isabstract(value)
        }
        if name.lower() not in classes:
            known = sorted(c.__name__ for c in classes.values())
            raise ValueError(
                f"torchjd has no aggregator {name!r}; it has {', '.join(known)}"
            )
        self.name = name
        self.aggregator = classes[name.lower()](**settings)

    def backward(self, losses, parameters):
        """Add the aggregated gradient to `.grad`.

        Arguments
        ---------
        losses : dict of str: torch.Tensor
            A scalar for each task.
        parameters : torch.nn.Module or iterable of torch.nn.Parameter
            What is trained. What only one task reaches takes part, too: the
            other rows are 0 there.

        Raises
        ------
        ValueError
            No loss at all.
        """
        if not losses:
            raise ValueError("no losses: expected one for each task")
        parameters = trained_parameters(parameters)
        matrix = torch.stack(
            [
                torch.cat(
                    [
                        grad.reshape(-1).float()
                        for grad in isolated_gradients(losses[t], parameters)
                    ]
                )
                for t in sorted(losses)
            ]
        )
        whole = self.aggregator(matrix)
        parts = whole.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts):
            part = part.view_as(parameter).to(parameter)
            if parameter.grad is None:
                parameter.grad = part.clone()
            else:
                parameter.grad += part
