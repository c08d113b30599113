#!/usr/bin/env python3
"""Recipe for one step of lifelong learning on strings of digits (FSDD).

A small Conformer CTC model learns one accent of English: the first from
random weights, each further one from the model that knows those before, by
plain fine-tuning, by a lifelong method, or with an edit at its end.
`study.py` makes the whole table that way.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/FSDD --domain us

The next accent, edited by TIES (a row of the hparams file):
> python train.py hparams/train.yaml --data_folder /path/to/FSDD \
>     --domain german --seen "[us]" --row ties \
>     --base results/sequential_editing/0/models/plain/us/save

A method with a memory (EWC, replay) finds it beside the run before:
> python train.py hparams/train.yaml ... --domain greek --seen "[us, german]" \
>     --row ewc --base .../german/save --memory .../german/memory.safetensors

On two processes (the same result as on one, see README.md):
> torchrun --standalone --nproc_per_node=2 train.py hparams/train.yaml \
>     --data_folder ... --distributed_backend gloo --device cpu

A run that was killed goes on from its newest checkpoint when started again.
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from common.dataio import evaluation_loader, make_dataset
from common.digits import make_digit_strings
from fsdd_prepare import prepare_fsdd
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.distributed import ddp_barrier, run_on_main

from speechbrain_taskarith.brains import CTCBrain, optimizer_steps, shard_loader
from speechbrain_taskarith.data import read_manifest
from speechbrain_taskarith.utils.progress import is_watched
from speechbrain_taskarith.utils.seeds import seed_random_numbers
from speechbrain_taskarith.vectors import open_state
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning

PLAIN = "plain"


class ASR(CTCBrain):
    """CTC on characters; forward pass and decoding are `CTCBrain`'s.

    It reads hparams.compute_features, hparams.fea_augment, hparams.ctc_cost
    and hparams.train_logger.
    """

    #: The lifelong method at work.
    method = FineTuning()

    def compute_objectives(self, predictions, batch, stage):
        """Add the lifelong method's penalty to the training loss."""
        loss = super().compute_objectives(predictions, batch, stage)
        if stage == sb.Stage.TRAIN:
            penalty = self.penalty(self.method, predictions)
            if penalty is not None:
                loss = loss + penalty
        return loss

    def on_fit_batch_start(self, batch, should_step):
        """Seed every batch by its number, so that a resumed run draws alike."""
        super().on_fit_batch_start(batch, should_step)
        seed_random_numbers(
            self.hparams.seed,
            self.hparams.noise_name,
            self.optimizer_step,
            self.step,
        )


def prepare(hparams):
    """Read the recordings' folder."""
    run_on_main(
        prepare_fsdd,
        kwargs={
            "data_folder": hparams["data_folder"],
            "save_folder": hparams["prepared_folder"],
            "skip_prep": hparams["skip_prep"],
        },
    )


def domain_strings(name, split, hparams):
    """Plan the strings of a domain: those of one accent, in one split.

    Test strings are the same for all seeds.
    """
    accent = hparams["domains"][name]
    recordings = read_manifest(
        f"{hparams['prepared_folder']}/{split}.csv", check="none"
    )
    takes = [take for take in recordings if take.accent == accent]
    if not takes:
        found = sorted({take.accent for take in recordings})
        raise ValueError(
            f"domain {name!r}: no {split} recording has the accent "
            f"{accent!r}; the data has {', '.join(found)}. Name accents of "
            "your data under `domains`"
        )
    training = split == "train"
    if training:
        is_first = name == [*hparams["seen"], hparams["domain"]][0]
        steps = hparams["first_steps"] if is_first else hparams["steps"]
        count = steps * hparams["batch_size"]
    else:
        speakers = len({take.spk_id for take in takes})
        count = speakers * hparams[f"{split}_strings_per_speaker"]
    items = make_digit_strings(
        takes,
        count,
        n_words=tuple(hparams["n_words"]),
        seed=hparams["seed"] if training else 0,
        prefix=f"{name}-{split}",
    )
    return [{"ID": key, **item} for key, item in items.items()]


def dataio_prepare(hparams, method):
    """Make the loaders of this training: train, valid, test.

    The latter two have batches of hparams["test_batch_size"].
    """
    domain, size = hparams["domain"], hparams["batch_size"]
    task = len(hparams["seen"]) + 1
    strings = method.items(domain_strings(domain, "train", hparams), task)
    # What a method remembers takes the places of new strings, so that every
    # method makes the same number of steps.
    planned = []
    for draw, start in enumerate(range(0, len(strings), size)):
        batch = strings[start : start + size]
        extra = method.extra_items(len(batch), draw)
        planned += batch[: len(batch) - len(extra)] + extra
    train_data = make_dataset(
        planned, hparams["tokenizer"], hparams["sample_rate"]
    )
    return (
        shard_loader(train_data, size),
        evaluation_loader(domain_strings(domain, "valid", hparams), hparams),
        evaluation_loader(domain_strings(domain, "test", hparams), hparams),
    )


def remember(method, brain, hparams):
    """Let the method remember the last domain seen, with the base's weights."""
    path = Path(hparams["output_folder"]) / "memory.safetensors"
    if not path.exists():
        if hparams["memory"]:
            method.load(hparams["memory"])
        tokenizer, rate = hparams["tokenizer"], hparams["sample_rate"]

        def loss(item):
            data = make_dataset([item], tokenizer, rate)
            return brain.loss_of(PaddedBatch([data[0]]))

        method.consolidate(
            hparams["model"],
            domain_strings(hparams["seen"][-1], "train", hparams),
            loss,
        )
        ddp_barrier()  # all have looked before it is there
        run_on_main(method.save, args=[path])
    method.load(path)


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

    prepare(hparams)

    # A row of the table: a lifelong method, or a rule for the edit
    row = {} if hparams["row"] == PLAIN else hparams["rows"][hparams["row"]]
    method, rule = row.get("method", FineTuning()), row.get("rule")
    if rule is not None and "method" in row:
        raise ValueError(
            f"row {hparams['row']!r}: give a lifelong method or a rule, not "
            "both"
        )
    seen, model = hparams["seen"], hparams["model"]
    lr = row.get("lr", hparams["lr"]) if seen else hparams["first_lr"]

    if hparams["base"]:
        model.load_state_dict(dict(open_state(hparams["base"])))
    # What is kept and evaluated: base + scale * rule(fine-tuned - base)
    if rule is not None:
        hparams["checkpointer"] = hparams["editing_checkpointer"](
            base=hparams["base"], rule=rule, scale=row.get("scale")
        )
    brain = ASR(
        modules=hparams["modules"],
        opt_class=lambda parameters: hparams["opt_class"](parameters, lr=lr),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.method = method
    if seen:
        remember(method, brain, hparams)
    method.before_task(model, len(seen) + 1)
    method.freeze(model)

    train_loader, valid_loader, test_loader = dataio_prepare(hparams, method)
    steps = optimizer_steps(brain, train_loader, hparams["number_of_epochs"])
    hparams["lr_annealing"] = brain.hparams.lr_annealing = hparams[
        "lr_annealing"
    ](
        initial_value=lr,
        num_warmup_steps=round(hparams["warmup_share"] * steps),
        num_training_steps=steps,
    )
    brain.checkpointer.add_recoverable("lr_annealing", hparams["lr_annealing"])
    brain.checkpointer.add_recoverable("dataloader-TRAIN", train_loader)

    brain.fit(hparams["epoch_counter"], train_loader, valid_loader)
    brain.evaluate(test_loader)


if __name__ == "__main__":
    train(sys.argv[1:])
    # Without it a process that ends first may take the others down.
    if torch.distributed.is_initialized():
        ddp_barrier()
        torch.distributed.destroy_process_group()
