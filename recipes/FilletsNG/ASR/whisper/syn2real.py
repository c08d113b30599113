#!/usr/bin/env python3
"""SYN2REAL across languages: what does real speech elsewhere add?

A language has no recordings: Whisper learns it from espeak-ng. Another
language has both. All rows of the table are sums of task vectors,

    theta = base + sum_i weight_i (theta_i - base),

of models that `train.py` tuned from one base on the same number of lines, so
that two things are told apart: going back towards the base, and adding what
real speech taught. Scales are chosen without real speech of the target: the
source language takes its place, English the source's.

To run this study, do the following (see README.md for the folders):
> python syn2real.py --whisper_hub whisper-base-5s --seeds 0 1 2 \
>     --fillets corpus --english arctic --output results/syn2real

It goes on where it stopped when started again.
"""

import argparse
import csv
import random
import sys
from pathlib import Path

import joblib
import torch
from common.study import Training, run_trainings
from measure import Measure
from report import write_report
from synthesize import synthesize
from train import train

from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import TaskVector, open_state

HERE = Path(__file__).resolve().parent
HPARAMS = HERE / "hparams" / "train.yaml"
VOICES = {"cs": "cs", "nl": "nl", "en": "en-us"}
# Each takes the target's place in turn; the other is the source.
TARGETS = {"nl": "cs", "cs": "nl"}
TARGET_SCALES = [0.25, 0.5, 0.75, 1.0]
SCALES = [0.0, 0.25, 0.5, 0.75, 1.0]


def parse_arguments(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--whisper_hub", required=True, help="the base")
    parser.add_argument("--fillets", required=True, help="prepared corpus")
    parser.add_argument("--english", required=True, help="prepared ARCTIC")
    parser.add_argument("--output", default="results/syn2real")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lines", type=int, default=400, help="of a language")
    parser.add_argument("--longest", type=float, default=5.0, help="seconds")
    parser.add_argument("--valid", type=int, default=100, help="lines")
    parser.add_argument("--test", type=int, default=160, help="lines")
    parser.add_argument("--only_train", action="store_true")
    return parser.parse_args(argv)


def read_csv(path):
    """Read a manifest as dicts, paths made absolute."""
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["wav"] = row["wav"].replace("$data_root", str(path.parent))
    return rows


def write_csv(path, rows):
    """Write what `train.py` needs of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as stream:
        columns = ["ID", "duration", "wav", "lang", "text"]
        writer = csv.DictWriter(
            stream, columns, lineterminator="\n", extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(rows)
    return path


def prepare_data(given, folder, seed):
    """Draw the lines of each language; the same, spoken by both sides.

    Returns `{name of a training: manifest}` and `{language: manifest}` of the
    real development and test lines.
    """
    corpora = {
        language: Path(given.fillets, f"{language}_{{}}.csv")
        for language in TARGETS
    }
    corpora["en"] = Path(given.english, "b_{}.csv")
    drawn, held_out = {}, {}
    for language, pattern in corpora.items():
        real = read_csv(Path(str(pattern).format("train")).resolve())
        spoken = Path(given.output).resolve() / "synthetic" / language
        manifest = synthesize(
            Path(str(pattern).format("train")), spoken, VOICES[language]
        )
        synthetic = {row["ID"]: row for row in read_csv(manifest)}
        both = [
            row["ID"]
            for row in real
            if float(row["duration"]) <= given.longest
            and float(synthetic[row["ID"]]["duration"]) <= given.longest
        ]
        chosen = random.Random(f"{seed}/{language}").sample(
            both, min(given.lines, len(both))
        )
        real = {row["ID"]: row for row in real}
        drawn[f"real/{language}"] = [real[key] for key in chosen]
        drawn[f"synthetic/{language}"] = [synthetic[key] for key in chosen]
        for split in ("valid", "test"):
            rows = [
                row
                for row in read_csv(Path(str(pattern).format(split)).resolve())
                if float(row["duration"]) <= given.longest
            ]
            # The same lines for all seeds.
            random.Random(f"{split}/{language}").shuffle(rows)
            held_out[language, split] = write_csv(
                Path(given.output, "data", f"{language}_{split}.csv"),
                rows[: vars(given)[split]],
            )
    for target, source in TARGETS.items():
        drawn[f"joint/{target}"] = [
            *drawn[f"real/{source}"],
            *(
                row | {"ID": f"synthetic_{row['ID']}"}
                for row in drawn[f"synthetic/{target}"]
            ),
        ]
    manifests = {
        name: write_csv(folder / "data" / f"{name}.csv", rows)
        for name, rows in drawn.items()
    }
    return manifests, held_out


def plan_trainings(manifests, seed):
    """List the trainings of one seed: one call of `train.py` each."""
    return [
        Training(
            name,
            {
                "train_csv": str(manifest.resolve()),
                # Multilingual models need a default; rows say their own.
                "language": name.split("/")[1],
                "seed": seed,
            },
        )
        for name, manifest in manifests.items()
    ]


def rows_of(target, source, chosen):
    """Name the rows of the table: `{row: {model: weight}}`.

    `chosen`: see `Study.choose`. `model@pattern` is the part of a model's
    vector whose names fit the pattern.
    """
    both = chosen["both"]
    synthetic, real = f"synthetic/{target}", f"real/{source}"

    def edited(b, a, part=""):
        difference = {f"{real}{part}": a, f"synthetic/{source}{part}": -a}
        return {synthetic: b, **difference}

    def ensemble(b, a):
        english = {"real/en": a / 2, "synthetic/en": -a / 2}
        return edited(b, a / 2) | english

    return {
        "pretrained": {},
        "baseline": {synthetic: 1.0},
        "real_source": {real: 1.0},
        "mean_of_real_sources": {real: 0.5, "real/en": 0.5},
        "mean_of_baseline_and_real": {synthetic: 0.5, real: 0.5},
        "joint": {f"joint/{target}": 1.0},
        "support_language": {synthetic: 1.0, real: chosen["support"]},
        "shrunk": {synthetic: chosen["shrunk"]},
        "paper_scale": edited(1.0, 0.25),
        "edited": edited(1.0, chosen["edited"]),
        "edited_both": edited(*both),
        "edited_both_encoder": edited(*both, "@model.encoder.*"),
        "edited_both_decoder": edited(*both, "@model.decoder.*"),
        "ensemble": ensemble(1.0, chosen["edited"]),
        "ensemble_both": ensemble(*both),
        "real_target": {f"real/{target}": 1.0},
    }


class Study:
    """The models of one seed, and what they do on the held-out lines."""

    def __init__(self, given, seed, held_out):
        self.folder = Path(given.output, str(seed)).resolve()
        self.base = open_state(given.whisper_hub)
        self.held_out, self.vectors = held_out, {}
        torch.set_num_threads(1)
        self.measure = Measure(
            HPARAMS,
            {
                "whisper_hub": given.whisper_hub,
                "output_folder": str(self.folder / "measured"),
                "test_batch_size": 40,
            },
            self.folder / "measured",
        )

    def vector(self, model):
        """Return what a training added to the base."""
        if model not in self.vectors:
            self.vectors[model] = TaskVector.between(
                self.base, self.folder / "models" / model / "save"
            )
        return self.vectors[model]

    def state(self, weights):
        """Return `base + sum(weight * vector)`"""
        terms = [w * self.vector(m) for m, w in weights.items() if w]
        return sum(terms).apply(self.base) if terms else dict(self.base)

    def errors(self, weights, language, split="test"):
        """Measure a sum of vectors on real lines of a language."""
        weights = {m: w for m, w in weights.items() if w}
        return self.measure(
            weights,
            lambda: self.state(weights),
            self.held_out[language, split],
        )

    def wer(self, weights, language, split="test"):
        """Return the WER only."""
        found = self.errors(weights, language, split)
        return wer(found["references"], found["hypotheses"]).wer

    def choose(self, source):
        """Choose all scales where the source takes the target's place.

        English takes the source's: nothing here has heard the target.
        """
        own = f"synthetic/{source}"
        grid = {
            (b, a): self.wer(
                {own: b, "real/en": a, "synthetic/en": -a}, source, "valid"
            )
            for b in TARGET_SCALES
            for a in SCALES
        }
        support = {
            a: self.wer({own: 1.0, "real/en": a}, source, "valid")
            for a in SCALES
        }
        return {
            "grid": grid,
            "shrunk": min(TARGET_SCALES, key=lambda b: grid[b, 0.0]),
            "edited": min(SCALES, key=lambda a: grid[1.0, a]),
            "both": min(grid, key=grid.get),
            "support": min(SCALES, key=support.get),
        }

    def surface(self, target, source, split):
        """Measure the whole grid on the target: a bound, chosen by nobody."""
        return {
            (b, a): self.wer(
                {
                    f"synthetic/{target}": b,
                    f"real/{source}": a,
                    f"synthetic/{source}": -a,
                },
                target,
                split,
            )
            for b in [0.0, *TARGET_SCALES]
            for a in SCALES
        }


def leave_out(study, target, source):
    """Measure all rows of one target language."""
    chosen = study.choose(source)
    rows = rows_of(target, source, chosen)
    measured = {
        row: study.errors(weights, target)
        for row, weights in progress(rows.items(), desc=f"rows of {target}")
    }
    surface = study.surface(target, source, "test")
    return {"chosen": chosen, "rows": measured, "surface": surface}


def main(argv):
    """Train what is missing, measure, write the tables."""
    given = parse_arguments(argv)
    results = {}
    for seed in given.seeds:
        folder = Path(given.output, str(seed))
        manifests, held_out = prepare_data(given, folder, seed)
        shared = [
            str(HPARAMS),
            "--data_folder=.",
            "--prepare=null",
            "--valid_csv=null",
            "--test_csv=null",
            f"--whisper_hub={Path(given.whisper_hub).resolve()}",
            f"--avoid_if_longer_than={given.longest}",
        ]
        with joblib.parallel_config("sequential"):
            run_trainings(
                train,
                plan_trainings(manifests, seed),
                shared,
                folder / "models",
            )
        # Twice as large as the model, and of no use to a finished training.
        for path in (folder / "models").glob("*/*/save/*/optimizer.ckpt"):
            path.unlink()
        if given.only_train:
            continue
        study = Study(given, seed, held_out)
        for target, source in TARGETS.items():
            results[seed, target] = leave_out(study, target, source)
    if results:
        write_report(results, Path(given.output))


if __name__ == "__main__":
    main(sys.argv[1:])
