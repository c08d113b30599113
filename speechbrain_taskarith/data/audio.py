"""Reading, writing and resampling one recording, with errors that name it.

Audio goes through `speechbrain.dataio.audio_io` (soundfile); sample-rate
conversion through torchaudio's windowed-sinc filter with a Kaiser window.
"""

import functools
import io
import math
import os

import torch

from speechbrain_taskarith.utils.files import atomic_write

_FULL_SCALE = 32768.0


def read_audio(path, sample_rate, resample=False):
    """Read one recording as a mono waveform at a given rate.

    Arguments
    ---------
    path : str or pathlib.Path
        A file that libsndfile reads (WAV, FLAC, OGG, MP3, ...).
    sample_rate : int
        The rate wanted, in Hz.
    resample : bool
        Convert a file of another rate. With False (default) such a file is
        an error, since a model trained at one rate silently fails on
        another.

    Returns
    -------
    torch.Tensor
        float32, shape [T], within [-1, 1]; several channels are averaged.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is unreadable, empty, holds NaN or infinite samples, or has
        another rate.

    Example
    -------
    >>> path = str(getfixture("tmpdir") / "tone.wav")
    >>> write_audio(path, torch.zeros(800), 8000)
    >>> read_audio(path, 8000).shape
    torch.Size([800])
    >>> read_audio(path, 16000, resample=True).shape
    torch.Size([1600])
    """
    from speechbrain.dataio import audio_io

    _check_rate(sample_rate)
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no such recording. Check the data folder given "
            "($data_root) or make the manifest again."
        )
    try:
        wave, found_rate = audio_io.load(path, dtype=torch.float32)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: unreadable as audio ({error.__cause__}). Expected a "
            "whole WAV, FLAC or OGG file; fetch the recording again."
        ) from error
    if wave.shape[1] == 0:
        raise ValueError(
            f"{path}: the recording has no samples. Fetch it again or take "
            "its row out of the manifest."
        )
    wave = wave.mean(0) if wave.shape[0] > 1 else wave[0].contiguous()
    if not torch.isfinite(wave).all():
        raise ValueError(
            f"{path}: the recording holds NaN or infinite samples. Write it "
            "again, as 16-bit PCM for instance."
        )
    if found_rate == sample_rate:
        return wave
    if not resample:
        raise ValueError(
            f"{path}: the recording has {found_rate} Hz, expected "
            f"{sample_rate} Hz. Convert it, set the recipe's sample_rate to "
            f"{found_rate}, or read it with resample=True."
        )
    return resample_wave(wave, found_rate, sample_rate)


def write_audio(path, wave, sample_rate):
    """Write a waveform as 16-bit PCM, atomically; format by suffix.

    Arguments
    ---------
    path : str or pathlib.Path
        Final name, ending in `.wav` or `.flac`.
    wave, sample_rate
        See `encode_audio`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "tone.flac"
    >>> write_audio(path, 0.1 * torch.sin(torch.arange(800) / 10), 8000)
    >>> read_audio(path, 8000).shape
    torch.Size([800])
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower().lstrip(".")
    try:
        encoded = encode_audio(wave, sample_rate, suffix)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with atomic_write(path) as stream:
        stream.write(encoded)


def encode_audio(wave, sample_rate, file_format):
    """Return the bytes of a 16-bit PCM audio file.

    Arguments
    ---------
    wave : torch.Tensor
        Shape [T], within [-1, 1]; beyond that it is clipped.
    sample_rate : int
        In Hz.
    file_format : str
        `"wav"` or `"flac"`.

    Returns
    -------
    bytes
        The whole file.

    Raises
    ------
    ValueError
        Another format, another shape, whole numbers, no samples, NaN or
        infinity.

    Example
    -------
    >>> encode_audio(torch.zeros(16), 16000, "wav")[:4]
    b'RIFF'
    """
    import soundfile

    _check_rate(sample_rate)
    if file_format not in ("wav", "flac"):
        raise ValueError(
            f"format {file_format!r}: expected wav or flac (name the file so)"
        )
    if wave.dim() != 1 or wave.numel() == 0:
        raise ValueError(
            "expected a waveform of shape [T] with samples, found "
            f"{tuple(wave.shape)}"
        )
    if not torch.isfinite(wave).all():
        raise ValueError("the waveform holds NaN or infinite samples")
    pcm = (to_pcm16(wave) * _FULL_SCALE).to(torch.int16)
    # In memory, since soundfile takes the format from a file's name, and the
    # temporary name of an atomic write is not ours to choose.
    buffer = io.BytesIO()
    form = {"format": file_format.upper(), "subtype": "PCM_16"}
    soundfile.write(buffer, pcm.cpu().numpy(), int(sample_rate), **form)
    return buffer.getvalue()


def to_pcm16(wave):
    """Put a waveform on the 16-bit grid, still as float32.

    What lies on the grid can be written as 16-bit PCM and read back without
    any difference, so speech made on the fly and speech read from disk are
    the same to the last bit.

    Arguments
    ---------
    wave : torch.Tensor
        Any shape, nominally within [-1, 1].

    Returns
    -------
    torch.Tensor
        float32, multiples of 1/32768 within [-1, 1 - 1/32768].

    Raises
    ------
    ValueError
        Whole numbers: 16-bit samples would all be clipped.

    Example
    -------
    >>> to_pcm16(torch.tensor([0.5, 2.0, -2.0])).tolist()
    [0.5, 0.999969482421875, -1.0]
    """
    _check_floating(wave, "a waveform")
    grid = torch.round(wave.to(torch.float32) * _FULL_SCALE)
    return grid.clamp_(-_FULL_SCALE, _FULL_SCALE - 1) / _FULL_SCALE


def resample_wave(wave, from_rate, to_rate):
    """Convert the sample rate (windowed sinc, Kaiser window).

    Arguments
    ---------
    wave : torch.Tensor
        Shape [..., T], floating point; T may be 0.
    from_rate, to_rate : int
        Rates in Hz.

    Returns
    -------
    torch.Tensor
        Shape [..., ceil(T * to_rate / from_rate)], of the type of `wave`.

    Raises
    ------
    ValueError
        A bad rate, or whole numbers.

    Example
    -------
    >>> resample_wave(torch.zeros(22050), 22050, 16000).shape
    torch.Size([16000])
    """
    _check_rate(from_rate)
    _check_rate(to_rate)
    if from_rate == to_rate:
        return wave
    _check_floating(wave, "resampling a wave")
    if not wave.numel():
        length = math.ceil(wave.shape[-1] * to_rate / from_rate)
        return wave.new_zeros(*wave.shape[:-1], length)
    # Half precision is computed in float32.
    dtype = torch.promote_types(wave.dtype, torch.float32)
    resample = _resampler(int(from_rate), int(to_rate), dtype)
    with torch.no_grad():
        return resample(wave.to(dtype)).to(wave.dtype)


@functools.lru_cache(maxsize=16)
def _resampler(from_rate, to_rate, dtype):
    """Keep the filter: making it costs more than applying it once."""
    from torchaudio.transforms import Resample

    # The values librosa publishes as "kaiser_best".
    return Resample(
        from_rate,
        to_rate,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        beta=14.769656459379492,
        # None is float32, from a filter that is made in float64.
        dtype=None if dtype == torch.float32 else dtype,
    )


def _check_floating(wave, what):
    if not wave.is_floating_point():
        raise ValueError(
            f"{what} of {wave.dtype}: expected floating point; for 16-bit "
            "samples give wave / 32768"
        )


def _check_rate(rate):
    if isinstance(rate, bool) or int(rate) != rate or rate <= 0:
        raise ValueError(
            f"sample rate {rate!r}: expected a whole number of Hz above 0"
        )
