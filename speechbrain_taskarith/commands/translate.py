"""`taskarith translate`: recordings to text of another language."""

import time

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import (
    Result,
    about_recording,
    complain,
    message,
    texts,
)
from speechbrain_taskarith.utils.progress import progress

_EXAMPLES = """\
  taskarith translate --model results/translator speech.wav
  taskarith translate --model results/translator --to de *.wav --json
  taskarith translate --model results/translator --cut 20 lecture.wav
  taskarith translate --model results/translator --beam 8 --length-penalty 1.2 \\
      --batch 16 --skip-bad *.wav
"""


def add_parser(verbs, summary):
    """Add the verb's parser."""
    about = (
        "Translate recordings with a model that a translation recipe has left "
        "in its folder translator. A recording that cannot be translated does "
        "not take the others along."
    )
    parser = shared.add_verb(
        verbs, "translate", summary, _EXAMPLES, run, about=about
    )
    parser.set_defaults(
        remedies={
            "trusted=True": "--trusted",
            "length_penalty": "--length-penalty",
            "beam_size": "--beam",
            "(longest=10)": "with --cut 10",
            "Cut it into segments": "Cut it with --cut 25",
        }
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="AUDIO")
    add(
        "--model",
        required=True,
        metavar="FOLDER",
        help="what save_translator wrote, or its name on Hugging Face's hub",
    )
    add(
        "--to", metavar="LANGUAGE", help="target language, where there are more"
    )
    add(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="recordings that are searched at once (8)",
    )
    add("--beam", type=int, metavar="N", help="beam size; 1: greedy")
    add(
        "--length-penalty",
        "--length_penalty",
        type=float,
        metavar="A",
        help="compare log probability / length ** A; above 1: longer text",
    )
    add(
        "--cut",
        type=float,
        metavar="SECONDS",
        help="cut longer recordings at their pauses into parts of so many "
        "seconds at most",
    )
    add(
        "--resample",
        action="store_true",
        help="convert recordings of another sample rate",
    )
    add(
        "--skip-bad",
        "--skip_bad",
        action="store_true",
        help="exit status 0 though some recordings could not be translated",
    )
    add(
        "--trusted",
        action="store_true",
        help="let the folder's YAML name any class, for one of your own",
    )
    add("--device", default="cpu", help="e.g. cuda:0 (cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (one a core)")


def run(options):
    """Translate, a batch after the other."""
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: expected at least 1")
    if options.cut is not None and not options.cut >= 1:
        raise ValueError(f"--cut {options.cut:g}: expected seconds, from 1")
    from speechbrain_taskarith.translation import SpeechTranslator

    with shared.threads(options):
        translator = SpeechTranslator.from_hparams(
            options.model,
            trusted=options.trusted,
            run_opts={"device": options.device},
        )
        translator.set_search(options.beam, options.length_penalty)
        # An unknown language concerns all recordings: said once.
        translator.check_target(options.to)
        began = time.perf_counter()
        data = _translated(translator, options)
        took = time.perf_counter() - began
    good = [one for one in data if "text" in one]
    bad = len(data) - len(good)
    lines = texts(data)
    if bad:
        complain(
            f"{bad} of {len(data)} recording(s) could not be translated",
            "note" if options.skip_bad else "error",
        )
    seconds = sum(one["seconds"] for one in good)
    result = {
        "verb": "translate",
        "model": options.model,
        "files": data,
        "skipped": bad,
        "real_time_factor": took / seconds if seconds else None,
    }
    failed = bad and (not good or not options.skip_bad)
    return Result(lines, result, status=1 if failed else 0)


def _translated(translator, options):
    """Return what is to be said of every recording, in order."""
    data, batch = [{"file": path} for path in options.files], []
    show = not options.no_progress and len(data) > 1
    for one in progress(data, unit="file", show_progress=show):
        try:
            encoded = translator.encode_file(
                one["file"], options.resample, options.cut
            )
            batch.append((one, encoded))
        except (ValueError, OSError, RuntimeError) as error:
            _note(one, error, options)
        if sum(len(encoded) for _, encoded in batch) >= options.batch:
            _decode(translator, batch, options)
            batch = []
    _decode(translator, batch, options)
    return data


def _decode(translator, batch, options):
    """Translate recordings, parts of several of them at once."""
    from speechbrain_taskarith.translation import Translation

    parts = [part for _, encoded in batch for part in encoded]
    try:
        found = [
            translation
            for first in range(0, len(parts), options.batch)
            for translation in translator.decode(
                parts[first : first + options.batch], options.to
            )
        ]
    except (ValueError, RuntimeError) as error:
        if len(batch) == 1:
            _note(batch[0][0], error, options)
            return
        # Of several only one may be bad.
        for single in batch:
            _decode(translator, [single], options)
        return
    for one, encoded in batch:
        translation = Translation.joined(found[: len(encoded)])
        found = found[len(encoded) :]
        if not translation.text:
            _note(one, ValueError(translation.doubt), options)
            continue
        one.update(translation.as_dict())
        if translation.doubt:
            text = message(ValueError(translation.doubt), options.remedies)
            complain(f"{one['file']}: {text}", "note")


def _note(one, error, options):
    """Note that a recording could not be translated, and say so."""
    error = about_recording(error, one["file"])
    one["error"] = message(error, options.remedies)
    complain(one["error"], "skipped" if options.skip_bad else "error")
