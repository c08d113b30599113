"""A SpeechBrain `Checkpointer` whose checkpoints are whole or not there."""

import logging
import os
import shutil

import torch
from speechbrain.utils.checkpoints import (
    Checkpoint,
    Checkpointer,
    ckpt_recency,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from speechbrain_taskarith.utils.files import TEMPORARY_PREFIX, remove_leftovers
from speechbrain_taskarith.vectors.states.readers import read_checkpoint_meta
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    META_KEY,
    is_whole,
    plain,
    publish,
    write_meta,
)

logger = logging.getLogger(__name__)


class AtomicCheckpointer(Checkpointer):
    """A `Checkpointer` that a kill cannot surprise.

    Upstream writes `CKPT.yaml` first and the parameters after it, under the
    final name: a process killed in between leaves a folder that the next
    run takes for a checkpoint. Here a checkpoint is written under another
    name and renamed when it is whole, and one that is to be deleted loses
    its name first. A checkpoint whose deletion (by upstream's) was cut
    short does not count. What a killed run left is swept away by the next
    one that trains (registers an optimizer) or saves.

    Values in `meta` are made plain, since upstream saves tensors, tuples
    and NumPy numbers, and then cannot list the folder.

    Takes the same arguments as `Checkpointer`, and reads its checkpoints.
    The folder is this checkpointer's alone.

    Arguments
    ---------
    *args, **kwargs : object
        As for `Checkpointer`: `checkpoints_dir`, `recoverables`, ...

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

    def add_recoverable(self, name, obj, *args, **kwargs):
        """Register a recoverable; who registers an optimizer writes here.

        Arguments
        ---------
        name : str
            Its name.
        obj : object
            The recoverable.
        *args, **kwargs : object
            As for `Checkpointer`.
        """
        super().add_recoverable(name, obj, *args, **kwargs)
        if isinstance(obj, torch.optim.Optimizer) and if_main_process():
            # No listing shows these, so other processes may be listing.
            remove_leftovers(self.checkpoints_dir)

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
            As for `Checkpointer`; a checkpoint of that name is replaced.
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
            # Upstream's message names the temporary folder.
            saved = super().save_checkpoint(
                meta, end_of_epoch, name, logging.DEBUG
            )
            # Some objects are saved by every process (a Brain, schedulers):
            # all must have written before the folder changes its name.
            ddp_barrier()
            if if_main_process():
                saved = self._publish(saved)
                logger.log(verbosity, f"Saved a checkpoint in {saved.path}")
        except BaseException:
            if self._pending is not None:
                shutil.rmtree(self._pending[0], ignore_errors=True)
            raise
        finally:
            self._pending = None
        ddp_barrier()
        return saved

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

        Raises
        ------
        ValueError
            A `num_to_keep` below 0.
        """
        if num_to_keep < 0:
            raise ValueError(f"num_to_keep={num_to_keep}: expected at least 0")
        keys = [{"min_key": key} for key in min_keys or ()]
        keys += [{"max_key": key} for key in max_keys or ()]
        keys += [{"importance_key": key} for key in importance_keys]
        candidates, kept = set(), set()
        for key in keys:
            # As upstream: a checkpoint without the key is left alone.
            found = self.find_checkpoints(**key, ckpt_predicate=ckpt_predicate)
            candidates.update(checkpoint.path for checkpoint in found)
            best = self.find_checkpoints(
                **key,
                ckpt_predicate=ckpt_predicate,
                max_num_checkpoints=num_to_keep,
            )
            kept.update(checkpoint.path for checkpoint in best)
        ddp_barrier()  # all have listed before any is deleted
        if if_main_process():
            for path in sorted(candidates - kept):
                # Without its name it is no checkpoint any more.
                aside = path.with_name(f"{TEMPORARY_PREFIX}old-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                shutil.rmtree(aside, ignore_errors=True)
                logger.log(verbosity, f"Deleted {path}")
        ddp_barrier()

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
