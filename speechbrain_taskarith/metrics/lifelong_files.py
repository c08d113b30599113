"""A WER matrix on disk: CSV to look at, JSON to pass on, CL-MASR's log.

CL-MASR (Della Libera et al., "CL-MASR: A Continual Learning Benchmark for
Multilingual ASR", 2023) computes its tables from the train log of a run:
one line per test, in the order the tests are made. A matrix written here
can be put beside its logs and analysed by its script.
"""

import csv
import io
import json
from pathlib import Path

from speechbrain_taskarith.utils.files import atomic_write


def codec(path):
    """Choose encoder and decoder by a file's suffix."""
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


_CODECS = {".csv": (_to_csv, _from_csv), ".json": (_to_json, _from_json)}

# Characters by which the benchmark's script splits file names and lines.
_SEPARATORS = (",", ": ", " - ", "/", "\\", "\n", "_base=", "_new=", ".txt")


def write_cl_masr_log(matrix, folder, method, seed=None):
    """Write a matrix as the train log of a CL-MASR run.

    The first domain takes the part of CL-MASR's base languages. Its script
    reads `test WER` line by line: first the base, then after every new
    domain the base and all new ones so far.

    Arguments
    ---------
    matrix : LifelongMatrix
        Two domains or more, every `R[k][j]` with j <= k recorded.
    folder : str or pathlib.Path
        Where the log goes; give this folder to `analyze_logs.py`.
    method : str
        The name in its tables and legends. Its script takes what stands
        before the first underscore, so underscores become hyphens.
    seed : int or None
        Named in the file, so that several runs of a method lie side by side
        (its script averages them).

    Returns
    -------
    pathlib.Path
        `<method>[_seed<seed>]_base=<first>_new=<others, by comma>.txt`, as
        the script wants it.

    Raises
    ------
    ValueError
        Fewer than two domains, or a name with a character by which the
        script splits lines or file names.
    KeyError
        A WER that has not been recorded.

    Example
    -------
    >>> from speechbrain_taskarith.metrics import LifelongMatrix
    >>> matrix = LifelongMatrix(["us", "de"])
    >>> for after, on, wer in [
    ...     ("us", "us", 10), ("de", "us", 12), ("de", "de", 20.5)
    ... ]:
    ...     matrix.record(after, on, wer)
    >>> path = write_cl_masr_log(matrix, getfixture("tmp_path"), "ties")
    >>> path.name
    'ties_base=us_new=de.txt'
    >>> print(path.read_text(encoding="utf-8").strip())
    learned: us, tested: us - test WER: 10.000000
    learned: de, tested: us - test WER: 12.000000
    learned: de, tested: de - test WER: 20.500000
    """
    domains = matrix.domains
    if len(domains) < 2:
        raise ValueError(
            f"a CL-MASR log needs two domains or more, got {list(domains)}"
        )
    method = method.replace("_", "-")
    for name in (method, *domains):
        clash = [mark for mark in _SEPARATORS if mark in name]
        if clash or name != name.strip() or not name:
            raise ValueError(
                f"the name {name!r} cannot stand in a CL-MASR log: its "
                "script splits lines and file names by "
                f"{', '.join(map(repr, _SEPARATORS))}; rename it"
            )
    lines = [
        f"learned: {after}, tested: {on} - test WER: {matrix[after, on]:.6f}\n"
        for k, after in enumerate(domains)
        for on in domains[: k + 1]
    ]
    run = method if seed is None else f"{method}_seed{int(seed)}"
    name = f"{run}_base={domains[0]}_new={','.join(domains[1:])}.txt"
    path = Path(folder) / name
    with atomic_write(path, "w") as stream:
        stream.writelines(lines)
    return path
