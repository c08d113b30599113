"""Acoustic encoders behind one interface."""

import logging

import torch

from speechbrain_taskarith.translation.encoders.wav2vec import (
    Wav2Vec,
    bare,
    is_wav2vec,
)
from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    frame_counts,
    ignore_padding,
    padding_mask,
    relative_lengths,
    without_padding,
)

logger = logging.getLogger(__name__)


class AcousticEncoder(torch.nn.Module):
    """Any SpeechBrain encoder of features or of waveforms.

    Called with features [B, T', F] or waveforms [B, T'] and their relative
    lengths [B], it returns frames [B, T, d]; and with them their absolute
    lengths [B], where the encoder knows them: those that it returns itself,
    and those of HuBERT and wav2vec 2.0. Of others a frame's place is its
    share of the length.

    A part of the encoder that is frozen gets no gradient and stays in
    evaluation mode (dropout, masking).

    Arguments
    ---------
    encoder : torch.nn.Module
        `encoder(x, lens) -> [B, T, D]`, or a tuple of that and lengths [B]
        (whole numbers, or relative ones): SpeechBrain's `EncoderWrapper`
        around a Conformer; `HuBERT` and `Wav2Vec2` of
        `speechbrain.integrations.huggingface`, whose `source` may be a local
        folder; or such a model of `transformers` itself. Whisper has a class
        of its own, `WhisperAcousticEncoder`.
    d_model : int
        Width d of the output.
    d_encoder : int, optional
        Width D; where it differs from `d_model` a linear layer is added. Of
        HuBERT and wav2vec 2.0 it is known.
    frontend : torch.nn.Module, optional
        `frontend(x) -> x` before the encoder, e.g. strided convolutions; before
        HuBERT and wav2vec 2.0 it returns waveforms.
    trained_layers : int or None
        0: the encoder is frozen. N: the last N layers of HuBERT or wav2vec
        2.0 are trained. None (default): parameters are left as they are.
    reader : Layered, optional
        How to run the encoder, for subclasses.
    adaptor : torch.nn.Module, optional
        `adaptor(x, lens) -> [B, T, d]` behind all of this, with relative
        lengths, e.g. an `EncoderWrapper` around a few layers that are trained
        on the outputs of a frozen encoder.
    stacked_frames : int
        So many frames of the encoder, side by side, are projected to one:
        2 halves the length, and about the cost, of all that follows. 1
        (default): each frame stays one.

    Raises
    ------
    ValueError
        A Whisper; widths that do not fit (also when it is called); layers
        that cannot be trained apart.

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

    def __init__(
        self,
        encoder,
        d_model,
        d_encoder=None,
        frontend=None,
        trained_layers=None,
        reader=None,
        adaptor=None,
        stacked_frames=1,
    ):
        super().__init__()
        if stacked_frames < 1:
            raise ValueError(
                f"stacked_frames: {stacked_frames}, expected 1 or more"
            )
        if reader is None:
            reader = _reader(encoder)
        if reader is not None:
            if d_encoder not in (None, reader.width):
                raise ValueError(
                    f"d_encoder: {d_encoder}, but the {reader.name} has a "
                    f"width of {reader.width}; leave d_encoder out"
                )
            d_encoder = reader.width
        self.frontend = frontend
        self.encoder = ignore_padding(encoder)
        self.reader = reader
        self.projection = None
        self.stacked_frames = stacked_frames
        if stacked_frames > 1 or d_encoder not in (None, d_model):
            width = stacked_frames * (d_encoder or d_model)
            self.projection = torch.nn.Linear(width, d_model)
        self.adaptor = None if adaptor is None else ignore_padding(adaptor)
        self.d_model = d_model
        self._seen = None
        if trained_layers is not None:
            self._freeze(trained_layers)
        self._rest()

    def forward(self, x, lens, ids=None):
        """Encode a batch, see `AcousticEncoder`.

        Arguments
        ---------
        x : torch.Tensor
            Features [B, T', F] or waveforms [B, T'], or [B, T, D] of
            `frozen`, where there is a frozen part.
        lens : torch.Tensor
            [B], relative lengths.
        ids : sequence of str, optional
            The utterances' names, for errors.

        Returns
        -------
        torch.Tensor or tuple of torch.Tensor
            Frames [B, T, d]; or these, 0 in the padding, and their absolute
            lengths [B].
        """
        if len(x) == 0:
            raise ValueError("an empty batch: there is no utterance to encode")
        if self.reader is None:
            x, counts = self._any(x, lens)
        else:
            x, counts = self._pretrained(x, lens, ids)
        x, counts = self._project(x, lens, counts)
        if self.adaptor is not None:
            if counts is not None:
                lens = relative_lengths(counts, x.shape[1])
            x = self.adaptor(without_padding(x, lens), lens)
        return x if counts is None else (_silent(x, counts), counts)

    def frozen(self, x, lens, ids=None):
        """Return what comes out of the frozen part, without gradient.

        `forward` takes it in place of the waveforms, so that it has to be
        computed once only; `EncoderCache` keeps it.

        Arguments
        ---------
        x, lens, ids
            Waveforms, as `forward` takes them.

        Returns
        -------
        torch.Tensor
            [B, T, D], 0 in the padding.
        torch.Tensor
            [B], absolute lengths.

        Raises
        ------
        ValueError
            Nothing is frozen.
        """
        first = self.first_trained()
        if first is None:
            raise ValueError(
                f"nothing of {type(self).__name__} is frozen, or it does not "
                "take waveforms: there is nothing to compute once only. Give "
                "trained_layers (0: all of the encoder is frozen)"
            )
        x = without_padding(x, lens)
        lengths = absolute_lengths(lens, x.shape[1])
        with torch.no_grad():
            x, counts = self.reader.run(self.encoder, x, lengths, first, ids)
        return _silent(x, counts), counts

    def first_trained(self):
        """Return the first stage that is trained; None: nothing is frozen.

        Returns
        -------
        int or None
            Stages are the layers and a normalisation behind them.
        """
        if self.reader is None or self.frontend is not None:
            return None
        return self.reader.first_trained(self.encoder)

    def train(self, mode=True):
        """As `torch.nn.Module.train`; what is frozen stays in evaluation mode.

        Arguments
        ---------
        mode : bool
            True: training.

        Returns
        -------
        AcousticEncoder
            Itself.
        """
        super().train(mode)
        self._rest()
        return self

    def _rest(self):
        """Put what is frozen into evaluation mode, and leave the rest."""
        for part in (self.encoder, self.frontend):
            if part is not None and _is_frozen(part):
                part.eval()
        # Whatever is before it: a frontend may be trained through it.
        first = self.reader and self.reader.first_trained(self.encoder)
        if first is not None:
            trained = self.reader.stages(self.encoder)[first:]
            modes = {
                m: m.training for stage in trained for m in stage.modules()
            }
            self.encoder.eval()
            for module, mode in modes.items():
                module.training = mode

    def _freeze(self, trained_layers):
        if self.reader is not None:
            self.reader.freeze(self.encoder, trained_layers)
        elif trained_layers == 0:
            self.encoder.requires_grad_(False)
        else:
            raise ValueError(
                f"trained_layers: {trained_layers!r}, but the layers of "
                f"{type(self.encoder).__name__} are not known; expected 0 (all "
                "frozen) or None"
            )

    def _pretrained(self, x, lens, ids):
        reader, first = self.reader, self.first_trained()
        if self.frontend is not None:
            x = self._front(x, lens)
        if x.dim() == 2:
            if first is not None:
                x, counts = self.frozen(x, lens, ids)
            else:
                x = without_padding(x, lens)
                lengths = absolute_lengths(lens, x.shape[1])
                stop = len(reader.stages(self.encoder))
                return reader.run(self.encoder, x, lengths, stop, ids)
        else:
            cached = x.dim() == 3 and x.shape[-1] == reader.width
            if first is None or not cached:
                raise ValueError(
                    f"{reader.name} was given {tuple(x.shape)}, expected "
                    "waveforms [batch, samples]"
                    + f", or [batch, frames, {reader.width}] of an EncoderCache"
                    * (first is not None)
                )
            x = without_padding(x, lens)
            counts = absolute_lengths(lens, x.shape[1])
        x = x.to(next(self.encoder.parameters()).dtype)
        return reader.rest(self.encoder, x, counts, first), counts

    def _front(self, x, lens):
        x = without_padding(x, lens)
        if self.frontend is None:
            return x
        return without_padding(self.frontend(x), lens)

    def _any(self, x, lens):
        size = x.shape[1]
        x = self._front(x, lens)
        x, counts = self.encoder(x, lens), None
        if isinstance(x, tuple):
            counts = _lengths(x)
            x = x[0]
        if counts is None and x.dim() == 3:
            self._watch(size, x.shape[1])
        return x, counts

    def _project(self, x, lens, counts):
        wanted, stacked = self.d_model, self.stacked_frames
        if self.projection is not None:
            wanted = self.projection.in_features // stacked
        if x.dim() != 3 or x.shape[-1] != wanted:
            raise ValueError(
                f"the encoder returned {tuple(x.shape)}, expected [batch, "
                f"frames, {wanted}]; give its width as d_encoder"
            )
        if self.projection is None:
            return x, counts
        # NaN in the padding would reach the projection's gradient.
        if stacked == 1 and counts is None:
            return self.projection(without_padding(x, lens)), None
        if counts is None:
            counts = frame_counts(lens.to(x.device), x.shape[1])
        x = _silent(x, counts)
        if stacked > 1:
            missing = -x.shape[1] % stacked
            x = torch.nn.functional.pad(x, (0, 0, 0, missing))
            x = x.reshape(len(x), -1, stacked * wanted)
            counts = (counts + stacked - 1) // stacked
        return self.projection(x), counts

    def _watch(self, size, frames):
        """Warn where the output's length does not follow the input's."""
        if self._seen is True or torch.compiler.is_compiling():
            return
        before, self._seen = self._seen, (size, frames)
        if before is None or before[1] != frames or frames < 2:
            return
        if max(before[0], size) >= 1.5 * min(before[0], size):
            self._seen = True
            logger.warning(
                "%s returns %d frames for batches of %d and of %d steps: it "
                "pads or cuts its input, and then relative lengths do not say "
                "which frames are speech. Let it return the frames' lengths "
                "with them, or cut it to its input",
                *(type(self.encoder).__name__, frames, before[0], size),
            )


def _reader(encoder):
    """Return how to run an encoder whose layers are known, else None."""
    config = getattr(bare(encoder), "config", None)
    inner = getattr(getattr(encoder, "model", None), "config", config)
    if getattr(inner, "model_type", None) == "whisper":
        raise ValueError(
            f"AcousticEncoder around {type(encoder).__name__}: Whisper pads "
            "every input to its window, and most frames would be silence; use "
            "WhisperAcousticEncoder, which takes the same module"
        )
    return Wav2Vec(encoder) if is_wav2vec(encoder) else None


def _silent(x, counts):
    """Return x [B, T, D] with 0 behind the frames of each row."""
    return x.masked_fill(padding_mask(counts, x.shape[1])[..., None], 0.0)


def _is_frozen(module):
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _lengths(returned):
    """Return absolute lengths that an encoder returned behind its frames."""
    frames, lens = returned[0], returned[1] if len(returned) > 1 else None
    if not isinstance(lens, torch.Tensor) or lens.shape != frames.shape[:1]:
        return None
    if lens.is_floating_point():
        return absolute_lengths(lens, frames.shape[1])
    return lens
