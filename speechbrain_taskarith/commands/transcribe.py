"""`taskarith transcribe`: recordings to text, whole or as a stream."""

import inspect
import pydoc
import re
import sys
import time
from pathlib import Path

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import Result, complain, message

_EXAMPLES = """\
  taskarith transcribe --model results/model speech.wav
  taskarith transcribe --model results/model --stream speech.wav
  taskarith transcribe --model results/model --stream --chunk 0.1 *.wav --json
"""

DESCRIPTION = "hyperparams.yaml"
KEY = "transcriber"
WEIGHTS = ("transcriber.ckpt", "transcriber.safetensors")

# Where the classes that a description may name are defined.
_MODULES = (
    "speechbrain_taskarith.transducer",
    "speechbrain.lobes",
    "speechbrain.nnet",
    "speechbrain.processing",
    "torch.nn",
)
_HARMLESS = ("!ref", "!copy", "!PLACEHOLDER", "!tuple")
_PLAIN = "tag:yaml.org,2002:"
_PLAIN_KINDS = ("map", "seq", "str", "int", "float", "bool", "null")
_FOLDER_KEY = "model_folder"


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
    if not options.chunk > 0:
        raise ValueError(
            f"--chunk {options.chunk:g}: expected seconds, above 0"
        )
    with shared.threads(options):
        model = load_transcriber(options.model, options.device)
        data, bad = [], 0
        for path in options.files:
            try:
                data.append(_recognised(model, path, options))
            except (ValueError, OSError, RuntimeError) as error:
                text = message(_in_words(error, path), options.remedies)
                bad += 1
                if bad == len(options.files):
                    raise ValueError(text) from error
                # The texts that there are must not be lost.
                complain(text)
                data.append({"file": path, "error": text})
    found = [one for one in data if "text" in one]
    named = len(options.files) > 1
    lines = [
        f"{one['file']}: {one['text']}" if named else one["text"]
        for one in found
    ]
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


def _in_words(error, path):
    """Return an error that names the file, and options instead of Python."""
    text = str(error)
    if not Path(path).is_file():
        text = f"{path}: no such recording"
    text = re.sub(
        r"set the recipe's sample_rate to \d+, or read it with resample=True",
        "or let --resample do so",
        text,
    )
    text = text.replace(" or take its row out of the manifest", "")
    return ValueError(text if path in text else f"{path}: {text}")


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


def load_transcriber(folder, device="cpu"):
    """Make a recogniser of a folder, in evaluation mode.

    `hyperparams.yaml` makes it, under the key `transcriber`; a key
    `model_folder: !PLACEHOLDER` becomes the folder itself; `transcriber.ckpt`
    is its state dict.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; the folder of a model holds "
            f"{DESCRIPTION} and {WEIGHTS[0]}"
        )
    text = path.read_text(encoding="utf-8")
    names_folder = _FOLDER_KEY in check_description(text, path)
    from hyperpyyaml import load_hyperpyyaml

    overrides = {_FOLDER_KEY: str(folder)} if names_folder else {}
    found = load_hyperpyyaml(text, overrides)
    if KEY not in found:
        raise ValueError(f"{path}: no key {KEY!r}; it names the recogniser")
    transcriber = found[KEY]
    if not callable(getattr(transcriber, "stream", None)):
        raise ValueError(
            f"{path}: {KEY!r} is a {type(transcriber).__name__}; expected a "
            "speechbrain_taskarith.transducer.StreamingTransducer"
        )
    _load_weights(transcriber, folder)
    return transcriber.to(device).eval()


def check_description(text, path):
    """Return a YAML's keys; refuse one that would do more than make models.

    Only classes of a few packages are made, no function is called, nothing
    else is included.

    Example
    -------
    >>> check_description("a: !new:torch.nn.Linear [3, 4]", "m.yaml")
    ['a']
    >>> check_description("a: !apply:os.getcwd []", "m.yaml")
    Traceback (most recent call last):
      ...
    ValueError: m.yaml, line 1: '!apply:os.getcwd' is refused...
    """
    import yaml

    try:
        root = yaml.compose(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected keys and values")
    todo = [root]
    while todo:
        node = todo.pop()
        _check_tag(node, path)
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            todo += [part for pair in node.value for part in pair]
    return [key.value for key, _ in root.value]


def _check_tag(node, path):
    if node.tag in _HARMLESS or node.tag.removeprefix(_PLAIN) in _PLAIN_KINDS:
        return
    where = f"{path}, line {node.start_mark.line + 1}"
    kind, _, name = node.tag.partition(":")
    if kind == "!new" and _within(name):
        # What the name leads to may come from elsewhere, by way of imports.
        found = pydoc.locate(name)
        if found is None:
            raise ValueError(f"{where}: there is no {name}")
        if inspect.isclass(found) and _within(found.__module__):
            return
    raise ValueError(
        f"{where}: {node.tag!r} is refused: a model's description makes "
        f"objects (!new:) of classes in {', '.join(_MODULES)}, and nothing else"
    )


def _within(name):
    return any(f"{name}.".startswith(f"{module}.") for module in _MODULES)


def _load_weights(transcriber, folder):
    import torch

    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder / WEIGHTS[0]}: no such file; save the recogniser's "
            "weights there: torch.save(transcriber.state_dict(), ...)"
        )
    path = found[0]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        transcriber.load_state_dict(state)
    except Exception as error:  # an unpickler raises what it trips over
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: these weights do not fit {folder / DESCRIPTION}, or the "
            f"file is damaged: {text}"
        ) from error
