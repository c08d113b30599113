"""State that a SpeechBrain checkpoint holds as JSON: the base, and means."""

from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)

from speechbrain_taskarith.utils.files import read_json, write_json


@register_checkpoint_hooks
class JSONRecoverable:
    """Base of classes whose state is numbers, names and lists of them.

    A subclass implements `state` and `restore`; SpeechBrain's `Checkpointer`
    finds the hooks of this class.
    """

    def state(self):
        """Return the state as a dict of plain types."""
        raise NotImplementedError

    def restore(self, state):
        """Set the state; a ValueError refuses that of something else."""
        raise NotImplementedError

    @mark_as_saver
    def save(self, path):
        """Save the state to a file, atomically."""
        write_json(path, self.state())

    @mark_as_loader
    def load(self, path, end_of_epoch=False):
        """Load a saved state; a ValueError names a damaged or foreign file."""
        del end_of_epoch
        state = read_json(path)
        try:
            self.restore(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a state of {type(self).__name__} "
                f"({type(error).__name__}: {error}); delete its checkpoint, "
                "and the run continues from the one before"
            ) from None


class RunningMeans(JSONRecoverable):
    """The mean of each of several numbers since `clear`; a recoverable.

    A resumed run continues the means of its epoch. What is not finite is left
    out, as SpeechBrain leaves it out of its mean loss. Sums are kept in float64 on
    the numbers' own device: a GPU is synchronised only by `means`.

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
        """Start anew."""
        self._sums, self._counts = {}, {}

    def add(self, figures):
        """Add one value of each name.

        Arguments
        ---------
        figures : dict of str: torch.Tensor
            Scalars.
        """
        for name, figure in figures.items():
            figure = figure.detach().double()
            finite = figure.isfinite()
            figure = figure.where(finite, 0.0)
            self._sums[name] = self._sums.get(name, 0.0) + figure
            self._counts[name] = self._counts.get(name, 0) + finite.long()

    def means(self):
        """Return the means.

        Returns
        -------
        dict of str: float
            Of every name that was added since `clear`.
        """
        state = self.state()
        return {
            name: state["sums"][name] / count
            for name, count in state["counts"].items()
            if count
        }

    def state(self):
        """See `JSONRecoverable.state`."""
        sums = {name: float(total) for name, total in self._sums.items()}
        counts = {name: int(count) for name, count in self._counts.items()}
        return {"sums": sums, "counts": counts}

    def restore(self, state):
        """See `JSONRecoverable.restore`."""
        self._sums, self._counts = state["sums"], state["counts"]
