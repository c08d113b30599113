"""What a scale search found: best setting, table, CSV and plot."""

import csv

from speechbrain_taskarith.metrics.plots import (
    plot_scale_curve,
    plot_scale_surface,
    words,
)
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
            ylabel=f"WER on {words(self.select_on)} (%)",
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


class ScaleGrid(ScaleSearch):
    """What a search over several vectors found; made by `search_scales`.

    As `ScaleSearch`, with one column of scales a vector.

    Arguments
    ---------
    split, select_on, oracle
        See `ScaleSearch`.
    baseline : dict
        `{vector: scale}` of the point to compare with.
    """

    def __init__(self, split, select_on, oracle, baseline):
        super().__init__(split, select_on, oracle, {n: [n] for n in baseline})
        self.baseline = dict(baseline)

    def to_dict(self):
        """Return plain types, as `ScaleSearch.to_dict`, with the baseline."""
        return {**super().to_dict(), "baseline": dict(self.baseline)}

    def wer_at(self, setting):
        """Return the (mean) WER at a setting of the table, or None.

        Arguments
        ---------
        setting : dict
            `{vector: scale}`; the others at the baseline's.

        Returns
        -------
        float or None
            None where it was not evaluated.

        Example
        -------
        >>> grid = ScaleGrid("valid", "valid", False, {"own": 1.0, "other": 0})
        >>> _ = grid.add({"own": 0.5, "other": 0}, wer=51.0, state="ok")
        >>> grid.wer_at({"own": 0.5}), grid.wer_at({"own": 0.7})
        (51.0, None)
        """
        columns = self._columns({**self.baseline, **setting}).items()
        found = (row["wer"] for row in self.table if columns <= row.items())
        return next(found, None)

    def surface(self, y=None, x=None):
        """Return the WER over two of the scales, as `plot_scale_surface` takes.

        Arguments
        ---------
        y, x : str or None
            The vectors; by default the first two. Others are at their best.

        Returns
        -------
        dict
            `{(scale of y, scale of x): WER}`; NaN where not evaluated.
        """
        y, x = self._axes(y, x)
        others = self._columns(self._setting)
        for name in (y, x):
            del others[f"scale {name}"]
        return {
            (row[f"scale {y}"], row[f"scale {x}"]): float("nan")
            if row["wer"] is None
            else row["wer"]
            for row in self.table
            if others.items() <= row.items()
        }

    def plot(self, path, *, y=None, x=None, chosen=None, title=""):
        """Plot the WER over two of the scales; of one vector, as a curve.

        Arguments
        ---------
        path : str or pathlib.Path
            `.png`, `.pdf` or `.svg`; written atomically.
        y, x : str or None
            See `surface`.
        chosen : dict or None
            The setting to frame as chosen, e.g. that of a search on
            development data on the surface of an oracle; None frames this
            search's own, unless it is an oracle.
        title : str
            Above the plot.
        """
        if len(self.baseline) == 1:
            super().plot(path)
            return
        y, x = self._axes(y, x)

        def place(setting):
            return setting[y], setting[x]

        marks = {"baseline": place(self.baseline)}
        if self.oracle:
            marks["oracle"] = place(self.best)
        if chosen or not self.oracle:
            chosen = {**self.baseline, **chosen} if chosen else self.best
            marks["chosen"] = place(chosen)
        plot_scale_surface(
            self.surface(y, x),
            path,
            **marks,
            title=title,
            ylabel=f"scale of {words(y)}",
            xlabel=f"scale of {words(x)}",
            unit=f"WER on {words(self.select_on)} (%)",
        )

    def _axes(self, y, x):
        names = list(self.baseline)
        if len(names) < 2:
            raise ValueError("one vector has a curve, not a surface")
        y = y or next(name for name in names if name != x)
        x = x or next(name for name in names if name != y)
        if y == x or not {y, x} <= set(names):
            raise ValueError(f"y={y!r}, x={x!r}: expected two of {names}")
        return y, x
