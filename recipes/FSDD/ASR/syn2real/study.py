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
from dataclasses import dataclass, replace
from pathlib import Path

from common.dataio import evaluation_loader, in_memory
from common.study import (
    Training,
    run_trainings,
    start_study,
    workers,
)
from jiwer import process_words
from report import CHOSEN_ON, PRINTED, TITLE, write_report
from rows import (
    DIFFERENCE,
    SEARCHES,
    WHOLE_TARGET,
    Material,
    axes,
    check_rows,
    choose,
    fixed_scales,
    mean_surface,
    states_of,
)
from train import ASR, make_strings, prepare, train

from speechbrain_taskarith.metrics import merge_seeds
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import open_state, search_scales, syn2real

PRETRAINED = "pretrained/all"

# What is compared, and how: `--choose_on edited_target` changes a value.
OPTIONS = {
    # What the tables show: test, or valid while something is being tuned
    "report_on": "test",
    # sources_as_targets: each source domain takes the target's place, with the
    # other sources' vectors; edited_target (with a mixed model, which has heard
    # the sources' real speech): the edited target model on the sources' real
    # and the target's synthetic speech
    "choose_on": "sources_as_targets",
}


def plan_trainings(hparams, folder, speaker=None):
    """List all trainings, in `folder`: one call of `train.py` each.

    The first model; with `mixed_steps`, for each left-out domain a model
    tuned on the other domains; from there (else from the first model, once
    for all left-out domains) each domain's models of synthetic and of real
    speech. The left-out domain's model of real speech is a bound alone. Beside
    it a model tuned on the left-out domain together with the others. With a
    speaker, what hears recordings is trained once more without that speaker.
    """
    trainings = [Training(PRETRAINED, {"training_of": "pretrained"})]

    def add(name, training_of, domain, parent, without):
        base = str(Path(folder, parent, "save"))
        options = {"training_of": training_of, "domain": domain, "base": base}
        if without and name.startswith(unheard(without)):
            options["without_speaker"] = without
        trainings.append(Training(name, options, (parent,)))

    for without in dict.fromkeys((None, speaker)):
        for target in hparams["domains"]:
            start = start_name(hparams, target, without)
            if hparams["mixed_steps"]:
                add(start, "mixed", target, PRETRAINED, without)
            joint = f"{unheard(without)}joint/{target}"
            add(joint, "joint", target, start, without)
            for domain in hparams["domains"]:
                for side in ("real", "synthetic"):
                    name = model_name(hparams, target, side, domain, without)
                    add(name, side, domain, start, without)
    # Without a mixed model the left-out domains share their models.
    return list({training.name: training for training in trainings}.values())


def unheard(speaker):
    """Begin the names of models that have not heard a speaker."""
    return "" if speaker is None else f"unheard_{speaker}/"


def start_name(hparams, target, speaker=None):
    """Name what all models of a left-out target are tuned from."""
    if hparams["mixed_steps"]:
        return f"{unheard(speaker)}mixed/{target}"
    return PRETRAINED


def model_name(hparams, target, side, domain, speaker=None):
    """Name a domain's model for a left-out target."""
    if hparams["mixed_steps"]:
        return f"{unheard(speaker)}without_{target}/{side}/{domain}"
    # What hears no person, nor starts from what did, is the same for all.
    return f"{unheard(speaker) if side == 'real' else ''}{side}/{domain}"


class Measure:
    """Measures WERs on strings of words; every set of strings is made once.

    With a speaker, the table's strings are this speaker's, and choices are
    made on all others'.
    """

    def __init__(self, hparams, run_opts, strings, speaker=None):
        self.hparams, self.model = hparams, hparams["model"]
        self.brain = ASR(
            modules=hparams["modules"],
            hparams=hparams,
            run_opts=run_opts,
        )
        self.strings, self.speaker, self.loaders = strings, speaker, {}

    def loader(self, side, domain, split, **speakers):
        key = (side, domain, split, *speakers)
        if key not in self.loaders:
            strings = self.strings.held_out(side, split, domain, **speakers)
            loader = evaluation_loader(strings, self.hparams)
            self.loaders[key] = in_memory(loader)
        return self.loaders[key]

    def reported(self, target):
        """Return the real strings of the target that the table is about."""
        split = self.hparams["report_on"]
        return self.loader("real", target, split, only=self.speaker)

    def errors(self, state, target):
        """Count a model's errors on real strings of the target.

        Returns them in %, and the report for a paired test.
        """
        self.model.load_state_dict(dict(state))
        self.brain.wer_on(self.reported(target))
        errors = count_errors(
            self.brain.references,
            self.brain.hypotheses,
            own=set(self.hparams["domains"][target]),
        )
        return errors, self.brain.report

    def choices(self, case, kind):
        """Measure a case of `choose_on` at all scales, on strings for that."""
        data = [
            self.loader(side, domain, "valid", without=self.speaker)
            for side, domain in case.heard
        ]
        select_on = CHOSEN_ON[self.hparams["choose_on"]]
        return self.surface(
            case.material,
            kind,
            axes(kind, self.hparams),
            data,
            "valid",
            select_on,
        )

    def oracle(self, material, target):
        """Measure what no one may choose by: the strings of the table."""
        return self.surface(
            material,
            DIFFERENCE,
            {**axes(DIFFERENCE, self.hparams), "target_scale": [1.0]},
            [self.reported(target)],
            self.hparams["report_on"],
            "real_target",
        )

    def surface(self, material, kind, scales, data, split, select_on):
        """Return `{(target scale, scale): mean WER over the data}`."""
        search = search_scales(
            self.model,
            material.base,
            material.vectors(kind),
            lambda model: statistics.fmean(map(self.brain.wer_on, data)),
            scales,
            baseline={"target_scale": 1.0},
            outside=material.target,
            split=split,
            select_on=select_on,
            hopeless=None,
            show_progress=False,
        )
        return search.surface("target_scale", "scale")


def leave_out(target, models, measure, hparams):
    """Do without a domain's recordings: choose scales, edit, measure.

    `models` reads a model by its name. Returns a dict: `rows` (`{row:
    errors}`), `reports` of the rows that are one model, the chosen `scales` of
    the rows that have any, the surfaces that they were chosen by, the
    `oracle`'s, the models that went into the edit, and the edited one.
    """
    speaker = measure.speaker

    def state(side, domain):
        return models(model_name(hparams, target, side, domain, speaker))

    material = Material(
        base=models(start_name(hparams, target, speaker)),
        target=state("synthetic", target),
        pairs={
            source: (state("real", source), state("synthetic", source))
            for source in hparams["domains"]
            if source != target
        },
        trained={
            "pretrained": models(PRETRAINED),
            "joint": models(f"{unheard(speaker)}joint/{target}"),
            "real_target": state("real", target),
        },
    )
    cases = CASES[hparams["choose_on"]](target, material)
    surfaces = {}
    for kind in {
        SEARCHES[row][0] for row in hparams["rows"] if row in SEARCHES
    }:
        surfaces[kind] = mean_surface(
            [measure.choices(case, kind) for case in cases]
        )
    scales = {
        row: choose(where, surfaces[kind])
        for row, (kind, where) in SEARCHES.items()
        if row in hparams["rows"]
    }
    curve = measure.oracle(material, target)
    scales["oracle"] = choose(WHOLE_TARGET, curve)
    scales_of = {**scales, **fixed_scales(hparams)}

    rows, reports = {}, {}
    for row in hparams["rows"]:
        found = [
            measure.errors(state, target)
            for state in states_of(row, material, scales_of.get(row))
        ]
        rows[row] = {
            what: statistics.fmean(errors[what] for errors, _ in found)
            for what in found[0][0]
        }
        if len(found) == 1:
            reports[row] = found[0][1]
    [edited] = states_of("edited", material, scales["edited"])
    return {
        "rows": rows,
        "reports": reports,
        "scales": scales,
        "selection": surfaces[DIFFERENCE],
        "curve": curve,
        "material": material,
        "proof": real_models_come_back(material.pairs),
        "state": edited,
    }


@dataclass(frozen=True)
class Case:
    """Models in the place of the left-out domain's, and what they decode."""

    material: Material
    heard: list  # (side, domain)


def sources_as_targets(target, material):
    """Let each source domain take the target's place.

    Its model of synthetic speech, plus the mean of the *other* sources'
    vectors, decodes its real development strings: no real speech of the
    target is used.
    """
    return [
        Case(
            replace(
                material,
                target=synthetic,
                pairs={s: p for s, p in material.pairs.items() if s != source},
            ),
            [("real", source)],
        )
        for source, (_, synthetic) in material.pairs.items()
    ]


def edited_target(target, material):
    """Let the target's edited model decode what is not real target speech.

    That is real development strings of the sources and synthetic ones of the
    target.
    """
    heard = [*(("real", s) for s in material.pairs), ("synthetic", target)]
    return [Case(material, heard)]


# What `choose_on` may name.
CASES = {
    "sources_as_targets": sources_as_targets,
    "edited_target": edited_target,
}


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
        merge_seeds(argv[1], title=TITLE, only=PRINTED)
        return
    study = start_study(argv, OPTIONS)
    hparams, models = study.hparams, study.models
    check_rows(hparams["rows"])
    prepare(hparams)
    strings = make_strings(hparams)
    speaker = strings.left_out_speaker

    trainings = plan_trainings(hparams, models, speaker)
    with workers(study):
        run_trainings(train, trainings, study.arguments, models)

    measures = [
        Measure(hparams, study.run_opts, strings, unheard_one)
        for unheard_one in dict.fromkeys((None, speaker))
    ]
    results = {}
    for target in progress(hparams["domains"], desc="domains measured"):
        results[target], *others = (
            leave_out(
                target,
                lambda name: open_state(models / name / "save"),
                measure,
                hparams,
            )
            for measure in measures
        )
        results[target]["unheard"] = [other["rows"] for other in others]
    write_report(results, study.folder, {**hparams, "speaker": speaker})


if __name__ == "__main__":
    main(sys.argv[1:])
