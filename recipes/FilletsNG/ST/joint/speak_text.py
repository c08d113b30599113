#!/usr/bin/env python3
"""Speak parallel text with espeak-ng: a corpus for train.py of any size.

Each line of a file is a sentence and its translations, with tabs between them.
Voices, speeds and pitches change from sentence to sentence, by the sentence's
number and `--seed`; the same command writes the same samples.

> python speak_text.py spoken --source en --targets de --voice en-us \
>     --train train.tsv --valid valid.tsv --test test.tsv
> python study.py hparams/train.yaml --prepare null --data_folder spoken \
>     --prepared_folder spoken --languages null --targets [de]

`--spoken 6000` speaks the first so many training sentences. The others go to
text.csv, for the text models: `--more_text spoken/text.csv`.

Without `--valid` and `--test`, a twentieth of the sentences each is taken for
them, by the hash of the sentence: no sentence is in two splits. Start a killed
run again by the same command: what it has spoken is kept.
"""

import argparse
import collections
import hashlib
import sys
from pathlib import Path

from synthesize import choose_voice

from speechbrain_taskarith.data import (
    read_audio,
    write_audio,
    write_manifest,
)
from speechbrain_taskarith.utils.progress import progress

RATE = 16000
# Characters of a second: batches are made by duration, of what is not spoken too
PACE = 15
SPLITS = ("train", "valid", "test")


def read_lines(path, columns, skip_bad=False, left_out=None):
    """Yield the fields of a file's lines, each as a list of texts."""
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            fields = [" ".join(field.split()) for field in line.split("\t")]
            if len(fields) == columns and all(fields):
                yield fields
                continue
            found = [bool(field) for field in fields].count(True)
            if not skip_bad:
                raise ValueError(
                    f"{path}, line {number}: {found} texts, expected "
                    f"{columns}, with tabs between them. Mend it, or give "
                    "--skip_bad"
                )
            if left_out is not None:
                left_out[f"not {columns} texts"] += 1


def split_of(sentence):
    """Put a sentence into a split, the same on all machines.

    Example
    -------
    >>> split_of("A dog runs.")
    'train'
    """
    digest = hashlib.sha256(sentence.encode("utf-8")).hexdigest()
    return {0: "valid", 1: "test"}.get(int(digest, 16) % 20, "train")


def read_splits(files, columns, skip_bad, left_out):
    """Return `{split: lines}`; a sentence of a test is in no training."""
    if set(files) == {"train"}:
        splits = {split: [] for split in SPLITS}
        for line in read_lines(files["train"], columns, skip_bad, left_out):
            splits[split_of(line[0])].append(line)
    elif set(files) == set(SPLITS):
        splits = {
            split: list(read_lines(files[split], columns, skip_bad, left_out))
            for split in SPLITS
        }
        tested = {line[0] for of in SPLITS[1:] for line in splits[of]}
        kept = [line for line in splits["train"] if line[0] not in tested]
        left_out["also in valid or test"] += len(splits["train"]) - len(kept)
        splits["train"] = kept
    else:
        raise ValueError("give --valid and --test, both or none of them")
    for split, lines in splits.items():
        if not lines:
            raise ValueError(f"{files}: no sentence for {split}.csv")
    return splits


def texts_of(line, targets):
    """Return the columns of a sentence and its translations."""
    return dict(zip(["text", *(f"text_{t}" for t in targets)], line))


def speak(
    folder,
    files,
    source,
    targets,
    voice,
    takes=1,
    spoken=None,
    seed=0,
    skip_bad=False,
    show_progress=True,
):
    """Speak the sentences, and write the manifests.

    Arguments
    ---------
    folder : str
        Where `{train,valid,test}.csv`, `audio/` and, with `spoken`, `text.csv`
        go.
    files : dict
        `{split: file}`, of train alone or of all three.
    source, targets : str, list of str
        Languages of the columns, in order.
    voice : str
        Of espeak-ng.
    takes : int
        How often a training sentence is spoken, each time by another voice.
    spoken : int or None
        How many training sentences are; None: all.
    seed : int
        Of the voices.
    skip_bad : bool
        Leave out, and count, lines with another number of texts.
    show_progress : bool
        Show a bar.

    Returns
    -------
    dict
        `{reason: number of lines left out}`.
    """
    folder = Path(folder)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    left_out = collections.Counter()
    splits = read_splits(files, 1 + len(targets), skip_bad, left_out)
    if spoken is not None:
        if not 0 < spoken < len(splits["train"]):
            raise ValueError(
                f"--spoken {spoken}: of {len(splits['train'])} training "
                "sentences; expected fewer, and at least 1"
            )
        rest = splits["train"][spoken:]
        splits["train"] = splits["train"][:spoken]
        rows = [
            {"ID": f"text_{number:06d}", "duration": len(line[0]) / PACE}
            | {"lang": source}
            | texts_of(line, targets)
            for number, line in enumerate(rest)
        ]
        write_manifest(folder / "text.csv", rows, folder)
    else:
        # Of a run before, its sentences are now spoken.
        (folder / "text.csv").unlink(missing_ok=True)
    for split, lines in splits.items():
        rows = []
        bar = progress(
            lines, desc=f"speaking {split}", show_progress=show_progress
        )
        for number, line in enumerate(bar):
            for take in range(takes if split == "train" else 1):
                key = f"{split}_{number:06d}_{take}"
                said, speaker = choose_voice(voice, key, seed)
                # Named by what is said, too: another text is spoken anew.
                digest = hashlib.sha256(f"{speaker}/{line[0]}".encode())
                path = folder / "audio" / f"{key}_{digest.hexdigest()[:8]}.flac"
                if not path.exists():
                    write_audio(path, said(line[0]), RATE)
                seconds = len(read_audio(path, RATE)) / RATE
                about = {"ID": key, "duration": round(seconds, 4)}
                about |= {"wav": str(path), "spk_id": speaker, "lang": source}
                rows.append(about | texts_of(line, targets))
        write_manifest(folder / f"{split}.csv", rows, folder)
    return left_out


def main(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="where manifests and audio/ go")
    for split in SPLITS:
        needed = split == "train"
        parser.add_argument(f"--{split}", metavar="TSV", required=needed)
    parser.add_argument("--source", required=True, help="language, e.g. en")
    parser.add_argument("--targets", required=True, nargs="+")
    parser.add_argument("--voice", required=True, help="en-us, cs, nl, ...")
    parser.add_argument("--takes", type=int, default=1)
    parser.add_argument("--spoken", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip_bad", action="store_true")
    given = vars(parser.parse_args(arguments))
    files = {split: given.pop(split) for split in SPLITS}
    given["files"] = {split: path for split, path in files.items() if path}
    try:
        for reason, count in (+speak(**given)).items():
            print(f"{count} line(s) left out: {reason}")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"speak_text.py: {error}")


if __name__ == "__main__":
    main()
