"""Words and characters, counted as Whisper's authors count them."""

import functools

from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from speechbrain_taskarith.metrics import wer


@functools.lru_cache
def normalizer(language, spelling=()):
    """Return Whisper's text normaliser of a language code."""
    if language == "en":
        return EnglishTextNormalizer(dict(spelling))
    return BasicTextNormalizer()


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
