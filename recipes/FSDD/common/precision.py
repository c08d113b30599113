"""The precision of training, as the hparams ask for it."""

from speechbrain_taskarith.brains import fast_precision


def choose_precision(hparams, run_opts):
    """Put the precision of training where `sb.Brain` looks for it."""
    # What the command line says goes first: --precision fp32
    hparams["precision"] = hparams["train_precision"]
    if hparams["precision"] == "auto":
        hparams["precision"] = fast_precision(run_opts.get("device"))
