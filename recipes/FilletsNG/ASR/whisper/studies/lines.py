"""The lines of a corpus: manifests read, checked and written as rows."""

import csv
from pathlib import Path

from manifest_checks import check_columns

from speechbrain_taskarith.utils.files import atomic_write

SPLITS = ("train", "valid", "test")


def read_csv(path, more=()):
    """Read a manifest as dicts, paths made absolute.

    `more`: columns that it needs besides the usual ones.
    """
    path = Path(path).resolve()
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    check_columns(path, rows, more)
    for row in rows:
        row["wav"] = row["wav"].replace("$data_root", str(path.parent))
    return rows


def tell_long(path, rows, longest):
    """Print how many rows are longer than `longest` seconds."""
    count = sum(float(row["duration"]) > longest for row in rows)
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
    """Refuse a line, or a level, that is in two splits."""
    for column in ("ID", "level"):
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
