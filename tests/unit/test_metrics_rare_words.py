"""Rare words: the definition, and counts against totals and small cases."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_taskarith.metrics import RareWords, rare_words_by_language, wer

WORDS = st.lists(st.sampled_from("abcde"), max_size=7)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)


def rare_by_definition(lines, coverage):
    """Most frequent words first, until they cover the share."""
    running = [word for line in lines for word in line]
    words = sorted(set(running), key=lambda w: (-running.count(w), w))
    covered, last = 0, None
    for word in words:
        covered += running.count(word)
        last = running.count(word)
        if covered * 1000 >= round(1000 * coverage) * len(running):
            break
    return {word for word in words if running.count(word) < last}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(WORDS.filter(bool), min_size=1, max_size=8),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_rare_is_outside_of_the_coverage(lines, coverage):
    rare = RareWords.from_transcripts(lines, coverage)
    seen = {word for line in lines for word in line}
    assert {w for w in seen if w in rare} == rare_by_definition(lines, coverage)
    assert "never seen" in rare
    other = RareWords.from_transcripts(lines[::-1], coverage)
    assert other.min_count == rare.min_count


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.integers(1, 4))
def test_groups_add_up_to_the_word_errors(pairs, min_count):
    rare = RareWords({"a": 1, "b": 2, "c": 3}, min_count)
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    report = rare.report(references, hypotheses)
    whole = wer(references, hypotheses)
    assert report.words == whole.words
    assert report.insertions == whole.insertions
    assert report.errors == whole.errors
    for kind in ("hits", "substitutions", "deletions"):
        both = getattr(report.rare, kind) + getattr(report.frequent, kind)
        assert both == getattr(whole, kind)
    count = sum(word in rare for line in references for word in line)
    assert report.rare.words == count


def test_transcripts_by_id_and_text_that_is_normalised():
    lines = {"u1": "The cat", "u2": "the dog"}
    rare = RareWords.from_transcripts(lines, min_count=2)
    assert rare.counts == {"The": 1, "cat": 1, "the": 1, "dog": 1}
    report = rare.report(["THE OWL"], ["the owl"], normalize=str.lower)
    assert (report.rare.words, report.rare.wer) == (2, 0.0)


def test_errors_belong_to_reference_words():
    rare = RareWords({"the": 9, "sat": 9}, 2)
    report = rare.report(
        ["the cat sat", "the dog sat", "sat"],
        ["the bat sat", "the sat", "sat on"],
    )
    assert (report.rare.substitutions, report.rare.deletions) == (1, 1)
    assert report.rare.wer == 100.0 and report.frequent.wer == 0.0
    assert report.insertions == 1
    assert report.wer == pytest.approx(100 * 3 / 7)
    # A rare word that was only inserted belongs to nobody.
    report = rare.report(["the sat"], ["the okapi sat"])
    assert report.rare.words == 0 and report.insertion_rate == 50.0


def test_by_language_uses_each_ones_counts():
    lists = {
        "de": RareWords({"die": 9, "tat": 1}, 2),
        "en": RareWords({"die": 1, "tat": 9}, 2),
    }
    references = {"u1": "die tat", "u2": "die tat", "u3": "die"}
    hypotheses = {"u1": "die", "u2": "die", "u3": ""}
    languages = {"u1": "de", "u2": "en", "u3": "en"}
    found = rare_words_by_language(lists, references, hypotheses, languages)
    assert list(found) == ["de", "en"]
    assert (found["de"].rare.errors, found["de"].rare.words) == (1, 1)
    assert (found["en"].rare.errors, found["en"].rare.words) == (1, 2)
    assert sum(found.values()).words == 5
    with pytest.raises(ValueError, match="'it': no definition"):
        rare_words_by_language(lists, ["a"], ["a"], ["it"])
    with pytest.raises(ValueError, match="2 languages"):
        rare_words_by_language(lists, ["a"], ["a"], ["de", "en"])


def test_bad_input():
    with pytest.raises(ValueError, match="no words"):
        RareWords.from_transcripts(["", " "])
    for coverage in (0.0, 1.1):
        with pytest.raises(ValueError, match="coverage"):
            RareWords.from_transcripts(["a"], coverage)
    with pytest.raises(ValueError, match="min_count 0"):
        RareWords.from_transcripts(["a"], min_count=0)
    with pytest.raises(TypeError, match="a single string"):
        RareWords.from_transcripts("the cat the cat")
    with pytest.raises(ValueError, match="1 references but 2"):
        RareWords({"a": 1}, 1).report(["a"], ["a", "b"])
