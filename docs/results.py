"""Make the tables of results.md from the `summary.json` files of studies.

    python docs/results.py                   write the tables into results.md
    python docs/results.py NAME FOLDER       take a study's summary.json first

`figures/NAME/summary.json` holds the figures, `results.yaml` says what of them
is shown, and the page has a place for it: `<!-- figures: NAME -->`.
"""

import json
import re
import sys
from pathlib import Path

import yaml

from speechbrain_taskarith.metrics import Summary
from speechbrain_taskarith.utils.files import atomic_write

DOCS = Path(__file__).parent
PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- up to here -->)", re.S)


def table(name, shown):
    """Return one table in Markdown, `mean ± std` where there are seeds."""
    summary = Summary.load(DOCS / "figures" / name)
    lines = [["", *shown["columns"]], [":--", *["--:"] * len(shown["columns"])]]
    for row, text in shown["rows"].items():
        cells = [
            _cell(summary, table, row, metric)
            for table, metric in shown["columns"].values()
        ]
        lines.append([text, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(summary, table, row, metric):
    value = f"{summary.value(table, row, metric):.1f}"
    try:
        return f"{value} ± {summary.value(table, row, metric, seed='std'):.1f}"
    except KeyError:
        return value


def written(page):
    """Return the page's text with all its tables made anew."""
    shown = yaml.safe_load((DOCS / "results.yaml").read_text(encoding="utf-8"))
    places = [name for _, name, _ in PLACE.findall(page)]
    if sorted(places) != sorted(shown):
        raise ValueError(
            f"results.md has places for {places}, results.yaml shows "
            f"{sorted(shown)}; make them the same"
        )
    return PLACE.sub(
        lambda found: f"{found[1]}\n{table(found[2], shown[found[2]])}\n\n"
        f"{found[3]}",
        page,
    )


def take(name, folder):
    """Keep a study's figures, a row a line."""
    Summary.load(folder)  # an error names what is wrong with it
    target = DOCS / "figures" / name
    target.mkdir(parents=True, exist_ok=True)
    text = (Path(folder) / "summary.json").read_text(encoding="utf-8")
    rows = ",\n".join(json.dumps(row) for row in json.loads(text))
    with atomic_write(target / "summary.json", "w") as stream:
        stream.write(f"[\n{rows}\n]\n")


def main(*arguments):
    """Take a study's figures if one is named, and write the page."""
    if arguments:
        take(*arguments)
    page = DOCS / "results.md"
    text = written(page.read_text(encoding="utf-8"))
    with atomic_write(page, "w") as stream:
        stream.write(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
