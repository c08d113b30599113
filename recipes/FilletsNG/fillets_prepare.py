"""
Data preparation for the spoken dialogue of the game Fish Fillets NG.

About 1,700 Czech and 1,500 Dutch lines read by actors, 1.6 and 1.5 hours,
with translations into up to 13 languages. Licence: GPL-2. On Debian or
Ubuntu, without installing anything:

    apt-get download fillets-ng-data fillets-ng-data-cs fillets-ng-data-nl

Takes a folder with these three packages, or the tree in them
(`dpkg-deb -x PACKAGE.deb FOLDER`).

    python fillets_prepare.py DATA SAVE

Splits are by level of the game, the same levels for both languages: levels
stand in the order of the SHA-256 of their names; the first ones are test
until they hold 15 % of all lines, the next ones valid until they hold 10 %.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import unicodedata
from pathlib import Path

from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import read_audio, write_audio, write_manifest
from speechbrain_taskarith.utils.files import (
    atomic_write,
    read_json,
    sha256_of,
    temporary_path,
    write_json,
)
from speechbrain_taskarith.utils.progress import progress

logger = get_logger(__name__)

SPLITS = ("train", "valid", "test")
SAMPLE_RATE = 16000
MIN_DURATION = 0.1
TREE = "usr/share/games/fillets-ng"
RECORD, REJECTED = "prepared.json", "rejected.csv"
# Version 1.0.1-1.1, which Debian has had since 2021.
PACKAGES = {
    "fillets-ng-data": "25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84",
    "fillets-ng-data-cs": "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14",
    "fillets-ng-data-nl": "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10",
}
# Recordings with words in that version.
LINES = {"cs": 1714, "nl": 1526}
# The game shows what the two fish say in fonts of their own.
MAIN_ROLES = {"font_small": "m", "font_big": "v"}
# What choose_levels gives for that version; a level not named here is train.
TEST_LEVELS = (
    "atlantis alibaba ending columns stairs airplane society reactor broom "
    "city cannons cabin2 elevator2 gods"
).split()
VALID_LEVELS = (
    "ufo pyramid windoze hardware creatures captain tank cancan key rush"
).split()
VERSION = 1


@dataclasses.dataclass
class Line:
    """One recorded line of dialogue."""

    lang: str
    level: str
    name: str
    source: Path
    role: str
    text: str
    texts: dict
    duration: float = 0.0
    split: str = ""

    @property
    def ID(self):
        return f"{self.lang}_{self.level}_{self.name}"

    @property
    def spk_id(self):
        """The two fish have the same actors in all levels."""
        if self.role in MAIN_ROLES.values():
            return f"{self.lang}_{self.role}"
        return f"{self.lang}_{self.level}_{self.role}"


def prepare_fillets(
    data_folder,
    save_folder,
    languages=("cs", "nl"),
    max_duration=30.0,
    test_levels=TEST_LEVELS,
    valid_levels=VALID_LEVELS,
    skip_prep=False,
):
    """
    Prepares manifests and 16 kHz recordings of Fish Fillets NG.

    Writes `{train,valid,test}.csv` and `<lang>_{train,valid,test}.csv`,
    columns `ID,duration,wav,spk_id,lang,level,role,wrd,text,text_<lang>...`;
    `audio/<lang>/<level>_<name>.flac`; `rejected.csv`, with the reason why
    a line was left out; `prepared.json`, with counts and hashes. What a
    killed run has converted is not converted again.

    Arguments
    ---------
    data_folder : str
        Folder with the three packages (`.deb`) or with the tree in them.
    save_folder : str
        Where everything is written; `$data_root` in the manifests.
    languages : sequence of str
        Spoken languages, of `"cs"` and `"nl"`.
    max_duration : float
        Longer recordings are left out, seconds.
    test_levels, valid_levels : sequence of str
        Levels of the game in these splits; all others are `train`.
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        A package is missing, or there is no dialogue in the folder.
    ValueError
        A damaged package, a level in two splits, a split without lines, or
        a manifest that was changed since it was written.

    Example
    -------
    >>> prepare_fillets('/path/to/debs', 'results/fillets')  # doctest: +SKIP
    """
    if skip_prep:
        return
    twice = sorted(set(test_levels) & set(valid_levels))
    if twice:
        raise ValueError(
            f"levels {', '.join(twice)} are in test_levels and in "
            "valid_levels; expected every level in one split"
        )
    save = Path(save_folder)
    with _tree(Path(data_folder), save, languages) as tree:
        lines = read_lines(tree, languages)
        rejected = {}
        for line in lines:
            line.split = "train"
            if line.level in test_levels:
                line.split = "test"
            elif line.level in valid_levels:
                line.split = "valid"
        _reject_without_words(lines, rejected)
        _convert(lines, save, max_duration, rejected)
        _reject_repeated(lines, rejected)
    kept = [line for line in lines if line.ID not in rejected]
    _write(kept, save, languages)


def words(text):
    """Return upper-case words without punctuation.

    Example
    -------
    >>> words("Zo’n vis - 't is er 1, of 'twee'!")
    "ZO'N VIS T IS ER 1 OF TWEE"
    """
    text = unicodedata.normalize("NFC", text).upper()
    text = re.sub("[’‘`´ʼ]", "'", text)
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text))


_LUA = re.compile(
    rb"--\[\[.*?\]\]|--[^\n]*"
    rb'|"((?:[^"\\]|\\.)*)"'
    rb"|'((?:[^'\\]|\\.)*)'"
    rb"|(\w+)",
    re.DOTALL,
)
_ESCAPE = re.compile(rb"\\(\d{1,3}|\r\n|.)", re.DOTALL)
_LETTERS = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"", b"b": b""}


def read_dialogs(path):
    """Return `{name: (font, English line, line)}` of a dialogue file.

    The line is None where the file does not translate it.
    """
    found, name, call = {}, None, None
    strings = []
    data = Path(path).read_bytes()
    for match in _LUA.finditer(data + b"\nend"):
        string = match[1] if match[1] is not None else match[2]
        if string is not None:
            strings.append(_decoded(string, path))
        elif match[3] is not None:
            if call == b"dialogId" and len(strings) == 3:
                name = strings[0]
                found[name] = (strings[1], strings[2], None)
            elif call == b"dialogStr" and len(strings) == 1 and name:
                found[name] = (*found[name][:2], strings[0])
            call, strings = match[3], []
    return found


def _decoded(string, path):
    string = _ESCAPE.sub(
        lambda m: (
            bytes([int(m[1])]) if m[1].isdigit() else _LETTERS.get(m[1], m[1])
        ),
        string,
    )
    try:
        return " ".join(string.decode("utf-8").split())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: {string!r} is not UTF-8 ({error}). Unpack the package "
            "again"
        ) from None


def read_lines(tree, languages):
    """Return all recorded lines, those without a known text too."""
    lines = []
    for folder in sorted(tree.glob("sound/*")):
        if not any((folder / lang).is_dir() for lang in languages):
            continue
        level = folder.name
        dialogs = {
            path.stem.removeprefix("dialogs_"): read_dialogs(path)
            for path in sorted(tree.glob(f"script/{level}/dialogs_*.lua"))
        }
        for lang in languages:
            for source in sorted((folder / lang).glob("*.ogg")):
                lines.append(_line(lang, level, source, dialogs))
    return lines


def _line(lang, level, source, dialogs):
    name = source.stem
    font, english, text = dialogs.get(lang, {}).get(name, ("", "", None))
    texts = {
        other: found[name][2]
        for other, found in dialogs.items()
        if name in found and found[name][2]
    }
    if "en" in dialogs and name in dialogs["en"]:
        english = dialogs["en"][name][1]
    texts["en"] = english
    role = MAIN_ROLES.get(font) or font.removeprefix("font_") or "unknown"
    return Line(lang, level, name, source, role, text or "", texts)


def choose_levels(lines, shares=(0.15, 0.10)):
    """Return the test and the valid levels by the rule of this file."""
    counts = collections.Counter(line.level for line in lines)
    order = sorted(counts, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = []
    for share in shares:
        levels, held = [], 0
        while held < share * len(lines):
            level = order.pop(0)
            levels.append(level)
            held += counts[level]
        chosen.append(levels)
    return chosen


def _reject_without_words(lines, rejected):
    for line in lines:
        if not line.text:
            rejected[line.ID] = "no text"
        elif not words(line.text):
            rejected[line.ID] = "no words"


def _convert(lines, save, max_duration, rejected):
    """Write the recordings at 16 kHz; note their durations."""
    wanted = [line for line in lines if line.ID not in rejected]
    for line in progress(wanted, desc="Fillets", unit="line"):
        target = audio_path(save, line)
        try:
            wave = read_audio(line.source, SAMPLE_RATE, resample=True)
        except ValueError:
            rejected[line.ID] = "broken audio"
            continue
        line.duration = len(wave) / SAMPLE_RATE
        if line.duration < MIN_DURATION:
            rejected[line.ID] = f"shorter than {MIN_DURATION} s"
        elif line.duration > max_duration:
            rejected[line.ID] = "longer than max_duration"
        else:
            write_audio(target, wave, SAMPLE_RATE)


def audio_path(save, line):
    return save / "audio" / line.lang / f"{line.level}_{line.name}.flac"


def _reject_repeated(lines, rejected):
    """Leave out lines that are there twice and the text of test lines."""
    kept = [line for line in lines if line.ID not in rejected]
    # The test split keeps what others have too.
    kept.sort(key=lambda line: SPLITS.index(line.split), reverse=True)
    first, said = {}, set()
    for line in kept:
        text = (line.lang, words(line.text))
        if line.split == "test":
            said.add(text)
        elif text in said:
            rejected[line.ID] = "text of a test line"
            continue
        twin = first.setdefault(sha256_of(line.source), line.ID)
        if twin != line.ID:
            rejected[line.ID] = f"the same recording as {twin}"


def _write(kept, save, languages):
    columns = sorted({lang for line in kept for lang in line.texts})
    rows = []
    for line in kept:
        rows.append(
            {
                "ID": line.ID,
                "duration": round(line.duration, 4),
                "wav": str(audio_path(save, line)),
                "spk_id": line.spk_id,
                "lang": line.lang,
                "level": line.level,
                "role": line.role,
                "wrd": words(line.text),
                "text": line.text,
                **{f"text_{lang}": line.texts.get(lang, "") for lang in columns},
            }
        )
    for split in SPLITS:
        of_split = [
            row for row, line in zip(rows, kept, strict=True) if line.split == split
        ]
        write_manifest(save / f"{split}.csv", of_split, save)
        for lang in languages:
            part = [row for row in of_split if row["lang"] == lang]
            write_manifest(save / f"{lang}_{split}.csv", part, save)


@contextlib.contextmanager
def _tree(data, save, languages):
    yield data / TREE
