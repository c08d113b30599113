"""Word error counts against a naive edit distance, and what may go wrong."""

import math
import pickle
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_taskarith.metrics import WERReport, by_domain, wer

SENTENCE = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=7)


def edit_distance(reference, hypothesis):
    """Levenshtein's recursion over words, as the textbook writes it."""
    table = [
        [max(i, j) if 0 in (i, j) else None for j in range(len(hypothesis) + 1)]
        for i in range(len(reference) + 1)
    ]
    for i, r in enumerate(reference, 1):
        for j, h in enumerate(hypothesis, 1):
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (r != h),
            )
    return table[-1][-1]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=6))
def test_counts_are_a_least_alignment(pairs):
    report = wer([r for r, _ in pairs], [h for _, h in pairs])
    for (reference, hypothesis), counts in zip(pairs, report.utterances):
        assert counts.errors == edit_distance(reference, hypothesis)
        assert counts.words == len(reference)
        in_hypothesis = counts.hits + counts.substitutions + counts.insertions
        assert in_hypothesis == len(hypothesis)
    errors = sum(edit_distance(*pair) for pair in pairs)
    words = sum(len(reference) for reference, _ in pairs)
    assert report.errors == errors
    assert report.sentence_errors == sum(r != h for r, h in pairs)
    if words:
        assert report.wer == pytest.approx(100 * errors / words)


def test_agrees_with_speechbrain():
    from speechbrain.utils.metric_stats import ErrorRateStats

    references = ["one two three", "four", "five six", "seven eight nine", "x"]
    hypotheses = ["one too three", "", "five six six", "eight nine seven", "x"]
    stats = ErrorRateStats()
    ids = ["a", "b", "c", "d", "e"]
    stats.append(
        ids, [h.split() for h in hypotheses], [r.split() for r in references]
    )
    theirs = stats.summarize()
    ours = wer(references, hypotheses, ids)
    assert ours.wer == pytest.approx(theirs["WER"])
    assert ours.insertions == theirs["insertions"]
    assert ours.deletions == theirs["deletions"]
    assert ours.substitutions == theirs["substitutions"]
    assert ours.sentence_errors == theirs["num_erroneous_sents"]
    assert ours.sentence_error_rate == 80.0


def test_strings_and_word_lists_agree_and_spaces_do_not_count():
    strings = wer(["one  two ", "\tsix"], ["one two", "six\n"])
    lists = wer([["one", "two"], ["six"]], [["one", "two"], ["six"]])
    assert strings == lists
    assert strings.wer == 0.0


def test_words_with_a_space_stay_one_word():
    report = wer([["New York", "city"]], [["New York", "pity"]])
    assert (report.words, report.substitutions) == (2, 1)


def test_case_and_punctuation_count():
    assert wer(["One two."], ["one two"]).wer == 100.0


def test_empty_reference_counts_insertions():
    report = wer(["one two", ""], ["one two", "three four"])
    assert report.insertions == 2
    assert report.wer == 100.0
    assert report.sentence_errors == 1


def test_only_empty_references():
    assert wer(["", []], [[], ""]).wer == 0.0
    assert math.isinf(wer([""], ["one"]).wer)


def test_reports_pool_errors_over_words():
    # 3 words with 1 error and 1 word with 1 error: 2 / 4, not mean(33, 100).
    total = wer(["a b c"], ["a b d"]) + wer(["a"], ["b"])
    assert total.wer == 50.0
    assert total.sentences == 2


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(SENTENCE, SENTENCE, st.sampled_from("xyz")),
        min_size=1,
        max_size=8,
    )
)
def test_domains_partition_the_whole(items):
    references, hypotheses, domains = map(list, zip(*items))
    parts = by_domain(references, hypotheses, domains)
    assert list(parts) == list(dict.fromkeys(domains))
    whole = wer(references, hypotheses)
    pooled = sum(parts.values())
    assert sorted(pooled.utterances) == sorted(whole.utterances)
    for domain, report in parts.items():
        mine = [i for i, d in enumerate(domains) if d == domain]
        assert report == wer(
            [references[i] for i in mine],
            [hypotheses[i] for i in mine],
            ids=mine,
        )


def test_dicts_match_by_id():
    references = {"u1": "one two", "u2": "six"}
    hypotheses = {"u2": "six", "u1": "one too"}
    report = wer(references, hypotheses)
    assert report.ids == ("u1", "u2")
    assert report.errors == 1
    domains = {"u2": "de", "u1": "us", "other": "fr"}
    assert by_domain(references, hypotheses, domains)["us"].wer == 50.0


def test_report_prints_and_pickles():
    report = wer(["one two", "six"], ["one six six", "six"])
    assert str(report) == (
        "WER 66.67 % (2 / 3 words: 1 sub, 0 del, 1 ins), 1 of 2 sentences wrong"
    )
    assert pickle.loads(pickle.dumps(report)) == report
    assert "66.67" in repr(report)


def test_sum_refuses_other_things():
    with pytest.raises(TypeError):
        wer(["a"], ["a"]) + 3.0
    assert isinstance(sum([wer(["a"], ["a"])]), WERReport)


@pytest.mark.parametrize(
    "references, hypotheses, error, text",
    [
        (["a", "b"], ["a"], ValueError, "2 references but 1 hypotheses"),
        ([], [], ValueError, "no utterances"),
        ({}, {}, ValueError, "no utterances"),
        ("one", ["one"], TypeError, "single string"),
        (["one"], "one", TypeError, "single string"),
        (["a", None], ["a", "b"], TypeError, "utterance '1': the reference"),
        (["a"], [float("nan")], TypeError, "utterance '0': the hypothesis"),
        (["a"], [["b", 3]], TypeError, "utterance '0': the hypothesis"),
        ({"u": "a"}, {"v": "a"}, ValueError, "'u' has no hypothesis"),
        ({"u": "a"}, {"u": "a", "v": ""}, ValueError, "'v' has an unexpected"),
        ({"u": "a"}, ["a"], TypeError, "both be dicts"),
    ],
)
def test_bad_input_is_named(references, hypotheses, error, text):
    with pytest.raises(error, match=text):
        wer(references, hypotheses)


def test_normalize_is_applied_to_both_sides():
    # The same word, composed and decomposed; both apostrophes.
    references = ["Café it's", ["ONE", "two"]]
    hypotheses = ["cafe\u0301 it\u2019s", ["one", "TWO"]]

    def normalize(text):
        text = unicodedata.normalize("NFC", text).replace("\u2019", "'")
        return text.casefold()

    assert wer(references, hypotheses).wer == 100.0
    report = wer(references, hypotheses, normalize=normalize)
    assert (report.wer, report.words) == (0.0, 4)
    reports = by_domain(
        references, hypotheses, ["fr", "en"], normalize=normalize
    )
    assert [one.wer for one in reports.values()] == [0.0, 0.0]
    with pytest.raises(TypeError, match="utterance 'u': normalize returned"):
        wer({"u": "a"}, {"u": "a"}, normalize=lambda text: None)


def test_bad_ids_and_domains_are_named():
    with pytest.raises(ValueError, match="2 utterances but 1 ids"):
        wer(["a", "b"], ["a", "b"], ids=["u"])
    with pytest.raises(ValueError, match="2 utterances but 1 domains"):
        by_domain(["a", "b"], ["a", "b"], ["us"])
    with pytest.raises(ValueError, match="'v': no domain"):
        by_domain({"u": "a", "v": "b"}, {"u": "a", "v": "b"}, {"u": "us"})
