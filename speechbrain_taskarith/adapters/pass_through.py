"""A child module that does its work elsewhere than in `forward`."""

import torch


class PassThrough(torch.nn.Module):
    """A module that is in another for its parameters or its `train` alone.

    Hooks do the work. Containers such as `Sequential` call all their
    children nevertheless, the last one with what they return.

    Example
    -------
    >>> layers = torch.nn.Sequential(torch.nn.ReLU())
    >>> layers.add_module("guest", PassThrough())
    >>> layers(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    def forward(self, x, *others, **named):
        """Return the first input as it is.

        Arguments
        ---------
        x : object
            Anything.
        *others : tuple
            Ignored.
        **named : dict
            Ignored.

        Returns
        -------
        object
            `x`
        """
        return x
