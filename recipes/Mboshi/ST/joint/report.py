"""What a run of the recipe leaves behind: results by row, tables, plots."""

from pathlib import Path

from history import seconds_to
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.metrics import Summary
from speechbrain_taskarith.metrics.plots import MARKERS, figure, legend_beside
from speechbrain_taskarith.translation import plot_window_entropy
from speechbrain_taskarith.utils.files import (
    atomic_write,
    read_json,
    write_json,
)

logger = get_logger(__name__)

TABLE = "mboshi_joint"
TITLE = "Speech translation with auxiliary tasks on Mboshi-French"
BLEU = ("bleu", "BLEU", "points")
METRICS = (
    BLEU,
    ("chrf", "chrF", "points"),
    ("length_ratio", "length_ratio", "1"),
    ("ctc_wer", "CTC_WER", "%"),
)


def result_path(row, hparams):
    """Return where the result of a row is; it is there when the row is done.

    Arguments
    ---------
    row : str
        Its name.
    hparams : dict
        Of the recipe.

    Returns
    -------
    pathlib.Path
        A JSON file.
    """
    return results_folder(hparams) / "rows" / f"{row}.json"


def results_folder(hparams):
    """Return where tables and plots go: what is tuned on goes apart.

    Arguments
    ---------
    hparams : dict
        Of the recipe.

    Returns
    -------
    pathlib.Path
        The output folder, or `valid` in it.
    """
    folder = Path(hparams["output_folder"])
    return folder if hparams["report_on"] == "test" else folder / "valid"


def write_result(row, brain, history, weights, entropies, hparams):
    """Write result, translations and plots of one row.

    Arguments
    ---------
    row : str
        Its name.
    brain : ST
        After the test.
    history : dict
        `TrainingHistory.state()` at the end of training.
    weights : list of dict
        `TaskNormWeights.history` at the end of training.
    entropies : dict of str: dict of int: float
        Of `representation_entropy`.
    hparams : dict
        Of the row.
    """
    path = result_path(row, hparams)
    plots = results_folder(hparams) / "plots"
    lines = zip(brain.ids, brain.references, brain.hypotheses)
    with atomic_write(path.with_suffix(".txt"), "w") as stream:
        for ID, reference, hypothesis in sorted(lines):
            stream.write(f"{ID}\n  {reference}\n  {hypothesis}\n")
    if weights:
        plot_weights(weights, plots / f"task_weights_{row}.png", row)
    probe = hparams["consistency"]
    for one, other in sorted({(r[2], r[3]) for r in probe.rows}):
        name = f"consistency_{row}_{one}_{other}.png"
        probe.plot(plots / name, (one, other))
    if entropies:
        plot_window_entropy(entropies, plots / f"entropy_{row}.png")
    parameters = (p for p in hparams["model"].parameters() if p.requires_grad)
    # Last: where it stands, the row is done.
    write_json(
        path,
        {
            "scores": brain.stats,
            "bleu_signature": getattr(brain.scores, "bleu_signature", None),
            "chrf_signature": getattr(brain.scores, "chrf_signature", None),
            "parameters": sum(p.numel() for p in parameters),
            "left_out": hparams["guard"].counts,
            "task_weights": weights,
            "entropy": entropies,
            **history,
        },
    )


def write_report(hparams):
    """Write tables and plots of all rows that are done, and show the table.

    Arguments
    ---------
    hparams : dict
        Of the recipe.
    """
    done = {}
    for row in (*hparams["stages"], *hparams["rows"]):
        if result_path(row, hparams).exists():
            done[row] = read_json(result_path(row, hparams))
    output = results_folder(hparams)
    summary = Summary(output, title=TITLE)
    target = hparams["target_bleu"]
    for result in done.values():
        if result["bleu_signature"]:
            summary.note(f"BLEU: `{result['bleu_signature']}`.")
            summary.note(f"chrF: `{result['chrf_signature']}`.")
    summary.note(
        "Seconds: of training updates alone. Seconds to BLEU: until the end of "
        f"the first epoch with a greedy development BLEU of {target:g}; empty "
        "where it was never reached."
    )
    for row, result in done.items():
        for metric, value, unit in values_of(result, target):
            summary.add(
                table=TABLE,
                row=row,
                metric=metric,
                value=value,
                unit=unit,
                split=hparams["report_on"],
                seed=hparams["seed"],
                selected_on="valid",
            )
    plot_scores(done, output / "plots" / "bleu_against_time.png")
    summary.write()
    summary.print()


def values_of(result, target):
    """Yield the columns of one row.

    Arguments
    ---------
    result : dict
        As `write_result` wrote it.
    target : float
        Development BLEU that time is measured to.

    Yields
    ------
    tuple
        Metric, value and unit.
    """
    for metric, key, unit in METRICS:
        if key in result["scores"]:
            yield metric, result["scores"][key], unit
    for what in ("seconds", "cpu_seconds"):
        yield what, result[what], "s"
        reached = None
        if "BLEU" in result["scores"]:
            reached = seconds_to(result["epochs"], "BLEU", target, what)
        if reached is not None:
            yield f"{what}_to_bleu", reached, "s"
    yield "trained_parameters", result["parameters"], "parameters"


def plot_scores(done, path):
    """Draw development BLEU against seconds of training, a curve for a row.

    Arguments
    ---------
    done : dict of str: dict
        Results by row.
    path : pathlib.Path
        `.png`.
    """
    curves = {n: r for n, r in done.items() if "BLEU" in r["scores"]}
    with figure(path, width=8) as axes:
        for number, (row, result) in enumerate(curves.items()):
            axes.plot(
                [epoch["seconds"] / 60 for epoch in result["epochs"]],
                [epoch["BLEU"] for epoch in result["epochs"]],
                marker=MARKERS[number % len(MARKERS)],
                markersize=3,
                label=row,
                color=f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
            )
        axes.set_xlabel("minutes of training")
        axes.set_ylabel("BLEU, development data")
        legend_beside(axes)


def plot_weights(weights, path, row):
    """Draw the weights of the auxiliary tasks over updates.

    Arguments
    ---------
    weights : list of dict
        `TaskNormWeights.history`.
    path : pathlib.Path
        `.png`.
    row : str
        For the title.
    """
    with figure(path) as axes:
        updates = [0, *(entry["update"] for entry in weights)]
        for number, task in enumerate(weights[0]["weights"]):
            values = [1.0, *(entry["weights"][task] for entry in weights)]
            axes.step(
                updates,
                values,
                where="post",
                label=task,
                marker=MARKERS[number % len(MARKERS)],
                markersize=3,
            )
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("update")
        axes.set_ylabel("task weight")
        axes.set_title(row)
        legend_beside(axes)
