"""`taskarith transcribe`: recordings to text, whole or as a stream."""

import sys
import time

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.console import Result

_EXAMPLES = """\
  taskarith transcribe --model results/model speech.wav
  taskarith transcribe --model results/model --stream speech.wav
  taskarith transcribe --model results/model --stream --chunk 0.1 *.wav --json
"""


def add_parser(verbs):
    """Add the verb's parser.

    Arguments
    ---------
    verbs : argparse subparsers
        Where to.
    """
    parser = shared.add_verb(
        verbs,
        "transcribe",
        "Recognise recordings with a streaming transducer; with --stream as "
        "if they were spoken now, with partial text and latency.",
        _EXAMPLES,
        run,
    )
    parser.add_argument("files", nargs="+", metavar="AUDIO")
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="folder with hyperparams.yaml (its key `transcriber`) and "
        "transcriber.ckpt",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="feed chunks, show partial text on standard error",
    )
    parser.add_argument(
        "--chunk",
        type=float,
        default=0.16,
        metavar="SECONDS",
        help="length of a chunk of samples (0.16)",
    )
    parser.add_argument(
        "--resample",
        action="store_true",
        help="convert recordings of another sample rate",
    )
    parser.add_argument("--device", default="cpu", help="e.g. cuda:0 (cpu)")


def run(options):
    """Recognise.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        Text, and figures of latency.
    """
    if not options.chunk > 0:
        raise ValueError(
            f"--chunk {options.chunk:g}: expected seconds, above 0"
        )
    from speechbrain_taskarith.commands.transcriber_folder import (
        load_transcriber,
    )
    from speechbrain_taskarith.data import read_audio

    model = load_transcriber(options.model, options.device)
    lines, data = [], []
    for path in options.files:
        wave = read_audio(path, model.sample_rate, options.resample)
        began = time.perf_counter()
        found = {"file": path, "seconds": len(wave) / model.sample_rate}
        if options.stream:
            found.update(_streamed(model, wave, options))
        else:
            found["text"] = model.transcribe(wave.to(options.device))
        spent = time.perf_counter() - began
        found["real_time_factor"] = spent / found["seconds"]
        data.append(found)
        name = f"{path}: " if len(options.files) > 1 else ""
        lines.append(f"{name}{found['text']}")
    result = {"verb": "transcribe", "model": options.model, "files": data}
    if options.stream:
        result["latency"] = model.latency()
        lines.append(_figures(model.latency(), data))
    return Result(lines, result)


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


def _figures(latency, data):
    seconds = sum(found["seconds"] for found in data)
    spent = sum(found["real_time_factor"] * found["seconds"] for found in data)
    return (
        f"latency {1000 * latency['algorithmic']:.0f} ms by construction "
        f"(segment {1000 * latency['segment']:.0f}, look-ahead "
        f"{1000 * latency['look_ahead']:.0f}, features "
        f"{1000 * latency['features']:.0f}); real-time factor "
        f"{spent / seconds:.3f}"
    )
