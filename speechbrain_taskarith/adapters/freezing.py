"""Freezing modules for good: parameters and running statistics."""

import torch

from speechbrain_taskarith.adapters.pass_through import PassThrough


def keeps_statistics(module):
    """Tell whether a module changes by itself in training mode.

    Arguments
    ---------
    module : torch.nn.Module
        Batch normalisation of any kind, instance normalisation that tracks,
        SpeechBrain's `InputNormalization`, spectral normalisation.

    Returns
    -------
    bool
        True for modules that update buffers in `forward`.

    Example
    -------
    >>> keeps_statistics(torch.nn.BatchNorm1d(2))
    True
    >>> keeps_statistics(torch.nn.Dropout())
    False
    """
    if isinstance(module, torch.nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    # By what they have, since SpeechBrain takes seconds to import.
    return (
        hasattr(module, "update_until_epoch")
        or hasattr(module, "glob_mean")
        or type(module).__name__ in ("_SpectralNorm", "SpectralNorm")
    )


class StayFrozen(PassThrough):
    """A child that keeps its parent's statistics still.

    `parent.train()` reaches every child, this one last, which then puts
    what keeps running statistics back into evaluation mode. So nothing has
    to be remembered by the training loop. Dropout is left alone.

    Arguments
    ---------
    parent : torch.nn.Module
        Whose statistics are to stay.

    Example
    -------
    >>> norm = torch.nn.BatchNorm1d(3)
    >>> norm.stay_frozen = StayFrozen(norm)
    >>> norm.train().training
    False
    """

    def __init__(self, parent):
        super().__init__()
        self._parent = (parent,)

    def train(self, mode=True):
        """Take the mode, and the statistics' modules to evaluation.

        Arguments
        ---------
        mode : bool
            True for training.

        Returns
        -------
        StayFrozen
            Itself.
        """
        super().train(mode)
        hold_statistics(self._parent[0])
        return self


def hold_statistics(module):
    """Put what keeps statistics into evaluation mode.

    Arguments
    ---------
    module : torch.nn.Module
        All in it are looked at, and itself.
    """
    for inner in module.modules():
        if keeps_statistics(inner):
            inner.training = False
