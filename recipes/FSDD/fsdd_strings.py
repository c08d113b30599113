#!/usr/bin/env python3
"""Write strings of digits (FSDD) as audio files with manifests.

For recipes that take any manifest: `train.csv`, `valid.csv` and `test.csv`
with the columns ID, duration, wav, spk_id, lang, text. The recordings of the
three are not the same ones (see fsdd_prepare.py), each string is spoken by one
speaker, and the same command writes the same samples.

> python fsdd_strings.py /path/to/free-spoken-digit-dataset corpus/digits
"""

import argparse
import csv
import sys
from pathlib import Path

from common.digits import DigitStringLoader, make_digit_strings
from fsdd_prepare import prepare_fsdd

from speechbrain_taskarith.data import read_manifest, write_audio
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.progress import progress

RATE = 16000
COLUMNS = ["ID", "duration", "wav", "spk_id", "lang", "text"]


def write_strings(data_folder, folder, counts, n_words=(3, 5), longest=5.0):
    """Write the strings of each split; `counts`: `{split: strings}`.

    Strings longer than `longest` seconds are left out.
    """
    folder = Path(folder).resolve()
    prepare_fsdd(data_folder, str(folder / "takes"))
    join = DigitStringLoader(RATE)
    for split, count in counts.items():
        (folder / "audio" / split).mkdir(parents=True, exist_ok=True)
        strings = make_digit_strings(
            read_manifest(folder / "takes" / f"{split}.csv", check="none"),
            count,
            n_words=n_words,
            prefix=f"digits-{split}",
        )
        rows = []
        for key, item in progress(strings.items(), desc=f"strings: {split}"):
            if item["duration"] > longest:
                continue
            wave = join(item["wavs"], item["gaps"])
            name = f"audio/{split}/{key}.flac"
            write_audio(folder / name, wave, RATE)
            rows.append(
                {
                    "ID": key,
                    "duration": round(len(wave) / RATE, 4),
                    "wav": f"$data_root/{name}",
                    "spk_id": item["spk_id"],
                    "lang": "en",
                    "text": item["wrd"].lower(),
                }
            )
        with atomic_write(folder / f"{split}.csv", "w") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"{folder / split}.csv: {len(rows)} of {count} strings")


def main(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data_folder", help="clone of FSDD, or its manifest's")
    parser.add_argument("folder", help="where the manifests and audio/ go")
    parser.add_argument("--train", type=int, default=600, help="strings")
    parser.add_argument("--valid", type=int, default=150)
    parser.add_argument("--test", type=int, default=240)
    parser.add_argument("--longest", type=float, default=5.0, help="seconds")
    given = parser.parse_args(arguments)
    counts = {split: vars(given)[split] for split in ("train", "valid", "test")}
    try:
        write_strings(
            given.data_folder, given.folder, counts, longest=given.longest
        )
    except (OSError, ValueError) as error:
        sys.exit(f"fsdd_strings.py: {error}")


if __name__ == "__main__":
    main()
