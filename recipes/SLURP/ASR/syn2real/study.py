#!/usr/bin/env python3
"""SYN2REAL on SLURP: every scenario is left out in turn.

The target scenario has texts, and so synthetic speech, but no recordings; the
others have both. All rows of the table are sums of task vectors,

    theta = base + sum_i weight_i (theta_i - base),

of models that were tuned from one base: Whisper by `whisper_train.py`, or
wav2vec 2.0 by `train.py`. Scales are chosen without real speech of the target:
each source takes its place in turn.

To run this study, do the following:
> python study.py --data_folder /path/to/SLURP --hub openai/whisper-base \
>     --output results/syn2real --seeds 0 1 2

As the paper: mixed data first, then the target at a tenth of the rate; on a few
scenarios; with the wav2vec 2.0 Conformer:
> python study.py ... --mixed_first True
> python study.py ... --targets alarm qa
> python study.py ... --model wav2vec2 \
>     --hub facebook/wav2vec2-conformer-rel-pos-large-960h-ft

What is not known here goes to every training: `--batch_size 16`. The study goes
on where it stopped when started again.
"""

import argparse
import functools
import random
import sys
from collections import Counter
from pathlib import Path

import joblib
import torch
from common.settings import check_settings, content_of, note_settings
from common.study import Training, run_trainings
from manifests import prepare_manifests
from measure import HERE, WHISPER_KIND, Kind, Measure
from report import write_report
from rows import Names, combine, rows_of
from slurp_prepare import prepare_slurp, scenarios_of
from synthesize import synthesize

from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import TaskVector, open_state, save_state

KINDS = {
    "whisper": WHISPER_KIND,
    "wav2vec2": Kind(
        "train",
        HERE / "hparams" / "train.yaml",
        "model",
        "wav2vec2_hub",
        {
            "data_folder": ".",
            "skip_prep": True,
            "valid_csv": None,
            "test_csv": None,
        },
    ),
}
TARGET_SCALES = [0.25, 0.5, 0.75, 1.0]
SCALES = [0.0, 0.25, 0.5, 0.75, 1.0]
VOICE = "en-us"


def parse_arguments(argv):
    """Read the command line; returns the options and what is for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--data_folder", required=True, help="SLURP")
    parser.add_argument("--model", choices=KINDS, default="whisper")
    parser.add_argument("--hub", required=True, help="hub name or folder")
    parser.add_argument("--output", default="results/syn2real")
    parser.add_argument(
        "--synthetic",
        help="folder with <scenario>/manifest.csv from any engine; default: "
        "espeak-ng speaks them",
    )
    parser.add_argument("--takes", type=int, default=5, help="of each text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--targets", nargs="+", help="default: all scenarios")
    parser.add_argument("--sources", nargs="+", help="default: all scenarios")
    parser.add_argument(
        "--mixed_first", choices=["True", "False"], default="False"
    )
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--lines", type=int, help="of a scenario and side")
    parser.add_argument("--valid", type=int, default=100, help="of a scenario")
    parser.add_argument("--test", type=int, help="of a scenario")
    parser.add_argument("--longest", type=float, default=16.0, help="seconds")
    parser.add_argument("--held_out", type=float, default=0.1)
    parser.add_argument(
        "--draws", type=int, default=3, help="of each number of sources"
    )
    return parser.parse_known_args(argv)


def speak(given, prepared, scenarios):
    """Return `{scenario: manifest of its synthetic speech}`."""
    if given.synthetic is None:
        folder = Path(given.output).resolve() / "synthetic"
        return {
            scenario: synthesize(
                prepared / f"{scenario}_texts.csv",
                folder / scenario,
                VOICE,
                takes=given.takes,
            )
            for scenario in scenarios
        }
    folder = Path(given.synthetic).resolve()
    found = {s: folder / s / "manifest.csv" for s in scenarios}
    missing = [str(path) for path in found.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"--synthetic: {missing[0]} is missing, one of {len(missing)}; "
            "each scenario needs a manifest with ID, duration, wav, text of "
            f"the texts in {prepared}"
        )
    return found


def settings_of(given, more, sources):
    """Return the options that all models and results depend on."""
    names = "model takes lr lines valid test longest held_out".split()
    return {
        **{name: vars(given)[name] for name in names},
        "sources": sources,
        "option of train.py": KINDS[given.model].parse(more)[1],
    }


def data_of(hub, prepared, synthetic):
    """Return what they depend on besides: base and speech."""
    manifests = {
        f"{split} lines of {domain}": prepared / f"{domain}_{split}.csv"
        for domain in synthetic
        for split in ("train", "valid", "test")
    }
    for domain, path in synthetic.items():
        manifests[f"synthetic speech of {domain}"] = path
    return {"base": open_state(hub).fingerprint, **content_of(manifests)}


def plan_trainings(names, targets, sources, manifests, lr, seed, folder):
    """List the trainings of one seed: one call of `train.py` each.

    `manifests`: `{name of the data: manifest}`; `folder` holds the trainings,
    and `base.safetensors` beside it.
    """
    trainings = {}

    def add(name, data, start=None, rate=lr):
        """Train from another training, or from the base."""
        base = folder.parent / "base.safetensors"
        if start is not None:
            base = folder / start / "save"
        trainings[name] = Training(
            name,
            {
                "train_csv": str(manifests[data]),
                "base": str(base),
                "lr": rate,
                "seed": seed,
            },
            () if start is None else (start,),
        )

    for target in targets:
        own, mixed = names.of(target), f"mixed/{target}"
        start, rate = (mixed, lr / 10) if names.mixed_first else (None, lr)
        add(mixed, mixed)
        if not names.mixed_first:
            add(f"mixed_then_synthetic/{target}", own(target, "synthetic").data,
                mixed, lr / 10)  # fmt: skip
        add(own.joint, f"joint/{target}", start, rate)
        for domain in (target, *(s for s in sources if s != target)):
            for side in ("real", "synthetic"):
                model = own(domain, side)
                add(model.name, model.data, start, rate)
    return list(trainings.values())


class Study:
    """The models of one seed, and what they do on held-out recordings."""

    def __init__(self, measure, folder, held_out):
        self.measure, self.folder, self.held_out = measure, folder, held_out
        self.base = open_state(folder / "base.safetensors")
        # Of the sums at hand: a grid uses the same two many times.
        self.vector = functools.lru_cache(maxsize=4)(self._vector)

    def _vector(self, weights):
        """Return `sum(weight * (model - base))` of `((model, weight), ...)`."""
        total = None
        for model, weight in weights:
            tau = TaskVector.between(
                self.base, self.folder / "models" / model / "save"
            )
            total = weight * tau if total is None else total + weight * tau
        return total

    def state(self, terms):
        """Return `base + sum(scale * vector)` of `[(scale, weights), ...]`."""
        parts = [
            scale * self.vector(tuple(sorted(weights.items())))
            for scale, weights in terms
            if scale and weights
        ]
        return sum(parts).apply(self.base) if parts else dict(self.base)

    def errors(self, terms, domain, split="test"):
        """Recognise a domain's real recordings with a sum of vectors."""
        return self.measure(
            combine(terms),
            lambda: self.state(terms),
            self.held_out[domain, split],
        )

    def wer(self, terms, domain, split):
        """Return the WER alone."""
        found = self.errors(terms, domain, split)
        return wer(found["references"], found["hypotheses"]).wer

    def choose(self, own, sources):
        """Choose all scales where each source takes the target's place.

        Its model of synthetic speech, plus the mean vector of the *other*
        sources, decodes its real development recordings: nothing here has
        heard the target. Returns the mean WER by `(target scale, scale)`, by
        scale of the support vector, and the best of each.
        """
        grid, support = Counter(), Counter()
        for source in progress(sources, desc=f"scales for {own.target}"):
            others = [s for s in sources if s != source]
            place = own.start, own.vector(source)
            for point in ((b, a) for b in TARGET_SCALES for a in SCALES):
                terms = own.edited(*place, own.difference(others), *point)
                grid[point] += self.wer(terms, source, "valid") / len(sources)
            for a in SCALES:
                terms = own.edited(*place, own.real(others), 1.0, a)
                support[a] += self.wer(terms, source, "valid") / len(sources)
        return {
            "grid": grid,
            "shrunk": min(TARGET_SCALES, key=lambda b: grid[b, 0.0]),
            "edited": min(SCALES, key=lambda a: grid[1.0, a]),
            "both": min(grid, key=grid.get),
            "support": min(SCALES, key=support.get),
        }

    def leave_out(self, own, sources, draws, seed):
        """Measure all rows of one target."""
        chosen = self.choose(own, sources)
        draw = random.Random(f"{seed}/{own.target}")
        rows, sweep = rows_of(own, sources, chosen, draws, draw)
        curve = {
            a: self.wer(
                own.edited(
                    own.start,
                    own.vector(own.target),
                    own.difference(sources),
                    1.0,
                    a,
                ),
                own.target,
                "test",
            )
            for a in SCALES
        }
        best = min(curve, key=curve.get)
        rows["oracle"] = [
            own.edited(
                own.start,
                own.vector(own.target),
                own.difference(sources),
                1.0,
                best,
            )
        ]

        def measured(members):
            return [self.errors(terms, own.target) for terms in members]

        return {
            "chosen": chosen,
            "curve": curve,
            "rows": {row: measured(m) for row, m in rows.items()},
            "sweep": {count: measured(m) for count, m in sweep.items()},
        }


def main(argv):
    """Train what is missing, measure, write the tables."""
    given, more = parse_arguments(argv)
    output = Path(given.output).resolve()
    prepared = output / "prepared"
    prepare_slurp(given.data_folder, prepared, given.held_out)
    there = scenarios_of(prepared)
    # Each once: a mean over the sources counts them.
    targets = list(dict.fromkeys(given.targets or there))
    sources = list(dict.fromkeys(given.sources or there))
    unknown = sorted({*targets, *sources} - {*there})
    if unknown:
        raise ValueError(
            f"no scenario {', '.join(unknown)}; there are {', '.join(there)}"
        )
    domains = [d for d in there if d in {*targets, *sources}]
    for target in targets:
        if len({*sources} - {target}) < 2:
            raise ValueError(
                f"--sources: {target} has fewer than two besides itself; one "
                "takes its place while another is a source"
            )
    kind, names = KINDS[given.model], Names(given.mixed_first == "True")
    hub = Path(given.hub)
    hub = str(hub.resolve()) if hub.is_dir() else given.hub
    settings = settings_of(given, more, sources)
    check_settings(output, settings)
    synthetic = speak(given, prepared, domains)
    settings |= data_of(hub, prepared, synthetic)
    check_settings(output, settings)
    torch.set_num_threads(1)
    results, about = {}, {}
    for seed in given.seeds:
        folder = output / str(seed)
        manifests, held_out, about[seed] = prepare_manifests(
            given, prepared, synthetic, targets, sources, folder, seed
        )
        shared = {
            **kind.options,
            kind.hub: hub,
            "avoid_if_longer_than": given.longest,
        }
        measure = Measure(
            kind,
            {
                **shared,
                "seed": seed,
                "train_csv": None,
                "output_folder": str(folder / "measured"),
            },
            more,
            folder / "measured",
        )
        # Not after hours of training.
        measure.check([*manifests.values(), *held_out.values()])
        note_settings(output, settings)
        # One start for all: a head of random weights is the same, too.
        base = folder / "base.safetensors"
        if not base.exists():
            save_state(measure.state(), base)
        trainings = plan_trainings(
            names,
            targets,
            sources,
            manifests,
            given.lr,
            seed,
            folder / "models",
        )
        trainings = [
            Training(t.name, {**shared, **t.options}, t.parents)
            for t in trainings
        ]
        with joblib.parallel_config("sequential"):
            run_trainings(
                kind.recipe.train,
                trainings,
                [str(kind.hparams), *more],
                folder / "models",
            )
        # Twice as large as the model, and of no use to a finished training;
        # the checkpoint lists it, so that it stays as an empty file.
        for path in (folder / "models").glob("**/save/*/optimizer.ckpt"):
            path.write_bytes(b"")
        study = Study(measure, folder, held_out)
        for target in targets:
            others = [source for source in sources if source != target]
            results[seed, target] = study.leave_out(
                names.of(target), others, given.draws, seed
            )
    write_report(results, about, output)


if __name__ == "__main__":
    main(sys.argv[1:])
