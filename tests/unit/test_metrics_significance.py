"""The bootstrap against its known large-sample behaviour."""

import itertools

import numpy as np
import pytest
import torch

from speechbrain_taskarith.metrics import (
    confidence_interval,
    paired_bootstrap,
    wer,
)


def system(error_probability, utterances=400, seed=0):
    """Report of a system that errs on each of 5 words independently."""
    generator = np.random.default_rng(seed)
    wrong = generator.random((utterances, 5)) < error_probability
    hypotheses = [
        " ".join("x" if w else "a" for w in sentence) for sentence in wrong
    ]
    return wer(["a a a a a"] * utterances, hypotheses)


def test_interval_matches_the_normal_approximation():
    report = system(0.3, utterances=2000)
    low, high = confidence_interval(report, level=0.95, resamples=4000)
    errors = np.array([u.errors for u in report.utterances])
    # Utterances are equally long, so the WER is a mean of independent terms.
    half = 1.96 * 100 * errors.std() / 5 / np.sqrt(len(errors))
    assert low == pytest.approx(report.wer - half, abs=0.1 * half)
    assert high == pytest.approx(report.wer + half, abs=0.1 * half)


def test_interval_covers_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(100):
        low, high = confidence_interval(
            system(0.2, utterances=100, seed=seed), level=0.9, resamples=300
        )
        inside += low <= 20.0 <= high
    # 100 draws with p = 0.9: outside 80..98 has a probability below 0.2 %.
    assert 80 <= inside <= 98


def test_same_seed_same_interval():
    report = system(0.3, utterances=50)
    assert confidence_interval(report) == confidence_interval(report)
    assert confidence_interval(report) != confidence_interval(report, seed=1)


def test_one_utterance_or_no_error_has_no_width():
    report = wer(["a b"], ["a c"])
    assert confidence_interval(report) == (50.0, 50.0)
    assert confidence_interval(wer(["a"] * 9, ["a"] * 9)) == (0.0, 0.0)


def test_draws_of_empty_references_alone_do_not_count():
    # Noise without speech: half of the words are in one utterance of three.
    said = ["a b c", "", ""]
    first = wer(said, ["a b x", "n", ""])
    second = wer(said, ["a b c", "n n", "n"])
    counts = np.array([[3, 1, 0], [0, 1, 2], [0, 0, 1]])
    drawn = np.array([*itertools.product(range(3), repeat=3)] * 100)
    sums = counts[drawn].sum(1)
    sums = sums[sums[:, 0] > 0]
    rates = 100 * sums[:, 1:] / sums[:, :1]
    low, high = confidence_interval(first, 0.9, resamples=20_000)
    exact = np.quantile(rates[:, 0], [0.05, 0.95])
    np.testing.assert_allclose([low, high], exact)
    test = paired_bootstrap(first, second, resamples=20_000)
    differences = rates[:, 0] - rates[:, 1]
    exact = np.quantile(differences, [0.025, 0.975])
    np.testing.assert_allclose([test.low, test.high], exact)
    far = abs(differences - test.difference) >= abs(test.difference) - 1e-9
    assert test.p_value == pytest.approx(far.mean(), abs=0.02)


def test_blocks_widen_the_interval_of_dependent_utterances():
    # Two of four speakers are always wrong: utterances say little more than
    # their speaker does.
    speakers = [i % 4 for i in range(400)]
    hypotheses = ["a" if s < 2 else "x" for s in speakers]
    report = wer(["a"] * 400, hypotheses)
    low, high = confidence_interval(report)
    block_low, block_high = confidence_interval(report, blocks=speakers)
    assert block_high - block_low > 3 * (high - low)
    by_id = dict(zip(report.ids, speakers))
    for form in (torch.tensor(speakers), np.array(speakers), by_id):
        found = confidence_interval(report, blocks=form)
        assert found == (block_low, block_high)
    del by_id["3"]
    with pytest.raises(ValueError, match="'3': no block label given"):
        confidence_interval(report, blocks=by_id)


def test_paired_test_finds_a_real_difference():
    test = paired_bootstrap(system(0.30), system(0.20, seed=1))
    assert test.low > 0
    assert test.p_value < 0.01
    assert test.probability_of_improvement > 0.99


def test_paired_test_does_not_find_what_is_not_there():
    # Under the null hypothesis p-values are uniform: 5 % below 0.05.
    small = sum(
        paired_bootstrap(
            system(0.3, 80, seed), system(0.3, 80, 1000 + seed), resamples=300
        ).p_value
        < 0.05
        for seed in range(100)
    )
    assert small <= 13


def test_pairing_cancels_what_both_find_hard():
    # Utterance difficulty varies a lot; the second system errs on exactly
    # one word less in every tenth utterance.
    generator = np.random.default_rng(0)
    wrong = generator.integers(1, 10, size=200)
    first = [" ".join(["x"] * n + ["a"] * (10 - n)) for n in wrong]
    better = [n - (i % 10 == 0) for i, n in enumerate(wrong)]
    second = [" ".join(["x"] * n + ["a"] * (10 - n)) for n in better]
    references = ["a a a a a a a a a a"] * 200
    a, b = wer(references, first), wer(references, second)
    assert paired_bootstrap(a, b).p_value < 0.01
    # Unpaired, the intervals overlap almost wholly.
    assert confidence_interval(a)[0] < b.wer


def test_equal_systems():
    report = system(0.3)
    test = paired_bootstrap(report, report)
    assert (test.difference, test.low, test.high) == (0.0, 0.0, 0.0)
    assert test.p_value == 1.0
    assert test.probability_of_improvement == 0.0


def test_bad_input_is_named():
    report = system(0.3, 10)
    with pytest.raises(ValueError, match="level is 95"):
        confidence_interval(report, level=95)
    with pytest.raises(ValueError, match="resamples is 0"):
        confidence_interval(report, resamples=0)
    with pytest.raises(ValueError, match="10 utterances but 2 block"):
        confidence_interval(report, blocks=["a", "b"])
    with pytest.raises(ValueError, match="no reference words"):
        confidence_interval(wer([""], ["a"]))
    with pytest.raises(ValueError, match="different utterances"):
        paired_bootstrap(report, system(0.3, 9))
    with pytest.raises(ValueError, match="'0' has 1 reference words"):
        paired_bootstrap(wer(["a"], ["a"]), wer(["a b"], ["a"]))
