"""The verbs of the command line, a file each.

A verb's module has `add_parser(verbs)`, which adds its parser, and a function
that takes the parsed options and returns a `console.Result`. What needs torch
is imported inside that function.
"""

import importlib

VERBS = (
    "vector",
    "apply",
    "merge",
    "edit",
    "inspect",
    "plot",
    "transcribe",
)


def load_verb(verb):
    """Import the module of a verb.

    Arguments
    ---------
    verb : str
        One of `VERBS`.

    Returns
    -------
    module
        `speechbrain_taskarith.commands.<verb>`.
    """
    return importlib.import_module(f"{__name__}.{verb}")
