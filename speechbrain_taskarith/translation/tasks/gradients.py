"""Gradients of one loss alone, leaving everything else as it is."""

import torch

from speechbrain_taskarith.translation.losses.gathering import average_


def isolated_gradients(loss, parameters, across_processes=True):
    """Return a loss's own gradient; `.grad` is neither read nor written.

    Arguments
    ---------
    loss : torch.Tensor
        A scalar. Its graph is kept, for `backward` to follow.
    parameters : sequence of torch.nn.Parameter
        What to derive by.
    across_processes : bool
        True: the average over all processes (all have to call this, with the
        same parameters).

    Returns
    -------
    list of torch.Tensor
        In the order of `parameters`; 0 where the loss does not depend on one.

    Example
    -------
    >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
    >>> isolated_gradients((3 * weight).sum(), [weight]), weight.grad
    ([tensor([3.])], None)
    """
    parameters = list(parameters)
    found = [None] * len(parameters)
    if loss.requires_grad and parameters:
        # Hooks of DDP sit where gradients are accumulated: not reached.
        found = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True
        )
    found = [
        torch.zeros_like(p) if g is None else g.detach().clone()
        for p, g in zip(parameters, found)
    ]
    if across_processes:
        average_(found)
    return found


def trained_parameters(source):
    """Return what gets gradients among a module's or a list's parameters.

    Arguments
    ---------
    source : torch.nn.Module or iterable of torch.nn.Parameter
        Where to look.

    Returns
    -------
    list of torch.nn.Parameter
        Each once.

    Example
    -------
    >>> len(trained_parameters(torch.nn.Linear(1, 1)))
    2
    """
    if isinstance(source, torch.nn.Module):
        source = source.parameters()
    unique = {id(p): p for p in source if p.requires_grad}
    return list(unique.values())
