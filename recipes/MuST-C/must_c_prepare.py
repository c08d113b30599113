"""
Data preparation for MuST-C, with WMT text and LibriSpeech beside it.

Download: https://mt.fbk.eu/must-c/ ; https://www.statmt.org/ ;
https://www.openslr.org/12

Takes the folder in which the archives of a version (1 to 3) were unpacked:

    en-de/data/{train,dev,tst-COMMON}/
        wav/<talk>.wav
        txt/<split>.yaml        a list of {duration, offset, speaker_id, wav}
        txt/<split>.en          a line for each segment
        txt/<split>.de

and, where given, a folder with parallel text `train.en` and `train.de`, and
LibriSpeech (`train-clean-100/<speaker>/<chapter>/*.flac, *.trans.txt`).

Writes `train.csv`, `valid.csv`, `test.csv` (columns
`ID,duration,wav,start,spk_id,wrd,translation`), `asr.csv` and `text.csv` in
the same columns, and `text_for_labels.txt`, both languages of the training
set, for the tokenizer.
"""

import collections
import csv
import os
from pathlib import Path

import yaml
from speechbrain.dataio import audio_io
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.utils.files import (
    atomic_write,
    read_json,
    sha256_of,
    write_json,
)
from speechbrain_taskarith.utils.progress import progress

logger = get_logger(__name__)

SPLITS = {"train": "train", "valid": "dev"}
COLUMNS = ("ID", "duration", "wav", "start", "spk_id", "wrd", "translation")
OPTIONS_FILE = "must_c_prepare.json"
LABELS_TEXT = "text_for_labels.txt"
VERSION = 2
# By rounding, a segment may end this many seconds after its wav.
TOLERANCE = 0.05
_REMEDY = (
    "Unpack the archive again, or pass skip_bad=True to skip such utterances"
)


def prepare_must_c(
    data_folder,
    save_folder,
    language="de",
    test_set="tst-COMMON",
    wmt_folder=None,
    wmt_lines=None,
    librispeech_folder=None,
    librispeech_sets=("train-clean-100", "train-clean-360", "train-other-500"),
    max_seconds=30.0,
    skip_bad=False,
    skip_prep=False,
):
    """
    Prepares the CSV files of one language pair; see the head of this file.

    Arguments
    ---------
    data_folder : str
        Holds `en-<language>`.
    save_folder : str
        Where the CSV files go.
    language : str
        Target language, any that the folder has.
    test_set : str
        The corpus's set for `test.csv`, e.g. `"tst-HE"`.
    wmt_folder : str or None
        Holds `train.en` and `train.<language>`.
    wmt_lines : int or None
        Use only the first lines of it.
    librispeech_folder : str or None
        The folder `LibriSpeech`.
    librispeech_sets : sequence of str
        The sets to use.
    max_seconds : float
        Longer training utterances are left out.
    skip_bad : bool
        True: skip a segment that ends after its wav, or is without wav,
        transcript or translation, and log it. False: raise an error.
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        A language, list, text or recording is missing.
    ValueError
        Lists and texts of different lengths, a bad segment.

    Example
    -------
    >>> prepare_must_c('/path/to/MuST-C', 'results/prepared')  # doctest: +SKIP
    """
    if skip_prep:
        return
    folder = language_folder(data_folder, language)
    splits = {**SPLITS, "test": test_set}
    if not (folder / test_set).is_dir():
        there = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(
            f"{folder / test_set}: missing; there are: {', '.join(there)}. "
            "Give one of them as test_set"
        )
    options = {
        "version": VERSION,
        "lists": {
            f"{name}.{kind}": sha256_of(
                _existing(folder / name / "txt" / f"{name}.{kind}")
            )
            for name in splits.values()
            for kind in ("yaml", "en", language)
        },
        "folder": str(folder),
        "wmt": [wmt_folder and str(wmt_folder), wmt_lines],
        "librispeech": [
            librispeech_folder and str(librispeech_folder),
            list(librispeech_sets),
        ],
        "max_seconds": max_seconds,
        "skip_bad": skip_bad,
    }
    marker = os.path.join(save_folder, OPTIONS_FILE)
    if _is_prepared(save_folder, options):
        logger.info(f"{save_folder}: already prepared, nothing to do")
        return
    # An interrupted preparation must not look finished.
    if os.path.exists(marker):
        os.unlink(marker)
    left_out = collections.Counter()
    texts = []
    for split, name in splits.items():
        rows = read_split(folder / name, language, skip_bad, left_out)
        if split == "train":
            total = len(rows)
            rows = [r for r in rows if r["duration"] <= max_seconds]
            logger.info(f"{total - len(rows)} segment(s) are too long")
            texts = [row["wrd"] for row in rows]
            texts += [row["translation"] for row in rows]
        _write(os.path.join(save_folder, f"{split}.csv"), rows, split)
    for reason, count in left_out.items():
        logger.warning(f"{count} utterance(s) left out: {reason}")
    extra = {"text": [], "asr": []}
    if wmt_folder:
        extra["text"] = read_text(wmt_folder, language, wmt_lines)
    if librispeech_folder:
        extra["asr"] = read_librispeech(librispeech_folder, librispeech_sets)
    for name, rows in extra.items():
        _write(os.path.join(save_folder, f"{name}.csv"), rows)
    with atomic_write(os.path.join(save_folder, LABELS_TEXT), "w") as stream:
        stream.writelines(f"{line}\n" for line in texts)
    # Last: it says that all other files are complete.
    write_json(marker, options)


def language_folder(data_folder, language):
    """Return the data folder of a language pair, of any version."""
    folder = Path(data_folder) / f"en-{language}" / "data"
    if not folder.is_dir():
        there = [
            path.parent.name for path in Path(data_folder).glob("en-*/data")
        ]
        raise FileNotFoundError(
            f"{folder}: missing, no target language {language!r}; there are: "
            f"{', '.join(sorted(there)) or 'none'}. Unpack the archive of "
            "https://mt.fbk.eu/must-c/ there"
        )
    return folder


def read_split(folder, language, skip_bad=False, left_out=None):
    """Return the segments of a split, in the order of its list.

    The Counter `left_out` counts the reasons why segments were skipped.
    """
    name = folder.name
    segments = _segments(_existing(folder / "txt" / f"{name}.yaml"))
    lines = {
        side: _lines(_existing(folder / "txt" / f"{name}.{side}"))
        for side in ("en", language)
    }
    for side, found in lines.items():
        if len(found) != len(segments):
            raise ValueError(
                f"{folder / 'txt'}: {name}.yaml lists {len(segments)} "
                f"segments, {name}.{side} has {len(found)} lines; unpack the "
                "archive again"
            )
    seconds, numbers, rows = {}, collections.Counter(), []
    each = zip(segments, lines["en"], lines[language])
    for segment, transcript, translation in progress(
        each, total=len(segments), desc=f"MuST-C {name}"
    ):
        talk = Path(segment["wav"]).stem
        ID = f"{talk}_{numbers[talk]:04d}"
        numbers[talk] += 1
        path = folder / "wav" / segment["wav"]
        try:
            if path not in seconds:
                seconds[path] = _seconds(path, ID)
            row = _row(ID, path, segment, seconds[path])
            row["wrd"] = _text(transcript, ID, "transcript")
            row["translation"] = _text(translation, ID, "translation")
        except (ValueError, FileNotFoundError) as error:
            if not skip_bad:
                raise
            logger.warning(f"left out: {error}")
            if left_out is not None:
                reason = str(error).split(": ", 1)[1].split(";")[0]
                left_out[reason] += 1
            continue
        rows.append(row)
    return rows


def read_text(folder, language, max_lines=None):
    """Return the rows of parallel text, without lines with an empty side.

    `max_lines`: read only the first lines; None reads all.
    """
    paths = [Path(folder) / f"train.{side}" for side in ("en", language)]
    counts = []
    for path in paths:
        with open(_existing(path), encoding="utf-8") as stream:
            counts.append(sum(1 for _ in stream))
    if counts[0] != counts[1]:
        raise ValueError(
            f"{paths[0]} has {counts[0]} lines, {paths[1].name} {counts[1]}; "
            "parallel text needs as many lines in both"
        )
    return _text_rows(*paths, max_lines)


def _text_rows(english, other_language, max_lines):
    with (
        open(english, encoding="utf-8") as sources,
        open(other_language, encoding="utf-8") as targets,
    ):
        for number, (transcript, translation) in enumerate(
            zip(sources, targets)
        ):
            if max_lines is not None and number >= max_lines:
                return
            transcript = " ".join(transcript.split())
            translation = " ".join(translation.split())
            if transcript and translation:
                yield {
                    "ID": f"text_{number}",
                    "duration": 0.0,
                    "wav": "",
                    "start": 0.0,
                    "spk_id": "",
                    "wrd": transcript,
                    "translation": translation,
                }


def read_librispeech(folder, sets):
    """Return the rows of some LibriSpeech sets, in lower case."""
    rows = []
    for name in sets:
        place = _existing(Path(folder) / name)
        for path in progress(
            sorted(place.rglob("*.trans.txt")), desc=f"LibriSpeech {name}"
        ):
            for line in _lines(path):
                ID, _, transcript = line.partition(" ")
                audio = _existing(path.parent / f"{ID}.flac")
                rows.append(
                    {
                        "ID": f"libri_{ID}",
                        "duration": _seconds(audio, ID),
                        "wav": str(audio),
                        "start": 0.0,
                        "spk_id": ID.split("-")[0],
                        "wrd": _text(transcript, ID, "transcript").lower(),
                        "translation": "",
                    }
                )
    if not rows:
        raise ValueError(f"{folder}: no utterance in {', '.join(sets)}")
    return rows


def _segments(path):
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with open(path, encoding="utf-8") as stream:
        found = yaml.load(stream, Loader=loader)
    needed = {"duration", "offset", "speaker_id", "wav"}
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of segments")
    for number, segment in enumerate(found, start=1):
        if not isinstance(segment, dict) or not needed <= set(segment):
            raise ValueError(
                f"{path}, segment {number}: expected {sorted(needed)}, found "
                f"{segment!r:.80}"
            )
    return found


def _row(ID, path, segment, total):
    start, seconds = float(segment["offset"]), float(segment["duration"])
    if not (start >= 0 and seconds > 0):
        raise ValueError(
            f"utterance {ID!r}: a segment without duration; offset {start}, "
            f"duration {seconds} in {path}. {_REMEDY}"
        )
    if start + seconds > total + TOLERANCE:
        raise ValueError(
            f"utterance {ID!r}: the segment points past the wav's end; it "
            f"ends at {start + seconds:.3f} s, {path} at {total:.3f} s. "
            f"{_REMEDY}"
        )
    return {
        "ID": ID,
        "duration": round(min(seconds, total - start), 6),
        "wav": str(path),
        "start": start,
        "spk_id": str(segment["speaker_id"]),
    }


def _seconds(path, ID):
    if not path.is_file():
        raise FileNotFoundError(
            f"utterance {ID!r}: no recording; expected {path}. {_REMEDY}"
        )
    try:
        return audio_io.info(str(path)).duration
    except Exception as error:
        raise ValueError(
            f"utterance {ID!r}: unreadable recording; {path}: {error}. "
            f"{_REMEDY}"
        ) from None


def _text(line, ID, what):
    text = " ".join(line.split())
    if not text:
        raise ValueError(f"utterance {ID!r}: empty {what}; {_REMEDY}")
    return text


def _lines(path):
    # Not splitlines: talks contain other characters that it splits at.
    text = path.read_text(encoding="utf-8")
    return text.removesuffix("\n").split("\n") if text else []


def _existing(path):
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: missing; expected the layout at the head of "
            "must_c_prepare.py"
        )
    return path


def _write(path, rows, split=None):
    count = 0
    with atomic_write(path, "w") as stream:
        table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow(row)
            count += 1
        if split is not None and not count:
            raise ValueError(
                f"no utterance for {os.path.basename(path)}; check the "
                "corpus, max_seconds and skip_bad"
            )
    logger.info(f"{os.path.basename(path)}: {count} utterances")


def _is_prepared(save_folder, options):
    """Tell whether these options have been prepared already."""
    path = os.path.join(save_folder, OPTIONS_FILE)
    names = (*SPLITS, "test", "text", "asr")
    written = [f"{name}.csv" for name in names] + [LABELS_TEXT]
    if not os.path.isfile(path) or not all(
        os.path.isfile(os.path.join(save_folder, name)) for name in written
    ):
        return False
    return read_json(path) == options
