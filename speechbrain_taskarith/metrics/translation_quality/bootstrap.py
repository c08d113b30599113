"""How sure BLEU and chrF are: bootstrap over sentences."""

import numpy as np

from speechbrain_taskarith.metrics.significance import (
    PairedBootstrap,
    sum_blocks,
)
from speechbrain_taskarith.metrics.translation_quality.scores import checked
from speechbrain_taskarith.utils.optional import require

# Draws held at once: bounds memory at about 32 MB for any corpus.
_CHUNK_ENTRIES = 1 << 22
# That of sacrebleu, so that figures can be compared with its command line.
SEED = 12345


def translation_intervals(
    references,
    hypotheses,
    *,
    level=0.95,
    resamples=1000,
    seed=SEED,
    lowercase=False,
    tokenize="13a",
):
    """Percentile bootstrap intervals of BLEU and chrF of one system.

    Whole sentences are drawn with replacement, and scored as a corpus (Koehn,
    "Statistical significance tests for machine translation evaluation", EMNLP
    2004).

    Arguments
    ---------
    references, hypotheses, lowercase, tokenize
        See `translation_scores`.
    level : float
        Coverage, in (0, 1).
    resamples : int
        Number of bootstrap samples, at least 1.
    seed : int
        Of the draws; the same seed gives the same intervals.

    Returns
    -------
    dict of str: tuple of float
        `(low, high)` of `"BLEU"` and of `"chrF"`.

    Raises
    ------
    ValueError
        Numbers of sentences that differ, or none; a level or number out of
        range.

    Example
    -------
    >>> try:
    ...     low, high = translation_intervals(
    ...         ["le chat dort ici", "il pleut à Paris"] * 20,
    ...         ["le chat dort", "il pleut à Paris"] * 20,
    ...     )["chrF"]
    ... except ImportError:                   # the extra is not installed
    ...     low, high = 80, 90
    >>> 50 < low < high < 100
    True
    """
    (rows,) = _resampled(
        references, [hypotheses], resamples, seed, lowercase, tokenize
    )[1]
    return {
        name: tuple(np.quantile(scores, _quantiles(level)).tolist())
        for name, scores in rows.items()
    }


def compare_translations(
    references,
    first,
    second,
    *,
    level=0.95,
    resamples=1000,
    seed=SEED,
    lowercase=False,
    tokenize="13a",
    blocks=None,
):
    """Test whether two systems translate differently well.

    Both are scored on the same resampled sentences, so that how hard a
    sentence is cancels out. The p-value is that of sacrebleu's paired
    bootstrap (`sacrebleu --paired-bs`), about half of a two-sided one: it is
    near 0.4 where two systems hardly differ. The interval is two-sided.

    Arguments
    ---------
    references, lowercase, tokenize
        See `translation_scores`.
    first, second : sequence of str
        Hypotheses of the baseline and of the other system.
    level, resamples, seed
        See `translation_intervals`.
    blocks : sequence or None
        A label for each sentence, e.g. its document, or the sentence itself
        where several seeds translate it: whole blocks are drawn. None: each
        sentence on its own.

    Returns
    -------
    dict of str: PairedBootstrap
        Of `"BLEU"` and of `"chrF"`: the second's score minus the first's, its
        interval, and how likely it is.

    Raises
    ------
    ValueError
        As `translation_intervals`.

    Example
    -------
    >>> references = ["le chat dort ici", "il pleut à Paris"] * 20
    >>> try:
    ...     found = compare_translations(
    ...         references, ["le chat"] * 40, references, resamples=200
    ...     )["chrF"]
    ...     better, p_value = found.difference, found.p_value
    ... except ImportError:                   # the extra is not installed
    ...     better, p_value = 80.0, 0.005
    >>> better > 50, p_value < 0.01
    (True, True)
    """
    systems, settings = [first, second], (lowercase, tokenize)
    observed, rows = _resampled(
        references, systems, resamples, seed, *settings, blocks
    )
    found = {}
    for name in rows[0]:
        differences = rows[1][name] - rows[0][name]
        difference = observed[1][name] - observed[0][name]
        low, high = np.quantile(differences, _quantiles(level)).tolist()
        # As sacrebleu: how far from their mean the differences go; equal scores
        # are as far, so that their p is 1.
        sizes = np.abs(differences)
        beyond = (sizes - sizes.mean() >= abs(difference)).sum()
        found[name] = PairedBootstrap(
            difference=float(difference),
            low=low,
            high=high,
            probability_of_improvement=float((differences > 0).mean()),
            p_value=float((1 + beyond) / (1 + resamples)),
        )
    return found


def _quantiles(level):
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a number in (0, 1)")
    return (1 - level) / 2, (1 + level) / 2


def _resampled(
    references, systems, resamples, seed, lowercase, tokenize, blocks=None
):
    """Return each system's scores, and those of its resampled sentences."""
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected at least 1")
    sacrebleu = require("sacrebleu", "translation", "BLEU")
    pairs = [checked(references, hypotheses) for hypotheses in systems]
    metrics = {
        "BLEU": sacrebleu.BLEU(lowercase=lowercase, tokenize=tokenize),
        "chrF": sacrebleu.CHRF(lowercase=lowercase),
    }
    # sacrebleu's own counts of every sentence: a corpus has their sums.
    statistics = [
        {
            name: sum_blocks(
                np.array(
                    metric._extract_corpus_statistics(hypotheses, sets),
                    dtype=np.float64,
                ),
                blocks,
                range(len(hypotheses)),
            )
            for name, metric in metrics.items()
        }
        for sets, hypotheses in pairs
    ]

    def score(name, sums):
        return metrics[name]._compute_score_from_stats(sums).score

    observed = [
        {name: score(name, counts.sum(0)) for name, counts in one.items()}
        for one in statistics
    ]
    rows = [{name: [] for name in metrics} for _ in systems]
    count = len(statistics[0]["BLEU"])
    for drawn in _draws(count, resamples, seed):
        for found, one in zip(rows, statistics):
            for name, counts in one.items():
                found[name] += [score(name, sums) for sums in drawn @ counts]
    as_arrays = [{n: np.array(s) for n, s in one.items()} for one in rows]
    return observed, as_arrays


def _draws(sentences, resamples, seed):
    """Yield how often each sentence is drawn: [rows, sentences]."""
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK_ENTRIES // sentences)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        chosen = generator.choice(sentences, size=(rows, sentences))
        chosen += np.arange(rows)[:, None] * sentences
        counts = np.bincount(chosen.ravel(), minlength=rows * sentences)
        yield counts.reshape(rows, sentences).astype(np.float64)
