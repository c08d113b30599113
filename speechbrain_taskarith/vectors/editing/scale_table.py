"""What a scale search found: best setting, table, CSV and plot."""

import csv
import io
import math
from pathlib import Path

from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.optional import require

# The group of the parameters that no given group holds.
REST = "*"


class ScaleSearch:
    """What a search found; made by `search_scale`.

    Arguments
    ---------
    split : str
        The split that was evaluated.
    select_on : str
        What the choice is called in tables.
    oracle : bool
        True where the target's real speech was looked at.
    patterns : dict
        `{group: [pattern, ...]}`; one group `"*"` without groups.
    """

    def __init__(self, split, select_on, oracle, patterns):
        self.split, self.select_on, self.oracle = split, select_on, oracle
        self._patterns = patterns
        self._setting = None
        #: Rows in the order tried: `scale` (without groups) or one column a
        #: group, `wer`, `domains`, `seconds`, `state` (`ok`, `hopeless`,
        #: `forbidden`, `skipped`), `best`, `split`, `select_on`, `oracle`.
        self.table = []

    @property
    def best(self):
        """The best scale; with groups `{pattern: scale}`, as `apply` takes."""
        if list(self._patterns) == [REST]:
            return self._setting[REST]
        return {
            pattern: self._setting[group]
            for group, patterns in self._patterns.items()
            for pattern in patterns
        }

    @property
    def best_by_group(self):
        """The best scale of each group: `{group: scale}`."""
        return dict(self._setting)

    @property
    def best_wer(self):
        """The (mean) word error rate at the best setting."""
        return next(row["wer"] for row in self.table if row["best"])

    def to_csv(self, path):
        """Write the table.

        Arguments
        ---------
        path : str or pathlib.Path
            Written atomically. Domains get a column each.
        """
        rows, columns = [], []
        for row in self.table:
            flat = {k: v for k, v in row.items() if k != "domains"}
            for name, value in (row["domains"] or {}).items():
                flat[f"wer {name}"] = value
            rows.append(flat)
            columns += [key for key in flat if key not in columns]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(path, "w") as stream:
            stream.write(text.getvalue())

    def to_dict(self):
        """Return plain types, for a card or a summary.

        Returns
        -------
        dict
            Best setting, its WER, and the table.
        """
        return {
            "best": self.best,
            "best_wer": self.best_wer,
            "split": self.split,
            "select_on": self.select_on,
            "oracle": self.oracle,
            "table": [dict(row) for row in self.table],
        }

    def plot(self, path):
        """Plot word error rate against scale.

        One line for the common scale and one for each group around the best
        setting; the chosen point is marked.

        Arguments
        ---------
        path : str or pathlib.Path
            `.png`, `.pdf` or `.svg`; written atomically.
        """
        require("matplotlib", "plots", "plotting")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for label, points in self._lines().items():
            points = sorted(points)
            axes.plot(*zip(*points), marker="o", markersize=4, label=label)
        axes.plot(
            list(self._setting.values()),
            [self.best_wer] * len(self._setting),
            marker="*",
            markersize=13,
            color="black",
            linestyle="none",
            label="chosen (oracle)" if self.oracle else "chosen",
        )
        axes.set_xlabel("scale")
        axes.set_ylabel(f"WER on {self.select_on}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        kind = Path(path).suffix.lstrip(".") or "png"
        with atomic_write(path) as stream:
            figure.savefig(stream, format=kind, dpi=150)

    def _lines(self):
        """Return `{label: [(scale, WER), ...]}` of what was evaluated."""
        groups = list(self._patterns)
        rows = [row for row in self.table if finite(row["wer"])]
        lines = {}
        for row in rows:
            values = [row[self._column(group)] for group in groups]
            if len(set(values)) == 1:
                point = (values[0], row["wer"])
                lines.setdefault("all parameters", []).append(point)
        for group in groups if len(groups) > 1 else []:
            others = [g for g in groups if g != group]
            points = [
                (row[self._column(group)], row["wer"])
                for row in rows
                if all(row[self._column(g)] == self._setting[g] for g in others)
            ]
            if len(points) > 1:
                lines[f"{group} (others at their best)"] = points
        return lines

    def _column(self, group):
        return "scale" if list(self._patterns) == [REST] else f"scale {group}"

    def add(self, setting, **values):
        """Add a row.

        Arguments
        ---------
        setting : dict
            `{group: scale}`.
        **values : object
            What was found.

        Returns
        -------
        dict
            The row, as it stands in the table.
        """
        row = {self._column(group): s for group, s in setting.items()}
        row |= values
        row |= {
            "best": False,
            "split": self.split,
            "select_on": self.select_on,
            "oracle": self.oracle,
        }
        self.table.append(row)
        return row

    def choose(self, setting):
        """Mark a setting as the best.

        Arguments
        ---------
        setting : dict
            `{group: scale}`.
        """
        self._setting = setting
        columns = {self._column(g): s for g, s in setting.items()}
        for row in self.table:
            row["best"] = row["state"] == "ok" and all(
                row[column] == scale for column, scale in columns.items()
            )


def finite(value):
    """Tell whether a value is a number that is neither NaN nor infinite.

    Arguments
    ---------
    value : float or None
        A word error rate.

    Returns
    -------
    bool
        False for None too.
    """
    return value is not None and math.isfinite(value)
