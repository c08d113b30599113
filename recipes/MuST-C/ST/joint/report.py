"""What a stage leaves behind: its row of the table, translations, a plot."""

from pathlib import Path

from speechbrain_taskarith.metrics import Summary
from speechbrain_taskarith.utils.files import atomic_write

TABLE = "must_c_joint"
TITLE = "Speech translation with auxiliary tasks on MuST-C"


def write_report(brain, hparams):
    """Write and show the row of a stage.

    Arguments
    ---------
    brain : ST
        After the test.
    hparams : dict
        Of the recipe.
    """
    output = Path(hparams["output_folder"])
    lines = zip(brain.ids, brain.references, brain.hypotheses)
    with atomic_write(output / "translations.txt", "w") as stream:
        for ID, reference, hypothesis in sorted(lines):
            stream.write(f"{ID}\n  {reference}\n  {hypothesis}\n")
    probe = hparams["consistency"]
    for one, other in sorted({(row[2], row[3]) for row in probe.rows}):
        name = f"consistency_{one}_{other}.png"
        probe.plot(output / "plots" / name, (one, other))
    summary = Summary(output, title=TITLE)
    scores = brain.scores
    values = [
        ("bleu", scores.bleu, "points"),
        ("chrf", scores.chrf, "points"),
        ("length_ratio", scores.length_ratio, "1"),
    ]
    if "CTC_WER" in brain.stats:
        values.append(("ctc_wer", brain.stats["CTC_WER"], "%"))
    summary.note(f"BLEU: `{scores.bleu_signature}`.")
    summary.note(f"chrF: `{scores.chrf_signature}`.")
    for metric, value, unit in values:
        summary.add(
            table=TABLE,
            row=f"{hparams['row']}, {hparams['language']}",
            metric=metric,
            value=value,
            unit=unit,
            seed=hparams["seed"],
            selected_on="valid",
        )
    summary.write()
    summary.print()
