#!/usr/bin/env python3
"""Recipe for one model of SYN2REAL on strings of digits (FSDD).

A Conformer CTC model learns strings of words from synthetic voices or from
real recordings. The difference between two such models of one domain is a
task vector, which brings another domain's synthetic model closer to real
speech; `study.py` makes the whole table that way. What it compares stands in
hparams["rows"], hparams["scales"], hparams["target_scales"] and
hparams["paper_scale"].

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/FSDD \
>     --training_of pretrained

A domain's model of synthetic and of real speech, from the first model:
> python train.py hparams/train.yaml --data_folder /path/to/FSDD \
>     --training_of synthetic --domain two_five \
>     --base results/syn2real/0/models/pretrained/save
> python train.py hparams/train.yaml ... --training_of real ...

A run that was killed goes on from its newest checkpoint when started again.
"""

import os
import sys

import speechbrain as sb
from common.dataio import evaluation_loader, make_dataset
from common.precision import choose_precision
from common.synthesis import prepare_synthetic_digits
from fsdd_prepare import prepare_fsdd
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import run_on_main
from strings import TRAININGS, Strings

from speechbrain_taskarith.brains import (
    CTCBrain,
    optimizer_steps,
    shard_loader,
)
from speechbrain_taskarith.data import read_manifest
from speechbrain_taskarith.utils.progress import is_watched
from speechbrain_taskarith.utils.seeds import seed_random_numbers
from speechbrain_taskarith.vectors import open_state


class ASR(CTCBrain):
    """CTC on words: forward pass, loss and decoding are `CTCBrain`'s.

    It reads hparams.compute_features, hparams.fea_augment, hparams.ctc_cost
    and hparams.train_logger.
    """

    def on_fit_batch_start(self, batch, should_step):
        """Seed every batch by its number, so that a resumed run draws alike.

        The real and the synthetic model of a domain get the same masks: what
        differs between them is the speech alone.
        """
        super().on_fit_batch_start(batch, should_step)
        domain = self.hparams.domain
        if self.hparams.training_of == "pretrained":
            domain = "pretrained"
        seed_random_numbers(
            self.hparams.seed, domain, self.optimizer_step, self.step
        )


def prepare(hparams):
    """Read the recordings' folder, and make the synthetic ones."""
    run_on_main(
        prepare_fsdd,
        kwargs={
            "data_folder": hparams["data_folder"],
            "save_folder": hparams["prepared_folder"],
            "skip_prep": hparams["skip_prep"],
        },
    )
    # A word that nobody says is an error before anything is synthesised.
    Strings({"real": read_recordings("real", hparams)}, hparams)
    run_on_main(
        prepare_synthetic_digits,
        kwargs={
            "save_folder": os.path.join(
                hparams["prepared_folder"], "synthetic"
            ),
            "words": hparams["vocabulary"],
            "voices": hparams["voices"],
            "takes": {
                split: hparams[f"{split}_takes_per_voice"]
                for split in ("train", "valid")
            },
            "sample_rate": hparams["sample_rate"],
            "skip_prep": hparams["skip_prep"],
        },
    )


def read_recordings(side, hparams):
    """Read the manifests of `prepare`: `{split: [Recording, ...]}`."""
    folder = hparams["prepared_folder"]
    if side == "real":
        paths = {s: f"{folder}/{s}.csv" for s in ("train", "valid", "test")}
    else:
        paths = {
            split: f"{folder}/synthetic/{split}/manifest.csv"
            for split in ("train", "valid")
        }
    return {s: read_manifest(path, check="none") for s, path in paths.items()}


def make_strings(hparams):
    """Return what plans the strings of both sides.

    That reads hparams["domains"], hparams["shared_words"],
    hparams["own_share"], hparams["n_words"], hparams["valid_strings"],
    hparams["test_strings"] and hparams["left_out_speaker"].
    """
    recordings = {
        side: read_recordings(side, hparams) for side in ("real", "synthetic")
    }
    return Strings(recordings, hparams)


def dataio_prepare(hparams):
    """Make the loaders of this training: train, valid, test.

    A model learns for hparams["pretraining_steps"], hparams["domain_steps"] or
    hparams["mixed_steps"]. It is validated on strings of the kind that it
    learns from, and tested on real strings of its domain,
    hparams["test_batch_size"] at a time.
    """
    strings, domain = make_strings(hparams), hparams["domain"]
    without = hparams["without_speaker"]
    side = "real" if hparams["training_of"] == "real" else "synthetic"
    train_data = make_dataset(
        strings.of_training(hparams["training_of"], domain, without),
        hparams["tokenizer"],
        hparams["sample_rate"],
    )
    return (
        shard_loader(train_data, hparams["batch_size"]),
        evaluation_loader(
            strings.held_out(side, "valid", domain, without), hparams
        ),
        evaluation_loader(strings.held_out("real", "test", domain), hparams),
    )


def train(argv):
    """Train one model as the command line says; `study.py` calls it, too."""
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

    prepare(hparams)
    train_loader, valid_loader, test_loader = dataio_prepare(hparams)

    # What is trained, where it starts, and how fast it learns
    stage = TRAININGS[hparams["training_of"]]
    lr = hparams[f"{stage}_lr"]
    checkpointer = hparams["checkpointer"]
    checkpointer.add_recoverable("dataloader-TRAIN", train_loader)
    if hparams["base"]:
        hparams["model"].load_state_dict(dict(open_state(hparams["base"])))
    # What the command line says goes first: --precision fp32
    hparams["precision"] = choose_precision(
        hparams["train_precision"], run_opts
    )

    brain = ASR(
        modules=hparams["modules"],
        opt_class=lambda parameters: hparams["opt_class"](parameters, lr=lr),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=checkpointer,
    )
    steps = optimizer_steps(brain, train_loader, hparams["number_of_epochs"])
    brain.hparams.lr_annealing = brain.hparams.lr_annealing(
        initial_value=lr,
        num_warmup_steps=round(hparams["warmup_share"] * steps),
        num_training_steps=steps,
    )
    checkpointer.add_recoverable("lr_annealing", brain.hparams.lr_annealing)
    brain.fit(hparams["epoch_counter"], train_loader, valid_loader)
    brain.evaluate(test_loader)


if __name__ == "__main__":
    train(sys.argv[1:])
