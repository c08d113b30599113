"""What a study depends on, noted in its folder and compared with it."""

import contextlib
import inspect
import json
import os
from pathlib import Path

from speechbrain_taskarith.utils.files import read_json, sha256_of, write_json
from speechbrain_taskarith.vectors import Rule
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning

SETTINGS = "study.json"

# What a study that goes on may be given anew: no training depends on it.
MAY_CHANGE = frozenset(
    "choose_on ckpt_interval_minutes ckpt_interval_steps coverage kept "
    "num_workers only pretraining_domains report_on save_env_desc skip_prep "
    "streamed_strings target_bleu test_batch_size zero_shot".split()
)


def settings_among(hparams):
    """Return those of all hparams: plain values that are no paths."""
    hparams = dict(hparams)
    if isinstance(hparams.get("rows"), dict):
        hparams |= rows_as_settings(hparams.pop("rows"))
    found = {}
    for key in sorted(hparams.keys() - MAY_CHANGE):
        with contextlib.suppress(TypeError):
            found[key] = _plain(hparams[key])
    return found


def rows_as_settings(rows):
    """Return what each row is, for `note_settings`: one may be added.

    `rows` is `{name: {"rule" or "method": object, ...}}`.
    """
    return {
        f"row {name}": {key: _described(part) for key, part in row.items()}
        for name, row in rows.items()
    }


def _described(part):
    """Write down a rule or a method with its arguments, or a plain value."""
    if isinstance(part, Rule):
        return part.describe()
    if not isinstance(part, FineTuning):
        return part
    kind = type(part)
    arguments = inspect.signature(kind).parameters
    return {kind.__name__: {name: getattr(part, name) for name in arguments}}


def _plain(value, is_path=lambda word: os.sep in word):
    """Return a number, a word, or lists of them, of a dict its items.

    Raises TypeError for all else, and for paths, since a folder may move. The
    order of a dict counts; its words are names, which may hold a slash.
    """
    if isinstance(value, dict):
        return [[k, _plain(v, os.path.isabs)] for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(part, is_path) for part in value]
    if isinstance(value, str) and not is_path(value):
        return value
    if value is None or isinstance(value, (int, float)):
        return value
    raise TypeError(f"{value!r} is no plain value")


def check_settings(folder, settings):
    """Refuse to go on where a study has begun with other settings.

    What is trained and measured is found again by its name, which does not
    say how it was made. Only what both runs know is compared: a further seed
    may bring settings of its own.

    Arguments
    ---------
    folder : str or pathlib.Path
        The study's output folder.
    settings : dict
        Plain values by what they are called in the error.

    Returns
    -------
    dict
        These and what was noted before.
    """
    path = Path(folder) / SETTINGS
    noted = read_json(path) if path.exists() else {}
    # As they are read again: a tuple is a list.
    settings = json.loads(json.dumps(settings, default=str))
    for key, value in settings.items():
        if noted.get(key, value) != value:
            raise ValueError(
                f"{folder} holds a run with another {key} ({noted[key]!r}, now "
                f"{value!r}); give another folder (--output, --study_folder, "
                "--output_folder, OUTPUT=... of make), or remove this one"
            )
    return noted | settings


def note_settings(folder, settings):
    """Check settings and note them: from here on something is trained."""
    write_json(Path(folder) / SETTINGS, check_settings(folder, settings))


def content_of(manifests):
    """Return short digests of files for `note_settings`: `{name: digest}`."""
    return {name: sha256_of(path)[:12] for name, path in manifests.items()}
