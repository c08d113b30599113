"""Transcripts matched, split into words and aligned, once for all word errors.

The alignment is jiwer's.
"""

from collections.abc import Mapping

import jiwer


def error_rate(errors, total):
    """Return errors in % of what they are errors of.

    Arguments
    ---------
    errors : int
        How many.
    total : int
        Of how many words or utterances.

    Returns
    -------
    float
        In %; without any words 0 where there are no errors, infinite
        otherwise.

    Example
    -------
    >>> error_rate(1, 4), error_rate(0, 0), error_rate(2, 0)
    (25.0, 0.0, inf)
    """
    if total == 0:
        return 0.0 if errors == 0 else float("inf")
    return 100.0 * errors / total


def aligned(references, hypotheses, ids=None):
    """Align the words of every utterance.

    Arguments
    ---------
    references, hypotheses : sequence or dict
        As in `metrics.wer`.
    ids : sequence of str or None
        As in `metrics.wer`.

    Returns
    -------
    references : list of list of str
        The reference words of each utterance, in order.
    ids : list of str
        The utterances.
    alignments : list of list of jiwer.AlignmentChunk
        Of each utterance: `type` is `equal`, `substitute`, `delete` or
        `insert`, `ref_start_idx` and its kin are positions of words.

    Raises
    ------
    ValueError
        As `metrics.wer`.
    TypeError
        As `metrics.wer`.

    Example
    -------
    >>> words, ids, alignments = aligned(["one two"], ["one"])
    >>> words, ids, [chunk.type for chunk in alignments[0]]
    ([['one', 'two']], ['0'], ['equal', 'delete'])
    """
    references, hypotheses, ids = matched(references, hypotheses, ids)
    references = _tokenised(references, ids, "reference")
    hypotheses = _tokenised(hypotheses, ids, "hypothesis")
    output = jiwer.process_words(
        references,
        hypotheses,
        # The words are split already; jiwer's default would join and split
        # them again, and break words that hold a space.
        reference_transform=_unchanged,
        hypothesis_transform=_unchanged,
    )
    return references, ids, output.alignments


def matched(references, hypotheses, ids=None):
    """Bring both sides into lists of one order, with one ID each.

    Arguments
    ---------
    references, hypotheses : sequence or dict
        As in `metrics.wer`.
    ids : sequence of str or None
        As in `metrics.wer`.

    Returns
    -------
    references : list
        Transcripts as they were given.
    hypotheses : list
        In the same order.
    ids : list of str
        The utterances.

    Raises
    ------
    ValueError
        No utterances at all, different numbers of references and
        hypotheses, or IDs that do not match.
    TypeError
        One side by ID and the other not, or a single string.

    Example
    -------
    >>> matched({"a": "one", "b": "two"}, {"b": "too", "a": "one"})
    (['one', 'two'], ['one', 'too'], ['a', 'b'])
    """
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
        if ids is None:
            ids = list(references)
        for side, name in (
            (references, "reference"),
            (hypotheses, "hypothesis"),
        ):
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


def some_utterances(ids, show=5):
    """Name a few utterances, and how many more there are.

    Arguments
    ---------
    ids : sequence
        The utterances, at least one.
    show : int
        How many to write out.

    Returns
    -------
    str
        For a message.

    Example
    -------
    >>> some_utterances(["a"]), some_utterances("abc", show=2)
    ("utterance 'a'", "utterances 'a', 'b' and 1 more")
    """
    more = f" and {len(ids) - show} more" if len(ids) > show else ""
    plural = "s" if len(ids) > 1 else ""
    return f"utterance{plural} {', '.join(map(repr, ids[:show]))}{more}"


def _unchanged(sentences):
    return sentences


def _tokenised(transcripts, ids, what):
    result = []
    for id_, transcript in zip(ids, transcripts):
        if isinstance(transcript, str):
            words = transcript.split()
        elif isinstance(transcript, list | tuple) and all(
            isinstance(word, str) for word in transcript
        ):
            words = list(transcript)
        else:
            raise TypeError(
                f"utterance {id_!r}: the {what} is {transcript!r}, expected "
                "a string or a list of words; a missing transcript must be "
                "filled in or its utterance left out"
            )
        result.append(words)
    return result
