"""
Data preparation for the accents of Common Voice.

Download: https://commonvoice.mozilla.org/en/datasets

Takes the folder of one language:

    train.tsv  dev.tsv  test.tsv  validated.tsv
    clips/*.mp3

and writes `<accent>_{train,valid,test}.csv` for each accent that is asked for.
SpeechBrain's own script drops the column with the accents (`accents`, before
version 7 `accent`), which is all that this one is about.
"""

import collections
import csv
import hashlib
import os
import re
from pathlib import Path

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

SPLITS = {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}
VALIDATED = "validated.tsv"
OPTIONS_FILE = "common_voice_prepare.json"
COLUMNS = ["ID", "duration", "wav", "spk_id", "lang", "accent", "text"]


def prepare_common_voice(
    data_folder,
    save_folder,
    accents,
    source="validated",
    language="en",
    max_seconds=12.0,
    skip_prep=False,
):
    """
    Prepares `<accent>_{train,valid,test}.csv` of Common Voice.

    Arguments
    ---------
    data_folder : str
        The folder of one language, with the TSV files and `clips`.
    save_folder : str
        Where the CSV files go.
    accents : dict
        `{name: accent as the corpus writes it, or a list of ways}`.
    source : str
        `"validated"`: all validated clips, split by speaker, about 80, 10 and
        10 % of the speakers; most accents are rare in the corpus's own splits.
        `"splits"`: the corpus's train, dev and test.
    language : str
        Code of the language.
    max_seconds : float
        Longer clips are left out.
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        A TSV file or a clip is missing.
    ValueError
        No column of accents, an accent without clips in some split, a speaker
        in two splits.

    Example
    -------
    >>> prepare_common_voice(
    ...     '/path/to/cv-corpus/en', 'results/prepared', {'us': 'United States English'}
    ... )  # doctest: +SKIP
    """
    if skip_prep:
        return
    folder = Path(data_folder)
    if source not in ("validated", "splits"):
        raise ValueError(f"source {source!r}: expected 'validated' or 'splits'")
    files = [VALIDATED] if source == "validated" else list(SPLITS.values())
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: missing; give the folder of one language, "
                "which holds the TSV files and clips/"
            )
    options = {
        "folder": str(folder.resolve()),
        "files": {name: sha256_of(folder / name) for name in files},
        "accents": accents,
        "source": source,
        "language": language,
        "max_seconds": max_seconds,
    }
    marker = Path(save_folder) / OPTIONS_FILE
    if marker.is_file() and read_json(marker) == options:
        logger.info(f"{save_folder}: already prepared, nothing to do")
        return
    # An interrupted preparation must not look finished.
    marker.unlink(missing_ok=True)
    names = names_by_accent(accents)
    left_out = collections.Counter()
    rows = []
    for split, name in (
        SPLITS.items() if source == "splits" else [(None, VALIDATED)]
    ):
        for row in read_clips(folder / name, names, left_out):
            row["split"] = split or split_of(row["spk_id"])
            rows.append(row)
    check_speakers(rows, folder)
    rows = list(
        add_audio(rows, folder / "clips", language, max_seconds, left_out)
    )
    for reason, count in left_out.items():
        logger.info(f"{count} clip(s) left out: {reason}")
    for accent in accents:
        for split in SPLITS:
            own = [
                row
                for row in rows
                if (row["accent"], row["split"]) == (accent, split)
            ]
            if not own:
                raise ValueError(
                    f"{data_folder}: no {split} clip of {accent!r} "
                    f"({', '.join(as_list(accents[accent]))}); frequent accents "
                    f"are {', '.join(frequent(folder / files[0]))}"
                )
            hours = sum(row["duration"] for row in own) / 3600
            speakers = len({row["spk_id"] for row in own})
            logger.info(
                f"{accent} {split}: {len(own)} clips, {speakers} speakers, "
                f"{hours:.2f} hours"
            )
            write_rows(Path(save_folder, f"{accent}_{split}.csv"), own)
    # Last: it says that all other files are complete.
    write_json(marker, options)


def as_list(accent):
    """Return the ways in which an accent is written."""
    return [accent] if isinstance(accent, str) else list(accent)


def names_by_accent(accents):
    """Return `{accent as the corpus writes it: name}`."""
    if not accents:
        raise ValueError("accents: none given; name one at least")
    names = {}
    for name, ways in accents.items():
        for way in as_list(ways):
            if names.setdefault(way, name) != name:
                raise ValueError(
                    f"accents: {way!r} stands under {names[way]!r} and {name!r}"
                )
    return names


def accents_of(text):
    """Return the accents of a clip; commas in parentheses belong to a name.

    Example
    -------
    >>> accents_of("India and South Asia (India, Pakistan, Sri Lanka)")
    ['India and South Asia (India, Pakistan, Sri Lanka)']
    >>> accents_of("United States English,Midwestern|Low")
    ['United States English', 'Midwestern', 'Low']
    """
    parts = re.split(r"[|,](?![^(]*\))", text or "")
    return [part.strip() for part in parts if part.strip()]


def read_table(path):
    """Read the lines of a TSV file as dicts, accents in `accents`."""
    with open(path, encoding="utf-8", newline="") as stream:
        # Sentences hold quotation marks that quote nothing.
        reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = reader.fieldnames or []
        column = "accents" if "accents" in columns else "accent"
        for needed in ("client_id", "path", "sentence", column):
            if needed not in columns:
                raise ValueError(
                    f"{path}: no column {needed!r}; found {', '.join(columns)}"
                )
        for row in reader:
            yield {**row, "accents": row[column] or ""}


def read_clips(path, names, left_out):
    """Yield the clips of one accent that is asked for."""
    for row in read_table(path):
        given = accents_of(row["accents"])
        found = {names[accent] for accent in given if accent in names}
        if not given:
            left_out["no accent given"] += 1
        elif not found:
            left_out["other accents"] += 1
        elif len(found) > 1:
            left_out["several accents"] += 1
        elif not (row["sentence"] or "").strip():
            left_out["no sentence"] += 1
        else:
            yield {
                "ID": Path(row["path"]).stem,
                "path": row["path"],
                "spk_id": row["client_id"],
                "accent": found.pop(),
                "text": " ".join(row["sentence"].split()),
            }


def frequent(path, count=8):
    """Name the most frequent accents of a TSV file."""
    counts = collections.Counter(
        accent
        for row in read_table(path)
        for accent in accents_of(row["accents"])
    )
    return [f"{name!r} ({n})" for name, n in counts.most_common(count)]


def split_of(speaker):
    """Put a speaker into a split, the same on all machines."""
    digest = hashlib.sha256(speaker.encode("utf-8")).hexdigest()
    number = int(digest, 16) % 10
    return {8: "valid", 9: "test"}.get(number, "train")


def check_speakers(rows, folder):
    """Refuse a speaker in two splits."""
    splits = {}
    for row in rows:
        first = splits.setdefault(row["spk_id"], row["split"])
        if first != row["split"]:
            raise ValueError(
                f"{folder}: speaker {row['spk_id'][:16]}... is in {first} and "
                f"in {row['split']}; use source='validated', which splits by "
                "speaker"
            )


def add_audio(rows, clips, language, max_seconds, left_out):
    """Yield the rows that are short enough, with path and duration."""
    missing = [r["path"] for r in rows if not (clips / r["path"]).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{clips}: {len(missing)} clips are missing, e.g. {missing[0]}; "
            "unpack the archive again"
        )
    for row in progress(rows, desc="clips"):
        path = (clips / row["path"]).resolve()
        seconds = audio_io.info(str(path)).duration
        if seconds > max_seconds:
            left_out[f"longer than {max_seconds} s"] += 1
            continue
        duration = round(seconds, 4)
        yield {**row, "wav": str(path), "lang": language, "duration": duration}


def write_rows(path, rows):
    """Write a CSV file, whole or not at all."""
    os.makedirs(path.parent, exist_ok=True)
    with atomic_write(path, "w") as stream:
        writer = csv.DictWriter(
            stream, COLUMNS, lineterminator="\n", extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(rows)
    return path
