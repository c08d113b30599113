"""Arguments that several verbs share, and what their texts mean."""

import argparse
from pathlib import Path


def add_verb(verbs, name, summary, examples, run):
    """Add the parser of a verb.

    Arguments
    ---------
    verbs : argparse subparsers
        Where to.
    name : str
        The verb.
    summary : str
        One sentence.
    examples : str
        Shown below the arguments by `--help`.
    run : callable
        Takes the options, returns a `console.Result`.

    Returns
    -------
    argparse.ArgumentParser
        To add the verb's own arguments to.
    """
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON"
    )
    parser.add_argument(
        "--no-progress", action="store_true", help="show no progress bar"
    )
    parser.set_defaults(run=run)
    return parser


def add_writing(parser, required=True):
    """Add what verbs have that write a file or folder.

    Arguments
    ---------
    parser : argparse.ArgumentParser
        The verb's.
    required : bool
        Whether an output must be named.
    """
    parser.add_argument(
        "-o",
        "--output",
        required=required,
        metavar="OUT",
        help="where to write; the form follows from the name",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what stands under that name (atomically)",
    )
    add_dry_run(parser)


def add_dry_run(parser):
    """Add `--dry-run`.

    Arguments
    ---------
    parser : argparse.ArgumentParser
        The verb's.
    """
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, say what would be written, write nothing",
    )


def add_patterns(parser):
    """Add `--include` and `--exclude`.

    Arguments
    ---------
    parser : argparse.ArgumentParser
        The verb's.
    """
    parser.add_argument(
        "--include",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="anchored shell patterns of the parameters to take (all)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="patterns of the parameters to leave out",
    )


def add_recoverable(parser):
    """Add `--recoverable`.

    Arguments
    ---------
    parser : argparse.ArgumentParser
        The verb's.
    """
    parser.add_argument(
        "--recoverable",
        metavar="NAME",
        help="whose weights, in SpeechBrain checkpoint folders (model)",
    )


def add_rule(parser, default):
    """Add `--rule` and `--scale`.

    Arguments
    ---------
    parser : argparse.ArgumentParser
        The verb's.
    default : str
        What happens without `--rule`, for the help.
    """
    parser.add_argument(
        "--rule",
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help=f"merging rule and its arguments, e.g. TIES density=0.5 ({default})",
    )
    parser.add_argument(
        "--scale",
        nargs="+",
        metavar="SCALE",
        help="a number, or PATTERN=NUMBER ...; the first match wins, "
        "parameters without a match stay as they are",
    )


def scale_of(texts):
    """Return what `--scale` means.

    Arguments
    ---------
    texts : list of str or None
        `["0.4"]`, or `["encoder.*=0.4", "*=0.1"]`.

    Returns
    -------
    float, dict or None
        The scale; None where none was given.

    Raises
    ------
    ValueError
        No number there.

    Example
    -------
    >>> scale_of(["0.4"]), scale_of(["encoder.*=0.4", "*=0.1"])
    (0.4, {'encoder.*': 0.4, '*': 0.1})
    """
    if texts is None:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return _number(texts[0])
    scale = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern:
            raise ValueError(
                f"--scale {text}: expected one number, or PATTERN=NUMBER "
                "(in quotes, so that the shell leaves the '*' alone)"
            )
        scale[pattern] = _number(value)
    return scale


def _number(text):
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--scale: {text!r} is no number") from None


def open_weights(path, options):
    """Open weights that a verb reads.

    Arguments
    ---------
    path : str or pathlib.Path
        What the user gave.
    options : argparse.Namespace
        With `recoverable`.

    Returns
    -------
    State
        Lazy, not yet verified.
    """
    from speechbrain_taskarith.vectors import open_state

    return open_state(path, recoverable=options.recoverable)


def check_output(output, inputs, overwrite, suffixes=None, what=None):
    """Refuse an output that would harm what is there.

    Arguments
    ---------
    output : str or pathlib.Path
        Where to write.
    inputs : sequence of path
        What is read.
    overwrite : bool
        Whether the user has asked to replace what is there.
    suffixes : sequence of str or None
        What the name may end in; None: anything.
    what : str or None
        With suffixes: what is written, for the error.

    Returns
    -------
    pathlib.Path
        The output.

    Raises
    ------
    ValueError
        The output is one of the inputs, or lies inside one; or its name
        ends in something else.
    FileExistsError
        Something stands there.
    """
    output = Path(output)
    here = output.resolve()
    for path in inputs:
        given = Path(path).resolve()
        inside = given.is_dir() and given in here.parents
        # A checkpoint folder may be written beside its siblings.
        if here == given or (inside and (given / "CKPT.yaml").exists()):
            raise ValueError(
                f"{output}: is (or lies in) an input; name another output"
            )
    if suffixes and output.suffix.lower() not in suffixes:
        raise ValueError(
            f"{output}: {what} is stored as {', '.join(suffixes)}; name it so"
        )
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"{output}: exists already; choose another name or say --overwrite"
        )
    return output
