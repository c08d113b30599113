"""What a search returns."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Hypothesis:
    """One label sequence.

    Arguments
    ---------
    tokens : list of int
        Labels, without blanks.
    score : float
        Log-probability in nats: in beam search summed over the alignments that
        stayed in the beam, in greedy search and sampling of one alignment.
        Includes the weighted scores of language models.
    frames : list of int
        The encoder frame, counted from 0, at which each label was emitted.

    Example
    -------
    >>> Hypothesis([5, 2], -1.5, [3, 9]).tokens
    [5, 2]
    """

    tokens: list
    score: float
    frames: list


class SearchResult(NamedTuple):
    """The four values that SpeechBrain's transducer searchers return.

    Arguments
    ---------
    best : list of list of int
        The best label sequence of every utterance.
    scores : torch.Tensor
        [B], their log-probabilities.
    n_best : list of list of list of int
        Up to `n_best` label sequences of every utterance, the best first.
    n_best_scores : list of list of float
        Their log-probabilities.

    Example
    -------
    >>> result = SearchResult.of([[Hypothesis([5, 2], -1.5, [3, 9])]])
    >>> best, scores, n_best, n_best_scores = result
    >>> best, n_best_scores
    ([[5, 2]], [[-1.5]])
    """

    best: list
    scores: torch.Tensor
    n_best: list
    n_best_scores: list

    @classmethod
    def of(cls, hypotheses):
        """Split hypotheses into labels and scores.

        Arguments
        ---------
        hypotheses : list of list of Hypothesis
            Of every utterance, the best first.

        Returns
        -------
        SearchResult
            Labels and scores of the same hypotheses.
        """
        return cls(
            [each[0].tokens for each in hypotheses],
            torch.tensor([each[0].score for each in hypotheses]),
            [[one.tokens for one in each] for each in hypotheses],
            [[one.score for one in each] for each in hypotheses],
        )
