"""`taskarith transcribe`: recordings to text, whole or as a stream."""

import sys
import time

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import (
    Result,
    about_recording,
    complain,
    message,
    texts,
)

_EXAMPLES = """\
  taskarith transcribe --model results/model speech.wav
  taskarith transcribe --model results/model --stream speech.wav
  taskarith transcribe --model results/model --stream --chunk 0.1 *.wav --json
"""


def add_parser(verbs, summary):
    """Add the verb's parser."""
    about = (
        "Recognise recordings with a streaming transducer; with --stream as if "
        "they were spoken now, with partial text and latency."
    )
    parser = shared.add_verb(
        verbs, "transcribe", summary, _EXAMPLES, run, about=about
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="AUDIO")
    add(
        "--model",
        required=True,
        metavar="FOLDER",
        help="folder with hyperparams.yaml (its key `transcriber`) and "
        "transcriber.ckpt",
    )
    add(
        "--stream",
        action="store_true",
        help="feed chunks, show partial text on standard error",
    )
    add(
        "--chunk",
        type=float,
        default=0.16,
        metavar="SECONDS",
        help="length of a chunk of samples (0.16)",
    )
    add(
        "--resample",
        action="store_true",
        help="convert recordings of another sample rate",
    )
    add("--device", default="cpu", help="e.g. cuda:0 (cpu)")
    add(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads (1: a step of a stream is too small for more)",
    )


def run(options):
    """Recognise, and measure the latency of a stream."""
    if not 0 < options.chunk < float("inf"):
        raise ValueError(
            f"--chunk {options.chunk:g}: expected seconds, above 0"
        )
    from speechbrain_taskarith.transducer.streaming.folder import (
        load_transcriber,
    )

    with shared.threads(options):
        model = load_transcriber(options.model, options.device)
        data, bad = [], 0
        for path in options.files:
            try:
                data.append(_recognised(model, path, options))
            except (ValueError, OSError, RuntimeError) as error:
                text = message(about_recording(error, path), options.remedies)
                bad += 1
                if bad == len(options.files):
                    raise ValueError(text) from error
                # The texts that there are must not be lost.
                complain(text)
                data.append({"file": path, "error": text})
    found = [one for one in data if "text" in one]
    lines = texts(data)
    result = {"verb": "transcribe", "model": options.model, "files": data}
    if options.stream:
        result["latency"] = model.latency()
        # Halves go up: sums of floats end above or below them, by version.
        ms = {k: int(1000 * s + 0.501) for k, s in result["latency"].items()}
        spent = sum(one["seconds"] * one["real_time_factor"] for one in found)
        seconds = sum(one["seconds"] for one in found)
        lines.append(
            f"latency {ms['algorithmic']} ms by construction (segment "
            f"{ms['segment']}, look-ahead {ms['look_ahead']}, features "
            f"{ms['features']}); real-time factor {spent / seconds:.3f}"
        )
    return Result(lines, result, status=1 if bad else 0)


def _recognised(model, path, options):
    from speechbrain_taskarith.data import read_audio

    wave = read_audio(path, model.sample_rate, options.resample)
    began = time.perf_counter()
    found = {"file": path, "seconds": len(wave) / model.sample_rate}
    if options.stream:
        found.update(_streamed(model, wave, options))
    else:
        found["text"] = model.transcribe(wave.to(options.device))
    took = time.perf_counter() - began
    return {**found, "real_time_factor": took / found["seconds"]}


def _streamed(model, wave, options):
    stream, partial = model.stream(), []
    size = max(1, round(options.chunk * model.sample_rate))
    for samples in wave.split(size):
        now = stream.feed(samples, model.sample_rate)
        if now.text != (partial[-1]["text"] if partial else ""):
            partial.append({"seconds": now.seconds, "text": now.text})
            if not options.json and not options.no_progress:
                print(f"{now.seconds:7.2f} s  {now.text}", file=sys.stderr)
    final = stream.finish()
    return {"text": final.text, "partial": partial}
