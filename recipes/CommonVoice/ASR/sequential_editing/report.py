"""What study.py leaves behind: the table, matrices, and CL-MASR's logs."""

import json
import shlex

from speechbrain_taskarith.metrics import (
    LifelongMatrix,
    Summary,
    write_cl_masr_log,
)
from speechbrain_taskarith.metrics.plots import words
from speechbrain_taskarith.utils.files import atomic_write

TABLE = "sequential_editing"
TITLE = "Sequential editing on accents of Common Voice"
BASELINE, JOINT, SINGLE = "fine_tuning", "joint", "single_task"
NOTE = (
    "Average WER over all accents at the end of the sequence {sequence}; BWT: "
    "mean change of earlier accents (negative: forgetting); WERR: relative "
    "reduction of the average WER against `fine_tuning`; FWT: against "
    "`single_task`, fine-tuning on each accent from the first one's model; "
    "IM: against `joint`, trained on all accents so far; both are means over "
    "the accents learned in sequence. `averaging_...` are rivals, not edits. "
    "`joint` trains on old recordings: a bound."
)


def write_report(results, accents, folder):
    """Write summary, matrices, plots and logs.

    `results` is `{seed: {row: LifelongMatrix}}`.
    """
    summary = Summary(folder, title=TITLE)
    summary.note(NOTE.format(sequence=" > ".join(accents)))
    logs = folder / "cl_masr_logs"
    references = {}
    for seed, matrices in results.items():
        joint, single = (
            {accent: matrices[row][accent, accent] for accent in accents[1:]}
            for row in (JOINT, SINGLE)
        )
        references[seed] = {"im": joint, "fwt": single}
        for name, matrix in matrices.items():
            path = folder / str(seed) / "matrices" / f"{name}.csv"
            matrix.save(path)
            if name == SINGLE:
                continue  # no sequence: only its diagonal means something
            values = matrix.measures(matrices[BASELINE]) | {
                "fwt": matrix.fwt(single, at="mean"),
                "im": matrix.im(joint, at="mean"),
            }
            for metric, value in values.items():
                summary.add(
                    table=TABLE,
                    row=name,
                    metric=metric,
                    value=value,
                    seed=seed,
                )
            write_cl_masr_log(matrix, logs, name, seed=seed)
    for name in results[next(iter(results))]:
        mean = LifelongMatrix.mean([m[name] for m in results.values()])
        mean.plot(
            folder / "plots" / f"wer_matrix_{name}.png",
            title=f"WER after each accent: {words(name)}",
        )
    write_command(references, accents, logs)
    summary.write()
    summary.print()


def write_command(references, accents, logs):
    """Write how CL-MASR's script is called: it wants references of its own."""
    means = {
        measure: {
            accent: round(
                sum(own[measure][accent] for own in references.values())
                / len(references),
                4,
            )
            for accent in accents[1:]
        }
        for measure in ("im", "fwt")
    }
    with atomic_write(logs / "analyze.sh", "w") as stream:
        stream.write(
            "# Of speechbrain/benchmarks, benchmarks/CL_MASR; run it here\n"
            "python analyze_logs.py ."
            f" --im_refs {shlex.quote(json.dumps(means['im']))}"
            f" --fwt_refs {shlex.quote(json.dumps(means['fwt']))}\n"
        )
