"""Beam search over a whole batch, with prefix merging.

One frame at a time; joint and predictor are called once for all hypotheses of
all utterances. At a frame a hypothesis either takes a blank and waits for the
next frame, or is extended by a label, up to `max_symbols` times. Paths that
lead to the same labels are one hypothesis, whose probabilities add up
(prefixes are told apart by a 64-bit hash).
"""

from dataclasses import dataclass

import torch

from speechbrain_taskarith.transducer.joints.joint import labels_only
from speechbrain_taskarith.transducer.search.prefixes import (
    LOG_ZERO,
    Candidates,
    Prefixes,
)
from speechbrain_taskarith.transducer.search.searcher import (
    Hypothesis,
    TransducerSearcher,
    check_scores,
    only_valid,
)

# Twice as fast and more where blanks dominate; the best stays the same.
_EXPAND_BEAM = 8.0


@dataclass
class BeamState:
    """The state of a search between two chunks."""

    scores: torch.Tensor  # [B, K], float64; minus infinity: no hypothesis
    prefixes: Prefixes  # of B * K rows
    expand_beam: float
    frame: int = 0  # frames processed


class TransducerBeamSearch(TransducerSearcher):
    """Batched beam search for transducers.

    With a language model, a label's score is `log P(label|x) + lm_weight
    log P_LM - ilm_weight log P_ILM`: shallow fusion with the internal
    language model subtracted (Variani 2020, arXiv 2003.07705; Meng 2021,
    arXiv 2011.01991). Blanks keep their score.

    Arguments
    ---------
    predictor : torch.nn.Module
        `LSTMPredictor`, `SpeechBrainPredictor`, or one called like them.
    joint : torch.nn.Module
        As of `joint_transducer_loss`.
    blank_index : int
        Index of the blank.
    beam_size, n_best : int
        Size K of the beam: hypotheses that go on to the next frame; of these
        `n_best` are returned. A beam of 1 is not a greedy search: here a label
        and the blank behind it compete with the blank alone.
    lm : torch.nn.Module or None
        `lm(tokens[R, 1], state) -> (scores[R, 1, V], state)`, e.g.
        SpeechBrain's `RNNLM` with `return_hidden: True`, over the same
        vocabulary.
    ilm_weight, lm_weight : float
        Weights of the internal language model and of `lm`.
    max_symbols : int
        Maximum number of labels at one frame.
    lm_bos_index : int or None
        The language model's first input; None takes the blank.
    expand_beam : float or None
        Extensions by a label that are this much, in nats, below the frame's
        best hypothesis are dropped; at 8 that is less than 1/2900 of its
        probability. Infinity drops none. None: 8 for the best hypothesis
        alone; none are dropped where several are wanted, so that the list is
        full.

    Example
    -------
    >>> from speechbrain_taskarith.transducer import LSTMPredictor, RNNTJoint
    >>> predictor = LSTMPredictor(10, 4, 6, num_layers=1)
    >>> joint = RNNTJoint(8, 6, 16, 10)
    >>> search = TransducerBeamSearch(predictor, joint, 0, beam_size=3)
    >>> best, scores, _, _ = search(torch.rand(2, 7, 8), torch.ones(2))
    >>> len(best), scores.shape
    (2, torch.Size([2]))
    """

    def __init__(
        self,
        predictor,
        joint,
        blank_index,
        beam_size=4,
        n_best=1,
        lm=None,
        ilm_weight=0.0,
        lm_weight=0.3,
        max_symbols=1,
        lm_bos_index=None,
        expand_beam=None,
    ):
        super().__init__(predictor, joint, blank_index, max_symbols)
        if beam_size < 1 or not 1 <= n_best <= beam_size or max_symbols < 1:
            raise ValueError(
                f"beam_size {beam_size}, n_best {n_best}, max_symbols "
                f"{max_symbols}: expected numbers from 1 on, and n_best no "
                "larger than beam_size"
            )
        if expand_beam is not None and not expand_beam > 0:
            raise ValueError(
                f"expand_beam {expand_beam}: expected nats, above 0 (infinity "
                "drops nothing)"
            )
        self.expand_beam = expand_beam
        self.beam_size = beam_size
        self.n_best = n_best
        self.label_scores = _LabelScores(
            blank_index, lm, lm_weight, ilm_weight, lm_bos_index
        )

    def _load_from_state_dict(self, state_dict, prefix, *options):
        # Earlier versions had the joint twice.
        for name in [*state_dict]:
            if name.startswith(f"{prefix}label_scores.joint."):
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *options)

    @torch.no_grad()
    def decode(self, encoder_out, lens=None, n_best=None):
        """Decode a batch, with the frames of labels.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [B, T, E].
        lens : torch.Tensor or None
            [B], relative lengths; None takes all frames.
        n_best : int or None
            Instead of the search's own.

        Returns
        -------
        list of list of Hypothesis
            Up to `n_best` of every utterance, the best first; [] of none.
        """
        if not len(encoder_out):
            return []
        state = self.final_state(encoder_out, lens, n_best=n_best)
        return self.results(state, n_best)

    @torch.no_grad()
    def start(self, batch, device="cpu", n_best=None):
        """Return the state of `batch` utterances before the first frame.

        On `device`, where the models are; see `advance`. `n_best` as of
        `decode`.
        """
        expand_beam = self.expand_beam
        if expand_beam is None:
            several = (n_best or self.n_best) > 1
            expand_beam = float("inf") if several else _EXPAND_BEAM
        prefixes = Prefixes.empty(self, batch * self.beam_size, device)
        scores = prefixes.predictor.new_full(
            (batch, self.beam_size), LOG_ZERO, dtype=torch.float64
        )
        scores[:, 0] = 0.0
        return BeamState(scores, prefixes, expand_beam)

    @torch.no_grad()
    def advance(self, encoder_out, state, frames=None):
        """Process one chunk; chunked and full decoding agree.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [B, t, E].
        state : BeamState
            From `start` or the last `advance`.
        frames : torch.Tensor or None
            [B], how many of the chunk's frames count (0 to t); None takes
            all.

        Returns
        -------
        BeamState
            The state after the chunk; `state` is not changed.
        """
        encoder = self.joint.project_encoder(only_valid(encoder_out, frames))
        scores, prefixes = state.scores, state.prefixes
        if frames is not None:
            frames = frames.to(encoder.device)
            if bool((frames == encoder.shape[1]).all()):
                frames = None
        for t in range(encoder.shape[1]):
            active = None if frames is None else t < frames
            scores, prefixes = self._frame(
                encoder[:, t],
                scores,
                prefixes,
                state.expand_beam,
                state.frame + t,
                active,
            )
        check_scores(scores)
        return BeamState(
            scores,
            prefixes,
            state.expand_beam,
            state.frame + encoder.shape[1],
        )

    def results(self, state, n_best=None):
        """Return the hypotheses of the frames so far; see `decode`."""
        ordered, order = state.scores.sort(dim=1, descending=True, stable=True)
        batch, beam = ordered.shape
        first = beam * torch.arange(batch, device=order.device)[:, None]
        prefixes = state.prefixes.select((first + order).flatten())
        columns = zip(
            ordered.flatten().tolist(),
            prefixes.lengths.tolist(),
            prefixes.tokens.tolist(),
            prefixes.frames.tolist(),
        )
        found = [[] for _ in range(batch)]
        for i, (score, length, tokens, frames) in enumerate(columns):
            hypothesis = Hypothesis(tokens[:length], score, frames[:length])
            if score != LOG_ZERO and i % beam < (n_best or self.n_best):
                found[i // beam].append(hypothesis)
        return found

    def _frame(self, encoder, scores, prefixes, expand_beam, frame, active):
        """Process one frame: encoder [B, J], scores [B, K].

        The paths of one frame; those that reach a blank are candidates::

            hypothesis --blank--> candidate
                 |label
            extension  --blank--> candidate
                 |label                         up to max_symbols labels

        `generations[n]` holds the prefixes with n more labels than before the
        frame. Rows of candidates count through all generations in order. Only
        in an `active` utterance [B] (None: in all) does anything change.
        """
        batch, beam = scores.shape
        before = torch.arange(batch * beam, device=scores.device)
        before = before.view(batch, beam)
        log_probs = self.joint.log_probs(
            encoder.repeat_interleave(beam, 0), prefixes.predictor
        )
        after_blank = scores + log_probs[:, self.blank_index].view(batch, beam)
        candidates = Candidates(
            after_blank, prefixes.keys.view(batch, beam), before
        )
        # Of the newest generation: its prefixes, the scores of their paths
        # before this frame's blank, and the utterance of each.
        generations, newest, path_scores = [prefixes], prefixes, scores
        utterance = before.flatten() // beam
        rows = batch * beam
        for _ in range(self.max_symbols):
            extended, parents, labels = self._best_extensions(
                path_scores, log_probs, newest.extra, batch, utterance
            )
            # The blank that follows only lowers a score.
            least = candidates.scores.amax(1, keepdim=True) - expand_beam
            least = torch.maximum(least, candidates.threshold(beam))
            # NaN is taken along, for `check_scores` to find.
            promising = ~(extended <= least)
            if active is not None:
                promising &= active[:, None]
            if not bool(promising.any()):
                break
            utterance, column = promising.nonzero().unbind(1)
            newest = newest.extend(
                self, parents[promising], labels[promising], frame
            )
            generations.append(newest)
            path_scores = extended[promising]
            log_probs = self.joint.log_probs(
                encoder[utterance], newest.predictor
            )
            after_label = path_scores + log_probs[:, self.blank_index]
            first, rows = rows, rows + len(utterance)
            new_rows = torch.arange(first, rows, device=scores.device)
            candidates.add(
                utterance, column, after_label, newest.keys, new_rows
            )
        if len(generations) == 1:
            # No label in any utterance: the prefixes stay as they are.
            if active is not None:
                after_blank = torch.where(active[:, None], after_blank, scores)
            return after_blank, prefixes
        best, order = candidates.scores.topk(beam, dim=1)
        chosen = candidates.rows.gather(1, order)
        if active is not None:
            best = torch.where(active[:, None], best, scores)
            chosen = torch.where(active[:, None], chosen, before)
        return best, Prefixes.concatenate(generations).select(chosen.flatten())

    def _best_extensions(self, path_scores, log_probs, extra, batch, utterance):
        """Return the K best extensions of each utterance by one label.

        [B, K] each: scores, the rows they extend, labels. Rows of
        `log_probs` [R, V] belong to the `utterance` [R], in order.
        """
        beam = self.beam_size
        scores = path_scores.reshape(-1, 1) + log_probs
        if extra is not None:
            # What the model excludes stays excluded.
            scores = torch.where(scores == LOG_ZERO, scores, scores + extra)
        scores[:, self.blank_index] = LOG_ZERO
        # The best of every row first; then rows of an utterance compete.
        width = min(beam, scores.shape[1])
        best, labels = scores.topk(width, dim=1)
        row = torch.arange(len(scores), device=scores.device)
        if len(scores) == batch * beam:
            best, labels = best.view(batch, -1), labels.view(batch, -1)
            parents = row.view(batch, beam).repeat_interleave(width, 1)
        else:
            # Utterances have different numbers of rows: pad them to K.
            column = row - torch.searchsorted(utterance, utterance)

            def dense(values, fill):
                table = values.new_full((batch, beam, width), fill)
                table[utterance, column] = values
                return table.flatten(1)

            parents = dense(row[:, None].expand(-1, width), 0)
            best, labels = dense(best, LOG_ZERO), dense(labels, 0)
        best, order = best.topk(min(beam, best.shape[1]), dim=1)
        return best, parents.gather(1, order), labels.gather(1, order)


class _LabelScores(torch.nn.Module):
    """`lm_weight log P_LM - ilm_weight log P_ILM` of every next label."""

    def __init__(self, blank_index, lm, lm_weight, ilm_weight, bos_index):
        super().__init__()
        self.blank_index = blank_index
        self.lm = lm
        self.lm_weight = lm_weight if lm is not None else 0.0
        self.ilm_weight = ilm_weight
        self.bos_index = blank_index if bos_index is None else bos_index

    def forward(self, joint, predictor_out, labels, lm_state):
        """Return scores [R, V], 0 at the blank, and the language model's state.

        Of `predictor_out` [R, P] and the last labels [R] (None at the
        beginning). The scores are None without any language model.
        """
        extra = None
        if self.ilm_weight:
            extra = -self.ilm_weight * joint.internal_lm(predictor_out)
        if self.lm_weight:
            if labels is None:
                labels = predictor_out.new_full(
                    predictor_out.shape[:1], self.bos_index, dtype=torch.long
                )
            outer, lm_state = self._outer(labels, lm_state)
            if extra is not None and extra.shape != outer.shape:
                raise ValueError(
                    f"the language model scores {outer.shape[-1]} labels, the "
                    f"joint {extra.shape[-1]}; they need one vocabulary"
                )
            extra = outer if extra is None else extra + outer
        if extra is not None:
            extra[:, self.blank_index] = 0.0
        return extra, lm_state

    def _outer(self, labels, lm_state):
        result = self.lm(labels[:, None], lm_state)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                f"{type(self.lm).__name__} returned no state beside its "
                "scores; a search needs both (RNNLM: return_hidden=True)"
            )
        log_probs = labels_only(result[0].flatten(1), self.blank_index)
        return self.lm_weight * log_probs, result[1]
