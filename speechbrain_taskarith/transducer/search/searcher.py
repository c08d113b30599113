"""What all searches share: their results, and decoding as one chunk."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from speechbrain_taskarith.transducer.joints.speechbrain_joint import as_joint
from speechbrain_taskarith.transducer.loss.input_checks import checked_lengths
from speechbrain_taskarith.utils.lengths import padding_mask


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
        """Split hypotheses, as `TransducerBeamSearch.decode` returns them."""
        return cls(
            [each[0].tokens for each in hypotheses],
            torch.tensor([each[0].score for each in hypotheses]),
            [[one.tokens for one in each] for each in hypotheses],
            [[one.score for one in each] for each in hypotheses],
        )


class TransducerSearcher(torch.nn.Module):
    """Base of searches, which define `decode`, `start`, `advance`, `results`."""

    def __init__(self, predictor, joint, blank_index, max_symbols):
        super().__init__()
        self.predictor = predictor
        self.joint = as_joint(joint, blank_index)
        self.blank_index = blank_index
        self.max_symbols = max_symbols

    def forward(self, encoder_out, lens=None):
        """As `TransducerBeamSearch.decode`, but return a `SearchResult`."""
        return SearchResult.of(self.decode(encoder_out, lens))

    def final_state(self, encoder_out, lens, **options):
        """Return the state after the last frame; `options` are of `start`."""
        state = self.start(len(encoder_out), encoder_out.device, **options)
        frames = None
        if lens is not None:
            frames = checked_lengths(lens, encoder_out.shape[:2], "input")
        return self.advance(encoder_out, state, frames)

    def read_blank(self, count, device):
        """Return the predictor's output [count, P] and state at the start."""
        blank = torch.full((count, 1), self.blank_index, device=device)
        out, state = self.predictor(blank)
        return out[:, 0], state


def check_scores(scores):
    """Refuse NaN among scores [B, ...]: its labels would be garbage."""
    if bool(scores.isnan().any()):
        row = int(scores.isnan().nonzero()[0, 0])
        raise ValueError(
            f"scores of row {row} are NaN although the encoder's output is "
            "finite: weights of predictor or joint (or language model) hold "
            "NaN or infinity"
        )


def only_valid(encoder_out, frames):
    """Set padding to 0, which may be anything; the rest must be finite."""
    if bool(torch.isfinite(encoder_out).all()):
        return encoder_out
    if frames is not None:
        frames = frames.to(encoder_out.device)
        padding = padding_mask(frames, encoder_out.shape[1])
        encoder_out = encoder_out.masked_fill(padding[..., None], 0.0)
    if not bool(torch.isfinite(encoder_out).all()):
        row = int((~torch.isfinite(encoder_out)).nonzero()[0, 0])
        raise ValueError(
            f"encoder output of row {row} holds NaN or infinity; expected "
            "finite numbers (has training diverged, or the input NaN?)"
        )
    return encoder_out
