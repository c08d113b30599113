"""The textual encoder: what speech and text share."""

import torch
from speechbrain.lobes.models.transformer.Transformer import (
    PositionalEncoding,
    TransformerEncoderLayer,
)

from speechbrain_taskarith.translation.text.local_to_global import LocalToGlobal
from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask


class TextEncoder(torch.nn.Module):
    """Positions, then Transformer layers with a convolution before each.

    Speech (after shrinking and looking back) and text (after its embedding)
    go through the same layers, the local-to-global convolutions among them:
    x [B, S, d] without positions, whose padding is ignored, even NaN, and
    relative lengths [B] to [B, S, d], 0 in the padding.

    Arguments
    ---------
    d_model, nhead, num_layers : int
        Width, attention heads and layers.
    d_ffn : int, optional
        Width inside a layer; four times `d_model` by default.
    dropout : float
        In layers and convolutions.
    local : bool
        False: no convolutions.
    kernel, stride : int
        As of `LocalToGlobal`.
    max_length : int
        Longest sequence; `ValueError` beyond it.

    Example
    -------
    >>> encoder = TextEncoder(8, nhead=2, num_layers=2)
    >>> encoder(torch.rand(2, 5, 8), torch.tensor([1.0, 0.6])).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        d_model,
        nhead,
        num_layers=6,
        d_ffn=None,
        dropout=0.1,
        local=True,
        kernel=5,
        stride=3,
        max_length=2500,
    ):
        super().__init__()
        self.positions = PositionalEncoding(d_model, max_length)
        self.local = None
        if local:
            self.local = LocalToGlobal(
                d_model, num_layers, kernel, stride, dropout
            )
        self.layers = torch.nn.ModuleList(
            TransformerEncoderLayer(
                d_ffn=d_ffn or 4 * d_model,
                nhead=nhead,
                d_model=d_model,
                dropout=dropout,
                normalize_before=True,
            )
            for _ in range(num_layers)
        )
        self.norm = torch.nn.LayerNorm(d_model)
        self.drop = torch.nn.Dropout(dropout)
        draw_matrices(self.layers)

    def forward(self, x, lens):
        """Encode a batch of speech or text, see `TextEncoder`."""
        size = x.shape[1]
        check_positions(self.positions, size)
        outside = padding_mask(absolute_lengths(lens, size), size)
        x = x.masked_fill(outside[..., None], 0.0)
        x = self.drop(x + self.positions(x))
        for i, layer in enumerate(self.layers):
            if self.local is not None:
                x = self.local.layers[i](x, lens)
            x, _ = layer(x, src_key_padding_mask=outside)
        return self.norm(x).masked_fill(outside[..., None], 0.0)


def check_positions(positions, steps):
    """Refuse a sequence of more steps than SpeechBrain's positions have."""
    if steps > positions.max_len:
        raise ValueError(
            f"a sequence of {steps} steps, but positions up to "
            f"{positions.max_len}: raise max_length, or shrink it first"
        )


def draw_matrices(module):
    """Draw matrices as SpeechBrain's Transformers do."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_normal_(parameter)
