"""Searching for the best translation."""

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
        What scores tokens.
    bos_index : int
        Beginning token.
    eos_index : int
        End token.
    beam_size : int
        Hypotheses kept.
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
        """Go on with other hypotheses; SpeechBrain calls this.

        Arguments
        ---------
        memory : IncrementalDecoder or PrefixDecoder
            From `forward_step`.
        index : torch.Tensor
            [hypotheses], where each comes from.

        Returns
        -------
        IncrementalDecoder or PrefixDecoder
            The same.
        """
        return memory.keep(index)

    def forward_step(self, inp_tokens, memory, enc_states, enc_lens):
        """Score the next token of all hypotheses; SpeechBrain calls this.

        Arguments
        ---------
        inp_tokens : torch.Tensor
            [hypotheses], the newest token of each.
        memory : IncrementalDecoder or PrefixDecoder or None
            What earlier steps left; None at the beginning.
        enc_states : torch.Tensor
            [hypotheses, S, d].
        enc_lens : torch.Tensor
            [hypotheses], absolute lengths.

        Returns
        -------
        torch.Tensor
            [hypotheses, V], log-probabilities.
        IncrementalDecoder or PrefixDecoder
            For the next step.
        torch.Tensor
            [hypotheses, S], attention.
        """
        if memory is None:
            memory = decoder_by_steps(self.model, enc_states, enc_lens)
        hidden, attention = memory.step(inp_tokens)
        scores = self.softmax(self.fc(hidden) / self.temperature)
        return scores, memory, attention

    def set_n_out(self):
        """Return the number of target tokens; SpeechBrain calls this.

        Returns
        -------
        int
            Scores at every step.
        """
        return self.fc.out_features

    def change_max_decoding_length(self, min_decode_steps, max_decode_steps):
        """Allow `least_steps`; SpeechBrain calls this.

        Arguments
        ---------
        min_decode_steps : int
            Steps by the ratio.
        max_decode_steps : int
            Steps by the ratio.

        Returns
        -------
        tuple of int
            What holds, within the decoder's positions.
        """
        most = self.model.positions.max_len
        steps = max(max_decode_steps, self.least_steps)
        return min_decode_steps, min(steps, most)


@torch.no_grad()
def greedy_translation(
    decoder, memory, lens, bos_index, eos_index, max_tokens=100
):
    """Take the best token at every step, for all utterances at once.

    For development sets during training: a beam costs several times as much.

    Arguments
    ---------
    decoder : TranslationDecoder
        In evaluation mode.
    memory : torch.Tensor
        [B, S, d], from the textual encoder.
    lens : torch.Tensor
        [B], relative lengths.
    bos_index : int
        Beginning token.
    eos_index : int
        End token.
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
    going = torch.arange(batch, device=memory.device)
    found = [[] for _ in range(batch)]
    steps = decoder_by_steps(decoder, memory, lengths)
    for _ in range(max_tokens):
        hidden, _ = steps.step(tokens)
        tokens = decoder.seq_lin(hidden).argmax(-1)
        on = tokens != eos_index
        if not on.all():
            # Who has ended takes no more time.
            going, tokens = going[on], tokens[on]
            if not len(going):
                break
            steps.keep(on)
        for row, token in zip(going.tolist(), tokens.tolist()):
            found[row].append(token)
    return found
