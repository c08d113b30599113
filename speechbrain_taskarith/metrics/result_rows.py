"""One result as a row: its keys, its checks, its mean over seeds."""

import math
import re
import statistics

#: The keys of a row, in this order.
KEYS = (
    "table",
    "row",
    "metric",
    "value",
    "unit",
    "split",
    "seed",
    "selected_on",
)

#: Units used where `Summary.add` is given none.
UNITS = {
    "wer": "%",
    "cer": "%",
    "average_wer": "%",
    "relative_reduction": "%",
    "werr": "%",
    "bwt": "points",
    "fwt": "points",
    "im": "points",
    "seconds": "s",
    "trained_parameters": "parameters",
    "scale": "1",
    "density": "1",
}

#: What stands in `seed` of the rows that are computed from several seeds.
AGGREGATES = ("mean", "std")

_TABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def make_row(
    table,
    row,
    metric,
    value,
    unit=None,
    split="test",
    seed=None,
    selected_on=None,
):
    """Build one row and check it.

    Arguments
    ---------
    table : str
        As all that follow: see `Summary.add`.
    row : str
        Name of the row.
    metric : str
        Name of the column.
    value : float
        A finite number.
    unit : str or None
        Its unit.
    split : str
        What was measured on.
    seed : int or None
        Seed of the run.
    selected_on : str or None
        Data on which a choice was made.

    Returns
    -------
    dict
        With the keys `KEYS`, plain types only.

    Raises
    ------
    ValueError
        NaN or infinity, a malformed name, or no unit known.
    TypeError
        A value that is no number.

    Example
    -------
    >>> make_row("t", "ties", "werr", 12)["unit"]
    '%'
    """
    value = _finite(value, f"{table} / {row} / {metric}")
    if seed is not None and (isinstance(seed, bool) or seed != int(seed)):
        raise ValueError(f"seed is {seed!r}, expected a whole number")
    if unit is None and metric not in UNITS:
        raise ValueError(
            f"metric {metric!r} has no usual unit; give unit=... (e.g. "
            "'%', 's', '1')"
        )
    if not _TABLE_NAME.fullmatch(_name(table, "table")):
        raise ValueError(
            f"table {table!r} is to name a file; use letters, digits and "
            "_ . - only"
        )
    if selected_on is not None:
        _name(selected_on, "selected_on")
    return {
        "table": table,
        "row": _name(row, "row"),
        "metric": _name(metric, "metric"),
        "value": value,
        "unit": _name(UNITS[metric] if unit is None else unit, "unit"),
        "split": _name(split, "split"),
        "seed": None if seed is None else int(seed),
        "selected_on": selected_on,
    }


def result_of(entry):
    """Return what a row measures, whatever the seed.

    Arguments
    ---------
    entry : dict
        A row.

    Returns
    -------
    tuple of str
        Table, row, metric, split.
    """
    return entry["table"], entry["row"], entry["metric"], entry["split"]


def by_seed(entry):
    """Key that sorts rows by seed, those without one first.

    Arguments
    ---------
    entry : dict
        A row of one run.

    Returns
    -------
    tuple
        For `sorted`.
    """
    return (entry["seed"] is not None, entry["seed"] or 0)


def aggregated(entries):
    """Return the mean and std rows of one result's seeds.

    Arguments
    ---------
    entries : list of dict
        The rows of one result, one per seed.

    Returns
    -------
    list of dict
        Mean and sample standard deviation (divisor n - 1), or nothing for a
        single seed.
    """
    if len(entries) < 2:
        return []
    values = [entry["value"] for entry in entries]
    chosen = [entry["selected_on"] for entry in entries]
    chosen = sorted({name for name in chosen if name is not None})
    common = {**entries[0], "selected_on": "; ".join(chosen) or None}
    return [
        {**common, "value": math.fsum(values) / len(values), "seed": "mean"},
        {**common, "value": statistics.stdev(values), "seed": "std"},
    ]


def described(entry):
    """Name a row in a message.

    Arguments
    ---------
    entry : dict
        A row.

    Returns
    -------
    str
        Table, row, metric, split and seed.
    """
    return (
        f"{entry['table']} / {entry['row']} / {entry['metric']} on "
        f"{entry['split']} (seed {entry['seed']})"
    )


def difference(known, entry):
    """Say in what two rows of the same result and seed differ.

    Arguments
    ---------
    known : dict
        The row that is there.
    entry : dict
        The other.

    Returns
    -------
    str
        Each differing key with both contents.
    """
    return ", ".join(
        f"{key} {known[key]!r} instead of {entry[key]!r}"
        for key in ("value", "unit", "selected_on")
        if known[key] != entry[key]
    )


def _finite(value, where):
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{where}: value is {value!r}, expected a number"
        ) from None
    if not math.isfinite(number):
        raise ValueError(
            f"{where}: value is {number}; only finite numbers are reported. "
            "Find out where it comes from, or leave the result out"
        )
    return number


def _name(name, what):
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise ValueError(f"{what} is {name!r}, expected a name on one line")
    return name
