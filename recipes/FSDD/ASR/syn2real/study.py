#!/usr/bin/env python3
"""The table of SYN2REAL on strings of digits (FSDD), of one seed.

Every domain (group of words) is left out in turn. A model learns it from
synthetic speech only; task vectors between models of real and of synthetic
speech, taken from the other domains, bring it closer to real speech. The
left-out domain's real recordings are for testing alone.

To run this study, do the following:
> python study.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0

Several seeds make one table (mean and standard deviation):
> python study.py hparams/train.yaml --data_folder ... --seed 1
> python study.py --merge results/syn2real

Models that do not depend on one another are trained side by side, here or on
a cluster (see README.md):
> python study.py hparams/train.yaml --data_folder ... --workers 2
> python study.py hparams/train.yaml ... --backend dask --workers 2

A study that was killed goes on where it stopped when started again.
"""

import statistics
import sys
from pathlib import Path

from common.dataio import evaluation_loader, in_memory
from common.study import (
    Training,
    run_trainings,
    start_study,
    workers,
)
from jiwer import process_words
from report import CHOSEN_ON, TABLE, TITLE, write_report
from train import ASR, make_strings, prepare, train

from speechbrain_taskarith.metrics import merge_seeds
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import (
    TaskVector,
    open_state,
    search_scale,
    syn2real,
)

PRETRAINED = "pretrained/all"

# What is compared, and how: `--choose_on edited_target` changes a value.
OPTIONS = {
    # What the tables show: test, or valid while something is being tuned
    "report_on": "test",
    # What may be added of the vector; the paper's scripts used 0.2 and 0.25
    "paper_scale": 0.25,
    "scales": [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0],
    # sources_as_targets: each source domain takes the target's place, with the
    # other sources' vectors; edited_target (with a mixed model, which has heard
    # the sources' real speech): the edited target model on the sources' real
    # and the target's synthetic speech
    "choose_on": "sources_as_targets",
}


def plan_trainings(hparams, folder):
    """List all trainings, in `folder`: one call of `train.py` each.

    The first model; with `mixed_steps`, for each left-out domain a model
    tuned on the other domains; from there (else from the first model, once
    for all left-out domains) each domain's models of synthetic and of real
    speech. The left-out domain's has synthetic speech only. Beside it a model
    tuned on the left-out domain together with the others.
    """
    trainings = [Training(PRETRAINED, {"training_of": "pretrained"})]

    def add(name, training_of, domain, parent):
        base = str(Path(folder, parent, "save"))
        options = {"training_of": training_of, "domain": domain, "base": base}
        trainings.append(Training(name, options, (parent,)))

    for target in hparams["domains"]:
        sources = [name for name in hparams["domains"] if name != target]
        start = PRETRAINED
        if hparams["mixed_steps"]:
            start = f"mixed/{target}"
            add(start, "mixed", target, PRETRAINED)
        add(f"joint/{target}", "joint", target, start)
        heard = [(side, d) for d in sources for side in ("real", "synthetic")]
        for side, domain in [("synthetic", target), *heard]:
            add(model_name(hparams, target, side, domain), side, domain, start)
    # Without a mixed model the left-out domains share their models.
    return list({training.name: training for training in trainings}.values())


def model_name(hparams, target, side, domain):
    """Name a domain's model for a left-out target."""
    if hparams["mixed_steps"]:
        return f"without_{target}/{side}/{domain}"
    return f"{side}/{domain}"


class Measure:
    """Measures WERs on strings of words; every set of strings is made once."""

    def __init__(self, hparams, run_opts):
        self.hparams, self.model = hparams, hparams["model"]
        self.brain = ASR(
            modules=hparams["modules"],
            hparams=hparams,
            run_opts=run_opts,
        )
        self.strings, self.loaders = make_strings(hparams), {}

    def loader(self, side, domain, split):
        key = (side, domain, split)
        if key not in self.loaders:
            strings = self.strings.held_out(side, split, domain)
            loader = evaluation_loader(strings, self.hparams)
            self.loaders[key] = in_memory(loader)
        return self.loaders[key]

    def errors(self, state, target):
        """Count a model's errors on real strings of the target."""
        self.model.load_state_dict(dict(state))
        split = self.hparams["report_on"]
        self.brain.wer_on(self.loader("real", target, split))
        return count_errors(
            self.brain.references,
            self.brain.hypotheses,
            own=set(self.hparams["domains"][target]),
        )

    def curve(self, base, tau, heard, split, select_on):
        """Measure WER against scale: `{scale: mean WER over what is heard}`.

        `heard` is a list of `(side, domain)`.
        """
        data = {"/".join(key): self.loader(*key, split) for key in heard}
        search = search_scale(
            self.model,
            base,
            tau,
            lambda model: {k: self.brain.wer_on(d) for k, d in data.items()},
            [0.0, *self.hparams["scales"]],
            split=split,
            select_on=select_on,
            hopeless=None,
            enable_progress=False,
        )
        return {row["scale"]: row["wer"] for row in search.table}


def leave_out(target, models, measure, hparams):
    """Do without a domain's recordings: choose a scale, edit, measure.

    `models` reads a model by its name. Returns a dict: `rows` (`{row:
    errors}`), the chosen and the best scale with the curves over the scales,
    the weights that went into the edit, and the edited ones.
    """
    sources = [name for name in hparams["domains"] if name != target]

    def state(side, domain):
        return models(model_name(hparams, target, side, domain))

    base = state("synthetic", target)
    pairs = {s: (state("real", s), state("synthetic", s)) for s in sources}
    vectors = {
        source: TaskVector.between(synthetic, real)
        for source, (real, synthetic) in pairs.items()
    }
    ensemble = TaskVector.mean(list(vectors.values()))

    def edited(vector, scale):
        state = vector.apply(base, scale, any_base=True)
        return measure.errors(state, target)

    rows = {
        "pretrained": measure.errors(models(PRETRAINED), target),
        "joint": measure.errors(models(f"joint/{target}"), target),
        "baseline": measure.errors(base, target),
    }
    choose = CHOOSERS[hparams["choose_on"]]
    selection = choose(target, base, ensemble, pairs, vectors, measure)
    scale = best_scale(selection)
    rows["edited"] = edited(ensemble, scale)
    rows["paper_scale"] = edited(ensemble, hparams["paper_scale"])
    members = [edited(vector, scale) for vector in vectors.values()]
    rows["members"] = {
        what: statistics.fmean(member[what] for member in members)
        for what in rows["baseline"]
    }
    # What no one may choose: the best scale on the strings reported on.
    curve = measure.curve(
        base, ensemble, [("real", target)], hparams["report_on"], "real_target"
    )
    oracle_scale = best_scale(curve)
    rows["oracle"] = edited(ensemble, oracle_scale)
    return {
        "rows": rows,
        "scale": scale,
        "selection": selection,
        "oracle_scale": oracle_scale,
        "curve": curve,
        "base": base,
        "pairs": pairs,
        "vectors": vectors,
        "proof": real_models_come_back(pairs),
        "state": syn2real(base, list(pairs.values()), scale=scale),
    }


def sources_as_targets(target, base, ensemble, pairs, vectors, measure):
    """Let each source domain take the target's place.

    Its model of synthetic speech, plus the mean of the *other* sources'
    vectors, decodes its real development strings. Returns the mean WER by
    scale; no real speech of the target is used.
    """
    curves = []
    for source, (_, synthetic) in pairs.items():
        others = [tau for name, tau in vectors.items() if name != source]
        curves.append(
            measure.curve(
                synthetic,
                TaskVector.mean(others),
                [("real", source)],
                "valid",
                CHOSEN_ON["sources_as_targets"],
            )
        )
    return {s: statistics.fmean(c[s] for c in curves) for s in curves[0]}


def edited_target(target, base, ensemble, pairs, vectors, measure):
    """Let the target's edited model decode what is not real target speech.

    That is real development strings of the sources and synthetic ones of the
    target. Returns the mean WER by scale.
    """
    heard = [*(("real", source) for source in pairs), ("synthetic", target)]
    return measure.curve(
        base, ensemble, heard, "valid", CHOSEN_ON["edited_target"]
    )


# What `choose_on` may name.
CHOOSERS = {
    "sources_as_targets": sources_as_targets,
    "edited_target": edited_target,
}


def best_scale(curve):
    """Return the scale with the least WER, of equals the smallest."""
    return min(curve, key=lambda scale: (curve[scale], scale))


def real_models_come_back(pairs):
    """Apply each source's vector to its own synthetic model.

    Returns the largest difference of a weight from the real model.
    """
    worst = 0.0
    for real, synthetic in pairs.values():
        rebuilt = syn2real(synthetic, [(real, synthetic)], scale=1.0)
        for name, tensor in rebuilt.items():
            difference = (tensor.double() - real[name].double()).abs()
            worst = max(worst, float(difference.max()))
    return worst


def count_errors(references, hypotheses, own):
    """Count word errors in %, those in a domain's own words apart.

    `own_words`, `shared_words`: the share of these reference words that was
    substituted or deleted. Insertions belong to no word and are in `wer`.
    """
    output = process_words(references, hypotheses)
    wrong, total = {True: 0, False: 0}, {True: 0, False: 0}
    for words, chunks in zip(output.references, output.alignments):
        for chunk in chunks:
            for word in words[chunk.ref_start_idx : chunk.ref_end_idx]:
                total[word in own] += 1
                wrong[word in own] += chunk.type != "equal"
    return {
        "wer": 100.0 * output.wer,
        "own_words": 100.0 * wrong[True] / max(1, total[True]),
        "shared_words": 100.0 * wrong[False] / max(1, total[False]),
    }


def main(argv):
    """Train all models, edit and measure for each left-out domain, report."""
    if argv[:1] == ["--merge"]:
        merge_seeds(argv[1], title=TITLE, only=[TABLE])
        return
    study = start_study(argv, OPTIONS)
    hparams, models = study.hparams, study.models
    prepare(hparams)

    trainings = plan_trainings(hparams, models)
    with workers(study.options):
        run_trainings(train, trainings, study.arguments, models)

    measure = Measure(hparams, study.run_opts)
    results = {}
    for target in progress(hparams["domains"], desc="domains measured"):
        results[target] = leave_out(
            target,
            lambda name: open_state(models / name / "save"),
            measure,
            hparams,
        )
    write_report(results, study.folder, hparams)


if __name__ == "__main__":
    main(sys.argv[1:])
