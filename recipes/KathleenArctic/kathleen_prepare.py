"""
Data preparation for the CMU ARCTIC prompts read by Kathleen.

Download: https://github.com/rhasspy/dataset-voice-kathleen
(1,132 English sentences of one US speaker, about one hour, CC0)

    python kathleen_prepare.py DATA SAVE

Takes a folder with `manifest.csv` (columns
`ID,duration,wav,spk_id,wrd,split,raw_text`; `$data_root` in paths stands for
that folder). The sentences of ARCTIC come in two parts, a (593) and b (539),
from other books: two domains. Splits are by sentence number: one ending in 0
is test, in 5 valid, all others train.
"""

import os
import re

from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import (
    read_audio,
    read_manifest,
    write_audio,
    write_manifest,
)

logger = get_logger(__name__)

SPLITS = ("train", "valid", "test")
_PROMPT = re.compile(r"arctic_([ab])(\d{4})")


def prepare_kathleen(data_folder, save_folder, part=None, skip_prep=False):
    """Prepares manifests of ARCTIC, all of it and by part."""
    if skip_prep:
        return
    manifest = os.path.join(data_folder, "manifest.csv")
    rows = []
    for row in read_manifest(manifest, sample_rate=16000):
        domain, number = _PROMPT.search(row.ID).groups()
        if part in (None, domain):
            rows.append(
                {
                    "ID": row.ID,
                    "duration": row.duration,
                    "wav": _converted(row.wav, row.ID, save_folder),
                    "spk_id": row.spk_id,
                    "lang": "en",
                    "domain": domain,
                    "wrd": row.wrd,
                    "text": row.extra["raw_text"],
                    "split": split_of(int(number)),
                }
            )
            if row.split != split_of(int(number)):
                raise ValueError(f"{manifest}: {row.ID} split {row.split}")
    for split in SPLITS:
        chosen = [
            {k: v for k, v in row.items() if k != "split"}
            for row in rows
            if row["split"] == split
        ]
        write_manifest(
            os.path.join(save_folder, f"{split}.csv"), chosen, save_folder
        )
        for domain in sorted({row["domain"] for row in rows}):
            write_manifest(
                os.path.join(save_folder, f"{domain}_{split}.csv"),
                [row for row in chosen if row["domain"] == domain],
                save_folder,
            )


def split_of(number):
    """Return the split of a sentence by its number."""
    return {0: "test", 5: "valid"}.get(number % 10, "train")


def _converted(source, ID, save_folder):
    target = os.path.join(os.path.abspath(save_folder), "audio", f"{ID}.flac")
    if not os.path.isfile(target):
        write_audio(target, read_audio(source, 16000, resample=True), 16000)
    return target
