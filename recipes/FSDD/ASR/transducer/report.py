"""Tables and plot of the study, and its best recogniser."""

import io
import json
import re
from pathlib import Path

import torch
from common.dataio import audio_cache
from common.digits import DigitStringLoader
from common.study import relative_reduction
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import write_audio
from speechbrain_taskarith.metrics import RareWords, Summary
from speechbrain_taskarith.metrics.plots import (
    COLOURS,
    figure,
    legend_below,
    words,
)
from speechbrain_taskarith.utils.files import atomic_write, read_json
from speechbrain_taskarith.vectors import AtomicCheckpointer

logger = get_logger(__name__)

TABLE = "transducer"
TITLE = "Transfer learning of streaming transducers on strings of digits"
BASELINE = "scratch"
BEST = "transfer_min_wer"
DESCRIPTION = Path(__file__).parent / "hparams/models/transcriber.yaml"
NOTE = (
    "WER of the beam search on {strings} {split} strings of real recordings, "
    "after training on {minutes:g} minutes of recordings. Rare words, by the "
    "training transcripts: {rare}. Substitutions and deletions count for "
    "their reference word; `insertions` are counted apart, in % of all words. "
    "`relative_reduction`: of the WER, against `scratch`; "
    "`reduction_over_rnnt`: against as many more steps of the transducer "
    "loss, with the same strings, masks and learning rates, from the same "
    "start. `full_context` is `transfer` without streaming: one segment "
    "holds the whole string."
)


def write_report(trainings, strings, study, hparams):
    """Write tables, plot and recogniser, and print the tables.

    `trainings`: `{name: training}`, `strings`: `{split: strings}`.
    """
    split, output = hparams["report_on"], study.folder
    if split != "test":
        output = output / split
    rare = RareWords.from_transcripts(
        [string["wrd"] for string in strings["train"]], hparams["coverage"]
    )
    summary = Summary(output, title=TITLE)
    summary.note(
        NOTE.format(
            strings=len(strings[split]),
            split=split,
            minutes=hparams["train_minutes"],
            rare=", ".join(w for w in hparams["vocabulary"] if w in rare)
            or "none",
        )
    )
    results = {
        name: read_json(study.models / name / f"{split}.json")
        for name, training in trainings.items()
        if training.options["stage"] != "pretraining"
    }
    reports = {
        name: rare.report(result["references"], result["hypotheses"])
        for name, result in results.items()
    }
    for name, report in reports.items():
        for metric, value in columns(name, reports).items():
            summary.add(
                table=TABLE,
                row=name,
                metric=metric,
                value=value,
                unit="%",
                split=split,
                seed=hparams["seed"],
            )
        logger.info(f"{name}: {report.wer:.2f} % ({report})")
    for name, result in results.items():
        if trainings[name].options["stage"] == "min_wer":
            add_statistics(summary, name, result["statistics"], hparams)
    plot_wer(reports, output / "plots" / "wer.png")
    transducer = load_transducer(study.models / BEST / "save", hparams)
    folder = study.folder / "transcriber"
    save_transcriber(transducer, folder)
    summary.note(stream_some(transducer, strings[split], folder, hparams))
    summary.write()
    summary.print()


def columns(name, reports):
    """Return the values of one row of the table, in %."""
    report = reports[name]
    values = {
        "wer": report.wer,
        "rare_wer": report.rare.wer,
        "non_rare_wer": report.frequent.wer,
        "insertions": report.insertion_rate,
        "relative_reduction": relative_reduction(
            before=reports[BASELINE].wer, after=report.wer
        ),
    }
    control = reports.get(name.removesuffix("_min_wer") + "_more_rnnt")
    if name.endswith("_min_wer") and control is not None:
        values["reduction_over_rnnt"] = relative_reduction(
            before=control.wer, after=report.wer
        )
    return values


def add_statistics(summary, row, statistics, hparams):
    """Add what the n-best lists were like while MinWER trained on them."""
    units = {"hypotheses": "per string"}
    for metric in ("with_gradient", "oracle_wer", "expected_wer", *units):
        summary.add(
            table="min_wer_statistics",
            row=row,
            metric=metric,
            value=statistics[metric],
            unit=units.get(metric, "%"),
            split="train",
            seed=hparams["seed"],
        )


def plot_wer(reports, path):
    """Plot the WER of all rows, on all and on rare words."""
    with figure(path, height=0.6 + 0.28 * len(reports)) as axes:
        names = list(reports)[::-1]
        places = range(len(names))
        for number, (shift, label, values) in enumerate(
            (
                (0.2, "all words", [reports[n].wer for n in names]),
                (-0.2, "rare words", [reports[n].rare.wer for n in names]),
            )
        ):
            axes.barh(
                [p + shift for p in places],
                values,
                0.38,
                color=COLOURS[number],
                label=label,
            )
        axes.set_yticks(list(places), map(words, names))
        axes.set(xlabel="WER (%)")
        legend_below(axes)


def load_transducer(folder, hparams):
    """Load a trained model into that of `hparams`, in evaluation mode."""
    transducer = hparams["transducer"]
    recoverables = {
        "model": transducer["model"],
        "normalizer": transducer["normalize"],
    }
    AtomicCheckpointer(folder, recoverables).recover_if_possible()
    transducer["transcriber"].eval()
    return transducer


def save_transcriber(transducer, folder):
    """Save the recogniser in the form that `taskarith transcribe` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    # The YAML of the model, with the sizes of this run.
    text = DESCRIPTION.read_text(encoding="utf-8")
    for key, value in transducer.items():
        if isinstance(value, (bool, int, float, list)):
            # Quoted: a label `1` is no number.
            line = f"{key}: {json.dumps(value, ensure_ascii=False)}"
            text = re.sub(
                rf"^{key}: [^!\n]*$",
                lambda _, line=line: line,
                text,
                flags=re.M,
            )
    with atomic_write(folder / "hyperparams.yaml", "w") as stream:
        stream.write(text)
    weights = io.BytesIO()
    torch.save(transducer["transcriber"].state_dict(), weights)
    with atomic_write(folder / "transcriber.ckpt", "wb") as stream:
        stream.write(weights.getvalue())


def stream_some(transducer, strings, folder, hparams):
    """Recognise strings as streams and as wholes; save one as `example.wav`.

    Returns a note for the results page.
    """
    transcriber = transducer["transcriber"]
    rate, count = transcriber.sample_rate, hparams["streamed_strings"]
    load_audio = DigitStringLoader(rate, cache=audio_cache(rate))
    same, seconds, spent = 0, 0.0, 0.0
    for number, string in enumerate(strings[:count]):
        wave = load_audio(string["wavs"], string["gaps"])
        if not number:
            write_audio(folder / "example.wav", wave, rate)
        stream = transcriber.stream()
        for samples in wave.split(rate // 10):
            stream.feed(samples, rate)
        final = stream.finish()
        same += final.text == transcriber.transcribe(wave)
        seconds += final.seconds
        spent += final.compute_seconds
    latency = transcriber.latency()["algorithmic"]
    logger.info(f"real-time factor of {BEST}: {spent / seconds:.3f}")
    return (
        f"Fed in pieces of 100 ms, {same} of {min(count, len(strings))} "
        f"strings come out of `{BEST}` as they do whole; latency by "
        f"construction {1000 * latency:.0f} ms."
    )
