"""Decoding a token at a time, with the keys and values of earlier tokens."""

import torch
from speechbrain.lobes.models.transformer.Transformer import (
    TransformerDecoderLayer,
)
from speechbrain.nnet.attention import MultiheadAttention
from torch.nn.functional import linear

from speechbrain_taskarith.translation.text.encoder import check_positions
from speechbrain_taskarith.utils.lengths import padding_mask


def decoder_by_steps(decoder, memory, lengths):
    """Return what decodes `memory` [B, S, d] a token at a time.

    A `PrefixDecoder` where layers are not as SpeechBrain has them (wrapped,
    with adapters or hooks), so that nothing of them is left out. `lengths` [B]
    are absolute; a decoder in training mode is refused.
    """
    training = [name for name, m in decoder.named_modules() if m.training]
    if training:
        raise RuntimeError(
            f"the decoder{'.' * bool(training[0])}{training[0]} is in training "
            "mode, and dropout would make the search random: call "
            "model.eval() before it, and model.train() after"
        )
    plain = all(_is_plain(layer) for layer in decoder.layers.layers)
    decoder_class = IncrementalDecoder if plain else PrefixDecoder
    return decoder_class(decoder, memory, lengths)


def _is_plain(layer):
    """Tell whether a layer computes what `IncrementalDecoder` does."""
    if type(layer) is not TransformerDecoderLayer or not layer.normalize_before:
        return False
    attentions = (layer.self_attn, layer.multihead_attn)
    if any(type(module) is not MultiheadAttention for module in attentions):
        return False
    # Of these modules the weights are used; `forward` is not called.
    inner = [module.att for module in attentions]
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        for module in (layer, *attentions, *inner)
    ) and all(
        type(att) is torch.nn.MultiheadAttention
        and att.in_proj_weight is not None
        and att.in_proj_bias is not None
        for att in inner
    )


class PrefixDecoder:
    """Decodes whole prefixes with every token, whatever the layers are."""

    def __init__(self, decoder, memory, lengths):
        self.decoder, self.memory, self.lengths = decoder, memory, lengths
        self.tokens = lengths.new_zeros(len(memory), 0)

    @torch.no_grad()
    def step(self, tokens):
        """As `IncrementalDecoder.step`."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        hidden, attention = self.decoder.decode(
            self.tokens, self.memory, self.lengths
        )
        return hidden[:, -1], attention[:, -1]

    def select(self, rows):
        """As `IncrementalDecoder.select`."""
        self.memory, self.lengths = self.memory[rows], self.lengths[rows]
        self.tokens = self.tokens[rows]
        return self


class IncrementalDecoder:
    """Gives what `TranslationDecoder.decode` gives for the last token alone.

    Keys and values of earlier tokens and of the encoder's output are computed
    once. A translation of U tokens of S frames costs U (U + S) products of
    attention; decoding every prefix anew, U^2 (U + S).
    """

    def __init__(self, decoder, memory, lengths):
        self.decoder = decoder
        self.padding = padding_mask(lengths, memory.shape[1])
        self.layers = [
            (
                layer,
                _CachedAttention(layer.self_attn),
                _CachedAttention(layer.multihead_attn),
            )
            for layer in decoder.layers.layers
        ]
        for _, _, cross_attention in self.layers:
            cross_attention.append(memory)
        self.tokens = 0

    @torch.no_grad()
    def step(self, tokens):
        """Decode one more token of each translation: tokens [B].

        Returns [B, d], before the output layer, and [B, S], attention of the
        last layer, mean over heads.
        """
        decoder = self.decoder
        self.tokens += 1
        check_positions(decoder.positions, self.tokens)
        x = decoder.embedding(tokens[:, None])
        x = x + decoder.positions.pe[:, self.tokens - 1 : self.tokens]
        for layer, self_attention, cross_attention in self.layers:
            query = layer.norm1(x)
            self_attention.append(query)
            x = x + self_attention(query)[0]
            out, weights = cross_attention(layer.norm2(x), self.padding)
            x = x + out
            x = x + layer.pos_ffn(layer.norm3(x))
        return decoder.layers.norm(x)[:, 0], weights.mean(1)[:, 0]

    def select(self, rows):
        """Go on with these translations alone: indices [N], or bool [B].

        An index may come more than once.
        """
        self.padding = self.padding[rows]
        for _, *attentions in self.layers:
            for attention in attentions:
                attention.select(rows)
        return self


class _CachedAttention:
    """Multi-head attention with a cache of keys and values."""

    def __init__(self, module):
        self.att = module.att
        self.keys = self.values = None

    def append(self, x):
        """Add vectors to attend to: [B, T, d]."""
        width = self.att.embed_dim
        weight, bias = self.att.in_proj_weight, self.att.in_proj_bias
        projected = linear(x, weight[width:], bias[width:])
        keys, values = map(self._heads, projected.chunk(2, -1))
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values

    def _heads(self, x):
        """[B, T, d] to [B, heads, T, d / heads]."""
        return x.unflatten(-1, (self.att.num_heads, -1)).transpose(1, 2)

    def __call__(self, x, padding=None):
        """Attend from x [B, 1, d], padding [B, T]; return sum and weights."""
        width = self.att.embed_dim
        weight, bias = self.att.in_proj_weight, self.att.in_proj_bias
        query = self._heads(linear(x, weight[:width], bias[:width]))
        scale = query.shape[-1] ** -0.5
        scores = (query * scale) @ self.keys.transpose(2, 3)
        if padding is not None:
            scores.masked_fill_(padding[:, None, None], float("-inf"))
        weights = scores.softmax(-1)
        out = (weights @ self.values).transpose(1, 2).flatten(2)
        return self.att.out_proj(out), weights

    def select(self, rows):
        """Go on with these rows alone."""
        self.keys, self.values = self.keys[rows], self.values[rows]
