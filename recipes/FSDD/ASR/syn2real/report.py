"""What the study measures and leaves behind: tables, plots, edited models."""

import csv
import io
import statistics

from common.study import relative_reduction

from speechbrain_taskarith.metrics import Summary, plot_scale_curve
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.vectors import (
    ModelCard,
    cosine_matrix,
    open_state,
    plot_cosine_matrix,
    save_state,
)

TABLE = "syn2real"
TITLE = "SYN2REAL on strings of digits"
# What a scale is chosen on, by the value of `choose_on`.
CHOSEN_ON = {
    "sources_as_targets": "real_source",
    "edited_target": "real_source+synthetic_target",
}
# Rows of the tables, and what the scale of each was chosen on; CHOSEN stands
# for what `choose_on` says.
CHOSEN = "chosen"
ROWS = {
    "pretrained": None,
    "baseline": None,
    "joint": None,
    "edited": CHOSEN,
    "members": CHOSEN,
    "paper_scale": None,
    "oracle": "real_target",
}
RULES = {
    "sources_as_targets": "real ones of each source domain, decoded by its "
    "model of synthetic speech plus the other sources' vectors",
    "edited_target": "real ones of the source domains and synthetic ones of "
    "the target, decoded by the target's edited model",
}
NOTE = (
    "Means over the left-out domains. `relative_reduction`: mean of each "
    "domain's relative WER reduction against `baseline`, the model that knows "
    "its domain from synthetic speech only (scale 0). `joint`: tuned as "
    "often on the target's synthetic speech together with the real and "
    "synthetic speech of the other domains, no vector. `edited` is the "
    "`ensemble`, the mean of the source domains' vectors; `members`: one "
    "source domain's vector, mean over sources; all at the scale that was "
    "chosen on development strings: {rule}. `paper_scale`: the ensemble at {paper_scale}. "
    "`oracle`: the best scale on the very strings that are reported on, a "
    "bound that no one may choose. `own_words`, `shared_words`: share of the "
    "domain's own and of the shared words that came out wrong."
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
    parents = [ModelCard.parent("target, synthetic", result["base"])]
    for source, (real, synthetic) in result["pairs"].items():
        parents.append(ModelCard.parent(f"{source}, real", real))
        parents.append(ModelCard.parent(f"{source}, synthetic", synthetic))
    ModelCard(
        title=f"SYN2REAL, left out: {target}",
        parents=parents,
        scale=result["scale"],
        wer={
            row: result["rows"][row]["wer"]
            for row in ("baseline", "edited", "oracle")
        },
        selected_on=CHOSEN_ON[hparams["choose_on"]],
        fingerprint=open_state(path).fingerprint,
        notes=[
            "WER on real recordings of the target domain. The oracle is the "
            "best scale on these recordings: a bound, not a result."
        ],
    ).save(path)


def draw(target, result, output, hparams):
    """Draw WER against scale, and the cosines between the vectors."""
    curve = result["curve"]
    plot_scale_curve(
        {
            f"real {target} ({hparams['report_on']})": curve,
            f"chosen on: {CHOSEN_ON[hparams['choose_on']]}": result[
                "selection"
            ],
        },
        output / "plots" / f"scale_{target}.png",
        baseline=curve[0.0],
        chosen=(result["scale"], curve[result["scale"]]),
        oracle=(result["oracle_scale"], curve[result["oracle_scale"]]),
        title=f"WER against scale, {target} left out",
    )
    plot_cosine_matrix(
        cosine_matrix(list(result["vectors"].values())),
        list(result["vectors"]),
        output / "plots" / f"cosines_without_{target}.png",
        title=f"Cosines of the vectors, {target} left out",
    )
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["scale", "wer", "wer_chosen_on"])
    table.writerows(
        [scale, wer, result["selection"][scale]] for scale, wer in curve.items()
    )
    (output / "scales").mkdir(parents=True, exist_ok=True)
    with atomic_write(output / "scales" / f"{target}.csv", "w") as stream:
        stream.write(text.getvalue())


def summarise(results, output, hparams):
    """Make the tables of one seed."""
    summary = Summary(output, title=TITLE)
    run = {"split": hparams["report_on"], "seed": hparams["seed"]}
    chosen_on = {
        row: CHOSEN_ON[hparams["choose_on"]] if on is CHOSEN else on
        for row, on in ROWS.items()
    }
    for row, chosen in chosen_on.items():
        errors = {t: result["rows"][row] for t, result in results.items()}
        if row != "pretrained":
            errors = {
                target: {
                    **found,
                    "relative_reduction": relative_reduction(
                        before=results[target]["rows"]["baseline"]["wer"],
                        after=found["wer"],
                    ),
                }
                for target, found in errors.items()
            }
        common = {**run, "unit": "%", "selected_on": chosen}
        # The edit is the mean of several sources' vectors: it has both names.
        for name in ("edited", "ensemble") if row == "edited" else (row,):
            for metric in next(iter(errors.values())):
                summary.add(
                    table=TABLE,
                    row=name,
                    metric=metric,
                    value=statistics.fmean(e[metric] for e in errors.values()),
                    **common,
                )
        for target, found in errors.items():
            for metric, value in found.items():
                summary.add(
                    table=f"{TABLE}_domains",
                    row=f"{target}: {row}",
                    metric=metric,
                    value=value,
                    **common,
                )
    for target, result in results.items():
        for row, key in (("edited", "scale"), ("oracle", "oracle_scale")):
            summary.add(
                table=f"{TABLE}_domains",
                row=f"{target}: {row}",
                metric="scale",
                value=result[key],
                selected_on=chosen_on[row],
                **run,
            )
    summary.note(
        NOTE.format(
            paper_scale=hparams["paper_scale"],
            rule=RULES[hparams["choose_on"]],
        )
    )
    worst = max(result["proof"] for result in results.values())
    summary.note(
        "A source domain's vector applied to its own synthetic model gives "
        f"its real model back; largest difference of a weight: {worst:.1e}."
    )
    return summary
