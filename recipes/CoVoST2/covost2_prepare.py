"""
Data preparation for CoVoST 2.

Download: https://commonvoice.mozilla.org/en/datasets (Common Voice version 4,
2019-12-10, of the source language) and the translations,
https://dl.fbaipublicfiles.com/covost/covost_v2.<source>_<target>.tsv.tar.gz

Takes the folder of one source language of Common Voice, and the folder of the
unpacked translations (the same folder by default):

    validated.tsv               client_id, path, sentence, ...
    clips/*.mp3
    covost_v2.<source>_<target>.tsv     path, translation, split

or, instead of the last, `covost_v2.<source>_<target>.{train,dev,test}.tsv`, as
the corpus's own script `get_covost_splits.py` writes them.

Writes `train.csv`, `valid.csv` and `test.csv`, columns
`ID,duration,wav,spk_id,lang,text` and `text_<target>` for each target.
"""

import collections
import csv
from pathlib import Path

from speechbrain.dataio import audio_io
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import write_manifest
from speechbrain_taskarith.utils.files import read_json, sha256_of, write_json
from speechbrain_taskarith.utils.progress import progress

logger = get_logger(__name__)

# By the corpus's own script; "train_covost" is what CoVoST adds.
SPLITS = {"train": ("train", "train_covost"), "valid": ("dev",)}
SPLITS["test"] = ("test",)
VALIDATED = "validated.tsv"
OPTIONS_FILE = "covost2_prepare.json"
VERSION = 1
_REMEDY = "Unpack it again, or pass skip_bad=True to skip such utterances"


def prepare_covost2(
    data_folder,
    save_folder,
    source="fr",
    targets=("en",),
    covost_folder=None,
    max_seconds=30.0,
    skip_bad=False,
    skip_prep=False,
):
    """
    Prepares the manifests of a source language; see the head of this file.

    Arguments
    ---------
    data_folder : str
        Common Voice's folder of the source language.
    save_folder : str
        Where the CSV files go.
    source : str
        The source language, as the names of the files have it.
    targets : sequence of str
        Target languages; an utterance without a translation into one of them
        has an empty column.
    covost_folder : str, optional
        Where the translations are; by default in `data_folder`.
    max_seconds : float
        Longer utterances of the training set are left out.
    skip_bad : bool
        True: skip an utterance without recording, transcript or translation,
        and log it. False: raise an error.
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        A file or a clip is missing; the translations that are there are named.
    ValueError
        A column is missing, a clip stands there twice or is damaged, a split is
        empty.

    Example
    -------
    >>> prepare_covost2('/path/to/cv/fr', 'results/prepared')  # doctest: +SKIP
    """
    if skip_prep:
        return
    folder, save = Path(data_folder), Path(save_folder)
    targets = [targets] if isinstance(targets, str) else list(targets)
    texts = Path(covost_folder) if covost_folder else folder
    validated = folder / VALIDATED
    if not validated.is_file():
        raise FileNotFoundError(
            f"{validated}: missing; data_folder has to be Common Voice's "
            "folder of the source language, with clips/ in it"
        )
    files = {
        target: translation_files(texts, source, target) for target in targets
    }
    options = {
        "version": VERSION,
        "folder": str(folder.resolve()),
        "files": {
            str(path.resolve()): sha256_of(path)
            for path in (validated, *(p for f in files.values() for p in f))
        },
        "languages": [source, targets],
        "max_seconds": max_seconds,
        "skip_bad": skip_bad,
    }
    marker = save / OPTIONS_FILE
    if is_prepared(marker, options):
        logger.info(f"{save}: already prepared, nothing to do")
        return
    # An interrupted preparation must not look finished.
    marker.unlink(missing_ok=True)
    left_out = collections.Counter()
    lines = read_lines(validated, files, source, left_out)
    rows = list(add_audio(lines, folder, max_seconds, skip_bad, left_out))
    for reason, count in left_out.items():
        logger.warning(f"{count} utterance(s) left out: {reason}")
    for split in SPLITS:
        own = [row for of, row in rows if of == split]
        hours = sum(row["duration"] for row in own) / 3600
        logger.info(f"{split}: {len(own)} utterances, {hours:.2f} hours")
        if not own:
            raise ValueError(
                f"{validated}: no utterance for {split}.csv. CoVoST 2 belongs "
                "to version 4 of Common Voice (2019-12-10): is it another one?"
            )
        write_manifest(save / f"{split}.csv", own)
    # Last: it says that all other files are complete.
    write_json(marker, options)


def translation_files(folder, source, target):
    """Return the files that hold the translations of a language pair."""
    name = f"covost_v2.{source}_{target}"
    whole = folder / f"{name}.tsv"
    if whole.is_file():
        return [whole]
    parts = [
        folder / f"{name}.{split}.tsv" for split in ("train", "dev", "test")
    ]
    if all(path.is_file() for path in parts):
        return parts
    there = sorted(path.name for path in folder.glob("covost_v2.*.tsv"))
    raise FileNotFoundError(
        f"{whole}: missing, no translations from {source!r} into {target!r}; "
        f"there are: {', '.join(there) or 'none'}. Unpack its archive there, or "
        "give the folder as covost_folder"
    )


def read_table(path, columns):
    """Yield the lines of a TSV file as dicts, read as the corpus's script does."""
    with open(path, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(
            stream, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"
        )
        there = reader.fieldnames or []
        missing = [name for name in columns if name not in there]
        if missing:
            raise ValueError(
                f"{path}: no column {', '.join(missing)}; found "
                f"{', '.join(there)}. Is it the right file?"
            )
        yield from reader


def split_of(name):
    """Return which of our splits a split of the corpus belongs to, or None."""
    for split, names in SPLITS.items():
        if name in names:
            return split
    return None


def read_lines(validated, files, source, left_out):
    """Return `{clip: [split, row]}` of the utterances with a translation."""
    found = {}
    for target, paths in files.items():
        seen = set()
        for path in paths:
            # Its name tells the split, where the file holds only one.
            of = path.name.split(".")[2] if len(paths) > 1 else None
            needed = ("path", "translation") + (() if of else ("split",))
            for line in read_table(path, needed):
                clip, split = line["path"], split_of(of or line["split"])
                if clip in seen:
                    raise ValueError(
                        f"{path}: clip {clip} stands there twice; expected "
                        "one line for each. Unpack it again"
                    )
                seen.add(clip)
                if split is None:
                    left_out["of no split"] += 1
                    continue
                row = found.setdefault(clip, [split, {}])
                if row[0] != split:
                    raise ValueError(
                        f"{path}: clip {clip} is in {split}, and in {row[0]} "
                        "for another target; train on one of these at a time"
                    )
                row[1][f"text_{target}"] = " ".join(line["translation"].split())
    lines = {}
    for line in read_table(validated, ("client_id", "path", "sentence")):
        clip = line["path"]
        if clip in found and clip not in lines:
            split, texts = found[clip]
            own = {
                "ID": Path(clip).stem,
                "spk_id": line["client_id"],
                "lang": source,
                "text": " ".join(line["sentence"].split()),
            }
            none = {f"text_{target}": "" for target in files}
            lines[clip] = [split, own | none | texts]
    absent = len(found) - len(lines)
    if absent:
        left_out[f"not in {VALIDATED}"] += absent
    return lines


def add_audio(lines, folder, max_seconds, skip_bad, left_out):
    """Yield split and row of the utterances that can be used."""
    for clip, (split, row) in progress(lines.items(), desc="CoVoST 2"):
        path = folder / "clips" / clip
        try:
            seconds = check_line(row, path)
        except (ValueError, FileNotFoundError) as error:
            if not skip_bad:
                raise
            logger.warning(f"left out: {error}")
            left_out[str(error).split(": ", 1)[1].split(";")[0]] += 1
            continue
        if split == "train" and seconds > max_seconds:
            left_out[f"longer than {max_seconds:g} s"] += 1
            continue
        # Path and duration where SpeechBrain's manifests have them.
        about = {"ID": row.pop("ID"), "duration": round(seconds, 4)}
        yield split, about | {"wav": str(path.resolve())} | row


def check_line(row, path):
    """Return an utterance's duration; refuse what cannot be used."""
    ID = row["ID"]
    if not row["text"]:
        raise ValueError(
            f"utterance {ID!r}: empty transcript; {VALIDATED}. {_REMEDY}"
        )
    if not any(text for name, text in row.items() if name[:5] == "text_"):
        raise ValueError(f"utterance {ID!r}: empty translation; {_REMEDY}")
    if not path.is_file():
        raise FileNotFoundError(
            f"utterance {ID!r}: no recording; expected {path}. {_REMEDY}"
        )
    try:
        seconds = audio_io.info(str(path)).duration
    except RuntimeError as error:
        raise ValueError(
            f"utterance {ID!r}: unreadable recording; {path}: {error}. "
            f"{_REMEDY}"
        ) from None
    if not seconds > 0:
        raise ValueError(
            f"utterance {ID!r}: empty recording; {path}. {_REMEDY}"
        )
    return seconds


def is_prepared(marker, options):
    """Tell whether these options have been prepared already."""
    written = [marker, *(marker.parent / f"{split}.csv" for split in SPLITS)]
    if not all(path.is_file() for path in written):
        return False
    return read_json(marker) == options
