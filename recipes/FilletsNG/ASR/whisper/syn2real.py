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
takes its place, all others the sources'.

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
from common.settings import check_settings, content_of, note_settings
from common.study import Training, run_trainings
from scoring import normalize
from studies.lineage import KEPT, keep_weights
from studies.lines import (
    SPLITS,
    check_domains,
    check_name,
    check_splits,
    read_csv,
    tell_long,
    write_csv,
)
from studies.measure import Measure
from studies.syn2real_report import write_report
from studies.syn2real_rows import (
    CHOICES,
    MIXED,
    RULES,
    SCALES,
    edit,
    edit_parts,
    points,
    rows_of,
    surface,
)
from synthesize import synthesize
from train import train

from speechbrain_taskarith.metrics import RareWords, wer
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import TaskVector, open_state

HERE = Path(__file__).resolve().parent
HPARAMS = HERE / "hparams" / "train.yaml"


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
    add(
        "--whole_window",
        help="the public model before its window was cut, measured beside it",
    )
    add("--output", default="results/syn2real")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--lines", type=int, default=400, help="of each domain, for training")
    add("--longest", type=float, default=5.0, help="seconds")
    add("--valid", type=int, default=100, help="lines of each domain")
    add("--test", type=int, default=160, help="lines of each domain")
    add(
        "--skip_mixed",
        action="store_true",
        help="no rows of mixed data, a third of the training",
    )
    add("--only_train", action="store_true", help="measure nothing")
    given = parser.parse_args(argv)
    for pair in (*given.domain, *given.helper, *given.synthetic):
        if len(pair) != 2:
            parser.error(f"{pair[0]!r}: expected NAME=PATH")
    names = [name for name, _ in (*given.domain, *given.helper)]
    for name in names:
        try:
            check_name(name)
        except ValueError as error:
            parser.error(str(error))
        if names.count(name) > 1:
            parser.error(f"two of --domain and --helper are named {name!r}")
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
    if len(given.domain) < 2 or len(names) < 3:
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
    check_domains(found)
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
        together = {"joint": [target]}
        if not given.skip_mixed:
            together["mixed"] = sources
        for kind, spoken in together.items():
            drawn[f"{kind}/{target}"] = [
                row | {"ID": f"{side}_{name}_{row['ID']}"}
                for side, names in (("real", sources), ("synthetic", spoken))
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
    """List the trainings from the base: one call of `train.py` each."""
    return [
        Training(name, {"train_csv": str(manifest), "seed": seed})
        for name, manifest in manifests.items()
    ]


def plan_second_trainings(manifests, targets, seed, lr, folder):
    """List those that start from mixed data, at a tenth of the rate."""
    return [
        Training(
            f"mixed_then_synthetic/{target}",
            {
                "train_csv": str(manifests[f"synthetic/{target}"]),
                "seed": seed,
                "base": str(Path(folder, f"mixed/{target}", KEPT).resolve()),
                "lr": f"{lr / 10:.7f}",
            },
        )
        for target in targets
        if f"mixed/{target}" in manifests
    ]


class Study:
    """The models of one seed, and what they do on the held-out lines."""

    def __init__(self, given, seed, held_out):
        self.folder = Path(given.output, str(seed)).resolve()
        self.base = open_state(given.whisper_hub)
        self.held_out, self.vectors = held_out, {}
        torch.set_num_threads(1)
        self.measure = measure_with(given.whisper_hub, self.folder / "measured")

    def vector(self, model):
        """Return what a training added to the base, or a part of it."""
        rule, _, sources = model.partition("/")
        if model not in self.vectors and rule in RULES:
            self.vectors[model] = RULES[rule].combine(
                [
                    self.vector(f"real/{source}")
                    - self.vector(f"synthetic/{source}")
                    for source in sources.split("+")
                ],
                base=self.base,
            )
        elif model not in self.vectors:
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
        here has heard the target. Returns points (b, a, c) by what may be
        chosen, and under "parts" the scales of encoder and decoder.
        """

        def mean_wer(make, *scales):
            return statistics.fmean(
                self.wer(
                    make(
                        source,
                        [n for n in (*sources, *helpers) if n != source],
                        *scales,
                    ),
                    source,
                    "valid",
                )
                for source in sources
            )

        tried = {
            point: mean_wer(edit, *point)
            for point in progress(points(), desc="scales")
        }
        chosen = {
            name: min(choices, key=tried.get)
            for name, choices in CHOICES.items()
        }
        b = chosen["both"][0]
        parts = {
            (encoder, decoder): tried[b, encoder, encoder]
            if encoder == decoder
            else mean_wer(edit_parts, b, encoder, decoder)
            for encoder in SCALES
            for decoder in SCALES
        }
        return chosen | {"parts": min(parts, key=parts.get)}

    def surface(self, target, sources):
        """Measure the grid on the target's test lines: chosen by nobody."""
        return {
            (b, a): self.wer(edit(target, sources, b, a), target)
            for b, a, _ in surface()
        }


def measure_with(hub, folder):
    """Return what measures models that are built as `hub` is."""
    return Measure(
        HPARAMS,
        {
            "whisper_hub": str(hub),
            "output_folder": str(folder),
            "test_batch_size": 40,
        },
        folder,
    )


def hear_whole_window(given, manifest):
    """Measure the public model as it was published."""
    hub = given.whole_window
    measure = measure_with(hub, Path(given.output, "whole_window").resolve())
    return measure(f"{hub}", lambda: open_state(hub), manifest)


def leave_out(study, target, given):
    """Measure all rows of one target."""
    sources = [name for name in given.domain if name != target]
    helpers = list(given.helper)
    chosen = study.choose(sources, helpers)
    rows = rows_of(target, sources, helpers, chosen)
    if given.skip_mixed:
        rows = {row: w for row, w in rows.items() if row not in MIXED}
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
        lr, models = study.measure.hparams["lr"], folder / "models"
        for trainings in (
            plan_trainings(manifests, seed),
            plan_second_trainings(manifests, given.domain, seed, lr, models),
        ):
            with joblib.parallel_config("sequential"):
                run_trainings(train, trainings, shared, models)
            for training in trainings:
                keep_weights(models / training.name)
        if given.only_train:
            continue
        for target in given.domain:
            results[seed, target] = leave_out(study, target, given)
            if given.whole_window:
                results[seed, target]["rows"] |= {
                    "pretrained_whole_window": hear_whole_window(
                        given, held_out[target, "test"]
                    )
                }
    if results:
        write_report(results, Path(given.output))


if __name__ == "__main__":
    main(sys.argv[1:])
