"""One alignment per utterance: the likeliest step by step, or drawn."""

from dataclasses import dataclass
from typing import Any

import torch

from speechbrain_taskarith.transducer.joints.joint import as_joint
from speechbrain_taskarith.transducer.loss.lengths import checked_lengths
from speechbrain_taskarith.transducer.search.hypotheses import (
    Hypothesis,
    SearchResult,
)
from speechbrain_taskarith.transducer.search.predictor import (
    join_states,
    select_state,
)


@dataclass
class GreedyState:
    """Where a search stands between two chunks.

    Arguments
    ---------
    found : list of Hypothesis
        So far, one an utterance.
    predictor : torch.Tensor
        [B, J], the predictor's output, projected.
    state : object
        The predictor's, batch in dimension 1.
    frame : int
        Number of frames gone by.
    """

    found: list
    predictor: torch.Tensor
    state: Any
    frame: int = 0


class TransducerGreedySearch(torch.nn.Module):
    """Take the likeliest of blank and labels, a batch at a time.

    Arguments
    ---------
    predictor, joint : torch.nn.Module
        As of `TransducerBeamSearch`.
    blank_index : int
        Index of the blank.
    max_symbols : int
        Labels at one frame, at most.

    Example
    -------
    >>> from speechbrain_taskarith.transducer import LSTMPredictor, RNNTJoint
    >>> predictor = LSTMPredictor(10, 4, 6, num_layers=1)
    >>> search = TransducerGreedySearch(predictor, RNNTJoint(8, 6, 16, 10), 0)
    >>> best, scores, _, _ = search(torch.rand(2, 7, 8), torch.ones(2))
    >>> len(best), scores.shape
    (2, torch.Size([2]))
    """

    def __init__(self, predictor, joint, blank_index, max_symbols=5):
        super().__init__()
        if max_symbols < 1:
            raise ValueError(f"max_symbols {max_symbols}: expected 1 or more")
        self.predictor = predictor
        self.joint = as_joint(joint, blank_index)
        self.blank_index = blank_index
        self.max_symbols = max_symbols
        self.n_best = 1

    def forward(self, encoder_out, lens=None):
        """See `TransducerBeamSearch.forward`."""
        return SearchResult.of(self.decode(encoder_out, lens))

    @torch.no_grad()
    def decode(self, encoder_out, lens=None):
        """Decode a batch, with the frames of labels.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [B, T, E].
        lens : torch.Tensor or None
            [B], relative lengths.

        Returns
        -------
        list of list of Hypothesis
            One of every utterance.
        """
        state = self.start(len(encoder_out), encoder_out.device)
        frames = None
        if lens is not None:
            frames = checked_lengths(lens, encoder_out.shape[1], "input")
        return self.results(self.advance(encoder_out, state, frames))

    @torch.no_grad()
    def start(self, batch, device="cpu"):
        """See `TransducerBeamSearch.start`."""
        blank = torch.full(
            (batch, 1), self.blank_index, dtype=torch.long, device=device
        )
        out, state = self.predictor(blank)
        found = [Hypothesis([], 0.0, []) for _ in range(batch)]
        return GreedyState(
            found, self.joint.project_predictor(out[:, 0]), state
        )

    @torch.no_grad()
    def advance(self, encoder_out, state, frames=None):
        """See `TransducerBeamSearch.advance`."""
        batch, time = encoder_out.shape[:2]
        encoder = self.joint.project_encoder(encoder_out)
        if frames is None:
            frames = torch.full((batch,), time)
        tokens = [list(one.tokens) for one in state.found]
        times = [list(one.frames) for one in state.found]
        scores = torch.tensor([one.score for one in state.found]).double()
        scores = scores.to(encoder.device)
        predictor, hidden = state.predictor, state.state
        lives = frames.tolist()
        for t in range(time):
            rows = [b for b in range(batch) if t < lives[b]]
            for count in range(self.max_symbols + 1):
                at = torch.tensor(rows, dtype=torch.long, device=scores.device)
                log_probs = self.joint.log_probs(encoder[at, t], predictor[at])
                choice = self._choose(log_probs)
                if count == self.max_symbols:
                    # Enough of this frame; on with a blank.
                    choice = torch.full_like(choice, self.blank_index)
                scores[at] += log_probs.gather(1, choice[:, None])[:, 0]
                going = [
                    (row, label)
                    for row, label in zip(rows, choice.tolist())
                    if label != self.blank_index
                ]
                if not going:
                    break
                rows = [row for row, _ in going]
                for row, label in going:
                    tokens[row].append(label)
                    times[row].append(state.frame + t)
                predictor, hidden = self._step(going, predictor, hidden)
        found = [
            Hypothesis(*one) for one in zip(tokens, scores.tolist(), times)
        ]
        return GreedyState(found, predictor, hidden, state.frame + time)

    def results(self, state):
        """See `TransducerBeamSearch.results`."""
        return [[one] for one in state.found]

    def _choose(self, log_probs):
        return log_probs.argmax(1)

    def _step(self, going, predictor, hidden):
        """Feed labels to the predictor; the other rows keep what they had."""
        device = predictor.device
        rows, labels = torch.tensor(going, device=device).unbind(1)
        out, new = self.predictor(labels[:, None], select_state(hidden, rows))
        predictor = predictor.clone()
        predictor[rows] = self.joint.project_predictor(out[:, 0])
        if len(rows) == len(predictor):
            return predictor, new
        source = torch.arange(len(predictor), device=device)
        source[rows] = len(predictor) + torch.arange(len(rows), device=device)
        return predictor, select_state(join_states([hidden, new]), source)


class TransducerSampler(TransducerGreedySearch):
    """Draw alignments from the model: hypotheses for MinWER by sampling.

    Arguments
    ---------
    predictor, joint : torch.nn.Module
        As of `TransducerBeamSearch`.
    blank_index : int
        Index of the blank.
    n_best : int
        Alignments drawn of every utterance. Those with equal labels are one.
    max_symbols : int
        Labels at one frame, at most.
    temperature : float
        Above 1: more varied; towards 0: greedy.

    Example
    -------
    >>> from speechbrain_taskarith.transducer import LSTMPredictor, RNNTJoint
    >>> predictor = LSTMPredictor(10, 4, 6, num_layers=1)
    >>> joint = RNNTJoint(8, 6, 16, 10)
    >>> sampler = TransducerSampler(predictor, joint, 0, n_best=4)
    >>> found = sampler.decode(torch.rand(2, 7, 8))
    >>> len(found), len(found[0]) <= 4
    (2, True)
    """

    def __init__(
        self,
        predictor,
        joint,
        blank_index,
        n_best=4,
        max_symbols=2,
        temperature=1.0,
    ):
        super().__init__(predictor, joint, blank_index, max_symbols)
        if n_best < 1 or temperature <= 0:
            raise ValueError(
                f"n_best {n_best}, temperature {temperature}: expected 1 or "
                "more, and a number above 0"
            )
        self.n_best = n_best
        self.temperature = temperature

    @torch.no_grad()
    def decode(self, encoder_out, lens=None, n_best=None):
        """Draw hypotheses.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [B, T, E].
        lens : torch.Tensor or None
            [B], relative lengths.
        n_best : int or None
            In the place of the sampler's own.

        Returns
        -------
        list of list of Hypothesis
            Up to `n_best` of every utterance, with different labels, the
            likeliest alignment first.
        """
        draws = n_best or self.n_best
        every = super().decode(
            encoder_out.repeat_interleave(draws, 0),
            None if lens is None else lens.repeat_interleave(draws),
        )
        return [
            _distinct(one for (one,) in every[start : start + draws])
            for start in range(0, len(every), draws)
        ]

    def _choose(self, log_probs):
        weights = (log_probs / self.temperature).softmax(1)
        return torch.multinomial(weights, 1)[:, 0]


def _distinct(hypotheses):
    kept = {}
    for one in sorted(hypotheses, key=lambda one: -one.score):
        kept.setdefault(tuple(one.tokens), one)
    return list(kept.values())
