"""How sure a word error rate is: bootstrap over utterances."""

from dataclasses import dataclass

import numpy as np

from speechbrain_taskarith.metrics.word_errors import one_each

# Resamples drawn at once: bounds memory at about 32 MB for any corpus.
_CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class PairedBootstrap:
    """What a paired bootstrap test found.

    Arguments
    ---------
    difference : float
        WER of the first system minus that of the second, in percentage
        points; of BLEU and chrF the second's minus the first's. Positive
        where the second is better.
    low, high : float
        Ends of the confidence interval of the difference.
    probability_of_improvement : float
        Share of resamples in which the second system is strictly better.
    p_value : float
        Two-sided: how easily a difference at least as far from 0 arises by
        chance, from the resampled differences centred at 0.
    """

    difference: float
    low: float
    high: float
    probability_of_improvement: float
    p_value: float


def confidence_interval(
    report, level=0.95, resamples=2000, seed=0, blocks=None
):
    """Percentile bootstrap interval of a WER.

    Whole utterances are drawn with replacement, since errors within one
    depend on each other (Bisani and Ney, "Bootstrap estimates for
    confidence intervals in ASR performance evaluation", ICASSP 2004,
    section 3). Draws without a single reference word, which have no rate,
    are made again.

    Arguments
    ---------
    report : WERReport
        What `wer` returned.
    level : float
        Coverage, in (0, 1).
    resamples : int
        Number of bootstrap samples, at least 1.
    seed : int
        Of the draws; the same seed gives the same interval.
    blocks : sequence or None
        A label per utterance, e.g. its speaker: whole blocks are drawn
        instead, for utterances that are not independent of one another.

    Returns
    -------
    tuple of float
        `(low, high)` in %.

    Raises
    ------
    ValueError
        A level, number or block list out of range, or a report without a
        single reference word.

    Example
    -------
    >>> from speechbrain_taskarith.metrics import wer
    >>> report = wer(["one two"] * 30, ["one two"] * 20 + ["one six"] * 10)
    >>> low, high = confidence_interval(report)
    >>> low < report.wer < high
    True
    """
    quantiles = _quantiles(level)
    rates = _resampled_rates([report], blocks, resamples, seed)
    low, high = np.quantile(rates, quantiles).tolist()
    return low, high


def paired_bootstrap(
    first, second, level=0.95, resamples=2000, seed=0, blocks=None
):
    """Test whether two systems differ on the same utterances.

    Both systems are scored on the same resampled utterances, so that how
    hard an utterance is cancels out (Bisani and Ney 2004, section 4).

    Arguments
    ---------
    first, second : WERReport
        Of the baseline and of the other system, on the same utterances in
        the same order.
    level, resamples, seed, blocks
        See `confidence_interval`.

    Returns
    -------
    PairedBootstrap
        Difference, interval and probabilities.

    Raises
    ------
    ValueError
        The reports are not over the same utterances.

    Example
    -------
    >>> from speechbrain_taskarith.metrics import wer
    >>> words = ["one two three four"] * 50
    >>> base = wer(words, ["one two six four"] * 40 + words[:10])
    >>> edited = wer(words, ["one two six four"] * 10 + words[:40])
    >>> test = paired_bootstrap(base, edited)
    >>> test.difference, test.low > 0, test.p_value < 0.01
    (15.0, True, True)
    """
    quantiles = _quantiles(level)
    if first.ids != second.ids:
        raise ValueError(
            "the two reports name different utterances or another order; "
            "score both systems on one test set"
        )
    for a, b in zip(first.utterances, second.utterances):
        if a.words != b.words:
            raise ValueError(
                f"utterance {a.id!r} has {a.words} reference words in the "
                f"first report and {b.words} in the second; use the same "
                "references"
            )
    rates = _resampled_rates([first, second], blocks, resamples, seed)
    differences = rates[:, 0] - rates[:, 1]
    observed = first.wer - second.wer
    low, high = np.quantile(differences, quantiles).tolist()
    # Add-one keeps the p-value honest: it can never be below 1 / resamples.
    # The margin keeps rounding from turning an exact tie into a difference.
    as_far = np.abs(differences - observed) >= abs(observed) - 1e-9
    return PairedBootstrap(
        difference=observed,
        low=low,
        high=high,
        probability_of_improvement=float((differences > 0).mean()),
        p_value=float((1 + as_far.sum()) / (1 + resamples)),
    )


def _quantiles(level):
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a number in (0, 1)")
    return (1 - level) / 2, (1 + level) / 2


def _block_counts(reports, blocks):
    """Return words and each report's errors per block, [blocks, 1 + R]."""
    if reports[0].words == 0:
        raise ValueError("the report holds no reference words")
    columns = [[u.words for u in reports[0].utterances]]
    columns += [[u.errors for u in report.utterances] for report in reports]
    counts = np.array(columns, dtype=np.float64).T
    return sum_blocks(counts, blocks, reports[0].ids)


def sum_blocks(counts, blocks, ids):
    """Add up counts [utterances, columns] by their labels, None: each its own."""
    if blocks is None:
        return counts
    blocks = one_each(blocks, ids, "block label")
    number = {label: i for i, label in enumerate(dict.fromkeys(blocks))}
    summed = np.zeros((len(number), counts.shape[1]))
    np.add.at(summed, [number[label] for label in blocks], counts)
    return summed


def _resampled_rates(reports, blocks, resamples, seed):
    """Return the rates of every bootstrap sample in %, [resamples, R]."""
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected at least 1")
    counts = _block_counts(reports, blocks)
    generator = np.random.default_rng(seed)
    total = len(counts)
    step = max(1, _CHUNK_ENTRIES // total)
    rates, left = [], resamples
    while left:
        rows = min(step, left)
        # How often each block is drawn: one matrix product scores them all.
        drawn = generator.multinomial(total, [1 / total] * total, size=rows)
        sums = drawn @ counts
        # A sample of only empty references has no rate: drawn again.
        sums = sums[sums[:, 0] > 0]
        rates.append(100 * sums[:, 1:] / sums[:, :1])
        left -= len(sums)
    return np.concatenate(rates)
