#!/usr/bin/env python3
"""Speak a manifest's texts with espeak-ng: the synthetic side of a corpus.

Every text is spoken `--takes` times, each time by another variant of the
voice, at another speed and pitch; which ones follows from the utterance's ID
and `--seed`, so that the same command writes the same samples. Speech from any
other engine is used in the same way: a folder with a manifest that has the
columns ID, duration, wav, text, lang.

> python synthesize.py corpus/nl_train.csv synthetic/nl --voice nl
"""

import argparse
import csv
import hashlib
import random
import sys
from pathlib import Path

from common.rows import load_rows

from speechbrain_taskarith.data import EspeakVoice, read_audio, write_audio
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.progress import progress

# Variants that speak clearly; the others whisper, croak or are robots.
VARIANTS = [
    *(f"m{n}" for n in range(1, 9)),
    *(f"f{n}" for n in range(1, 6)),
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Hugo"),
    *("Marco", "Michael", "Mike", "adam", "anika", "antonio", "belinda"),
    *("benjamin", "david", "edward", "linda", "max", "paul", "steph"),
]
COLUMNS = ["ID", "duration", "wav", "spk_id", "lang", "text"]


def choose_voice(voice, key, seed=0):
    """Return the voice that speaks an utterance, and its name."""
    draw = random.Random(f"{seed}/{key}")
    variant = draw.choice(VARIANTS)
    settings = {
        "rate": draw.randint(140, 210),
        "pitch": draw.randint(30, 70),
        "pitch_range": draw.randint(35, 65),
    }
    return EspeakVoice(voice, variant, **settings), f"{voice}+{variant}"


def synthesize(manifest, folder, voice, takes=1, seed=0, show_progress=True):
    """Speak all texts of a manifest; returns the new manifest's path.

    What a killed run has spoken is kept.
    """
    folder = Path(folder)
    rows = load_rows(manifest, "", ["text"])
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    spoken = []
    for ID, row in progress(
        rows.items(), desc=f"speaking {voice}", show_progress=show_progress
    ):
        for take in range(takes):
            key = f"{ID}-{take}" if takes > 1 else ID
            said, speaker = choose_voice(voice, key, seed)
            # Named by what is said how, too: anything else is spoken anew.
            digest = hashlib.sha256(f"{said!r}/{row['text']}".encode())
            name = f"audio/{key}_{digest.hexdigest()[:8]}.flac"
            if not (folder / name).exists():
                write_audio(folder / name, said(row["text"]), 16000)
            length = len(read_audio(folder / name, 16000))
            spoken.append(
                {
                    "ID": key,
                    "duration": round(length / 16000, 4),
                    "wav": f"$data_root/{name}",
                    "spk_id": speaker,
                    "lang": row.get("lang") or voice.split("-")[0],
                    "text": row["text"],
                }
            )
    path = folder / "manifest.csv"
    with atomic_write(path, "w") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(spoken)
    return path


def main(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("manifest", help="CSV with ID and text")
    parser.add_argument("folder", help="where manifest.csv and audio/ go")
    parser.add_argument("--voice", required=True, help="nl, cs, en-us, ...")
    parser.add_argument("--takes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args(arguments))
    try:
        print(synthesize(**given))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"synthesize.py: {error}")


if __name__ == "__main__":
    main()
