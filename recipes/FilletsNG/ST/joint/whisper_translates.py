#!/usr/bin/env python3
"""A row of the study's table: what Whisper itself translates into English.

Whisper learned to translate speech into English before anything was trained here,
so whoever has it may need no other model. It hears its usual 30 seconds, is told the
language of each utterance, and searches with a beam of 5, as the other rows do:
seven seconds of a slow core for an utterance (`--beam_size 1`: two).

> python whisper_translates.py results/joint/0 --prepared_folder \
>     results/joint/prepared --whisper_hub openai/whisper-base
> python study.py hparams/train.yaml --data_folder . --seed 0 --targets [en]

The second command writes the table with it. Start a killed run again by the same
command: it begins anew.
"""

import argparse
from pathlib import Path

from common.rows import load_rows
from report import WHISPER
from transformers import pipeline

from speechbrain_taskarith.data import read_audio
from speechbrain_taskarith.metrics import translation_scores
from speechbrain_taskarith.utils.files import write_json
from speechbrain_taskarith.utils.progress import progress

RATE = 16000
TARGET = "text_en"


def read_rows(path, prepared_folder, languages):
    """Read the utterances that have an English translation, by their ID."""
    rows = load_rows(path, prepared_folder)
    there = set(next(iter(rows.values()), {}))
    if missing := {"lang", "wav", TARGET} - there:
        raise ValueError(
            f"{path}: no column {', '.join(sorted(missing))}; Whisper translates "
            f"into English only, and is told the language of each utterance"
        )
    found = {
        ID: row
        for ID, row in rows.items()
        if row["lang"] in languages and row[TARGET].strip()
    }
    if not found:
        raise ValueError(f"{path}: no translated utterance of {languages}")
    return found


def translate(rows, whisper_hub, beam_size=5, show_progress=True):
    """Return `[[ID, reference, translation], ...]`."""
    listen = pipeline("automatic-speech-recognition", whisper_hub)
    lines = []
    for ID, row in progress(rows.items(), show_progress=show_progress):
        speech = read_audio(row["wav"], RATE, resample=True).numpy()
        told = {"language": row["lang"], "task": "translate"}
        told["num_beams"] = beam_size
        said = listen(speech, generate_kwargs=told)["text"]
        lines.append([ID, row[TARGET], said.strip()])
    return sorted(lines)


def main(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study_folder", type=Path)
    parser.add_argument("--prepared_folder", type=Path, required=True)
    parser.add_argument("--whisper_hub", default="openai/whisper-base")
    parser.add_argument("--languages", nargs="+", default=["cs", "nl"])
    parser.add_argument("--beam_size", type=int, default=5)
    given = parser.parse_args(arguments)
    path = given.prepared_folder / "test.csv"
    rows = read_rows(path, given.prepared_folder, given.languages)
    lines = translate(rows, given.whisper_hub, given.beam_size)
    scores = translation_scores(*zip(*(line[1:] for line in lines)))
    print(scores)
    write_json(
        given.study_folder / "rows" / f"{WHISPER}.json",
        {
            "scores": {
                "BLEU": scores.bleu,
                "chrF": scores.chrf,
                "length_ratio": scores.length_ratio,
            },
            "translations": lines,
            "bleu_signature": scores.bleu_signature,
            "chrf_signature": scores.chrf_signature,
            "parameters": 0,
            "left_out": {},
            "task_weights": [],
            "entropy": {},
            "seconds": 0.0,
            "cpu_seconds": 0.0,
            "epochs": [],
            "updates": 0,
        },
    )


if __name__ == "__main__":
    main()
