"""What a manifest must have before anything is trained on it."""

import math
from pathlib import Path

from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)


def keep_short(path, rows, longest):
    """Return the rows of at most `longest` seconds; tell of the others.

    `rows`: `{ID: {duration, ...}}` of a manifest; `longest` None: all.
    """
    if longest is None:
        return rows
    kept = {k: row for k, row in rows.items() if row["duration"] <= longest}
    if not kept:
        raise ValueError(
            f"{path}: no utterances of at most {longest:g} s; raise "
            "--avoid_if_longer_than"
        )
    if len(kept) < len(rows):
        logger.info(
            f"{path}: {len(rows) - len(kept)} of {len(rows)} utterances are "
            f"longer than {longest:g} s and left out; an error rate on it is "
            "that of the others"
        )
    return kept


def check_rows(path, rows, whisper, language):
    """Refuse, before anything is trained, what would go wrong in it.

    `rows`: `{ID: {duration, text, lang}}` of a manifest.
    """
    silent = [key for key, row in rows.items() if not row["text"].strip()]
    if silent:
        raise ValueError(
            f"{path}: {len(silent)} utterances have no text, e.g. "
            f"{', '.join(silent[:3])}; fill the column or leave them out"
        )
    gone = [k for k, row in rows.items() if not Path(row["wav"]).is_file()]
    if gone:
        raise FileNotFoundError(
            f"{path}: {gone[0]}: {rows[gone[0]]['wav']}: no such file, one of "
            f"{len(gone)}; correct the column wav, or --data_root, which "
            "stands for $data_root in it"
        )
    long = [
        key for key, row in rows.items() if row["duration"] > whisper.window
    ]
    if long:
        longest = max(row["duration"] for row in rows.values())
        raise ValueError(
            f"{path}: {len(long)} utterances are longer than the window of "
            f"{whisper.window:g} s, e.g. {', '.join(long[:3])}; give a model "
            f"with a window of {math.ceil(longest)} s (whisper_window.py "
            "--seconds), "
            "or --avoid_if_longer_than to leave them out"
        )
    known = whisper.languages
    for key, row in rows.items():
        lang = row.get("lang") or language
        if lang in known:
            continue
        if known == {"en"}:
            raise ValueError(
                f"{path}: {key}: language {lang!r}, but the model is an "
                "English-only Whisper; give a multilingual one, e.g. "
                "openai/whisper-base, or, where the speech is English, set "
                "the column lang, or --language, to 'en'"
            )
        raise ValueError(
            f"{path}: {key}: language {lang!r} is not one that this Whisper "
            "knows; set the column lang, or --language, to a code such as 'nl'"
        )


def warn_of_shared(rows):
    """Warn where a recording or a level is in two splits: it tests nothing."""
    for column in ("wav", "level"):
        seen = {}
        for split, found in rows.items():
            for key, row in found.items():
                value = row.get(column)
                if value and seen.setdefault(value, split) != split:
                    logger.warning(
                        f"{key}: {column} {value!r} is in {seen[value]}_csv "
                        f"and in {split}_csv; an error rate on what was "
                        "trained or chosen on tells nothing"
                    )
                    break
