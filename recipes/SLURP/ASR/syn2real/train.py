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
>     --train_csv synthetic/qa/manifest.csv --data_root synthetic/qa \
>     --base results/mixed/save

On several GPUs:
> torchrun --nproc_per_node=2 train.py hparams/train.yaml ...

A run that was killed goes on from its newest checkpoint when started again.
"""

import sys

import speechbrain as sb
from characters import CharacterBrain, read_manifest
from characters import make_dataset as make_character_dataset
from common.precision import choose_precision
from hyperpyyaml import load_hyperpyyaml
from slurp_prepare import prepare_slurp
from speechbrain.utils.distributed import run_on_main

from speechbrain_taskarith.brains import optimizer_steps
from speechbrain_taskarith.utils.progress import is_watched
from speechbrain_taskarith.vectors import open_state


class ASR(CharacterBrain):
    """CTC on characters; forward pass and decoding are `CTCBrain`'s.

    It reads hparams.ctc_cost, hparams.blank_index and hparams.train_logger.
    """


def read_rows(path, hparams):
    """Read a manifest; what is too long is left out."""
    return read_manifest(
        path,
        hparams["data_root"],
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
    hparams.setdefault("noprogressbar", not is_watched())

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

    precision = choose_precision(hparams["train_precision"], run_opts)
    # What the command line says goes first: --precision fp32
    hparams |= {"precision": precision, "eval_precision": precision}

    brain = ASR(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    train_loader = brain.make_dataloader(
        data["train"], sb.Stage.TRAIN, **hparams["train_loader_kwargs"]
    )
    steps = optimizer_steps(brain, train_loader, hparams["number_of_epochs"])
    brain.hparams.lr_annealing = brain.hparams.lr_annealing(
        initial_value=hparams["lr"],
        num_warmup_steps=round(hparams["warmup_share"] * steps),
        num_training_steps=steps,
    )
    brain.checkpointer.add_recoverable(
        "lr_annealing", brain.hparams.lr_annealing
    )
    brain.fit(
        hparams["epoch_counter"],
        train_loader,
        data.get("valid"),
        valid_loader_kwargs=hparams["test_loader_kwargs"],
    )
    if "test" in data:
        brain.evaluate(
            data["test"], test_loader_kwargs=hparams["test_loader_kwargs"]
        )


if __name__ == "__main__":
    train(sys.argv[1:])
