"""What the study measures and leaves behind: tables, plots, edited models."""

import csv
import io
import statistics

from common.study import add_paired_tests, relative_reduction
from rows import DIFFERENCE, SEARCHES, line

from speechbrain_taskarith.metrics import (
    Summary,
    plot_scale_curve,
    plot_scale_surface,
)
from speechbrain_taskarith.metrics.plots import words
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.vectors import (
    ModelCard,
    cosine_matrix,
    open_state,
    plot_cosine_matrix,
    save_state,
)

TABLE = "syn2real"
UNHEARD = f"{TABLE}_unheard_speaker"
PRINTED = [TABLE]
TITLE = "SYN2REAL on strings of digits"
# What scales are chosen on, by the value of `choose_on`.
CHOSEN_ON = {
    "sources_as_targets": "real_source",
    "edited_target": "real_source+synthetic_target",
}
PLACES = {
    "sources_as_targets": "the sources",
    "edited_target": "the sources and synthetic speech",
}
RULES = {
    "sources_as_targets": "real ones of each source domain, decoded by its "
    "model of synthetic speech with the other sources' vectors",
    "edited_target": "real ones of the source domains and synthetic ones of "
    "the target, decoded by the target's edited model",
}
# The rows that the edits are to be ahead of.
EDITS = ("edited", "two_scales")
CONTROLS = (
    *("shrunk_target", "real_source", "real_source_mean"),
    *("mean_of_both", "support_language", "joint"),
)
NOTE = (
    "Means over the left-out domains. `own_words`, `shared_words`: share of "
    "the domain's own and of the shared words that came out wrong; read every "
    "WER together with `own_words`, since own words are few. "
    "`relative_reduction`: mean of each domain's relative WER reduction "
    "against `baseline`."
)
# What a row is; a table's page explains the rows that it has.
MEANINGS = {
    "pretrained": "synthetic speech of all words; all others start from it, "
    "or from the mixed model",
    "baseline": "knows its domain from synthetic speech only (scale 0)",
    "shrunk_target": "a share of what `baseline` learned since the base, with "
    "nothing from other domains",
    "real_source": "a source domain's model of real speech as it is, mean "
    "over sources",
    "real_source_mean": "the plain mean of these models' weights: no "
    "synthetic speech of the target, no task vector",
    "mean_of_both": "the plain mean of `baseline` and `real_source_mean`",
    "support_language": "`baseline` plus a share of all that real speech "
    "taught the sources since the base",
    "joint": "tuned as often on the target's synthetic speech together with "
    "the real and synthetic speech of the other domains: it needs their "
    "recordings",
    "edited": "the `ensemble`, `baseline` plus a share of the mean of the "
    "sources' vectors, real minus synthetic speech",
    "members": "with one source domain's vector, mean over sources, at the "
    "scale of `edited`",
    "paper_scale": "`edited` at {paper_scale}",
    "two_scales": "`edited` with a share of `baseline`'s own vector, both "
    "shares chosen together",
    "oracle": "`edited` at the best scale on the very strings that are "
    "reported on, a bound that no one may choose",
    "real_target": "tuned on real speech of the target: a bound",
}
WHEN = (
    "Which to use: the plain mean of the sources' real models "
    "(`real_source_mean`) where it has the lower WER and the target's own "
    "words do not matter; it needs neither synthetic target speech nor a task "
    "vector, and does not know the target's own words. The edit where both "
    "columns count and it is ahead; a small scale, or the baseline, where own "
    "words count most. Two scales where the base is at hand. Joint training "
    "where the sources' recordings are."
)


def write_report(results, output, hparams):
    """Write tables, plots and edited models, and show the table.

    `results` is `{left-out domain: from study.leave_out}`.
    """
    tables = output
    if hparams["report_on"] != "test":
        tables = output / hparams["report_on"]
    for target, result in results.items():
        keep_edited(target, result, output / "save" / "edited", hparams)
        draw(target, result, tables, hparams)
    summary = summarise(results, tables, hparams)
    summary.write()
    summary.print(only=[TABLE])


def keep_edited(target, result, folder, hparams):
    """Keep the edited model with its card, in a folder of its own."""
    path = folder / target / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(result["state"], path)
    material = result["material"]
    parents = [ModelCard.parent("target, synthetic", material.target)]
    for source, (real, synthetic) in material.pairs.items():
        parents.append(ModelCard.parent(f"{source}, real", real))
        parents.append(ModelCard.parent(f"{source}, synthetic", synthetic))
    ModelCard(
        title=f"SYN2REAL, left out: {target}",
        parents=parents,
        scale=result["scales"]["edited"]["scale"],
        wer={
            row: result["rows"][row]["wer"]
            for row in ("baseline", "edited", "oracle")
            if row in result["rows"]
        },
        selected_on=CHOSEN_ON[hparams["choose_on"]],
        fingerprint=open_state(path).fingerprint,
        notes=[
            "WER on real recordings of the target domain. The oracle is the "
            "best scale on these recordings: a bound, not a result."
        ],
    ).save(path)


def draw(target, result, output, hparams):
    """Draw WER against one scale and against both, and the vectors' cosines."""
    surface, place = result["selection"], PLACES[hparams["choose_on"]]
    curve, selection = line(result["curve"]), line(surface)
    scales = {row: own["scale"] for row, own in result["scales"].items()}
    plot_scale_curve(
        {
            f"recordings of {words(target)}": curve,
            f"what the scale is chosen on ({place})": selection,
        },
        output / "plots" / f"scale_{target}.png",
        baseline=curve[0.0],
        chosen=(scales["edited"], curve[scales["edited"]]),
        oracle=(scales["oracle"], curve[scales["oracle"]]),
        title=f"{words(target)} left out",
    )
    if both := result["scales"].get("two_scales"):
        plot_scale_surface(
            surface,
            output / "plots" / f"two_scales_{target}.png",
            baseline=(1.0, 0.0),
            chosen=(both["target_scale"], both["scale"]),
            title=f"{words(target)} left out: WER on {place}",
        )
    vectors = result["material"].differences(DIFFERENCE)
    if len(vectors) > 1:
        plot_cosine_matrix(
            cosine_matrix(list(vectors.values())),
            list(vectors),
            output / "plots" / f"cosines_without_{target}.png",
            title=f"Cosines of the vectors, {words(target)} left out",
        )
    write_csv(
        output / "scales" / f"{target}.csv",
        ["scale", "wer", "wer_chosen_on"],
        [[scale, wer, selection[scale]] for scale, wer in curve.items()],
    )
    write_csv(
        output / "scales" / f"{target}_two_scales.csv",
        ["target_scale", "scale", "wer_chosen_on"],
        [[*point, wer] for point, wer in surface.items()],
    )


def write_csv(path, header, rows):
    """Write a table of figures, whole or not at all."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([header, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as stream:
        stream.write(text.getvalue())


def summarise(results, output, hparams):
    """Make the tables of one seed."""
    summary = Summary(output, title=TITLE)
    run = {"split": hparams["report_on"], "seed": hparams["seed"]}
    rows = {target: result["rows"] for target, result in results.items()}
    unheard = {t: r["unheard"][0] for t, r in results.items() if r["unheard"]}
    add_rows(summary, TABLE, rows, unheard, hparams)
    if unheard:
        add_rows(summary, UNHEARD, unheard, {}, hparams)
    for target, result in results.items():
        for row, scales in result["scales"].items():
            if row not in result["rows"]:
                continue
            for name, value in scales.items():
                summary.add(
                    table=f"{TABLE}_domains",
                    row=f"{target}: {row}",
                    metric=name,
                    value=value,
                    unit="1",
                    selected_on=chosen_on(row, hparams),
                    **run,
                )
    for note in notes(summary, results, hparams):
        summary.note(note)
    against = ("baseline", *CONTROLS)
    add_paired_tests(
        summary,
        TABLE,
        {
            row: sum(result["reports"][row] for result in results.values())
            for row in next(iter(results.values()))["reports"]
        },
        [(rival, edit) for edit in EDITS for rival in (*against, "edited")],
        **run,
    )
    return summary


def chosen_on(row, hparams):
    """Return what a row's scales were chosen on, or None."""
    if row == "oracle":
        return "real_target"
    return CHOSEN_ON[hparams["choose_on"]] if row in SEARCHES else None


def add_rows(summary, table, by_target, unheard, hparams):
    """Add the errors of all rows, as means and for each left-out domain.

    Of a table about all speakers, `unheard` has the same rows on a speaker
    that no model has heard; its WER stands beside.
    """
    for row in hparams["rows"]:
        errors = {}
        for target, rows in by_target.items():
            errors[target] = found = dict(rows[row])
            if row != "pretrained":
                found["relative_reduction"] = relative_reduction(
                    before=rows["baseline"]["wer"], after=found["wer"]
                )
            if unheard:
                found["unheard_speaker"] = unheard[target][row]["wer"]
        common = {
            "unit": "%",
            "split": hparams["report_on"],
            "seed": hparams["seed"],
            "selected_on": chosen_on(row, hparams),
        }
        # The edit is the mean of several sources' vectors: it has both names.
        for name in ("edited", "ensemble") if row == "edited" else (row,):
            for metric in next(iter(errors.values())):
                summary.add(
                    table=table,
                    row=name,
                    metric=metric,
                    value=statistics.fmean(e[metric] for e in errors.values()),
                    **common,
                )
        for target, found in errors.items():
            for metric, value in found.items():
                summary.add(
                    table=f"{table}_domains",
                    row=f"{target}: {row}",
                    metric=metric,
                    value=value,
                    **common,
                )


def notes(summary, results, hparams):
    """Explain the tables, and say which row is ahead."""
    yield NOTE
    rows = [
        f"- `{row}`: {MEANINGS[row].format(**hparams)}."
        for row in hparams["rows"]
    ]
    yield "\n".join(rows)
    yield (
        "Scales are chosen on development strings: "
        f"{RULES[hparams['choose_on']]}."
    )
    if hparams["speaker"]:
        yield (
            f"`unheard_speaker`, seed {hparams['seed']}: the WER on strings "
            f"of {hparams['speaker']} alone, whom no model of that column has "
            "heard; all rows were trained and chosen once more without this "
            "speaker (the bounds, too)."
        )
    yield verdict(summary, hparams)
    yield WHEN
    worst = max(result["proof"] for result in results.values())
    yield (
        "A source domain's vector applied to its own synthetic model gives "
        f"its real model back; largest difference of a weight: {worst:.1e}."
    )


def verdict(summary, hparams):
    """Say whether a control is ahead of the edits, with own words beside."""
    run = {"split": hparams["report_on"], "seed": hparams["seed"]}

    def wer(row):
        return summary.value(TABLE, row, "wer", **run)

    def shown(row):
        own = summary.value(TABLE, row, "own_words", **run)
        return f"`{row}` {wer(row):.1f} % WER, {own:.1f} % of own words wrong"

    controls = [row for row in CONTROLS if row in hparams["rows"]]
    edits = [row for row in EDITS if row in hparams["rows"]]
    compared = ["baseline", *edits]
    ahead = "no control was measured"
    if controls:
        best = min(controls, key=wer)
        compared.insert(1, best)
        ahead = "no control has a lower WER than the best edit"
        if wer(best) < min(map(wer, edits)):
            ahead = f"the control `{best}` has a lower WER than every edit"
    return (
        f"Seed {hparams['seed']}: {ahead}. {'; '.join(map(shown, compared))}."
    )
