"""Prefixes of a beam search as rows of tensors."""

from dataclasses import dataclass
from typing import Any

import torch

from speechbrain_taskarith.transducer.search.predictor import (
    join_states,
    select_state,
)

# Odd, and without structure (the golden ratio, and splitmix64's mixer).
_STEP = 0x1E3779B97F4A7C15
_MIX = 0x3F58476D1CE4E5B9


def extended_keys(keys, labels):
    """Hash prefixes that are extended by a label.

    Arguments
    ---------
    keys : torch.Tensor
        [R], int64, of the prefixes; 0 of the empty one.
    labels : torch.Tensor
        [R], int64.

    Returns
    -------
    torch.Tensor
        [R], int64. Integer arithmetic modulo 2**64: the same everywhere.

    Example
    -------
    >>> a, b = torch.tensor([3, 5]), torch.tensor([5, 3])
    >>> start = torch.zeros(2, dtype=torch.long)
    >>> keys = extended_keys(extended_keys(start, a), b)
    >>> bool(keys[0] == keys[1])
    False
    """
    keys = (keys ^ (labels + 1) * _STEP) * _MIX
    keys = (keys ^ (keys >> 29)) * _MIX
    return keys ^ (keys >> 32)


@dataclass
class Rows:
    """Prefixes, a row each, with all that depends on them.

    Arguments
    ---------
    tokens : torch.Tensor
        [R, L], labels; what lies behind `lengths` means nothing.
    frames : torch.Tensor
        [R, L], when they came out.
    lengths : torch.Tensor
        [R].
    keys : torch.Tensor
        [R], hash values.
    predictor : torch.Tensor
        [R, J], the predictor's output, projected for the joint.
    state : object
        The predictor's, batch in dimension 1.
    extra : torch.Tensor or None
        [R, V], weighted scores of language models for the next label.
    lm_state : object
        The language model's, batch in dimension 1.
    """

    tokens: torch.Tensor
    frames: torch.Tensor
    lengths: torch.Tensor
    keys: torch.Tensor
    predictor: torch.Tensor
    state: Any
    extra: Any = None
    lm_state: Any = None

    @classmethod
    def first(cls, search, count, device):
        """Return rows of the empty prefix.

        Arguments
        ---------
        search : torch.nn.Module
            With predictor, joint, blank_index and label_scores.
        count : int
            Number of rows.
        device : torch.device
            Where.

        Returns
        -------
        Rows
            All alike.
        """
        blank = torch.full(
            (count, 1), search.blank_index, dtype=torch.long, device=device
        )
        out, state = search.predictor(blank)
        extra, lm_state = search.label_scores(out[:, 0], None, None)
        nothing = torch.zeros((count, 0), dtype=torch.long, device=device)
        zeros = torch.zeros(count, dtype=torch.long, device=device)
        projected = search.joint.project_predictor(out[:, 0])
        return cls(
            nothing, nothing, zeros, zeros, projected, state, extra, lm_state
        )

    def select(self, rows):
        """Take some rows.

        Arguments
        ---------
        rows : torch.Tensor
            Indices, any number of times each.

        Returns
        -------
        Rows
            Those.
        """
        return Rows(
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
        """Extend some rows by a label each.

        Arguments
        ---------
        search : torch.nn.Module
            With predictor, joint and label_scores.
        parents : torch.Tensor
            [R], the rows to extend.
        labels : torch.Tensor
            [R].
        frame : int
            The present frame.

        Returns
        -------
        Rows
            R new ones.
        """
        out, state = search.predictor(
            labels[:, None], select_state(self.state, parents)
        )
        lm_state = select_state(self.lm_state, parents)
        extra, lm_state = search.label_scores(out[:, 0], labels, lm_state)
        lengths = self.lengths[parents]
        tokens, frames = self.tokens[parents], self.frames[parents]
        if int(lengths.max()) == tokens.shape[1]:
            room = (0, 32)
            tokens = torch.nn.functional.pad(tokens, room)
            frames = torch.nn.functional.pad(frames, room)
        tokens.scatter_(1, lengths[:, None], labels[:, None])
        frames.scatter_(1, lengths[:, None], frame)
        return Rows(
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
    def joined(cls, parts):
        """Put rows behind one another.

        Arguments
        ---------
        parts : list of Rows
            In this order.

        Returns
        -------
        Rows
            All of them.
        """
        width = max(part.tokens.shape[1] for part in parts)

        def padded(name):
            return torch.cat(
                [
                    torch.nn.functional.pad(
                        getattr(part, name),
                        (0, width - part.tokens.shape[1]),
                    )
                    for part in parts
                ]
            )

        extras = [part.extra for part in parts]
        return cls(
            padded("tokens"),
            padded("frames"),
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.keys for part in parts]),
            torch.cat([part.predictor for part in parts]),
            join_states([part.state for part in parts]),
            None if extras[0] is None else torch.cat(extras),
            join_states([part.lm_state for part in parts]),
        )
