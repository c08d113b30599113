"""Manifests as SpeechBrain's recipes read them, with any text."""

import csv


def csv_rows(path):
    """Read a manifest as dicts, with or without a byte order mark."""
    with open(path, encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream, skipinitialspace=True))


def load_rows(path, data_root):
    """Read a manifest: `{ID: {duration, wav, ...}}`.

    `data_root` stands for `$data_root` in `wav`. SpeechBrain's reader takes
    every `$` for a variable's, "$100" in a transcript too.
    """
    rows = {}
    for row in csv_rows(path):
        if "ID" not in row:
            raise ValueError(f"{path}: no column 'ID'; found {', '.join(row)}")
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
    return rows


def _seconds(path, key, text):
    try:
        return float(text)
    except (TypeError, ValueError):
        raise ValueError(
            f"{path}: {key}: duration {text!r}; expected a number of seconds, "
            "such as 2.5"
        ) from None
