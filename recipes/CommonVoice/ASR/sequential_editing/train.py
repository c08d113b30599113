#!/usr/bin/env python3
"""Recipe for one step of lifelong learning on accents of Common Voice.

A Conformer with CTC on characters learns one accent: the first from random
weights, each further one from the model that knows those before, by plain
fine-tuning or with an edit at its end. `study.py` makes the whole table that
way, and with Whisper (`whisper_train.py`) too.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/cv-corpus/en \
>     --accent us

The next accent, edited by TIES (a row of hparams/models/rows.yaml):
> python train.py hparams/train.yaml --data_folder /path/to/cv-corpus/en \
>     --accent england --row ties --base results/sequential_editing/us/save

On several GPUs:
> torchrun --nproc_per_node=2 train.py hparams/train.yaml ...

A run that was killed goes on from its newest checkpoint when started again.
"""

import sys

import speechbrain as sb
from characters import CharacterBrain, read_manifest
from characters import make_dataset as make_character_dataset
from common.precision import choose_precision
from common_voice_prepare import prepare_common_voice
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main

from speechbrain_taskarith.brains import optimizer_steps
from speechbrain_taskarith.utils.progress import is_watched
from speechbrain_taskarith.vectors import open_state

PLAIN = "plain"


class ASR(CharacterBrain):
    """CTC on characters; forward pass and decoding are `CTCBrain`'s.

    It reads hparams.compute_features, hparams.fea_augment, hparams.ctc_cost,
    hparams.blank_index and hparams.train_logger.
    """


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
    """Make the data sets (train, valid, test) and the train loader's options."""
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
    options = dict(hparams["train_loader_kwargs"])
    if hparams["dynamic_batching"]:
        sampler = DynamicBatchSampler(
            data["train"],
            **hparams["dynamic_batch_sampler"],
            length_func=lambda row: row["duration"],
        )
        options = {
            "batch_sampler": sampler,
            "num_workers": hparams["num_workers"],
        }
    return data, options


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
        prepare_common_voice,
        kwargs={
            "data_folder": hparams["data_folder"],
            "save_folder": hparams["prepared_folder"],
            "accents": hparams["accents"],
            "source": hparams["source"],
            "max_seconds": hparams["avoid_if_longer_than"],
            "skip_prep": hparams["skip_prep"],
        },
    )
    data, train_options = dataio_prepare(hparams)

    rows = hparams["compared"]["rows"]
    if hparams["row"] not in {PLAIN, *rows}:
        raise ValueError(
            f"row {hparams['row']!r}: expected {PLAIN} or one of "
            f"{', '.join(rows)}"
        )
    rule = rows.get(hparams["row"], {}).get("rule")
    if hparams["base"]:
        hparams["model"].load_state_dict(dict(open_state(hparams["base"])))
    # What is kept and evaluated: base + scale * rule(fine-tuned - base)
    if rule is not None:
        hparams["checkpointer"] = hparams["editing_checkpointer"](
            base=hparams["base"] or "start", rule=rule
        )

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
    # The Brain tells it the epoch, for which it makes other batches.
    brain.train_sampler = train_options.get("batch_sampler")
    train_loader = brain.make_dataloader(
        data["train"], sb.Stage.TRAIN, **train_options
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
