"""A step of SpeechBrain's streaming Conformer, with states of fixed shape.

SpeechBrain's own states grow during the first chunks, and its last chunk is
short. Here what does not exist yet, or no longer, is masked.
"""

import torch


class ConformerStep(torch.nn.Module):
    """A chunk through a `ChunkedEncoder`; see `EncoderGraph`."""

    def __init__(self, encoder):
        super().__init__()
        self.transformer = encoder.transformer
        kind = self.transformer.attention_type
        if kind != "RelPosMHAXL":
            raise ValueError(
                f"encoder ChunkedEncoder with attention_type {kind!r} cannot "
                "be exported; expected 'RelPosMHAXL'"
            )
        if encoder.config.is_infinite_left_context():
            raise ValueError(
                "encoder ChunkedEncoder with left_context=None cannot be "
                "exported: its state has no fixed size; give it a number of "
                "chunks"
            )
        self.past = encoder.config.left_context_size_frames()
        layers = self.transformer.encoder.layers
        self.margin = layers[0].convolution_module.padding

    def shapes(self):
        """Return the shapes of the states."""
        layers = self.transformer.encoder.layers
        width = layers[0].mha_layer.embed_dim
        return {
            "left": (len(layers), 1, self.past, width),
            "convolved": (len(layers), 1, self.margin, width),
        }

    def forward(self, x, own, seen, kept):
        """Encode a chunk, of which `own` [1, C] exists."""
        x = self.transformer.custom_src_module(x)
        positions = self.transformer.positional_encoding(
            x.new_zeros(1, self.past + x.shape[1], x.shape[2])
        )
        masks = [
            ~torch.cat((newest(size, seen), own), 1)
            for size in (self.past, self.margin)
        ]
        new = {name: [] for name in kept}
        for number, layer in enumerate(self.transformer.encoder.layers):
            states = {name: value[number] for name, value in kept.items()}
            x, states = _layer_step(layer, x, states, positions, *masks)
            for name in new:
                new[name].append(states[name])
        x = self.transformer.encoder.norm(x)
        return x, {name: torch.stack(values) for name, values in new.items()}


def _layer_step(layer, x, states, positions, key_mask, conv_mask):
    """As `ConformerEncoderLayer.forward_streaming`; masks True at nothing."""
    chunk, new = x.shape[1], {}

    def after(name, x):
        if name in states:
            x = torch.cat((states[name], x), 1)
            new[name] = x[:, chunk:]
        return x

    x = after("left", x + 0.5 * layer.ffn_module1(x))
    normed = layer.norm1(x)
    attended, _ = layer.mha_layer(
        normed, normed, normed, positions, key_padding_mask=key_mask
    )
    x = after("convolved", (x + attended)[:, -chunk:])
    # The mask holds for what the convolution reads: see `ignore_padding`.
    x = x + layer.convolution_module(x, conv_mask[..., None])
    x = x[:, -chunk:]
    return layer.norm2(x + 0.5 * layer.ffn_module2(x)), new


def newest(size, count):
    """Return [1, size], True at the last `count` places."""
    return (torch.arange(size) >= size - count)[None]
