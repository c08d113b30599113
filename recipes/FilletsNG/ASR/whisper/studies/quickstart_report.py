"""The two tables of the quickstart, and what their rows mean."""

import statistics

from common.study import relative_reduction

from speechbrain_taskarith.metrics import Summary
from studies.quickstart_rows import SCALE, SHRINK

SYN2REAL, SEQUENCE = "syn2real", "sequential_editing"


def write_report(
    output, order, targets, sequence, *, model, seed, lines, longest
):
    """Write `results.md` with both tables, and print them."""
    summary = Summary(output, title=f"Quickstart with {model}")
    add_syn2real(summary, targets, seed)
    add_sequence(summary, sequence, seed)
    first, second = order
    summary.note(
        f"{' and '.join(f'{n} lines of {name}' for name, n in lines.items())} "
        f"to learn from, none longer than {longest:g} s; one seed. A difference of a point or two may be "
        "chance: the studies in recipes/FilletsNG/ASR/whisper have more lines, "
        "seeds and confidence intervals. WER by Whisper's text normaliser."
    )
    summary.note(
        f"`{SYN2REAL}`: each domain takes the target's place, of which only "
        "synthetic speech is heard (espeak-ng); the other one is the source, "
        "with both. `baseline`: trained on synthetic target speech. "
        f"`shrunk`: {SHRINK} of what that added to the model. `edited`: all "
        f"of it, plus {SCALE} of what recordings added beyond synthetic "
        "speech in the source (SYN2REAL). Controls with the same inputs: "
        "`real_source`, trained on the source's recordings; "
        "`mean_of_baseline_and_real`, the mean of both models; `joint`, "
        "trained on the data of both together, for the sum of their steps. "
        "`real_target`: "
        "trained on the target's recordings, the upper bound. Nothing is "
        f"chosen: {SCALE} is near the papers' scale and {SHRINK} one half, "
        "fixed beforehand. With two domains there is none left to choose "
        "scales on; syn2real.py chooses them with a third."
    )
    for target, (rows, grid) in targets.items():
        (b, a), best = min(grid.items(), key=lambda item: item[1])
        summary.note(
            f"Target {target}: the best of {len(grid)} pairs of scales, seen "
            f"on the test lines, which nobody may choose: {b:g} of synthetic "
            f"target and {a:g} of the difference, WER {best:.1f} % (baseline "
            f"{rows['baseline']:.1f} %)."
        )
    summary.note(
        f"`{SEQUENCE}`: recordings of {first}, then of {second}, without old "
        f"data. `pretrained`: the model as it is. `fine_tuning`: one after "
        "the other. `task_arithmetic` (scale 0.4) and `ties` (scale 0.6, "
        "density 0.5): what each training added, scaled, the papers' values. "
        "Rivals: `averaging`, the mean of before and after; `separately`, the "
        "mean of two models trained from the same start. `average_wer`: over "
        f"both domains at the end; `bwt`: change of {first} while {second} "
        "was learned (negative: forgetting); `werr`: relative reduction of "
        "the average WER against `fine_tuning`."
    )
    summary.write()
    summary.print()


def add_syn2real(summary, targets, seed):
    """Add the rows of SYN2REAL, one column for each target."""
    common = {"table": SYN2REAL, "seed": seed}
    baseline = {
        target: rows["baseline"] for target, (rows, _) in targets.items()
    }
    for row in next(iter(targets.values()))[0]:
        found = {target: rows[row] for target, (rows, _) in targets.items()}
        for target, value in found.items():
            summary.add(
                row=row, metric=f"wer_{target}", value=value, unit="%", **common
            )
        summary.add(
            row=row,
            metric="wer",
            value=statistics.fmean(found.values()),
            **common,
        )
        reductions = [
            relative_reduction(before=baseline[t], after=found[t])
            for t in found
        ]
        summary.add(
            row=row,
            metric="relative_reduction",
            value=statistics.fmean(reductions),
            **common,
        )


def add_sequence(summary, sequence, seed):
    """Add the rows of sequential editing, one column for each domain."""
    common = {"table": SEQUENCE, "seed": seed}
    baseline = sequence["fine_tuning"]
    for row, matrix in sequence.items():
        last = matrix.domains[-1]
        for domain in matrix.domains:
            summary.add(
                row=row,
                metric=f"wer_{domain}",
                value=matrix[last, domain],
                unit="%",
                **common,
            )
        for metric, value in matrix.measures(baseline).items():
            summary.add(row=row, metric=metric, value=value, **common)
