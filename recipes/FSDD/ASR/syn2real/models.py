"""The models of the study: what each starts from and what it is tuned on.

Every model has a folder with a SpeechBrain checkpoint and needs nothing but
its parent, so that several processes can share the work and a run that was
killed goes on where it stopped.
"""

import time
from dataclasses import dataclass

from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import Domain, ModelFolder, copy_of
from speechbrain_taskarith.vectors import open_state

logger = get_logger(__name__)

PRETRAINED = "pretrained"


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

    @property
    def parents(self):
        """Names of the models that have to be there."""
        return [self.parent] if self.parent else []


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


class StudyModels(ModelFolder):
    """The models on disk.

    Arguments
    ---------
    folder : str or pathlib.Path
        One folder in it for each model.
    brain : SequentialMixin
        With a `Brain`; its weights now are what the first model starts from.
    """

    def __init__(self, folder, brain):
        super().__init__(folder)
        self.brain = brain
        self.initial = copy_of(brain.hparams.model.state_dict())

    def state(self, name):
        """Read a finished model's weights, lazily."""
        return open_state(self.path(name) / "model.ckpt")

    def train(self, model):
        """Train a model whose parent is finished; keep its checkpoint.

        Arguments
        ---------
        model : Model
            What to train.
        """
        logger.info(f"training {model.name}")
        brain = self.brain
        if model.parent is None:
            start = copy_of(self.initial)
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
        self.keep(
            model.name,
            {"model": brain.hparams.model},
            {
                "parent": model.parent or "",
                "lr": float(model.lr),
                "seconds": round(time.monotonic() - started, 1),
            },
        )
