"""Word error rate: counted once per utterance, pooled wherever needed.

The alignment is jiwer's; this file keeps the counts of every utterance, so
that rates over domains pool exactly and confidence intervals can resample
utterances.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jiwer


class UtteranceErrors(NamedTuple):
    """The counts of one utterance.

    Arguments
    ---------
    id : str
        The utterance.
    hits : int
        Reference words recognised.
    substitutions : int
        Reference words recognised as another word.
    deletions : int
        Reference words with nothing in the hypothesis.
    insertions : int
        Hypothesis words with nothing in the reference.

    Example
    -------
    >>> UtteranceErrors("u1", 3, 1, 0, 2).words
    4
    """

    id: str
    hits: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def words(self):
        """Number of reference words."""
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self):
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions


def _total(count, doc):
    """Make a property that sums a count over the utterances."""
    return property(
        lambda report: sum(getattr(u, count) for u in report.utterances),
        doc=doc,
    )


@dataclass(frozen=True)
class WERReport:
    """Word errors over a set of utterances; reports add up.

    Made by `wer`. The sum of two reports is the report over both sets: the
    pooled rate is total errors over total words, not a mean of two rates.

    Arguments
    ---------
    utterances : tuple of UtteranceErrors
        The counts, in the order given to `wer`.

    Example
    -------
    >>> news = wer(["one two three"], ["one too three four"])
    >>> print(news)
    WER 66.67 % (2 / 3 words: 1 sub, 0 del, 1 ins), 1 of 1 sentences wrong
    >>> music = wer(["six seven"], ["six seven"])
    >>> round((news + music).wer, 6)
    40.0
    """

    utterances: tuple

    hits = _total("hits", "Reference words recognised.")
    substitutions = _total(
        "substitutions", "Reference words recognised as another word."
    )
    deletions = _total(
        "deletions", "Reference words missing from the hypotheses."
    )
    insertions = _total("insertions", "Hypothesis words that no reference has.")
    words = _total("words", "Number of reference words.")
    errors = _total(
        "errors", "Substitutions, deletions and insertions together."
    )

    @property
    def sentences(self):
        """Number of utterances."""
        return len(self.utterances)

    @property
    def sentence_errors(self):
        """Number of utterances with at least one error."""
        return sum(utterance.errors > 0 for utterance in self.utterances)

    @property
    def ids(self):
        """The utterances' names, in order."""
        return tuple(utterance.id for utterance in self.utterances)

    @property
    def wer(self):
        """Word error rate in %, `100 (S + D + I) / words`.

        Above 100 where insertions abound. Without a single reference word
        it is 0 when nothing was inserted and infinite otherwise.
        """
        return error_rate(self.errors, self.words)

    @property
    def sentence_error_rate(self):
        """Share of utterances with an error, in %."""
        return error_rate(self.sentence_errors, self.sentences)

    def __add__(self, other):
        if not isinstance(other, WERReport):
            return NotImplemented
        return WERReport(self.utterances + other.utterances)

    def __radd__(self, other):
        # sum() starts from the number 0.
        return self if other == 0 else NotImplemented

    def __str__(self):
        return (
            f"WER {self.wer:.2f} % ({self.errors} / {self.words} words: "
            f"{self.substitutions} sub, {self.deletions} del, "
            f"{self.insertions} ins), {self.sentence_errors} of "
            f"{self.sentences} sentences wrong"
        )

    def __repr__(self):
        return f"<WERReport: {self}>"


def rate_of(wer):
    """Return a WER as a float, of a number or of what has one as `.wer`."""
    try:
        return float(getattr(wer, "wer", wer))
    except TypeError:
        raise TypeError(
            f"expected a WER, a number or a WERReport, got {wer!r}"
        ) from None


def wer(references, hypotheses, ids=None, *, normalize=None) -> "WERReport":
    """Count word errors of hypotheses against references.

    Words are compared as written: case, punctuation and the form of Unicode
    count unless `normalize` takes them away. Strings are split at white space.

    Arguments
    ---------
    references : sequence or dict
        One transcript per utterance, each a string or a list of words; or
        `{utterance ID: transcript}`. An empty transcript ("" or []) is
        allowed: whatever was recognised there counts as insertions.
    hypotheses : sequence or dict
        The recognised words in the same form and order; a dict is matched
        with the references by utterance ID. "" or [] is a hypothesis
        without words.
    ids : sequence of str or None
        Names of the utterances, for messages and for `WERReport.ids`; by
        default the keys of a dict or "0", "1", ...
    normalize : callable or None
        `normalize(text) -> text`, for every transcript of both sides before
        it is split: `str.lower`, or the normalisers of `transformers`
        (`models.whisper.english_normalizer`). Name it beside the figure.

    Returns
    -------
    WERReport
        The counts; `.wer` in %.

    Raises
    ------
    ValueError
        No utterances at all, different numbers of references and
        hypotheses, or IDs that do not match.
    TypeError
        A transcript that is neither a string nor a list of words (None or
        NaN, as a table with a missing cell yields), naming the utterance;
        a `normalize` that returns anything but text.

    Example
    -------
    >>> wer(["One two"], ["one two"]).wer
    50.0
    >>> wer(["One two"], ["one two"], normalize=str.lower).wer
    0.0
    >>> report = wer(["one two", ""], [["one", "two"], ["six"]])
    >>> report.wer, report.insertions, report.sentence_errors
    (50.0, 1, 1)
    >>> wer({"a": "one", "b": "two"}, {"b": "two", "a": "nine"}).ids
    ('a', 'b')
    """
    _, ids, alignments = aligned(references, hypotheses, ids, normalize)
    return WERReport(tuple(map(_counts, ids, alignments)))


def by_domain(references, hypotheses, domains, ids=None, *, normalize=None):
    """Count word errors separately for every domain.

    Arguments
    ---------
    references, hypotheses, ids, normalize
        See `wer`.
    domains : sequence or dict
        The domain of every utterance (any hashable, e.g. an accent), in the
        same order or by utterance ID.

    Returns
    -------
    dict of str: WERReport
        In order of first appearance; `sum(result.values())` pools them.

    Raises
    ------
    ValueError
        As `wer`, also for domains that do not match the utterances.

    Example
    -------
    >>> reports = by_domain(
    ...     ["one", "two", "six"], ["one", "too", "six"], ["us", "de", "us"]
    ... )
    >>> {domain: report.wer for domain, report in reports.items()}
    {'us': 0.0, 'de': 100.0}
    >>> sum(reports.values()).words
    3
    """
    report = wer(references, hypotheses, ids, normalize=normalize)
    domains = one_each(domains, report.ids, "domain")
    groups = {}
    for domain, utterance in zip(domains, report.utterances):
        groups.setdefault(domain, []).append(utterance)
    return {name: WERReport(tuple(group)) for name, group in groups.items()}


def _counts(id_, alignment):
    counts = {"equal": 0, "substitute": 0, "delete": 0, "insert": 0}
    for chunk in alignment:
        counts[chunk.type] += max(
            chunk.ref_end_idx - chunk.ref_start_idx,
            chunk.hyp_end_idx - chunk.hyp_start_idx,
        )
    return UtteranceErrors(id_, *counts.values())


def error_rate(errors, total):
    """Return errors in % of what they are errors of."""
    if total == 0:
        return 0.0 if errors == 0 else float("inf")
    return 100.0 * errors / total


def aligned(references, hypotheses, ids=None, normalize=None):
    """Align the words of every utterance."""
    references, hypotheses, ids = matched(references, hypotheses, ids)
    references = _tokenised(references, ids, "reference", normalize)
    hypotheses = _tokenised(hypotheses, ids, "hypothesis", normalize)
    output = jiwer.process_words(
        references,
        hypotheses,
        # The words are split already; jiwer's default would join and split
        # them again, and break words that hold a space.
        reference_transform=list,
        hypothesis_transform=list,
    )
    return references, ids, output.alignments


def matched(references, hypotheses, ids=None):
    """Bring both sides into lists of one order, with one ID each."""
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise TypeError(
            "expected a list of transcripts, got a single string; write "
            "wer([reference], [hypothesis])"
        )
    if isinstance(references, Mapping) != isinstance(hypotheses, Mapping):
        raise TypeError(
            "references and hypotheses must both be dicts by utterance ID, "
            "or both sequences in the same order"
        )
    if isinstance(references, Mapping):
        ids = list(references if ids is None else ids)
        sides = {"reference": references, "hypothesis": hypotheses}
        for name, side in sides.items():
            missing = [id_ for id_ in ids if id_ not in side]
            extra = set(side) - set(ids)
            if missing or extra:
                kind = "has no" if missing else "has an unexpected"
                which = some_utterances(missing or sorted(extra, key=str))
                raise ValueError(
                    f"{which} {kind} {name}; references and hypotheses must "
                    "name the same utterances"
                )
        references = [references[id_] for id_ in ids]
        hypotheses = [hypotheses[id_] for id_ in ids]
    references, hypotheses = list(references), list(hypotheses)
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references but {len(hypotheses)} hypotheses; "
            "give one hypothesis per reference ('' where nothing was "
            "recognised)"
        )
    if not references:
        raise ValueError(
            "no utterances: the WER over nothing is not defined; check that "
            "the test set is not empty"
        )
    ids = [str(i) for i in (range(len(references)) if ids is None else ids)]
    if len(ids) != len(references):
        raise ValueError(
            f"{len(references)} utterances but {len(ids)} ids; give one each"
        )
    return references, hypotheses, ids


def one_each(labels, ids, what):
    """Return a label for each utterance, given in order or by ID."""
    if isinstance(labels, Mapping):
        labels = {str(id_): label for id_, label in labels.items()}
        missing = [id_ for id_ in ids if id_ not in labels]
        if missing:
            raise ValueError(
                f"{some_utterances(missing)}: no {what} given; add it"
            )
        return [labels[id_] for id_ in ids]
    # Elements of a tensor are no labels: no two are the same.
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if len(labels) != len(ids):
        raise ValueError(
            f"{len(ids)} utterances but {len(labels)} {what}s; give one per "
            "utterance, in the same order"
        )
    return labels


def some_utterances(ids, show=5):
    """Name a few utterances, and how many more there are."""
    more = f" and {len(ids) - show} more" if len(ids) > show else ""
    plural = "s" if len(ids) > 1 else ""
    return f"utterance{plural} {', '.join(map(repr, ids[:show]))}{more}"


def _tokenised(transcripts, ids, what, normalize):
    result = []
    for id_, words in zip(ids, transcripts):
        if isinstance(words, str):
            words = words.split()
        if not isinstance(words, list | tuple) or not all(
            isinstance(word, str) for word in words
        ):
            raise TypeError(
                f"utterance {id_!r}: the {what} is {words!r}, expected a "
                "string or a list of words; a missing transcript must be "
                "filled in or its utterance left out"
            )
        if normalize is not None:
            text = normalize(" ".join(words))
            if not isinstance(text, str):
                raise TypeError(
                    f"utterance {id_!r}: normalize returned {text!r}, "
                    "expected a string"
                )
            words = text.split()
        result.append(list(words))
    return result
