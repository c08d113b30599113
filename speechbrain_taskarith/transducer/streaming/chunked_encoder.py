"""SpeechBrain's dynamic-chunk Conformer with the methods of `Emformer`."""

import torch

from speechbrain_taskarith.utils.lengths import ignore_padding, without_padding

_ALL = 10**9


class ChunkedEncoder(torch.nn.Module):
    """A SpeechBrain Transformer encoder that streams by chunks.

    An utterance is encoded in a batch as it is alone, and as in a stream:
    padding is ignored, even NaN.

    Arguments
    ---------
    transformer : torch.nn.Module
        `TransformerASR` with a Conformer encoder (SpeechBrain's Branchformer
        has no chunks), or an `EncoderWrapper` around one.
    chunk_size : int
        Frames of a chunk.
    left_context : int or None
        Past chunks that are attended to; None: all, so that a stream takes
        more and more memory.

    Raises
    ------
    ValueError
        Another encoder, a causal one, a chunk of no frame.

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
        self.transformer = ignore_padding(transformer)
        self.segment_length = chunk_size
        self.config = DynChunkTrainConfig(chunk_size, left_context)
        # SpeechBrain's streams need a number.
        past = _ALL if left_context is None else left_context
        self.streaming_config = DynChunkTrainConfig(chunk_size, past)

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
