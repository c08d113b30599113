"""What preparation scripts share: words, recordings, and what was prepared.

A script asks `needs_preparation`, converts its recordings one by one, and
gives all rows to `write_prepared`.
"""

import hashlib
import math
import os
import re
import shutil
import unicodedata
from pathlib import Path

from speechbrain_taskarith.data.audio import read_audio, write_audio
from speechbrain_taskarith.data.manifests import (
    ManifestError,
    read_manifest,
    write_manifest,
)
from speechbrain_taskarith.utils.files import read_json, sha256_of, write_json

RECORD = "prepared.json"
SPLITS = ("train", "valid", "test")


def words_of(text):
    """Return upper-case words without punctuation.

    Apostrophes inside words are kept, in their plain form.

    Example
    -------
    >>> words_of("Zo’n vis - is er 1, of 'twee'!")
    "ZO'N VIS IS ER 1 OF TWEE"
    >>> words_of("हिन्दी में, नमस्ते!")
    'हिन्दी में नमस्ते'
    """
    text = unicodedata.normalize("NFC", text).upper()
    text = re.sub("[’‘`´ʼ]", "'", text)
    # A letter and its accents, vowel signs or points, where no single character
    # has all of them. Variation selectors belong to emoji.
    marks = {c for c in text if unicodedata.category(c) in ("Mn", "Mc")}
    marks -= set(map(chr, range(0xFE00, 0xFE10)))
    letters = rf"(?:[^\W_][\u0300{''.join(marks)}]*)+"
    return " ".join(re.findall(rf"{letters}(?:'{letters})*", text))


def convert_recording(source, target, sample_rate):
    """Write a recording as mono 16-bit at a rate; return its seconds.

    A target that is there, whole and not older than its source is left
    alone, so that a killed preparation goes on where it was.

    Example
    -------
    >>> import torch
    >>> folder = getfixture("tmp_path")
    >>> write_audio(folder / "a.wav", torch.zeros(8000), 8000)
    >>> convert_recording(folder / "a.wav", folder / "a.flac", 16000)
    1.0
    """
    frames = _frames_to_come(source, sample_rate)
    if not _is_made(target, source, sample_rate, frames):
        wave = read_audio(source, sample_rate, resample=True)
        write_audio(target, wave, sample_rate)
        frames = len(wave)
    return frames / sample_rate


def _frames_to_come(source, sample_rate):
    from speechbrain.dataio import audio_io

    try:
        info = audio_io.info(str(source))
    except RuntimeError:
        return None
    return math.ceil(info.frames * sample_rate / info.sample_rate)


def _is_made(target, source, sample_rate, frames):
    try:
        if os.path.getmtime(target) < os.path.getmtime(source):
            return False
        # The header of a file that was cut short still gives all frames.
        return len(read_audio(target, sample_rate)) == frames
    except (OSError, ValueError):
        return False


def list_files(paths):
    """Return a hash that changes with names, sizes and times of files.

    Example
    -------
    >>> len(list_files([]))
    64
    """
    digest = hashlib.sha256()
    for path in sorted(map(str, paths)):
        stat = os.stat(path)
        line = f"{path} {stat.st_size} {stat.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def needs_preparation(save_folder, options):
    """Tell whether something is to be prepared; remove what is outdated.

    Arguments
    ---------
    save_folder : str or pathlib.Path
        Where the manifests are.
    options : dict
        Plain values that tell what is prepared, from what.

    Returns
    -------
    bool
        False where manifests with these options and their recordings are
        there, unchanged.

    Raises
    ------
    ValueError
        A file was changed since it was written.

    Example
    -------
    >>> needs_preparation(getfixture("tmp_path"), {"lang": "cs"})
    True
    """
    save, record = Path(save_folder), Path(save_folder) / RECORD
    if not record.is_file():
        return True
    found = read_json(record)
    there = [name for name in found["files"] if (save / name).is_file()]
    for name in there:
        if sha256_of(save / name) != found["files"][name]:
            raise ValueError(
                f"{save / name}: changed since it was prepared. Delete it to "
                "have it made again, or pass skip_prep=True to use it as it is"
            )
    if found["options"] == options and len(there) == len(found["files"]):
        try:
            for split in SPLITS:
                read_manifest(save / f"{split}.csv")
            return False
        except ManifestError:
            pass  # Recordings are missing or damaged.
    # The record first: an interrupted preparation must not look finished.
    record.unlink()
    for name in there:
        (save / name).unlink()
    return True


def write_prepared(save_folder, options, rows, group, distinct, **about):
    """Write the manifests and, last, the record that vouches for them.

    Arguments
    ---------
    save_folder : str or pathlib.Path
        Where to; recordings in it are written as `$data_root/...`.
    options : dict
        As for `needs_preparation`.
    rows : list of (str, dict)
        Split and row of every recording, for `<split>.csv`.
    group : str
        Column by which parts are written too, as `<part>_<split>.csv`.
    distinct : dict
        See `count_rows`.
    **about
        What else the record tells; `others` names further files in the
        folder that belong to it.

    Returns
    -------
    str
        A table of lines, hours and distinct values.

    Raises
    ------
    ValueError
        A split, or that of a part, would be empty.

    Example
    -------
    >>> rows = [
    ...     (split, {"ID": split, "duration": 3.6, "lang": "cs"})
    ...     for split in SPLITS
    ... ]
    >>> print(write_prepared(getfixture("tmp_path"), {}, rows, "lang", {}))
    lang  split  lines  hours
    cs    train      1  0.001
    cs    valid      1  0.001
    cs    test       1  0.001
    cs    all        3  0.003
    """
    save = Path(save_folder)
    manifests = {}
    for split in SPLITS:
        for value in (None, *sorted({row[group] for _, row in rows})):
            name = f"{split}.csv" if value is None else f"{value}_{split}.csv"
            manifests[name] = [
                row
                for of, row in rows
                if of == split and value in (None, row[group])
            ]
    empty = [name for name, chosen in manifests.items() if not chosen]
    if empty:
        raise ValueError(
            f"{save}: no recording for {', '.join(empty)}. Is the corpus "
            "whole, are the splits as meant?"
        )
    for name, chosen in manifests.items():
        write_manifest(save / name, chosen, save)
    names = [*manifests, *about.pop("others", ())]
    counts = count_rows(rows, group, distinct)
    record = {
        "options": options,
        "files": {name: sha256_of(save / name) for name in names},
        "counts": counts,
        **about,
    }
    write_json(save / RECORD, record)
    return format_table(counts)


def count_rows(rows, group, distinct):
    """Return lines, hours and distinct values by group and split.

    Arguments
    ---------
    rows : list of (str, dict)
        Split and row of every recording.
    group : str
        Column to count by.
    distinct : dict
        `{name in the table: column}`.

    Returns
    -------
    list of dict

    Example
    -------
    >>> rows = [("test", {"lang": "cs", "duration": 3.6, "spk_id": "a"})]
    >>> count_rows(rows, "lang", {"speakers": "spk_id"})[0]
    {'lang': 'cs', 'split': 'test', 'lines': 1, 'hours': 0.001, 'speakers': 1}
    """
    table = []
    values = sorted({row[group] for _, row in rows})
    if len(values) > 1:
        values.append("all")
    for value in values:
        for split in (*SPLITS, "all"):
            chosen = [
                row
                for of, row in rows
                if split in (of, "all") and value in (row[group], "all")
            ]
            if chosen:
                seconds = sum(row["duration"] for row in chosen)
                entry = {group: value, "split": split, "lines": len(chosen)}
                entry["hours"] = round(seconds / 3600, 4)
                for name, column in distinct.items():
                    entry[name] = len({row[column] for row in chosen})
                table.append(entry)
    return table


def format_table(table):
    """Return rows of plain values as aligned text.

    Example
    -------
    >>> print(format_table([{"lang": "cs", "lines": 12}]))
    lang  lines
    cs       12
    """
    lines = [list(table[0])]
    for entry in table:
        lines.append(
            [
                f"{value:.3f}" if isinstance(value, float) else str(value)
                for value in entry.values()
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    is_text = [isinstance(value, str) for value in table[0].values()]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text)
        ).rstrip()
        for line in lines
    )


def check_disk(folder, needed):
    """Refuse to begin what the disk has no room for.

    Example
    -------
    >>> check_disk(getfixture("tmp_path"), 1)
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB "
            "are free. Make room, or give another folder to save to"
        )
