"""Decoding a token at a time: what earlier tokens gave is kept."""

import torch
from speechbrain.lobes.models.transformer.Transformer import (
    TransformerDecoderLayer,
)
from speechbrain.nnet.attention import MultiheadAttention
from torch.nn.functional import linear

from speechbrain_taskarith.translation.text.encoder import check_positions
from speechbrain_taskarith.utils.lengths import padding_mask


def decoder_by_steps(decoder, memory, lengths):
    """Make what decodes a token at a time.

    Arguments
    ---------
    decoder : TranslationDecoder
        In evaluation mode.
    memory : torch.Tensor
        [B, S, d], from the textual encoder.
    lengths : torch.Tensor
        [B], absolute lengths of `memory`.

    Returns
    -------
    IncrementalDecoder or PrefixDecoder
        The second where layers are not as SpeechBrain has them (wrapped, with
        adapters or hooks): it decodes whole prefixes, so nothing is left out.
    """
    plain = all(_is_plain(layer) for layer in decoder.layers.layers)
    which = IncrementalDecoder if plain else PrefixDecoder
    return which(decoder, memory, lengths)


def _is_plain(layer):
    """Tell whether a layer computes what `IncrementalDecoder` does."""
    if type(layer) is not TransformerDecoderLayer or not layer.normalize_before:
        return False
    attentions = (layer.self_attn, layer.multihead_attn)
    if any(type(one) is not MultiheadAttention for one in attentions):
        return False
    # Of these modules the weights are used; `forward` is not called.
    replaced = [layer, *attentions, *(one.att for one in attentions)]
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        for module in replaced
    ) and all(
        type(one.att) is torch.nn.MultiheadAttention
        and one.att.in_proj_weight is not None
        and one.att.in_proj_bias is not None
        for one in attentions
    )


class PrefixDecoder:
    """Decodes whole prefixes with every token, whatever the layers are.

    Arguments
    ---------
    decoder, memory, lengths : object
        As of `IncrementalDecoder`.
    """

    def __init__(self, decoder, memory, lengths):
        self.decoder, self.memory, self.lengths = decoder, memory, lengths
        self.tokens = lengths.new_zeros(len(memory), 0)

    @torch.no_grad()
    def step(self, tokens):
        """Decode one more token; see `IncrementalDecoder.step`.

        Arguments
        ---------
        tokens : torch.Tensor
            [B].

        Returns
        -------
        torch.Tensor
            [B, d].
        torch.Tensor
            [B, S].
        """
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        found = self.decoder.decode(self.tokens, self.memory, self.lengths)
        hidden, attention = found
        return hidden[:, -1], attention[:, -1]

    def keep(self, rows):
        """Go on with some rows; see `IncrementalDecoder.keep`.

        Arguments
        ---------
        rows : torch.Tensor
            [N] indices, or [B] bool.

        Returns
        -------
        PrefixDecoder
            Itself.
        """
        self.memory, self.lengths = self.memory[rows], self.lengths[rows]
        self.tokens = self.tokens[rows]
        return self


class IncrementalDecoder:
    """Gives what `TranslationDecoder.decode` gives for the last token alone.

    Keys and values of earlier tokens and of the encoder's output are computed
    once. A translation of U tokens of S frames costs U (U + S) products of
    attention; decoding every prefix anew, U^2 (U + S).

    Arguments
    ---------
    decoder : TranslationDecoder
        In evaluation mode: nothing is dropped here.
    memory : torch.Tensor
        [B, S, d], from the textual encoder.
    lengths : torch.Tensor
        [B], absolute lengths of `memory`.

    Example
    -------
    >>> from speechbrain_taskarith.translation import TranslationDecoder
    >>> decoder = TranslationDecoder(6, 8, 2, num_layers=1).eval()
    >>> memory, lengths = torch.rand(2, 3, 8), torch.tensor([3, 2])
    >>> tokens = torch.tensor([[1, 4], [1, 5]])
    >>> incremental = IncrementalDecoder(decoder, memory, lengths)
    >>> for token in tokens.T:
    ...     hidden, _ = incremental.step(token)
    >>> whole, _ = decoder.decode(tokens, memory, lengths)
    >>> torch.allclose(hidden, whole[:, -1], atol=1e-6)
    True
    """

    def __init__(self, decoder, memory, lengths):
        self.decoder = decoder
        self.padding = padding_mask(lengths, memory.shape[1])
        self.layers = [
            (
                layer,
                _Attention(layer.self_attn),
                _Attention(layer.multihead_attn),
            )
            for layer in decoder.layers.layers
        ]
        for _, _, crossing in self.layers:
            crossing.append(memory)
        self.tokens = 0

    @torch.no_grad()
    def step(self, tokens):
        """Decode one more token of each translation.

        Arguments
        ---------
        tokens : torch.Tensor
            [B], the newest tokens, the beginning token first of all.

        Returns
        -------
        torch.Tensor
            [B, d], before the output layer.
        torch.Tensor
            [B, S], attention of the last layer, mean over heads.

        Raises
        ------
        ValueError
            Where the translation is longer than the decoder's positions.
        """
        decoder = self.decoder
        self.tokens += 1
        check_positions(decoder.positions, tokens.expand(self.tokens, -1).T)
        x = decoder.embedding(tokens[:, None])
        x = x + decoder.positions.pe[:, self.tokens - 1 : self.tokens]
        attention = None
        for layer, own, crossing in self.layers:
            query = layer.norm1(x)
            own.append(query)
            x = x + own(query)[0]
            found, attention = crossing(layer.norm2(x), self.padding)
            x = x + found
            x = x + layer.pos_ffn(layer.norm3(x))
        return decoder.layers.norm(x)[:, 0], attention.mean(1)[:, 0]

    def keep(self, rows):
        """Go on with these translations alone, in this order.

        Arguments
        ---------
        rows : torch.Tensor
            [N] indices, of which one may come more than once, or [B] bool.

        Returns
        -------
        IncrementalDecoder
            Itself.
        """
        self.padding = self.padding[rows]
        for _, *attentions in self.layers:
            for attention in attentions:
                attention.keep(rows)
        return self


class _Attention:
    """Multi-head attention whose keys and values are kept.

    Arguments
    ---------
    module : speechbrain.nnet.attention.MultiheadAttention
        Its weights.
    """

    def __init__(self, module):
        self.att = module.att
        self.keys = self.values = None

    def append(self, x):
        """Take more to attend to: [B, T, d]."""
        width = self.att.embed_dim
        weight, bias = self.att.in_proj_weight, self.att.in_proj_bias
        found = linear(x, weight[width:], bias[width:]).chunk(2, -1)
        keys, values = (self._heads(one) for one in found)
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values

    def _heads(self, x):
        """[B, T, d] to [B, heads, T, d / heads]."""
        return x.unflatten(-1, (self.att.num_heads, -1)).transpose(1, 2)

    def __call__(self, x, padding=None):
        """Attend: [B, 1, d], what not to see [B, T]; result and weights."""
        width = self.att.embed_dim
        weight, bias = self.att.in_proj_weight, self.att.in_proj_bias
        query = self._heads(linear(x, weight[:width], bias[:width]))
        scale = query.shape[-1] ** -0.5
        scores = (query * scale) @ self.keys.transpose(2, 3)
        if padding is not None:
            scores.masked_fill_(padding[:, None, None], float("-inf"))
        weights = scores.softmax(-1)
        found = (weights @ self.values).transpose(1, 2).flatten(2)
        return self.att.out_proj(found), weights

    def keep(self, rows):
        """Go on with these rows alone."""
        self.keys, self.values = self.keys[rows], self.values[rows]
