"""What study.py leaves behind: tables and plots."""

import statistics

from common.study import relative_reduction
from scoring import character_errors

from speechbrain_taskarith.metrics import (
    RareWords,
    Summary,
    plot_scale_curve,
    plot_scale_surface,
    wer,
)
from speechbrain_taskarith.metrics.plots import words

TABLE = "syn2real"
TITLE = "SYN2REAL on SLURP"
# Rows whose scales were chosen on real speech of the sources.
CHOSEN = ("support", "shrunk", "single", "edited", "edited_both")
NOTE = (
    "Means over the left-out scenarios, whose recordings are for testing "
    "alone. Write d, r and s for what synthetic target, real source and "
    "synthetic source speech added to the start. `baseline`: d. `edited`: "
    "d + a (r - s), the mean of all sources (the ensemble); `single`: one "
    "source, mean over draws; `paper_scale`: a = 0.25. `shrunk`: b d. "
    "`edited_both`: b d + a (r - s). `support`: d + a r. All scales were "
    "chosen where each source takes the target's place; `oracle` is the best "
    "a on the test recordings, which no one may choose. `real_source`: models "
    "of one source as they are, mean over sources; `mean_of_real_sources` and "
    "`mean_of_baseline_and_real`: means of weights. `mixed`: tuned on all "
    "speech of the sources; `mixed_then_synthetic`: from there on synthetic "
    "target speech at a tenth of the rate. `joint`: the sources' recordings "
    "and synthetic target speech together. `real_target`: recordings of the "
    "target, the upper bound. `own_words`: share of the words wrong that no "
    "text of a source holds. `new_speaker_...`: the same on speakers whom no "
    "source has heard."
)


def errors_of(found, about):
    """Count what one state made of the test recordings of a target.

    `found` is from `Measure`, `about` from `prepare_manifests`.
    """
    sets = {"": set(found["references"])}
    if about["new_speakers"]:
        sets["new_speaker_"] = about["new_speakers"]
    own = RareWords(dict.fromkeys(about["words"], 1), min_count=1)
    errors = {}
    for prefix, keys in sets.items():
        pair = [
            {k: t for k, t in found[side].items() if k in keys}
            for side in ("references", "hypotheses")
        ]
        errors[f"{prefix}wer"] = wer(*pair).wer
        errors[f"{prefix}cer"] = character_errors(*pair).wer
        report = own.report(*pair)
        if report.rare.words:
            errors[f"{prefix}own_words"] = report.rare.wer
    return errors


def mean(found):
    """Average dicts of numbers, over what all of them have."""
    keys = [k for k in found[0] if all(k in one for one in found)]
    return {key: statistics.fmean(one[key] for one in found) for key in keys}


def write_report(results, about, folder):
    """Write tables and plots; `results` is `{(seed, target): ...}`."""
    summary = Summary(folder, title=TITLE)
    for seed in sorted({seed for seed, _ in results}):
        by_row, by_count = {}, {}
        for target in [t for s, t in results if s == seed]:
            result, own = results[seed, target], about[seed][target]
            rows = {
                row: mean([errors_of(one, own) for one in members])
                for row, members in result["rows"].items()
            }
            before = rows["baseline"]["wer"]
            for row, found in rows.items():
                found["relative_reduction"] = relative_reduction(
                    before=before, after=found["wer"]
                )
                by_row.setdefault(row, []).append(found)
                add(summary, f"{TABLE}_scenarios", f"{target}: {row}", found,
                    seed, row)  # fmt: skip
            for count, members in result["sweep"].items():
                found = mean([errors_of(one, own) for one in members])
                found["relative_reduction"] = relative_reduction(
                    before=before, after=found["wer"]
                )
                by_count.setdefault(count, []).append(found)
            add_scales(summary, target, result, seed)
        for row, found in by_row.items():
            add(summary, TABLE, row, mean(found), seed, row)
        for count, found in by_count.items():
            add(summary, f"{TABLE}_sources", f"{count} sources", mean(found),
                seed, "edited")  # fmt: skip
    summary.note(NOTE)
    known = [own for by_target in about.values() for own in by_target.values()]
    if any(own["new_speakers"] is None for own in known):
        summary.note(
            "Who spoke is not known for all recordings (metadata.json is "
            "missing or not complete), so that there are no results for "
            "speakers whom no source has heard."
        )
    draw(results, folder)
    summary.write()
    summary.print(only=[TABLE])


def add(summary, table, name, metrics, seed, row):
    """Add a row of one seed."""
    chosen = "real_source" if row in CHOSEN else None
    if row == "oracle":
        chosen = "real_target"
    for metric, value in metrics.items():
        summary.add(
            table=table,
            row=name,
            metric=metric,
            value=value,
            unit="%",
            seed=seed,
            selected_on=chosen,
        )


def add_scales(summary, target, result, seed):
    """Add the scales that were chosen for a target, and the best one."""
    chosen = result["chosen"]
    scales = {
        "shrunk": (chosen["shrunk"], 0.0),
        "edited": (1.0, chosen["edited"]),
        "edited_both": chosen["both"],
        "support": (1.0, chosen["support"]),
        "oracle": (1.0, min(result["curve"], key=result["curve"].get)),
    }
    for row, (b, a) in scales.items():
        for metric, value in (("target_scale", b), ("scale", a)):
            summary.add(
                table=f"{TABLE}_scales",
                row=f"{target}: {row}",
                metric=metric,
                value=value,
                unit="1",
                seed=seed,
                selected_on="real_target" if row == "oracle" else "real_source",
            )


def draw(results, folder):
    """Draw WER against scale, and the surface that the scales come from."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for target in dict.fromkeys(target for _, target in results):
        own = [r for (_, t), r in results.items() if t == target]
        plot_scale_curve(
            {
                f"recordings of {words(target)} (test)": together(
                    r["curve"] for r in own
                ),
                "sources in its place (valid)": together(
                    {a: r["chosen"]["grid"][1.0, a] for a in r["curve"]}
                    for r in own
                ),
            },
            plots / f"scale_{target}.png",
            title=f"{words(target)} left out",
        )
        both = [r["chosen"]["both"] for r in own]
        plot_scale_surface(
            together(r["chosen"]["grid"] for r in own),
            plots / f"surface_{target}.png",
            baseline=(1.0, 0.0),
            chosen=max(set(both), key=both.count),
            title=f"{words(target)} left out: WER on the sources (valid)",
        )


def together(curves):
    """Return `{point: [value of each curve]}`."""
    curves = list(curves)
    return {point: [c[point] for c in curves] for point in curves[0]}
