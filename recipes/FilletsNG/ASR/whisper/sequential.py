#!/usr/bin/env python3
"""Sequential editing of Whisper: one domain after another, no old data.

The public model knows English, which is measured and never trained. It learns
one domain after another; after each, the WER on English and on all domains so
far is a line of the row's matrix. Every row that has something to tune tries
three values of one knob, on one step, on development lines of the new domain
and of English; what was chosen stands in tuning.json before a test line is
looked at.

To run this study, do the following (see README.md for the folders):
> python sequential.py --whisper_hub whisper-base-5s \
>     --original english=arctic/{}.csv --tune_on cs --output results/seq \
>     --domains digits=digits/{}.csv cs=corpus/cs_{}.csv nl=corpus/nl_{}.csv

It goes on where it stopped when started again. Weights are deleted as soon as
no row is likely to need them.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from studies.domains import Domain, Tests
from studies.lineage import Base, Models, Tuned
from studies.lines import check_domains, write_csv
from studies.measure import Measure
from studies.sequential_report import write_report
from studies.sequential_rows import ROWS, Row
from syn2real import HPARAMS

from speechbrain_taskarith.utils.files import read_json, write_json
from speechbrain_taskarith.utils.progress import progress

# Of a line that is learned from, in one epoch, and of one that is recognised:
# Whisper base on one core, about.
LEARN_SECONDS, HEAR_SECONDS = 0.25, 0.12


def domain_option(text, parse=Domain.parse):
    """Read a domain; argparse shows what is wrong with it."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_data_options(parser):
    """Add the options that say what is learned, from what, and where to."""
    parser.add_argument("--whisper_hub", required=True, help="the base")
    parser.add_argument(
        "--original",
        type=domain_option,
        required=True,
        metavar="NAME=PATTERN",
        help="what the base knows: manifests, {} for train, valid, test",
    )
    parser.add_argument(
        "--domains",
        type=domain_option,
        required=True,
        nargs="+",
        metavar="NAME=PATTERN",
        help="what is learned",
    )
    parser.add_argument("--output", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lines", type=int, default=400, help="of a domain")
    parser.add_argument("--longest", type=float, default=5.0, help="seconds")
    parser.add_argument("--valid", type=int, default=100, help="lines")
    parser.add_argument("--test", type=int, default=160, help="lines")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--only_train",
        action="store_true",
        help="train and keep all weights; test lines are not looked at",
    )


def check_names(parser, given, others=()):
    """Return the domains' names; two alike are an error."""
    names = [domain.name for domain in given.domains]
    every = [given.original.name, *names, *(other.name for other in others)]
    twice = [name for name in every if every.count(name) > 1]
    if twice:
        parser.error(f"two domains are named {twice[0]!r}")
    return names


def parse_arguments(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_data_options(parser)
    parser.add_argument("--tune_on", help="a domain (default: the second)")
    parser.add_argument("--only", nargs="+", help="rows (default: all)")
    parser.add_argument(
        "--orders",
        nargs="+",
        help="of the domains, e.g. cs,nl,digits (default: the cyclic ones)",
    )
    given = parser.parse_args(argv)
    names = check_names(parser, given)
    given.tune_on = given.tune_on or names[min(1, len(names) - 1)]
    if given.tune_on not in names:
        parser.error(f"--tune_on {given.tune_on}: not one of {names}")
    cyclic = [names[n:] + names[:n] for n in range(len(names))]
    given.orders = [order.split(",") for order in given.orders or ()] or cyclic
    for order in given.orders:
        if sorted(order) != sorted(names):
            parser.error(
                f"--orders {','.join(order)}: expected each of {names} once"
            )
    given.only = given.only or list(ROWS)
    unknown = [row for row in given.only if row not in ROWS]
    if unknown:
        parser.error(f"--only {unknown}: the rows are {', '.join(ROWS)}")
    return given


@dataclass(frozen=True)
class Step:
    """What a row needs to know to learn one domain."""

    study: "Study"
    seed: int
    base: Base
    before: object  # a model: what the sequence has come to
    seen: tuple
    domain: str

    @property
    def original(self):
        """Name of the domain that the base knows."""
        return self.study.given.original.name

    @property
    def rows(self):
        """Training lines of each domain."""
        return self.study.rows[self.seed]

    @property
    def lines(self):
        """Their manifests."""
        return self.study.lines[self.seed]

    @property
    def folder(self):
        """Where manifests of this seed go."""
        return self.study.folder / "data" / str(self.seed)

    @property
    def batch_size(self):
        """Lines of a training's batch."""
        return self.study.given.batch_size

    def dev_wer(self, model, domains):
        """Return the mean WER on development lines."""
        return self.study.dev_wer(model, domains)


class Study:
    """The data, the models, and what they do on the held-out lines."""

    def __init__(self, given, seeds):
        self.given = given
        self.folder = Path(given.output).resolve()
        domains = [given.original, *given.domains]
        self.splits = {d.name: d.check(given.longest) for d in domains}
        check_domains(self.splits, apart=False)
        self.rows, self.lines, self.held_out = {}, {}, {}
        for seed in seeds:
            self.rows[seed] = {
                d.name: d.draw("train", given.lines, seed, given.longest)
                for d in domains
            }
            self.lines[seed] = {
                name: write_csv(
                    self.folder / "data" / str(seed) / f"{name}.csv", rows
                )
                for name, rows in self.rows[seed].items()
            }
        for domain in domains:
            for split in ("valid", "test"):
                self.hold_out(domain, split)
        settings = [
            f"--avoid_if_longer_than={given.longest}",
            f"--batch_size={given.batch_size}",
            f"--number_of_epochs={given.epochs}",
        ]
        self.base = Base(given.whisper_hub, settings)
        self.models = Models(
            self.folder / "models",
            [
                str(HPARAMS),
                f"--whisper_hub={self.base.path}",
                *("--data_folder=.", "--prepare=null"),
                *("--valid_csv=null", "--test_csv=null"),
                *settings,
            ],
        )
        torch.set_num_threads(1)
        measure = Measure(
            HPARAMS,
            {
                "whisper_hub": str(self.base.path),
                "output_folder": str(self.folder / "measured"),
                "test_batch_size": 40,
            },
            self.folder / "measured",
        )
        self.tests = Tests(self.models, measure, self.held_out)
        self.planning = None
        # Not after hours of training.
        for lines in (self.held_out, *self.lines.values()):
            measure.check(lines.values())

    def hold_out(self, domain, split):
        """Draw lines of a domain to measure on, the same for all seeds."""
        count, longest = vars(self.given)[split], self.given.longest
        self.held_out[domain.name, split] = write_csv(
            self.folder / "data" / f"{domain.name}_{split}.csv",
            domain.draw(split, count, split, longest),
        )

    def dev_wer(self, model, domains):
        """Return the mean WER on development lines; see `plan`."""
        if self.planning is not None:
            self.planning |= {(model.name, d, "valid") for d in domains}
            return 0.0
        return self.tests.mean_wer(model, domains, "valid")

    def step(self, seed, order, number, before=None):
        """Return the step of an order that learns its `number`-th domain."""
        return Step(
            self,
            seed,
            self.base,
            before or self.base,
            tuple(order[:number]),
            order[number],
        )

    def sequence(self, row, seed, order):
        """Return the models of a row after each domain of an order."""
        models, before = [], self.base
        for number in range(len(order)):
            if row.only_last and number < len(order) - 1:
                models.append(None)
                continue
            before = row.learn(self.step(seed, order, number, before))
            models.append(before)
        return models

    def trials(self, row, seed):
        """Return the models of a row's tuned step: `{value: model}`."""
        names = [domain.name for domain in self.given.domains]
        here = names.index(self.given.tune_on)
        order = names[here - row.tuned_after :][: row.tuned_after]
        order = [*order, self.given.tune_on]
        step = self.step(seed, order, len(order) - 1)
        return {value: row.at(value).learn(step) for value in row.values}

    def tune(self, rows, seed):
        """Choose each row's knob; returns the rows as they were chosen."""
        path, chosen = self.folder / "tuning.json", {}
        notes = read_json(path) if path.exists() else {}
        domains = [self.given.tune_on, self.given.original.name]
        for name, row in progress(rows.items(), desc="tuning"):
            chosen[name] = row
            if row.knob is None:
                continue
            tried = {
                value: self.dev_wer(model, domains)
                for value, model in self.trials(row, seed).items()
            }
            best = min(tried, key=tried.get)
            chosen[name] = row.at(best)
            notes[name] = {
                "knob": row.knob,
                "chosen": best,
                "valid_wer": {str(v): wer for v, wer in tried.items()},
                "on": domains,
            }
            write_json(path, notes)
        return chosen

    def needed(self, model):
        """Return the trainings behind a model: `{name: Tuned}`."""
        if model is None or isinstance(model, Base):
            return {}
        found = self.needed(model.start)
        for training in getattr(model, "trainings", ()):
            found |= self.needed(training)
        if isinstance(model, Tuned):
            found |= self.needed(model.remembers)
            found[model.name] = model
        return found

    def plain(self, seed):
        """Return the fine-tunings of the base that many rows share."""
        names = [domain.name for domain in self.given.domains]
        return [Row().learn(self.step(seed, [name], 0)) for name in names]

    def plan(self, rows, seeds, tuning_seed):
        """Say how much is to be done, about, before it is begun.

        Returns the number of trainings that are missing. Where a row chooses
        on development lines, some choice is assumed.
        """
        self.planning, found = set(), {}
        domains = [self.given.tune_on, self.given.original.name]
        for row in rows.values():
            for model in self.trials(row, tuning_seed).values():
                found |= self.needed(model)
                self.dev_wer(model, domains)
            for seed in seeds:
                for order in self.given.orders:
                    models = self.sequence(row, seed, order)
                    for number, model in enumerate(models):
                        found |= self.needed(model)
                        if model is not None:
                            learned = [domains[1], *order[: number + 1]]
                            self.planning |= {
                                (model.name, domain, "test")
                                for domain in learned
                            }
        to_measure = len(self.planning) - len(
            list(self.folder.glob("measured/*.json"))
        )
        self.planning, seconds, missing = None, [], 0
        for training in found.values():
            about = self.models.folder / training.name / "finished.json"
            if about.exists():
                seconds.append(read_json(about)["seconds"])
            else:
                missing += 1
        each = LEARN_SECONDS * self.given.lines * self.given.epochs
        if seconds:
            each = sum(seconds) / len(seconds)
        hours = missing * each / 3600
        more = max(0, to_measure) * HEAR_SECONDS * self.given.test / 3600
        print(
            f"{len(found)} trainings, {missing} to do: about {hours:.1f} h; "
            f"about {max(0, to_measure)} sets to recognise: {more:.1f} h",
            flush=True,
        )
        return missing


def main(argv):
    """Tune, learn all sequences, measure, write the tables."""
    given = parse_arguments(argv)
    tuning_seed = 0  # whatever --seeds are, so that all runs choose alike
    study = Study(given, {tuning_seed, *given.seeds})
    rows = {name: ROWS[name] for name in ROWS if name in given.only}
    missing = study.plan(rows, given.seeds, tuning_seed)
    if given.only_train:
        check_space(study, missing)
    chosen = study.tune(rows, tuning_seed)
    pinned = set()
    for seed in {tuning_seed, *given.seeds}:
        pinned |= {training.name for training in study.plain(seed)}
    for name, row in rows.items():
        if row.knob:
            trials = study.trials(row, tuning_seed)
            value = getattr(chosen[name], row.knob)
            pinned |= study.needed(trials[value]).keys()
    if not given.only_train:
        study.models.keep_only(pinned)
    results = {}
    for seed in given.seeds:
        for name, row in progress(chosen.items(), desc=f"rows, seed {seed}"):
            used = set()
            for order in given.orders:
                models = study.sequence(row, seed, order)
                used |= {n for m in models for n in study.needed(m)}
                if given.only_train:
                    for training in study.needed(models[-1]).values():
                        study.models.train(training)
                    continue
                results[seed, tuple(order), name] = measure_sequence(
                    study, models, order
                )
            if given.only_train:
                study.models.delete_edits()
            else:
                study.models.keep_only(pinned | used)
                write_report(results, study.folder, given.original.name)


def measure_sequence(study, models, order):
    """Return `{(after, on): WERReport}` of a sequence of models."""
    original = study.given.original.name
    learned, found = [original, *order], {}
    for number, model in enumerate([study.base, *models]):
        if model is None:
            continue
        for domain in learned[: number + 1]:
            found[learned[number], domain] = study.tests.errors(
                model, domain, "test"
            )
    return found


def check_space(study, trainings):
    """Refuse to start what the disk will not hold."""
    each = 1.02 * sum(
        path.stat().st_size for path in study.base.path.glob("*.safetensors")
    )
    free = shutil.disk_usage(study.folder).free
    # And the optimizer's state of one training.
    if (trainings + 2) * each > free:
        raise ValueError(
            f"--only_train keeps the weights of {trainings} trainings, "
            f"{trainings * each / 1e9:.0f} GB; {study.folder} has "
            f"{free / 1e9:.0f} GB left. Leave it out: then weights are "
            "deleted when they have been measured"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
