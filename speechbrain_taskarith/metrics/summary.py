"""What a run leaves behind: one list of results, and its tables.

Every recipe and the quickstart fill a `Summary`; the tables on screen, in
`results.md` and in the CSV files are all made from the same rows as
`summary.json`, so no figure can differ between them.
"""

import csv
import io
import json
import logging
from pathlib import Path

from speechbrain_taskarith.metrics import tables
from speechbrain_taskarith.utils.files import atomic_write, read_json

logger = logging.getLogger(__name__)


class Summary:
    """The results of a run as rows, and everything made from them.

    A row is `{"table", "row", "metric", "value", "unit", "split", "seed",
    "selected_on"}`. Where a result (same table, row, metric, split) was
    added for two seeds or more, two further rows are appended when the rows
    are read, with `"mean"` and `"std"` for the seed; the standard deviation
    is that of a sample (divisor n - 1). A row chosen on real target speech
    or on a test set is marked as an oracle in the tables.

    Arguments
    ---------
    folder : str or pathlib.Path
        The run's output folder; made by `write` where missing.
    title : str
        Heading of `results.md`.

    Example
    -------
    >>> summary = Summary(getfixture("tmp_path"), title="SYN2REAL on FSDD")
    >>> for seed, value in [(0, 8.0), (1, 10.0)]:
    ...     summary.add(
    ...         table="syn2real", row="edited", metric="wer", value=value,
    ...         split="test", seed=seed, selected_on="synthetic_target"
    ...     )
    >>> [(row["seed"], round(row["value"], 3)) for row in summary.rows()]
    [(0, 8.0), (1, 10.0), ('mean', 9.0), ('std', 1.414)]
    >>> sorted(path.name for path in summary.write())
    ['results.md', 'summary.json', 'syn2real.csv']
    """

    def __init__(self, folder, title="Results"):
        self.folder = Path(folder)
        self.title = title
        self._rows = {}
        self._notes = []

    def add(
        self,
        *,
        table,
        row,
        metric,
        value,
        unit=None,
        split="test",
        seed=None,
        selected_on=None,
    ):
        """Add one result.

        Arguments
        ---------
        table : str
            Name of the table (letters, digits, `_.-`: it names a file).
        row : str
            Name of the row, e.g. `"baseline"`, `"ties"`.
        metric : str
            Name of the column, e.g. `"wer"`.
        value : float
            A finite number (a tensor or NumPy scalar will do).
        unit : str or None
            Unit of the value; None takes the usual one (`tables.UNITS`).
        split : str
            What was measured on: `"test"`, `"valid"`, `"train"`, ...
        seed : int or None
            Seed of the run.
        selected_on : str or None
            Data on which a scale or another choice was made (e.g.
            `"synthetic_target"`, `"real_source"`); None where nothing was
            chosen. `"real_target"` and `"test"` mark an oracle.

        Raises
        ------
        ValueError
            NaN or infinity, a malformed name, no unit known, another unit
            than the same metric has in the same table, or another value
            for a result that is there already.
        """
        self._insert(
            tables.make_row(
                table, row, metric, value, unit, split, seed, selected_on
            )
        )

    def add_paired_test(self, table, row, test, prefix="", **run):
        """Add a `PairedBootstrap` as four results of a row.

        Arguments
        ---------
        table, row : str
            See `add`.
        test : PairedBootstrap
            In points.
        prefix : str
            Of the names `difference`, `low`, `high` and `p_value`.
        **run
            `split`, `seed` and `selected_on`, see `add`.

        Example
        -------
        >>> from speechbrain_taskarith.metrics import paired_bootstrap, wer
        >>> said = ["a b", "c d", "e f"]
        >>> test = paired_bootstrap(wer(said, ["a", "c", "e f"]), wer(said, said))
        >>> summary = Summary(getfixture("tmp_path"))
        >>> summary.add_paired_test("paired", "ours against rival", test, seed=0)
        >>> [row["metric"] for row in summary.rows()]
        ['difference', 'low', 'high', 'p_value']
        """
        for metric, value, unit in (
            ("difference", test.difference, "points"),
            ("low", test.low, "points"),
            ("high", test.high, "points"),
            ("p_value", test.p_value, "1"),
        ):
            self.add(
                table=table,
                row=row,
                metric=f"{prefix}{metric}",
                value=value,
                unit=unit,
                **run,
            )

    def _insert(self, entry):
        key = tables.result_of(entry) + (entry["seed"],)
        known = self._rows.get(key, entry)
        if known != entry:
            raise ValueError(
                f"{tables.described(entry)} is there already with "
                f"{tables.difference(known, entry)}; a result is added once"
            )
        column = entry["table"], entry["metric"]
        for other in self._rows.values():
            if (other["table"], other["metric"]) != column:
                continue
            if other["unit"] != entry["unit"]:
                raise ValueError(
                    f"{tables.described(entry)} is in {entry['unit']!r}, the "
                    f"same metric of row {other['row']!r} in "
                    f"{other['unit']!r}; use one unit in a table"
                )
            break
        self._rows[key] = entry

    def note(self, text):
        """Add a remark in Markdown above the tables; see `markdown`."""
        if text not in self._notes:
            self._notes.append(text)

    def rows(self, table=None):
        """Return all rows, those over several seeds included.

        Arguments
        ---------
        table : str or None
            Only this table.

        Returns
        -------
        list of dict
            By result in order of first appearance; within a result by seed,
            then `"mean"` and `"std"`.
        """
        results = {}
        for entry in self._rows.values():
            if table in (None, entry["table"]):
                results.setdefault(tables.result_of(entry), []).append(entry)
        rows = []
        for entries in results.values():
            entries.sort(key=tables.by_seed)
            rows += [dict(entry) for entry in entries]
            rows += tables.aggregated(entries)
        return rows

    @property
    def tables(self):
        """Names of the tables, in order of first appearance."""
        return list(dict.fromkeys(row["table"] for row in self._rows.values()))

    def value(self, table, row, metric, split="test", seed="mean"):
        """Look up one value.

        Arguments
        ---------
        table, row, metric, split : str
            As added.
        seed : int, str or None
            A seed, `"mean"` (of a single run: its value) or `"std"`.

        Returns
        -------
        float
            The value.

        Raises
        ------
        KeyError
            No such result.
        """
        found = {
            entry["seed"]: entry["value"]
            for entry in self.rows(table)
            if tables.result_of(entry) == (table, row, metric, split)
        }
        if seed == "mean" and len(found) == 1:
            return next(iter(found.values()))
        if seed not in found:
            raise KeyError(
                f"no {table} / {row} / {metric} on {split} for seed {seed!r}; "
                f"seeds there: {list(found) or 'none'}"
            )
        return found[seed]

    def write(self):
        """Write `summary.json`, `results.md` and a CSV file per table.

        Each file appears whole or not at all. `results.md` also shows the
        images that lie in the folder's `plots/`, and links those of the runs
        in its sub-folders.

        Returns
        -------
        list of pathlib.Path
            The files.
        """
        self._warn_about_missing_seeds()
        # summary.json goes last: where it stands, the tables stand too.
        contents = {f"{table}.csv": self._csv(table) for table in self.tables}
        contents["results.md"] = self.markdown()
        contents["summary.json"] = (
            json.dumps(self.rows(), indent=1, allow_nan=False) + "\n"
        )
        for name, text in contents.items():
            with atomic_write(self.folder / name, "w") as stream:
                stream.write(text)
        return [self.folder / name for name in contents]

    def markdown(self):
        """Return what `results.md` holds.

        Returns
        -------
        str
            Title, notes, tables and images in Markdown.
        """
        parts = [f"# {self.title}", *self._notes]
        for table in self.tables:
            rows = self.rows(table)
            parts += [f"## {table}", tables.caption(rows)]
            parts.append(tables.to_markdown(tables.layout(rows)))
        for plot in sorted((self.folder / "plots").glob("*.png")):
            parts.append(f"![{plot.stem}](plots/{plot.name})")
        # Of runs that were merged: many, so that links will do.
        links = sorted(self.folder.glob("*/plots/*.png"))
        links = [str(plot.relative_to(self.folder)) for plot in links]
        parts.append("\n".join(f"- [{link}]({link})" for link in links))
        return "\n\n".join(part for part in parts if part) + "\n"

    def print(self, console=None, only=None):
        """Print the tables to the terminal.

        Arguments
        ---------
        console : rich.console.Console or None
            Where to; standard output by default.
        only : sequence of str or None
            Names of the tables to print; None prints all of them.
        """
        for table in self.tables if only is None else only:
            tables.print_table(table, self.rows(table), console)

    def _csv(self, table):
        text = io.StringIO()
        writer = csv.DictWriter(text, tables.KEYS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows(table))
        return text.getvalue()

    def _warn_about_missing_seeds(self):
        """Point out means of one table that are over different seeds."""
        seeds, of_table = {}, {}
        for entry in self._rows.values():
            seeds.setdefault(tables.result_of(entry), set()).add(entry["seed"])
            of_table.setdefault(entry["table"], set()).add(entry["seed"])
        for result, have in seeds.items():
            if missing := of_table[result[0]] - have:
                logger.warning(
                    "table %s: %s / %s on %s is missing for seeds %s; its "
                    "mean is over other seeds than its neighbours'",
                    *result,
                    sorted(missing, key=str),
                )

    @classmethod
    def load(cls, folder, title="Results"):
        """Read the rows of a finished run.

        Arguments
        ---------
        folder : str or pathlib.Path
            An output folder, or a `summary.json` itself.
        title : str
            Heading of `results.md`, should it be written again.

        Returns
        -------
        Summary
            With its rows and notes; means and deviations are computed anew.

        Raises
        ------
        FileNotFoundError
            No `summary.json` there.
        ValueError
            A file that is damaged or holds other content, naming the file
            and the row.
        """
        path = Path(folder)
        if path.suffix != ".json":
            path = path / "summary.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found; give the output folder of a run that has "
                "finished"
            )
        summary = cls(path.parent, title)
        page = path.with_name("results.md")
        if page.is_file():
            top = page.read_text(encoding="utf-8").split("\n## ")[0]
            summary._notes = top.strip().split("\n\n")[1:]
        rows = read_json(path)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: expected a list of rows")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or set(row) != set(tables.KEYS):
                raise ValueError(
                    f"{path}: row {number} does not have the keys "
                    f"{', '.join(tables.KEYS)}"
                )
            if row["seed"] in tables.AGGREGATES:
                continue
            try:
                summary.add(**row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: row {number}: {error}") from error
        return summary


def merge_summaries(folders, output, title="Results"):
    """Bring the summaries of several runs, e.g. seeds, into one.

    Arguments
    ---------
    folders : sequence of str or pathlib.Path
        Output folders of the runs (or their `summary.json` files).
    output, title
        Folder and heading of the merged summary; `.write()` writes it.

    Returns
    -------
    Summary
        All rows, with means and standard deviations over the seeds.

    Raises
    ------
    ValueError
        No runs, or two that hold different values for one result and seed.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> for seed in (0, 1, 2):
    ...     run = Summary(folder / str(seed))
    ...     run.add(table="t", row="r", metric="wer", value=seed, seed=seed)
    ...     _ = run.write()
    >>> runs = [folder / str(seed) for seed in (0, 1, 2)]
    >>> merge_summaries(runs, folder / "all").value("t", "r", "wer")
    1.0
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise ValueError("no runs to merge; give their output folders")
    merged = Summary(output, title)
    for folder in folders:
        run = Summary.load(folder)
        for text in run._notes:
            merged.note(text)
        for entry in run._rows.values():
            try:
                merged._insert(entry)
            except ValueError as error:
                raise ValueError(
                    f"{folder}: {error}. Runs to be merged must differ in "
                    "their seed"
                ) from None
    return merged


def merge_seeds(folder, title="Results", only=None):
    """Merge all seeds under a folder into a `Summary`, write and show it.

    Arguments
    ---------
    folder : str or pathlib.Path
        Holds one output folder for each seed; the table goes beside them.
    title, only
        As `Summary` and its `print` take them; all tables are written.

    Raises
    ------
    FileNotFoundError
        No seed has a summary yet.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> for seed in (0, 1):
    ...     run = Summary(folder / str(seed))
    ...     run.add(table="t", row="r", metric="wer", value=seed, seed=seed)
    ...     _ = run.write()
    >>> merge_seeds(folder).value("t", "r", "wer")
    t...
    0.5
    """
    runs = sorted(path.parent for path in Path(folder).glob("*/summary.json"))
    if not runs:
        raise FileNotFoundError(
            f"{folder}: no */summary.json; run study.py for some seeds first"
        )
    merged = merge_summaries(runs, folder, title=title)
    merged.write()
    merged.print(only=only)
    return merged
