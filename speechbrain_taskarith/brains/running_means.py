"""Means over an epoch that a resumed run goes on with."""

from speechbrain_taskarith.utils.recoverable import JSONRecoverable


class RunningMeans(JSONRecoverable):
    """The mean of each of several figures since `clear`; a recoverable.

    Sums are kept in float64 where the figures are: nothing is asked of a GPU
    until `means`.

    Example
    -------
    >>> import torch
    >>> losses = RunningMeans()
    >>> losses.add({"st": torch.tensor(1.0), "asr": torch.tensor(5.0)})
    >>> losses.add({"st": torch.tensor(2.0)})
    >>> losses.means()
    {'st': 1.5, 'asr': 5.0}
    """

    def __init__(self):
        self.clear()

    def clear(self):
        """Forget all figures."""
        self._sums, self._counts = {}, {}

    def add(self, figures):
        """Count figures in.

        Arguments
        ---------
        figures : dict of str: torch.Tensor
            Scalars.
        """
        for name, figure in figures.items():
            figure = figure.detach().double()
            self._sums[name] = self._sums.get(name, 0.0) + figure
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self):
        """Return the means.

        Returns
        -------
        dict of str: float
            Of every figure that was ever there.
        """
        return {
            name: float(total) / self._counts[name]
            for name, total in self._sums.items()
        }

    def state(self):
        """Return what is kept.

        Returns
        -------
        dict
            Sums and counts.
        """
        sums = {name: float(total) for name, total in self._sums.items()}
        return {"sums": sums, "counts": self._counts}

    def restore(self, state):
        """Take back what `state` returned.

        Arguments
        ---------
        state : dict
            Sums and counts.
        """
        self._sums, self._counts = state["sums"], state["counts"]
