"""What a scale search found: best setting, table, CSV and plot."""

import csv

from speechbrain_taskarith.metrics.plots import plot_scale_curve
from speechbrain_taskarith.utils.files import atomic_write

# The group of the parameters that no given group holds.
REST = "*"


class ScaleSearch:
    """What a search found; made by `search_scale`.

    Arguments
    ---------
    split, select_on : str
        The split that was evaluated, and what the choice is called.
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
        rows = []
        for row in self.table:
            domains = row["domains"] or {}
            flat = row | {f"wer {name}": v for name, v in domains.items()}
            del flat["domains"]
            rows.append(flat)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with atomic_write(path, "w") as stream:
            writer = csv.DictWriter(stream, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def to_dict(self):
        """Return plain types: best setting, its WER, table; see `ScaleSearch`."""
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
        rows = [row for row in self.table if row["wer"] is not None]
        lines = {"all parameters": {}}
        for row in rows:
            scales = {row[column] for column in self._columns(self._setting)}
            if len(scales) == 1:
                lines["all parameters"][scales.pop()] = row["wer"]
        for group in self._setting if len(self._setting) > 1 else ():
            others = self._columns(self._setting)
            del others[f"scale {group}"]
            line = {
                row[f"scale {group}"]: row["wer"]
                for row in rows
                if others.items() <= row.items()
            }
            if len(line) > 1:
                lines[f"{group} (others at their best)"] = line
        return lines

    def _columns(self, setting):
        if list(self._patterns) == [REST]:
            return {"scale": setting[REST]}
        return {f"scale {group}": scale for group, scale in setting.items()}

    def add(self, setting, **values):
        """Enter what was found at a setting; as `search_scale` does."""
        row = {
            **self._columns(setting),
            **values,
            "best": False,
            "split": self.split,
            "select_on": self.select_on,
            "oracle": self.oracle,
        }
        self.table.append(row)
        return row

    def choose(self, setting):
        """Mark a setting as the best; as `search_scale` does."""
        self._setting = setting
        columns = self._columns(setting)
        for row in self.table:
            is_best = all(row[column] == s for column, s in columns.items())
            row["best"] = row["state"] == "ok" and is_best
