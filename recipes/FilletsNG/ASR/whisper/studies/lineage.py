"""Models named by how they were made.

A model is the base, one that `train.py` tuned from another, or an edit: a rule
over what such trainings added. Its name follows from how it is made, so that
what two rows of a table make alike is trained and measured once, and what was
measured needs no weights any more: those are deleted, and trained again only
where something new asks for them.
"""

import hashlib
import json
import shutil
from pathlib import Path

import joblib
from common.study import FINISHED, Training, run_trainings
from train import MEMORY, train

from speechbrain_taskarith.utils.hub.download import local_path
from speechbrain_taskarith.vectors import TaskVector, open_state, save_state
from studies.domains import name_of_lines

# A training's weights, in its folder.
KEPT = "kept.safetensors"


def keep_weights(training):
    """Keep the weights of a finished training, a third of its checkpoint."""
    kept = training / KEPT
    if not kept.exists():
        [weights] = training.glob("save/CKPT+*/whisper.ckpt")
        save_state(open_state(weights), kept)
    shutil.rmtree(training / "save", ignore_errors=True)


def digest(content):
    """Return a short name of plain values."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Base:
    """The model that all start from: a folder, or a hub name.

    `settings` are what all trainings share: others make other models.
    """

    def __init__(self, path, settings=()):
        self.path = local_path(path).resolve()
        self.state = open_state(self.path)
        told = [self.state.fingerprint, list(settings)]
        self.name = "base-" + digest(told)


class Tuned:
    """What one call of `train.py` makes of another model.

    Arguments
    ---------
    start : Base, Tuned or Edited
        The model that training starts from.
    label : str
        The readable part of the name.
    remembers : Tuned or None
        The training whose lifelong method's memory this one goes on with.
    **options
        For `train.py`; manifests count by their content.
    """

    def __init__(self, start, label, remembers=None, **options):
        self.start, self.remembers, self.options = start, remembers, options
        counted = {
            key: name_of_lines(value) if isinstance(value, Path) else value
            for key, value in options.items()
        }
        before = [start.name, remembers and remembers.name]
        self.name = f"{label}-{digest([before, counted])}"


class Edited:
    """`rule(start, vectors)`: what trainings added, merged and scaled.

    Each vector is that of a training, relative to its own start.
    """

    def __init__(self, start, rule, trainings):
        self.start, self.rule = start, rule
        self.trainings = tuple(trainings)
        names = [training.name for training in self.trainings]
        self.name = "edit-" + digest([start.name, rule.describe(), names])


class Models:
    """Makes models: trains what is missing, reads, merges, deletes.

    Arguments
    ---------
    folder : str or pathlib.Path
        Where the trainings' output folders and the edits go.
    arguments : list of str
        What every call of `train.py` gets: hparams file and options.
    """

    def __init__(self, folder, arguments):
        self.folder, self.arguments = Path(folder).resolve(), list(arguments)
        self._newest = (None, None)

    def state(self, model):
        """Return a model's weights; trains what they need."""
        if isinstance(model, Base):
            return model.state
        # A search measures one model on several sets.
        if self._newest[0] != model.name:
            self._newest = (None, None)  # memory for the next one
            self._newest = (model.name, self._make(model))
        return self._newest[1]

    def _make(self, model):
        if isinstance(model, Tuned):
            return dict(open_state(self.train(model)))
        kept = self._kept(model)
        if kept.exists():
            return dict(open_state(kept))
        start = self._start(model.start)
        vectors = [
            TaskVector.between(self._start(t.start), self.train(t))
            for t in model.trainings
        ]
        return model.rule(start, vectors)

    def _start(self, model):
        return (
            self.state(model) if isinstance(model, Base) else self.path(model)
        )

    def _kept(self, model):
        return self.folder / "edits" / f"{model.name}.safetensors"

    def path(self, model):
        """Return where a model's weights lie; makes what is missing."""
        if isinstance(model, Base):
            return model.path
        if isinstance(model, Tuned):
            return self.train(model)
        kept = self._kept(model)
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_state(self._make(model), kept)
        return kept

    def has_weights(self, tuned):
        """Tell whether a training has finished and its weights are there."""
        folder = self.folder / tuned.name
        return (folder / FINISHED).exists() and (folder / KEPT).exists()

    def train(self, tuned):
        """Train unless it is done; returns the weights' file."""
        if not self.has_weights(tuned):
            self._run(tuned)
        return self.folder / tuned.name / KEPT

    def _memory(self, tuned):
        """Return what a training's lifelong method remembered."""
        path = self.folder / tuned.name / MEMORY
        if not path.exists():
            self._run(tuned)
        return path

    def _run(self, tuned):
        folder = self.folder / tuned.name
        options = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in tuned.options.items()
        }
        if not isinstance(tuned.start, Base):
            options["base"] = str(self.path(tuned.start))
        if tuned.remembers is not None:
            options["memory"] = str(self._memory(tuned.remembers))
        (folder / FINISHED).unlink(missing_ok=True)
        with joblib.parallel_config("sequential"):
            run_trainings(
                train,
                [Training(tuned.name, options)],
                self.arguments,
                self.folder,
                show_progress=False,
            )
        keep_weights(folder)
        if tuned.remembers is not None:
            parent = self.folder / tuned.remembers.name
            (parent / MEMORY).unlink(missing_ok=True)

    def delete_edits(self):
        """Delete the edits that trainings started from."""
        shutil.rmtree(self.folder / "edits", ignore_errors=True)

    def keep_only(self, names):
        """Delete the weights of all trainings but these, and all edits."""
        self.delete_edits()
        for finished in self.folder.glob(f"*/{FINISHED}"):
            if finished.parent.name not in names:
                for name in (KEPT, MEMORY):
                    (finished.parent / name).unlink(missing_ok=True)
