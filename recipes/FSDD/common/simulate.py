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
    `drr_db`. (J.-D. Polack, "La transmission de l'énergie sonore dans les
    salles", 1988; 6.91 = ln 1000 makes the tail fall by 60 dB in `rt60`
    seconds; 0 is no room.) Returns [ceil(rt60 * sample_rate) + 1], 1 at time 0.
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
    """Filter a waveform [T] by a causal response [L], by FFT; the length stays."""
    size = _fast_size(len(wave) + len(response) - 1)
    product = torch.fft.rfft(wave, size) * torch.fft.rfft(response, size)
    return torch.fft.irfft(product, size)[: len(wave)]


def coloured_noise(length, exponent, generator):
    """Draw noise [length] whose power falls as `1 / f ** exponent`.

    0 is white, 1 pink, 2 brown; zero mean, unit variance.
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

    A silent waveform stays as it is: no noise has the ratio asked for.
    """
    gain = wave.square().mean().sqrt() * 10.0 ** (-snr_db / 20.0)
    level = noise.square().mean().sqrt().clamp_min(1e-12)
    return wave + noise * (gain / level)


def equalize(wave, sample_rate, gains_db):
    """Apply a microphone's frequency response.

    `gains_db` lie at points equally far apart in octaves from 62.5 Hz to half
    the sample rate, with straight lines between them.
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
    """Pass a waveform [T] through an 8 kHz channel.

    With `companding` it is quantised to 256 levels by the mu-law (mu = 255).
    Nothing above 4 kHz is left but what quantisation adds.
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

    `rms_db` is relative to full scale (below 0). Silence stays silence.
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

    Pairs are (least, greatest): `rt60` in seconds, `drr` (direct-to-reverberant
    energy ratio) and `snr` in dB, `colour` (exponent of the noise), `level` in
    dB relative to full scale. `microphone_db` is the standard deviation of the
    microphone's response at six points. `codec`: "none", "band8k" (nothing
    above 4 kHz) or "mulaw8k" (that, and 8-bit mu-law).
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
        """Record an utterance [T].

        `utterance` names it, so that it gets noise of its own; `session` names
        the speaker or place, whose utterances share room, microphone, level.
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

        `room` (impulse response, [L]), `microphone` (dB, [6]), `rt60`, `drr`,
        `snr`, `colour`, `level`.
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
