#!/usr/bin/env python3
"""SYN2REAL with its controls: what does real speech elsewhere add?

A domain (a language, a kind of text) has no recordings: Whisper learns it from
synthetic speech. Other domains have both. All rows of the table are sums of
task vectors,

    theta = base + sum_i weight_i (theta_i - base),

of models that `train.py` tuned from one base on equally many lines, so that
two things are told apart: going back towards the base, and adding what real
speech taught elsewhere. Every domain takes the target's place in turn; helpers
never do. Scales are chosen without real speech of the target: each source
takes its place, all others the sources'. Not among the rows: mixed data first
and new speakers (SLURP/ASR/syn2real has them), the public model with its whole
window, a scale for each group of layers, other rules than the mean of sources.

To run this study on Czech and Dutch, with English as the helper (README.md
says how the folders are made):
> python syn2real.py --whisper_hub whisper-base-5s --seeds 0 1 2 \
>     --domain nl=corpus/nl_{}.csv --domain cs=corpus/cs_{}.csv \
>     --helper en=arctic/b_{}.csv --output results/syn2real

`{}` stands for train, valid and test. Synthetic speech is made by espeak-ng;
`--synthetic nl=folder` takes what another engine made: a folder with
manifest.csv (ID, duration, wav, text), with the IDs of the train lines, or ID-0,
ID-1, ... of several voices, of which one is drawn for each line. The study goes
on where it stopped when started again.
"""

import argparse
import random
import re
import statistics
import sys
from pathlib import Path

import joblib
import torch
from common.study import (
    Training,
    check_settings,
    content_of,
    note_settings,
    run_trainings,
)
from scoring import normalize
from studies.lineage import KEPT, keep_weights
from studies.lines import SPLITS, check_splits, read_csv, tell_long, write_csv
from studies.measure import Measure
from studies.syn2real_report import write_report
from synthesize import synthesize
from train import train

from speechbrain_taskarith.metrics import RareWords, wer
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import TaskVector, open_state

HERE = Path(__file__).resolve().parent
HPARAMS = HERE / "hparams" / "train.yaml"
TARGET_SCALES = [0.25, 0.5, 0.75, 1.0]
SCALES = [0.0, 0.25, 0.5, 0.75, 1.0]


def parse_arguments(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--whisper_hub", required=True, help="the base: a hub name or folder")
    for name, text in (
        ("domain", "takes the target's place in turn"),
        ("helper", "is a source only"),
        ("synthetic", "its train lines by another engine: a folder"),
    ):
        add(
            f"--{name}",
            action="append",
            default=[],
            metavar="NAME=PATH",
            type=lambda word: tuple(word.split("=", 1)),
            help=text,
        )
    add("--output", default="results/syn2real")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--lines", type=int, default=400, help="of each domain, for training")
    add("--longest", type=float, default=5.0, help="seconds")
    add("--valid", type=int, default=100, help="lines of each domain")
    add("--test", type=int, default=160, help="lines of each domain")
    add("--only_train", action="store_true", help="measure nothing")
    given = parser.parse_args(argv)
    for pair in (*given.domain, *given.helper, *given.synthetic):
        if len(pair) != 2:
            parser.error(f"{pair[0]!r}: expected NAME=PATH")
    given.domain, given.helper = dict(given.domain), dict(given.helper)
    given.synthetic = {
        name: Path(path, "manifest.csv") if Path(path).is_dir() else path
        for name, path in given.synthetic
    }
    unknown = given.synthetic.keys() - (given.domain | given.helper).keys()
    if unknown:
        parser.error(f"--synthetic {min(unknown)}: no --domain or --helper")
    for name, pattern in (given.domain | given.helper).items():
        if "{}" not in pattern:
            parser.error(f"{name}={pattern}: expected {{}} for the split")
    if len(given.domain) + len(given.helper) < 3:
        parser.error(
            "scales are chosen where a source takes the target's place: give "
            "three domains, or two and a helper"
        )
    return given


def read_domains(given):
    """Return the real lines, `{domain: {split: rows}}`."""
    found = {}
    for name, pattern in (given.domain | given.helper).items():
        found[name] = {
            split: read_csv(pattern.format(split), ["lang"]) for split in SPLITS
        }
        check_splits(name, found[name])
        for split, rows in found[name].items():
            tell_long(pattern.format(split), rows, given.longest)
            rows[:] = short(rows, given)
    return found


def short(rows, given):
    """Return the rows of at most `--longest` seconds."""
    return [row for row in rows if float(row["duration"]) <= given.longest]


def speak(given, name):
    """Return the manifest of a domain's synthetic speech."""
    if name in given.synthetic:
        return given.synthetic[name]
    manifest = (given.domain | given.helper)[name].format("train")
    lang = read_csv(manifest, ["lang"])[0]["lang"]
    folder = Path(given.output).resolve() / "synthetic" / name
    return synthesize(manifest, folder, {"en": "en-us"}.get(lang, lang))


def takes_of(manifest, rows, given):
    """Return the synthetic takes of real lines: `{ID: rows}`.

    Of several voices a line has the takes `ID-0`, `ID-1`, ...
    """
    real, takes = {row["ID"]: row for row in rows}, {}
    for row in short(read_csv(manifest), given):
        key = row["ID"]
        if key not in real:
            key = re.sub(r"-\d+$", "", key)
        if key in real:
            # The manifest of another engine may not say it.
            spoken = row | {"ID": key, "lang": real[key]["lang"]}
            takes.setdefault(key, []).append(spoken)
    if not takes:
        raise ValueError(
            f"{manifest}: no line of at most {given.longest:g} s whose ID is "
            "that of a real one; expected IDs such as "
            f"{', '.join(list(real)[:2])}, or with -0, -1, ... for several "
            "takes"
        )
    return takes


def prepare_data(given, domains, folder, seed):
    """Draw the lines of each domain; the same, spoken by both sides.

    Returns `{name of a training: manifest}`, and `{(domain, split): manifest}`
    of the real development and test lines.
    """
    drawn, held_out = {}, {}
    for name, splits in domains.items():
        takes = takes_of(speak(given, name), splits["train"], given)
        both = [row for row in splits["train"] if row["ID"] in takes]
        if len(both) < given.lines:
            print(
                f"{name}: {len(both)} lines, not {given.lines} (--lines), have "
                f"a recording and synthetic speech of at most "
                f"{given.longest:g} s; the others learn from more",
                flush=True,
            )
        draw = random.Random(f"{seed}/{name}")
        chosen = draw.sample(both, min(given.lines, len(both)))
        drawn[f"real/{name}"] = chosen
        drawn[f"synthetic/{name}"] = [
            draw.choice(takes[row["ID"]]) for row in chosen
        ]
        for split in ("valid", "test"):
            # The same lines for all seeds.
            rows = list(splits[split])
            random.Random(f"{split}/{name}").shuffle(rows)
            held_out[name, split] = write_csv(
                Path(given.output, "data", f"{name}_{split}.csv"),
                rows[: vars(given)[split]],
            )
    for target in given.domain:
        sources = [name for name in given.domain if name != target]
        drawn[f"joint/{target}"] = [
            row | {"ID": f"{side}_{name}_{row['ID']}"}
            for side, names in (("real", sources), ("synthetic", [target]))
            for name in names
            for row in drawn[f"{side}/{name}"]
        ]
    return {
        name: write_csv(folder / "data" / f"{name}.csv", rows)
        for name, rows in drawn.items()
    }, held_out


def settings_of(given):
    """Return what all models and results in the folder depend on."""
    settings = {
        name: vars(given)[name]
        for name in ("lines", "longest", "valid", "test")
    }
    settings["base"] = open_state(given.whisper_hub).fingerprint
    settings["domains"] = list(given.domain)
    for name, pattern in (given.domain | given.helper).items():
        settings[f"--synthetic for {name}"] = "espeak-ng"
        settings |= content_of(
            {
                f"{split} lines of {name}": pattern.format(split)
                for split in SPLITS
            }
        )
    return settings | content_of(
        {f"--synthetic for {n}": path for n, path in given.synthetic.items()}
    )


def plan_trainings(manifests, seed):
    """List the trainings of one seed: one call of `train.py` each."""
    return [
        Training(name, {"train_csv": str(manifest), "seed": seed})
        for name, manifest in manifests.items()
    ]


def edit(target, sources, b, a, part=""):
    """Return the weights of `b d + a mean(r - s)`, `{model: weight}`.

    `part`: `@pattern` takes the difference where names fit it only.
    """
    weights = {f"synthetic/{target}": b}
    for source in sources:
        weights[f"real/{source}{part}"] = a / len(sources)
        weights[f"synthetic/{source}{part}"] = -a / len(sources)
    return weights


def support(target, sources, a):
    """Return the weights of `d + a mean(r)`: a support language."""
    reals = {f"real/{source}": a / len(sources) for source in sources}
    return {f"synthetic/{target}": 1.0, **reals}


def rows_of(target, sources, helpers, chosen):
    """Name the rows of the table: `{row: {model: weight}}`.

    `chosen`: see `Study.choose`.
    """
    synthetic, both = f"synthetic/{target}", chosen["both"]
    everyone = [*sources, *helpers]

    def mean(models):
        return {model: 1 / len(models) for model in models}

    reals = [f"real/{source}" for source in sources]
    return {
        "pretrained": {},
        "baseline": {synthetic: 1.0},
        "real_source": mean(reals),
        "mean_of_real_sources": mean([f"real/{name}" for name in everyone]),
        "mean_of_baseline_and_real": mean([synthetic, *reals]),
        "joint": {f"joint/{target}": 1.0},
        "support_language": support(target, sources, chosen["support"]),
        "shrunk": {synthetic: chosen["shrunk"]},
        "paper_scale": edit(target, sources, 1.0, 0.25),
        "edited": edit(target, sources, 1.0, chosen["edited"]),
        "edited_both": edit(target, sources, *both),
        "edited_both_encoder": edit(target, sources, *both, "@model.encoder.*"),
        "edited_both_decoder": edit(target, sources, *both, "@model.decoder.*"),
        "ensemble": edit(target, everyone, 1.0, chosen["edited"]),
        "ensemble_both": edit(target, everyone, *both),
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
        """Return what a training added to the base, or a part of it."""
        if model not in self.vectors:
            name, _, pattern = model.partition("@")
            self.vectors[model] = TaskVector.between(
                self.base,
                self.folder / "models" / name / KEPT,
                include=pattern or "*",
            )
        return self.vectors[model]

    def state(self, weights):
        """Return `base + sum(weight * vector)`."""
        state = dict(self.base)
        for model, weight in weights.items():
            # From the second on, not of the state that it is added to.
            state = self.vector(model).apply(state, weight, any_base=True)
        return state

    def known_words(self, domains):
        """Count the words of domains' training texts, as they are scored."""
        tokenizer = self.measure.whisper.tokenizer
        return RareWords.from_transcripts(
            [
                normalize(row["text"], row["lang"], tokenizer)
                for name in domains
                for row in read_csv(self.folder / f"data/real/{name}.csv")
            ],
            min_count=1,
        )

    def errors(self, weights, domain, split="test"):
        """Measure a sum of vectors on real lines of a domain."""
        weights = {model: w for model, w in weights.items() if w}
        return self.measure(
            weights,
            lambda: self.state(weights),
            self.held_out[domain, split],
        )

    def wer(self, weights, domain, split="test"):
        """Return the WER only."""
        found = self.errors(weights, domain, split)
        return wer(found["references"], found["hypotheses"]).wer

    def choose(self, sources, helpers):
        """Choose all scales where each source takes the target's place.

        All other sources and the helpers take the sources' place: nothing
        here has heard the target.
        """

        def mean_wer(weights_of):
            return statistics.fmean(
                self.wer(
                    weights_of(
                        source,
                        [n for n in (*sources, *helpers) if n != source],
                    ),
                    source,
                    "valid",
                )
                for source in sources
            )

        grid = {
            (b, a): mean_wer(lambda t, others: edit(t, others, b, a))  # noqa: B023
            for b in TARGET_SCALES
            for a in SCALES
        }
        supports = {
            a: mean_wer(lambda t, others: support(t, others, a))  # noqa: B023
            for a in SCALES
        }
        return {
            "grid": grid,
            "shrunk": min(TARGET_SCALES, key=lambda b: grid[b, 0.0]),
            "edited": min(SCALES, key=lambda a: grid[1.0, a]),
            "both": min(grid, key=grid.get),
            "support": min(SCALES, key=supports.get),
        }

    def surface(self, target, sources):
        """Measure the grid on the target's test lines: chosen by nobody."""
        return {
            (b, a): self.wer(edit(target, sources, b, a), target)
            for b in TARGET_SCALES
            for a in SCALES
        }


def leave_out(study, target, given):
    """Measure all rows of one target."""
    sources = [name for name in given.domain if name != target]
    helpers = list(given.helper)
    chosen = study.choose(sources, helpers)
    rows = rows_of(target, sources, helpers, chosen)
    measured = {
        row: study.errors(weights, target)
        for row, weights in progress(rows.items(), desc=f"rows of {target}")
    }
    return {
        "chosen": chosen,
        "rows": measured,
        "surface": study.surface(target, sources),
        "known": study.known_words([*sources, *helpers]),
    }


def main(argv):
    """Train what is missing, measure, write the tables."""
    given = parse_arguments(argv)
    settings = settings_of(given)
    check_settings(given.output, settings)
    results, domains = {}, read_domains(given)
    for seed in given.seeds:
        folder = Path(given.output, str(seed))
        manifests, held_out = prepare_data(given, domains, folder, seed)
        study = Study(given, seed, held_out)
        # Not after hours of training.
        study.measure.check([*manifests.values(), *held_out.values()])
        note_settings(given.output, settings)
        shared = [
            str(HPARAMS),
            "--data_folder=.",
            "--prepare=null",
            "--valid_csv=null",
            "--test_csv=null",
            f"--whisper_hub={given.whisper_hub}",
            f"--avoid_if_longer_than={given.longest}",
        ]
        with joblib.parallel_config("sequential"):
            run_trainings(
                train,
                plan_trainings(manifests, seed),
                shared,
                folder / "models",
            )
        for name in manifests:
            keep_weights(folder / "models" / name)
        if given.only_train:
            continue
        for target in given.domain:
            results[seed, target] = leave_out(study, target, given)
    if results:
        write_report(results, Path(given.output))


if __name__ == "__main__":
    main(sys.argv[1:])
