"""Beam and greedy search of translations."""

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
    least; SpeechBrain's stops at the ratio.

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
        **settings,
    ):
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
        steps = max(max_decode_steps, self.least_steps)
        return min_decode_steps, min(steps, self.model.positions.max_len)


@torch.no_grad()
def greedy_translation(
    decoder, memory, lens, bos_index, eos_index, max_tokens=100
):
    """Take the best token at every step; a beam costs several times as much.

    Arguments
    ---------
    decoder, bos_index, eos_index
        See `TranslationBeamSearch`.
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
    tokens = torch.full((batch,), bos_index, device=memory.device)
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
