"""The models of the study: what each starts from and what it is tuned on.

Every model has a folder with a SpeechBrain checkpoint and needs nothing but
its parent, so that several processes can share the work and a run that was
killed goes on where it stopped.

Authors
 * speechbrain_taskarith contributors 2026
"""

import fcntl
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import AtomicCheckpointer, Domain
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import open_state

logger = get_logger(__name__)

PRETRAINED = "pretrained"
FINISHED = "finished"


@dataclass
class Model:
    """One training of the study.

    Arguments
    ---------
    name : str
        Its folder under `models`; the last part also seeds its noise, so
        that the real and the synthetic model of a source domain see their
        strings in the same order with the same masks.
    parent : str or None
        The model that it starts from; None: random weights.
    strings : callable
        Returns its training strings, a list.
    lr : float
        Highest learning rate.
    """

    name: str
    parent: str
    strings: object
    lr: float


def plan_models(strings, hparams):
    """List all models, parents before children.

    Arguments
    ---------
    strings : Strings
        Makes the training strings.
    hparams : dict
        Of the recipe.

    Returns
    -------
    list of Model
        The pre-trained model; with `mixed_steps`, for each left-out domain a
        model tuned on the other domains; from there (else from the
        pre-trained model, once for all left-out domains) each domain's
        models of synthetic and of real speech. The left-out domain's has
        synthetic speech only. Beside it a model tuned on the left-out
        domain together with the others.
    """
    domains = list(hparams["domains"])
    models = [
        Model(
            PRETRAINED,
            None,
            lambda: strings.general(hparams["pretraining_steps"]),
            hparams["pretraining_lr"],
        )
    ]
    for target in domains:
        sources = [name for name in domains if name != target]
        heard = [(s, d) for d in sources for s in ("real", "synthetic")]
        start = start_model(target, hparams)
        if start != PRETRAINED:
            models.append(
                Model(
                    start,
                    PRETRAINED,
                    lambda parts=heard: strings.mixed(
                        parts, hparams["mixed_steps"]
                    ),
                    hparams["mixed_lr"],
                )
            )
        models.append(
            Model(
                joint_model(target),
                start,
                lambda parts=[*heard, ("synthetic", target)]: strings.mixed(
                    parts, hparams["domain_steps"]
                ),
                hparams["domain_lr"],
            )
        )
        for side, domain in [("synthetic", target), *heard]:
            models.append(
                Model(
                    domain_model(target, side, domain, hparams),
                    start,
                    lambda x=side, d=domain: strings.training(
                        x, d, hparams["domain_steps"]
                    ),
                    hparams["domain_lr"],
                )
            )
    # Without a mixed model the left-out domains share the models.
    return list({model.name: model for model in models}.values())


def start_model(target, hparams):
    """Name the model that a left-out domain's study starts from."""
    return f"mixed/{target}" if hparams["mixed_steps"] else PRETRAINED


def domain_model(target, side, domain, hparams):
    """Name a domain's model for a left-out `target`.

    `side` is `real` or `synthetic`; of the target itself there is the
    synthetic one only.
    """
    if hparams["mixed_steps"]:
        return f"without_{target}/{side}/{domain}"
    return f"{side}/{domain}"


def joint_model(target):
    """Name the model tuned on the target and all sources together."""
    return f"joint/{target}"


class ModelFolder:
    """The models on disk.

    Arguments
    ---------
    folder : str or pathlib.Path
        One folder in it for each model.
    initial : dict of str to torch.Tensor
        Weights that the first model starts from.
    """

    def __init__(self, folder, initial):
        self.folder = Path(folder)
        # A copy: training changes the tensors that it is given.
        self.initial = {k: v.clone() for k, v in initial.items()}

    def path(self, name):
        """Return a finished model's checkpoint."""
        return self.folder / name / f"CKPT+{FINISHED}"

    def finished(self, name):
        """Is this model trained? (Its checkpoint appears when whole.)"""
        return self.path(name).is_dir()

    def state(self, name):
        """Read a finished model's weights, lazily."""
        return open_state(self.path(name) / "model.ckpt")

    def train(self, brain, model):
        """Train a model and keep its checkpoint.

        Arguments
        ---------
        brain : SequentialMixin
            With a `Brain`.
        model : Model
            Its parent is finished.
        """
        logger.info(f"training {model.name}")
        if model.parent is None:
            start = {
                name: tensor.clone() for name, tensor in self.initial.items()
            }
        else:
            start = dict(self.state(model.parent))
        brain.lr, brain.training_of = model.lr, model.name
        started = time.monotonic()
        # What SpeechBrain saves on the way, for going on after a kill, stays
        # apart from what is kept.
        place = self.folder / model.name
        brain.fine_tune(
            Domain(model.name, model.strings()),
            start,
            place / "training" / place.name,
        )
        AtomicCheckpointer(
            place, {"model": brain.hparams.model}
        ).save_checkpoint(
            meta={
                "model": model.name,
                "parent": model.parent or "",
                "lr": float(model.lr),
                "seconds": round(time.monotonic() - started, 1),
            },
            name=FINISHED,
        )

    def train_all(self, brain, models, show_progress=True):
        """Train what is missing, side by side with other processes.

        Each process takes the next model whose parent is finished and that
        nobody else has taken. What a killed process had taken is free again:
        the system gives its lock back.

        Arguments
        ---------
        brain : SequentialMixin
            With a `Brain`.
        models : list of Model
            Parents before children.
        show_progress : bool
            Show a bar with the models that are finished, whoever trained
            them.
        """
        bar = progress(
            total=len(models),
            desc="models trained",
            unit="model",
            enable=show_progress,
        )
        with bar:
            self._train_all(brain, models, bar)

    def _train_all(self, brain, models, bar):
        while True:
            missing = [m for m in models if not self.finished(m.name)]
            bar.update(len(models) - len(missing) - bar.n)
            if not missing:
                return
            ready = [
                m
                for m in missing
                if m.parent is None or self.finished(m.parent)
            ]
            for model in ready:
                with self._taken(model.name) as mine:
                    if mine and not self.finished(model.name):
                        self.train(brain, model)
                        break
            else:
                time.sleep(0.2)

    @contextmanager
    def _taken(self, name):
        """Take a model, if nobody else has; tell whether it worked."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w", encoding="ascii") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
