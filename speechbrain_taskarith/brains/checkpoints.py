"""A SpeechBrain Checkpointer that a kill cannot surprise half-way.

Authors
 * speechbrain_taskarith contributors 2026
"""

import logging
import os
import shutil

from speechbrain.utils.checkpoints import (
    Checkpoint,
    Checkpointer,
    ckpt_recency,
)
from speechbrain.utils.distributed import ddp_broadcast, if_main_process

from speechbrain_taskarith.utils.files import (
    TEMPORARY_PREFIX,
    fsync_directory,
    remove_leftovers,
)

logger = logging.getLogger(__name__)


class AtomicCheckpointer(Checkpointer):
    """Write a checkpoint under a temporary name, then rename it.

    SpeechBrain's own writes the description (`CKPT.yaml`) first and the
    parameters after it, into the folder's final name. A process killed in
    between leaves a folder that the next run takes for a whole checkpoint.
    Here a folder named `CKPT+*` is whole, and what a killed process left
    behind is swept away when the next one starts.

    Everything else is as in `speechbrain.utils.checkpoints.Checkpointer`.

    Arguments
    ---------
    checkpoints_dir : str or pathlib.Path
        Folder of the checkpoints, this checkpointer's alone.
    *args, **kwargs : object
        As SpeechBrain's takes them, `recoverables` first.

    Example
    -------
    >>> import torch
    >>> folder = getfixture("tmpdir")
    >>> model = torch.nn.Linear(1, 1)
    >>> saver = AtomicCheckpointer(str(folder), {"model": model})
    >>> _ = saver.save_checkpoint(meta={"WER": 12.0}, name="best")
    >>> sorted(path.basename for path in folder.listdir())
    ['CKPT+best']
    """

    def __init__(self, checkpoints_dir, *args, **kwargs):
        super().__init__(checkpoints_dir, *args, **kwargs)
        if if_main_process():
            remove_leftovers(self.checkpoints_dir)

    def save_checkpoint(self, meta={}, end_of_epoch=True, name=None, **kwargs):  # noqa: B006
        """Save everything; the folder appears when it is whole.

        Arguments
        ---------
        meta : dict
            Plain Python values for `CKPT.yaml`.
        end_of_epoch : bool
            False within an epoch.
        name : str, optional
            Name after `CKPT+`; by default date and time.
        **kwargs : object
            As for SpeechBrain's.

        Returns
        -------
        Checkpoint or None
            None on all but the main process.
        """
        if name is None:
            final = super()._new_checkpoint_dirpath()
        else:
            final = super()._custom_checkpoint_dirpath(name)
        # Names carry the time of day: the main process decides.
        final = ddp_broadcast(final, src=0)
        self._writing = final.with_name(TEMPORARY_PREFIX + final.name)
        saved = super().save_checkpoint(meta, end_of_epoch, name, **kwargs)
        # Some objects are saved by every process (a Brain, schedulers): all
        # must have written before the folder changes its name.
        ddp_broadcast(None, src=0)
        if saved is not None:
            for path in saved.path.iterdir():
                with open(path, "rb") as stream:
                    os.fsync(stream.fileno())
            if final.exists():
                self._remove(final)
            os.replace(saved.path, final)
            fsync_directory(self.checkpoints_dir)
            files = {k: final / p.name for k, p in saved.paramfiles.items()}
            saved = Checkpoint(final, saved.meta, files)
        ddp_broadcast(None, src=0)
        return saved

    def _new_checkpoint_dirpath(self):
        return self._writing

    def _custom_checkpoint_dirpath(self, name):
        return self._writing

    def delete_checkpoints(
        self,
        *,
        num_to_keep=1,
        min_keys=None,
        max_keys=None,
        importance_keys=(ckpt_recency,),
        ckpt_predicate=None,
        verbosity=logging.INFO,
    ):
        """Delete the least important checkpoints, each at one stroke.

        Arguments
        ---------
        num_to_keep : int
            How many to keep by each key.
        min_keys, max_keys : list of str, optional
            Keep those with the lowest (highest) of these in their `meta`.
        importance_keys : sequence of callable
            Further keys, functions of a checkpoint.
        ckpt_predicate : callable, optional
            Look only at checkpoints for which it returns True.
        verbosity : int
            Logging level.
        """
        keys = [{"min_key": key} for key in min_keys or ()]
        keys += [{"max_key": key} for key in max_keys or ()]
        keys += [{"importance_key": key} for key in importance_keys]
        candidates, kept = {}, set()
        for key in keys:
            # As upstream: a checkpoint without the key is left alone.
            found = self.find_checkpoints(**key, ckpt_predicate=ckpt_predicate)
            candidates.update((c.path, c) for c in found)
            best = self.find_checkpoints(
                **key,
                ckpt_predicate=ckpt_predicate,
                max_num_checkpoints=num_to_keep,
            )
            kept.update(checkpoint.path for checkpoint in best)
        ddp_broadcast(None, src=0)  # all have listed before any is deleted
        if if_main_process():
            for path in candidates.keys() - kept:
                self._remove(path)
                logger.log(verbosity, f"Deleted {path}")
        ddp_broadcast(None, src=0)

    @staticmethod
    def _remove(path):
        aside = path.with_name(f"{TEMPORARY_PREFIX}old-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
