"""State that a SpeechBrain checkpoint holds as JSON."""

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
