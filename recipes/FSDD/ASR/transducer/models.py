"""The models of the study: what each starts from and how it is trained.

Every model has a folder with a SpeechBrain checkpoint and needs nothing but
the models it starts from, so that several processes can share the work and a
run that was killed goes on where it stopped.
"""

import time
from dataclasses import dataclass

from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import ModelFolder, copy_of
from speechbrain_taskarith.transducer import transfer_encoder

logger = get_logger(__name__)

# What is taken over of a pre-trained model: the encoder with what is in front
# of it, and nothing else. Predictor, joint and vocabulary are fresh.
TAKEN_OVER = ("frontend", "encoder")


@dataclass
class Model:
    """One training of the study.

    Arguments
    ---------
    name : str
        Its folder under `models`, and its row.
    part : str
        Which model of hparams.
    strings : str
        Name of the training set.
    steps : int
        Number of batches.
    lr : float
        Highest learning rate.
    start : str or None
        Model to start from; None: random weights.
    encoder_of : str or None
        Model whose encoder is put in the place of that.
    min_wer : bool
        Train with MinWER.
    """

    name: str
    part: str
    strings: str
    steps: int
    lr: float
    start: str | None = None
    encoder_of: str | None = None
    min_wer: bool = False

    @property
    def parents(self):
        """Names of the models that have to be there."""
        return [name for name in (self.start, self.encoder_of) if name]

    @property
    def stage(self):
        """Seeds dropout and masks: the same for all models of a stage."""
        return "further" if self.start else self.part


def plan_models(hparams):
    """List all models, parents before children.

    Arguments
    ---------
    hparams : dict
        Of the recipe.

    Returns
    -------
    list of Model
        Pre-training in and out of domain; English models from scratch and
        with either's encoder; from these, MinWER and as many further steps
        of the transducer loss; the encoder brought in before MinWER only.
    """
    pretraining = hparams["pretraining_steps"], hparams["pretraining_lr"]
    rnnt = hparams["rnnt_steps"], hparams["rnnt_lr"]
    last = hparams["min_wer_steps"], hparams["min_wer_lr"]
    models = [
        Model(f"pretrained_{domain}", "multilingual", domain, *pretraining)
        for domain in hparams["pretraining_domains"]
    ]
    first = models[0].name
    models.append(Model("scratch", "target", "train", *rnnt))
    transfers = {"transfer": first}
    for domain in hparams["pretraining_domains"][1:]:
        transfers[f"transfer_{domain}"] = f"pretrained_{domain}"
    for name, source in transfers.items():
        models.append(Model(name, "target", "train", *rnnt, encoder_of=source))
    for name in ("scratch", *transfers):
        for ending, min_wer in (("min_wer", True), ("more_rnnt", False)):
            models.append(
                Model(
                    f"{name}_{ending}",
                    "target",
                    "train",
                    *last,
                    start=name,
                    min_wer=min_wer,
                )
            )
    models.append(
        Model(
            "transfer_at_min_wer",
            "target",
            "train",
            *last,
            start="scratch",
            encoder_of=first,
            min_wer=True,
        )
    )
    models.append(
        Model("full_context", "full_context", "train", *rnnt, encoder_of=first)
    )
    return models


class StudyModels(ModelFolder):
    """The models on disk.

    Arguments
    ---------
    folder : pathlib.Path
        One folder in it for each model.
    brains : dict
        `{part: Transducer}`.
    """

    def __init__(self, folder, brains):
        super().__init__(folder)
        self.brains = brains
        # Copies: training changes the tensors that it is given.
        self.initial = {
            part: copy_of(brain.hparams.model.state_dict())
            for part, brain in brains.items()
        }

    def load(self, model):
        """Load a finished model; return its brain."""
        brain = self.brains[model.part]
        self.recover(model.name, _recoverables(brain))
        return brain

    def start_of(self, model):
        """Return the weights that a model starts from."""
        network = self.brains[model.part].hparams.model
        network.load_state_dict(self.initial[model.part])
        if model.start:
            self.recover(model.start, {"model": network})
        if model.encoder_of:
            for name in TAKEN_OVER:
                report = transfer_encoder(
                    self.path(model.encoder_of),
                    network[name],
                    prefix=f"{name}.",
                )
                logger.info(f"{model.name}, {name}: {report}")
        return copy_of(network.state_dict())

    def train(self, model, strings):
        """Train a model whose parents are finished; keep its checkpoint.

        Arguments
        ---------
        model : Model
            What to train.
        strings : list of dict
            Its training set.
        """
        logger.info(f"training {model.name}")
        brain, place = self.brains[model.part], self.folder / model.name
        started = time.monotonic()
        brain.train_model(
            model,
            self.start_of(model),
            strings,
            place / "training" / model.stage,
        )
        self.keep(
            model.name,
            _recoverables(brain),
            {
                "seconds": round(time.monotonic() - started, 1),
                **brain.train_stats,
            },
        )


def _recoverables(brain):
    return {
        "model": brain.hparams.model,
        "normalizer": brain.modules.normalize,
    }
