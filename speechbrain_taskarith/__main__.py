"""The command line: `taskarith`, or `python -m speechbrain_taskarith`.

One verb a file in `commands`; only the verb that is asked for is imported,
and merging safetensors never imports torch.
"""

import argparse
import contextlib
import importlib
import logging
import sys
import warnings

from speechbrain_taskarith import __version__
from speechbrain_taskarith.commands import VERBS, arguments, output

_DESCRIPTION = """\
Task vectors of speech models: subtract, apply, merge, edit, look; YAML
fragments; streaming transducers; speech translation.

verbs:
"""
_EPILOG = """\
`taskarith VERB --help` shows examples. Every verb has --json (the result,
machine-readable, on standard output) and, where it writes, --dry-run. Exit
status: 0 done, 1 an error (one line on standard error; nothing was written
or changed), 2 wrong usage.
"""

# What is raised with a message for the user; anything else is a fault of
# ours and shows its traceback.
_EXPECTED = (ValueError, KeyError, OSError, RuntimeError, ImportError)


def build_parser(chosen):
    """Return the parser, complete for the chosen verb only."""
    listed = "\n".join(f"  {v:<12}{text}" for v, (_, text) in VERBS.items())
    parser = argparse.ArgumentParser(
        "taskarith",
        description=_DESCRIPTION + listed,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True, dest="verb")
    for verb, (file, summary) in VERBS.items():
        if verb == chosen:
            module = f"{__package__}.commands.{file}"
            named = file.rpartition(".")[2] == verb
            name = "add_parser" if named else f"add_{verb}"
            getattr(importlib.import_module(module), name)(verbs, summary)
        else:
            verbs.add_parser(verb)
    return parser


def main(words=None):
    """Run the command line; return the exit status, see `--help`.

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
    words = arguments.plain_spelling(sys.argv[1:] if words is None else words)
    chosen = next((word for word in words if word in VERBS), None)
    options, rest = build_parser(chosen).parse_known_args(words)
    arguments.take_overrides(options, rest)
    with _messages_of_one_line():
        try:
            result = options.run(options)
            output.show(result, options.json)
        except BrokenPipeError:  # `taskarith inspect ... | head`
            with contextlib.suppress(OSError):
                sys.stdout.close()
            return 1
        except KeyboardInterrupt:
            output.complain("interrupted; nothing half-written is left")
            return 130
        except _EXPECTED as error:
            output.complain(output.message(error, options.remedies))
            return 1
    return result.status


@contextlib.contextmanager
def _messages_of_one_line():
    """Show warnings and log messages as one line each, like errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("taskarith: %(levelname)s: %(message)s")
    )
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger(__package__)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: output.complain(
                str(message), "warning"
            )
            yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
