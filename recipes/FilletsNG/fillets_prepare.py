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
import logging
import re
from pathlib import Path

from joblib import Parallel, delayed
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data.debian import (
    find_packages,
    missing_packages,
    package_fields,
    unpacked_packages,
)
from speechbrain_taskarith.data.preparation import (
    SPLITS,
    check_disk,
    convert_recording,
    list_files,
    needs_preparation,
    words_of,
    write_prepared,
)
from speechbrain_taskarith.utils.files import atomic_write, sha256_of
from speechbrain_taskarith.utils.progress import progress

logger = get_logger(__name__)

SAMPLE_RATE = 16000
MIN_DURATION = 0.1
TREE = "usr/share/games/fillets-ng"
USED_FILES = (
    rf"{TREE}/((?:script/[\w-]+/dialogs_\w+\.lua)"
    r"|(?:sound/[\w-]+/\w+/[\w.-]+\.ogg))"
)
REJECTED = "rejected.csv"
DIALOGUE, SPOKEN = "fillets-ng-data", "fillets-ng-data-{}"
KNOWN = "1.0.1-1.1"  # In Debian since 2021.
PACKAGES = {
    DIALOGUE: "25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84",
    "fillets-ng-data-cs": "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14",
    "fillets-ng-data-nl": "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10",
}
# Recordings with words in that version.
LINES = {"cs": 1714, "nl": 1526}
# The game shows what the two fish say in fonts of their own.
MAIN_ROLES = {"font_small": "m", "font_big": "v"}
# What choose_levels gives for that version; any other level is train.
TEST_LEVELS = tuple(
    "atlantis alibaba ending columns stairs airplane society reactor broom "
    "city cannons cabin2 elevator2 gods".split()
)
VALID_LEVELS = tuple(
    "ufo pyramid windoze hardware creatures captain tank cancan key "
    "rush".split()
)
NO_TEXT, NO_WORDS, BROKEN = "no text", "no words", "broken audio"
TOO_SHORT = f"shorter than {MIN_DURATION} s"
TOO_LONG, SAID_IN_TEST = "longer than max_duration", "text of a test line"
VERSION = 1


@dataclasses.dataclass
class Line:
    """One recorded line of dialogue."""

    lang: str
    level: str
    source: Path
    role: str
    text: str
    texts: dict
    split: str
    duration: float = 0.0
    rejected: str = ""

    @property
    def name(self):
        return f"{self.level}_{self.source.stem}"

    @property
    def spk_id(self):
        """The two fish have the same actors in all levels."""
        main = self.role in MAIN_ROLES.values()
        place = self.lang if main else f"{self.lang}_{self.level}"
        return f"{place}_{self.role}"

    def target(self, save):
        return save / "audio" / self.lang / f"{self.name}.flac"


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
    OSError
        The disk has no room.

    Example
    -------
    >>> prepare_fillets('/path/to/debs', 'results/fillets')  # doctest: +SKIP
    """
    if skip_prep:
        return
    languages, levels = _checked(languages, test_levels, valid_levels)
    data, save = Path(data_folder), Path(save_folder)
    tree = find_tree(data)
    needed = [DIALOGUE, *(SPOKEN.format(lang) for lang in languages)]
    packages = {} if tree else find_packages(data, needed)
    options = {
        "version": VERSION,
        "languages": languages,
        "max_duration": max_duration,
        "levels": levels,
        "source": {name: sha256_of(path) for name, path in packages.items()}
        or list_files(files_of(tree, languages)),
    }
    if not needs_preparation(save, options):
        logger.info(f"{save}: already prepared, nothing to do")
        return
    save.mkdir(parents=True, exist_ok=True)
    for name, path in packages.items():
        if options["source"][name] != PACKAGES[name]:
            logger.warning(
                f"{path}: version {package_fields(path)['Version']} differs "
                f"from {KNOWN}, which splits and counts were made for"
            )
    with contextlib.ExitStack() as stack:
        if packages:
            tree = stack.enter_context(
                unpacked_packages(packages.values(), USED_FILES, save)
            )
        lines = read_lines(tree, languages, levels)
        convert(lines, save, max_duration)
        reject_repeated(lines)
    compare_with_expected(lines)
    left_out = [line for line in lines if line.rejected]
    write_rejected(save / REJECTED, left_out)
    reasons = collections.Counter(
        f"{line.lang}: {line.rejected.split(':')[0]}" for line in left_out
    )
    if len(left_out) == len(lines):
        raise ValueError(
            f"{data}: none of {len(lines)} recordings can be used; see "
            f"{save / REJECTED}: {dict(reasons)}"
        )
    table = write_prepared(
        save,
        options,
        rows_of([line for line in lines if not line.rejected], save),
        "lang",
        {"speakers": "spk_id", "levels": "level"},
        rejected=reasons,
        others=[REJECTED],
    )
    logger.info(f"{save}:\n{table}\nleft out, see {REJECTED}:")
    for reason, count in sorted(reasons.items()):
        logger.info(f"{count:5d}  {reason}")


def _checked(languages, test, valid):
    """Return languages, and `{level: split}` without what is in two."""
    languages = [languages] if isinstance(languages, str) else list(languages)
    if not languages or not set(languages) <= set(LINES):
        raise ValueError(
            f"languages={languages!r}: expected some of {list(LINES)}, the "
            "ones that are spoken"
        )
    twice = sorted(set(test) & set(valid))
    if twice:
        raise ValueError(
            f"levels {', '.join(twice)} are in test_levels and in "
            "valid_levels; expected every level in one split"
        )
    levels = dict.fromkeys(test, "test") | dict.fromkeys(valid, "valid")
    return sorted(set(languages)), levels


def find_tree(data):
    """Return the folder with `script` and `sound`, or None."""
    for tree in (data / TREE, data):
        if (tree / "script").is_dir() or (tree / "sound").is_dir():
            return tree
    return None


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
    def byte(match):
        if match[1].isdigit():
            return bytes([int(match[1])])
        return _LETTERS.get(match[1], match[1])

    try:
        string = _ESCAPE.sub(byte, string).decode("utf-8")
    except ValueError as error:
        raise ValueError(
            f"{path}: {string!r} is not UTF-8 ({error}). Unpack the package "
            "again"
        ) from None
    return " ".join(string.split())


def files_of(tree, languages):
    """Return the dialogue files and recordings of a tree."""
    found = list(tree.glob("script/*/dialogs_*.lua"))
    if not found:
        raise missing_packages(tree, [DIALOGUE])
    for lang in languages:
        spoken = list(tree.glob(f"sound/*/{lang}/*.ogg"))
        if not spoken:
            raise missing_packages(tree, [SPOKEN.format(lang)])
        found += spoken
    return found


def read_lines(tree, languages, levels):
    """Return all recorded lines, those without a known text too."""
    recorded = collections.defaultdict(list)
    dialogs = collections.defaultdict(dict)
    for path in sorted(files_of(tree, languages)):
        if path.suffix == ".lua":
            lang = path.stem.removeprefix("dialogs_")
            dialogs[path.parent.name][lang] = read_dialogs(path)
        else:
            recorded[path.parents[1].name].append(path)
    unknown = sorted(set(levels) - set(dialogs))
    if unknown:
        raise ValueError(
            f"{tree}: no level {', '.join(unknown)}; pass test_levels and "
            f"valid_levels of those there: {', '.join(sorted(dialogs))}"
        )
    return [
        _line(level, path, dialogs[level], levels.get(level, "train"))
        for level, paths in sorted(recorded.items())
        for path in paths
    ]


def _line(level, path, dialogs, split):
    lang, name = path.parent.name, path.stem
    font, english, text = dialogs.get(lang, {}).get(name, ("", "", None))
    texts = {
        other: found[name][2]
        for other, found in dialogs.items()
        if name in found and found[name][2]
    }
    # The game's English stands in the first call, in every file.
    texts["en"] = dialogs.get("en", {}).get(name, ("", english))[1]
    role = MAIN_ROLES.get(font) or font.removeprefix("font_") or "unknown"
    return Line(lang, level, path, role, text or "", texts, split)


def choose_levels(counts, shares=(0.15, 0.10)):
    """Return test and valid levels by the rule of this file.

    Example
    -------
    >>> choose_levels({"a": 5, "b": 5, "c": 5, "d": 5})
    [['d'], ['c']]
    """
    order = sorted(
        counts, key=lambda name: hashlib.sha256(name.encode()).hexdigest()
    )
    chosen, total = [], sum(counts.values())
    for share in shares:
        levels = []
        while sum(counts[level] for level in levels) < share * total:
            levels.append(order.pop(0))
        chosen.append(levels)
    return chosen


def convert(lines, save, max_duration):
    """Write the recordings at 16 kHz; note durations and what is unfit."""
    for line in lines:
        if not words_of(line.text):
            line.rejected = NO_WORDS if line.text else NO_TEXT
    wanted = [line for line in lines if not line.rejected]
    # 16-bit FLAC at 16 kHz takes less than three times what the OGG takes.
    missing = [line for line in wanted if not line.target(save).exists()]
    check_disk(save, 3 * sum(line.source.stat().st_size for line in missing))

    def convert_line(line):
        try:
            return convert_recording(
                line.source, line.target(save), SAMPLE_RATE
            )
        except ValueError:
            return None

    # Most of the time is not Python's, so that threads help.
    side_by_side = Parallel(-1, prefer="threads", return_as="generator")
    durations = progress(
        side_by_side(delayed(convert_line)(line) for line in wanted),
        total=len(wanted),
        desc="Fillets",
        unit="line",
    )
    for line, duration in zip(wanted, durations):
        if duration is None:
            line.rejected = BROKEN
            continue
        line.duration = duration
        if line.duration < MIN_DURATION:
            line.rejected = TOO_SHORT
        elif line.duration > max_duration:
            line.rejected = TOO_LONG
        if line.rejected:
            line.target(save).unlink()


def reject_repeated(lines):
    """Leave out what is there twice, and the text of test lines elsewhere."""
    first, said = {}, set()
    # Test comes first: it keeps what others have too.
    for line in sorted(lines, key=lambda line: -SPLITS.index(line.split)):
        if line.rejected:
            continue
        key = (line.lang, words_of(line.text))
        if line.split == "test":
            said.add(key)
        elif key in said:
            line.rejected = SAID_IN_TEST
            continue
        twin = first.setdefault(sha256_of(line.source), line)
        if twin is not line:
            line.rejected = f"same recording: {twin.lang}_{twin.name}"


def compare_with_expected(lines):
    """Warn where this is not the version that the splits were made for."""
    unfit = (NO_TEXT, NO_WORDS, BROKEN, TOO_SHORT)
    lines = [line for line in lines if line.rejected not in unfit]
    found = collections.Counter(line.lang for line in lines)
    for lang, count in found.items():
        if count != LINES[lang]:
            logger.warning(
                f"{lang}: {count} recorded lines with words; version 1.0.1 "
                f"has {LINES[lang]}. Is the copy whole?"
            )
    if found == LINES:
        rule = choose_levels(collections.Counter(line.level for line in lines))
        if rule != [list(TEST_LEVELS), list(VALID_LEVELS)]:
            logger.warning(f"by the rule, other levels are test, valid: {rule}")


def rows_of(lines, save):
    """Return split and row of all lines, with the text in all languages."""
    languages = sorted({lang for line in lines for lang in line.texts})
    return [
        (
            line.split,
            {
                "ID": f"{line.lang}_{line.name}",
                "duration": round(line.duration, 4),
                "wav": str(line.target(save)),
                "spk_id": line.spk_id,
                "lang": line.lang,
                "level": line.level,
                "role": line.role,
                "wrd": words_of(line.text),
                "text": line.text,
            }
            | {f"text_{lang}": line.texts.get(lang, "") for lang in languages},
        )
        for line in lines
    ]


def write_rejected(path, lines):
    """Write what was left out and why."""
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow("ID lang level split reason text".split())
        for line in lines:
            about = (line.lang, line.level, line.split, line.rejected)
            writer.writerow((f"{line.lang}_{line.name}", *about, line.text))


def main():
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description="Prepare Fish Fillets NG.")
    parser.add_argument("data_folder", help="the packages, or their tree")
    parser.add_argument("save_folder", help="where everything is written")
    parser.add_argument("--languages", nargs="+", default=["cs", "nl"])
    parser.add_argument("--max_duration", type=float, default=30.0)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_fillets(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
