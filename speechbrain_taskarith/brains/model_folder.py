"""Many models that build on one another, trained by several processes."""

import fcntl
import time
from contextlib import contextmanager
from pathlib import Path

from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors.recipe_hooks.atomic_checkpointer import (
    AtomicCheckpointer,
)

_FINISHED = "finished"
# Seconds between two looks for a model that is ready and free.
_PATIENCE = 0.2


class ModelFolder:
    """The models of a study on disk: a folder each, with its checkpoint.

    A model needs nothing but the models it starts from, so that processes
    share the work (see `helpers`) and a study that was killed goes on where
    it stopped: what is finished is not trained again, and what a killed
    process had taken is free, since the system gives its lock back.

    Arguments
    ---------
    folder : str or pathlib.Path
        One folder in it for each model; on a file system that can lock.

    Example
    -------
    >>> import torch
    >>> from types import SimpleNamespace as Model
    >>> plan = [
    ...     Model(name="base", parents=[]),
    ...     Model(name="accents/german", parents=["base"]),
    ... ]
    >>> models = ModelFolder(getfixture("tmp_path"))
    >>> layer = torch.nn.Linear(1, 1)
    >>> def train(model):
    ...     print("training", model.name)
    ...     models.keep(model.name, {"model": layer}, {"loss": 0.5})
    >>> models.train_all(plan, train, show_progress=False)
    training base
    training accents/german
    >>> models.train_all(plan, train, show_progress=False)  # all is there
    >>> models.meta("accents/german")["loss"]
    0.5
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, name):
        """Return a finished model's checkpoint.

        Arguments
        ---------
        name : str
            The model.

        Returns
        -------
        pathlib.Path
            A folder, which is there when the model is finished.
        """
        return self.folder / name / f"CKPT+{_FINISHED}"

    def finished(self, name):
        """Tell whether a model is trained.

        Arguments
        ---------
        name : str
            The model.

        Returns
        -------
        bool
            A checkpoint appears when it is whole.
        """
        return self.path(name).is_dir()

    def keep(self, name, recoverables, meta):
        """Keep a trained model; from here on it is finished.

        Arguments
        ---------
        name : str
            The model.
        recoverables : dict
            What goes into the checkpoint, as `Checkpointer` takes it.
        meta : dict
            What is noted beside it.
        """
        AtomicCheckpointer(self.folder / name, recoverables).save_checkpoint(
            meta={"model": name, **meta}, name=_FINISHED
        )

    def recover(self, name, recoverables):
        """Load a finished model's checkpoint.

        Arguments
        ---------
        name : str
            The model.
        recoverables : dict
            What to load into, as `Checkpointer` takes it.

        Raises
        ------
        FileNotFoundError
            It is not finished.
        """
        checkpointer = AtomicCheckpointer(self.folder / name, recoverables)
        if checkpointer.recover_if_possible() is None:
            raise FileNotFoundError(
                f"{self.path(name)}: missing; the model {name!r} is not trained"
            )

    def meta(self, name):
        """Return what was noted about a finished model.

        Arguments
        ---------
        name : str
            The model.

        Returns
        -------
        dict
            As given to `keep`, and `model`, its name.
        """
        return AtomicCheckpointer(self.folder / name).find_checkpoint().meta

    def train_all(self, models, train, show_progress=True):
        """Train what is missing, side by side with other processes.

        Each process takes the next model whose parents are finished and that
        nobody else has taken.

        Arguments
        ---------
        models : list
            Parents before children; each with `name` and `parents`, a list
            of names that are in the list, too.
        train : callable
            `train(model)` trains a model whose parents are finished, and
            hands it to `keep`.
        show_progress : bool
            Show a bar with the models that are finished, whoever trained
            them.

        Raises
        ------
        ValueError
            A parent that does not come before its child: nobody would ever
            train it.
        """
        _check_order(models)
        bar = progress(
            total=len(models),
            desc="models trained",
            unit="model",
            enable=show_progress,
        )
        with bar:
            while missing := [m for m in models if not self.finished(m.name)]:
                bar.update(len(models) - len(missing) - bar.n)
                if not self._train_one(missing, train):
                    time.sleep(_PATIENCE)
            bar.update(len(models) - bar.n)

    def _train_one(self, missing, train):
        """Train the first model that is ready and free; was there one?"""
        waiting = {model.name for model in missing}
        for model in missing:
            if waiting.intersection(model.parents):
                continue
            with self._taken(model.name) as mine:
                if mine and not self.finished(model.name):
                    train(model)
                    return True
        return False

    @contextmanager
    def _taken(self, name):
        """Take a model, if nobody else has; tell whether it worked."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        with open(self.folder / name / "lock", "w", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _check_order(models):
    """Refuse a list in which a parent is missing or comes too late."""
    before = set()
    for model in models:
        lost = [name for name in model.parents if name not in before]
        if lost:
            raise ValueError(
                f"model {model.name!r} starts from {', '.join(lost)}, which "
                "the list does not have before it"
            )
        before.add(model.name)
