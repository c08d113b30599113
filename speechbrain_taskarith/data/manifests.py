"""Manifests: one row per recording, checked before anything trains on them.

A manifest is a CSV (or SpeechBrain JSON) file with the columns
`ID, duration, wav, spk_id, wrd` and, where known, `accent` (or
`accent_or_domain`), `split` and others, which are kept. Paths may start with
`$data_root`.
"""

import csv
import dataclasses
import json
import math
import os

from speechbrain_taskarith.data.audio import read_audio
from speechbrain_taskarith.utils.files import atomic_write, write_json

REQUIRED = ("ID", "duration", "wav", "spk_id", "wrd")
# Allowed difference between a row's duration and the recording's, seconds.
DURATION_TOLERANCE = 0.02
_CHECKS = ("none", "files", "headers", "decode")
_SHOWN_FAULTS = 10
# What stands for the data folder in paths, in .csv and in .json.
_MARKS = ("$data_root", "{data_root}")


class ManifestError(ValueError):
    """A manifest that cannot be used, with everything wrong with it.

    Arguments
    ---------
    path : str
        The manifest.
    faults : list of str
        One line for each fault: row, ID, what was expected, the remedy.

    Example
    -------
    >>> print(ManifestError("m.csv", ["row 2 (ID a): wrd is empty"]))
    m.csv: 1 fault:
      row 2 (ID a): wrd is empty
    """

    def __init__(self, path, faults):
        self.path, self.faults = str(path), list(faults)
        count = len(self.faults)
        lines = [f"{path}: {count} fault{'s' * (count > 1)}:"]
        lines += [f"  {fault}" for fault in self.faults[:_SHOWN_FAULTS]]
        if count > _SHOWN_FAULTS:
            lines.append(f"  ... and {count - _SHOWN_FAULTS} more")
        super().__init__("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Recording:
    """One row of a manifest.

    Arguments
    ---------
    ID : str
        Unique name.
    duration : float
        Seconds.
    wav : str
        Path of the audio file.
    spk_id : str
        Speaker.
    wrd : str
        Transcript, words apart by single spaces.
    accent : str
        Accent or domain, `""` where unknown.
    split : str
        `"train"`, `"valid"`, `"test"`, or `""` where the manifest is all of
        one.
    extra : dict
        Further columns, as strings.

    Example
    -------
    >>> Recording("a", 0.5, "a.wav", "theo", "SEVEN").accent
    ''
    """

    ID: str
    duration: float
    wav: str
    spk_id: str
    wrd: str
    accent: str = ""
    split: str = ""
    extra: dict = dataclasses.field(default_factory=dict, compare=False)

    def row(self):
        """Return `{column: value}`, `extra` last; see `write_manifest`."""
        row = dataclasses.asdict(self)
        extra = row.pop("extra")
        return row | extra


def read_manifest(
    path, data_root=None, *, sample_rate=None, check="headers", splits=None
):
    """Read a manifest and check every row.

    Arguments
    ---------
    path : str or pathlib.Path
        A `.csv` or a SpeechBrain `.json` manifest.
    data_root : str or pathlib.Path, optional
        What `$data_root` stands for; by default the manifest's own folder.
    sample_rate : int, optional
        Rate in Hz that every recording must have; None allows any.
    check : str
        How far to look: `"none"` (the rows only), `"files"` (they are
        there), `"headers"` (and open as audio, with the rate and duration
        expected), `"decode"` (and can be read to the end).
    splits : sequence of str, optional
        Keep only rows of these splits. All rows are checked.

    Returns
    -------
    list of Recording
        In the order of the file.

    Raises
    ------
    ManifestError
        With every fault: a missing column, a duplicate ID, an empty
        transcript, a missing, unreadable or empty recording, a wrong sample
        rate, a duration that differs from the recording's by more than
        20 ms.
    FileNotFoundError
        There is no such manifest.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.data.audio import write_audio
    >>> folder = getfixture("tmp_path")
    >>> write_audio(folder / "a.wav", torch.zeros(8000), 16000)
    >>> _ = (folder / "m.csv").write_text(
    ...     "ID,duration,wav,spk_id,wrd\\na,0.5,$data_root/a.wav,theo,SEVEN\\n"
    ... )
    >>> [row.wrd for row in read_manifest(folder / "m.csv")]
    ['SEVEN']
    """
    if check not in _CHECKS:
        raise ValueError(f"check={check!r}: expected one of {_CHECKS}")
    path = os.fspath(path)
    if data_root is None:
        data_root = os.path.dirname(os.path.abspath(path))
    rows = _read_json(path) if path.endswith(".json") else _read_csv(path)
    faults, recordings, seen = [], [], {}
    for place, row in rows:
        try:
            recording = _parse(row, os.fspath(data_root))
            if recording.ID in seen:
                raise _Fault(
                    f"duplicate ID, first in {seen[recording.ID]}; expected "
                    "unique IDs. Rename or remove one"
                )
            seen[recording.ID] = place
            _check_audio(recording, sample_rate, check)
            recordings.append(recording)
        except _Fault as fault:
            faults.append(f"{place} (ID {row.get('ID') or 'missing'}): {fault}")
    if faults:
        raise ManifestError(path, faults)
    if splits is not None:
        recordings = _only_splits(path, recordings, splits)
    return recordings


def write_manifest(path, recordings, data_root=None):
    """Write a manifest that SpeechBrain's `DynamicItemDataset` reads.

    Arguments
    ---------
    path : str or pathlib.Path
        Final name in `.csv` or `.json`; written atomically.
    recordings : iterable of Recording or dict
        The rows; a dict needs `ID` and `duration`, and may hold lists in a
        `.json` manifest.
    data_root : str or pathlib.Path, optional
        Paths inside this folder are written as `$data_root/...` (`.csv`) or
        `{data_root}/...` (`.json`), the forms SpeechBrain's readers replace.

    Raises
    ------
    ManifestError
        A row without ID or duration, a duplicate ID, or a list in a `.csv`.

    Example
    -------
    >>> path = str(getfixture("tmpdir") / "train.csv")
    >>> write_manifest(path, [Recording("a", 0.5, "a.wav", "theo", "SEVEN")])
    >>> from speechbrain.dataio.dataset import DynamicItemDataset
    >>> data = DynamicItemDataset.from_csv(path)
    >>> data.set_output_keys(["wrd", "duration"])
    >>> data[0]
    {'wrd': 'SEVEN', 'duration': 0.5}
    """
    path = os.fspath(path)
    as_json = path.endswith(".json")
    if not as_json and not path.endswith(".csv"):
        raise ValueError(f"{path}: expected a name in .csv or .json")
    mark = _MARKS[as_json]
    rows, seen = [], set()
    for number, item in enumerate(recordings, start=1):
        row = dict(item.row() if isinstance(item, Recording) else item)
        _check_row_to_write(path, number, row, seen, as_json)
        row = {k: _relative(v, data_root, mark) for k, v in row.items()}
        rows.append(row)
    if as_json:
        write_json(path, {row.pop("ID"): row for row in rows})
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path, "w") as stream:
        writer = csv.DictWriter(
            stream, columns or REQUIRED, restval="", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


class _Fault(Exception):
    """What is wrong with one row."""


def _read_csv(path):
    with open(path, encoding="utf-8-sig", newline="") as stream:
        # As SpeechBrain reads them: "ID, duration, wav" is what people write.
        reader = csv.DictReader(stream, skipinitialspace=True)
        try:
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            missing = [name for name in REQUIRED if name not in columns]
            if missing:
                fault = (
                    f"missing column{'s' * (len(missing) > 1)} "
                    f"{', '.join(missing)}; found {', '.join(columns)}; "
                    f"expected at least {','.join(REQUIRED)}. Is it the right "
                    "file?"
                )
                raise ManifestError(path, [fault])
            return [(f"row {reader.line_num}", row) for row in reader]
        except csv.Error as error:
            fault = (
                f"near line {reader.line_num}: {error}. Is a quotation mark "
                "missing?"
            )
            raise ManifestError(path, [fault]) from error
        except UnicodeDecodeError as error:
            fault = f"not a CSV file in UTF-8 ({error}). Save it as such"
            raise ManifestError(path, [fault]) from error


def _read_json(path):
    with open(path, encoding="utf-8") as stream:
        try:
            content = json.load(stream)
        except ValueError as error:
            fault = f"not JSON ({error}). Make the manifest again"
            raise ManifestError(path, [fault]) from error
    if not isinstance(content, dict) or not all(
        isinstance(row, dict) for row in content.values()
    ):
        fault = "expected an object of objects, one for each ID"
        raise ManifestError(path, [fault])
    return [
        (
            f"entry {number}",
            # null says that it is not known.
            {"ID": key, **{k: v for k, v in row.items() if v is not None}},
        )
        for number, (key, row) in enumerate(content.items(), start=1)
    ]


def _parse(row, data_root):
    """Turn a row of strings into a Recording, or say what is wrong."""
    row = dict(row)
    if None in row or None in row.values():
        raise _Fault(
            "another number of cells than the header has. Quote cells that "
            "hold commas"
        )
    for name in REQUIRED:
        if not str(row.get(name, "")).strip():
            raise _Fault(f"{name} is empty; fill the cell or drop the row")
    try:
        duration = float(row.pop("duration"))
    except ValueError:
        duration = math.nan
    if not (math.isfinite(duration) and duration > 0):
        raise _Fault("duration is not a number of seconds above 0")
    wav = str(row.pop("wav")).strip()
    if any(mark in wav for mark in _MARKS):
        # Not put in front twice, where the folder's own path is relative.
        for mark in _MARKS:
            wav = wav.replace(mark, data_root)
    else:
        wav = os.path.join(data_root, wav)
    accent = row.pop("accent", None) or row.pop("accent_or_domain", None)
    row.pop("accent_or_domain", None)
    return Recording(
        ID=str(row.pop("ID")).strip(),
        duration=duration,
        wav=os.path.normpath(wav),
        spk_id=str(row.pop("spk_id")).strip(),
        wrd=" ".join(str(row.pop("wrd")).split()),
        accent=accent or "",
        split=row.pop("split", "") or "",
        extra=row,
    )


def _check_audio(recording, sample_rate, check):
    from speechbrain.dataio import audio_io

    path = recording.wav
    if check == "none":
        return
    if not os.path.isfile(path):
        raise _Fault(
            f"missing file {path}; check the data folder ($data_root) or "
            "fetch the recording"
        )
    if check == "files":
        return
    try:
        info = audio_io.info(path)
    except RuntimeError as error:
        raise _Fault(
            f"unreadable audio {path} ({error.__cause__}); fetch the "
            "recording again"
        ) from error
    if info.frames <= 0:
        raise _Fault(f"no samples in {path}; fetch it again or drop the row")
    if sample_rate is not None and info.sample_rate != sample_rate:
        raise _Fault(
            f"{path} has {info.sample_rate} Hz, expected {sample_rate} Hz; "
            "convert it or set the sample rate accordingly"
        )
    if abs(info.duration - recording.duration) > DURATION_TOLERANCE:
        raise _Fault(
            f"duration {recording.duration:.4f} s, but {path} lasts "
            f"{info.duration:.4f} s; make the manifest again, or fetch a "
            "recording that was cut short"
        )
    if check == "decode":
        try:
            wave = read_audio(path, info.sample_rate)
        except ValueError as error:
            raise _Fault(str(error)) from error
        if len(wave) != info.frames:
            raise _Fault(
                f"{path} is cut short: {len(wave)} of {info.frames} samples; "
                "fetch it again"
            )


def _only_splits(path, recordings, splits):
    splits = (splits,) if isinstance(splits, str) else tuple(splits)
    kept = [row for row in recordings if row.split in splits]
    absent = set(splits) - {row.split for row in kept}
    if absent:
        found = sorted({row.split for row in recordings})
        fault = (
            f"no row of split {', '.join(sorted(absent))}; the splits found "
            f"are {', '.join(map(repr, found)) or 'none'}"
        )
        raise ManifestError(path, [fault])
    return kept


def _check_row_to_write(path, number, row, seen, as_json):
    for name in ("ID", "duration"):
        if name not in row:
            raise ManifestError(path, [f"row {number}: lacks {name}"])
    if row["ID"] in seen:
        raise ManifestError(path, [f"row {number}: duplicate ID {row['ID']!r}"])
    seen.add(row["ID"])
    lists = [k for k, v in row.items() if isinstance(v, (list, tuple, dict))]
    if lists and not as_json:
        fault = (
            f"row {number} (ID {row['ID']}): {', '.join(lists)} is not a "
            "single value; write such a manifest as .json"
        )
        raise ManifestError(path, [fault])


def _relative(value, data_root, mark):
    """Replace the leading data folder of a path, or of a list of paths."""
    if isinstance(value, (list, tuple)):
        return [_relative(part, data_root, mark) for part in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if data_root is None or not isinstance(value, str):
        return value
    for folder in (os.path.abspath(data_root), os.fspath(data_root)):
        # "", this folder, is in front of every text.
        root = os.path.join(folder, "")
        if root and value.startswith(root):
            return f"{mark}/{value.removeprefix(root)}"
    return value
