#!/usr/bin/env python3
"""Recipe for Audio-AdapterFusion on strings of digits (FSDD).

A small Conformer CTC model is trained first and then frozen. Each accent gets
an adapter of its own; combinations of the adapters then serve all accents
without being told which one is spoken. They are compared with full
fine-tuning, one shared adapter, LoRA and routing by accent, and on accents
that no adapter has seen. One run makes the tables of one seed; a run that was
killed goes on where it stopped when started again.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0

Several seeds make one table (mean and standard deviation):
> python train.py hparams/train.yaml --data_folder ... --seed 1
> python train.py --merge results/adapter_fusion
"""

import sys

import speechbrain as sb
from common.brain import DigitStringBrain
from common.digits import AudioCache
from hyperpyyaml import load_hyperpyyaml
from report import TITLE, write_report
from speechbrain.utils.distributed import run_on_main
from study import Study
from tasks import Tasks

from speechbrain_taskarith.adapters import AudioAdapterFusion
from speechbrain_taskarith.brains import fast_precision
from speechbrain_taskarith.metrics import merge_seeds


class AdapterFusionBrain(DigitStringBrain):
    """The Brain: CTC on words; knows the task of every training string."""

    def dataset(self, items):
        """Keep the strings' tasks beside what `DigitStringBrain` gives.

        Arguments
        ---------
        items : list of dict
            Strings with their `task`.

        Returns
        -------
        DynamicItemDataset
            With `task` besides.
        """
        data = super().dataset(items)
        data.set_output_keys(["id", "sig", "tokens", "wrd", "task"])
        return data

    def compute_forward(self, batch, stage):
        """Score every frame; in float32 whatever the precision of training.

        Arguments
        ---------
        batch : PaddedBatch
            See `CTCBrain`.
        stage : sb.Stage
            Training augments; testing notes what was attended to.

        Returns
        -------
        tuple
            Log-probabilities [batch, frames, labels], relative lengths.
        """
        log_probs, lens = super().compute_forward(batch, stage)
        if stage == sb.Stage.TEST and self._fusion_in_use() is not None:
            attention = self.hparams.adapters.attention(lens)
            self.attention.append((len(lens), attention))
        return log_probs.float(), lens

    def compute_objectives(self, predictions, batch, stage):
        """Add what teaches the attention whose adapter is whose.

        Arguments
        ---------
        predictions : tuple
            From `compute_forward`.
        batch : PaddedBatch
            The batch.
        stage : sb.Stage
            Only training has the term.

        Returns
        -------
        torch.Tensor
            A scalar.
        """
        loss = super().compute_objectives(predictions, batch, stage)
        fusion = self._fusion_in_use()
        if stage == sb.Stage.TRAIN and fusion is not None:
            adapters = self.hparams.adapters
            loss = loss + adapters.penalty()
            if fusion.guided:
                guide = adapters.attention_loss(batch.task, predictions[1])
                loss = loss + self.hparams.guidance * guide
        return loss

    def _fusion_in_use(self):
        """Return the first layer's fusion, or None where none is in use."""
        adapters = self.hparams.adapters
        in_use = adapters.in_use
        if not (self.has_adapters and isinstance(in_use, str)):
            return None
        combination = adapters.layers[0].combination
        is_fusion = isinstance(combination, AudioAdapterFusion)
        return combination if in_use == "combined" and is_fusion else None

    #: False while a model without adapters (LoRA) is trained.
    has_adapters = True

    def on_stage_start(self, stage, epoch=None):
        """Start to collect attention anew.

        Arguments
        ---------
        stage : sb.Stage
            The stage.
        epoch : int, optional
            Its number.
        """
        super().on_stage_start(stage, epoch)
        self.attention = []

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
                {"training": self.training_of, "lr": self.lr},
                train_stats={"loss": float(stage_loss)},
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_seeds(sys.argv[2], title=TITLE)
        sys.exit()

    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)

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
    hparams["noprogressbar"] = True  # one bar over all trainings instead
    cache = AudioCache(hparams["sample_rate"])
    brain = AdapterFusionBrain(
        modules=hparams["modules"],
        hparams=hparams,
        run_opts=run_opts,
        cache=cache,
    )
    hparams["adapters"].freeze(hparams["normalize"])
    study = Study(brain, Tasks(hparams, cache), hparams)
    write_report(study.run(), hparams)
