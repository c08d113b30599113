"""Copies of the last states of a sequence, so that they are not built again."""

import contextlib
import logging
from pathlib import Path

from speechbrain_taskarith.vectors.states.readers import open_state
from speechbrain_taskarith.vectors.states.writers import save_state

_SUFFIXES = (".safetensors", ".ckpt")

logger = logging.getLogger(__name__)


class StateCopies:
    """A few states, by fingerprint.

    A copy is compared with its fingerprint at every use, and made again where
    it does not fit: nothing depends on it but time.

    Arguments
    ---------
    folder : pathlib.Path
        Where they are; made when needed.
    most : int
        How many are kept.
    """

    def __init__(self, folder, most):
        self._folder, self._most = Path(folder), most

    def get(self, fingerprint):
        """Return a state of just these bytes, or None."""
        for path in map(self._folder.joinpath, _names(fingerprint)):
            with contextlib.suppress(OSError, ValueError):
                state = open_state(path)
                if state.fingerprint == fingerprint:
                    return state
        return None

    def keep(self, states, wanted):
        """Store states; remove all whose fingerprints are not `wanted`.

        `states` is `{fingerprint: State}`, `wanted` in order of the sequence:
        the last ones stay.
        """
        wanted = list(wanted)[-self._most :] if self._most else []
        names = {name for found in wanted for name in _names(found)}
        for path in self._folder.glob("*.*"):
            if path.suffix in _SUFFIXES and path.name not in names:
                path.unlink(missing_ok=True)
        for found in wanted:
            # Only a torch file stores which tensors are tied.
            tied = found in states and states[found].aliases
            path = self._folder / _names(found)[1 if tied else 0]
            try:
                # Also over one that is there: it was built since that failed.
                if found in states:
                    save_state(states[found], path)
            except OSError as error:
                logger.warning("%s; the state will be built again", error)


def _names(fingerprint):
    return [fingerprint[:32] + suffix for suffix in _SUFFIXES]
