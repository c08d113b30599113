#!/usr/bin/env python3
"""Recipe for CTC on characters with wav2vec 2.0 (Conformer) on SLURP.

A manifest is a CSV file with the columns ID, duration, wav and text.
`slurp_prepare.py` writes one for each scenario and split; the synthetic side
comes from `synthesize.py` or any other engine. Whisper is trained on the same
manifests by `whisper_train.py`; `study.py` makes the whole table.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/SLURP --scenario qa

On any manifest, from other weights than the public ones:
> python train.py hparams/train.yaml --data_folder /path/to/SLURP \
>     --train_csv synthetic/qa/manifest.csv --base results/mixed/save

On several GPUs:
> torchrun --nproc_per_node=2 train.py hparams/train.yaml ...

A run that was killed goes on from its newest checkpoint when started again.
"""

import sys

import speechbrain as sb
from characters import make_dataset as make_character_dataset
from characters import read_manifest, scored
from hyperpyyaml import load_hyperpyyaml
from scoring import character_errors
from slurp_prepare import prepare_slurp
from speechbrain.utils.distributed import run_on_main

from speechbrain_taskarith.brains import CTCBrain, fast_precision
from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.vectors import open_state


class ASR(CTCBrain):
    """CTC on characters; forward pass and decoding are `CTCBrain`'s.

    It reads hparams.ctc_cost and hparams.blank_index.
    """

    def _collect(self, batch, hypotheses):
        self.references |= dict(zip(batch.id, batch.text))
        self.hypotheses |= dict(zip(batch.id, hypotheses))

    def on_stage_start(self, stage, epoch=None):
        """Start a list of transcripts."""
        self.references, self.hypotheses = {}, {}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log, and keep an epoch's checkpoint."""
        stats = {"loss": stage_loss}
        if stage == sb.Stage.TRAIN:
            self.train_stats = stats
            if self.hparams.valid_csv is None:
                self.keep(epoch, {})
            return
        stats |= self.score()
        if stage == sb.Stage.VALID:
            self.keep(epoch, stats)
        else:
            self.hparams.train_logger.log_stats(
                {"Epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )

    def score(self):
        """Count the errors of what was found."""
        self.references = scored(self.references)
        self.hypotheses = scored(self.hypotheses)
        words = wer(self.references, self.hypotheses)
        characters = character_errors(self.references, self.hypotheses)
        return {"WER": words.wer, "CER": characters.wer}

    def keep(self, epoch, stats):
        """Log an epoch, and keep its checkpoint."""
        self.hparams.train_logger.log_stats(
            {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
            train_stats=self.train_stats,
            valid_stats=stats or None,
        )
        self.checkpointer.save_and_keep_only(
            meta={"epoch": epoch, **stats}, num_to_keep=1
        )


def read_rows(path, hparams):
    """Read a manifest; what is too long is left out."""
    return read_manifest(
        path,
        hparams["data_folder"],
        hparams["characters"],
        hparams["avoid_if_longer_than"],
    )


def make_dataset(rows, hparams):
    """Make a data set of a manifest's rows."""
    return make_character_dataset(
        rows, hparams["tokenizer"], hparams["sample_rate"]
    )


def dataio_prepare(hparams):
    """Make the data sets: train, valid, test."""
    data = {
        split: make_dataset(
            read_rows(hparams[f"{split}_csv"], hparams), hparams
        )
        for split in ("train", "valid", "test")
        if hparams[f"{split}_csv"] is not None
    }
    for split in ("valid", "test"):
        if split in data:
            data[split] = data[split].filtered_sorted(sort_key="duration")
    return data


def train(argv):
    """Train one model as the command line says; `study.py` calls it, too."""
    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)

    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
        save_env_desc=hparams["save_env_desc"],
    )
    run_on_main(
        prepare_slurp,
        kwargs={
            "data_folder": hparams["data_folder"],
            "save_folder": hparams["prepared_folder"],
            "held_out": hparams["held_out"],
            "skip_prep": hparams["skip_prep"],
        },
    )
    data = dataio_prepare(hparams)
    if hparams["base"]:
        hparams["model"].load_state_dict(dict(open_state(hparams["base"])))

    batches = -(-len(data["train"]) // hparams["batch_size"])
    steps = batches * hparams["number_of_epochs"]
    hparams["lr_annealing"] = hparams["lr_annealing"](
        initial_value=hparams["lr"],
        num_warmup_steps=round(hparams["warmup_share"] * steps),
        num_training_steps=steps,
    )
    hparams["checkpointer"].add_recoverable(
        "lr_annealing", hparams["lr_annealing"]
    )
    if hparams["train_precision"] == "auto":
        # What the command line says goes first: --precision fp32
        precision = fast_precision(run_opts.get("device"))
        hparams |= {"precision": precision, "eval_precision": precision}

    brain = ASR(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.fit(
        hparams["epoch_counter"],
        data["train"],
        data.get("valid"),
        train_loader_kwargs=hparams["train_loader_kwargs"],
        valid_loader_kwargs=hparams["test_loader_kwargs"],
    )
    if "test" in data:
        brain.evaluate(
            data["test"], test_loader_kwargs=hparams["test_loader_kwargs"]
        )


if __name__ == "__main__":
    train(sys.argv[1:])
