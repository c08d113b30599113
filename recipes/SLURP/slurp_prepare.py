"""
Data preparation for SLURP.

Texts: https://github.com/pswietojanski/slurp
Recordings: https://zenodo.org/records/4274930 (slurp_real.tar.gz)

Takes a folder with the texts of the repository and the unpacked recordings:

    dataset/slurp/{train,devel,test}.jsonl    a sentence a line
    dataset/slurp/metadata.json               who spoke (optional)
    slurp_real/*.flac                         or audio/slurp_real/*.flac

A line has `slurp_id`, `sentence`, `scenario` and `recordings`, a list of
`{"file", "wer", "status"}`. The 18 scenarios are the domains. Writes
`<scenario>_{train,valid,test}.csv`, and `<scenario>_texts.csv` with each
training text once, for synthetic speech.
"""

import csv
import hashlib
import json
import os
from dataclasses import dataclass
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

SPLITS = {"train": "train", "valid": "devel", "test": "test"}
OPTIONS_FILE = "slurp_prepare.json"
COLUMNS = ["ID", "duration", "wav", "spk_id", "lang", "scenario", "text"]
SCENARIOS = 18


@dataclass(frozen=True)
class Sentence:
    """One line of the corpus."""

    ID: str
    text: str
    scenario: str
    files: tuple


def prepare_slurp(data_folder, save_folder, held_out=0.1, skip_prep=False):
    """
    Prepares the manifests of SLURP, by scenario.

    Arguments
    ---------
    data_folder : str
        Holds `dataset/slurp` and `slurp_real`.
    save_folder : str
        Where the CSV files go.
    held_out : float
        Share of the speakers who are left out of training and validation, so
        that the test has speakers whom no model has heard; 0: none, as the
        corpus has it. Needs `metadata.json`.
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        A file of texts, or a recording that they name, is missing.
    ValueError
        A line that cannot be read, a scenario without training sentences.

    Example
    -------
    >>> prepare_slurp('/path/to/SLURP', 'results/prepared')  # doctest: +SKIP
    """
    if skip_prep:
        return
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out {held_out}: expected 0 to less than 1")
    texts = Path(data_folder) / "dataset" / "slurp"
    metadata = texts / "metadata.json"
    paths = [texts / f"{name}.jsonl" for name in SPLITS.values()]
    options = {
        "folder": str(Path(data_folder).resolve()),
        "held_out": held_out,
        "texts": [
            sha256_of(path) for path in (*paths, metadata) if path.is_file()
        ],
    }
    marker = Path(save_folder) / OPTIONS_FILE
    if marker.is_file() and read_json(marker) == options:
        logger.info(f"{save_folder}: already prepared, nothing to do")
        return
    # An interrupted preparation must not look finished.
    marker.unlink(missing_ok=True)
    speakers = read_speakers(metadata)
    audio = audio_folder(data_folder)
    for split, path in zip(SPLITS, paths):
        sentences = read_sentences(path)
        rows = recordings(sentences, audio, speakers)
        if split != "test":
            rows = [r for r in rows if not is_held_out(r["spk_id"], held_out)]
        by_scenario = {sentence.scenario: [] for sentence in sentences}
        for row in rows:
            by_scenario[row["scenario"]].append(row)
        if split == "train":
            scenarios = sorted(by_scenario)
            write_texts(sentences, save_folder)
        odd = set(by_scenario) - set(scenarios)
        if odd:
            raise ValueError(
                f"{path}: the scenario {min(odd)!r} has no line in "
                f"{paths[0]}; fetch the texts again"
            )
        for scenario in scenarios:
            write_rows(
                Path(save_folder, f"{scenario}_{split}.csv"),
                by_scenario.get(scenario, []),
            )
        hours = sum(row["duration"] for row in rows) / 3600
        logger.info(
            f"{split}: {len(sentences)} sentences, {len(rows)} recordings, "
            f"{hours:.2f} hours"
        )
    if len(scenarios) != SCENARIOS:
        logger.warning(
            f"{data_folder}: {len(scenarios)} scenarios; SLURP has {SCENARIOS}"
        )
    # Last: it says that all other files are complete.
    write_json(marker, options)


def scenarios_of(save_folder):
    """Return the scenarios that were prepared, sorted."""
    suffix = "_texts.csv"
    names = sorted(p.name for p in Path(save_folder).glob(f"*{suffix}"))
    return [name.removesuffix(suffix) for name in names]


def audio_folder(data_folder):
    """Return the folder of the recordings."""
    for name in ("slurp_real", "audio/slurp_real"):
        if (Path(data_folder) / name).is_dir():
            return Path(data_folder) / name
    raise FileNotFoundError(
        f"{data_folder}: no folder slurp_real or audio/slurp_real; unpack "
        "slurp_real.tar.gz of https://zenodo.org/records/4274930 there"
    )


def read_speakers(path):
    """Read who spoke: `{recording's file: speaker}`; empty without metadata."""
    if not path.is_file():
        logger.warning(
            f"{path}: missing, so nobody knows who spoke; no speaker is held "
            "out, and results for unheard speakers are left out"
        )
        return {}
    with open(path, encoding="utf-8") as stream:
        entries = json.load(stream)
    return {
        file: about["usrid"]
        for entry in entries.values()
        for file, about in entry["recordings"].items()
    }


def is_held_out(speaker, share):
    """Tell whether a speaker is kept for testing; the same on all machines."""
    if not speaker:
        return False
    digest = hashlib.sha256(speaker.encode("utf-8")).hexdigest()
    return int(digest, 16) % 10000 < share * 10000


def read_sentences(path):
    """Read the lines of a split as `Sentence`s."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; expected the texts of "
            "https://github.com/pswietojanski/slurp"
        )
    sentences = []
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                entry = json.loads(line)
                sentence = Sentence(
                    str(entry["slurp_id"]),
                    " ".join(entry["sentence"].split()),
                    entry["scenario"],
                    tuple(r["file"] for r in entry["recordings"]),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected JSON with slurp_id, "
                    f"sentence, scenario and recordings ({error!r})"
                ) from error
            if not sentence.text:
                raise ValueError(f"{path}, line {number}: empty sentence")
            sentences.append(sentence)
    return sentences


def recordings(sentences, audio, speakers):
    """Return a row for each recording."""
    missing = [
        file
        for sentence in sentences
        for file in sentence.files
        if not (audio / file).is_file()
    ]
    if missing:
        raise FileNotFoundError(
            f"{audio}: {len(missing)} recordings are missing, e.g. {missing[0]}; "
            "unpack slurp_real.tar.gz again"
        )
    rows = []
    for sentence in progress(sentences, desc="recordings"):
        for file in sentence.files:
            path = (audio / file).resolve()
            rows.append(
                {
                    "ID": path.stem,
                    "duration": round(audio_io.info(str(path)).duration, 4),
                    "wav": str(path),
                    "spk_id": speakers.get(file, ""),
                    "lang": "en",
                    "scenario": sentence.scenario,
                    "text": sentence.text,
                }
            )
    return rows


def write_texts(sentences, folder):
    """Write each text of a scenario once."""
    texts = {}
    for sentence in sentences:
        own = texts.setdefault(sentence.scenario, {})
        own.setdefault(sentence.text, sentence.ID)
    for scenario, own in texts.items():
        rows = [
            {"ID": f"{scenario}-{ID}", "lang": "en", "text": text}
            for text, ID in own.items()
        ]
        write_rows(
            Path(folder, f"{scenario}_texts.csv"), rows, ["ID", "lang", "text"]
        )


def write_rows(path, rows, columns=COLUMNS):
    """Write a CSV file, whole or not at all."""
    os.makedirs(path.parent, exist_ok=True)
    with atomic_write(path, "w") as stream:
        writer = csv.DictWriter(
            stream, columns, lineterminator="\n", extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(rows)
    return path
