"""Segments as the text that the CTC head reads in them."""

import torch
import torch.nn.functional as F

# Of a segment's vector at the start: the textual encoder knows text.
GATE = 0.1


class LabelEmbedding(torch.nn.Module):
    """`sum over v of p(v) E(v) + g x`, or E of the best label alone.

    p is the posterior of the CTC head on a segment, E the embedding of
    transcripts, x the segment's vector, g a gate for each channel: the adaptor of
    Xu et al. 2021 (arXiv 2105.05752), with a gate.

    Called with x [B, S, d], scores [B, S, V] of the CTC head on the segments (None
    for the best label alone, which the segments hold), the matrix of E [V, d] and
    the `Segments`, it returns [B, S, d], 0 behind the last one.
    """

    def __init__(self, d_model, labels):
        super().__init__()
        if labels not in ("added", "alone"):
            raise ValueError(
                f"labels {labels!r}: expected 'added', 'alone' or None"
            )
        self.gate = None
        if labels == "added":
            self.gate = torch.nn.Parameter(torch.full((d_model,), GATE))

    def forward(self, x, scores, matrix, segments):
        """Embed the labels, see `LabelEmbedding`."""
        if self.gate is None:
            # Not those of pooled scores, which may have another best label.
            out = F.embedding(segments.labels.clamp(min=0), matrix)
        else:
            out = scores.softmax(-1).to(matrix.dtype) @ matrix + self.gate * x
        return out.masked_fill(~segments.mask[..., None], 0.0)
