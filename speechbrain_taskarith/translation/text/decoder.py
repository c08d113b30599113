"""The decoder: SpeechBrain's, with embedding, positions and output layer."""

import torch
from speechbrain.lobes.models.transformer.Transformer import (
    NormalizedEmbedding,
    PositionalEncoding,
    TransformerDecoder,
)

from speechbrain_taskarith.translation.text.encoder import (
    check_positions,
    draw_matrices,
)
from speechbrain_taskarith.translation.text.tying import tie
from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask


class OutputLayer(torch.nn.Linear):
    """A linear layer that SpeechBrain's searchers can measure: they ask `.w`."""

    @property
    def w(self):
        """The layer itself, where SpeechBrain's `Linear` has its matrix."""
        return self


class TranslationDecoder(torch.nn.Module):
    """Writes a translation, token after token.

    Called with tokens [B, U], translations behind their beginning token,
    memory [B, S, d], from the textual encoder, and its relative lengths [B],
    it returns logits [B, U, V]. Padding of tokens does not matter: no token
    sees what comes after it.

    The tokens carry sinusoidal positions (those of SpeechBrain's
    `TransformerST.forward_asr` do not).

    Arguments
    ---------
    vocab_size : int
        Target tokens, beginning and end among them.
    d_model, nhead, num_layers, d_ffn, dropout, max_length
        See `TextEncoder`.
    tie_embedding : bool
        True: the output layer's matrix is the tokens' embedding.

    Example
    -------
    >>> decoder = TranslationDecoder(10, 8, nhead=2, num_layers=1)
    >>> tokens, memory = torch.ones(2, 4).long(), torch.rand(2, 6, 8)
    >>> decoder(tokens, memory, torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 4, 10])
    """

    def __init__(
        self,
        vocab_size,
        d_model,
        nhead,
        num_layers=6,
        d_ffn=None,
        dropout=0.1,
        max_length=2500,
        tie_embedding=False,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = NormalizedEmbedding(d_model, vocab_size)
        self.positions = PositionalEncoding(d_model, max_length)
        self.layers = TransformerDecoder(
            num_layers=num_layers,
            nhead=nhead,
            d_ffn=d_ffn or 4 * d_model,
            d_model=d_model,
            dropout=dropout,
            normalize_before=True,
            causal=True,
        )
        self.seq_lin = OutputLayer(d_model, vocab_size)
        self.drop = torch.nn.Dropout(dropout)
        draw_matrices(self)
        if tie_embedding:
            embedding = "embedding.emb.Embedding.weight"
            # Scaled by the root of the width where it embeds.
            torch.nn.init.normal_(
                self.get_parameter(embedding), 0, d_model**-0.5
            )
            tie(self, embedding, "seq_lin.weight")

    def forward(self, tokens, memory, memory_lens):
        """Return the logits of every next token, see `TranslationDecoder`."""
        lengths = absolute_lengths(memory_lens, memory.shape[1])
        return self.seq_lin(self.decode(tokens, memory, lengths)[0])

    def decode(self, tokens, memory, lengths):
        """Decode prefixes, as `forward`, with absolute `lengths` of `memory`.

        Returns [B, U, d], before the output layer, and [B, U, S], attention
        of the last layer, mean over heads. SpeechBrain's searchers call it.
        """
        size = tokens.shape[1]
        check_positions(self.positions, size)
        x = self.embedding(tokens)
        x = self.drop(x + self.positions(x))
        future = torch.ones(size, size, dtype=torch.bool, device=x.device)
        x, _, attention = self.layers(
            x,
            memory,
            tgt_mask=future.triu(1),
            memory_key_padding_mask=padding_mask(lengths, memory.shape[1]),
        )
        return x, attention[-1]
