"""Whisper's encoder, cut to the length of the speech."""

import functools

import torch
from torch.nn.functional import gelu, pad

from speechbrain_taskarith.translation.encoders.acoustic import AcousticEncoder
from speechbrain_taskarith.translation.encoders.layered import Layered
from speechbrain_taskarith.translation.input_guard import utterance_name
from speechbrain_taskarith.utils.hub.download import local_path
from speechbrain_taskarith.utils.optional import require

SAMPLE_RATE = 16000
WINDOW, HOP = 400, 160  # samples, of the spectrogram
FRAME = 2 * HOP  # samples, of the encoder's output


class WhisperAcousticEncoder(AcousticEncoder):
    """Whisper's encoder on the speech alone, without its 30 s of silence.

    Called with waveforms [B, samples] of 16 kHz and their relative lengths
    [B], it returns frames [B, T, d] of 20 ms and their absolute lengths [B],
    `ceil(samples / 320)`. An utterance is encoded alike in any batch, and its
    frames enter the first layer as they do in 30 s; but attention no longer
    sees the silence behind the speech, which costs a twelfth for 4 s, and
    changes the output (docs/translation_encoders.md says how much).

    Also called with [B, T, D], what an `EncoderCache` holds.

    Arguments
    ---------
    source : str or pathlib.Path or torch.nn.Module
        A folder; a hub name such as `openai/whisper-base`, where there is a
        network or a cache of the hub; a Whisper of `transformers`; or
        SpeechBrain's `Whisper`.
    d_model : int
        Width d of the output. A linear layer is added where Whisper's D is
        another one.
    trained_layers : int or None
        0 (default): Whisper is frozen, and stays in evaluation mode. N: the
        last N layers are trained. None: parameters are left as they are,
        those of a folder to be trained.
    weights : bool
        False: random ones, of the configuration in `source` alone, for a
        model whose own checkpoint is loaded next.
    adaptor : torch.nn.Module, optional
        See `AcousticEncoder`.
    stacked_frames : int
        See `AcousticEncoder`; with 2, frames of 40 ms.

    Raises
    ------
    FileNotFoundError
        No such folder, or no network for a hub name.
    ValueError
        `source` is no Whisper; or, when it is called, an utterance that is
        longer than Whisper's window, by name.

    Example
    -------
    >>> import transformers
    >>> small = transformers.WhisperConfig(
    ...     **{"d_model": 12, "encoder_layers": 1, "decoder_layers": 1},
    ...     **{"encoder_ffn_dim": 8, "max_source_positions": 50},
    ... )
    >>> whisper = transformers.WhisperModel(small)
    >>> encoder = WhisperAcousticEncoder(whisper, d_model=6)
    >>> frames, lengths = encoder(
    ...     torch.rand(2, 16000), torch.tensor([1.0, 0.5])
    ... )
    >>> frames.shape, lengths
    (torch.Size([2, 50, 6]), tensor([50, 25]))
    """

    def __init__(
        self,
        source,
        d_model,
        trained_layers=0,
        weights=True,
        adaptor=None,
        stacked_frames=1,
    ):
        encoder = _encoder(source, weights)
        super().__init__(
            encoder,
            d_model,
            trained_layers=trained_layers,
            reader=Whisper(encoder.config),
            adaptor=adaptor,
            stacked_frames=stacked_frames,
        )


class Whisper(Layered):
    """Runs the encoder of `transformers`' Whisper on any length.

    Arguments
    ---------
    config : transformers.WhisperConfig
        Of the encoder.
    """

    def __init__(self, config):
        super().__init__("Whisper", config.d_model)
        self.mels = config.num_mel_bins
        self.window = config.max_source_positions
        self.constants = {}  # by device and type: copying waits for a GPU

    def layers(self, module):
        """As `Layered.layers`."""
        return list(module.layers)

    def stages(self, module):
        """As `Layered.stages`."""
        return [*module.layers, module.layer_norm]

    def run(self, module, wavs, lengths, stop, ids=None):
        """As `Layered.run`."""
        wavs = self._cut(wavs, lengths, ids)
        counts = -(-lengths // FRAME)
        size = max(1, -(-wavs.shape[1] // FRAME))
        kind = module.conv1.weight.dtype
        mel = self.log_mel(wavs, size).to(kind)
        x = gelu(module.conv1(mel))
        x = gelu(module.conv2(x))[..., :size].mT
        hidden = x + module.embed_positions.weight[:size]
        hidden = torch.nn.functional.dropout(
            hidden, module.dropout, module.training
        )
        return self.rest(module, hidden, counts, 0, stop), counts

    def log_mel(self, wavs, frames):
        """Return [B, mels, steps], as of 30 s, as far as `frames` need it.

        The convolutions read two steps more than two a frame; the window of
        the last one ends in zeros, as in 30 s.
        """
        size = (2 * frames + 2) * HOP + WINDOW // 2
        size = min(size, self.window * FRAME)
        x = wavs.to(torch.promote_types(wavs.dtype, torch.float32))
        x = pad(x, (0, max(0, size - x.shape[1])))
        if (x.device, x.dtype) not in self.constants:
            self._make_constants(x)
        filters, window = self.constants[x.device, x.dtype]
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.stft(
                x,
                WINDOW,
                HOP,
                window=window,
                return_complex=True,
            )
            power = spectrum[..., :-1].abs().square()
            mel = (filters @ power).clamp(min=1e-10).log10()
        floor = mel.amax((1, 2), keepdim=True) - 8.0
        return (torch.maximum(mel, floor) + 4.0) / 4.0

    def _make_constants(self, x):
        # Not tensors of inference mode, which could not be trained behind.
        with torch.inference_mode(False):
            made = mel_filters(self.mels), torch.hann_window(WINDOW)
            made = tuple(tensor.to(x.device, x.dtype) for tensor in made)
        self.constants[x.device, x.dtype] = made

    def _cut(self, wavs, lengths, ids):
        """Refuse what is longer than the window; padding may be."""
        longest = self.window * FRAME
        if wavs.shape[1] <= longest:
            return wavs
        for row, length in enumerate(lengths.tolist()):
            if length > longest:
                raise ValueError(
                    f"{utterance_name(row, ids)} has "
                    f"{length / SAMPLE_RATE:.2f} s; this Whisper's window has "
                    f"{longest / SAMPLE_RATE:g} s (max_source_positions: "
                    f"{self.window}). Cut it into segments, leave it out, or "
                    "take a Whisper with a longer window"
                )
        return wavs[:, :longest]


@functools.lru_cache(maxsize=4)
def mel_filters(mels):
    """Return Whisper's filters [mels, bins], as its folder would have them."""
    audio = require(
        "transformers.audio_utils", "huggingface", "WhisperAcousticEncoder"
    )
    filters = audio.mel_filter_bank(
        num_frequency_bins=1 + WINDOW // 2,
        num_mel_filters=mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.as_tensor(filters, dtype=torch.float64).T.contiguous()


def _encoder(source, weights):
    """Return the encoder module of whatever holds one."""
    if isinstance(source, torch.nn.Module):
        module = source
        for name in ("model", "model", "encoder"):
            module = getattr(module, name, module)
        config = getattr(module, "config", None)
        if getattr(config, "model_type", None) == "whisper":
            return module
        raise ValueError(
            f"{type(source).__name__} holds no Whisper encoder; for HuBERT or "
            "wav2vec 2.0 use AcousticEncoder"
        )
    transformers = require(
        "transformers", "huggingface", "WhisperAcousticEncoder"
    )
    folder = local_path(source)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: no folder of a Whisper model, its config.json is "
            f"missing or unknown ({str(error).splitlines()[0]}); expected what "
            "save_pretrained or `hf download` writes"
        ) from error
    if config.model_type != "whisper":
        raise ValueError(
            f"{folder}: a {config.model_type} model, expected a Whisper; for "
            "HuBERT or wav2vec 2.0 use AcousticEncoder"
        )
    if not weights:
        return transformers.WhisperModel(config).encoder
    try:
        model, loaded = transformers.WhisperModel.from_pretrained(
            folder, output_loading_info=True
        )
    except Exception as error:  # a reader raises what it trips over
        raise ValueError(
            f"{folder}: its weights are missing or damaged "
            f"({str(error).splitlines()[0]}); copy the folder again"
        ) from error
    # What a file lacks is drawn at random, with no more than a warning.
    lacking = [n for n in loaded["missing_keys"] if n.startswith("encoder.")]
    if lacking:
        raise ValueError(
            f"{folder}: its weights lack {len(lacking)} tensors of the "
            f"encoder, {min(lacking)} among them; copy the folder again"
        )
    return model.encoder
