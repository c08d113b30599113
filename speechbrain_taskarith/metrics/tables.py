"""Results as rows, and rows as tables: layout, Markdown, terminal."""

import math
import re
import statistics

from speechbrain_taskarith.utils.optional import require

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
    "bleu": "points",
    "chrf": "points",
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

#: Choosing on these is choosing on what is reported: an upper bound only.
ORACLES = ("real_target", "test")

_TABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def make_row(table, row, metric, value, unit, split, seed, selected_on):
    """Build one row and check it."""
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
    """Return what a row measures, whatever the seed."""
    return entry["table"], entry["row"], entry["metric"], entry["split"]


def by_seed(entry):
    """Key that sorts rows by seed, those without one first."""
    return (entry["seed"] is not None, entry["seed"] or 0)


def aggregated(entries):
    """Return the mean and std rows of one result's seeds."""
    if len(entries) < 2:
        return []
    values = [entry["value"] for entry in entries]
    chosen = [entry["selected_on"] for entry in entries]
    chosen = sorted({name for name in chosen if name is not None})
    common = {**entries[0], "selected_on": "; ".join(chosen) or None}
    return [
        {**common, "value": statistics.fmean(values), "seed": "mean"},
        {**common, "value": statistics.stdev(values), "seed": "std"},
    ]


def described(entry):
    """Name a row in a message."""
    return (
        f"{entry['table']} / {entry['row']} / {entry['metric']} on "
        f"{entry['split']} (seed {entry['seed']})"
    )


def difference(known, entry):
    """Say in what two rows of the same result and seed differ."""
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


def layout(rows):
    """Arrange the rows of one table as a grid of text."""
    metrics, cells, chosen = {}, {}, {}
    for row in rows:
        metrics[row["metric"]] = row["unit"]
        line = (row["row"], row["split"])
        by_seed = cells.setdefault(line, {}).setdefault(row["metric"], {})
        by_seed[row["seed"]] = row["value"]
        if row["selected_on"] is not None and row["seed"] != "std":
            names = row["selected_on"].split("; ")
            chosen.setdefault(line, {}).update(dict.fromkeys(names))
    # As many as the caption names, even where no row has them all.
    most = max(len(_seeds(rows)), 1)
    with_split = len({split for _, split in cells}) > 1
    header = ["", *(["split"] if with_split else [])]
    header += [_heading(metric, unit) for metric, unit in metrics.items()]
    grid = [header + (["chosen on"] if chosen else [])]
    for (name, split), by_metric in cells.items():
        sources = list(chosen.get((name, split), {}))
        # What is edited with several sources' vectors is their ensemble:
        # summary.json has both rows, a table shows them once.
        twins = cells.get(("edited", split)) == cells.get(("ensemble", split))
        if twins and name == "ensemble":
            continue
        if twins and name == "edited":
            name += " (ensemble)"
        if not set(ORACLES).isdisjoint(sources) and "oracle" not in name:
            name += " (oracle)"
        line = [name, *([split] if with_split else [])]
        line += [
            _cell(by_metric.get(metric), unit, most)
            for metric, unit in metrics.items()
        ]
        grid.append(line + ([", ".join(sources)] if chosen else []))
    return grid


def caption(rows):
    """Say what the figures of a table are."""
    splits = ", ".join(dict.fromkeys(row["split"] for row in rows))
    seeds = sorted(_seeds(rows))
    text = f"Measured on: {splits}."
    if len(seeds) > 1:
        text += (
            " Mean ± sample standard deviation (divisor n - 1) over seeds "
            f"{', '.join(map(str, seeds))}."
        )
    elif seeds:
        text += f" One run, seed {seeds[0]}."
    return text


def to_markdown(grid):
    """Turn a grid into a Markdown table."""
    grid = [[cell.replace("|", "\\|") for cell in line] for line in grid]
    widths = [max(map(len, column)) for column in zip(*grid)]
    lines = []
    for line in grid:
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(width) for c, width in zip(line[1:], widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    rule = [":" + "-" * (widths[0] + 1)]
    rule += ["-" * (width + 1) + ":" for width in widths[1:]]
    lines.insert(1, f"|{'|'.join(rule)}|")
    return "\n".join(lines)


def print_table(title, rows, console=None):
    """Print one table to the terminal."""
    rich = {
        name: require(f"rich.{name}", "tables", "printing tables")
        for name in ("box", "console", "table", "text")
    }
    Text = rich["text"].Text
    grid = layout(rows)
    if grid[0][-1] == "chosen on":
        # A cell may wrap at its spaces; no word is ever broken.
        for line in grid:
            line[-1] = line[-1].replace("+", " + ")
    # Names come from users: as Text, brackets in them are no markup.
    table = rich["table"].Table(
        title=Text(title),
        title_justify="left",
        box=rich["box"].SIMPLE_HEAD,
        pad_edge=False,
    )
    for number, column in enumerate(zip(*grid)):
        table.add_column(
            Text(column[0]),
            justify="right" if number else "left",
            no_wrap=not number,
            min_width=max(len(w) for cell in column for w in cell.split(" ")),
        )
    for line in grid[1:]:
        table.add_row(*map(Text, line))
    console = console or rich["console"].Console()
    console.print(table)
    # Not the table's own caption, which would be squeezed to its width.
    console.print(Text(caption(rows), style="dim"))


def number(value, unit):
    """Write a number as the tables show it."""
    if unit in ("%", "points"):
        return f"{round(value, 2) + 0.0:.2f}"  # no "-0.00"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _heading(metric, unit):
    metric = metric.replace("_", " ")
    # "trained parameters (parameters)" would say it twice.
    if unit in ("1", "") or metric.endswith(unit):
        return metric
    return f"{metric} ({unit})"


def _seeds(rows):
    return {row["seed"] for row in rows} - {None, *AGGREGATES}


def _runs(by_seed):
    return len(by_seed.keys() - AGGREGATES)


def _cell(by_seed, unit, most):
    if by_seed is None:
        return "–"
    if "mean" not in by_seed:
        text = number(next(iter(by_seed.values())), unit)
    else:
        mean, std = (number(by_seed[key], unit) for key in AGGREGATES)
        text = f"{mean} ± {std}"
    runs = _runs(by_seed)
    return text if runs in (0, most) else f"{text} (n={runs})"
