"""Lifelong learning in one matrix: WER on every domain after every step.

`R[k][j]` is the WER on domain j after domain k was learned. From it come
the average WER, backward and forward transfer, intransigence and the
relative reduction over a baseline.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from speechbrain_taskarith.metrics import lifelong_files
from speechbrain_taskarith.metrics.word_errors import rate_of
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.optional import require

#: Give this as `at` for the mean over the steps instead of one step.
MEAN = "mean"


class LifelongMatrix:
    """WER on each domain after each step of a sequence of domains.

    Definitions (k and j count domains in the order learned, from 0):

    - average WER at k: mean of `R[k][j]` over j <= k;
    - BWT at k (backward transfer): mean of `R[j][j] - R[k][j]` over j < k;
      negative = earlier domains got worse (forgetting);
    - FWT at k (forward transfer): `single_k - R[k][k]`, against a model
      trained on domain k alone; positive = the sequence helped;
    - IM at k (intransigence): `R[k][k] - joint_k`, against joint training;
      positive = domain k was learned less well;
    - WERR at k: relative reduction of the average WER over a baseline in %.

    After Lopez-Paz and Ranzato, "Gradient Episodic Memory", 2017 (eq. 3) and
    Chaudhry et al., "Riemannian Walk", 2018 (IM), with signs as CL-MASR
    (Della Libera et al. 2023) uses them for error rates.

    Every measure takes `at`: the name of the domain learned last (default:
    the last of the sequence), or `"mean"`: average WER over all steps; the
    others over all steps but the first, where nothing had been learned in
    sequence yet. A WER that it needs and nobody recorded is a KeyError.

    Arguments
    ---------
    domains : sequence of str
        The domains in the order they are learned.

    Example
    -------
    >>> matrix = LifelongMatrix(["us", "de"])
    >>> matrix.record(after="us", on="us", wer=10.0)
    >>> matrix.record(after="de", on="us", wer=16.0)
    >>> matrix.record(after="de", on="de", wer=20.0)
    >>> matrix.average_wer(), matrix.bwt(), matrix.average_wer(at="us")
    (18.0, -6.0, 10.0)
    >>> matrix.fwt({"de": 22.0}), matrix.im({"de": 15.0})
    (2.0, 5.0)
    """

    def __init__(self, domains):
        if isinstance(domains, str):
            raise TypeError(
                f"domains is the single string {domains!r}; give a list"
            )
        self.domains = tuple(domains)
        self._wer = {}
        for domain in self.domains:
            named = isinstance(domain, str) and domain.strip()
            if not named or domain == MEAN:
                raise ValueError(
                    f"domain {domain!r}: expected a name other than {MEAN!r}, "
                    "which asks for the mean over the steps"
                )
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError(
                f"domains are {list(self.domains)}, expected one or more, "
                "each once, in the order learned"
            )

    def record(self, after, on, wer):
        """Note the WER on one domain after another was learned.

        A second value replaces the first, as a resumed run needs it.

        Arguments
        ---------
        after : str
            The domain learned last.
        on : str
            The domain tested; one that comes later in the sequence is kept
            and shown, but no measure counts it.
        wer : float or WERReport
            WER in %.

        Raises
        ------
        ValueError
            A domain that is not in the sequence, or a WER that is negative,
            NaN or infinite.
        """
        self._index(after)
        self._index(on)
        value = rate_of(wer)
        if not math.isfinite(value) or value < 0:
            raise ValueError(
                f"WER on {on!r} after {after!r} is {value}, expected a finite "
                "number >= 0 in %"
            )
        self._wer[after, on] = value

    def __getitem__(self, cell):
        after, on = cell
        self._index(after)
        self._index(on)
        if cell not in self._wer:
            raise KeyError(
                f"no WER on {on!r} after {after!r} yet; "
                f".record(after={after!r}, on={on!r}, wer=...) first"
            )
        return self._wer[cell]

    def __contains__(self, cell):
        return tuple(cell) in self._wer

    def __eq__(self, other):
        if not isinstance(other, LifelongMatrix):
            return NotImplemented
        return self.domains == other.domains and self._wer == other._wer

    def __repr__(self):
        return (
            f"LifelongMatrix({list(self.domains)}, {len(self._wer)} recorded)"
        )

    def average_wer(self, at=None):
        """Average WER so far, in %; see `LifelongMatrix`."""
        return self._at(at, 0, self._average_wer)

    def bwt(self, at=None):
        """Backward transfer in percentage points; see `LifelongMatrix`.

        Not at the first domain, where it is a ValueError: nothing lies
        behind it.
        """
        return self._at(at, 1, self._bwt)

    def fwt(self, single, at=None):
        """Forward transfer in percentage points.

        Arguments
        ---------
        single : dict of str: float or WERReport, or one of these
            WER in % of a model trained on one domain alone, by domain (the
            domains in question suffice); a plain number for one step.
        at : str or None
            See the class.

        Returns
        -------
        float
            `single_k - R[k][k]`.
        """
        return self._at(
            at, 1, lambda k: self._reference(single, k, at) - self._cell(k, k)
        )

    def im(self, joint, at=None):
        """Intransigence in percentage points.

        `joint` holds the WER of joint training; arguments as `fwt`.
        """
        return self._at(
            at, 1, lambda k: self._cell(k, k) - self._reference(joint, k, at)
        )

    def werr(self, baseline, at=None):
        """Relative reduction of the average WER over a baseline, in %.

        Arguments
        ---------
        baseline : LifelongMatrix, float or WERReport
            Usually that of plain fine-tuning, over the same domains in the
            same order; or its average WER in % at this one step.
        at : str or None
            See the class; `"mean"` is the mean of the steps' reductions.

        Returns
        -------
        float
            `100 (1 - A_k / A_k^baseline)`; positive = better.

        Raises
        ------
        ValueError
            Other domains, or a baseline without errors (the ratio is then
            not defined).
        """
        by_step = isinstance(baseline, LifelongMatrix)
        if by_step and baseline.domains != self.domains:
            raise ValueError(
                f"the baseline learned {list(baseline.domains)}, this "
                f"matrix {list(self.domains)}; compare like with like"
            )
        if at == MEAN and not by_step:
            raise TypeError(
                "a mean over steps needs the baseline's LifelongMatrix, not "
                "one number"
            )

        def reduction(k):
            reference = (
                baseline._average_wer(k) if by_step else rate_of(baseline)
            )
            if not reference > 0:
                raise ValueError(
                    f"the baseline's average WER after {self.domains[k]!r} is "
                    f"{reference} %; a relative reduction needs one above 0"
                )
            return 100.0 * (1.0 - self._average_wer(k) / reference)

        return self._at(at, 1, reduction)

    def measures(self, baseline=None):
        """Return the measures after the last domain that are defined.

        Arguments
        ---------
        baseline : LifelongMatrix or None
            See `werr`.

        Returns
        -------
        dict of str: float
            `average_wer`; `bwt` where a domain lies behind and the WER on
            each was recorded when it was learned; `werr` over a baseline
            that makes errors.

        Example
        -------
        >>> matrix = LifelongMatrix(["us"])
        >>> matrix.record("us", "us", 4.0)
        >>> matrix.measures(matrix)
        {'average_wer': 4.0, 'werr': 0.0}
        """
        found = {"average_wer": self.average_wer()}
        learned = all((domain, domain) in self for domain in self.domains)
        if learned and len(self.domains) > 1:
            found["bwt"] = self.bwt()
        if baseline is not None and baseline.average_wer() > 0:
            found["werr"] = self.werr(baseline)
        return found

    @classmethod
    def mean(cls, matrices):
        """Average several matrices cell by cell, e.g. over seeds.

        Arguments
        ---------
        matrices : sequence of LifelongMatrix
            Over the same domains, with the same cells recorded.

        Returns
        -------
        LifelongMatrix
            Their mean.

        Raises
        ------
        ValueError
            None given, other domains or other cells.

        Example
        -------
        >>> one, two = LifelongMatrix(["us"]), LifelongMatrix(["us"])
        >>> one.record("us", "us", 4.0)
        >>> two.record("us", "us", 6.0)
        >>> LifelongMatrix.mean([one, two])["us", "us"]
        5.0
        """
        matrices = list(matrices)
        if not matrices:
            raise ValueError("no matrices to average")
        first, *others = matrices
        for other in others:
            cells = other._wer.keys()
            if other.domains != first.domains or cells != first._wer.keys():
                raise ValueError(
                    f"{first} and {other} have other domains or other cells "
                    "recorded; average finished runs of one sequence"
                )
        result = cls(first.domains)
        for cell in first._wer:
            result.record(*cell, fmean(matrix[cell] for matrix in matrices))
        return result

    def to_frame(self):
        """Return the matrix as a `pandas.DataFrame` (see `rows`).

        The index is called `after`, the columns are the domains tested.
        """
        pandas = require("pandas", "tables", "LifelongMatrix.to_frame")
        return pandas.DataFrame(
            self.rows(),
            index=pandas.Index(self.domains, name="after"),
            columns=list(self.domains),
        )

    def rows(self):
        """Return the matrix as plain lists.

        Returns
        -------
        list of list of float
            `[k][j]`, NaN where nothing was recorded.
        """
        return [
            [self._wer.get((k, j), math.nan) for j in self.domains]
            for k in self.domains
        ]

    def plot(self, path, title="WER (%) on each domain after each step"):
        """Draw the matrix as a heat map; see `plot_wer_matrix`."""
        from speechbrain_taskarith.metrics.plots import plot_wer_matrix

        return plot_wer_matrix(self.rows(), self.domains, path, title=title)

    def save(self, path):
        """Write the matrix, atomically.

        Arguments
        ---------
        path : str or pathlib.Path
            `.csv` (one row per step, first column `after`, empty cells where
            nothing was recorded) or `.json`.

        Returns
        -------
        pathlib.Path
            The file.

        Raises
        ------
        ValueError
            Another suffix.

        Example
        -------
        >>> folder = getfixture("tmp_path")
        >>> matrix = LifelongMatrix(["us", "de"])
        >>> matrix.record(after="us", on="us", wer=12.5)
        >>> LifelongMatrix.load(matrix.save(folder / "wer.csv")) == matrix
        True
        """
        encode, _ = lifelong_files.codec(path)
        with atomic_write(path, "w") as stream:
            stream.write(encode(self.domains, self._wer))
        return Path(path)

    @classmethod
    def load(cls, path):
        """Read a matrix from a file (see `save`).

        A ValueError names a file of another suffix or content.
        """
        _, decode = lifelong_files.codec(path)
        text = Path(path).read_text(encoding="utf-8")
        try:
            domains, cells = decode(text)
            matrix = cls(domains)
            for (after, on), value in cells.items():
                matrix.record(after, on, value)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{path}: no WER matrix as LifelongMatrix.save writes it "
                f"({error}); restore the file or make it again"
            ) from error
        return matrix

    def _index(self, domain):
        if domain not in self.domains:
            raise ValueError(
                f"unknown domain {domain!r}; the sequence is "
                f"{', '.join(self.domains)}"
            )
        return self.domains.index(domain)

    def _at(self, at, first, measure):
        """Evaluate a measure at one step, or average it over the steps."""
        last = len(self.domains) - 1
        if at == MEAN:
            if first > last:
                raise ValueError(
                    "the mean over steps after the first needs two domains or "
                    "more"
                )
            return fmean(measure(k) for k in range(first, last + 1))
        return measure(last if at is None else self._index(at))

    def _average_wer(self, k):
        return fmean(self._cell(k, j) for j in range(k + 1))

    def _bwt(self, k):
        if k == 0:
            raise ValueError(
                f"backward transfer after the first domain "
                f"({self.domains[0]!r}) is not defined: nothing lies behind it"
            )
        return fmean(self._cell(j, j) - self._cell(k, j) for j in range(k))

    def _cell(self, k, j):
        return self[self.domains[k], self.domains[j]]

    def _reference(self, reference, k, at):
        domain = self.domains[k]
        if not isinstance(reference, Mapping):
            if at == MEAN:
                raise TypeError(
                    "a mean over steps needs a reference per domain: "
                    "{domain: WER}"
                )
            return rate_of(reference)
        if domain not in reference:
            raise KeyError(
                f"no reference WER for {domain!r}; given: "
                f"{', '.join(map(str, reference)) or 'none'}"
            )
        return rate_of(reference[domain])
