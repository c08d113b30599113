"""What a run is fine-tuned from: the weights, and what lies beside them."""

import logging
from pathlib import Path

from speechbrain.utils.distributed import ddp_barrier, if_main_process

from speechbrain_taskarith.utils.files import atomic_folder
from speechbrain_taskarith.utils.hub.download import local_path
from speechbrain_taskarith.vectors.recipe_hooks.bases import (
    is_checkpoint,
    open_base,
)
from speechbrain_taskarith.vectors.recipe_hooks.normalizers import (
    normalizers_of,
    read_statistics,
)
from speechbrain_taskarith.vectors.recipe_hooks.provenance import (
    without_adapters,
)
from speechbrain_taskarith.vectors.recipe_hooks.vocabularies import (
    check_same_tokens,
)
from speechbrain_taskarith.vectors.states.readers import as_state
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    find_checkpoint_folder,
)
from speechbrain_taskarith.vectors.states.writers import save_state

logger = logging.getLogger(__name__)

# The base of a run that starts from the weights as built or pre-trained, and
# the folder beside the checkpoints that keeps those.
START = "start"


class RunBase:
    """The base of an `EditingCheckpointer`, whose arguments it takes.

    Arguments
    ---------
    source : str, pathlib.Path or dict
        The argument `base`.
    edited : list of str
        The recoverables that are edited.
    from_base : sequence of str or None
        What else is loaded.
    keys : dict
        `min_key` and `max_key`.
    save_folder : callable
        Returns the run's save folder.
    """

    def __init__(self, source, edited, from_base, keys, save_folder):
        self.source, self.is_start = source, source == START
        self._edited, self._from_base = edited, from_base
        self._keys, self._save_folder = keys, save_folder

    def open(self, name, module):
        """Return a recoverable's base under the module's own names."""
        return open_base(self.path(name), module, name=name, **self._keys)

    def path(self, name):
        """Return where a recoverable's base lies."""
        if isinstance(self.source, dict):
            if name not in self.source:
                raise KeyError(f"base: says nothing of {name!r}")
            return self.source[name]
        if not self.is_start:
            return self.source
        folder = self._start_folder()
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder}: the weights that training started from are "
                "missing; restore the folder, or begin again in another "
                "checkpoints_dir"
            )
        return folder / f"{name}.ckpt"

    def beside(self, name):
        """Return another recoverable's file beside the base, or None."""
        paths = [path / f"{name}.ckpt" for path in self._folders()]
        return next((path for path in paths if path.exists()), None)

    def has_statistics(self, name):
        """Tell whether a normaliser starts from the base's statistics."""
        if self._from_base is not None and name not in self._from_base:
            return False
        try:
            path = self.beside(name)
        except FileNotFoundError:  # the base is gone: as the checkpoint has it
            return True
        return path is not None and bool(read_statistics(path)["count"])

    def files(self, recoverables):
        """Return `{name: file}` of what is loaded besides what is edited."""
        wanted = self._from_base
        if wanted is None:
            wanted = normalizers_of(recoverables)
        files = {name: self.beside(name) for name in wanted}
        for name, path in files.items():
            if path is None and self._from_base is not None:
                raise FileNotFoundError(
                    f"from_base: {self.source} holds no {name}.ckpt"
                )
        return {name: path for name, path in files.items() if path}

    def check_tokens(self, recoverables):
        """Raise unless base and run number their tokens alike."""
        if not self.is_start:
            for folder in self._folders():
                check_same_tokens(folder, self._save_folder(), recoverables)

    def keep_start(self, recoverables, begun):
        """Keep the weights that training starts from, the first time.

        `begun`: there are checkpoints, so that they must have been kept.
        """
        folder = self._start_folder()
        if folder.exists():
            logger.info(f"Training starts from the weights kept in {folder}")
        elif begun:
            self.path(self._edited[0])  # raises: they are missing
        elif if_main_process():
            with atomic_folder(folder) as temporary:
                for name in self._edited:
                    state = as_state(recoverables[name])
                    state = without_adapters(state)
                    save_state(state, temporary / f"{name}.ckpt")
                for name, obj in normalizers_of(recoverables).items():
                    if obj.count:
                        obj._save(temporary / f"{name}.ckpt")
        ddp_barrier()

    def _start_folder(self):
        return Path(self._save_folder()) / START

    def _folders(self):
        """Return the checkpoint folders that the bases lie in."""
        folders = []
        for name in self._edited:
            path = local_path(self.path(name))
            if is_checkpoint(path):
                folders.append(find_checkpoint_folder(path, **self._keys))
            elif self.is_start or (path.parent / "CKPT.yaml").exists():
                folders.append(path.parent)
        return list(dict.fromkeys(folders))
