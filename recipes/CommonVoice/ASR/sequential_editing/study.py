#!/usr/bin/env python3
"""Sequential editing on accents of Common Voice: one table a seed.

A recogniser learns one accent after another without the recordings of those
before: a Conformer with CTC from random weights by `train.py`, or Whisper from
its public ones by `whisper_train.py`. After each accent the weights are edited
by task arithmetic or TIES, or averaged, or left as fine-tuned.

To run this study, do the following:
> python study.py --data_folder /path/to/cv-corpus/en --seeds 0 1 2

With Whisper; with other accents, in this order:
> python study.py ... --model whisper --hub openai/whisper-base
> python study.py ... --accents us scotland

What is not known here goes to every training: `--number_of_epochs 5`. The study
goes on where it stopped when started again.
"""

import argparse
import csv
import random
import sys
from pathlib import Path

import joblib
import torch
from common.settings import content_of, note_settings, rows_as_settings
from common.study import Training, run_trainings
from common_voice_prepare import prepare_common_voice, write_rows
from hyperpyyaml import load_hyperpyyaml
from measure import WHISPER_KIND, Kind, Measure
from report import write_report
from ruamel.yaml import YAML

from speechbrain_taskarith.metrics import LifelongMatrix, wer
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import (
    SequentialEditor,
    open_state,
    save_state,
)

HERE = Path(__file__).parent.resolve()
HPARAMS = HERE / "hparams" / "train.yaml"
KINDS = {
    "conformer": Kind(
        "train",
        HPARAMS,
        "model",
        None,
        {
            "data_folder": ".",
            "skip_prep": True,
            "valid_csv": None,
            "test_csv": None,
        },
    ),
    "whisper": WHISPER_KIND,
}
# Learning rates: the first accent, each further one.
RATES = {"conformer": (5e-4, 1e-4), "whisper": (3e-5, 1e-5)}
# Bounds, which are no rows of hparams/models/rows.yaml: trained on all accents
# so far, and on each accent by itself; both from the first accent's weights.
JOINT, SINGLE = "joint", "single_task"


def parse_arguments(argv):
    """Read the command line; returns the options and what is for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--data_folder", required=True, help="of one language")
    parser.add_argument("--model", choices=KINDS, default="conformer")
    parser.add_argument("--hub", help="Whisper's hub name or folder")
    parser.add_argument("--output", default="results/sequential_editing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--accents", nargs="+", help="names in hparams/train.yaml, in order"
    )
    parser.add_argument(
        "--source", choices=["validated", "splits"], default="validated"
    )
    parser.add_argument("--longest", type=float, default=12.0, help="seconds")
    parser.add_argument("--test", type=int, help="clips of an accent")
    parser.add_argument("--first_lr", type=float)
    parser.add_argument("--lr", type=float)
    return parser.parse_known_args(argv)


def read_rows_file():
    """Return the rows that are compared."""
    with open(HERE / "hparams/models/rows.yaml", encoding="utf-8") as stream:
        return load_hyperpyyaml(stream)["rows"]


def read_accents(given):
    """Return `{name: how the corpus writes it}` in the order to learn."""
    # As it stands, without making what its tags name.
    known = {k: list(v) for k, v in YAML().load(HPARAMS)["accents"].items()}
    names = given.accents or list(known)
    odd = [name for name in names if name not in known]
    if odd:
        raise ValueError(
            f"--accents {odd[0]}: no such name in {HPARAMS.name}; there are "
            f"{', '.join(known)}"
        )
    if len(names) < 2:
        raise ValueError("--accents: two or more make a sequence")
    return {name: known[name] for name in names}


def settings_of(given, more, accents, prepared):
    """Return what all models and results in the folder depend on."""
    first_lr, lr = RATES[given.model]
    return {
        "model": given.model,
        "base": given.hub and open_state(given.hub).fingerprint,
        "order of accents": list(accents),
        "source": given.source,
        "longest": given.longest,
        "test": given.test,
        "first_lr": given.first_lr or first_lr,
        "lr": given.lr or lr,
        **rows_as_settings(read_rows_file()),
        "option of train.py": KINDS[given.model].parse(more)[1],
        **content_of(
            {
                f"{split} clips of {accent}": prepared / f"{accent}_{split}.csv"
                for accent in accents
                for split in ("train", "test")
            }
        ),
    }


def join(prepared, names, path):
    """Write the training clips of several accents as one manifest."""
    rows = []
    for name in names:
        with open(
            prepared / f"{name}_train.csv", encoding="utf-8", newline=""
        ) as stream:
            rows += csv.DictReader(stream)
    return write_rows(path, rows)


def draw_clips(path, count):
    """Return so many rows of a manifest, the same for all seeds; None: all."""
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if count is None:
        return rows
    # The corpus has a speaker's clips one after another.
    return random.Random(path.name).sample(rows, min(count, len(rows)))


class Row:
    """One row of the table: a sequence of models.

    Arguments
    ---------
    name : str
        Its name.
    settings : dict
        `rule` or `method`; none: see `JOINT` and `SINGLE`.
    folder : pathlib.Path
        Holds `NN_<accent>/kept.safetensors`, and the editor's folder.
    first : pathlib.Path
        The weights after the first accent.
    """

    def __init__(self, name, settings, folder, first):
        self.name, self.settings, self.folder = name, settings, folder
        self.first = self.kept = first

    def plan(self, seen, accent, prepared, lr):
        """Return the training of the next accent."""
        base, data = self.kept, prepared / f"{accent}_train.csv"
        if self.name in (JOINT, SINGLE):
            base = self.first
        if self.name == JOINT:
            path = self.folder / f"{'+'.join([*seen, accent])}.csv"
            data = join(prepared, [*seen, accent], path)
        # Rows that begin alike share their fine-tunings.
        digest = open_state(base).fingerprint.split(":")[-1][:12]
        name = f"{'joint' if self.name == JOINT else 'plain'}/{accent}-{digest}"
        self.training = Training(
            name, {"base": str(base), "train_csv": str(data), "lr": lr}
        )
        return self.training

    def keep(self, seen, accent, models):
        """Keep what the row makes of the fine-tuned weights."""
        task = len(seen) + 1
        kept = self.folder / f"{task:02d}_{accent}" / "kept.safetensors"
        if not kept.exists():
            before = dict(open_state(self.kept))
            tuned = dict(open_state(models / self.training.name / "save"))
            if "rule" in self.settings:
                after = self.edit(before, tuned, seen, accent)
            elif "method" in self.settings:
                method = self.settings["method"]
                after = method.after_task(before, tuned, task)
            else:
                after = tuned
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_state(after, kept)
        self.kept = kept

    def edit(self, before, tuned, seen, accent):
        """Return before + scale * rule(tuned - before), and log the edit."""
        rule, folder = self.settings["rule"], self.folder / "editor"
        if len(seen) == 1:
            editor = SequentialEditor.open(before, rule, folder)
        else:
            editor = SequentialEditor.resume(folder, rule)
        with editor:
            if accent not in [edit.name for edit in editor.log]:
                editor.learn(accent, tuned)
            return editor.state()


def test(row, after, measure, manifests, matrix):
    """Add a line to a row's matrix: the WER on every accent."""
    state = open_state(row.kept)
    for accent, manifest in manifests.items():
        found = measure(state.fingerprint, lambda: dict(state), manifest)
        matrix.record(
            after, accent, wer(found["references"], found["hypotheses"])
        )


def run_seed(given, more, accents, prepared, folder, seed):
    """Learn the sequence once for each row; returns the rows' matrices."""
    kind, models = KINDS[given.model], folder / "models"
    first_lr, lr = RATES[given.model]
    shared = {**kind.options, "avoid_if_longer_than": given.longest}
    if kind.hub is not None:
        hub = Path(given.hub)
        shared[kind.hub] = str(hub.resolve()) if hub.is_dir() else given.hub
    shared["seed"] = seed
    own = {"output_folder": str(folder / "measured"), "train_csv": None}
    measure = Measure(kind, shared | own, more, folder / "measured")

    def run(trainings):
        trainings = [
            Training(t.name, {**shared, **t.options}, t.parents)
            for t in {t.name: t for t in trainings}.values()
        ]
        argv = [str(kind.hparams), *more]
        with joblib.parallel_config("sequential"):
            run_trainings(kind.recipe.train, trainings, argv, models)

    manifests = {}
    for accent in accents:
        path = prepared / f"{accent}_test.csv"
        manifests[accent] = write_rows(
            folder / "data" / path.name, draw_clips(path, given.test)
        )

    # Not after hours of training.
    measure.check(manifests.values())
    first, *others = accents
    start = Training(
        f"plain/{first}",
        {
            "train_csv": str(prepared / f"{first}_train.csv"),
            "lr": given.first_lr or first_lr,
        },
    )
    run([start])
    kept = folder / "save" / "first_model" / "kept.safetensors"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_state(dict(open_state(models / start.name / "save")), kept)
    rows = [
        Row(name, settings, folder / "save" / name, kept)
        for name, settings in [
            *read_rows_file().items(),
            (JOINT, {}),
            (SINGLE, {}),
        ]  # fmt: skip
    ]
    matrices = {row.name: LifelongMatrix(list(accents)) for row in rows}
    for row in rows:
        test(row, first, measure, manifests, matrices[row.name])
    seen = [first]
    for accent in progress(others, desc="accents"):
        run([row.plan(seen, accent, prepared, given.lr or lr) for row in rows])
        for row in rows:
            row.keep(seen, accent, models)
            test(row, accent, measure, manifests, matrices[row.name])
        seen = [*seen, accent]
    return matrices


def main(argv):
    """Learn all sequences, and report."""
    given, more = parse_arguments(argv)
    if given.model == "whisper" and not given.hub:
        raise ValueError("--model whisper needs --hub: a hub name or a folder")
    output, accents = Path(given.output).resolve(), read_accents(given)
    prepared = output / "prepared"
    prepare_common_voice(
        given.data_folder,
        prepared,
        accents,
        given.source,
        max_seconds=given.longest,
    )
    note_settings(output, settings_of(given, more, accents, prepared))
    torch.set_num_threads(1)
    results = {
        seed: run_seed(given, more, accents, prepared, output / str(seed), seed)
        for seed in given.seeds
    }
    write_report(results, list(accents), output)


if __name__ == "__main__":
    main(sys.argv[1:])
