"""Input normalisers of an edited run: held still, counted on, or edited.

A normaliser's statistics stand in its own file, not in the model's: an edit
of the model alone would leave a front end behind that moved all the way.
"""

import torch
from speechbrain.processing.features import InputNormalization

from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.vectors.recipe_hooks.edits import EditedRecoverable
from speechbrain_taskarith.vectors.rules.averaging.arithmetic import (
    TaskArithmetic,
)
from speechbrain_taskarith.vectors.states.readers import as_state
from speechbrain_taskarith.vectors.states.torch_files import load_torch_file

MODES = ("base", "pooled", "scaled")


def normalizers_of(recoverables):
    """Return `{name: normaliser}` of those that keep global statistics."""
    return {
        name: obj
        for name, obj in recoverables.items()
        if isinstance(obj, InputNormalization) and obj.norm_type == "global"
    }


def hold(normalizer):
    """Have it count no further, also in training."""
    # The modes are set again at every epoch, so eval() would not last.
    normalizer._should_update = _never


def release(normalizer):
    """Have it count in training, as it does by itself."""
    normalizer.__dict__.pop("_should_update", None)


def _never(epoch=None):
    return False


def read_statistics(path):
    """Return stored statistics as a state, which is empty if none count."""
    return _as_state(load_torch_file(path), str(path))


def statistics_of(normalizer):
    """Return a normaliser's present statistics as a state."""
    return _as_state(normalizer._statistics_dict(), "statistics in memory")


def _as_state(statistics, label):
    if not isinstance(statistics, dict) or "glob_mean" not in statistics:
        raise ValueError(
            f"{label}: holds no statistics of an InputNormalization"
        )
    tensors = {name: torch.as_tensor(v) for name, v in statistics.items()}
    state = as_state({name: t.detach().clone() for name, t in tensors.items()})
    state.label = label
    return state


class EditedNormalizer(EditedRecoverable):
    """A normaliser whose statistics are `base + scale * (finetuned - base)`.

    The count is the base's, as all integers are.
    """

    buffers = "edit"

    def __init__(self, name, normalizer, open_base, scale, **arguments):
        super().__init__(
            name, normalizer, open_base, TaskArithmetic(scale), **arguments
        )

    def read(self):
        """See `EditedRecoverable.read`."""
        return statistics_of(self.module)

    def open(self, path):
        """See `EditedRecoverable.open`."""
        return read_statistics(path)

    def put(self, state):
        """See `EditedRecoverable.put`."""
        device = self.module.glob_mean.device
        statistics = {name: state[name].to(device) for name in state}
        statistics["count"] = statistics["count"].item()
        self.module._load_statistics_dict(statistics)

    def recover(self, path, end_of_epoch):
        """See `EditedRecoverable.recover`."""
        self.put(self.open(path))

    def write(self, state, path):
        """See `EditedRecoverable.write`."""
        statistics = {name: state[name] for name in state}
        statistics["count"] = statistics["count"].item()
        with atomic_write(path) as stream:
            torch.save(statistics, stream)

    def edit(self, finetuned):
        """See `EditedRecoverable.edit`; a deviation stays positive."""
        edited = super().edit(finetuned)
        if not bool((edited["glob_std"] > 0).all()):
            raise ValueError(
                f"{self.name!r}: scale {self.rule.scale} makes a standard "
                "deviation negative; choose normalizers: base or pooled, or a "
                "scale in [0, 1]"
            )
        return edited
