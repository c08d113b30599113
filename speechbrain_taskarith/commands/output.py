"""What a verb gives: results on stdout, messages on stderr, weights on disk."""

import contextlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from speechbrain_taskarith.utils.hub.download import local_path
from speechbrain_taskarith.utils.patterns import first_match, matches
from speechbrain_taskarith.utils.progress import progress


@dataclass
class Result:
    """What a verb has done: `lines` for people, plain `data` for programs.

    `status` is the exit status: 1 where a part could not be done.
    """

    lines: list = field(default_factory=list)
    data: dict = field(default_factory=dict)
    status: int = 0


def show(result, as_json):
    """Print a result on standard output, as JSON or as lines."""
    if as_json:
        text = json.dumps(result.data, default=str)
        # JSON holds no NaN and no infinity.
        finite = json.loads(text, parse_constant=lambda _: None)
        print(json.dumps(finite, indent=2), flush=True)
    else:
        if hasattr(sys.stdout, "reconfigure"):
            # What a stream of another encoding lacks is no reason to stop.
            sys.stdout.reconfigure(errors="backslashreplace")
        print(*result.lines, sep="\n", flush=True)


@contextlib.contextmanager
def steps(total, show_progress):
    """Show progress by step: call the yielded `step(name)` as each begins."""
    with progress(total=total, unit="step", show_progress=show_progress) as bar:
        begun = 0

        def step(name):
            nonlocal begun
            bar.set_description(name)
            bar.update(min(begun, 1))
            begun += 1

        yield step
        bar.update(min(begun, 1))


def complain(text, kind="error"):
    """Print a message as one line on standard error."""
    print(f"taskarith: {kind}: {' '.join(text.split())}", file=sys.stderr)


def message(error, remedies):
    """Return an exception's message as a sentence.

    Without the quotes of a `KeyError`; of an `OSError` the file comes first.
    `remedies`: `{what Python calls a remedy: what the command line does}`.
    """
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        text = f"{where}{error.strerror}"
    elif isinstance(error, KeyError) and len(error.args) == 1:
        text = str(error.args[0])
    else:
        text = str(error) or type(error).__name__
    for python, here in remedies.items():
        text = text.replace(python, here)
    return text


def texts(data):
    """Return the lines of recordings that have a text, named if several are."""
    return [
        f"{one['file']}: {one['text']}" if len(data) > 1 else one["text"]
        for one in data
        if "text" in one
    ]


def about_recording(error, path):
    """Return an error that names the file, and options instead of Python."""
    text = str(error)
    if not Path(path).is_file():
        text = f"{path}: no such recording"
    text = re.sub(
        r"set the recipe's sample_rate to \d+, or read it with resample=True",
        "or let --resample do so",
        text,
    )
    text = text.replace(" or take its row out of the manifest", "")
    return ValueError(text if str(path) in text else f"{path}: {text}")


def size(count):
    """Return a number of bytes in binary units.

    Example
    -------
    >>> size(900), size(1536), size(3 * 2**30)
    ('900 B', '1.5 KiB', '3.0 GiB')
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min((max(count, 1).bit_length() - 1) // 10, len(units) - 1)
    return f"{count / 1024**power:.{min(power, 1)}f} {units[power]}"


def counted(number, what):
    """Return e.g. `"1 tensor"`, `"1,200 tensors"`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(names, at_most=5):
    """Return the first of some names, and how many there are more."""
    more = len(names) - at_most
    text = ", ".join(names[:at_most]) or "nothing"
    return f"{text} and {more} more" if more > 0 else text


def table(rows, header):
    """Return rows as lines of aligned text, the header first."""
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def matched(names, patterns, what):
    """Return lines and `{pattern: [names]}`: what each pattern matches.

    Of a dict `{pattern: value}` the first match decides, and only what a
    pattern decides is counted.

    Example
    -------
    >>> matched(["a.w", "b.w"], {"a.*": 1.0, "*": 0.5}, "scale")[1]
    {'a.*': ['a.w'], '*': ['b.w']}
    """
    names, data, lines = list(names), {}, []
    first, value = {pattern: pattern for pattern in patterns}, ""
    for pattern in patterns:
        hits = [name for name in names if matches(name, pattern)]
        if isinstance(patterns, dict):
            hits = [n for n in hits if first_match(n, first) == pattern]
            value = f" = {patterns[pattern]}"
        data[pattern] = hits
        some = ", ".join(hits[:3]) + (", ..." if len(hits) > 3 else "")
        lines.append(
            f"  {what} {pattern!r}{value}: {len(hits)} of "
            f"{counted(len(names), 'parameter')}"
            f"{f' ({some})' if hits else ''}"
        )
    return lines, data


def numbers(state):
    """Count tensors, parameters and bytes; a tied tensor counts once."""
    infos = [state.info(n) for n in state if state.aliases.get(n, n) == n]
    return {
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos),
        "bytes": sum(info.nbytes for info in infos),
    }


def checkpoint_of(path):
    """Return the SpeechBrain checkpoint folder that a path means, or None."""
    from speechbrain_taskarith.vectors.states.speechbrain_folder import (
        newest_checkpoint,
    )

    if path is None:
        return None
    if (Path(path) / "CKPT.yaml").exists():
        return Path(path)
    return newest_checkpoint(path)


def write_weights(
    weights, output, card, *, like=None, recoverable=None, dry_run=False
):
    """Write edited weights and the card beside them, unless in a dry run.

    `CKPT+...` becomes a SpeechBrain checkpoint; for other names see
    `save_state`. The other files of `like`, the base, are taken along: a
    checkpoint's other recoverables, or those of a Hugging Face folder.
    """
    from speechbrain_taskarith.vectors import (
        as_state,
        save_checkpoint,
        save_state,
    )
    from speechbrain_taskarith.vectors.states.readers import form_of
    from speechbrain_taskarith.vectors.states.speechbrain_folder import (
        by_network,
    )

    state = as_state(weights)
    if dry_run:
        return written(output, state, dry_run=True)
    like = like if like is None else local_path(like)
    card.fingerprint, metadata = state.fingerprint, card.provenance()
    form = form_of(output)
    if form == "speechbrain":
        save_checkpoint(
            by_network(state, recoverable),
            output,
            like=checkpoint_of(like),
            metadata=metadata,
            card=card,
        )
    else:
        folder = form == "hugging face" and like is not None
        files_of = like if folder and like.is_dir() else None
        save_state(state, output, metadata=metadata, like=files_of)
        card.save(output)
    return written(output, state, fingerprint=card.fingerprint)


def rounding_lines(loss, estimated=False):
    """Return the line that says how much of an edit rounding loses, if much."""
    if loss is None or loss <= 0.01:
        return []
    about = "about " if estimated else ""
    return [
        f"  rounding to half precision loses {about}{100 * loss:.1f} % of the "
        "edit; --dtype float32 keeps it"
    ]


def extra_lines(names):
    """Return the line that says what is no weight and stays the base's."""
    if not names:
        return []
    return [f"  kept from the base, though it differs: {listed(names)}"]


def extra_notes(names):
    """Return the note of a card for `extra_lines`."""
    return [f"Kept from the base: {', '.join(names)}."] if names else []


def stored_size(vector, encoding):
    """Return how many bytes of tensors a stored vector takes."""
    from speechbrain_taskarith.vectors import as_state
    from speechbrain_taskarith.vectors.encodings import encode

    stored = as_state(encode(dict(vector), encoding)[0])
    return sum(stored.info(name).nbytes for name in stored)


def written(output, state, dry_run=False, **more):
    """Return the result that says what was written, or would be."""
    found = numbers(state)
    line = (
        f"{'would write' if dry_run else 'wrote'} {output}: "
        f"{counted(found['tensors'], 'tensor')}, "
        f"{counted(found['parameters'], 'parameter')}, {size(found['bytes'])}"
    )
    data = {"output": str(output), "dry_run": dry_run, **found, **more}
    return Result([line], data)
