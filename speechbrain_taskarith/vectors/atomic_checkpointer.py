"""A SpeechBrain `Checkpointer` whose checkpoints are whole or not there.

Authors
 * speechbrain_taskarith contributors 2026
"""

import logging
import os
import shutil

from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from ..utils.files import TEMPORARY_PREFIX, remove_leftovers
from .checkpoint_folder import META_KEY, is_whole, plain, publish, write_meta
from .state_readers import read_checkpoint_meta


class AtomicCheckpointer(Checkpointer):
    """A `Checkpointer` that a kill cannot surprise.

    Upstream writes `CKPT.yaml` first and the parameters after it, under the
    final name: a process killed in between leaves a folder that the next
    run takes for a checkpoint. Here a checkpoint is written under another
    name and renamed when it is whole. A checkpoint whose deletion was cut
    short does not count. What a killed run left is swept away by the next
    one that saves.

    Values in `meta` are made plain, since upstream saves tensors, tuples
    and NumPy numbers, and then cannot list the folder.

    Takes the same arguments as `Checkpointer`, and reads its checkpoints.

    Arguments
    ---------
    *args, **kwargs : object
        As for `Checkpointer`.

    Example
    -------
    >>> import torch
    >>> folder = getfixture("tmpdir")
    >>> checkpointer = AtomicCheckpointer(
    ...     folder, {"model": torch.nn.Linear(1, 1)}
    ... )
    >>> _ = checkpointer.save_checkpoint(
    ...     meta={"WER": torch.tensor(4.5)}, name="best"
    ... )
    >>> [found] = Checkpointer(folder).list_checkpoints()
    >>> found.path.name, found.meta["WER"]
    ('CKPT+best', 4.5)
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._owned = False
        self._pending = None

    def save_checkpoint(
        self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO
    ):
        """Save a checkpoint, whole or not at all.

        Arguments
        ---------
        meta : dict or None
            Scores and the like.
        end_of_epoch : bool
            As for `Checkpointer`.
        name : str or None
            As for `Checkpointer`.
        verbosity : int
            Logging level.

        Returns
        -------
        Checkpoint or None
            On the main process, what was saved.
        """
        self._start_saving()
        self._clean()
        meta = plain(dict(meta or {}), "meta")
        try:
            saved = super().save_checkpoint(meta, end_of_epoch, name, verbosity)
            # All processes have written what they write.
            ddp_barrier()
            if if_main_process():
                saved = self._publish(saved)
        except BaseException:
            if self._pending is not None:
                shutil.rmtree(self._pending[0], ignore_errors=True)
            raise
        finally:
            self._pending = None
        ddp_barrier()
        return saved

    def _start_saving(self):
        """For subclasses: a checkpoint is about to be saved."""

    def _complete(self, folder, saved):
        """For subclasses: add files; return entries for `CKPT.yaml`."""
        return {}

    def _new_checkpoint_dirpath(self):
        return self._aside(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name):
        return self._aside(super()._custom_checkpoint_dirpath(name))

    def _aside(self, final):
        """Have a checkpoint written where no listing looks."""
        temporary = final.with_name(
            f"{TEMPORARY_PREFIX}{os.getpid()}-{final.name}"
        )
        self._pending = (temporary, final)
        return temporary

    def _publish(self, saved):
        temporary, final = self._pending
        content = dict(saved.meta)
        content[META_KEY] = self._complete(temporary, saved)
        write_meta(temporary, content)
        publish(temporary, final)
        files = {n: final / p.name for n, p in saved.paramfiles.items()}
        return Checkpoint(final, read_checkpoint_meta(final), files)

    def _clean(self):
        """Sweep away what a killed run left, once, by who writes here."""
        if self._owned or not if_main_process():
            return
        self._owned = True
        remove_leftovers(self.checkpoints_dir)
        for folder in self.checkpoints_dir.glob("CKPT+*"):
            if not (folder / "CKPT.yaml").exists() or not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _list_checkpoint_dirs(self):
        return [f for f in super()._list_checkpoint_dirs() if is_whole(f)]
