"""Noise that makes text look like CTC output."""

import unicodedata

import torch

from speechbrain_taskarith.translation.distributed import process_rank
from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    padding_mask,
    relative_lengths,
)


class BlankNoise(torch.nn.Module):
    """Put blanks into some sentences of a batch of text, in training only.

    In a sentence chosen at random all punctuation becomes blank, and
    `round(number of tokens * U(0, insert_share))` blanks are inserted, each at
    a random place and from there moved on to where the next word begins, or to
    the sentence's end (arXiv 2311.03810, section 4.2).

    Called with tokens [B, U] and their relative lengths [B], it returns noisy
    tokens [B, U'], U' >= U, and theirs; outside training, the tokens and lengths
    themselves.

    Arguments
    ---------
    blank_token : int
        The blank in the text's vocabulary; the CTC head's.
    probability : float
        Of a sentence to be chosen.
    insert_share : float
        Most blanks for every token; the share is drawn uniformly from 0 to it
        for each sentence.
    seed : int, optional
        Makes the noise a function of seed, process and number of the call
        (which is part of the state, so that a resumed run goes on). None:
        torch's own random numbers.
    punctuation : collection of int
        Tokens that become blank.
    word_starts : collection of int, optional
        Tokens that begin a word. None: any token, if there are no
        `boundaries` either.
    boundaries : collection of int
        Tokens behind which a word begins (the space of a character
        vocabulary). The first token begins one.
    pad_index : int
        Padding token.

    Example
    -------
    >>> noise = BlankNoise(0, probability=1.0, seed=1, punctuation=[9])
    >>> tokens, lens = torch.tensor([[3, 4, 9], [5, 9, 0]]), torch.ones(2)
    >>> noisy, noisy_lens = noise(tokens, torch.tensor([1.0, 2 / 3]))
    >>> noisy.tolist()
    [[3, 4, 0], [5, 0, 0]]
    >>> torch.equal(noise.eval()(tokens, lens)[0], tokens)
    True
    """

    def __init__(
        self,
        blank_token,
        probability=0.1,
        insert_share=0.2,
        seed=None,
        punctuation=(),
        word_starts=None,
        boundaries=(),
        pad_index=0,
    ):
        super().__init__()
        if not (0 <= probability <= 1 and 0 <= insert_share <= 1):
            raise ValueError(
                f"probability {probability}, insert_share {insert_share}: "
                "expected 0 to 1"
            )
        self.blank_token = blank_token
        self.probability, self.insert_share = probability, insert_share
        self.seed, self.pad_index = seed, pad_index
        anywhere = word_starts is None and not len(boundaries)
        self.word_starts = None if anywhere else sorted(word_starts or ())
        self.boundaries = sorted(boundaries)
        self.punctuation = sorted(punctuation)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    @classmethod
    def for_pieces(cls, pieces, blank_token, **settings):
        """Find punctuation and word starts among a vocabulary's pieces.

        Arguments
        ---------
        pieces : sequence of str
            All tokens in order. A leading "▁" (SentencePiece) begins a
            word; where no piece has one, a word begins behind " ".
        blank_token : int
            The blank.
        **settings : object
            Of the class.

        Returns
        -------
        BlankNoise

        Example
        -------
        >>> noise = BlankNoise.for_pieces(["<b>", "▁a", "b", ".", "▁,"], 0)
        >>> noise.punctuation, noise.word_starts
        ([3, 4], [1, 4])
        """
        bare = [piece.replace("▁", "") for piece in pieces]
        settings["punctuation"] = [
            i
            for i, piece in enumerate(bare)
            if piece
            and i != blank_token
            and all(unicodedata.category(c)[0] == "P" for c in piece)
        ]
        starts = [i for i, piece in enumerate(pieces) if piece[:1] == "▁"]
        if starts:
            settings["word_starts"] = starts
        else:
            spaces = [i for i, piece in enumerate(pieces) if piece == " "]
            settings["boundaries"] = spaces
        return cls(blank_token, **settings)

    def forward(self, tokens, lens):
        """Return a noisy copy of a batch, see `BlankNoise`."""
        if not self.training or self.probability == 0:
            return tokens, lens
        size = tokens.shape[1]
        chosen, share, places = (
            drawn.to(tokens.device, non_blocking=True)
            for drawn in self._draw(len(tokens), size)
        )
        lengths = absolute_lengths(lens, size)
        inside = ~padding_mask(lengths, size)
        chosen = chosen < self.probability
        punctuation = _isin(tokens, self.punctuation) & inside & chosen
        # Found before punctuation is replaced, which begins no word.
        starts = self._starts(tokens) & inside & ~punctuation
        tokens = tokens.masked_fill(punctuation, self.blank_token)
        count = (lengths * self.insert_share * share).round() * chosen[:, 0]
        blanks = _blanks_at(starts, lengths, places, count)
        return self._insert(tokens, lengths, blanks, lens)

    def _draw(self, batch, size):
        generator = None
        if self.seed is not None:
            number = self.seed * 1_000_003 + int(self.calls)
            number = number * 65_537 + process_rank()
            generator = torch.Generator().manual_seed(number % 2**63)
            self.calls += 1
        return (
            torch.rand(batch, 1, generator=generator),
            torch.rand(batch, generator=generator),
            torch.rand(batch, size, generator=generator),
        )

    def _starts(self, tokens):
        if self.word_starts is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        starts = _isin(tokens, self.word_starts)
        if self.boundaries:
            first = torch.ones_like(starts[:, :1])
            behind = _isin(tokens, self.boundaries)[:, :-1]
            starts = starts | torch.cat([first, behind], 1)
        return starts

    def _insert(self, tokens, lengths, blanks, lens):
        """Put `blanks` [B, U + 1] of them in front of tokens and the end."""
        batch, size = tokens.shape
        longer = lengths + blanks.sum(1)
        width = max(size, int(longer.max()))
        steps = torch.arange(size, device=tokens.device)
        target = steps + blanks[:, :size].cumsum(1)
        target = target.masked_fill(padding_mask(lengths, size), width)
        # All of a sentence is blank, but where its tokens go.
        outside = padding_mask(longer, width + 1)
        out = tokens.new_full((batch, width + 1), self.blank_token)
        out = out.masked_fill(outside, self.pad_index)
        out = out.scatter(1, target, tokens)[:, :width]
        return out, relative_lengths(longer, width).to(lens)


def _blanks_at(starts, lengths, places, count):
    """Count the blanks in front of each token [B, U], and at the end.

    The first `count` of `places` [B, U], in [0, 1), are used: a share is 1 at
    most, so that there are enough.
    """
    size = starts.shape[1]
    steps = torch.arange(size, device=starts.device)
    behind = lengths[:, None].expand(-1, size + 1)
    # The next start from each place on: a minimum, cumulated from the end.
    found = torch.where(starts, steps, behind[:, :size])
    found = found.flip(1).cummin(1).values.flip(1)
    place = (places * lengths[:, None]).long().clamp(max=size - 1)
    at = found.gather(1, place)
    used = (steps < count[:, None]).long()
    return torch.zeros_like(behind).scatter_add(1, at, used)


def _isin(tokens, kinds):
    kinds = torch.tensor(kinds, dtype=tokens.dtype)
    return torch.isin(tokens, kinds.to(tokens.device, non_blocking=True))
