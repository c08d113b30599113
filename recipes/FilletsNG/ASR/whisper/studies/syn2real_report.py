"""What syn2real.py leaves behind: tables, surfaces as CSV and as plots."""

import csv
import statistics

from common.study import relative_reduction
from scoring import character_errors

from speechbrain_taskarith.metrics import (
    Summary,
    confidence_interval,
    paired_bootstrap,
    plot_before_after,
    plot_scale_surface,
    wer,
)
from speechbrain_taskarith.utils.files import atomic_write

TABLE = "syn2real_languages"
TITLE = "SYN2REAL with Whisper, controls beside it"
# Rows whose scales were chosen on real speech of the source.
CHOSEN = {
    "support_language",
    "shrunk",
    "edited",
    "edited_both",
    "edited_both_encoder",
    "edited_both_decoder",
    "edited_by_part",
    "edited_three",
    "ensemble",
    "ensemble_both",
    "ensemble_ties",
    "ensemble_tsvm",
}
# What the picture of the effect shows, in its words.
SHOWN = {
    "baseline": "synthetic speech only",
    "shrunk": "its vector shrunk",
    "edited_both": "SYN2REAL, both scales",
    "joint": "joint training",
    "real_target": "real speech (bound)",
}
LANGUAGES = {"nl": "Dutch", "cs": "Czech", "en": "English"}
NOTE = (
    "Means over the targets: each is heard from a synthetic voice only, the "
    "sources (all other domains) from people too. Write d, r and s for what "
    "synthetic target, real source and synthetic source speech added to the "
    "base. `baseline`: d. `shrunk`: b d. `edited`: d + a (r - s). "
    "`edited_both`: b d + a (r - s), `_encoder` and `_decoder` with the "
    "difference in that part only, `edited_by_part` with a scale for either. "
    "`edited_three`: b d + a r - c s. `ensemble`: the mean of r - s over the "
    "sources and the helpers; `_ties`, `_tsvm`: as `ensemble_both`, what that "
    "rule makes of them. `paper_scale`: a = 0.25. `support_language`: "
    "d + a r. `mixed`: tuned on all speech of the sources; "
    "`mixed_then_synthetic`: from there on synthetic target speech, at a tenth "
    "of the rate, the paper's baseline; `mixed_edited`: the paper's form, that "
    "+ 0.25 (r - s). All scales were chosen where the sources take the target's "
    "place, and the helpers the sources'; `oracle` is the best point of the "
    "grid on the test lines, which no one may choose. `joint`: trained on the "
    "recordings of the sources and the synthetic target together, more steps. "
    "`real_target`: recordings of the target, the upper bound. `own_words`: "
    "errors in % of the words that no training text of sources and helpers "
    "holds."
)


def scores(found, known):
    """Return WER, CER and errors on own words of what was measured."""
    pairs = found["references"], found["hypotheses"]
    words = known.report(*pairs)
    return {
        "wer": words.wer,
        "cer": character_errors(*pairs).wer,
        "own_words": words.rare.wer,
    }


def write_report(results, folder):
    """Write all tables and plots; `results` is `{(seed, target): ...}`."""
    summary = Summary(folder, title=TITLE)
    seeds = sorted({seed for seed, _ in results})
    targets = list(dict.fromkeys(target for _, target in results))
    for seed in seeds:
        by_row = {}
        for target in targets:
            result = results[seed, target]
            rows = {
                row: scores(found, result["known"])
                for row, found in result["rows"].items()
            }
            point = min(result["surface"], key=result["surface"].get)
            rows["oracle"] = {"wer": result["surface"][point]}
            for row, found in rows.items():
                found["relative_reduction"] = relative_reduction(
                    before=rows["baseline"]["wer"], after=found["wer"]
                )
                by_row.setdefault(row, []).append(found)
                add(summary, f"{TABLE}_{target}", row, found, seed)
            add_choice(summary, f"{TABLE}_scales", target, result, seed)
        for row, found in by_row.items():
            means = {
                metric: statistics.fmean(f[metric] for f in found)
                for metric in found[0]
            }
            add(summary, TABLE, row, means, seed)
    summary.note(NOTE)
    for better, than in (
        ("edited_both", "baseline"),
        ("edited_both", "shrunk"),
        ("edited_both", "joint"),
        ("edited_both", "mean_of_baseline_and_real"),
        ("edited_three", "baseline"),
        ("edited_three", "shrunk"),
        ("edited_three", "mean_of_baseline_and_real"),
        ("mixed_edited", "mixed_then_synthetic"),
        ("edited", "baseline"),
        ("shrunk", "baseline"),
    ):
        if all({better, than} <= r["rows"].keys() for r in results.values()):
            summary.note(compare(results, better, than))
    summary.write()
    summary.print(only=[TABLE])
    for target in targets:
        draw(results, seeds, target, folder)
    plot_effect(results, seeds, targets, folder / "plots" / "effect.png")


def add(summary, table, row, metrics, seed):
    """Add a row of one seed."""
    chosen = "real_source" if row in CHOSEN else None
    if row == "oracle":
        chosen = "real_target"
    for metric, value in metrics.items():
        summary.add(
            table=table,
            row=row,
            metric=metric,
            value=value,
            unit="%",
            split="test",
            seed=seed,
            selected_on=chosen,
        )


def add_choice(summary, table, target, result, seed):
    """Add the scales that were chosen for a target, and the best ones."""
    chosen = result["chosen"]
    best = min(result["surface"], key=result["surface"].get)
    points = {
        "shrunk": chosen["shrunk"],
        "edited": chosen["edited"],
        "edited_both": chosen["both"],
        "edited_three": chosen["three"],
        "support_language": chosen["support"],
        "oracle": (*best, best[1]),
    }
    names = ("target_scale", "scale", "synthetic_scale")
    scales = {row: zip(names, point) for row, point in points.items()}
    parts = ("encoder_scale", "decoder_scale")
    scales["edited_by_part"] = zip(parts, chosen["parts"])
    for row, values in scales.items():
        for metric, value in values:
            summary.add(
                table=table,
                row=f"{target}: {row}",
                metric=metric,
                value=value,
                unit="1",
                split="test",
                seed=seed,
                selected_on="real_target" if row == "oracle" else "real_source",
            )


def compare(results, better, than):
    """Say how sure the difference of two rows is, over all lines and seeds."""
    sides = []
    for row in (than, better):
        sides.append(
            sum(
                wer(
                    name_lines(result["rows"][row]["references"], key),
                    name_lines(result["rows"][row]["hypotheses"], key),
                )
                for key, result in results.items()
            )
        )
    # An utterance counts once for each seed, all in one block.
    blocks = [u.id.partition("/")[2] for u in sides[0].utterances]
    found = paired_bootstrap(*sides, blocks=blocks)
    return (
        f"`{better}` against `{than}`: {found.difference:.1f} points lower "
        f"(95 % interval {found.low:.1f} to {found.high:.1f}, p = "
        f"{found.p_value:.3f}; utterances drawn in pairs, each with all its "
        "seeds, of all directions)."
    )


def name_lines(texts, key):
    """Give the lines of a seed and direction names of their own."""
    return {f"{key[0]}/{key[1]}/{line}": text for line, text in texts.items()}


def plot_effect(results, seeds, targets, path):
    """Draw WER before and after editing, on each target.

    Error bars: over the seeds; of one seed, 95 % of bootstrap samples of the
    test lines.
    """
    effect, intervals = {}, {}
    for target in targets:
        name = LANGUAGES.get(target, target)
        for row, label in SHOWN.items():
            reports = [
                wer(found["references"], found["hypotheses"])
                for seed in seeds
                if (found := results[seed, target]["rows"].get(row))
            ]
            if not reports:
                continue
            effect.setdefault(name, {})[label] = [r.wer for r in reports]
            if len(reports) == 1:
                low_high = confidence_interval(reports[0])
                intervals.setdefault(name, {})[label] = low_high
    if effect:
        plot_before_after(
            effect, path, intervals=intervals, bounds=[SHOWN["real_target"]]
        )


def draw(results, seeds, target, folder):
    """Draw the surface of both scales, mean over seeds, and write it."""
    surfaces = [results[seed, target]["surface"] for seed in seeds]
    means = {
        point: statistics.fmean(surface[point] for surface in surfaces)
        for point in surfaces[0]
    }
    both = [results[seed, target]["chosen"]["both"][:2] for seed in seeds]
    path = folder / "plots" / f"surface_{target}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_scale_surface(
        {point: [s[point] for s in surfaces] for point in means},
        path,
        baseline=(1.0, 0.0),
        chosen=max(set(both), key=both.count),
        oracle=min(means, key=means.get),
        title=f"{LANGUAGES.get(target, target)}, recordings of the test"
        f" ({len(seeds)} seed{'s' * (len(seeds) > 1)})",
    )
    with atomic_write(folder / f"surface_{target}.csv", "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["target_scale", "scale", "wer", *map(str, seeds)])
        for (b, a), mean in means.items():
            each = [surface[b, a] for surface in surfaces]
            writer.writerow([b, a, mean, *each])
