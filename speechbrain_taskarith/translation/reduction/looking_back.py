"""Looking back: segments attend to the frames that shrinking dropped."""

import logging
import math

import torch
import torch.nn.functional as F

from speechbrain_taskarith.translation.reduction.shrink import Shrunk
from speechbrain_taskarith.translation.reduction.windowed_attention import (
    window_mask,
    windowed_attention,
)
from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask

logger = logging.getLogger(__name__)

# With fewer frames than this for every offset of the window one dense product
# is faster than sums over runs (measured on a CPU; both grow with the batch).
DENSE_BELOW = 100


class LookingBack(torch.nn.Module):
    """The shrunk sequence attends to the frames that it came from.

    `X1 = LN(X + MHA(q=X, k=v=H))`, `X2 = LN(X1 + W2 SiLU(W1 X1))` with the
    shrunk sequence X and the frames H (arXiv 2311.03810, section 4.1).

    With `window` a segment looks at its own frames and at those of so many
    neighbouring segments on either side only: linear in the frames, and the
    exact form where the window holds all segments. Short batches are computed
    by a masked dense product, which is faster there and gives the same.

    Called with X [B, S, d] or a `Shrunk`, H [B, T, d], whose padding is
    ignored, even NaN, and its relative lengths [B], it returns [B, S, d], 0
    behind the last segment. A window needs the segments: those of a `Shrunk`,
    or as a fourth argument. `ValueError`: batches or widths that differ, or a
    window without segments.

    Arguments
    ---------
    d_model, nhead : int
        Width d of both sequences, and number of heads, which divides it.
    d_ffn : int, optional
        Width inside the feed-forward part; four times `d_model` by default.
    dropout : float
        Of attention weights and of what is added.
    window : int, optional
        Neighbours on either side, from 0; None or infinity: all frames.

    Example
    -------
    >>> from speechbrain_taskarith.translation import CTCShrink
    >>> frames, logits = torch.rand(2, 9, 8), torch.rand(2, 9, 4)
    >>> lens = torch.tensor([1.0, 0.5])
    >>> shrunk = CTCShrink()(frames, logits, lens)
    >>> LookingBack(8, nhead=2)(shrunk.x, frames, lens).shape == shrunk.x.shape
    True
    >>> near = LookingBack(8, nhead=2, window=1)
    >>> near(shrunk, frames, lens).shape == shrunk.x.shape
    True
    """

    def __init__(self, d_model, nhead, d_ffn=None, dropout=0.1, window=None):
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"nhead {nhead} does not divide d_model {d_model}")
        if window is not None and not window >= 0:
            raise ValueError(
                f"window {window}: expected a number of neighbouring segments "
                "from 0, or None for all frames"
            )
        self.nhead = nhead
        self.window = None if window in (None, math.inf) else int(window)
        self.dropout = dropout
        d_ffn = d_ffn or 4 * d_model
        self.query, self.key, self.value, self.output = (
            torch.nn.Linear(d_model, d_model) for _ in range(4)
        )
        self.norm1 = torch.nn.LayerNorm(d_model)
        self.norm2 = torch.nn.LayerNorm(d_model)
        self.ffn = torch.nn.Sequential(
            torch.nn.Linear(d_model, d_ffn),
            torch.nn.SiLU(),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(d_ffn, d_model),
        )
        self.drop = torch.nn.Dropout(dropout)
        for layer in (self.query, self.key, self.value, self.output):
            torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        # None, or since `train()`, whether it was called.
        self._called = None
        #: Whether a model calls it, though not with every batch.
        self.has_caller = False

    def train(self, mode=True):
        """As `torch.nn.Module.train`; notice a training that passed it by."""
        if not mode and self._called is False and not self.has_caller:
            logger.warning(
                "A training passed without a call of LookingBack: it has "
                "learned nothing. In `modules` alone nothing calls it: give it "
                "to a ShrinkingTransformer or a SpeechTranslationModel"
            )
        self._called = False if mode else None
        return super().train(mode)

    def forward(self, shrunk, frames, frame_lens, segments=None):
        """Look back, see `LookingBack`."""
        self._called = True
        if isinstance(shrunk, Shrunk):
            segments = shrunk.segments if segments is None else segments
            shrunk = shrunk.x
        self._check(shrunk, frames, frame_lens, segments)
        lengths = absolute_lengths(frame_lens, frames.shape[1])
        outside = padding_mask(lengths, frames.shape[1])
        # Zero times NaN is NaN: masking the weights would not do.
        frames = frames.masked_fill(outside[..., None], 0.0)
        attended = self._attend(shrunk, frames, outside, segments)
        x = self.norm1(shrunk + self.drop(self.output(attended)))
        x = self.norm2(x + self.drop(self.ffn(x)))
        if segments is not None:
            x = x.masked_fill(~segments.mask[..., None], 0.0)
        return x

    def _check(self, shrunk, frames, lens, segments):
        if (
            shrunk.dim() != 3
            or frames.dim() != 3
            or shrunk.shape[::2] != frames.shape[::2]
            or len(lens) != len(frames)
        ):
            raise ValueError(
                "expected the shrunk sequence [batch, segments, d], frames "
                "[batch, frames, d] and as many lengths, found "
                f"{tuple(shrunk.shape)}, {tuple(frames.shape)} and "
                f"{tuple(lens.shape)}"
            )
        if frames.shape[2] != self.query.in_features:
            raise ValueError(
                f"LookingBack has d_model {self.query.in_features}, the frames "
                f"are {frames.shape[2]} wide: give it the encoder's d_model"
            )
        if segments is None and self.window is not None:
            raise ValueError(
                f"window={self.window} has to know which frames a segment "
                "came from: give what CTCShrink returned, or its segments"
            )
        if segments is not None and segments.ids.shape != frames.shape[:2]:
            raise ValueError(
                f"segments of {tuple(segments.ids.shape)} [batch, frames], "
                f"frames of {tuple(frames.shape[:2])}"
            )

    def _attend(self, shrunk, frames, outside, segments):
        projected = self.query(shrunk), self.key(frames), self.value(frames)
        q, k, v = (
            x.unflatten(-1, (self.nhead, -1)).transpose(1, 2) for x in projected
        )
        dropout = self.dropout if self.training else 0.0
        window, size = self.window, frames.shape[1]
        sees_all = window is None or window >= shrunk.shape[1] - 1
        if sees_all or size < DENSE_BELOW * (2 * window + 1):
            near = (
                ~outside[:, None] if sees_all else window_mask(segments, window)
            )
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=near[:, None], dropout_p=dropout
            )
        else:
            out = windowed_attention(q, k, v, segments, window, dropout)
        return out.transpose(1, 2).flatten(2)
