"""Training and evaluation mode of a module's parts."""

import contextlib


@contextlib.contextmanager
def keep_modes(module):
    """Give every part of a module its own mode back at the end."""
    before = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        # Not by `train(mode)`: parts may differ, as a frozen BatchNorm does.
        for part, training in before:
            part.training = training
