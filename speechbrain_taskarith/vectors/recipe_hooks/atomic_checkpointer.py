"""A SpeechBrain `Checkpointer` whose checkpoints are whole or not there."""

import logging
import os
import shutil
import weakref

import torch
from speechbrain.utils.checkpoints import (
    Checkpoint,
    Checkpointer,
    ckpt_recency,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from speechbrain_taskarith.utils.files import (
    TEMPORARY_PREFIX,
    publish_folder,
    remove_leftovers,
)
from speechbrain_taskarith.vectors.editing.lock import FolderLock
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    META_KEY,
    is_whole,
    plain,
    read_checkpoint_meta,
    write_meta,
)

logger = logging.getLogger(__name__)

# {(process, folder): checkpointer that writes to it}
_OWNERS = weakref.WeakValueDictionary()
# Below every level: not logged.
_SILENT = -1


class AtomicCheckpointer(Checkpointer):
    """A `Checkpointer` whose checkpoints survive a kill.

    Upstream writes `CKPT.yaml` first and the parameters after it, under the
    final name: a process killed in between leaves a folder that the next
    run takes for a checkpoint. Here a checkpoint gets its name when it is
    whole, and loses it before it is deleted. One whose deletion (by
    upstream's) was cut short does not count. The next run that trains
    (registers an optimizer) or saves removes what a killed run left.

    Values in `meta` are made plain, since upstream saves tensors, tuples
    and NumPy numbers, and then cannot list the folder.

    It reads the checkpoints of `Checkpointer`. No other checkpointer may
    write to its folder.

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
        self._pending = self._lock = None

    def add_recoverable(self, name, obj, *args, **kwargs):
        """As `Checkpointer.add_recoverable`; before training, sweeps."""
        super().add_recoverable(name, obj, *args, **kwargs)
        # An optimizer shows that this process writes.
        if isinstance(obj, torch.optim.Optimizer) and if_main_process():
            # No listing shows these, so other processes may be listing.
            remove_leftovers(self.checkpoints_dir)

    def save_checkpoint(
        self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO
    ):
        """As `Checkpointer.save_checkpoint`; whole or not at all."""
        self._start_saving()
        self._clean()
        meta = plain(dict(meta or {}), "meta")
        try:
            # Upstream's message would name the temporary folder.
            saved = super().save_checkpoint(meta, end_of_epoch, name, _SILENT)
            # Some objects are saved by every process (a Brain, schedulers):
            # all must have written before the folder changes its name.
            ddp_barrier()
            if if_main_process():
                saved = self._publish(saved)
                kind = "end-of-epoch" if end_of_epoch else "intra-epoch"
                logger.log(
                    verbosity, f"Saved an {kind} checkpoint in {saved.path}"
                )
        except BaseException as error:
            if self._pending is not None:
                shutil.rmtree(self._pending[0], ignore_errors=True)
                _name_final(error, *map(str, self._pending))
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
        """As `Checkpointer.delete_checkpoints`, each in one step.

        Raises ValueError for a `num_to_keep` below 0.
        """
        if num_to_keep < 0:
            raise ValueError(f"num_to_keep={num_to_keep}: expected at least 0")
        keys = [{"min_key": key} for key in min_keys or ()]
        keys += [{"max_key": key} for key in max_keys or ()]
        # `save_and_keep_only` adds one to its own default at each call.
        keys += [{"importance_key": k} for k in dict.fromkeys(importance_keys)]
        others, best = set(), set()
        for key in keys:
            # As upstream: a checkpoint without the key is left alone.
            found = self.find_checkpoints(**key, ckpt_predicate=ckpt_predicate)
            found = [checkpoint.path for checkpoint in found]
            best.update(found[:num_to_keep])
            others.update(found[num_to_keep:])
        ddp_barrier()  # all have listed before any is deleted
        if if_main_process():
            for path in sorted(others - best):
                # Without its name it is no checkpoint any more.
                aside = path.with_name(f"{TEMPORARY_PREFIX}old-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                shutil.rmtree(aside, ignore_errors=True)
                logger.log(verbosity, f"Deleted {path}")
        ddp_barrier()

    def _own_folder(self):
        """For subclasses: be the only one that writes here.

        Another process is refused; in one process the latest takes over.
        """
        key = (os.getpid(), os.path.realpath(self.checkpoints_dir))
        owner = _OWNERS.get(key)
        if owner is self:
            return
        if owner is not None:
            owner._lose_folder(
                f"another {type(self).__name__} of this process writes to "
                f"{self.checkpoints_dir} now"
            )
            self._lock, owner._lock = owner._lock, None
        elif if_main_process():
            remedy = "Let it end, or give this run another checkpoints_dir"
            try:
                self._lock = FolderLock(self.checkpoints_dir, remedy)
            except OSError as error:
                logger.warning(
                    f"{error}. See to it yourself that no two runs write here"
                )
        _OWNERS[key] = self

    def _lose_folder(self, why):
        """For subclasses: another one writes to the folder from now on."""

    def _start_saving(self):
        """For subclasses: a checkpoint is about to be saved."""

    def _complete(self, folder, saved):
        """For subclasses: add files; return entries for `CKPT.yaml`."""
        return {}

    # Checkpoints are written under a name that no listing shows.
    def _new_checkpoint_dirpath(self):
        return self._aside(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name):
        return self._aside(super()._custom_checkpoint_dirpath(name))

    def _aside(self, final):
        name = f"{TEMPORARY_PREFIX}{os.getpid()}-{final.name}"
        self._pending = (final.with_name(name), final)
        return self._pending[0]

    def _publish(self, saved):
        temporary, final = self._pending
        ours = {META_KEY: self._complete(temporary, saved)}
        write_meta(temporary, {**saved.meta, **ours})
        publish_folder(temporary, final)
        files = {n: final / p.name for n, p in saved.paramfiles.items()}
        return Checkpoint(final, read_checkpoint_meta(final), files)

    def _clean(self):
        """Sweep away, once, what a killed run left."""
        if self._owned or not if_main_process():
            return
        self._owned = True
        remove_leftovers(self.checkpoints_dir)
        for folder in self.checkpoints_dir.glob("CKPT+*"):
            if not (folder / "CKPT.yaml").exists() or not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def list_checkpoints(self):
        """As `Checkpointer.list_checkpoints`; only whole ones."""
        found = []
        for folder in self._list_checkpoint_dirs():
            meta = read_checkpoint_meta(folder)
            if is_whole(folder, meta):
                files = {file.stem: file for file in folder.glob("*.ckpt")}
                found.append(Checkpoint(folder, meta, files))
        return found


def _name_final(error, temporary, final):
    """Put the final name where an error names the temporary one."""
    error.args = tuple(
        arg.replace(temporary, final) if isinstance(arg, str) else arg
        for arg in error.args
    )
    if isinstance(error, OSError) and error.filename is not None:
        error.filename = str(error.filename).replace(temporary, final)
        error.strerror = str(error.strerror).replace(temporary, final)
