"""Manifests as SpeechBrain's recipes read them, with any text."""

import csv
import math

# What a recogniser learns from: the columns that it needs of `load_rows`.
SPEECH = ("duration", "wav", "text")


def load_rows(path, data_root, needed=()):
    """Read a manifest: `{ID: {duration, wav, ...}}`.

    `data_root` stands for `$data_root` in `wav`; `needed`: columns that it
    must have besides ID, and then rows, too. SpeechBrain's reader takes every
    `$` for a variable's, "$100" in a transcript too.
    """
    rows = {}
    for row in _cells(path, ("ID", *needed)):
        key = row.pop("ID")
        if key in rows:
            raise ValueError(
                f"{path}: ID {key!r} stands there twice; give each utterance "
                "its own"
            )
        rows[key] = row
        if row.get("wav"):
            row["wav"] = row["wav"].replace("$data_root", str(data_root))
        if "duration" in row:
            row["duration"] = _seconds(path, key, row["duration"])
    if needed and not rows:
        raise ValueError(f"{path}: no utterances")
    return rows


def _cells(path, needed):
    """Yield the rows of a table, with or without a byte order mark."""
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        columns = reader.fieldnames or []
        for column in needed:
            if column not in columns:
                raise ValueError(
                    f"{path}: no column {column!r}; found {', '.join(columns)}"
                )
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}: line {reader.line_num}: expected "
                    f"{len(columns)} cells, as in the first line; a text with "
                    'a comma stands in quotes ("well, yes")'
                )
            yield row


def _seconds(path, key, text):
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(
            f"{path}: {key}: duration {text!r}; expected a number of seconds, "
            "such as 2.5"
        )
    return seconds
