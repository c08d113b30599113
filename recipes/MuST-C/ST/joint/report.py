#!/usr/bin/env python3
"""The result of a stage: its row of the table, translations and plots.

One table over the seeds of a stage, whose output folders are in a folder:
> python report.py results/joint/de
"""

import sys
from pathlib import Path

from speechbrain_taskarith.metrics import Summary, merge_seeds
from speechbrain_taskarith.utils.files import atomic_write

TABLE = "must_c_joint"
TITLE = "Speech translation with auxiliary tasks on MuST-C"


def plot_consistency(hparams):
    """Plot the gradient consistency of each pair of tasks."""
    probe, plots = hparams["consistency"], Path(hparams["output_folder"])
    for first, second in sorted({tuple(row[2:4]) for row in probe.rows}):
        name = f"consistency_{first}_{second}.png"
        probe.plot(plots / "plots" / name, (first, second))


def write_report(brain, row, hparams):
    """Write the row of a tested stage, and print it."""
    output = Path(hparams["output_folder"])
    lines = zip(brain.ids, brain.references, brain.hypotheses)
    with atomic_write(output / "translations.txt", "w") as stream:
        for ID, reference, hypothesis in sorted(lines):
            stream.write(f"{ID}\n  {reference}\n  {hypothesis}\n")
    summary = Summary(output, title=TITLE)
    scores = brain.scores
    values = [
        ("bleu", scores.bleu, "points"),
        ("chrf", scores.chrf, "points"),
        ("length_ratio", scores.length_ratio, "1"),
    ]
    if "CTC_WER" in brain.stats:
        values.append(("ctc_wer", brain.stats["CTC_WER"], "%"))
        values.append(("ctc_cer", brain.stats["CTC_CER"], "%"))
    summary.note(f"BLEU: `{scores.bleu_signature}`.")
    summary.note(f"chrF: `{scores.chrf_signature}`.")
    for metric, value, unit in values:
        summary.add(
            table=TABLE,
            row=f"{row}, {hparams['language']}",
            metric=metric,
            value=value,
            unit=unit,
            seed=hparams["seed"],
            selected_on="valid",
        )
    summary.write()
    summary.print()


if __name__ == "__main__":
    merge_seeds(sys.argv[1], title=TITLE)
