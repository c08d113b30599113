"""
Data preparation for the Free Spoken Digit Dataset (FSDD).

Download: https://github.com/Jakobovski/free-spoken-digit-dataset
(3,000 recordings of English digits by six speakers, 8 kHz, CC BY-SA 4.0)

Takes a clone of that repository (`recordings/7_jackson_32.wav` and
`metadata.py`), or any folder with a `manifest.csv` in the columns
`ID,duration,wav,spk_id,accent_or_domain,wrd,split` (`$data_root` in paths
stands for that folder).
"""

import ast
import hashlib
import os
import re

from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import (
    Recording,
    read_audio,
    read_manifest,
    write_manifest,
)
from speechbrain_taskarith.utils.files import read_json, sha256_of, write_json

logger = get_logger(__name__)

WORDS = tuple("ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split())
# The repository's own split: takes 0 to 4 of every speaker and digit.
TEST_INDICES = range(5)
SPLITS = ("train", "valid", "test")
OPTIONS_FILE = "fsdd_prepare.json"
_CLONE_NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.(?:wav|flac)$")
_TAKE_NUMBER = re.compile(r"_(\d+)\.\w+$")


def prepare_fsdd(
    data_folder,
    save_folder,
    valid_indices=(5, 6, 7, 8, 9),
    check="headers",
    skip_prep=False,
):
    """
    Prepares `train.csv`, `valid.csv` and `test.csv` of FSDD.

    The official split is kept: takes 0-4 are for testing, 5-49 for training.
    The development set, which the repository does not have, is taken from
    the training takes.

    Arguments
    ---------
    data_folder : str
        A clone of the repository, a folder with a `manifest.csv`, or a
        corpus made by `common.corpora.make_digits_corpus`.
    save_folder : str
        Where the CSV files go; columns
        `ID,duration,wav,spk_id,wrd,accent,split`.
    valid_indices : sequence of int
        Take numbers (the last number in a file's name) that become the
        development set. A manifest with a split `valid` of its own keeps
        that one. Empty: no development set.
    check : str
        How far each recording is looked at: `"files"`, `"headers"` or
        `"decode"` (see `speechbrain_taskarith.data.read_manifest`).
    skip_prep : bool
        If True, the preparation is skipped.

    Raises
    ------
    FileNotFoundError
        The folder is neither of the two forms, or lacks `metadata.py`.
    ValueError
        A manifest, name or recording that cannot be used; the message says
        which.

    Example
    -------
    >>> data_folder = '/path/to/free-spoken-digit-dataset'
    >>> save_folder = 'results/fsdd/prepared'
    >>> prepare_fsdd(data_folder, save_folder)  # doctest: +SKIP
    """
    if skip_prep:
        return
    data_folder = _resolve(data_folder)
    valid_indices = sorted({int(index) for index in valid_indices})
    reserved = sorted(set(valid_indices) & set(TEST_INDICES))
    if reserved:
        raise ValueError(
            f"valid_indices={valid_indices}: takes {reserved} are the "
            "official test set; choose from 5 on"
        )
    options = {
        "data_folder": data_folder,
        "source": _fingerprint(data_folder),
        "valid_indices": valid_indices,
        "check": check,
    }
    if _is_prepared(save_folder, options):
        logger.info(f"{save_folder}: already prepared, nothing to do")
        return
    # From here on the old files are on their way out.
    if os.path.exists(os.path.join(save_folder, OPTIONS_FILE)):
        os.unlink(os.path.join(save_folder, OPTIONS_FILE))

    logger.info(f"{data_folder}: reading and checking the recordings")
    if os.path.isfile(os.path.join(data_folder, "manifest.csv")):
        recordings = read_manifest(
            os.path.join(data_folder, "manifest.csv"), data_folder, check=check
        )
        if any(take.split == "valid" for take in recordings):
            valid_indices = []  # the manifest has chosen already
        recordings = [_with_split(take, valid_indices) for take in recordings]
    elif os.path.isdir(os.path.join(data_folder, "recordings")):
        recordings = read_clone(data_folder, valid_indices, check)
    else:
        raise FileNotFoundError(
            f"{data_folder}: neither a clone of free-spoken-digit-dataset "
            "(no folder recordings/) nor a folder with a manifest.csv. Give "
            "the clone itself: git clone "
            "https://github.com/Jakobovski/free-spoken-digit-dataset"
        )
    for split in SPLITS:
        chosen = [take for take in recordings if take.split == split]
        if not chosen and (split != "valid" or valid_indices):
            raise ValueError(
                f"{data_folder}: no recording for the split {split!r}. "
                "Expected takes 0-4 (test) and 5-49 (train and valid) in "
                "the names, or a column `split` in manifest.csv"
            )
        logger.info(f"{split}: {len(chosen)} recordings")
        write_manifest(os.path.join(save_folder, f"{split}.csv"), chosen)
    # Last, so that it vouches for the files beside it.
    write_json(os.path.join(save_folder, OPTIONS_FILE), options)


def read_clone(data_folder, valid_indices, check="headers"):
    """Reads the recordings of a clone of the repository.

    Arguments
    ---------
    data_folder : str
        The clone.
    valid_indices : sequence of int
        Take numbers of the development set.
    check : str
        `"decode"` reads every recording to its end.

    Returns
    -------
    list of Recording
        Sorted by ID, with accents from `metadata.py`.
    """
    from speechbrain.dataio import audio_io

    speakers = read_metadata(os.path.join(data_folder, "metadata.py"))
    folder = os.path.join(data_folder, "recordings")
    recordings = []
    for name in sorted(os.listdir(folder)):
        if not name.endswith((".wav", ".flac")):
            continue
        path = os.path.join(folder, name)
        match = _CLONE_NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{path}: expected a name as 7_jackson_32.wav (digit, "
                "speaker, take). Rename it or move it away"
            )
        digit, speaker, index = match.groups()
        if speaker not in speakers:
            raise ValueError(
                f"{path}: speaker {speaker!r} is not in metadata.py, which "
                f"has {', '.join(sorted(speakers))}. Add the speaker there, "
                "as the repository's README asks"
            )
        try:
            info = audio_io.info(path)
        except RuntimeError as error:
            raise ValueError(
                f"{path}: unreadable audio ({error.__cause__}). Restore it: "
                "git checkout -- recordings"
            ) from error
        if info.frames == 0:
            raise ValueError(
                f"{path}: the recording has no samples. Restore it: git "
                "checkout -- recordings"
            )
        if check == "decode":
            read_audio(path, info.sample_rate)
        recordings.append(
            Recording(
                ID="fsdd_" + os.path.splitext(name)[0],
                duration=round(info.duration, 4),
                wav=path,
                spk_id=speaker,
                wrd=WORDS[int(digit)],
                accent=speakers[speaker]["accent"],
                split=_official_split(int(index), valid_indices),
            )
        )
    return recordings


def read_metadata(path):
    """Reads the dict in `metadata.py` without running the file.

    Arguments
    ---------
    path : str
        The file.

    Returns
    -------
    dict
        `{speaker: {"accent": ..., "gender": ..., ...}}`

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It holds no literal dict named `metadata` with an accent for each
        speaker.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: missing; it names the speakers' accents. Give the "
            "clone of the whole repository as the data folder"
        )
    expected = (
        "expected one statement `metadata = {speaker: {'accent': ...}}` of "
        "plain values. Restore it: git checkout -- metadata.py"
    )
    with open(path, encoding="utf-8") as stream:
        text = stream.read()
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "metadata"
                for target in node.targets
            ):
                speakers = ast.literal_eval(node.value)
                if all(
                    isinstance(about["accent"], str)
                    for about in speakers.values()
                ):
                    return speakers
    except (SyntaxError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: {expected} (found {e!r})") from e
    raise ValueError(f"{path}: {expected}")


def _official_split(index, valid_indices):
    if index in TEST_INDICES:
        return "test"
    return "valid" if index in valid_indices else "train"


def _with_split(take, valid_indices):
    """Moves a training take into the development set by its number."""
    if take.split not in SPLITS:
        raise ValueError(
            f"{take.ID}: split {take.split!r} in manifest.csv; expected one "
            f"of {', '.join(SPLITS)}"
        )
    if take.split != "train" or not valid_indices:
        return _plain(take, take.split)
    match = _TAKE_NUMBER.search(take.wav)
    if match is None:
        raise ValueError(
            f"{take.wav}: no take number at the end of the name, by which "
            "valid_indices could choose. Give manifest.csv a split `valid` "
            "and set valid_indices to []"
        )
    split = "valid" if int(match[1]) in valid_indices else "train"
    return _plain(take, split)


def _plain(take, split):
    """Copies a recording without the columns that recipes do not use."""
    return Recording(
        take.ID,
        take.duration,
        take.wav,
        take.spk_id,
        take.wrd,
        take.accent,
        split,
    )


def _resolve(data_folder):
    """Returns the folder to read: of a self-made corpus, its recorded side."""
    data_folder = os.path.abspath(data_folder)
    inside = os.path.join(data_folder, "recorded")
    if os.path.isfile(os.path.join(inside, "manifest.csv")):
        return inside
    return data_folder


def _fingerprint(data_folder):
    """Returns a hash that changes with the manifest or the file names."""
    digest = hashlib.sha256()
    for name in ("manifest.csv", "metadata.py"):
        path = os.path.join(data_folder, name)
        if os.path.isfile(path):
            digest.update(sha256_of(path).encode())
    recordings = os.path.join(data_folder, "recordings")
    if os.path.isdir(recordings):
        digest.update("\n".join(sorted(os.listdir(recordings))).encode())
    return digest.hexdigest()


def _is_prepared(save_folder, options):
    """Tells whether a finished preparation with these options is there."""
    path = os.path.join(save_folder, OPTIONS_FILE)
    if not os.path.isfile(path) or not all(
        os.path.isfile(os.path.join(save_folder, f"{split}.csv"))
        for split in SPLITS
    ):
        return False
    return read_json(path) == options
