"""Digits as if recorded, in FSDD's layout, for the tests of its recipes.

Skips the test where there is no espeak-ng.
"""

import pytest


def make_corpus(tmp_path_factory, speakers=2, accents=False, **options):
    """Make a corpus in FSDD's layout; return its folder.

    Arguments
    ---------
    tmp_path_factory : pytest.TempPathFactory
        Of the session.
    speakers : int or None
        The first so many; None: all.
    accents : bool
        Only the first of these speakers of each accent.
    options : dict
        What `make_digits_corpus` is to do otherwise.
    """
    pytest.importorskip("espeakng_loader")
    from common.corpora import SIMULATED_SPEAKERS, make_digits_corpus

    chosen = SIMULATED_SPEAKERS[:speakers]
    if accents:
        first = {}
        for speaker in chosen:
            first.setdefault(speaker.accent, speaker)
        chosen = list(first.values())
    folder = tmp_path_factory.mktemp("corpus")
    settings = {
        "takes": 12,
        "words": ["ONE", "TWO", "SIX"],
        "voices": ["en-us+f1", "en-us+m1"],
        "synthetic_takes": 1,
        "show_progress": False,
    }
    make_digits_corpus(folder, speakers=chosen, **{**settings, **options})
    return folder / "recorded"
