"""Beam prefixes as rows of tensors, and the candidates they compete with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from speechbrain_taskarith.transducer.predictor import join_states, select_state

LOG_ZERO = float("-inf")

# Odd, and without structure (the golden ratio, and splitmix64's mixer).
_STEP = 0x1E3779B97F4A7C15
_MIX = 0x3F58476D1CE4E5B9


def extended_keys(keys, labels):
    """Hash prefixes, given their parents' keys (0: empty) and last labels.

    All are int64, [R]. Integer arithmetic modulo 2**64: the same everywhere.
    """
    keys = (keys ^ (labels + 1) * _STEP) * _MIX
    keys = (keys ^ (keys >> 29)) * _MIX
    return keys ^ (keys >> 32)


@dataclass
class Prefixes:
    """R label sequences, with all that depends on the sequence alone."""

    tokens: torch.Tensor  # [R, L]; undefined from `lengths` on
    frames: torch.Tensor  # [R, L], when each label was emitted
    lengths: torch.Tensor  # [R]
    keys: torch.Tensor  # [R], hash values
    predictor: torch.Tensor  # [R, J], the predictor's output, projected
    state: Any  # the predictor's, batch in dimension 1
    extra: Any = None  # [R, V] from language models, None without
    lm_state: Any = None  # the language model's, batch in dimension 1

    @classmethod
    def empty(cls, search, count, device):
        """Return `count` empty prefixes."""
        out, state = search.read_blank(count, device)
        extra, lm_state = search.label_scores(search.joint, out, None, None)
        nothing = torch.zeros((count, 0), dtype=torch.long, device=device)
        zeros = torch.zeros(count, dtype=torch.long, device=device)
        out = search.joint.project_predictor(out)
        return cls(nothing, nothing, zeros, zeros, out, state, extra, lm_state)

    def select(self, rows):
        """Return rows by index, any number of times each."""
        return Prefixes(
            self.tokens[rows],
            self.frames[rows],
            self.lengths[rows],
            self.keys[rows],
            self.predictor.index_select(0, rows),
            select_state(self.state, rows),
            None if self.extra is None else self.extra[rows],
            select_state(self.lm_state, rows),
        )

    def extend(self, search, parents, labels, frame):
        """Return the prefixes `parents` [N], each with a label [N] appended."""
        out, state = search.predictor(
            labels[:, None], select_state(self.state, parents)
        )
        lm_state = select_state(self.lm_state, parents)
        extra, lm_state = search.label_scores(
            search.joint, out[:, 0], labels, lm_state
        )
        lengths = self.lengths[parents]
        tokens, frames = self.tokens[parents], self.frames[parents]
        if int(lengths.max()) == tokens.shape[1]:
            # By many columns at once: a copy every 32 labels.
            tokens, frames = pad(tokens, (0, 32)), pad(frames, (0, 32))
        tokens.scatter_(1, lengths[:, None], labels[:, None])
        frames.scatter_(1, lengths[:, None], frame)
        return Prefixes(
            tokens,
            frames,
            lengths + 1,
            extended_keys(self.keys[parents], labels),
            search.joint.project_predictor(out[:, 0]),
            state,
            extra,
            lm_state,
        )

    @classmethod
    def concatenate(cls, parts):
        """Return the rows of all parts, in this order."""
        width = max(part.tokens.shape[1] for part in parts)

        def padded(tensors):
            return torch.cat([pad(x, (0, width - x.shape[1])) for x in tensors])

        extras = [part.extra for part in parts]
        return cls(
            padded([part.tokens for part in parts]),
            padded([part.frames for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.keys for part in parts]),
            torch.cat([part.predictor for part in parts]),
            join_states([part.state for part in parts]),
            None if extras[0] is None else torch.cat(extras),
            join_states([part.lm_state for part in parts]),
        )


@dataclass
class Candidates:
    """Hypotheses that compete for the beam of the next frame, [B, P] each.

    Of every prefix only one has a score above minus infinity.
    """

    scores: torch.Tensor  # float64
    keys: torch.Tensor  # of the prefixes
    rows: torch.Tensor  # where the prefixes are

    def threshold(self, beam_size):
        """Return the K-th best score [B, 1], which a new one has to beat."""
        if self.scores.shape[1] == beam_size:
            return self.scores.amin(1, keepdim=True)
        return self.scores.topk(beam_size, dim=1)[0][:, -1:]

    def add(self, utterance, column, scores, keys, rows):
        """Add hypotheses [N] of some utterances, in new columns.

        One whose prefix is there already adds its probability to it.
        """
        old, added = self.scores.shape[1], int(column.max()) + 1

        def widened(table, values, fill):
            table = pad(table, (0, added), value=fill)
            table[utterance, old + column] = values
            return table

        self.scores = widened(self.scores, scores, LOG_ZERO)
        self.keys = widened(self.keys, keys, 0)
        self.rows = widened(self.rows, rows, 0)
        # A prefix has one parent, so the new ones differ from one another.
        used = self.scores > LOG_ZERO
        same = self.keys[:, old:, None] == self.keys[:, None, :old]
        same &= used[:, old:, None] & used[:, None, :old]
        if bool(same.any()):
            row, new, before = same.nonzero().unbind(1)
            self.scores[row, before] = torch.logaddexp(
                self.scores[row, before], self.scores[row, old + new]
            )
            self.scores[row, old + new] = LOG_ZERO
