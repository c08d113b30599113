"""What a scale search found: best setting, table, CSV and plot."""

import csv
import io
import math

from speechbrain_taskarith.metrics.plots import plot_scale_curve
from speechbrain_taskarith.utils.files import atomic_write

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
        True where the choice used the target's real speech.
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

        One line for the common scale, one for each group around the best
        setting (see `metrics.plot_scale_curve`).

        Arguments
        ---------
        path : str or pathlib.Path
            `.png`, `.pdf` or `.svg`; written atomically.
        """
        chosen = sorted({(s, self.best_wer) for s in self._setting.values()})
        lines = self._lines()
        plot_scale_curve(
            lines,
            path,
            baseline=next(iter(lines.values())).get(0.0),
            ylabel=f"WER on {self.select_on}",
            **{"oracle" if self.oracle else "chosen": chosen},
        )

    def _lines(self):
        """Return `{label: {scale: WER}}` of what was evaluated."""
        rows = [row for row in self.table if _is_finite(row["wer"])]
        lines = {"all parameters": {}}
        for row in rows:
            scales = {row[self._column(group)] for group in self._patterns}
            if len(scales) == 1:
                lines["all parameters"][scales.pop()] = row["wer"]
        for group in self._patterns if len(self._patterns) > 1 else ():
            others = {
                self._column(g): scale
                for g, scale in self._setting.items()
                if g != group
            }
            line = {
                row[self._column(group)]: row["wer"]
                for row in rows
                if all(row[column] == s for column, s in others.items())
            }
            if len(line) > 1:
                lines[f"{group} (others at their best)"] = line
        return lines

    def _column(self, group):
        return "scale" if list(self._patterns) == [REST] else f"scale {group}"

    def add(self, setting, **values):
        """Enter what was found at a setting; for `search_scale`.

        Arguments
        ---------
        setting : dict
            `{group: scale}`.
        **values : object
            Further columns.

        Returns
        -------
        dict
            The row.
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
        """Mark a setting as the best; for `search_scale`.

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


def _is_finite(value):
    return value is not None and math.isfinite(value)
