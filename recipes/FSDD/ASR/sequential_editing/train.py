#!/usr/bin/env python3
"""Recipe for sequential model editing on strings of digits (FSDD).

A small Conformer CTC model learns US English first, then one accent after
another without old data. One run makes the whole table of one seed: task
arithmetic, TIES and chosen scales against the usual baselines of lifelong
learning. A run that was killed goes on where it stopped when started again.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0

Several seeds make one table (mean and standard deviation):
> python train.py hparams/train.yaml --data_folder ... --seed 1
> python train.py --merge results/sequential_editing

On two processes (the same result as on one, see README.md):
> torchrun --standalone --nproc_per_node=2 train.py hparams/train.yaml \
>     --data_folder ... --distributed_backend gloo --device cpu
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from common.brain import DigitStringBrain
from common.digits import make_digit_strings
from hyperpyyaml import load_hyperpyyaml
from report import TITLE, write_report
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import Domain
from speechbrain_taskarith.data import read_manifest
from speechbrain_taskarith.metrics import merge_seeds
from speechbrain_taskarith.vectors import open_state, save_state, search_scale

logger = get_logger(__name__)


def make_domains(brain, hparams):
    """Plan every domain's strings; train, valid and test recordings apart."""
    recordings = {
        split: read_manifest(f"{hparams['prepared_folder']}/{split}.csv")
        for split in ("train", "valid", "test")
    }
    domains = []
    for number, (name, accent) in enumerate(hparams["domains"].items()):
        steps = hparams["steps"] if number else hparams["first_steps"]
        plans = {}
        for split, takes in recordings.items():
            of_domain = [take for take in takes if take.accent == accent]
            if not of_domain:
                found = sorted({take.accent for take in takes})
                raise ValueError(
                    f"domain {name!r}: no {split} recording has the accent "
                    f"{accent!r}; the data has {', '.join(found)}. Name "
                    "accents of your data under `domains`"
                )
            speakers = len({take.spk_id for take in of_domain})
            # Test strings are the same for all seeds.
            training = split == "train"
            count = (
                steps * hparams["batch_size"]
                if training
                else speakers * hparams[f"{split}_strings_per_speaker"]
            )
            items = make_digit_strings(
                of_domain,
                count,
                n_words=tuple(hparams["n_words"]),
                seed=hparams["seed"] if training else 0,
                prefix=f"{name}-{split}",
            )
            plans[split] = [{"ID": key, **item} for key, item in items.items()]
        domains.append(
            Domain(
                name,
                plans["train"],
                brain.evaluation_loader(plans["valid"]),
                brain.evaluation_loader(plans["test"]),
            )
        )
    return domains


def learn_first_model(brain, domain, hparams):
    """Train the first domain from random weights; all rows start from it."""
    folder = Path(hparams["save_folder"]) / "first_model"
    path = folder / "kept.safetensors"
    if not path.exists():
        brain.lr = hparams["first_lr"]
        initial = {
            k: v.clone() for k, v in hparams["model"].state_dict().items()
        }
        state = brain.fine_tune(domain, initial, folder / "training")
        run_on_main(save_state, args=[state, path])
    return dict(open_state(path))


def chooser(hparams, row, choose_on):
    """Return what chooses the scale of each task vector of a row."""
    output = Path(hparams["output_folder"])

    def choose(brain, base, tau, seen):
        new = seen[-1].name
        domains = seen if choose_on == "seen" else seen[-1:]

        def wer(model):
            return {d.name: brain.wer_on(d.valid) for d in domains}

        search = search_scale(
            hparams["model"],
            base,
            tau,
            wer,
            [0.0, *hparams["scales"]],
            split="valid",
            select_on=f"valid_{choose_on}",
            hopeless=None,
            enable_progress=if_main_process(),
        )
        best = search.best
        if choose_on == "new":
            best = smallest_scale(search.table, new, hparams["share_of_gain"])
        if if_main_process():
            search.to_csv(output / "scales" / f"{row}_{new}.csv")
            search.plot(output / "plots" / f"wer_against_scale_{row}_{new}.png")
        logger.info(f"{row}, {new}: scale {best} ({search.select_on})")
        return best, search.select_on

    return choose


def smallest_scale(table, domain, share):
    """Return the smallest scale with a share of the gain at scale 1."""
    wers = {row["scale"]: row["domains"][domain] for row in table}
    enough = wers[0.0] - share * (wers[0.0] - wers[max(wers)])
    return min(scale for scale, value in wers.items() if value <= enough)


def wanted_rows(hparams):
    """Return the rows that `only` names; an unknown one is an error."""
    wanted = hparams["only"].split(",")
    unknown = set(wanted) - set(hparams["rows"]) - {"all"}
    if unknown:
        raise ValueError(
            f"only: no rows {', '.join(sorted(unknown))}; there are "
            f"{', '.join(hparams['rows'])}"
        )
    return {
        name: row
        for name, row in hparams["rows"].items()
        if "all" in wanted or name in wanted
    }


def run_rows(brain, domains, first, rows, hparams):
    """Learn the whole sequence once for each row of the table."""
    matrices = {}
    for name, row in rows.items():
        logger.info(f"row {name}")
        brain.lr = row.get("lr", hparams["lr"])
        choose_on = row.get("choose_on")
        matrices[name] = brain.learn_sequence(
            domains,
            first,
            Path(hparams["save_folder"]) / name,
            method=row.get("method"),
            rule=row.get("rule"),
            scale=row.get("scale"),
            choose_scale=choose_on and chooser(hparams, name, choose_on),
            shared=Path(hparams["save_folder"]) / f"fine_tuned_{brain.lr}",
            split=hparams["report_on"],
        )
    return matrices


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_seeds(sys.argv[2], title=TITLE)
        sys.exit()

    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)

    rows = wanted_rows(hparams)

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

    brain = DigitStringBrain(
        modules=hparams["modules"], hparams=hparams, run_opts=run_opts
    )
    domains = make_domains(brain, hparams)
    first = learn_first_model(brain, domains[0], hparams)
    matrices = run_rows(brain, domains, first, rows, hparams)
    run_on_main(write_report, args=[matrices, hparams])
    # Without it a process that ends first may take the others down.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
