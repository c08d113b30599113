"""
Data preparation for the CMU ARCTIC sentences read by Kathleen.

Download: https://github.com/rhasspy/dataset-voice-kathleen
(1,132 English sentences of one US speaker, about one hour, CC0)

    python kathleen_prepare.py DATA SAVE

Takes a clone of that repository (`data/arctic_a0001_<time>.wav` and `.txt`,
several takes of some sentences, and `cmuarctic.data`), or a folder with a
`manifest.csv` in the columns `ID,duration,wav,spk_id,wrd,raw_text`
(`$data_root` in paths stands for that folder).

The sentences come in two parts, a (593) and b (539): two domains. Splits are
by sentence number: those that end in 0 are test, in 5 valid, others train.
"""

import argparse
import collections
import hashlib
import json
import logging
import os
import re
from pathlib import Path

from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import read_manifest
from speechbrain_taskarith.data.preparation import (
    check_disk,
    convert_recording,
    list_files,
    needs_preparation,
    words_of,
    write_prepared,
)
from speechbrain_taskarith.utils.files import sha256_of
from speechbrain_taskarith.utils.progress import progress

logger = get_logger(__name__)

SAMPLE_RATE = 16000
SENTENCES = 1132
SPEAKER = "kathleen"
VERSION = 1
_TAKE = re.compile(r"(arctic_[ab]\d{4})_(\d+)")
_SENTENCE = re.compile(r"arctic_([ab])(\d{4})")
_PROMPT = re.compile(r'^\(\s*(arctic_\w+)\s+"(.*)"\s*\)\s*$', re.M)


def prepare_kathleen(data_folder, save_folder, part=None, skip_prep=False):
    """
    Prepares manifests and 16 kHz recordings of ARCTIC by Kathleen.

    Writes `{train,valid,test}.csv` and `{a,b}_{train,valid,test}.csv`,
    columns `ID,duration,wav,spk_id,lang,domain,wrd,text`; `audio/<ID>.flac`;
    `prepared.json`, with counts and hashes. What a killed run has converted
    is not converted again.

    Arguments
    ---------
    data_folder : str
        A clone of the repository, or a folder with a `manifest.csv`.
    save_folder : str
        Where everything is written; `$data_root` in the manifests.
    part : str
        `"a"` or `"b"`; None for both.
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        There is no such corpus, or a recording or its text is missing.
    ValueError
        A recording that cannot be read or that `SHA256SUMS` tells to be
        another one, a file without text, or a manifest that was changed
        since it was written.

    Example
    -------
    >>> prepare_kathleen('/path/to/clone', 'results/arctic')  # doctest: +SKIP
    """
    if skip_prep:
        return
    if part not in (None, "a", "b"):
        raise ValueError(f"part={part!r}: expected 'a', 'b' or None for both")
    data, save = Path(data_folder), Path(save_folder)
    check_sums(data)
    found = read_sentences(data)
    options = {
        "version": VERSION,
        "part": part,
        "recordings": list_files(wav for wav, _ in found.values()),
        "texts": hashlib.sha256(
            json.dumps(sorted(found.items())).encode()
        ).hexdigest(),
    }
    if not needs_preparation(save, options):
        logger.info(f"{save}: already prepared, nothing to do")
        return
    if len(found) != SENTENCES:
        logger.warning(
            f"{data}: {len(found)} sentences, expected {SENTENCES}. Is the "
            "copy whole?"
        )
    save.mkdir(parents=True, exist_ok=True)
    check_disk(save, sum(os.path.getsize(wav) for wav, _ in found.values()))
    rows = []
    for key in progress(sorted(found), desc="ARCTIC", unit="line"):
        domain, number = _SENTENCE.fullmatch(key).groups()
        if part in (None, domain):
            row = _row(key, domain, *found[key], save)
            rows.append((split_of(int(number)), row))
    speakers = {"speakers": "spk_id"}
    table = write_prepared(save, options, rows, "domain", speakers)
    logger.info(f"{save}:\n{table}")


def split_of(number):
    """Return the split of a sentence by its number.

    Example
    -------
    >>> [split_of(n) for n in (540, 1, 35)]
    ['test', 'train', 'valid']
    """
    return {0: "test", 5: "valid"}.get(number % 10, "train")


def read_sentences(data):
    """Return `{sentence: (recording, text)}`, one take of each."""
    if (data / "manifest.csv").is_file():
        return _read_manifest(data)
    if (data / "cmuarctic.data").is_file() and (data / "data").is_dir():
        return _read_clone(data)
    raise FileNotFoundError(
        f"{data}: neither manifest.csv nor cmuarctic.data and data. Expected "
        "a clone of https://github.com/rhasspy/dataset-voice-kathleen"
    )


def _read_manifest(data):
    path = data / "manifest.csv"
    found = {}
    for row in read_manifest(path):
        key = _SENTENCE.search(row.ID)
        if key is None or key[0] in found:
            raise ValueError(
                f"{path}: ID {row.ID!r}; expected one row for each sentence, "
                "with its name (arctic_a0001) in the ID"
            )
        text = row.extra.get("raw_text", "").strip()
        if not words_of(text):
            raise ValueError(
                f"{path}: ID {row.ID!r} has no raw_text. Expected the "
                "sentence as written, with punctuation"
            )
        found[key[0]] = (row.wav, text)
    return found


def _read_clone(data):
    """Return the last take of each sentence that has that sentence's text.

    One take holds the sentence before its own.
    """
    path = data / "cmuarctic.data"
    prompts = dict(_PROMPT.findall(path.read_text(encoding="utf-8")))
    owner = {words_of(text): key for key, text in prompts.items()}
    takes = collections.defaultdict(list)
    for wav in sorted((data / "data").glob("*.wav")):
        match = _TAKE.fullmatch(wav.stem)
        if match is None:
            raise ValueError(
                f"{wav}: expected a name as arctic_a0001_1592748600.wav. "
                "Rename it or move it away"
            )
        takes[match[1]].append((int(match[2]), wav))
    found = {}
    for key, several in takes.items():
        for _, wav in sorted(several):
            text = _text_of(wav)
            if owner.get(words_of(text), key) == key:
                found[key] = (str(wav), text)
    if not found:
        raise FileNotFoundError(
            f"{data / 'data'}: no recordings. Expected a whole clone: git "
            "checkout -- data"
        )
    return found


def _text_of(wav):
    path = wav.with_suffix(".txt")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; it holds what is said in {wav.name}. Restore "
            "it: git checkout -- data"
        )
    text = " ".join(path.read_text(encoding="utf-8").split())
    if not words_of(text):
        raise ValueError(f"{path}: no words. Restore it: git checkout -- data")
    return text


def check_sums(data):
    """Compare the files with `SHA256SUMS`, where there is one."""
    path = data / "SHA256SUMS"
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition(" ")
        file = data / name.strip().lstrip("*")
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: missing, but named in {path}. Copy it again"
            )
        if sha256_of(file) != digest:
            raise ValueError(
                f"{file}: another content than {path} tells. Copy it again"
            )


def _row(key, domain, wav, text, save):
    ID = f"kath_{key}"
    target = save / "audio" / f"{ID}.flac"
    return {
        "ID": ID,
        "duration": round(convert_recording(wav, target, SAMPLE_RATE), 4),
        "wav": str(target),
        "spk_id": SPEAKER,
        "lang": "en",
        "domain": domain,
        "wrd": words_of(text),
        "text": text,
    }


def main():
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description="Prepare ARCTIC by Kathleen.")
    parser.add_argument("data_folder", help="a clone of the repository")
    parser.add_argument("save_folder", help="where everything is written")
    parser.add_argument("--part", choices=["a", "b"], help="one part only")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_kathleen(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
