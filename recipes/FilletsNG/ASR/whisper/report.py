"""Tables and plots of syn2real.py."""


def write_report(results, folder):
    """Write what was measured."""
    raise NotImplementedError
