#!/usr/bin/env python3
"""Recipe for SYN2REAL task vectors on strings of digits (FSDD).

Every domain (group of words) is left out in turn. A Conformer CTC model
learns it from synthetic speech only. Task vectors between models of real and
of synthetic speech, taken from the other domains, bring it closer to real
speech. The left-out domain's real recordings are for testing alone. One run
makes the whole table of one seed; a run that was killed goes on where it
stopped when started again.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0

Several seeds make one table (mean and standard deviation):
> python train.py hparams/train.yaml --data_folder ... --seed 1
> python train.py --merge results/syn2real

Models that do not depend on one another are trained by several processes:
> python train.py hparams/train.yaml --data_folder ... --processes 2
"""

import os
import sys

import speechbrain as sb
import torch
from common.brain import DigitStringBrain
from common.digits import AudioCache
from common.synthesis import synthesize_digits
from hyperpyyaml import load_hyperpyyaml
from models import StudyModels, plan_models
from report import TITLE, write_report
from speechbrain.utils.distributed import run_on_main
from strings import Strings

from speechbrain_taskarith.brains import (
    fast_precision,
    helpers,
    is_helper,
)
from speechbrain_taskarith.data import read_manifest
from speechbrain_taskarith.metrics import merge_seeds


class SyntheticToReal(DigitStringBrain):
    """The Brain: CTC on strings of words, trained once for each model."""

    def compute_forward(self, batch, stage):
        """Score every frame; in float32 whatever the precision of training.

        Arguments
        ---------
        batch : PaddedBatch
            See `CTCBrain`.
        stage : sb.Stage
            Training augments.

        Returns
        -------
        tuple
            Log-probabilities [batch, frames, labels], relative lengths.
        """
        log_probs, lens = super().compute_forward(batch, stage)
        return log_probs.float(), lens

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log the training loss.

        Arguments
        ---------
        stage : sb.Stage
            The stage.
        stage_loss : float
            Its mean loss.
        epoch : int, optional
            Its number.
        """
        super().on_stage_end(stage, stage_loss, epoch)
        if stage == sb.Stage.TRAIN:
            self.hparams.train_logger.log_stats(
                {"model": self.training_of, "lr": self.lr},
                train_stats={"loss": float(stage_loss)},
            )

    def in_memory(self, items):
        """Make a loader of strings to measure on, at many scales.

        Arguments
        ---------
        items : list of dict
            Strings.

        Returns
        -------
        DataLoader
            Of batches that are put together once.
        """
        return torch.utils.data.DataLoader(
            list(self.evaluation_loader(items)),
            batch_size=None,
            collate_fn=_as_it_is,
        )

    def transcripts(self, data):
        """Decode with the weights at hand.

        Arguments
        ---------
        data : DataLoader
            From `in_memory`.

        Returns
        -------
        list of str, list of str
            References and hypotheses.
        """
        self.wer_on(data)
        return self._references, self._hypotheses


def _as_it_is(batch):
    return batch


def read_recordings(hparams, cache):
    """Read the real recordings and make the synthetic ones.

    Arguments
    ---------
    hparams : dict
        Of the recipe.
    cache : AudioCache
        Where synthetic waveforms go.

    Returns
    -------
    dict
        `{"real" | "synthetic": {split: [Recording, ...]}}`.
    """
    real = {
        split: read_manifest(
            os.path.join(hparams["prepared_folder"], f"{split}.csv")
        )
        for split in ("train", "valid", "test")
    }
    synthetic = {
        split: synthesize_digits(
            hparams["vocabulary"],
            hparams["voices"],
            takes=hparams[f"{split}_takes_per_voice"],
            sample_rate=hparams["sample_rate"],
            seed=number,
            split=split,
            prefix=f"synthetic-{split}",
            cache=cache,
            show_progress=not is_helper(),
        )
        for number, split in enumerate(("train", "valid"))
    }
    return {"real": real, "synthetic": synthetic}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_seeds(sys.argv[2], title=TITLE)
        sys.exit()

    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)

    if not is_helper():
        sb.create_experiment_directory(
            experiment_directory=hparams["output_folder"],
            hyperparams_to_save=hparams_file,
            overrides=overrides,
        )

        # Data preparation
        from fsdd_prepare import prepare_fsdd  # noqa: E402

        run_on_main(
            prepare_fsdd,
            kwargs={
                "data_folder": hparams["data_folder"],
                "save_folder": hparams["prepared_folder"],
                "skip_prep": hparams["skip_prep"],
            },
        )

    # What the command line says goes first: --precision fp32
    hparams["precision"] = hparams["train_precision"]
    if hparams["precision"] == "auto":
        hparams["precision"] = fast_precision(run_opts.get("device"))
    hparams["noprogressbar"] = True  # one bar over all models instead
    cache = AudioCache(hparams["sample_rate"])
    brain = SyntheticToReal(
        modules=hparams["modules"],
        hparams=hparams,
        run_opts=run_opts,
        cache=cache,
    )
    strings = Strings(read_recordings(hparams, cache), hparams)
    models = plan_models(strings, hparams)
    folder = StudyModels(os.path.join(hparams["save_folder"], "models"), brain)
    with helpers(hparams["processes"] - 1):
        folder.train_all(models, folder.train, show_progress=not is_helper())
    if not is_helper():
        write_report(brain, folder, strings, hparams)
