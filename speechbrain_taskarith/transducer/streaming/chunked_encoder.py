"""SpeechBrain's dynamic-chunk Conformer with the methods of `Emformer`."""

import torch

from speechbrain_taskarith.utils.lengths import ignore_padding, without_padding

_ALL = 10**9
# With others SpeechBrain's stream fails, or is not what the whole gives.
_ATTENTION = ("RelPosMHAXL", "RoPEMHA")


class _Cast:
    """Turn what a module returns into the type of the weights."""

    dtype = torch.float32

    def __call__(self, module, inputs, out):
        return out.to(self.dtype)


class ChunkedEncoder(torch.nn.Module):
    """A SpeechBrain Transformer encoder that streams by chunks.

    An utterance is encoded in a batch as it is alone, and as in a stream:
    padding is ignored, even NaN.

    Arguments
    ---------
    transformer : torch.nn.Module
        `TransformerASR` with a Conformer encoder (SpeechBrain's Branchformer
        has no chunks) and `attention_type` RelPosMHAXL or RoPEMHA, or an
        `EncoderWrapper` around one.
    chunk_size : int
        Frames of a chunk.
    left_context : int or None
        Past chunks that are attended to; None: all, so that a stream takes
        more and more memory.

    Raises
    ------
    ValueError
        Another encoder, a causal one, other attention, a chunk of no frame.

    Example
    -------
    >>> from speechbrain.lobes.models.transformer.TransformerASR import (
    ...     TransformerASR,
    ... )
    >>> transformer = TransformerASR(
    ...     tgt_vocab=5, input_size=8, d_model=8, nhead=2, d_ffn=16,
    ...     num_encoder_layers=1, num_decoder_layers=0,
    ...     attention_type="RelPosMHAXL",
    ...     positional_encoding=None,
    ...     encoder_module="conformer",
    ...     normalize_before=True,
    ...     causal=False,
    ... )
    >>> encoder = ChunkedEncoder(transformer, chunk_size=4, left_context=2)
    >>> encoder(torch.rand(2, 12, 8), torch.ones(2)).shape
    torch.Size([2, 12, 8])
    """

    right_context = 0

    def __init__(self, transformer, chunk_size, left_context=None):
        super().__init__()
        from speechbrain.nnet.attention import RelPosMHAXL
        from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

        if chunk_size < 1:
            raise ValueError(f"chunk_size {chunk_size}: expected 1 or more")
        # An EncoderWrapper only forwards to what it wraps.
        transformer = getattr(transformer, "transformer", transformer)
        encoder = getattr(transformer, "encoder", None)
        chunks = hasattr(encoder, "make_streaming_context")
        if not chunks or getattr(transformer, "causal", False):
            raise ValueError(
                f"{type(transformer).__name__} with the encoder "
                f"{type(encoder).__name__} cannot work in chunks; expected "
                "encoder_module: conformer, causal: False"
            )
        attention = getattr(transformer, "attention_type", None)
        if attention not in _ATTENTION:
            raise ValueError(
                f"attention_type {attention!r} cannot work in chunks: its "
                f"streams differ from the whole; expected "
                f"{' or '.join(_ATTENTION)}"
            )
        self.transformer = ignore_padding(transformer)
        # SpeechBrain's probabilities are float32, whatever they multiply.
        self._cast = _Cast()
        for module in transformer.modules():
            if isinstance(module, RelPosMHAXL):
                module.dropout_att.register_forward_hook(self._cast)
        self._note_dtype()
        self.segment_length = chunk_size
        self.config = DynChunkTrainConfig(chunk_size, left_context)
        # SpeechBrain's streams need a number.
        past = _ALL if left_context is None else left_context
        self.streaming_config = DynChunkTrainConfig(chunk_size, past)

    def _apply(self, fn, recurse=True):
        """As `torch.nn.Module`; positions take the type of the weights."""
        kept = {module: module.inv_freq for module in self._positions()}
        super()._apply(fn, recurse)
        for module, frequencies in kept.items():
            if not frequencies.is_meta:
                # Not rounded: of the thousandth frame little would be left.
                module.inv_freq = frequencies.to(module.inv_freq.device)
        self._note_dtype()
        return self

    def _positions(self):
        from speechbrain.nnet.attention import RelPosEncXL

        return [m for m in self.modules() if isinstance(m, RelPosEncXL)]

    def _note_dtype(self):
        self._cast.dtype = next(self.parameters()).dtype
        for module in self._positions():
            module.emb_dtype = self._cast.dtype

    def forward(self, x, lens=None):
        """Encode whole utterances as if in chunks; see `Emformer.forward`."""
        out = self.transformer.encode(
            without_padding(x, lens), lens, dynchunktrain_config=self.config
        )
        return without_padding(out, lens)

    def make_streaming_context(self, batch=1):
        """See `Emformer.make_streaming_context`; `batch` has no effect."""
        return self.transformer.make_streaming_context(self.streaming_config)

    def forward_streaming(self, chunk, context, lens=None):
        """Encode one chunk; see `Emformer.forward_streaming`."""
        return self.transformer.encode_streaming(chunk, context)
