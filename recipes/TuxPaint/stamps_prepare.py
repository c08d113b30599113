"""
Data preparation for the spoken stamps of Tux Paint.

Every stamp of the drawing program has a description, which volunteers have
read aloud: up to 930 short phrases in each of ten languages, one voice a
language. Licence: GPL-2. On Debian or Ubuntu, without installing anything:

    apt-get download tuxpaint-stamps-default

Takes a folder with this package, or the tree in it
(`dpkg-deb -x PACKAGE.deb FOLDER`).

    python stamps_prepare.py DATA SAVE --languages fr es

Splits are by the stamp's name, the same for all languages: half of them are
test, a tenth valid. It is meant as a test of what nobody was trained on.
"""

import argparse
import contextlib
import hashlib
import logging
import re
from pathlib import Path

from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data.debian import (
    find_packages,
    missing_packages,
    unpacked_packages,
)
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
PACKAGE = "tuxpaint-stamps-default"
TREE = "usr/share/tuxpaint/stamps"
USED_FILES = rf"{TREE}/(.+\.txt|.+_desc\w*\.ogg)"
# A hundred recordings or more.
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
VERSION = 1


def prepare_stamps(
    data_folder,
    save_folder,
    languages=("fr",),
    min_words=3,
    skip_prep=False,
):
    """
    Prepares manifests and 16 kHz recordings of Tux Paint's stamps.

    Writes `{train,valid,test}.csv` and `<lang>_{train,valid,test}.csv`,
    columns `ID,duration,wav,spk_id,lang,wrd,text`; `audio/<lang>/<ID>.flac`;
    `prepared.json`, with counts and hashes. What a killed run has converted
    is not converted again.

    Arguments
    ---------
    data_folder : str
        Folder with the package (`.deb`) or with the tree in it.
    save_folder : str
        Where everything is written; `$data_root` in the manifests.
    languages : sequence of str
        Some of be, bg, ca, da, el, es, fr, ro and ru.
    min_words : int
        Descriptions of fewer words are left out: most are a noun alone.
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        The package is missing, or a language has no recording in it.
    ValueError
        Another language, a damaged package or recording, a split without
        lines, or a manifest that was changed since it was written.
    OSError
        The disk has no room.

    Example
    -------
    >>> prepare_stamps('/path/to/deb', 'results/stamps')  # doctest: +SKIP
    """
    if skip_prep:
        return
    languages = [languages] if isinstance(languages, str) else list(languages)
    if not languages or not set(languages) <= set(LANGUAGES):
        raise ValueError(
            f"languages={languages!r}: expected some of {', '.join(LANGUAGES)}"
        )
    data, save = Path(data_folder), Path(save_folder)
    tree = find_tree(data)
    package = None if tree else find_packages(data, [PACKAGE])[PACKAGE]
    options = {
        "version": VERSION,
        "languages": sorted(set(languages)),
        "min_words": min_words,
        "source": sha256_of(package)
        if package
        else list_files([*tree.rglob("*.txt"), *tree.rglob("*_desc*.ogg")]),
    }
    if not needs_preparation(save, options):
        logger.info(f"{save}: already prepared, nothing to do")
        return
    save.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if package:
            tree = stack.enter_context(
                unpacked_packages([package], USED_FILES, save)
            )
        lines = [
            line
            for lang in options["languages"]
            for line in read_lines(tree, lang, min_words)
        ]
        check_disk(save, 3 * sum(ogg.stat().st_size for _, _, ogg, _ in lines))
        rows = [
            (split_of(name), _row(lang, name, ogg, text, save))
            for lang, name, ogg, text in progress(lines, desc="Tux Paint")
        ]
    table = write_prepared(save, options, rows, "lang", {})
    logger.info(f"{save}:\n{table}")


def find_tree(data):
    """Return the folder with the stamps, or None."""
    for tree in (data / TREE, data):
        if any(tree.glob("*/**/*_desc*.ogg")):
            return tree
    return None


def split_of(name):
    """Return the split of a stamp by its name.

    Example
    -------
    >>> [split_of(f"animals/{name}") for name in ("ant", "hen", "cow")]
    ['train', 'valid', 'test']
    """
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return "test" if number < 5 else "valid" if number == 5 else "train"


def read_lines(tree, lang, min_words):
    """Return `(lang, stamp, recording, text)`, each text once."""
    found, said = [], set()
    for path in sorted(tree.rglob("*.txt")):
        ogg = path.with_name(f"{path.stem}_desc_{lang}.ogg")
        if not ogg.is_file():
            continue
        text = _description(path, lang)
        words = words_of(text)
        if len(words.split()) >= min_words and words not in said:
            said.add(words)
            name = path.relative_to(tree).with_suffix("").as_posix()
            found.append((lang, name, ogg, text))
    if not found:
        raise missing_packages(
            f"{tree}: nothing of {min_words} words or more in {lang}",
            [PACKAGE],
        )
    return found


def _description(path, lang):
    """Return what a stamp's file says in a language, or nothing."""
    # The first line is English. Some files have other encodings elsewhere.
    text = path.read_bytes().decode("utf-8", "replace")
    match = re.search(rf"^{lang}\.utf8\s*=(.*)$", text, re.M)
    return " ".join(match[1].split()) if match else ""


def _row(lang, name, ogg, text, save):
    ID = f"{lang}_{name.replace('/', '_')}"
    target = save / "audio" / lang / f"{ID}.flac"
    return {
        "ID": ID,
        "duration": round(convert_recording(ogg, target, SAMPLE_RATE), 4),
        "wav": str(target),
        "spk_id": f"stamps_{lang}",
        "lang": lang,
        "wrd": words_of(text),
        "text": text,
    }


def main():
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description="Prepare Tux Paint's stamps.")
    parser.add_argument("data_folder", help="the package, or its tree")
    parser.add_argument("save_folder", help="where everything is written")
    parser.add_argument("--languages", nargs="+", default=["fr"])
    parser.add_argument("--min_words", type=int, default=3)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_stamps(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
