"""Beam and greedy search of translations."""

import math

import torch
from speechbrain.decoders.seq2seq import S2STransformerBeamSearcher

from speechbrain_taskarith.translation.search.incremental import (
    decoder_by_steps,
)
from speechbrain_taskarith.utils.lengths import absolute_lengths


class TranslationBeamSearch(S2STransformerBeamSearcher):
    """SpeechBrain's beam search over a `TranslationDecoder`.

    Shrunk speech may be shorter than its translation, so the longest
    translation is `max_decode_ratio` times its length and `least_steps` at
    least; SpeechBrain's stops at the ratio, of the longest in the batch. After
    a call, `most_steps` holds the longest of each utterance. Hypotheses are
    compared by log probability / length ** `length_penalty`, the end token
    counted.

    Called with the textual encoder's output [B, S, d], its relative lengths
    [B] and, if wanted, a beginning token of its own for every utterance [B],
    it returns what `S2SBeamSearcher` does. Where there are fewer hypotheses
    than beams, `topk` lists end in empty ones of score minus infinity.

    Arguments
    ---------
    decoder : TranslationDecoder
        In evaluation mode.
    bos_index, eos_index : int
        Beginning and end token.
    beam_size : int
        Hypotheses.
    max_decode_ratio : float
        Longest translation, in lengths of the encoder's output.
    least_steps : int
        Steps that are always allowed.
    length_penalty : float, optional
        From 0: above 1 favours long translations (the paper: 1.2), below 1
        short ones. None: 1, or 0 with `length_normalization=False`.
    **settings : object
        Of SpeechBrain's `S2SBeamSearcher`.

    Example
    -------
    >>> from speechbrain_taskarith.translation import TranslationDecoder
    >>> decoder = TranslationDecoder(6, 8, 2, num_layers=1).eval()
    >>> search = TranslationBeamSearch(decoder, 1, 2, beam_size=2)
    >>> found, _, _, _ = search(torch.rand(2, 3, 8), torch.ones(2))
    >>> len(found)
    2
    """

    def __init__(
        self,
        decoder,
        bos_index,
        eos_index,
        beam_size=5,
        max_decode_ratio=2.0,
        least_steps=50,
        length_penalty=None,
        **settings,
    ):
        if length_penalty is None:
            length_penalty = float(settings.get("length_normalization", True))
        elif "length_normalization" in settings:
            raise ValueError(
                "length_penalty and length_normalization: give one of them; "
                "the latter means a penalty of 1, or of 0"
            )
        # With a penalty of 0 there may be a scorer that rewards length.
        settings["length_normalization"] = length_penalty != 0
        settings.setdefault("min_decode_ratio", 0.0)
        settings.setdefault("using_eos_threshold", False)
        super().__init__(
            [decoder, decoder.seq_lin],
            bos_index=bos_index,
            eos_index=eos_index,
            max_decode_ratio=max_decode_ratio,
            beam_size=beam_size,
            **settings,
        )
        self.least_steps = least_steps
        self.length_penalty = length_penalty
        self.most_steps, self._fewest_steps = [], []
        self._begin = None

    @property
    def length_penalty(self):
        """The exponent of the length; it may be changed."""
        return self._length_penalty

    @length_penalty.setter
    def length_penalty(self, value):
        """Set the exponent of the length.

        Arguments
        ---------
        value : float
            A number from 0 on, else a `ValueError`.
        """
        if not 0 <= value < math.inf:
            raise ValueError(
                f"length_penalty {value}: expected a number from 0 (none) on; "
                "the paper has 1.2"
            )
        self._length_penalty = float(value)
        self.length_normalization = value > 0

    def forward(self, enc_states, wav_len, bos_index=None):
        """As `S2SBeamSearcher.forward`; `bos_index` may be a tensor [B]."""
        self._begin = beginning_tokens(
            self.bos_index if bos_index is None else bos_index, enc_states
        )
        try:
            return super().forward(enc_states, wav_len)
        finally:
            self._begin = None

    def init_beam_search_data(self, enc_states, wav_len):
        """As `S2SBeamSearcher.init_beam_search_data`, with each one's token."""
        hypotheses, _, *rest = super().init_beam_search_data(
            enc_states, wav_len
        )
        self._set_steps(absolute_lengths(wav_len, enc_states.shape[1]))
        tokens = self._begin.repeat_interleave(self.beam_size)
        return hypotheses, tokens, *rest

    def _set_steps(self, lengths):
        """Set the least and the most steps of each utterance.

        Upstream's are those of the longest, padding and all.
        """
        ratios = self.min_decode_ratio, self.max_decode_ratio
        steps = [
            self.change_max_decoding_length(*(int(n * r) for r in ratios))
            for n in lengths.tolist()
        ]
        self._fewest_steps, self.most_steps = map(list, zip(*steps))
        self.max_decode_steps = max(self.most_steps)

    def search_step(self, *args):
        """As `S2SBeamSearcher.search_step`; it ends some utterances' search."""
        stepped = super().search_step(*args)
        step, hypotheses, found = args[-1], stepped[0], stepped[3]
        for row, most in enumerate(self.most_steps):
            if step + 1 == most and len(found[row]) < self.beam_size:
                self._fill(row, hypotheses, found[row], stepped[-1])
        return stepped

    def _fill(self, row, hypotheses, found, scores):
        """Complete an utterance's list by hypotheses that have no end."""
        rows = slice(row * self.beam_size, (row + 1) * self.beam_size)
        tokens = hypotheses.alived_seq[rows]
        log_probs = hypotheses.alived_log_probs[rows]
        # Those that have ended are in the list, others do not exist.
        alive = hypotheses.sequence_scores[rows] > self.minus_inf / 2
        # Upstream takes the last token off, which is an end token elsewhere.
        end = torch.full_like(tokens[0, :1], self.eos_index)
        zero = torch.zeros_like(log_probs[0, :1])
        for i in alive.nonzero().flatten().tolist():
            if len(found) < self.beam_size:
                one = torch.cat([tokens[i], end])
                found.append(
                    (one, torch.cat([log_probs[i], zero]), scores[rows][i])
                )
        nothing = (end, zero, torch.full_like(scores[0], -math.inf))
        found += [nothing] * (self.beam_size - len(found))

    def _set_eos_minus_inf_step(self, log_probs, step, min_decode_steps):
        """As upstream's, for each utterance."""
        for row, fewest in enumerate(self._fewest_steps):
            if step < fewest:
                rows = slice(row * self.beam_size, (row + 1) * self.beam_size)
                log_probs[rows, self.eos_index] = self.minus_inf
        return log_probs

    def _compute_scores_and_next_inp_tokens(self, alived_hyps, log_probs, step):
        # Upstream's divides by the length, and multiplies by it afterwards.
        if self.length_penalty not in (0, 1):
            step = (step + 1) ** self.length_penalty - 1
        return super()._compute_scores_and_next_inp_tokens(
            alived_hyps, log_probs, step
        )

    def _update_hyps_and_scores_if_eos_token(
        self, inp_tokens, alived_hyps, found, scores
    ):
        """As upstream's, without hypotheses that do not exist.

        A beam wider than the choice there is gets filled with them, and so
        would the list of translations that have ended.
        """
        # Not `scores`: these are divided by lengths.
        real = alived_hyps.sequence_scores > self.minus_inf / 2
        ended = inp_tokens == self.eos_index
        inp_tokens = inp_tokens.where(real | ~ended, -1)
        super()._update_hyps_and_scores_if_eos_token(
            inp_tokens, alived_hyps, found, scores
        )
        return ended

    def permute_mem(self, memory, index):
        """As `S2SBaseSearcher.permute_mem`: continue these hypotheses."""
        return memory.select(index)

    def forward_step(self, inp_tokens, memory, enc_states, enc_lens):
        """As `S2SBaseSearcher.forward_step`: score the next tokens.

        `memory` is what `decoder_by_steps` made, None at the beginning.
        """
        if memory is None:
            memory = decoder_by_steps(self.model, enc_states, enc_lens)
        hidden, attention = memory.step(inp_tokens)
        scores = self.softmax(self.fc(hidden) / self.temperature)
        return scores, memory, attention

    def set_n_out(self):
        """As `S2SBaseSearcher.set_n_out`: the number of target tokens."""
        return self.fc.out_features

    def change_max_decoding_length(self, min_decode_steps, max_decode_steps):
        """As `S2SBaseSearcher.change_max_decoding_length`.

        Allows `least_steps`, within the decoder's positions.
        """
        steps = max(max_decode_steps, self.least_steps, 1)
        return min_decode_steps, min(steps, self.model.positions.max_len)


def beginning_tokens(bos_index, memory):
    """Return a beginning token for every row: of an int, or of a tensor [B]."""
    if not torch.is_tensor(bos_index):
        return torch.full((len(memory),), bos_index, device=memory.device)
    tokens = bos_index.to(memory.device)
    if tokens.is_floating_point() or tokens.shape not in ((), (len(memory),)):
        raise ValueError(
            f"bos_index: expected a token, or one for each of {len(memory)} "
            f"utterance(s), found {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    return tokens.long().expand(len(memory)).clone()


@torch.no_grad()
def greedy_translation(
    decoder, memory, lens, bos_index, eos_index, max_tokens=100
):
    """Take the best token at every step; a beam costs several times as much.

    Arguments
    ---------
    decoder, eos_index
        See `TranslationBeamSearch`.
    bos_index : int or torch.Tensor
        Beginning token, of all utterances or of each [B].
    memory, lens : torch.Tensor
        [B, S, d], from the textual encoder, and its relative lengths [B].
    max_tokens : int
        Longest translation.

    Returns
    -------
    list of list of int
        Tokens, without beginning and end.

    Example
    -------
    >>> from speechbrain_taskarith.translation import TranslationDecoder
    >>> decoder = TranslationDecoder(6, 8, 2, num_layers=1).eval()
    >>> found = greedy_translation(
    ...     decoder, torch.rand(2, 3, 8), torch.ones(2), 1, 2, max_tokens=4
    ... )
    >>> len(found), max(map(len, found)) <= 4
    (2, True)
    """
    lengths = absolute_lengths(lens, memory.shape[1])
    batch = len(memory)
    tokens = beginning_tokens(bos_index, memory)
    rows = torch.arange(batch, device=memory.device)
    translations = [[] for _ in range(batch)]
    steps = decoder_by_steps(decoder, memory, lengths)
    for _ in range(max_tokens):
        hidden, _ = steps.step(tokens)
        tokens = decoder.seq_lin(hidden).argmax(-1)
        active = tokens != eos_index
        if not active.all():
            # Finished translations cost no more time.
            rows, tokens = rows[active], tokens[active]
            if not len(rows):
                break
            steps.select(active)
        for row, token in zip(rows.tolist(), tokens.tolist()):
            translations[row].append(token)
    return translations
