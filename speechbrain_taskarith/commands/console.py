"""What the command line prints: results on stdout, all else on stderr."""

import contextlib
import json
import math
import sys
from dataclasses import dataclass, field

from speechbrain_taskarith.utils.patterns import first_match, matches
from speechbrain_taskarith.utils.progress import progress


@dataclass
class Result:
    """What a verb has done, for people and for programs.

    Arguments
    ---------
    lines : list of str
        For people.
    data : dict
        For programs: plain types.
    """

    lines: list = field(default_factory=list)
    data: dict = field(default_factory=dict)


def show(result, as_json):
    """Print a result on standard output.

    Arguments
    ---------
    result : Result
        What was done.
    as_json : bool
        True prints the data as JSON and nothing else.
    """
    if as_json:
        print(json.dumps(finite(result.data), indent=2, allow_nan=False))
    else:
        for line in result.lines:
            print(line)
    sys.stdout.flush()


@contextlib.contextmanager
def steps(total, enable):
    """Show how many steps of a piece of work are done, and the present one.

    Arguments
    ---------
    total : int
        Number of steps.
    enable : bool
        False shows nothing.

    Yields
    ------
    callable
        `step(name)`, to be called when a step begins.
    """
    with progress(total=total, unit="step", enable=enable) as bar:
        begun = 0

        def step(name):
            nonlocal begun
            bar.set_description(name)
            bar.update(min(begun, 1))
            begun += 1

        yield step
        bar.update(min(begun, 1))


def complain(text, kind="error"):
    """Print one line on standard error.

    Arguments
    ---------
    text : str
        The message; line breaks become spaces.
    kind : str
        `"error"` or `"warning"`.
    """
    print(f"taskarith: {kind}: {' '.join(text.split())}", file=sys.stderr)


def message(error, words=None):
    """Return an exception's message as a sentence.

    Arguments
    ---------
    error : Exception
        What was raised.
    words : dict or None
        `{what Python calls a remedy: what the command line calls it}`.

    Returns
    -------
    str
        Without the quotes of a `KeyError`; of an `OSError` the file first.
    """
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        text = f"{where}{error.strerror}"
    elif isinstance(error, KeyError) and len(error.args) == 1:
        text = str(error.args[0])
    else:
        text = str(error) or type(error).__name__
    for python, here in (words or {}).items():
        text = text.replace(python, here)
    return text


def finite(value):
    """Return plain data that JSON can hold: NaN and infinity as None.

    Arguments
    ---------
    value : object
        Dicts, lists and plain values.

    Returns
    -------
    object
        The same; other types by their text.
    """
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value)


def size(count):
    """Return a number of bytes for people.

    Arguments
    ---------
    count : int
        Bytes.

    Returns
    -------
    str
        In binary units.

    Example
    -------
    >>> size(900), size(1536), size(3 * 2**30)
    ('900 B', '1.5 KiB', '3.0 GiB')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count /= 1024
        power += 1
    return f"{count:.1f} {units[power]}" if power else f"{count} B"


def counted(number, what):
    """Return a number with its noun.

    Arguments
    ---------
    number : int
        How many.
    what : str
        The noun, in the singular.

    Returns
    -------
    str
        E.g. `"1 tensor"`, `"1,200 tensors"`.
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def table(rows, header):
    """Return rows as lines of aligned text.

    Arguments
    ---------
    rows : list of sequence of str
        The cells.
    header : sequence of str
        The columns' names.

    Returns
    -------
    list of str
        One line a row, the header first.
    """
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths)
        ).rstrip()
        for row in cells
    ]


def matched(names, patterns, what="pattern"):
    """Say what each pattern matches.

    Arguments
    ---------
    names : sequence of str
        Parameter names.
    patterns : sequence of str or dict
        Patterns; of a dict `{pattern: value}` the first match decides, and
        only what a pattern decides is counted.
    what : str
        What they do, e.g. `"include"`.

    Returns
    -------
    lines : list of str
        For people.
    data : dict
        `{pattern: [names]}`.

    Example
    -------
    >>> matched(["a.w", "b.w"], {"a.*": 1.0, "*": 0.5}, "scale")[1]
    {'a.*': ['a.w'], '*': ['b.w']}
    """
    names, data = list(names), {}
    for pattern in patterns:
        if isinstance(patterns, dict):
            asked = {p: p for p in patterns}
            hits = [n for n in names if first_match(n, asked) == pattern]
        else:
            hits = [n for n in names if matches(n, pattern)]
        data[pattern] = hits
    lines = []
    for pattern, hits in data.items():
        value = f" = {patterns[pattern]}" if isinstance(patterns, dict) else ""
        some = ", ".join(hits[:3]) + (", ..." if len(hits) > 3 else "")
        lines.append(
            f"  {what} {pattern!r}{value}: {len(hits)} of "
            f"{counted(len(names), 'parameter')}"
            f"{f' ({some})' if hits else ''}"
        )
    return lines, data
