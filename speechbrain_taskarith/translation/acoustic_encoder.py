"""Acoustic encoders behind one interface."""

import torch

from speechbrain_taskarith.utils.lengths import ignore_padding, without_padding


class AcousticEncoder(torch.nn.Module):
    """Any SpeechBrain encoder of features or of waveforms.

    Called with features [B, T', F] or waveforms [B, T'] and their relative
    lengths [B], it returns [B, T, d].

    Arguments
    ---------
    encoder : torch.nn.Module
        `encoder(x, lens) -> [B, T, D]`: SpeechBrain's `EncoderWrapper` around
        a Conformer, or `HuBERT` and `Wav2Vec2` of
        `speechbrain.integrations.huggingface`, whose `source` may be a local
        folder.
    d_model : int
        Width d of the output.
    d_encoder : int, optional
        Width D; where it differs from `d_model` a linear layer is added. If
        the output then has another width, `forward` raises `ValueError`.
    frontend : torch.nn.Module, optional
        `frontend(x) -> x` before the encoder, e.g. strided convolutions.

    Example
    -------
    >>> class Tiny(torch.nn.Module):
    ...     def forward(self, x, lens):
    ...         return x.repeat(1, 1, 2)
    >>> AcousticEncoder(Tiny(), 8, d_encoder=6)(
    ...     torch.rand(2, 5, 3), torch.ones(2)
    ... ).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, encoder, d_model, d_encoder=None, frontend=None):
        super().__init__()
        self.frontend = frontend
        self.encoder = ignore_padding(encoder)
        self.projection = None
        if d_encoder not in (None, d_model):
            self.projection = torch.nn.Linear(d_encoder, d_model)
        self.d_model = d_model

    def forward(self, x, lens):
        """Encode a batch, see `AcousticEncoder`."""
        x = without_padding(x, lens)
        if self.frontend is not None:
            x = without_padding(self.frontend(x), lens)
        x = self.encoder(x, lens)
        if isinstance(x, tuple):
            x = x[0]
        if self.projection is not None and x.dim() == 3:
            # NaN in the padding would reach the projection's gradient.
            x = self.projection(without_padding(x, lens))
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"the encoder returned {tuple(x.shape)}, expected [batch, "
                f"frames, {self.d_model}]; give its width as d_encoder"
            )
        return x
