"""What a recording does to speech: room, noise, microphone, codec, level.

Small pure functions on waveforms, each with its own generator, and
`RecordingSimulator`, which puts them in a row. None of this replaces real
recordings; it makes the "recorded" side of an experiment where there are
none, and says so wherever its results are shown.
"""

import dataclasses
import hashlib
import math

import torch

from speechbrain_taskarith.data.audio import resample_wave

CODECS = ("none", "band8k", "mulaw8k")


def room_impulse_response(rt60, drr_db, sample_rate, generator):
    """Draw the response of a room: the direct sound and a decaying tail.

    Polack's model: `h(t) = delta(t) + g n(t) exp(-6.91 t / rt60)` with white
    noise `n`, and `g` such that direct sound and tail have the energy ratio
    asked for. (J.-D. Polack, "La transmission de l'énergie sonore dans les
    salles", 1988; 6.91 = ln 1000 makes the tail fall by 60 dB in rt60.)

    Arguments
    ---------
    rt60 : float
        Time in seconds in which the tail falls by 60 dB; 0 is no room.
    drr_db : float
        Energy of the direct sound over that of the tail, in dB.
    sample_rate : int
        In Hz.
    generator : torch.Generator
        Where the noise comes from.

    Returns
    -------
    torch.Tensor
        float32, shape [ceil(rt60 * sample_rate) + 1], 1 at time 0.

    Example
    -------
    >>> room = room_impulse_response(
    ...     0.3, 3.0, 16000, torch.Generator().manual_seed(0)
    ... )
    >>> ratio = 1.0 / room[1:].square().sum()
    >>> round(10 * math.log10(ratio), 3)
    3.0
    """
    if rt60 < 0:
        raise ValueError(f"rt60={rt60}: expected seconds, 0 or more")
    length = math.ceil(rt60 * sample_rate)
    response = torch.zeros(length + 1)
    response[0] = 1.0
    if length:
        time = torch.arange(1, length + 1) / sample_rate
        tail = torch.randn(length, generator=generator)
        tail *= torch.exp(-math.log(1000.0) / rt60 * time)
        tail /= tail.square().sum().sqrt()
        response[1:] = tail * 10.0 ** (-drr_db / 20.0)
    return response


def convolve(wave, response):
    """Filter a waveform, by FFT; the length stays.

    Arguments
    ---------
    wave : torch.Tensor
        Shape [T].
    response : torch.Tensor
        Shape [L], causal: time 0 first.

    Returns
    -------
    torch.Tensor
        Shape [T], the first T samples of the convolution.

    Example
    -------
    >>> convolve(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor([1., 3., 5.])
    """
    size = _fast_size(len(wave) + len(response) - 1)
    product = torch.fft.rfft(wave, size) * torch.fft.rfft(response, size)
    return torch.fft.irfft(product, size)[: len(wave)]


def coloured_noise(length, exponent, generator):
    """Draw noise whose power falls as `1 / f ** exponent`.

    Arguments
    ---------
    length : int
        Samples.
    exponent : float
        0 white, 1 pink, 2 brown.
    generator : torch.Generator
        Where it comes from.

    Returns
    -------
    torch.Tensor
        float32, shape [length], zero mean, unit variance.

    Example
    -------
    >>> noise = coloured_noise(16000, 1.0, torch.Generator().manual_seed(0))
    >>> round(float(noise.square().mean()), 3)
    1.0
    """
    size = _fast_size(max(int(length), 2))
    spectrum = torch.fft.rfft(torch.randn(size, generator=generator))
    bins = torch.arange(len(spectrum), dtype=torch.float32)
    bins[0] = 1.0
    spectrum *= bins ** (-exponent / 2.0)
    spectrum[0] = 0.0
    noise = torch.fft.irfft(spectrum, size)[:length]
    noise = noise - noise.mean()
    return noise / noise.square().mean().sqrt().clamp_min(1e-12)


def add_noise(wave, noise, snr_db):
    """Add noise at a signal-to-noise ratio.

    Arguments
    ---------
    wave, noise : torch.Tensor
        Shape [T].
    snr_db : float
        Power of the waveform over that of the noise as added, in dB.

    Returns
    -------
    torch.Tensor
        Shape [T]. A silent waveform stays as it is: no noise has the ratio
        asked for.

    Example
    -------
    >>> wave, noise = torch.ones(8), torch.tensor([1.0, -1.0] * 4)
    >>> (add_noise(wave, noise, 20.0) - wave).abs().max()
    tensor(0.1000)
    """
    gain = wave.square().mean().sqrt() * 10.0 ** (-snr_db / 20.0)
    level = noise.square().mean().sqrt().clamp_min(1e-12)
    return wave + noise * (gain / level)


def equalize(wave, sample_rate, gains_db):
    """Apply a microphone's frequency response.

    Arguments
    ---------
    wave : torch.Tensor
        Shape [T].
    sample_rate : int
        In Hz.
    gains_db : sequence of float
        Gains at points equally far apart in octaves from 62.5 Hz to half
        the sample rate, in dB; straight lines between them.

    Returns
    -------
    torch.Tensor
        Shape [T].

    Example
    -------
    >>> wave = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(equalize(wave, 16000, [6.0206, 6.0206]), 2 * wave,
    ...     atol=1e-4)
    True
    """
    size = _fast_size(len(wave))
    spectrum = torch.fft.rfft(wave, size)
    frequency = torch.linspace(0.0, sample_rate / 2, len(spectrum))
    lowest = 62.5
    octaves = math.log2(sample_rate / 2 / lowest)
    place = torch.log2(frequency.clamp_min(lowest) / lowest) / octaves
    place = place * (len(gains_db) - 1)
    gains = torch.as_tensor(gains_db, dtype=torch.float32)
    left = place.floor().long().clamp(max=len(gains) - 2)
    share = place - left
    curve = gains[left] * (1 - share) + gains[left + 1] * share
    spectrum *= 10.0 ** (curve / 20.0)
    return torch.fft.irfft(spectrum, size)[: len(wave)]


def telephone(wave, sample_rate, companding=True):
    """Pass a waveform through an 8 kHz channel.

    Arguments
    ---------
    wave : torch.Tensor
        Shape [T], within [-1, 1].
    sample_rate : int
        In Hz, before and after.
    companding : bool
        Quantise to 256 levels by the mu-law (mu = 255) in between.

    Returns
    -------
    torch.Tensor
        Shape [T], nothing above 4 kHz but what quantisation adds.

    Example
    -------
    >>> telephone(torch.zeros(1601), 16000).shape
    torch.Size([1601])
    """
    from torchaudio.functional import mu_law_decoding, mu_law_encoding

    narrow = resample_wave(wave, sample_rate, 8000)
    if companding:
        narrow = mu_law_decoding(mu_law_encoding(narrow.clamp(-1, 1), 256), 256)
    wide = resample_wave(narrow, 8000, sample_rate)
    return torch.nn.functional.pad(wide, (0, max(0, len(wave) - len(wide))))[
        : len(wave)
    ]


def set_level(wave, rms_db):
    """Bring a waveform to a level, or as near as it goes without clipping.

    Arguments
    ---------
    wave : torch.Tensor
        Shape [T].
    rms_db : float
        Root mean square, in dB relative to full scale (below 0).

    Returns
    -------
    torch.Tensor
        Shape [T], within [-1, 1]. Silence stays silence.

    Example
    -------
    >>> set_level(torch.tensor([0.5, -0.5]), -20.0)
    tensor([ 0.1000, -0.1000])
    """
    peak = float(wave.abs().max())
    if peak == 0.0:
        return wave
    gain = 10.0 ** (rms_db / 20.0) / float(wave.square().mean().sqrt())
    return wave * min(gain, 0.999 / peak)


@dataclasses.dataclass(frozen=True)
class RecordingSimulator:
    """Makes clean speech sound recorded.

    Room, microphone, signal-to-noise ratio, colour of the noise and level
    belong to a *session* (one speaker at one place); the noise itself is
    drawn anew for each utterance. Both are keyed by name, not by order:
    the same session and utterance give the same result in any process.

    Arguments
    ---------
    sample_rate : int
        In Hz.
    rt60 : tuple of float
        Least and greatest reverberation time of a session, seconds.
    drr : tuple of float
        Direct-to-reverberant energy ratio, dB.
    snr : tuple of float
        Signal-to-noise ratio, dB.
    colour : tuple of float
        Exponent of the noise: 0 white, 1 pink, 2 brown.
    microphone_db : float
        Standard deviation of the microphone's response at six points, dB.
    level : tuple of float
        Level, dB relative to full scale.
    codec : str
        `"none"`, `"band8k"` (nothing above 4 kHz) or `"mulaw8k"` (that, and
        8-bit mu-law).
    seed : int
        Another seed gives other sessions and other noise.

    Example
    -------
    >>> simulate = RecordingSimulator(snr=(10, 15), seed=3)
    >>> wave = 0.1 * torch.randn(8000)
    >>> heard = simulate(wave, "utterance 1", session="theo")
    >>> heard.shape
    torch.Size([8000])
    >>> torch.equal(heard, simulate(wave, "utterance 1", session="theo"))
    True
    """

    sample_rate: int = 16000
    rt60: tuple = (0.2, 0.6)
    drr: tuple = (-3.0, 4.0)
    snr: tuple = (3.0, 15.0)
    colour: tuple = (0.5, 1.5)
    microphone_db: float = 6.0
    level: tuple = (-30.0, -20.0)
    codec: str = "mulaw8k"
    seed: int = 0

    def __post_init__(self):
        for name in ("rt60", "drr", "snr", "colour", "level"):
            limits = tuple(getattr(self, name))
            if len(limits) != 2 or not limits[0] <= limits[1]:
                raise ValueError(f"{name}={limits}: expected least, greatest")
            # YAML gives lists.
            object.__setattr__(self, name, limits)
        if self.rt60[0] < 0:
            raise ValueError(f"rt60={self.rt60}: expected seconds, 0 or more")
        if self.codec not in CODECS:
            raise ValueError(
                f"codec={self.codec!r}: expected one of {', '.join(CODECS)}"
            )

    def __call__(self, wave, utterance, session=""):
        """Record an utterance.

        Arguments
        ---------
        wave : torch.Tensor
            Clean speech, shape [T], at `sample_rate`.
        utterance : str
            Names the utterance, so that it gets noise of its own.
        session : str
            Names the speaker or place, so that all of its utterances share
            room, microphone, noise level and colour.

        Returns
        -------
        torch.Tensor
            Shape [T], within [-1, 1].
        """
        place = self.session(session)
        generator = self._generator("utterance", session, utterance)
        noise = coloured_noise(len(wave), place["colour"], generator)
        wave = convolve(wave, place["room"])
        wave = add_noise(wave, noise, place["snr"])
        wave = equalize(wave, self.sample_rate, place["microphone"])
        # The level comes before the codec: quantisation depends on it.
        wave = set_level(wave, place["level"])
        if self.codec != "none":
            wave = telephone(wave, self.sample_rate, self.codec == "mulaw8k")
        return wave.clamp(-1.0, 1.0)

    def session(self, name):
        """Return what all utterances of a session share.

        Arguments
        ---------
        name : str
            Any name.

        Returns
        -------
        dict
            `room` (impulse response, [L]), `microphone` (dB, [6]), `rt60`,
            `drr`, `snr`, `colour`, `level`.
        """
        generator = self._generator("session", name)
        drawn = {
            key: _uniform(getattr(self, key), generator)
            for key in ("rt60", "drr", "snr", "colour", "level")
        }
        drawn["microphone"] = self.microphone_db * torch.randn(
            6, generator=generator
        )
        drawn["room"] = room_impulse_response(
            drawn["rt60"], drawn["drr"], self.sample_rate, generator
        )
        return drawn

    def _generator(self, *names):
        """Key randomness by names, alike on every machine."""
        key = repr((self.seed, *names)).encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        return torch.Generator().manual_seed(seed)


def _uniform(limits, generator):
    least, most = limits
    share = float(torch.rand((), generator=generator, dtype=torch.float64))
    return least + (most - least) * share


def _fast_size(length):
    """Return the least power of two that is not below a length."""
    return 1 << max(0, int(length) - 1).bit_length()
