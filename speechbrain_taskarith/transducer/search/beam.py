"""Beam search over a whole batch, with prefix merging.

A frame at a time, every beam of every utterance in one call of joint and
predictor. At a frame a hypothesis either takes a blank and waits for the next
one, or is extended by a label and asked again, up to `max_symbols` times.
Paths that lead to the same labels are one hypothesis, whose probabilities add
up (prefixes are told apart by a 64-bit hash).
"""

from dataclasses import dataclass

import torch

from speechbrain_taskarith.transducer.joints.joint import as_joint
from speechbrain_taskarith.transducer.loss.lengths import checked_lengths
from speechbrain_taskarith.transducer.search.beam_rows import Rows
from speechbrain_taskarith.transducer.search.hypotheses import (
    Hypothesis,
    SearchResult,
)
from speechbrain_taskarith.transducer.search.label_scores import LabelScores
from speechbrain_taskarith.utils.lengths import padding_mask

_NEVER = float("-inf")


@dataclass
class BeamState:
    """Where a search stands between two chunks.

    Arguments
    ---------
    scores : torch.Tensor
        [B, K], log-probabilities, float64; minus infinity: no hypothesis.
    rows : beam_rows.Rows
        B * K prefixes.
    frame : int
        Number of frames gone by.
    """

    scores: torch.Tensor
    rows: Rows
    frame: int = 0


class TransducerBeamSearch(torch.nn.Module):
    """Batched beam search for transducers.

    With a language model, a label's score is `log P(label|x) + lm_weight
    log P_LM - ilm_weight log P_ILM`: shallow fusion with the internal
    language model taken out (Variani 2020, arXiv 2003.07705; Meng 2021,
    arXiv 2011.01991). Blanks keep their score.

    Arguments
    ---------
    predictor : torch.nn.Module
        `LSTMPredictor`, `SpeechBrainPredictor` or alike.
    joint : torch.nn.Module
        `RNNTJoint`, `HATJoint`, `SpeechBrainJoint` or alike.
    blank_index : int
        Index of the blank.
    beam_size : int
        Hypotheses kept, K.
    n_best : int
        Hypotheses returned, up to K.
    lm : torch.nn.Module or None
        `lm(tokens[R, 1], state) -> (scores[R, 1, V], state)`, e.g.
        SpeechBrain's `RNNLM` with `return_hidden: True`, over the same
        vocabulary.
    ilm_weight : float
        Weight of the internal language model.
    lm_weight : float
        Weight of `lm`.
    max_symbols : int
        Labels at one frame, at most.
    lm_bos_index : int or None
        What the language model starts from; None takes the blank.

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
    ):
        super().__init__()
        if beam_size < 1 or not 1 <= n_best <= beam_size or max_symbols < 1:
            raise ValueError(
                f"beam_size {beam_size}, n_best {n_best}, max_symbols "
                f"{max_symbols}: expected numbers from 1 on, and n_best no "
                "larger than beam_size"
            )
        self.predictor = predictor
        self.joint = as_joint(joint, blank_index)
        self.blank_index = blank_index
        self.beam_size = beam_size
        self.n_best = n_best
        self.max_symbols = max_symbols
        self.label_scores = LabelScores(
            self.joint, blank_index, lm, lm_weight, ilm_weight, lm_bos_index
        )

    def forward(self, encoder_out, lens=None):
        """Decode a batch.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [B, T, E].
        lens : torch.Tensor or None
            [B], relative lengths; None takes all frames.

        Returns
        -------
        SearchResult
            Best label sequences, their scores, n-best lists, their scores.
        """
        return SearchResult.of(self.decode(encoder_out, lens))

    @torch.no_grad()
    def decode(self, encoder_out, lens=None, n_best=None):
        """Decode a batch, with the frames of labels.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [B, T, E].
        lens : torch.Tensor or None
            [B], relative lengths.
        n_best : int or None
            In the place of the search's own.

        Returns
        -------
        list of list of Hypothesis
            Of every utterance up to `n_best`, the best first.
        """
        state = self.start(len(encoder_out), encoder_out.device)
        frames = None
        if lens is not None:
            frames = checked_lengths(lens, encoder_out.shape[1], "input")
        return self.results(self.advance(encoder_out, state, frames), n_best)

    @torch.no_grad()
    def start(self, batch, device="cpu"):
        """Begin, before the first frame.

        Arguments
        ---------
        batch : int
            Number of utterances.
        device : str or torch.device
            Where the models are.

        Returns
        -------
        BeamState
            To be given to `advance`.
        """
        rows = Rows.first(self, batch * self.beam_size, device)
        scores = torch.full(
            (batch, self.beam_size), _NEVER, dtype=torch.float64, device=device
        )
        scores[:, 0] = 0.0
        return BeamState(scores, rows)

    @torch.no_grad()
    def advance(self, encoder_out, state, frames=None):
        """Go on by a chunk of frames; in chunks or whole, the result is one.

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
            A new one.
        """
        if not bool(torch.isfinite(encoder_out).all()):
            encoder_out = _only_valid(encoder_out, frames)
        encoder = self.joint.project_encoder(encoder_out)
        scores, rows, frame = state.scores, state.rows, state.frame
        if frames is not None:
            frames = frames.to(encoder.device)
            if bool((frames == encoder.shape[1]).all()):
                frames = None
        for t in range(encoder.shape[1]):
            live = None if frames is None else t < frames
            scores, rows = self._frame(
                encoder[:, t], scores, rows, frame + t, live
            )
        return BeamState(scores, rows, frame + encoder.shape[1])

    def results(self, state, n_best=None):
        """Read off what has been found so far.

        Arguments
        ---------
        state : BeamState
            From `advance`.
        n_best : int or None
            In the place of the search's own.

        Returns
        -------
        list of list of Hypothesis
            Of every utterance up to `n_best`, the best first.
        """
        ordered, order = state.scores.sort(dim=1, descending=True, stable=True)
        batch, beam = ordered.shape
        first = beam * torch.arange(batch, device=order.device)[:, None]
        rows = state.rows.select((first + order).flatten())
        table = zip(
            ordered.flatten().tolist(),
            rows.lengths.tolist(),
            rows.tokens.tolist(),
            rows.frames.tolist(),
        )
        every = [
            Hypothesis(tokens[:count], score, frames[:count])
            for score, count, tokens, frames in table
        ]
        most = n_best or self.n_best
        return [
            [one for one in every[start : start + beam] if one.score != _NEVER][
                :most
            ]
            for start in range(0, batch * beam, beam)
        ]

    def _frame(self, encoder, scores, rows, frame, live):
        """Go on by one frame: encoder [B, J], scores [B, K]."""
        batch, beam = scores.shape
        place = torch.arange(batch * beam, device=scores.device)
        place = place.view(batch, beam)
        log_probs = self.joint.log_probs(
            encoder.repeat_interleave(beam, 0), rows.predictor
        )
        waiting = scores + log_probs[:, self.blank_index].view(batch, beam)
        pool = _Pool(waiting, rows.keys.view(batch, beam), place)
        frontier, parts, count = scores, [rows], batch * beam
        at, utterance = rows, place.flatten().div(beam, rounding_mode="floor")
        for _ in range(self.max_symbols):
            best, parent, label = self._extensions(
                frontier, log_probs, at, batch, utterance
            )
            wanted = best > pool.least(beam)
            if live is not None:
                wanted &= live[:, None]
            if not bool(wanted.any()):
                break
            utterance, slot = wanted.nonzero().unbind(1)
            at = at.extend(self, parent[wanted], label[wanted], frame)
            parts.append(at)
            frontier = best[wanted]
            log_probs = self.joint.log_probs(encoder[utterance], at.predictor)
            pool = pool.joined(
                utterance,
                slot,
                frontier + log_probs[:, self.blank_index],
                at.keys,
                count,
            )
            count += len(utterance)
        if len(parts) == 1:
            # No label anywhere: nothing moves.
            if live is not None:
                waiting = torch.where(live[:, None], waiting, scores)
            return waiting, rows
        found, order = pool.scores.topk(beam, dim=1)
        chosen = pool.place.gather(1, order)
        if live is not None:
            found = torch.where(live[:, None], found, scores)
            chosen = torch.where(live[:, None], chosen, place)
        return found, Rows.joined(parts).select(chosen.flatten())

    def _extensions(self, frontier, log_probs, at, batch, utterance):
        """Return the best extensions of each utterance by one label.

        [B, K] each: scores, the rows they extend, labels.
        """
        beam = self.beam_size
        scores = frontier.reshape(-1, 1) + log_probs
        if at.extra is not None:
            scores += at.extra
        scores[:, self.blank_index] = _NEVER
        # The best of every row first; rows of an utterance compete after.
        width = min(beam, scores.shape[1])
        best, label = scores.topk(width, dim=1)
        index = torch.arange(len(scores), device=scores.device)
        if len(scores) == batch * beam:
            best, label = best.view(batch, -1), label.view(batch, -1)
            parent = index.view(batch, beam).repeat_interleave(width, 1)
        else:
            slot = index - torch.searchsorted(utterance, utterance)
            dense = scores.new_full((batch, beam, width), _NEVER)
            dense[utterance, slot] = best
            labels = label.new_zeros(dense.shape)
            labels[utterance, slot] = label
            parent = label.new_zeros(dense.shape)
            parent[utterance, slot] = index[:, None].expand(-1, width)
            best, label = dense.flatten(1), labels.flatten(1)
            parent = parent.flatten(1)
        best, order = best.topk(min(beam, best.shape[1]), dim=1)
        return best, parent.gather(1, order), label.gather(1, order)


class _Pool:
    """Candidates for the next frame, [B, P]; equal prefixes are one."""

    def __init__(self, scores, keys, place):
        self.scores, self.keys, self.place = scores, keys, place

    def least(self, beam):
        """Return the score [B, 1] that a newcomer has to beat."""
        if self.scores.shape[1] == beam:
            return self.scores.amin(1, keepdim=True)
        return self.scores.topk(beam, dim=1)[0][:, -1:]

    def joined(self, utterance, slot, scores, keys, first):
        """Return a pool with newcomers, whose rows count from `first`."""
        batch, device = len(self.scores), scores.device
        width = int(slot.max()) + 1
        shape = (batch, width)
        wide = torch.full(shape, _NEVER, dtype=torch.float64, device=device)
        wide[utterance, slot] = scores.double()
        wide_keys = torch.zeros(shape, dtype=torch.long, device=device)
        wide_keys[utterance, slot] = keys
        wide_place = torch.zeros(shape, dtype=torch.long, device=device)
        wide_place[utterance, slot] = first + torch.arange(
            len(scores), device=device
        )
        return _Pool(
            torch.cat((self.scores, wide), 1),
            torch.cat((self.keys, wide_keys), 1),
            torch.cat((self.place, wide_place), 1),
        )._merged(self.scores.shape[1])

    def _merged(self, old):
        """Add newcomers (from column `old` on) to their equals before them.

        A prefix has one parent, so newcomers differ from one another.
        """
        there = self.scores > _NEVER
        same = self.keys[:, old:, None] == self.keys[:, None, :old]
        same &= there[:, old:, None] & there[:, None, :old]
        if bool(same.any()):
            row, new, before = same.nonzero().unbind(1)
            total = torch.logaddexp(
                self.scores[row, before], self.scores[row, old + new]
            )
            self.scores[row, before] = total
            self.scores[row, old + new] = _NEVER
        return self


def _only_valid(encoder_out, frames):
    """Let padding hold anything; what counts must be finite."""
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
