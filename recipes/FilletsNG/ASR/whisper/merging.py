#!/usr/bin/env python3
"""Two or more fine-tuned Whispers into one: what each rule keeps of them.

Each domain has a Whisper of its own, tuned from one base. All rules merge the
same models, each at its default and at one more setting: the scale with the
least mean WER on development lines of all domains, of as many values for each
rule. In-domain WER is the mean over the domains; the original one is on what
the base knows and none was tuned on.

To run this study, do the following (see README.md for the folders):
> python merging.py --whisper_hub whisper-base-5s \\
>     --original english=arctic/{}.csv --output results/seq \\
>     --domains digits=digits/{}.csv cs=corpus/cs_{}.csv nl=corpus/nl_{}.csv

In the folder of sequential.py it uses the models that are there. What it does
with each rule, in Python:

    vectors = [TaskVector.between("whisper-base-5s", path) for path in tuned]
    merged = TIES(density=0.2)("whisper-base-5s", vectors)

and on the command line, for `transformers` to read:

> taskarith merge --base whisper-base-5s --finetuned digits/save cs/save \\
>     nl/save --rule TIES density=0.2 -o merged
"""

import argparse
import sys
from statistics import fmean

from sequential import Study, add_data_options, check_names
from studies.lineage import Edited

from speechbrain_taskarith.metrics import Summary, plots
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
# Rules that add vectors up are scaled down, those that average them up.
ADDED, AVERAGED = (1.0, 0.6, 0.3), (1.0, 1.5, 2.0)

#: `{name: (scale -> rule, scales)}`; the first scale is the default. Left out
#: are rules for two models (SLERP, SelectiveAttention), Fisher, which needs
#: data, and ByLayer, which is made of other rules.
RULES = {
    "LinearAverage": (lambda scale: LinearAverage(), (1.0,)),
    "TaskArithmetic": (lambda scale: TaskArithmetic(scale=scale), ADDED),
    "TIES": (lambda scale: TIES(scale=scale), AVERAGED),
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
    parser.add_argument("--rules", nargs="+", help="default: all")
    given = parser.parse_args(argv)
    check_names(parser, given)
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
    """Measure all rows of a seed on the test lines."""
    names = [domain.name for domain in study.given.domains]
    original = study.given.original.name
    own = []
    for row, model in progress(rows.items(), desc=f"test, seed {seed}"):
        wers = {
            name: study.tests.wer(model, name, "test")
            for name in [original, *names]
        }
        if row.startswith("only_"):
            own.append((wers[row.removeprefix("only_")], wers[original]))
        add_row(summary, seed, row, wers, original)
    summary.add(
        table=TABLE,
        row="each_on_its_own_domain",
        metric="in_domain",
        value=fmean(wer for wer, _ in own),
        unit="%",
        seed=seed,
    )
    summary.add(
        table=TABLE,
        row="each_on_its_own_domain",
        metric="original",
        value=fmean(wer for _, wer in own),
        unit="%",
        seed=seed,
    )


def add_row(summary, seed, row, wers, original):
    """Add the WERs of one model."""
    inside = fmean(wer for name, wer in wers.items() if name != original)
    values = {"in_domain": inside, "original": wers[original]}
    values |= {f"on_{name}": wer for name, wer in wers.items()}
    for metric, value in values.items():
        if metric != f"on_{original}":
            summary.add(
                table=TABLE,
                row=row,
                metric=metric,
                value=value,
                unit="%",
                seed=seed,
                selected_on="valid" if row.endswith("_chosen") else None,
            )


# What the markers of the plot stand for.
KINDS = ("no merging", "rule as published", "rule, scale chosen")


def plot(summary, path):
    """Draw in-domain WER against the original one, a point for each row."""
    rows = dict.fromkeys(entry["row"] for entry in summary.rows(TABLE))
    with plots.figure(path, height=3.0) as axes:
        for row in rows:
            if row.startswith("only_"):
                continue
            x, y = (
                summary.value(TABLE, row, metric)
                for metric in ("original", "in_domain")
            )
            chosen = row.endswith("_chosen")
            rule = row.removesuffix("_chosen") in RULES
            number = (1 + chosen) if rule else 0
            named = {handle.get_label() for handle in axes.get_lines()}
            axes.plot(
                x,
                y,
                color=plots.COLOURS[number],
                marker=plots.MARKERS[number],
                linestyle="",
                label="" if KINDS[number] in named else KINDS[number],
            )
            if chosen or not rule or row == "LinearAverage":
                axes.annotate(
                    plots.words(row.removesuffix("_chosen")),
                    (x, y),
                    xytext=(4, 2),
                    textcoords="offset points",
                    fontsize=6,
                )
        axes.set_xlabel("WER on what the base knew (%)")
        axes.set_ylabel("WER on the new domains, mean (%)")
        plots.legend_below(axes)


def main(argv):
    """Train what is missing, merge, choose, measure, write the table."""
    given = parse_arguments(argv)
    study = Study(given, given.seeds)
    for seed in given.seeds:
        for training in study.plain(seed):
            study.models.train(training)
    if given.only_train:
        return
    folder = study.folder / "merging"
    summary = Summary(folder, title=TITLE)
    summary.note(
        "All rules merge the same models, each tuned on one domain from one "
        "base. `in_domain`: mean WER over the domains; `original`: what the "
        "base knows and none was tuned on. `_chosen`: the best of three scales "
        "on development lines of all of these."
    )
    found = {seed: models_of(study, seed, given.rules) for seed in given.seeds}
    # Everything is chosen before a test line is looked at.
    write_json(
        folder / "chosen.json",
        {str(seed): chosen for seed, (_, chosen) in found.items()},
    )
    for seed, (rows, _) in found.items():
        add_seed(summary, study, seed, rows)
    plot(summary, folder / "plots" / f"{TABLE}.png")
    summary.write()
    summary.print()


if __name__ == "__main__":
    main(sys.argv[1:])
