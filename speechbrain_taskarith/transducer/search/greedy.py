"""One alignment per utterance: the most likely step by step, or sampled."""

from dataclasses import dataclass
from typing import Any

import torch

from speechbrain_taskarith.transducer.loss.input_checks import checked_lengths
from speechbrain_taskarith.transducer.predictor import join_states, select_state
from speechbrain_taskarith.transducer.search.searcher import (
    Hypothesis,
    TransducerSearcher,
    check_scores,
    only_valid,
)


@dataclass
class GreedyState:
    """The state of a search between two chunks."""

    hypotheses: list  # one of every utterance
    predictor: torch.Tensor  # [B, J], the predictor's output, projected
    predictor_state: Any  # batch in dimension 1
    frame: int = 0  # frames processed


class TransducerGreedySearch(TransducerSearcher):
    """Take the most likely of blank and labels, for a batch at a time.

    Arguments
    ---------
    predictor, joint, blank_index, max_symbols
        As of `TransducerBeamSearch`.

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
        super().__init__(predictor, joint, blank_index, max_symbols)
        if max_symbols < 1:
            raise ValueError(f"max_symbols {max_symbols}: expected 1 or more")
        self.n_best = 1

    @torch.no_grad()
    def decode(self, encoder_out, lens=None):
        """See `TransducerBeamSearch.decode`; one hypothesis an utterance."""
        if not len(encoder_out):
            return []
        return self.results(self.final_state(encoder_out, lens))

    @torch.no_grad()
    def start(self, batch, device="cpu"):
        """See `TransducerBeamSearch.start`."""
        out, state = self.read_blank(batch, device)
        hypotheses = [Hypothesis([], 0.0, []) for _ in range(batch)]
        return GreedyState(hypotheses, self.joint.project_predictor(out), state)

    @torch.no_grad()
    def advance(self, encoder_out, state, frames=None):
        """See `TransducerBeamSearch.advance`."""
        batch, time = encoder_out.shape[:2]
        encoder = self.joint.project_encoder(only_valid(encoder_out, frames))
        if frames is None:
            frames = torch.full((batch,), time)
        tokens = [list(one.tokens) for one in state.hypotheses]
        times = [list(one.frames) for one in state.hypotheses]
        scores = torch.tensor([one.score for one in state.hypotheses]).double()
        scores = scores.to(encoder.device)
        predictor, predictor_state = state.predictor, state.predictor_state
        frames = frames.tolist()
        for t in range(time):
            rows = [b for b in range(batch) if t < frames[b]]
            if not rows:
                break  # only padding is left
            for count in range(self.max_symbols + 1):
                index = torch.tensor(rows, device=scores.device).long()
                log_probs = self.joint.log_probs(
                    encoder[index, t], predictor[index]
                )
                choice = self._choose(log_probs)
                if count == self.max_symbols:
                    # Only a blank may follow at this frame.
                    choice = torch.full_like(choice, self.blank_index)
                scores[index] += log_probs.gather(1, choice[:, None])[:, 0]
                emitted = [
                    (row, label)
                    for row, label in zip(rows, choice.tolist())
                    if label != self.blank_index
                ]
                if not emitted:
                    break
                rows = [row for row, _ in emitted]
                for row, label in emitted:
                    tokens[row].append(label)
                    times[row].append(state.frame + t)
                predictor, predictor_state = self._step(
                    emitted, predictor, predictor_state
                )
        check_scores(scores)
        hypotheses = [
            Hypothesis(*one) for one in zip(tokens, scores.tolist(), times)
        ]
        return GreedyState(
            hypotheses, predictor, predictor_state, state.frame + time
        )

    def results(self, state):
        """See `TransducerBeamSearch.results`."""
        return [[one] for one in state.hypotheses]

    def _choose(self, log_probs):
        return log_probs.argmax(1)

    def _step(self, emitted, predictor, predictor_state):
        """Feed the labels of some rows to the predictor."""
        device = predictor.device
        rows, labels = torch.tensor(emitted, device=device).unbind(1)
        out, new_state = self.predictor(
            labels[:, None], select_state(predictor_state, rows)
        )
        predictor = predictor.clone()
        predictor[rows] = self.joint.project_predictor(out[:, 0])
        if len(rows) == len(predictor):
            return predictor, new_state
        # The other rows keep their states.
        source = torch.arange(len(predictor), device=device)
        source[rows] = len(predictor) + torch.arange(len(rows), device=device)
        joined = join_states([predictor_state, new_state])
        return predictor, select_state(joined, source)


class TransducerSampler(TransducerGreedySearch):
    """Sample alignments from the model, as hypotheses for MinWER.

    Arguments
    ---------
    predictor, joint, blank_index, max_symbols
        As of `TransducerBeamSearch`. A sample with `max_symbols` labels at one
        frame is cut there.
    n_best : int
        Alignments sampled of every utterance; `decode` returns one of those
        with equal labels, `draw` all.
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
        max_symbols=100,
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
        """See `TransducerBeamSearch.decode`; the likeliest alignment first."""
        return list(map(_distinct, self.draw(encoder_out, lens, n_best)))

    @torch.no_grad()
    def draw(self, encoder_out, lens=None, n_best=None):
        """See `decode`; all samples, as they were drawn."""
        draws, frames = n_best or self.n_best, None
        if lens is not None:
            frames = checked_lengths(lens, encoder_out.shape[:2], "input")
        # Before rows are repeated: an error names the utterance.
        encoder_out = only_valid(encoder_out, frames)
        samples = super().decode(
            encoder_out.repeat_interleave(draws, 0),
            None if lens is None else lens.repeat_interleave(draws),
        )
        return [
            [one for (one,) in samples[start : start + draws]]
            for start in range(0, len(samples), draws)
        ]

    def _choose(self, log_probs):
        # A GPU would not recover from an assertion in multinomial.
        check_scores(log_probs)
        weights = (log_probs / self.temperature).softmax(1)
        return torch.multinomial(weights, 1)[:, 0]


def _distinct(hypotheses):
    best = {}
    for one in sorted(hypotheses, key=lambda one: -one.score):
        best.setdefault(tuple(one.tokens), one)
    return list(best.values())
