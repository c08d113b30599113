"""The lines of a corpus: manifests read, checked and written as rows."""

import csv
import re
from pathlib import Path

from common.rows import SPEECH, load_rows

from speechbrain_taskarith.utils.files import atomic_write

SPLITS = ("train", "valid", "test")
# It stands in names of files and tables; "_" and "+" join several.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


def check_name(name):
    """Refuse a domain's name that could not stand where names stand."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"domain {name!r}: expected letters of a to z, digits, '-' or '.'"
        )


def read_csv(path, more=()):
    """Read a manifest as dicts, paths made absolute.

    `more`: columns that it needs besides the usual ones.
    """
    path = Path(path).resolve()
    rows = load_rows(path, path.parent, (*SPEECH, *more))
    return [{"ID": key, **row} for key, row in rows.items()]


def tell_long(path, rows, longest):
    """Print how many rows are longer than `longest` seconds."""
    count = sum(row["duration"] > longest for row in rows)
    if count:
        print(
            f"{path}: {count} of {len(rows)} lines are longer than "
            f"{longest:g} s and left out",
            flush=True,
        )


def write_csv(path, rows):
    """Write what `train.py` needs of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as stream:
        columns = ["ID", "duration", "wav", "lang", "text"]
        writer = csv.DictWriter(
            stream, columns, lineterminator="\n", extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(rows)
    return path.resolve()


def check_splits(name, splits):
    """Refuse a line, a recording or a level that is in two splits."""
    for column in ("ID", "wav", "level"):
        seen = {}
        for split, rows in splits.items():
            for row in rows:
                value = row.get(column)
                if value and seen.setdefault(value, split) != split:
                    raise ValueError(
                        f"domain {name}: {column} {value!r} is in the splits "
                        f"{seen[value]!r} and {split!r}; a test on it would "
                        "be no test"
                    )


def check_domains(domains, apart=True):
    """Refuse a recording that two domains share: one would test the other.

    `domains`: `{name: {split: rows}}`. Unless `apart`, both may have it in the
    same split.
    """
    seen = {}
    for name, splits in domains.items():
        for split, rows in splits.items():
            for row in rows:
                first, of = seen.setdefault(row["wav"], (name, split))
                if first != name and (apart or of != split):
                    raise ValueError(
                        f"domains {first} and {name} share the recording "
                        f"{row['wav']}, in the splits {of!r} and {split!r}; "
                        "what one learns or chooses on must not be of the "
                        "other"
                    )
