"""The two forms of a WER matrix on disk: CSV to look at, JSON to pass on."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Codec(NamedTuple):
    """How a matrix becomes text and comes back.

    Arguments
    ---------
    encode : callable
        `(domains, {(after, on): WER}) -> text`.
    decode : callable
        `text -> (domains, {(after, on): WER})`; raises ValueError, KeyError,
        TypeError or IndexError on text of another kind.
    """

    encode: Callable
    decode: Callable


def codec(path):
    """Choose the form by a file's suffix.

    Arguments
    ---------
    path : str or pathlib.Path
        A `.csv` or `.json` file.

    Returns
    -------
    Codec
        How to write and read it.

    Raises
    ------
    ValueError
        Another suffix.

    Example
    -------
    >>> print(codec("wer.csv").encode(["us", "de"], {("us", "us"): 9.5}))
    after,us,de
    us,9.5,
    de,,
    """
    suffix = Path(path).suffix
    if suffix not in _CODECS:
        raise ValueError(
            f"{path}: unknown suffix {suffix!r}, use .csv or .json"
        )
    return _CODECS[suffix]


def _to_csv(domains, cells):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after", *domains])
    for after in domains:
        row = [cells.get((after, on)) for on in domains]
        # repr() is the shortest text that reads back as the same number.
        writer.writerow([after, *("" if v is None else repr(v) for v in row)])
    return text.getvalue()


def _from_csv(text):
    header, *lines = list(csv.reader(io.StringIO(text)))
    if header[:1] != ["after"]:
        raise ValueError("the first column is not 'after'")
    domains, cells = header[1:], {}
    if [line[0] for line in lines] != domains:
        raise ValueError("its rows are not its columns' domains")
    for after, *values in lines:
        if len(values) != len(domains):
            raise ValueError(f"row {after!r} has {len(values)} cells")
        for on, value in zip(domains, values):
            if value:
                cells[after, on] = float(value)
    return domains, cells


def _to_json(domains, cells):
    content = {
        "domains": list(domains),
        "unit": "%",
        "cells": [
            {"after": after, "on": on, "wer": value}
            for (after, on), value in cells.items()
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _from_json(text):
    content = json.loads(text)
    cells = {
        (cell["after"], cell["on"]): float(cell["wer"])
        for cell in content["cells"]
    }
    return content["domains"], cells


_CODECS = {
    ".csv": Codec(_to_csv, _from_csv),
    ".json": Codec(_to_json, _from_json),
}
