"""
Data preparation for the Mboshi-French parallel corpus.

Download: https://github.com/besacier/mboshi-french-parallel-corpus

Takes a clone (or its folder `full_corpus_newsplit`):

    full_corpus_newsplit/
        train/<ID>.wav  <ID>.mb.cleaned  <ID>.fr      4,616 utterances, 4.0 h
        dev/<ID>.wav    <ID>.mb.cleaned  <ID>.fr        514 utterances, 0.4 h

and writes `train.csv`, `valid.csv` and `test.csv`. `test.csv` is the corpus's
`dev`, which shares no sentence with its `train`. `valid.csv` is every tenth
sentence of `train`, by a hash of the transcript: it shares none with the rest
of `train` either.
"""

import collections
import hashlib
import os
from pathlib import Path

from speechbrain.dataio import audio_io
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import Recording, write_manifest
from speechbrain_taskarith.utils.files import read_json, write_json
from speechbrain_taskarith.utils.progress import progress

logger = get_logger(__name__)

CORPUS = "full_corpus_newsplit"
SPLITS = ("train", "valid", "test")
OPTIONS_FILE = "mboshi_prepare.json"
TRANSCRIPT, TRANSLATION = ".mb.cleaned", ".fr"
VERSION = 1


def prepare_mboshi(
    data_folder,
    save_folder,
    valid_one_in=10,
    skip_bad=False,
    skip_prep=False,
):
    """
    Prepares `train.csv`, `valid.csv` and `test.csv` of Mboshi-French.

    Columns `ID,duration,wav,spk_id,wrd,accent,split,translation`. `wrd` is the
    corpus's cleaned transcript (lower case, no punctuation), `translation`
    its French sentence in lower case, not tokenised.

    Arguments
    ---------
    data_folder : str
        The clone, or `full_corpus_newsplit` in it.
    save_folder : str
        Where the CSV files go.
    valid_one_in : int
        Every so many-th sentence of `train` is validation data.
    skip_bad : bool
        True: skip an utterance without wav, transcript or translation, and
        log it. False: raise an error.
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        No such corpus there, or a file of an utterance is missing.
    ValueError
        A file of an utterance is empty or cannot be read; a split is empty.

    Example
    -------
    >>> prepare_mboshi('/path/to/mboshi', 'results/prepared')  # doctest: +SKIP
    """
    if skip_prep:
        return
    folder = corpus_folder(data_folder)
    options = {
        "version": VERSION,
        "folder": str(folder),
        "files": {name: _listing(folder / name) for name in ("train", "dev")},
        "valid_one_in": valid_one_in,
        "skip_bad": skip_bad,
    }
    marker = os.path.join(save_folder, OPTIONS_FILE)
    if _is_prepared(save_folder, options):
        logger.info(f"{save_folder}: already prepared, nothing to do")
        return
    # An interrupted preparation must not look finished.
    if os.path.exists(marker):
        os.unlink(marker)
    splits = {name: [] for name in SPLITS}
    left_out = collections.Counter()
    for name in ("train", "dev"):
        for row in read_split(folder / name, skip_bad, left_out):
            split = "test" if name == "dev" else "train"
            if split == "train" and is_valid(row.wrd, valid_one_in):
                split = "valid"
            splits[split].append(row)
    for reason, count in left_out.items():
        logger.warning(f"{count} utterance(s) left out: {reason}")
    for split, rows in splits.items():
        hours = sum(row.duration for row in rows) / 3600
        logger.info(f"{split}: {len(rows)} utterances, {hours:.2f} hours")
        if not rows:
            raise ValueError(
                f"{folder}: no utterance for {split}.csv; expected the whole "
                "corpus (5,130 utterances)"
            )
        write_manifest(os.path.join(save_folder, f"{split}.csv"), rows)
    # Last: it says that all other files are complete.
    write_json(marker, options)


def corpus_folder(data_folder):
    """Return the folder that holds `train` and `dev`."""
    for folder in (Path(data_folder) / CORPUS, Path(data_folder)):
        if (folder / "train").is_dir() and (folder / "dev").is_dir():
            return folder
    raise FileNotFoundError(
        f"{data_folder}: no folder {CORPUS} with train and dev; expected a "
        "clone of https://github.com/besacier/mboshi-french-parallel-corpus"
    )


def is_valid(transcript, one_in):
    """Tell whether a sentence of `train` is validation data.

    The transcript is hashed, not the ID: some sentences were read twice.

    Example
    -------
    >>> is_valid("kyéma yeékirá ikóó", 1)
    True
    """
    digest = hashlib.sha256(transcript.encode("utf-8")).hexdigest()
    return int(digest, 16) % one_in == 0


def read_split(folder, skip_bad=False, left_out=None):
    """Return the utterances of a folder, sorted by ID.

    The Counter `left_out` counts the reasons why utterances were skipped.
    """
    # Any of its three files makes an utterance.
    ids = {
        path.name[: -len(suffix)]
        for suffix in (".wav", TRANSCRIPT, TRANSLATION)
        for path in folder.glob(f"*{suffix}")
    }
    rows = []
    for ID in progress(sorted(ids), desc=f"Mboshi {folder.name}"):
        try:
            rows.append(_recording(folder, ID))
        except (ValueError, FileNotFoundError) as error:
            if not skip_bad:
                raise
            reason = str(error).split(": ", 1)[1].split(";")[0]
            logger.warning(f"left out: {error}")
            if left_out is not None:
                left_out[reason] += 1
    return rows


def _recording(folder, ID):
    wav = folder / f"{ID}.wav"
    if not wav.is_file():
        raise FileNotFoundError(
            f"utterance {ID!r}: no recording; expected {wav}. {_REMEDY}"
        )
    transcript = _text(folder, ID, TRANSCRIPT, "transcript")
    translation = _text(folder, ID, TRANSLATION, "translation")
    try:
        seconds = audio_io.info(str(wav)).duration
    except Exception as error:
        raise ValueError(
            f"utterance {ID!r}: unreadable recording; {wav}: {error}. {_REMEDY}"
        ) from None
    if not seconds > 0:
        raise ValueError(f"utterance {ID!r}: empty recording; {wav}. {_REMEDY}")
    return Recording(
        ID=ID,
        duration=round(seconds, 3),
        wav=str(wav),
        spk_id=ID.split("_")[0],
        wrd=transcript,
        split=folder.name,
        extra={"translation": translation.replace("’", "'")},
    )


_REMEDY = (
    "Download the corpus again, or pass skip_bad=True to skip such utterances"
)


def _text(folder, ID, suffix, what):
    path = folder / f"{ID}{suffix}"
    if not path.is_file():
        raise FileNotFoundError(
            f"utterance {ID!r}: no {what}; expected {path}. {_REMEDY}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"utterance {ID!r}: {what} is not UTF-8; {path}. {_REMEDY}"
        ) from None
    text = " ".join(text.split()).lower()
    if not text:
        raise ValueError(f"utterance {ID!r}: empty {what}; {path}. {_REMEDY}")
    return text


def _listing(folder):
    """Return a hash of the names, sizes and times of all files."""
    digest = hashlib.sha256()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stat = entry.stat()
        line = f"{entry.name} {stat.st_size} {stat.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _is_prepared(save_folder, options):
    """Tell whether these options have been prepared already."""
    path = os.path.join(save_folder, OPTIONS_FILE)
    written = [f"{split}.csv" for split in SPLITS]
    if not os.path.isfile(path) or not all(
        os.path.isfile(os.path.join(save_folder, name)) for name in written
    ):
        return False
    return read_json(path) == options
