"""From the rows of a summary to tables: layout, Markdown, terminal."""

from speechbrain_taskarith.utils.optional import require

#: Choosing on these is choosing on what is reported: an upper bound only.
ORACLES = ("real_target", "test")

_TWO_DECIMALS = ("%", "points")


def layout(rows):
    """Arrange the rows of one table as a grid of text.

    Arguments
    ---------
    rows : list of dict
        `Summary.rows(table)`.

    Returns
    -------
    list of list of str
        First the header. One line per row name and split, one column per
        metric; a cell is `mean ± std` where there are several seeds (with
        the number of seeds where neighbours have more), or else the value.
        A column `split` and a column `chosen on` appear where they say
        something.

    Example
    -------
    >>> row = {"table": "t", "row": "best", "metric": "wer", "value": 3,
    ...        "unit": "%", "split": "test", "seed": 0,
    ...        "selected_on": "real_target"}
    >>> layout([row])
    [['', 'wer (%)', 'chosen on'], ['best (oracle)', '3.00', 'real_target']]
    """
    metrics, cells, chosen = {}, {}, {}
    for row in rows:
        metrics[row["metric"]] = row["unit"]
        line = (row["row"], row["split"])
        by_seed = cells.setdefault(line, {}).setdefault(row["metric"], {})
        by_seed[row["seed"]] = row["value"]
        if row["selected_on"] is not None and row["seed"] != "std":
            names = row["selected_on"].split("; ")
            chosen.setdefault(line, {}).update(dict.fromkeys(names))
    most = max(
        (_runs(seeds) for line in cells.values() for seeds in line.values()),
        default=1,
    )
    with_split = len({split for _, split in cells}) > 1
    header = ["", *(["split"] if with_split else [])]
    header += [_heading(metric, unit) for metric, unit in metrics.items()]
    grid = [header + (["chosen on"] if chosen else [])]
    for (name, split), by_metric in cells.items():
        if _is_twin(name, cells, split):
            continue
        sources = list(chosen.get((name, split), {}))
        oracle = any(source in ORACLES for source in sources)
        for twin in _TWINS:
            if _TWINS[twin] == name and _is_twin(twin, cells, split):
                name += f" ({twin})"
        if oracle and "oracle" not in name:
            name += " (oracle)"
        line = [name, *([split] if with_split else [])]
        line += [
            _cell(by_metric.get(metric), unit, most)
            for metric, unit in metrics.items()
        ]
        grid.append(line + ([", ".join(sources)] if chosen else []))
    return grid


def caption(rows):
    """Say what the figures of a table are.

    Arguments
    ---------
    rows : list of dict
        `Summary.rows(table)`.

    Returns
    -------
    str
        Splits and seeds in a sentence or two.
    """
    splits = ", ".join(dict.fromkeys(row["split"] for row in rows))
    seeds = {row["seed"] for row in rows} - {None, "mean", "std"}
    text = f"Measured on: {splits}."
    if len(seeds) > 1:
        text += (
            " Mean ± sample standard deviation (divisor n - 1) over seeds "
            f"{', '.join(str(seed) for seed in sorted(seeds))}."
        )
    elif seeds:
        text += f" One run, seed {seeds.pop()}."
    return text


def to_markdown(grid):
    """Turn a grid into a Markdown table.

    Arguments
    ---------
    grid : list of list of str
        What `layout` returned.

    Returns
    -------
    str
        The table; the first column to the left, the others to the right.

    Example
    -------
    >>> print(to_markdown([["", "wer (%)"], ["baseline", "9.00"]]))
    |          | wer (%) |
    |:---------|--------:|
    | baseline |    9.00 |
    """
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
    """Print one table to the terminal.

    Arguments
    ---------
    title : str
        Above it.
    rows : list of dict
        `Summary.rows(table)`.
    console : rich.console.Console or None
        Where to; standard output by default.
    """
    rich = {
        name: require(f"rich.{name}", "recipes", "printing tables")
        for name in ("box", "console", "table", "text")
    }
    Text = rich["text"].Text
    # A cell may wrap at its spaces; no word is ever broken.
    grid = [[c.replace("+", " + ") for c in line] for line in layout(rows)]
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
    """Write a number as the tables show it.

    Arguments
    ---------
    value : float
        The number.
    unit : str
        Its unit: percentages and points get two decimals, whole numbers
        none, everything else four significant digits.

    Returns
    -------
    str
        The text.

    Example
    -------
    >>> number(12.345, "%"), number(752640, "parameters"), number(0.4, "1")
    ('12.35', '752,640', '0.4')
    """
    if unit in _TWO_DECIMALS:
        return f"{value:.2f}"
    if value == int(value):
        return f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


# What is edited with several sources' vectors is their ensemble: summary.json
# has both rows, a table shows them once.
_TWINS = {"ensemble": "edited"}


def _is_twin(name, cells, split):
    twin = cells.get((_TWINS.get(name), split))
    return twin is not None and twin == cells.get((name, split))


def _heading(metric, unit):
    metric = metric.replace("_", " ")
    # "trained parameters (parameters)" would say it twice.
    if unit in ("1", "") or metric.endswith(unit):
        return metric
    return f"{metric} ({unit})"


def _runs(by_seed):
    return sum(seed not in ("mean", "std") for seed in by_seed)


def _cell(by_seed, unit, most):
    if by_seed is None:
        return "–"
    if "mean" not in by_seed:
        text = number(next(iter(by_seed.values())), unit)
    else:
        text = f"{number(by_seed['mean'], unit)} ± "
        text += number(by_seed["std"], unit)
    runs = _runs(by_seed)
    return text if runs in (0, most) else f"{text} (n={runs})"
