"""What the study measures and leaves behind: tables, plot, a recogniser."""

import io
import re
from pathlib import Path

import torch
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import write_audio
from speechbrain_taskarith.metrics import RareWords, Summary
from speechbrain_taskarith.metrics.plots import figure
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.progress import progress

logger = get_logger(__name__)

TABLE = "transducer"
TITLE = "Transfer learning of streaming transducers on strings of digits"
BASELINE = "scratch"
BEST = "transfer_min_wer"
DESCRIPTION = Path(__file__).parent / "hparams/models/transcriber.yaml"
NOTE = (
    "WER of the beam search on {strings} {split} strings of real recordings; "
    "{minutes:g} minutes of recordings to train on. Rare words, by the "
    "training transcripts: {rare}. Substitutions and deletions belong to "
    "their reference word; `insertions` are apart, in % of all words. "
    "`relative_reduction`: of the WER, against `scratch`; "
    "`reduction_over_rnnt`: against as many further steps of the transducer "
    "loss, with the same strings, masks and learning rates, from the same "
    "start. `full_context` is `transfer` without streaming: one segment "
    "holds the whole string."
)


def write_report(models, plan, strings, hparams):
    """Measure, write tables, plot and recogniser, show the table.

    Arguments
    ---------
    models : StudyModels
        All models, trained.
    plan : list of Model
        What there is.
    strings : dict
        Sets of strings.
    hparams : dict
        Of the recipe.
    """
    split = hparams["report_on"]
    output = Path(hparams["output_folder"])
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
    english = [model for model in plan if model.part != "multilingual"]
    reports = {}
    for model in progress(english, desc="models measured"):
        brain = models.load(model)
        references, hypotheses = brain.transcripts(strings[split])
        reports[model.name] = rare.report(references, hypotheses)
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
    add_statistics(summary, english, models, hparams)
    draw(reports, output / "plots" / "wer.png")
    brain = models.load(next(m for m in english if m.name == BEST))
    folder = Path(hparams["output_folder"]) / "transcriber"
    keep_transcriber(brain, folder)
    summary.note(
        stream_some(brain, strings[split], hparams["streamed_strings"], folder)
    )
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
        "relative_reduction": reduction(report.wer, reports[BASELINE].wer),
    }
    control = reports.get(name.removesuffix("_min_wer") + "_more_rnnt")
    if name.endswith("_min_wer") and control is not None:
        values["reduction_over_rnnt"] = reduction(report.wer, control.wer)
    return values


def reduction(wer, before):
    """Return the relative reduction in %; 0 where there was no error."""
    return 100.0 * (before - wer) / before if before else 0.0


def add_statistics(summary, plan, models, hparams):
    """Add what the n-best lists were like while MinWER trained on them."""
    units = {"hypotheses": "per string"}
    for model in plan:
        if not model.min_wer:
            continue
        meta = models.meta(model.name)
        for metric in ("with_gradient", "oracle_wer", "expected_wer", *units):
            summary.add(
                table="min_wer_statistics",
                row=model.name,
                metric=metric,
                value=meta[metric],
                unit=units.get(metric, "%"),
                split="train",
                seed=hparams["seed"],
            )


def draw(reports, path):
    """Draw the WER of all rows, on all and on rare words.

    Arguments
    ---------
    reports : dict of str to RareWordReport
        By row.
    path : pathlib.Path
        The image.
    """
    with figure(path, width=7.2) as axes:
        names = list(reports)[::-1]
        places = range(len(names))
        for shift, label, values in (
            (0.2, "all words", [reports[n].wer for n in names]),
            (-0.2, "rare words", [reports[n].rare.wer for n in names]),
        ):
            axes.barh([p + shift for p in places], values, 0.4, label=label)
        axes.set_yticks(list(places), names)
        axes.set(xlabel="WER (%)")
        axes.legend(frameon=False)


def keep_transcriber(brain, folder):
    """Keep a recogniser in the form that `taskarith transcribe` reads.

    Arguments
    ---------
    brain : Transducer
        With the weights.
    folder : pathlib.Path
        Where it goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = DESCRIPTION.read_text(encoding="utf-8")
    for key, value in vars(brain.hparams).items():
        if isinstance(value, (bool, int, float, list)):
            shown = f"[{', '.join(value)}]" if key == "labels" else value
            text = re.sub(
                rf"^{key}: [^!\n]*$", f"{key}: {shown}", text, flags=re.M
            )
    with atomic_write(folder / "hyperparams.yaml", "w") as stream:
        stream.write(text)
    weights = io.BytesIO()
    torch.save(brain.hparams.transcriber.state_dict(), weights)
    with atomic_write(folder / "transcriber.ckpt", "wb") as stream:
        stream.write(weights.getvalue())


def stream_some(brain, strings, count, folder):
    """Recognise strings as streams and as wholes; keep one as a recording.

    Arguments
    ---------
    brain : Transducer
        With the weights.
    strings : list of dict
        Of recordings.
    count : int
        How many of them.
    folder : pathlib.Path
        For `example.wav`.

    Returns
    -------
    str
        What was found, for the results page.
    """
    transcriber = brain.hparams.transcriber.eval()
    rate = transcriber.sample_rate
    same, seconds, spent = 0, 0.0, 0.0
    for number, string in enumerate(strings[:count]):
        wave = brain.load_audio(string["wavs"], string["gaps"])
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
