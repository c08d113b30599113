"""Shrinking and looking back inside SpeechBrain's own Transformers."""

from contextlib import contextmanager
from typing import NamedTuple

import torch

from speechbrain_taskarith.translation.ctc_head import CTCHeadWatch
from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    ignore_padding,
    padding_mask,
    relative_lengths,
)

# Methods of the wrapped model that do without its decoder of translations.
PASSED_ON = (
    "encode",
    "encode_streaming",
    "make_streaming_context",
    "forward_asr",
    "decode_asr",
)


class Memory(NamedTuple):
    """What the decoder attends to in the place of frames."""

    x: torch.Tensor  # [B, S, d]
    padding: torch.Tensor  # [B, S], True behind the last segment
    starts: torch.Tensor  # [B, S], first frame of every segment


class ShrinkingTransformer(torch.nn.Module):
    """A `TransformerASR` or `TransformerST` whose decoder sees segments.

    It stands in the place of the model that it wraps: the recipe's `train.py`
    and searchers stay as they are. The encoder's frames are returned, so that
    CTC (its loss and its scorer in the search) goes on frames. Decoder and
    search attend to what `shrink`, `looking_back` and `textual` make of them
    (arXiv 2311.03810, section 4). `min_decode_ratio` and `max_decode_ratio` of
    a searcher therefore count frames, as without shrinking, and the attention
    that `decode` returns is on frames: a segment's at its first one.

    The encoder's convolutions no longer read padding: an utterance is encoded
    alike in any batch, and without padding as the wrapped model alone does
    it, bit for bit.

    `encode`, `forward_asr`, `decode_asr` and streaming of the encoder are the
    wrapped model's. `forward_mt` gets `noise` and `textual` as well, so that
    text goes through the same textual encoder as speech.
    `forward_mt_decoder_only` has no lengths to shrink by and is refused, and
    so is calling the wrapped model's decoder past this one.

    A state dict of the wrapped model alone loads as well, the parts that it
    lacks being missing keys.

    Arguments
    ---------
    transformer : torch.nn.Module
        SpeechBrain's `TransformerASR` or `TransformerST`, with a decoder.
    ctc_lin : torch.nn.Module
        The recipe's CTC head: frames [B, T, d] to logits [B, T, V]. It is used
        here, and trained and saved where the recipe lists it (`modules` and
        `model`). Under DDP with `train_weights` the recipe has to compute its
        loss in every step.
    shrink : CTCShrink
        Its `blank_index` is that of `ctc_cost`.
    looking_back : LookingBack, optional
        None: what shrinking drops is lost.
    textual : TextEncoder, optional
        Layers with local-to-global convolutions before the decoder.
    noise : BlankNoise, optional
        On the transcripts of `forward_mt`, in training.

    Example
    -------
    >>> from speechbrain.lobes.models.transformer.TransformerASR import (
    ...     TransformerASR,
    ... )
    >>> from speechbrain_taskarith.translation import CTCShrink, LookingBack
    >>> model = ShrinkingTransformer(
    ...     TransformerASR(9, 20, 8, 2, 1, 1, 16, causal=False),
    ...     torch.nn.Linear(8, 5),
    ...     CTCShrink(blank_index=0),
    ...     LookingBack(8, nhead=2),
    ... )
    >>> src, tokens_bos = torch.rand(2, 12, 20), torch.randint(1, 9, (2, 4))
    >>> frames, out = model(src, tokens_bos, torch.tensor([1.0, 0.5]))
    >>> frames.shape, out.shape
    (torch.Size([2, 12, 8]), torch.Size([2, 4, 8]))
    """

    def __init__(
        self,
        transformer,
        ctc_lin,
        shrink,
        looking_back=None,
        textual=None,
        noise=None,
    ):
        super().__init__()
        decoder = getattr(transformer, "decoder", None)
        if decoder is None:
            raise ValueError(
                f"{type(transformer).__name__} has no decoder "
                "(num_decoder_layers: 0), and nothing else would see the "
                "shrunk sequence; wrap a Transformer with a decoder"
            )
        self.transformer = ignore_padding(transformer)
        self.shrink = shrink
        self.looking_back = looking_back
        self.textual = textual
        self.noise = noise
        self._head = CTCHeadWatch(ctc_lin, shrink.train_weights)
        self._source = None
        self._memory = None
        self._found = None
        decoder.register_forward_pre_hook(self._attend, with_kwargs=True)
        self.register_load_state_dict_pre_hook(_take_unwrapped)

    def __getattr__(self, name):
        """Pass on the wrapped model's methods that shrinking leaves alone."""
        if name in PASSED_ON:
            return getattr(self.transformer, name)
        return super().__getattr__(name)

    def __getstate__(self):
        """Leave the last search's memory out of copies."""
        return {**self.__dict__, "_found": None}

    def forward(self, src, tgt, wav_len=None, pad_idx=0):
        """Encode speech and decode tokens, as `TransformerASR.forward`.

        Arguments
        ---------
        src : torch.Tensor
            [B, T, F] or [B, T, F1, F2], what the recipe's CNN returns.
        tgt : torch.Tensor
            [B, U], tokens behind the beginning token; None: encode only.
        wav_len : torch.Tensor, optional
            [B], relative lengths. None: all frames are speech.
        pad_idx : int
            Padding of `tgt`; not the blank.

        Returns
        -------
        tuple
            Frames [B, T, d] of the encoder and output [B, U, d] of the
            decoder (between them, hidden states, where the wrapped model
            returns them).
        """
        self._found = None
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "ShrinkingTransformer does not run under torch.nn.DataParallel "
                "(--data_parallel_backend); start the recipe with torchrun"
            )
        if self.training:
            self._head.check_training()
        with self._decoding("speech"):
            return self.transformer(src, tgt, wav_len, pad_idx)

    def decode(self, tgt, encoder_out, enc_len=None):
        """Decode prefixes without gradient: what SpeechBrain's searchers call.

        Arguments
        ---------
        tgt : torch.Tensor
            [B, U], prefixes.
        encoder_out : torch.Tensor
            [B, T, d], frames of the encoder. They are shrunk once a search.
        enc_len : torch.Tensor, optional
            [B], absolute lengths of the frames.

        Returns
        -------
        torch.Tensor
            [B, U, d], before the output layer.
        torch.Tensor
            [B, U, T], attention of the last layer, mean over heads.
        """
        memory = self._remember(encoder_out, enc_len)
        with self._decoding("speech", memory):
            out, attention = self.transformer.decode(tgt, encoder_out, enc_len)
        size = encoder_out.shape[1]
        where = memory.starts.clamp(max=size - 1)[:, None].expand_as(attention)
        on_frames = attention.new_zeros(*attention.shape[:2], size)
        return out, on_frames.scatter_add(2, where, attention)

    def forward_mt(self, src, tgt, pad_idx=0):
        """Translate text, as `TransformerST.forward_mt`.

        Arguments
        ---------
        src : torch.Tensor
            [B, U], the transcript's tokens.
        tgt : torch.Tensor
            [B, W], tokens behind the beginning token.
        pad_idx : int
            Padding of both. `ValueError` where it is the token of `noise`,
            which SpeechBrain would mask.

        Returns
        -------
        tuple of torch.Tensor
            Encoder output [B, U', d] and decoder output [B, W, d].
        """
        if self.noise is not None:
            if self.noise.blank_token == pad_idx:
                raise ValueError(
                    f"noise: blank_token {pad_idx} is pad_idx as well, which "
                    "TransformerST.forward_mt masks: the noise would do "
                    "nothing. Give blanks a token of their own (blank_index, "
                    "one more of ctc_lin's neurons and of mt_src_vocab)"
                )
            lengths = _last(src != pad_idx)
            lens = relative_lengths(lengths, src.shape[1])
            src, lens = self.noise(src, lens)
            lengths = absolute_lengths(lens, src.shape[1])
            src = src.masked_fill(padding_mask(lengths, src.shape[1]), pad_idx)
        with self._decoding("text"):
            return self.transformer.forward_mt(src, tgt, pad_idx)

    def forward_mt_decoder_only(self, src, tgt, pad_idx=0):
        """Refuse what `TransformerST.forward_mt_decoder_only` does.

        Arguments
        ---------
        src : torch.Tensor
            [B, T, d], features without their lengths.
        tgt : torch.Tensor
            [B, W], tokens behind the beginning token.
        pad_idx : int
            Padding.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            "forward_mt_decoder_only gives the decoder features without their "
            "lengths, and its recipes have no CTC head: they cannot be shrunk. "
            "Use the wrapped Transformer itself, or a recipe that calls "
            "Transformer(src, tgt, wav_len)"
        )

    @contextmanager
    def _decoding(self, source, memory=None):
        before = self._source, self._memory
        self._source, self._memory = source, memory
        try:
            yield
        finally:
            self._source, self._memory = before

    def _attend(self, decoder, args, kwargs):
        """Replace the frames that the wrapped model gives its decoder."""
        if self._source is None:
            raise RuntimeError(
                "the decoder inside a ShrinkingTransformer was called past it: "
                "it would attend to frames, and is trained on segments. Name "
                "the ShrinkingTransformer in `modules`, `model` and the "
                "searchers' `modules`, not the Transformer that it wraps"
            )
        # `forward` names all arguments, `decode` does not name the first two.
        kwargs = {**kwargs, **dict(zip(("tgt", "memory"), args))}
        x = kwargs["memory"]
        padding = kwargs.get("memory_key_padding_mask")
        lengths = _lengths(x, padding)
        if self._source == "speech":
            x, padding, _ = self._memory or self._reduce(x, lengths)
        elif self.textual is not None:
            x = self.textual(x, relative_lengths(lengths, x.shape[1]))
        kwargs.update(memory=x, memory_key_padding_mask=padding)
        return (), kwargs

    def _reduce(self, frames, lengths):
        size = frames.shape[1]
        outside = padding_mask(lengths, size)[..., None]
        # Of NaN in the padding not even the head's gradient is to see any.
        frames = frames.masked_fill(outside, 0.0)
        lens = relative_lengths(lengths, size)
        # With gradient always (shrink detaches it): some versions of autocast
        # keep what was cast without one, and CTC's loss would train nothing.
        shrunk = self.shrink(frames, self._head(frames), lens)
        x, padding = shrunk.x, ~shrunk.segments.mask
        if self.looking_back is not None:
            x = self.looking_back(shrunk, frames, lens)
        if self.textual is not None:
            x = self.textual(x, shrunk.lens)
        return Memory(x, padding, shrunk.segments.starts)

    def _remember(self, frames, lengths):
        """Return the memory of frames [N, T, d], made once a search.

        Searchers give the same two tensors with every token. To hold them is
        to know them again; their and the weights' versions tell of changes.
        """
        version = self._fingerprint(frames, lengths)
        if self._found is not None:
            *tensors, known, memory = self._found
            same = tensors[0] is frames and tensors[1] is lengths
            if same and version is not None and known == version:
                return memory
        with torch.no_grad():
            memory = self._reduce_beams(frames, lengths)
        self._found = frames, lengths, version, memory
        return memory

    def _fingerprint(self, frames, lengths):
        tensors = [frames, *self._head.parameters()]
        tensors += [] if lengths is None else [lengths]
        for part in (self.looking_back, self.textual):
            tensors += [] if part is None else part.parameters()
        if any(tensor.is_inference() for tensor in tensors):
            return None
        kind = frames.device.type
        return (
            self.training,
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            *((t.data_ptr(), t._version) for t in tensors),
        )

    def _reduce_beams(self, frames, lengths):
        """Shrink an utterance once, however many hypotheses it has."""
        if lengths is None:
            lengths = torch.full((len(frames),), frames.shape[1])
        lengths = lengths.to(frames.device).long().clamp(min=1)
        new = (frames[1:] != frames[:-1]).flatten(1).any(1)
        new = new | (lengths[1:] != lengths[:-1])
        new = torch.cat([torch.ones_like(lengths[:1], dtype=torch.bool), new])
        memory = self._reduce(frames[new], lengths[new])
        rows = new.cumsum(0) - 1
        return Memory(*(tensor[rows] for tensor in memory))


def _lengths(x, outside):
    """Return absolute lengths, at least 1, from a mask of padding or None."""
    if outside is None:
        return torch.full((len(x),), x.shape[1], device=x.device)
    return (~outside).sum(1).clamp(min=1)


def _last(inside):
    """Return up to where each row has a True."""
    steps = torch.arange(1, inside.shape[1] + 1, device=inside.device)
    return (inside * steps).max(1).values.clamp(min=1)


def _take_unwrapped(module, state_dict, prefix, *_):
    """Let a state dict of the wrapped model alone load."""
    module._head.note_load()
    for key in [k for k in state_dict if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if name.partition(".")[0] not in module._modules:
            state_dict[f"{prefix}transformer.{name}"] = state_dict.pop(key)
