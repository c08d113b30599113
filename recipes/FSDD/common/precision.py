"""The precision of training, as the hparams ask for it."""

from speechbrain_taskarith.brains import fast_precision


def choose_precision(wanted, run_opts):
    """Return a precision of training; `"auto"` is the fastest here."""
    if wanted == "auto":
        return fast_precision(run_opts.get("device"))
    return wanted
