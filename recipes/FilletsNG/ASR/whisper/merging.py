#!/usr/bin/env python3
"""Two or more fine-tuned Whispers into one: what each rule keeps of them.

Each domain has a Whisper of its own, tuned from one base. All rules merge the
same models, each at its default and at one more setting: the scale with the
least mean WER on development lines of all domains, of as many values for each
rule. Three means of WERs: over the domains; over others that none was tuned
on; on what the base knows best.

To run this study, do the following (see README.md for the folders):
> python merging.py --whisper_hub whisper-base-5s \\
>     --original english=arctic/{}.csv --outside fr=stamps/fr_test.csv \\
>     --domains digits=digits/{}.csv cs=corpus/cs_{}.csv nl=corpus/nl_{}.csv \\
>     --output results/seq

In the folder of sequential.py it uses the models that are there. What it does
with each rule, in Python:

    vectors = [TaskVector.between("whisper-base-5s", path) for path in tuned]
    merged = TIES(density=0.2)("whisper-base-5s", vectors)

and on the command line, for `transformers` to read:

> taskarith merge --base whisper-base-5s --finetuned digits/save cs/save \\
>     nl/save --rule TIES density=0.2 -o merged
"""

import argparse
import functools
import sys
from statistics import fmean

from sequential import Study, add_data_options, check_names, domain_option
from studies.domains import Domain
from studies.lineage import Edited
from studies.lines import check_domains

from speechbrain_taskarith.metrics import (
    Summary,
    WERReport,
    paired_bootstrap,
    plots,
)
from speechbrain_taskarith.utils.files import write_json
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import (
    DARE,
    DELLA,
    PCB,
    SCE,
    TIES,
    TSVM,
    BoostedTSVM,
    Breadcrumbs,
    IsoC,
    IsoCTS,
    Karcher,
    LinearAverage,
    LiNeS,
    ModelStock,
    MultiSLERP,
    TaskArithmetic,
)

TABLE, TITLE = "merging", "Merging fine-tuned Whispers"
# Each model on its own domain: what a merged one may reach. The rival of all
# other rules.
OWN, RIVAL = "each_on_its_own_domain", "LinearAverage"
# Rules that add vectors up are scaled down, those that average them up.
ADDED, AVERAGED = (1.0, 0.6, 0.3), (1.0, 1.5, 2.0)

#: `{name: (scale -> rule, scales)}`; the first scale is the default. TIES keeps
#: a fifth of each vector, as published, `TIES_half` half of it. Left out are
#: rules for two models (SLERP, SelectiveAttention), Fisher, which needs data,
#: and ByLayer, which is made of other rules.
RULES = {
    "LinearAverage": (lambda scale: LinearAverage(), (1.0,)),
    "TaskArithmetic": (lambda scale: TaskArithmetic(scale=scale), ADDED),
    "TIES": (lambda scale: TIES(scale=scale), AVERAGED),
    "TIES_half": (lambda scale: TIES(density=0.5, scale=scale), AVERAGED),
    "DARE": (lambda scale: DARE(drop=0.5, scale=scale), ADDED),
    "DELLA": (lambda scale: DELLA(scale=scale), AVERAGED),
    "Breadcrumbs": (lambda scale: Breadcrumbs(scale=scale), ADDED),
    "PCB": (lambda scale: PCB(scale=scale), AVERAGED),
    "SCE": (lambda scale: SCE(scale=scale), AVERAGED),
    "MultiSLERP": (lambda scale: MultiSLERP(scale=scale), AVERAGED),
    "Karcher": (lambda scale: Karcher(scale=scale), AVERAGED),
    "ModelStock": (lambda scale: ModelStock(scale=scale), AVERAGED),
    "LiNeS": (
        lambda scale: LiNeS(TaskArithmetic(scale=scale / 3), slope=scale),
        ADDED,
    ),
    "TSVM": (lambda scale: TSVM(scale=scale), ADDED),
    "BoostedTSVM": (lambda scale: BoostedTSVM(scale=scale), ADDED),
    "IsoC": (lambda scale: IsoC(scale=scale), ADDED),
    "IsoCTS": (lambda scale: IsoCTS(scale=scale), ADDED),
}


def parse_arguments(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_data_options(parser)
    parser.add_argument(
        "--outside",
        type=functools.partial(domain_option, parse=Domain.parse_test),
        nargs="+",
        default=[],
        metavar="NAME=MANIFEST",
        help="test lines of what no model was tuned on",
    )
    parser.add_argument("--rules", nargs="+", help="default: all")
    given = parser.parse_args(argv)
    check_names(parser, given, given.outside)
    given.rules = given.rules or list(RULES)
    unknown = [rule for rule in given.rules if rule not in RULES]
    if unknown:
        parser.error(f"--rules {unknown}: expected some of {', '.join(RULES)}")
    return given


def choose(study, trainings, rule):
    """Return the scale with the least mean WER on all development lines."""
    build, scales = RULES[rule]
    domains = [study.given.original.name]
    domains += [domain.name for domain in study.given.domains]
    wers = {
        scale: study.dev_wer(
            Edited(study.base, build(scale), trainings), domains
        )
        for scale in scales
    }
    return min(wers, key=wers.get), wers


def models_of(study, seed, rules):
    """Return `{row: model}` of a seed, and what was chosen."""
    trainings = study.plain(seed)
    rows, chosen = {"base": study.base}, {}
    for training, domain in zip(trainings, study.given.domains):
        rows[f"only_{domain.name}"] = training
    for name in progress(rules, desc=f"rules, seed {seed}"):
        build, scales = RULES[name]
        rows[name] = Edited(study.base, build(scales[0]), trainings)
        if len(scales) > 1:
            best, wers = choose(study, trainings, name)
            rows[f"{name}_chosen"] = Edited(study.base, build(best), trainings)
            chosen[name] = {
                "chosen": best,
                "valid_wer": {str(scale): wer for scale, wer in wers.items()},
            }
    return rows, chosen


def add_seed(summary, study, seed, rows):
    """Measure all rows of a seed on the test lines; return the reports."""
    names = [domain.name for domain in study.given.domains]
    outside = [domain.name for domain in study.given.outside]
    original = study.given.original.name
    reports, own = {}, []
    for row, model in progress(rows.items(), desc=f"test, seed {seed}"):
        reports[row] = found = {
            name: study.tests.errors(model, name, "test")
            for name in [original, *names, *outside]
        }
        if row.startswith("only_"):
            mine = row.removeprefix("only_")
            own.append({"in_domain": found[mine].wer})
            own[-1] |= values_of(found, [], outside, original)
        values = values_of(found, names, outside, original)
        values |= {f"on_{name}": found[name].wer for name in names + outside}
        chosen = "valid" if row.endswith("_chosen") else None
        add_row(summary, seed, row, values, selected_on=chosen)
    values = {metric: fmean(each[metric] for each in own) for metric in own[0]}
    add_row(summary, seed, OWN, values)
    return reports


def values_of(found, inside, outside, original):
    """Return the mean WERs: `{metric: WER}`."""
    values = {"original": found[original].wer}
    for metric, names in (("in_domain", inside), ("outside", outside)):
        if names:
            values[metric] = fmean(found[name].wer for name in names)
    return values


def add_row(summary, seed, row, values, **how):
    """Add the WERs of one row."""
    for metric in sorted(values, key=_place):
        summary.add(
            table=TABLE,
            row=row,
            metric=metric,
            value=values[metric],
            unit="%",
            seed=seed,
            **how,
        )


def _place(metric):
    """Means first, in the order of the documentation."""
    means = ["in_domain", "outside", "original"]
    return means.index(metric) if metric in means else len(means)


def add_bootstrap(summary, reports):
    """Compare each row with the mean of the weights, on all test lines.

    `reports`: `{seed: {row: {domain: WERReport}}}`.
    """
    found = {}
    for seed, rows in reports.items():
        for row, by_domain in rows.items():
            for name, report in by_domain.items():
                for utterance in report.utterances:
                    own = found.setdefault(row, {})
                    own[seed, name, utterance.id] = utterance
    rival = found.get(RIVAL)
    for row, own in found.items():
        if rival is None or row == RIVAL:
            continue
        first, second = (
            WERReport(tuple(utterances[key] for key in rival))
            for utterances in (rival, own)
        )
        test = paired_bootstrap(
            first, second, blocks=[(name, ID) for _, name, ID in rival]
        )
        summary.add_paired_test(f"against_{RIVAL}", row, test)


def plot(summary, path):
    """Draw each row's mean WERs, the rules at the scales that were chosen."""
    panels = {
        "in_domain": "new domains",
        "outside": "none was tuned on",
        "original": "what the base knew",
    }
    shown = {title: {} for title in panels.values()}
    for entry in summary.rows(TABLE):
        row, metric = entry["row"], entry["metric"]
        rule = row.removesuffix("_chosen")
        default = row in RULES and len(RULES[row][1]) > 1
        if metric in panels and isinstance(entry["seed"], int):
            if not default and not row.startswith("only_"):
                found = shown[panels[metric]].setdefault(rule, [])
                found.append(entry["value"])
    plots.plot_by_row(
        {title: found for title, found in shown.items() if found},
        path,
        before="base",
        ours=[RIVAL],
        bounds=[OWN],
    )


def main(argv):
    """Train what is missing, merge, choose, measure, write the table."""
    given = parse_arguments(argv)
    study = Study(given, given.seeds)
    outside = {d.name: d.check(given.longest, ["test"]) for d in given.outside}
    check_domains(study.splits | outside, apart=False)
    for domain in given.outside:
        study.hold_out(domain, "test")
        study.tests.measure.check([study.held_out[domain.name, "test"]])
    for seed in given.seeds:
        for training in study.plain(seed):
            study.models.train(training)
    if given.only_train:
        return
    folder = study.folder / "merging"
    summary = Summary(folder, title=TITLE)
    summary.note(
        "All rules merge the same models, each tuned on one domain from one "
        "base. Mean WERs: `in_domain` over these domains, `outside` over what "
        "no model was tuned on, `original` on what the base knows best. "
        "`_chosen`: the best of three scales on development lines of the "
        "domains and of the original one."
    )
    found = {seed: models_of(study, seed, given.rules) for seed in given.seeds}
    # Everything is chosen before a test line is looked at.
    write_json(
        folder / "chosen.json",
        {str(seed): chosen for seed, (_, chosen) in found.items()},
    )
    reports = {
        seed: add_seed(summary, study, seed, rows)
        for seed, (rows, _) in found.items()
    }
    add_bootstrap(summary, reports)
    plot(summary, folder / "plots" / f"{TABLE}.png")
    summary.write()
    summary.print()


if __name__ == "__main__":
    main(sys.argv[1:])
