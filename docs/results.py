"""Make the tables and pictures of results*.md from studies' `summary.json`.

    python docs/results.py                   write the tables into the pages,
                                             the pictures into figures
    python docs/results.py NAME FOLDER       take a study's summary.json first

`figures/NAME/summary.json` holds the figures, `results.yaml` says what of them
is shown, and a page has a place for it: `<!-- figures: NAME -->`. The picture
of a study is `figures/NAME.png`, its curves `figures/NAME_curves.png`.
"""

import csv
import json
import re
import sys
from pathlib import Path

import yaml

from speechbrain_taskarith.metrics import Summary, plot_by_row
from speechbrain_taskarith.metrics.plots import (
    draw_line,
    figure,
    label_axes,
    legend_below,
)
from speechbrain_taskarith.utils.files import atomic_write

DOCS = Path(__file__).parent
PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- up to here -->)", re.S)


def table(name, shown):
    """Return one table in Markdown: `mean ± std` where there are seeds.

    A column of four names is a table, a metric, and the ends of its interval.
    With `seeds` the last column counts them, where rows have different ones.
    """
    summary = Summary.load(DOCS / "figures" / name)
    counted = ["seeds"] * shown.get("seeds", False)
    names = [*shown["columns"], *counted]
    lines = [["", *names], [":--", *["--:"] * len(names)]]
    for row, text in shown["rows"].items():
        cells = [
            _cell(summary, table, row, *metrics)
            for table, *metrics in shown["columns"].values()
        ]
        first = next(iter(shown["columns"].values()))
        cells += [str(_seeds(summary, row, *first)) for _ in counted]
        lines.append([text, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(summary, table, row, metric, *interval):
    rows = {e["row"] for e in summary.rows(table) if e["metric"] == metric}
    if rows and row not in rows:
        return ""  # only others have it
    value = f"{summary.value(table, row, metric):.1f}"
    if interval:
        ends = [f"{summary.value(table, row, end):.1f}" for end in interval]
        return f"{value} [{', '.join(ends)}]"
    try:
        return f"{value} ± {summary.value(table, row, metric, seed='std'):.1f}"
    except KeyError:
        return value


def _seeds(summary, row, table, metric):
    """Count the seeds that a row has."""
    return len(
        {
            entry["seed"]
            for entry in summary.rows(table)
            if (entry["row"], entry["metric"]) == (row, metric)
            and isinstance(entry["seed"], int)
        }
    )


def picture(name, shown, folder=DOCS / "figures"):
    """Draw the same metric of several tables, with a dot for each seed."""
    summary = Summary.load(DOCS / "figures" / name)
    texts, metric = shown["rows"], shown["metric"]
    panels = {panel: {} for panel in shown["panels"]}
    for panel, table in shown["panels"].items():
        for entry in summary.rows(table):
            if entry["metric"] == metric and isinstance(entry["seed"], int):
                row = panels[panel].setdefault(entry["row"], [])
                row.append(entry["value"])
    return plot_by_row(
        {
            panel: {text: found[row] for row, text in texts.items()}
            for panel, found in panels.items()
        },
        folder / f"{name}.png",
        before=texts[shown["before"]],
        ours=[texts[row] for row in shown["ours"]],
        bounds=[texts[row] for row in shown["bounds"]],
        xlabel=shown["xlabel"],
    )


def curves(name, shown, folder=DOCS / "figures"):
    """Draw curves of a study's plot, whose points stand in a CSV."""
    with open(DOCS / "figures" / name / f"{shown['plot']}.csv") as stream:
        points = list(csv.DictReader(stream))
    x, y = shown["labels"]
    path = folder / f"{name}_curves.png"
    with figure(path) as axes:
        for number, (row, text) in enumerate(shown["rows"].items()):
            own = [point for point in points if point["row"] == row]
            places = ([float(point[axis]) for point in own] for axis in (x, y))
            draw_line(axes, *places, number, text)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        label_axes(axes, *shown["labels"].values(), "")
        legend_below(axes)
    return path


DRAW = {"picture": picture, "curves": curves}


def read_shown():
    """Return what results.yaml says."""
    return yaml.safe_load((DOCS / "results.yaml").read_text(encoding="utf-8"))


def pages():
    """Return the pages' texts by path, with all their tables made anew."""
    shown, texts = read_shown(), {}
    for path in sorted(DOCS.glob("results*.md")):
        texts[path] = path.read_text(encoding="utf-8")
    places = [p[1] for text in texts.values() for p in PLACE.findall(text)]
    if sorted(places) != sorted(shown):
        raise ValueError(
            f"the pages have places for {places}, results.yaml shows "
            f"{sorted(shown)}; make them the same"
        )
    return {path: written(text, shown) for path, text in texts.items()}


def written(page, shown):
    """Return one page's text with its tables made anew."""
    return PLACE.sub(
        lambda found: f"{found[1]}\n{table(found[2], shown[found[2]])}\n\n"
        f"{found[3]}",
        page,
    )


def take(name, folder):
    """Keep the figures of a study that are shown, a row a line."""
    Summary.load(folder)  # an error names what is wrong with it
    shown = read_shown()[name]
    tables = {column[0] for column in shown["columns"].values()}
    tables |= set(shown.get("picture", {}).get("panels", {}).values())
    target = DOCS / "figures" / name
    target.mkdir(parents=True, exist_ok=True)
    text = (Path(folder) / "summary.json").read_text(encoding="utf-8")
    rows = [row for row in json.loads(text) if row["table"] in tables]
    with atomic_write(target / "summary.json", "w") as stream:
        lines = ",\n".join(map(json.dumps, rows))
        stream.write(f"[\n{lines}\n]\n")
    if "curves" in shown:
        plot = f"{shown['curves']['plot']}.csv"
        text = (Path(folder) / "plots" / plot).read_text(encoding="utf-8")
        with atomic_write(target / plot, "w") as stream:
            stream.write(text)


def main(*arguments):
    """Take a study's figures if one is named; write the page, draw."""
    if arguments:
        take(*arguments)
    for page, text in pages().items():
        with atomic_write(page, "w") as stream:
            stream.write(text)
    for name, shown in read_shown().items():
        for kind in shown.keys() & DRAW.keys():
            DRAW[kind](name, shown[kind])


if __name__ == "__main__":
    main(*sys.argv[1:])
