"""The command line: `taskarith`, or `python -m speechbrain_taskarith`.

One verb a file in `commands`; nothing heavy is imported before the arguments
are understood, and merging safetensors never imports torch.
"""

import argparse
import contextlib
import logging
import sys
import warnings

from speechbrain_taskarith import __version__
from speechbrain_taskarith.commands import VERBS, console, load_verb

_DESCRIPTION = """\
Task vectors of speech models: subtract, apply, merge, edit, look.

  vector   what fine-tuning added:  fine-tuned - base
  apply    base + scale * vectors
  merge    many checkpoints into one, streamed in bounded memory
  edit     a folder of edits: learn, undo, reorder, log, export
  inspect  what a file or folder holds
  plot     cosine matrix, norms by layer

Streaming transducers:

  transcribe  recordings to text, whole or as a stream
"""

_EPILOG = """\
`taskarith VERB --help` shows examples. Every verb knows --json (the result,
machine-readable, on standard output) and, where it writes, --dry-run. Exit
status: 0 done, 1 an error (one line on standard error; nothing was written
or changed), 2 wrong usage.
"""

# What is raised with a message for the user; anything else is a fault of
# ours and shows its traceback.
_EXPECTED = (ValueError, KeyError, OSError, RuntimeError, ImportError)


def build_parser():
    """Build the parser of all verbs.

    Returns
    -------
    argparse.ArgumentParser
        Its `run` default is the chosen verb's function.
    """
    parser = argparse.ArgumentParser(
        "taskarith",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True, dest="verb")
    for verb in VERBS:
        load_verb(verb).add_parser(verbs)
    return parser


def main(arguments=None):
    """Run the command line.

    Arguments
    ---------
    arguments : list of str or None
        None takes those of the process.

    Returns
    -------
    int
        The exit status, see `--help`.

    Example
    -------
    >>> import torch
    >>> folder = getfixture("tmpdir")
    >>> base, tuned = str(folder / "base.ckpt"), str(folder / "us.ckpt")
    >>> torch.save({"w": torch.zeros(3)}, base)
    >>> torch.save({"w": torch.ones(3)}, tuned)
    >>> main(["vector", base, tuned, "-o", str(folder / "us.safetensors")])
    wrote .../us.safetensors: 1 tensor, 3 parameters...
    0
    """
    parser = build_parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    options.overrides = overrides
    with _messages_of_one_line():
        try:
            console.show(options.run(options), options.json)
        except BrokenPipeError:
            # `taskarith inspect ... | head`: nobody reads on.
            with contextlib.suppress(OSError):
                sys.stdout.close()
            return 1
        except KeyboardInterrupt:
            console.complain("interrupted; nothing half-written is left")
            return 130
        except _EXPECTED as error:
            words = getattr(options, "words", None)
            console.complain(console.message(error, words))
            return 1
    return 0


@contextlib.contextmanager
def _messages_of_one_line():
    """Show warnings and log messages as one line each, like errors."""

    def show(message, *_, **__):
        console.complain(str(message), "warning")

    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("taskarith: %(levelname)s: %(message)s")
    )
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger(__package__)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
