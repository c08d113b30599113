"""Words and characters, counted as Whisper's authors count them."""

import functools
import hashlib
import json
from pathlib import Path

from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.utils.files import read_json, write_json
from speechbrain_taskarith.utils.optional import require

normalizers = require(
    "transformers.models.whisper.english_normalizer",
    "huggingface",
    "scoring as Whisper's authors do",
)


@functools.lru_cache
def normalizer(language, spelling=()):
    """Return Whisper's text normaliser of a language code."""
    if language == "en":
        return normalizers.EnglishTextNormalizer(dict(spelling))
    return normalizers.BasicTextNormalizer()


def normalize(text, language, tokenizer=None):
    """Return a text as it is scored: no case, no punctuation.

    English also unifies numbers, contractions and, where the tokenizer has
    its table, spelling.
    """
    table = getattr(tokenizer, "english_spelling_normalizer", None) or {}
    found = normalizer(language, tuple(table.items()))(text)
    return " ".join(found.split())


def character_errors(references, hypotheses):
    """Count the errors of characters, spaces among them."""
    return wer(
        {key: list(text) for key, text in references.items()},
        {key: list(text) for key, text in hypotheses.items()},
    )


def recognised_once(folder, name, manifest, recognise):
    """Return `{"references", "hypotheses"}` of a model on a manifest.

    `name`, plain values, says what the model is. `recognise()` returns both
    texts by ID; it is called only where `folder` does not hold them yet.
    """
    asked = json.dumps([name, str(manifest)])
    key = hashlib.sha256(asked.encode()).hexdigest()[:16]
    path = Path(folder) / f"{key}.json"
    if not path.exists():
        references, hypotheses = recognise()
        write_json(
            path,
            {
                "name": name,
                "manifest": str(manifest),
                "references": references,
                "hypotheses": hypotheses,
            },
        )
    return read_json(path)
