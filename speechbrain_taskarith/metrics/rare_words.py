"""Errors on rare words: what a recogniser does beyond the usual vocabulary.

Every substitution, deletion and hit belongs to its reference word, by the
alignment. Insertions belong to no reference word and are counted apart.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from speechbrain_taskarith.metrics.word_errors import (
    aligned,
    error_rate,
    one_each,
)


@dataclass(frozen=True)
class WordGroupErrors:
    """Counts over the reference words of one group; they add up.

    Arguments
    ---------
    hits : int
        Recognised.
    substitutions : int
        Recognised as another word.
    deletions : int
        Missing.

    Example
    -------
    >>> group = WordGroupErrors(hits=6, substitutions=1, deletions=1)
    >>> group.words, group.wer
    (8, 25.0)
    """

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0

    @property
    def words(self):
        """Number of reference words."""
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self):
        """Substitutions and deletions."""
        return self.substitutions + self.deletions

    @property
    def wer(self):
        """Errors in % of the group's words; 0 where it has no word."""
        return error_rate(self.errors, self.words)

    def __add__(self, other):
        return WordGroupErrors(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
        )


@dataclass(frozen=True)
class RareWordReport:
    """Errors on rare words, on the others, and insertions; reports add up.

    Arguments
    ---------
    rare : WordGroupErrors
        Over rare reference words.
    frequent : WordGroupErrors
        Over the other reference words.
    insertions : int
        Hypothesis words with nothing in the reference.

    Example
    -------
    >>> rare = RareWords.from_transcripts(["a a a a a a a a a b"])
    >>> report = rare.report(["a b", "a"], ["a c", "a a"])
    >>> print(report)
    rare 100.00 % of 1, other 0.00 % of 2 words, 1 insertions
    >>> round(report.wer, 6)
    66.666667
    """

    rare: WordGroupErrors
    frequent: WordGroupErrors
    insertions: int = 0

    @property
    def words(self):
        """Number of reference words."""
        return self.rare.words + self.frequent.words

    @property
    def errors(self):
        """Substitutions, deletions and insertions together."""
        return self.rare.errors + self.frequent.errors + self.insertions

    @property
    def wer(self):
        """Word error rate over all words, in %; that of `metrics.wer`."""
        return error_rate(self.errors, self.words)

    @property
    def insertion_rate(self):
        """Insertions in % of all reference words."""
        return error_rate(self.insertions, self.words)

    def __add__(self, other):
        if not isinstance(other, RareWordReport):
            return NotImplemented
        return RareWordReport(
            self.rare + other.rare,
            self.frequent + other.frequent,
            self.insertions + other.insertions,
        )

    def __radd__(self, other):
        # sum() starts from the number 0.
        return self if other == 0 else NotImplemented

    def __str__(self):
        return (
            f"rare {self.rare.wer:.2f} % of {self.rare.words}, other "
            f"{self.frequent.wer:.2f} % of {self.frequent.words} words, "
            f"{self.insertions} insertions"
        )


class RareWords:
    """Which words are rare: those seen too seldom in training.

    Arguments
    ---------
    counts : mapping of str to int
        How often each word stands in the training transcripts.
    min_count : int
        A word with a count below this is rare; so is one never seen.

    Example
    -------
    >>> rare = RareWords({"the": 50, "zebra": 1}, min_count=2)
    >>> "the" in rare, "zebra" in rare, "okapi" in rare
    (False, True, True)
    """

    def __init__(self, counts, min_count):
        if min_count < 1:
            raise ValueError(
                f"min_count {min_count}: expected 1 (only words never seen "
                "are rare) or more"
            )
        self.counts = dict(counts)
        self.min_count = min_count

    @classmethod
    def from_transcripts(cls, lines, coverage=0.9, min_count=None):
        """Take the training transcripts' word counts.

        Arguments
        ---------
        lines : iterable of str or list of str, or dict
            Training transcripts, written as the references will be; of a
            dict by utterance ID, its values.
        coverage : float
            Frequent are the most frequent words that together make this
            share of the running words, in (0, 1]; words as frequent as the
            last of them are frequent too, so that the order of lines does not
            matter.
        min_count : int or None
            In the place of `coverage`: a word is rare below this count.

        Returns
        -------
        RareWords
            The definition, to be used on every test set.

        Raises
        ------
        ValueError
            No words, a coverage out of range.

        Example
        -------
        >>> lines = ["the cat", "the dog", "the okapi"]
        >>> rare = RareWords.from_transcripts(lines, coverage=0.5)
        >>> rare.min_count, "the" in rare, "okapi" in rare
        (3, False, True)
        """
        if isinstance(lines, str):
            raise TypeError(
                "lines: expected a list of transcripts, found a single string"
            )
        counts = Counter()
        for line in lines.values() if isinstance(lines, Mapping) else lines:
            counts.update(line.split() if isinstance(line, str) else line)
        if not counts:
            raise ValueError(
                "no words in the training transcripts: nothing says what is "
                "rare; check that the training manifest is not empty"
            )
        if min_count is None:
            min_count = _least_frequent(counts, coverage)
        return cls(counts, min_count)

    def __contains__(self, word):
        return self.counts.get(word, 0) < self.min_count

    def report(self, references, hypotheses, ids=None, *, normalize=None):
        """Count errors on rare words and others.

        Arguments and errors are as `wer`; the result is a `RareWordReport`
        whose totals equal those of `wer`.
        """
        words, _, alignments = aligned(references, hypotheses, ids, normalize)
        return sum(map(self._count, words, alignments))

    def _count(self, reference, chunks):
        totals = {True: Counter(), False: Counter()}
        insertions = 0
        for chunk in chunks:
            if chunk.type == "insert":
                insertions += chunk.hyp_end_idx - chunk.hyp_start_idx
            for word in reference[chunk.ref_start_idx : chunk.ref_end_idx]:
                totals[word in self][chunk.type] += 1
        groups = [
            WordGroupErrors(one["equal"], one["substitute"], one["delete"])
            for one in totals.values()
        ]
        return RareWordReport(*groups, insertions)


def rare_words_by_language(
    definitions, references, hypotheses, languages, ids=None
):
    """Count errors on rare words in every language, each by its own counts.

    Arguments
    ---------
    definitions : mapping of str to RareWords
        By language.
    references, hypotheses, ids
        See `wer`.
    languages : sequence or dict
        The language of every utterance, in the same order or by ID.

    Returns
    -------
    dict of str: RareWordReport
        In order of first appearance; `sum(result.values())` pools them.

    Raises
    ------
    ValueError
        A language without a definition, or another number of languages than
        of utterances.

    Example
    -------
    >>> definitions = {
    ...     "it": RareWords({"ciao": 9}, 2),
    ...     "en": RareWords({"hello": 9}, 2),
    ... }
    >>> found = rare_words_by_language(
    ...     definitions, ["ciao", "hello ciao"], ["ciao", "hello"], ["it", "en"]
    ... )
    >>> {language: report.rare.wer for language, report in found.items()}
    {'it': 0.0, 'en': 100.0}
    """
    words, ids, alignments = aligned(references, hypotheses, ids)
    languages = one_each(languages, ids, "language")
    found = {}
    for language, reference, chunks in zip(languages, words, alignments):
        if language not in definitions:
            raise ValueError(
                f"language {language!r}: no definition of its rare words; "
                f"there are {', '.join(map(repr, definitions))}"
            )
        errors = definitions[language]._count(reference, chunks)
        found[language] = found.get(language, 0) + errors
    return found


def _least_frequent(counts, coverage):
    """Return the count of the last word that the coverage needs."""
    if not 0 < coverage <= 1:
        raise ValueError(
            f"coverage {coverage}: expected a share of running words, in (0, 1]"
        )
    needed = coverage * sum(counts.values())
    covered = 0
    for _, count in counts.most_common():
        covered += count
        # Sums of floats: 0.9 * 10 may be a little more than 9.
        if covered >= needed * (1 - 1e-12):
            break
    return count
