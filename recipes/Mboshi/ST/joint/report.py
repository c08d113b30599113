"""Results: scores, translations and plots of a training, the study's table."""

import csv
import re
from pathlib import Path

import torch
from history import seconds_to
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_taskarith.brains.ctc import bare
from speechbrain_taskarith.metrics import (
    Summary,
    bleu_tokenizer,
    compare_translations,
    merge_seeds,
    translation_scores,
)
from speechbrain_taskarith.metrics.plots import (
    draw_line,
    figure,
    label_axes,
    legend_below,
    plot_by_row,
    words,
)
from speechbrain_taskarith.translation import (
    plot_task_weights,
    plot_window_entropy,
    window_entropy,
    write_task_weights,
)
from speechbrain_taskarith.utils.files import (
    atomic_write,
    read_json,
    write_json,
)

TABLE = "joint"
TITLE = "Speech translation with auxiliary tasks"
METRICS = (
    ("bleu", "BLEU", "points"),
    ("chrf", "chrF", "points"),
    ("length_ratio", "length_ratio", "1"),
    ("ctc_wer", "CTC_WER", "%"),
    ("ctc_cer", "CTC_CER", "%"),
)
# The rows that others are tested against: the first of them all, the others
# (its weights as released; without auxiliary tasks, but with labels as text)
# those that do not leave out a part of it
METHODS = ("whole", "released_rule", "with_labels")
JOINT = "st_mt_asr_local"  # the row whose time and score others are held to
TEXT_ROWS = ("mt", "mt_local")
WHISPER = "whisper"  # what it translates itself, by whisper_translates.py
# Rows drawn against time: not those of `whole` without a part.
CURVES = (
    *("st", "st_from_mt_local", "st_mt_asr", "st_mt_asr_local"),
    *("no_shrink_no_task_weights", *METHODS),
)
# Rows without a part of the method
RIVALS = (WHISPER, "st", "st_from_mt_local", "cascade", "cascade_tuned")
RIVALS += ("st_mt_asr_local", *METHODS)
NAMES = {
    "st_asr": "ST + ASR",
    "st_mt": "ST + MT",
    "st_mt_asr": "ST + MT + ASR",
    "st_mt_asr_local": "ST + MT + ASR, local to global",
    "st_from_mt_local": "ST from MT, local to global",
    "mt_local": "MT, local to global",
    "no_tasks": "no auxiliary tasks",
    "released_rule": "whole method, released weights",
    "no_shrink_no_task_weights": "no shrink, no task weights",
    "with_labels": "no auxiliary tasks, labels as text",
    WHISPER: "Whisper itself",
    "cascade_tuned": "cascade, tuned",
    METHODS[0]: "whole method",
}


def results_folder(hparams):
    """Return the folder of tables and plots, `valid` apart from `test`."""
    folder = Path(hparams["study_folder"])
    return folder if hparams["report_on"] == "test" else folder / "valid"


def result_path(row, hparams):
    """Return the JSON file of a row's result."""
    return results_folder(hparams) / "rows" / f"{row}.json"


@torch.no_grad()
def representation_entropy(brain, data, windows, utterances):
    """Measure the entropy of windows of speech and of text, after the test.

    Returns `{representation: {vectors in a window: nats}}`: the `frames` of
    the acoustic encoder, `shrunk` frames, and `text` if the model learns from
    it. Empty if the model does not translate speech.
    """
    if brain.hparams.main != "st":
        return {}
    # They are sorted by length: utterances of every length.
    step = -(-len(data) // utterances)
    chosen = [data[i] for i in range(0, len(data), step)]
    batch = PaddedBatch(chosen).to(brain.device)
    model = bare(brain.modules.model).eval()
    x, lens = brain.features(batch)
    speech = model.encode_speech(x, lens, batch.id)
    frames = model.acoustic(x, lens)
    if isinstance(frames, tuple):  # and their lengths
        frames = frames[0]
    found = {"frames": (frames, speech.frame_lens)}
    if model.shrink is not None:
        found["shrunk"] = (speech.embedded, speech.lens)
    if "mt" in brain.hparams.tasks:
        text = model.encode_text(*batch.source)
        found["text"] = (text.embedded, text.lens)
    return {
        name: window_entropy(vectors.float(), lens, windows)
        for name, (vectors, lens) in found.items()
    }


def plot_consistency(hparams):
    """Plot the gradient consistency of each pair of tasks."""
    probe, plots = hparams["consistency"], results_folder(hparams) / "plots"
    for first, second in sorted({(r[2], r[3]) for r in probe.rows}):
        name = f"consistency_{hparams['row']}_{first}_{second}.png"
        probe.plot(plots / name, (first, second))


def write_result(brain, history, task_weights, entropies, hparams):
    """Write scores, translations and plots of a tested model.

    `history` is `TrainingHistory.state()` and the number of updates,
    `task_weights` is `TaskNormWeights.history`, all at the end of training.
    """
    row = hparams["row"]
    path = result_path(row, hparams)
    plots = results_folder(hparams) / "plots"
    lines = sorted(zip(brain.ids, brain.references, brain.hypotheses))
    with atomic_write(path.with_suffix(".txt"), "w") as stream:
        for ID, reference, hypothesis in lines:
            stream.write(f"{ID}\n  {reference}\n  {hypothesis}\n")
    if task_weights:
        name = f"task_weights_{row}"
        title = row_name(row)
        plot_task_weights(task_weights, plots / f"{name}.png", title)
        write_task_weights(task_weights, plots / f"{name}.csv")
    if entropies:
        plot_window_entropy(entropies, plots / f"entropy_{row}.png")
    parameters = (p for p in hparams["model"].parameters() if p.requires_grad)
    # Last: it says that the row is done.
    write_json(
        path,
        {
            "scores": brain.stats,
            "translations": lines,
            "bleu_signature": getattr(brain.scores, "bleu_signature", None),
            "chrf_signature": getattr(brain.scores, "chrf_signature", None),
            "parameters": sum(p.numel() for p in parameters),
            "left_out": hparams["guard"].counts,
            "task_weights": task_weights,
            "entropy": entropies,
            **history,
        },
    )


def write_report(rows, hparams):
    """Write and print the table of all rows that are done."""
    paths = {row: result_path(row, hparams) for row in rows}
    done = {
        row: read_json(path) for row, path in paths.items() if path.exists()
    }
    output = results_folder(hparams)
    summary = Summary(output, title=TITLE)
    target = hparams["target_bleu"]
    for result in done.values():
        if result["bleu_signature"]:
            summary.note(f"BLEU: `{result['bleu_signature']}`.")
            summary.note(f"chrF: `{result['chrf_signature']}`.")
    by_target = len(hparams["targets"]) > 1
    summary.note(
        "Seconds: of training updates alone. Seconds to BLEU: until the end of "
        "the first epoch with a greedy BLEU on validation data of "
        f"{target:g}; empty if it was never reached. Shares: processor time "
        f"in % of that of `{JOINT}`, and until the end of the first epoch with "
        "its last greedy BLEU on validation data or more."
    )
    for row, result in done.items():
        found = list(columns(result, target))
        if JOINT in done and row not in (*TEXT_ROWS, "asr"):
            found += shares(result, done[JOINT])
        if by_target:
            found += target_columns(result["translations"], hparams["targets"])
        for metric, value, unit in found:
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
    tokenize = hparams["bleu_tokenize"]
    run = {"split": hparams["report_on"], "seed": hparams["seed"]}
    add_tests(summary, f"{TABLE}_paired", {0: done}, tokenize, **run)
    summary.note(
        f"`{TABLE}_paired`: points of the first row above the second, on the "
        "same utterances; 95 % interval and p-value by a paired bootstrap over "
        "utterances."
    )
    plot_scores(done, output / "plots")
    summary.write()
    summary.print()


def columns(result, target):
    """Yield metric, value and unit of a row's columns."""
    for metric, key, unit in METRICS:
        if key in result["scores"]:
            yield metric, result["scores"][key], unit
    for metric in ("seconds", "cpu_seconds"):
        yield metric, result[metric], "s"
        reached = None
        if "BLEU" in result["scores"]:
            reached = seconds_to(result["epochs"], "BLEU", target, metric)
        if reached is not None:
            yield f"{metric}_to_bleu", reached, "s"
    yield "updates", result["updates"], "1"
    yield "trained_parameters", result["parameters"], "parameters"


def shares(result, joint):
    """Yield a row's processor time in % of the joint model's.

    The whole of it, and that until the end of the first epoch that is as good
    as the joint model's last one.
    """
    whole, last = joint["cpu_seconds"], joint["epochs"][-1]["BLEU"]
    yield "cpu_share", 100 * result["cpu_seconds"] / whole, "%"
    equal = seconds_to(result["epochs"], "BLEU", last, "cpu_seconds")
    if equal is not None:
        yield "cpu_share_to_joint", 100 * equal / whole, "%"


def target_columns(translations, targets):
    """Yield BLEU and chrF of each target language of a row."""
    for target in targets:
        # Rows of several targets are named by them.
        own = [
            line[1:] for line in translations if line[0].endswith(f"-{target}")
        ]
        if own:
            scores = translation_scores(
                *zip(*own), tokenize=bleu_tokenizer(target)
            )
            yield f"bleu_{target}", scores.bleu, "points"
            yield f"chrf_{target}", scores.chrf, "points"


def add_tests(summary, table, seeds, tokenize, **run):
    """Add a table: are the whole methods better than the other rows?

    `seeds` is `{seed: {row: result}}`.
    """
    rows = dict.fromkeys(row for done in seeds.values() for row in done)
    for ours, row in tested_pairs(rows):
        for score, test in compare_rows(seeds, ours, row, tokenize).items():
            summary.add_paired_test(
                table,
                f"{ours} against {row}",
                test,
                prefix=f"{score.lower()}_",
                selected_on="valid",
                **run,
            )


def tested_pairs(rows):
    """Yield a whole method and a row that it is tested against."""
    for number, ours in enumerate(METHODS):
        for row in rows:
            # Text models translate transcripts, which is another task.
            own = row in TEXT_ROWS or row in METHODS[: number + 1]
            if ours in rows and not own and (number == 0 or row in RIVALS):
                yield ours, row


def compare_rows(seeds, ours, row, tokenize):
    """Compare two rows of `{seed: {row: result}}`, in seeds that have both.

    Where they translated other utterances a seed is left out. An utterance
    counts once for each seed, and is drawn with all of them.
    """
    lines = []
    for done in seeds.values():
        if ours in done and row in done:
            theirs = {t[0]: t[2] for t in done[row]["translations"]}
            own = done[ours]["translations"]
            if theirs.keys() != {line[0] for line in own}:
                continue
            lines += [
                (name, reference, theirs[name], translation)
                for name, reference, translation in own
            ]
    if not lines:
        return {}
    names, references, theirs, own = zip(*lines)
    return compare_translations(
        references, theirs, own, tokenize=tokenize, blocks=names
    )


def merge(folder):
    """Write and print one table of the seeds in a folder."""
    summary = merge_seeds(folder, title=TITLE, only=[])
    seeds, tokenize = {}, "13a"
    for path in sorted(Path(folder).glob("*/rows/*.json")):
        result = read_json(path)
        seeds.setdefault(path.parents[1].name, {})[path.stem] = result
        if result["bleu_signature"]:
            tokenize = re.search(r"tok:([^|]+)", result["bleu_signature"])[1]
    add_tests(summary, f"{TABLE}_pooled", seeds, tokenize)
    summary.note(
        f"`{TABLE}_pooled`: the same on the utterances of all seeds together; "
        "an utterance is drawn with all its translations."
    )
    summary.write()
    summary.print()


def row_name(row):
    """Return how plots name a row."""
    return NAMES.get(row, words(row))


def plot_scores(done, folder):
    """Plot each row's BLEU, and how the rows of whole methods got there."""
    shown = {n: r for n, r in done.items() if "BLEU" in r["scores"]}
    if not shown:
        return
    plot_by_row(
        {"": {row_name(row): r["scores"]["BLEU"] for row, r in shown.items()}},
        folder / "bleu.png",
        before=row_name("st"),
        ours=[row_name(row) for row in METHODS],
        bounds=[row_name(row) for row in TEXT_ROWS],
        xlabel="BLEU (hatched: from transcripts)",
    )
    curves = {
        row: [(e["cpu_seconds"] / 60, e["BLEU"]) for e in shown[row]["epochs"]]
        for row in CURVES
        if row in shown
    }
    path = folder / "bleu_against_time.csv"
    with atomic_write(path, "w") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow(["row", "cpu_minutes", "bleu"])
        for row, points in curves.items():
            lines.writerows([row, f"{t:.3f}", f"{b:.2f}"] for t, b in points)
    with figure(path.with_suffix(".png")) as axes:
        for number, (row, points) in enumerate(curves.items()):
            minutes, scores = zip(*points) if points else ((), ())
            draw_line(axes, minutes, scores, number, row_name(row))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        label_axes(axes, "CPU minutes of training", "BLEU, validation", "")
        legend_below(axes)
