"""
Data preparation for Multilingual LibriSpeech (MLS).

Download: https://www.openslr.org/94/ (CC BY 4.0), in FLAC or Opus

Takes the folder in which the archives were unpacked:

    mls_italian_opus/
        train/audio/<speaker>/<book>/<speaker>_<book>_<number>.opus
        train/transcripts.txt           ID <tab> text
        train/segments.txt              ID <tab> URL <tab> start <tab> end
        train/limited_supervision/9hr/handles.txt
        train/limited_supervision/1hr/{0..5}/handles.txt
        dev/..., test/...

and writes `train.csv`, `valid.csv` and `test.csv`, and `transcripts.csv` with
the text of the whole training set, for the tokenizer.
"""

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path

from speechbrain.dataio import audio_io
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import Recording, write_manifest
from speechbrain_taskarith.utils.files import (
    atomic_write,
    read_json,
    sha256_of,
    write_json,
)
from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.utils.progress import progress

logger = get_logger(__name__)

SPLITS = {"train": "train", "valid": "dev", "test": "test"}
SUFFIXES = (".opus", ".flac", ".wav")
OPTIONS_FILE = "mls_prepare.json"
TEXT_FILE = "transcripts.csv"
# Which of the corpus's lists of limited supervision each subset joins. The six
# lists of "1hr" have 10 minutes each.
SUBSETS = {
    "full": None,
    "9h": r"9hr",
    "1h": r"1hr/\d+",
    "10h": r"9hr|1hr/\d+",
    **{f"10min/{number}": f"1hr/{number}" for number in range(6)},
    "10min": r"1hr/0",
}


@dataclass(frozen=True)
class Segment:
    """One line of the corpus, and its file."""

    ID: str
    path: Path
    text: str
    seconds: float


def prepare_mls(
    data_folder,
    save_folder,
    languages=("italian",),
    subset="full",
    max_seconds=20.0,
    skip_prep=False,
):
    """
    Prepares `train.csv`, `valid.csv`, `test.csv`, `transcripts.csv` of MLS.

    Columns `ID,duration,wav,spk_id,wrd,accent,split`; the language is the
    `accent`.

    Arguments
    ---------
    data_folder : str
        Holds `mls_<language>_opus` (or `mls_<language>`, the FLAC form).
    save_folder : str
        Where the CSV files go.
    languages : sequence of str
        Their data are joined, e.g. for multilingual pre-training.
    subset : str
        Training data: `"full"`, or the corpus's limited supervision:
        `"10h"`, `"9h"`, `"1h"`, `"10min"` (the first of the six lists of ten
        minutes), `"10min/3"` (another one).
    max_seconds : float
        Longer training utterances are left out (MLS ends at 20 s).
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        A language, list or recording is missing.
    ValueError
        An unknown subset, a line that cannot be read, an utterance without
        a transcript.

    Example
    -------
    >>> prepare_mls('/path/to/MLS', 'results/prepared')  # doctest: +SKIP
    """
    if skip_prep:
        return
    if subset not in SUBSETS:
        raise ValueError(
            f"subset {subset!r}: expected one of {', '.join(SUBSETS)}"
        )
    folders = {
        language: language_folder(data_folder, language)
        for language in languages
    }
    if not folders:
        raise ValueError("languages: none given; name one at least")
    options = {
        "folders": {name: str(path) for name, path in folders.items()},
        "transcripts": {
            f"{name} {split}": sha256_of(path / split / "transcripts.txt")
            for name, path in folders.items()
            for split in SPLITS.values()
            if (path / split / "transcripts.txt").is_file()
        },
        "subset": subset,
        "max_seconds": max_seconds,
    }
    if _is_prepared(save_folder, options):
        logger.info(f"{save_folder}: already prepared, nothing to do")
        return
    # An interrupted preparation must not look finished.
    if os.path.exists(os.path.join(save_folder, OPTIONS_FILE)):
        os.unlink(os.path.join(save_folder, OPTIONS_FILE))
    for split, name in SPLITS.items():
        rows = []
        for language, folder in folders.items():
            wanted = SUBSETS[subset] if split == "train" else None
            segments = read_split(folder / name, wanted)
            if split == "train":
                count = len(segments)
                segments = [s for s in segments if s.seconds <= max_seconds]
                logger.info(
                    f"{language}: {count - len(segments)} of {count} utterances "
                    f"left out: longer than {max_seconds:g} s"
                )
            rows += [recording(s, language, split) for s in segments]
        hours = sum(row.duration for row in rows) / 3600
        logger.info(f"{split}: {len(rows)} utterances, {hours:.2f} hours")
        if not rows:
            raise ValueError(
                f"{data_folder}: no {name} utterance of "
                f"{', '.join(languages)}, subset {subset!r}; check "
                "max_seconds and the lists"
            )
        write_manifest(os.path.join(save_folder, f"{split}.csv"), rows)
    write_transcripts(folders.values(), os.path.join(save_folder, TEXT_FILE))
    # Last: it says that all other files are complete.
    write_json(os.path.join(save_folder, OPTIONS_FILE), options)


def language_folder(data_folder, language):
    """Return a language's folder, which holds train, dev and test."""
    for name in (f"mls_{language}_opus", f"mls_{language}"):
        if (Path(data_folder) / name).is_dir():
            return Path(data_folder) / name
    there = sorted(path.name for path in Path(data_folder).glob("mls_*"))
    raise FileNotFoundError(
        f"{data_folder}: no folder mls_{language}_opus or mls_{language}; "
        f"there are: {', '.join(there) or 'none'}. Unpack the archive of "
        "https://www.openslr.org/94/ there"
    )


def read_split(folder, wanted=None):
    """Return the `Segment`s of a split, sorted by ID.

    `wanted`: regular expression on the lists of limited supervision, or None.
    """
    texts = _table(folder / "transcripts.txt", 2)
    seconds = {}
    if (folder / "segments.txt").is_file():
        for key, row in _table(folder / "segments.txt", 4).items():
            seconds[key] = float(row[2]) - float(row[1])
    ids = sorted(texts if wanted is None else _limited(folder, wanted))
    unknown = [ID for ID in ids if ID not in texts]
    if unknown:
        raise ValueError(
            f"{folder / 'transcripts.txt'}: no text for {some(unknown)}, "
            "listed in limited_supervision; unpack the archive again"
        )
    segments = []
    for ID in progress(ids, desc=f"{folder.parent.name} {folder.name}"):
        path = _audio(folder, ID)
        length = seconds.get(ID)
        if length is None:
            length = audio_io.info(str(path)).duration
        segments.append(Segment(ID, path, " ".join(texts[ID]), length))
    return segments


def write_transcripts(folders, path):
    """Write the text of whole training sets, whatever the subset.

    Ten minutes of text are too few for thousands of pieces.
    """
    with atomic_write(path, "w") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["ID", "wrd"])
        for folder in folders:
            lines = _table(folder / "train" / "transcripts.txt", 2)
            for ID, (text,) in lines.items():
                table.writerow([ID, " ".join(text.split())])


def recording(segment, language, split):
    """Return the row of the manifest."""
    return Recording(
        ID=f"{language}_{segment.ID}",
        duration=round(segment.seconds, 3),
        wav=str(segment.path),
        spk_id=segment.ID.split("_")[0],
        wrd=" ".join(segment.text.split()),
        accent=language,
        split=split,
    )


def _table(path, columns):
    """Read lines of tab-separated columns into `{first: rest}`."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; expected the layout of MLS (see the head of "
            "mls_prepare.py)"
        )
    rows = {}
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            parts = line.rstrip("\n").split("\t")
            if len(parts) != columns or not parts[0] or not parts[1].strip():
                raise ValueError(
                    f"{path}, line {number}: expected {columns} columns apart "
                    f"by tabs, none empty; found {line!r:.60}"
                )
            rows[parts[0]] = parts[1:]
    return rows


def _limited(folder, wanted):
    """Return the IDs of all limited-supervision lists that match."""
    root = folder / "limited_supervision"
    ids = set()
    for path in sorted(root.rglob("handles.txt")):
        name = path.parent.relative_to(root).as_posix()
        if re.fullmatch(wanted, name):
            ids.update(path.read_text(encoding="utf-8").split())
    if not ids:
        raise FileNotFoundError(
            f"{root}: no list handles.txt in a folder {wanted}; the subset "
            "needs the corpus's limited supervision"
        )
    return ids


def _audio(folder, ID):
    speaker, book, _ = ID.split("_", 2)
    place = folder / "audio" / speaker / book
    for suffix in SUFFIXES:
        if (place / f"{ID}{suffix}").is_file():
            return place / f"{ID}{suffix}"
    raise FileNotFoundError(
        f"{place / ID}: no such recording ({', '.join(SUFFIXES)}), which "
        f"{folder.name} names; unpack the archive again"
    )


def _is_prepared(save_folder, options):
    """Tell whether these options have been prepared already."""
    path = os.path.join(save_folder, OPTIONS_FILE)
    written = [f"{split}.csv" for split in SPLITS] + [TEXT_FILE]
    if not os.path.isfile(path) or not all(
        os.path.isfile(os.path.join(save_folder, name)) for name in written
    ):
        return False
    return read_json(path) == options
