#!/usr/bin/env python3
"""Recipe for transfer learning of streaming transducers (FSDD), one training.

A streaming transducer learns digits of other languages from synthetic voices
(`stage: pretraining`), or English from ten minutes of recordings, with the
transducer loss and then with MinWER. `study.py` trains and compares all
models.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/FSDD \
>     --stage pretraining --vocab_size "!ref <multilingual_neurons>"
> python train.py hparams/train.yaml --data_folder /path/to/FSDD \
>     --stage rnnt --encoder_from results/transducer/0/models/pretraining/save
> python train.py hparams/train.yaml --data_folder /path/to/FSDD \
>     --stage min_wer --start_from results/transducer/0/models/rnnt/save

Start a killed run again by the same command: it resumes.
"""

import os
import sys

import speechbrain as sb
import torch
from common.dataio import evaluation_loader, make_dataset
from common.strings import in_order
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger
from strings import multilingual_strings, target_strings

from speechbrain_taskarith.brains import optimizer_steps, shard_loader
from speechbrain_taskarith.brains.training import WholeUpdates
from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.transducer import (
    joint_transducer_loss,
    transfer_encoder,
)
from speechbrain_taskarith.utils.files import write_json
from speechbrain_taskarith.utils.progress import is_watched
from speechbrain_taskarith.utils.seeds import seed_random_numbers
from speechbrain_taskarith.vectors import open_state

logger = get_logger(__name__)

# For each stage: whose steps and learning rate it has, and a name for its
# random numbers, which stages share that are compared.
STAGES = {
    "pretraining": ("pretraining", "multilingual"),
    "rnnt": ("rnnt", "target"),
    "full_context": ("rnnt", "full_context"),
    "min_wer": ("min_wer", "further"),
    "more_rnnt": ("min_wer", "further"),
}


class ASR(WholeUpdates, sb.Brain):
    """Class that manages the training loop: RNN-T, or `min_wer` if it is set."""

    min_wer = None

    def compute_forward(self, batch, stage):
        """Forward computations from the waveforms to the encoder's output."""
        wavs, lens = batch.to(self.device).sig
        if stage == sb.Stage.TRAIN:
            wavs = self.hparams.speed_perturb(wavs)
        x = self.hparams.transducer["features"](wavs)
        # With the statistics of `learn_statistics`; epoch 1 has no update.
        x = self.modules.normalize(x, lens, epoch=1)
        if stage == sb.Stage.TRAIN:
            x, lens = self.hparams.fea_augment(x, lens)
        x, lens = self.modules.model["frontend"](x, lens)
        x = self.modules.model["encoder"](x, lens)
        x = torch.nn.functional.dropout(
            x, self.hparams.dropout, training=self.modules.training
        )
        return x, lens

    def compute_objectives(self, predictions, batch, stage):
        """Return the loss; outside training also decode."""
        x, lens = predictions
        tokens, token_lens = batch.tokens
        if stage == sb.Stage.TRAIN and self.min_wer is not None:
            return self.min_wer(x, lens, tokens, token_lens, batch.wrd)
        model = self.modules.model
        blank = self.hparams.transducer["blank_index"]
        predictor_out, _ = model["predictor"](
            torch.nn.functional.pad(tokens, (1, 0), value=blank)
        )
        loss = joint_transducer_loss(
            model["joint"],
            x,
            predictor_out,
            tokens,
            lens,
            token_lens,
            blank,
            memory_budget=self.hparams.memory_budget,
        )
        if stage != sb.Stage.TRAIN:
            found = self.hparams.transducer["searcher"].decode(x, lens)
            tokens = [n_best[0].tokens for n_best in found]
            self.references += batch.wrd
            self.hypotheses += self.hparams.tokenizer.decode(tokens)
        return loss

    def learn_statistics(self, loader):
        """Compute mean and deviation of the features of a training set."""
        normalize = self.modules.normalize.train()
        normalize.count = 0
        for batch in loader:
            wavs, lens = batch.to(self.device).sig
            x = self.hparams.transducer["features"](wavs)
            normalize(x, lens, epoch=0)

    def on_fit_batch_start(self, batch, should_step):
        """Seed each batch: a resumed run draws the same random numbers."""
        super().on_fit_batch_start(batch, should_step)
        _, draws = STAGES[self.hparams.stage]
        seed_random_numbers(
            self.hparams.seed, draws, self.optimizer_step, self.step
        )

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Update the learning rate."""
        if should_step:
            self.hparams.lr_annealing(self.optimizer)

    def on_stage_start(self, stage, epoch=None):
        """Start with empty lists of transcripts."""
        self.references, self.hypotheses = [], []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log; after training save the model, the only one of this training."""
        stats = {"loss": float(stage_loss)}
        if stage == sb.Stage.TRAIN:
            if self.min_wer is not None:
                stats.update(self.min_wer.statistics())
            self.hparams.train_logger.log_stats(
                {"model": self.hparams.training_name}, train_stats=stats
            )
            self.checkpointer.save_and_keep_only(meta=stats)
            return
        stats["WER"] = wer(self.references, self.hypotheses).wer
        self.hparams.train_logger.log_stats(
            {"stage": stage.name.lower()}, test_stats=stats
        )


def prepare(hparams):
    """Prepare the recordings on the main process."""
    from fsdd_prepare import prepare_fsdd

    run_on_main(
        prepare_fsdd,
        kwargs={
            "data_folder": hparams["data_folder"],
            "save_folder": hparams["prepared_folder"],
            "skip_prep": hparams["skip_prep"],
        },
    )


def dataio_prepare(hparams):
    """Prepare the loaders: statistics, training, validation, test.

    Pretraining has no validation and test data. Its strings are made as
    hparams["pretraining_strings"], hparams["languages"], hparams["variants"],
    hparams["takes_per_voice"] and hparams["simulation"] say; the target's as
    hparams["train_minutes"], hparams["rare_words"], hparams["rare_share"],
    hparams["valid_strings"] and hparams["test_strings"]; both are of
    hparams["n_words"], and tested in batches of hparams["test_batch_size"].
    """
    steps, _ = STAGES[hparams["stage"]]
    if hparams["stage"] == "pretraining":
        strings, held_out = multilingual_strings(hparams["domain"], hparams), ()
    else:
        strings = target_strings("train", hparams)
        held_out = ("valid", hparams["report_on"])
    steps = hparams[f"{steps}_steps"]
    count = steps * hparams["batch_size"]
    train_data = make_dataset(
        in_order(strings, count, hparams["seed"]),
        hparams["tokenizer"],
        hparams["sample_rate"],
    )
    train_loader = shard_loader(train_data, hparams["batch_size"])
    loaders = [
        evaluation_loader(target_strings(split, hparams), hparams)
        for split in held_out
    ]
    return (
        evaluation_loader(strings, hparams),
        train_loader,
        *(loaders or (None, None)),
    )


def load_start(hparams):
    """Load the weights to start from: a whole model, an encoder, or both."""
    model = hparams["transducer"]["model"]
    if hparams["start_from"]:
        model.load_state_dict(dict(open_state(hparams["start_from"])))
    if hparams["encoder_from"]:
        # Predictor, joint and labels are new.
        for name in ("frontend", "encoder"):
            report = transfer_encoder(
                hparams["encoder_from"], model[name], prefix=f"{name}."
            )
            logger.info(f"{name}: {report}")


def train(argv):
    """Train and test the model of a command line; study.py calls it as well."""
    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    hparams.setdefault("noprogressbar", not is_watched())

    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
        save_env_desc=hparams["save_env_desc"],
    )

    # Data preparation
    prepare(hparams)
    language = "target"
    if hparams["stage"] == "pretraining":
        language = "multilingual"
        if hparams["vocab_size"] != hparams["multilingual_neurons"]:
            raise ValueError(
                f"vocab_size: {hparams['vocab_size']}; pretraining needs "
                '--vocab_size "!ref <multilingual_neurons>"'
            )
    hparams["tokenizer"] = hparams["tokenizers"][language]
    statistics, train_loader, valid_loader, test_loader = dataio_prepare(
        hparams
    )

    # The model: what it starts from, and how it is trained
    transducer = hparams["transducer"]
    load_start(hparams)
    name, _ = STAGES[hparams["stage"]]
    lr = hparams[f"{name}_lr"]
    checkpointer = hparams["checkpointer"]
    checkpointer.add_recoverable("dataloader-TRAIN", train_loader)

    asr_brain = ASR(
        modules={
            "model": transducer["model"],
            "normalize": transducer["normalize"],
        },
        opt_class=lambda parameters: hparams["opt_class"](parameters, lr=lr),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=checkpointer,
    )
    steps = optimizer_steps(
        asr_brain, train_loader, hparams["number_of_epochs"]
    )
    asr_brain.hparams.lr_annealing = hparams["make_lr_annealing"](
        initial_value=lr,
        num_warmup_steps=round(hparams["warmup_share"] * steps),
        num_training_steps=steps,
    )
    checkpointer.add_recoverable("lr_annealing", asr_brain.hparams.lr_annealing)
    asr_brain.learn_statistics(statistics)
    if hparams["stage"] == "min_wer":
        asr_brain.min_wer = hparams["min_wer"](
            transducer["searcher"],
            detokenize=transducer["detokenize"],
            memory_budget=hparams["memory_budget"],
        )
        checkpointer.add_recoverable(
            "min_wer", asr_brain.min_wer, optional_load=True
        )

    # Training
    asr_brain.fit(hparams["epoch_counter"], train_loader, valid_loader)

    # Testing
    result = {"statistics": checkpointer.find_checkpoint().meta}
    if test_loader is not None:
        asr_brain.evaluate(test_loader)
        result["references"] = asr_brain.references
        result["hypotheses"] = asr_brain.hypotheses
    write_json(
        os.path.join(hparams["output_folder"], f"{hparams['report_on']}.json"),
        result,
    )


if __name__ == "__main__":
    train(sys.argv[1:])
