"""Synthetic speech from espeak-ng, deterministic, with no system package.

The library and its data come with the package `espeakng-loader` (extra
`synthesis`). espeak-ng itself is under the GPL-3.0-or-later; it is installed
and loaded, not copied into this project.
"""

import dataclasses
import difflib
import functools
import os
import re
from pathlib import Path

import torch

from speechbrain_taskarith.data import espeak_engine
from speechbrain_taskarith.data.audio import resample_wave, to_pcm16

_LIMITS = {
    "rate": (80, 450),
    "pitch": (0, 99),
    "pitch_range": (0, 99),
    "word_gap": (0, 500),
}


@dataclasses.dataclass(frozen=True)
class EspeakVoice:
    """A voice that turns text into a waveform.

    The same text and settings give the same samples, bit for bit, whatever
    was said before, in any thread, process or order. The object holds
    settings only: it is cheap to make, to copy and to pickle, and works in
    the workers of a DataLoader.

    Arguments
    ---------
    voice : str
        Language code (`"en-us"`, `"en-gb-scotland"`, `"de"`), name or
        identifier of a voice; see `list_voices`. Text is read by the
        voice's own spelling rules: `"de"` reads English words as a German
        would who never learned English.
    variant : str, optional
        Another speaker for the same language (`"f3"`, `"m2"`, `"Andy"`);
        see `list_variants`. `"en-us+f3"` as the voice means the same.
    rate : int
        Speed in words per minute, 80 to 450.
    pitch : int
        Base pitch, 0 to 99.
    pitch_range : int
        How far the pitch moves, 0 (monotone) to 99.
    word_gap : int
        Pause between words, in units of 10 ms at the default rate, 0 to
        500.

    Raises
    ------
    ImportError
        `espeakng-loader` is not installed; the message names the extra.
    ValueError
        Unknown voice or variant (with near matches), or a value out of
        range.

    Example
    -------
    >>> voice = EspeakVoice("en-us", "f3")
    >>> wave = voice("seven", sample_rate=16000)
    >>> wave.dim(), wave.dtype, 4000 < len(wave) < 16000
    (1, torch.float32, True)
    >>> torch.equal(wave, EspeakVoice("en-us+f3")("seven"))
    True
    """

    voice: str = "en-us"
    variant: str | None = None
    rate: int = 175
    pitch: int = 50
    pitch_range: int = 50
    word_gap: int = 0

    def __post_init__(self):
        voice, variant = self.voice, self.variant
        if variant is None and "+" in voice:
            voice, variant = voice.split("+", 1)
            object.__setattr__(self, "voice", voice)
            object.__setattr__(self, "variant", variant)
        identifier = _identifier(voice)
        if variant is not None:
            if variant not in list_variants():
                raise _unknown(variant, list_variants(), "variant")
            identifier = f"{identifier}+{variant}"
        object.__setattr__(self, "_identifier", identifier)
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(
                    f"{name}={value!r}: expected a whole number from "
                    f"{least} to {most}"
                )

    def __call__(self, text, sample_rate=16000):
        """Speak a text.

        Arguments
        ---------
        text : str
            What to say.
        sample_rate : int
            Rate of the waveform, in Hz. The engine speaks at 22,050 Hz.

        Returns
        -------
        torch.Tensor
            float32, shape [T], on the 16-bit grid within [-1, 1).

        Raises
        ------
        ValueError
            The text is empty or holds nothing that can be spoken.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"text {text!r}: expected a string with something to say. "
                "Check the transcript it came from."
            )
        if "\0" in text:
            raise ValueError(f"text {text!r}: holds a NUL character")
        samples = espeak_engine.speak(
            self._identifier,
            text,
            rate=self.rate,
            pitch=self.pitch,
            pitch_range=self.pitch_range,
            word_gap=self.word_gap,
        )
        if not samples.any():
            raise ValueError(
                f"text {text!r}: the voice {self.name!r} finds nothing to "
                "say in it. Write words in the script of its language."
            )
        wave = torch.from_numpy(samples.astype("float32") / 32768.0)
        wave = resample_wave(wave, espeak_engine.ENGINE_RATE, sample_rate)
        return to_pcm16(wave)

    @property
    def name(self):
        """The voice with its variant, as espeak-ng writes it."""
        return "+".join(filter(None, (self.voice, self.variant)))


def list_voices():
    """Return the voices that can speak, by language code.

    Returns
    -------
    dict
        `{code: name}`, sorted, e.g. `{"en-us": "English (America)", ...}`.
        Voices that need MBROLA or a dictionary that is not installed are
        left out.

    Example
    -------
    >>> list_voices()["en-gb-scotland"]
    'English (Scotland)'
    """
    table = _voices(espeak_engine.data_folder())
    return {code: table[code][1] for code in sorted(table) if "/" not in code}


def list_variants():
    """Return the names of the speaker variants.

    Returns
    -------
    list of str
        Sorted; any of them goes with any voice.

    Example
    -------
    >>> {"f1", "m3", "whisper"} <= set(list_variants())
    True
    """
    return list(_variants(espeak_engine.data_folder()))


def _identifier(voice):
    """Return espeak-ng's file identifier of a voice given by any name."""
    table = _voices(espeak_engine.data_folder())
    wanted = str(voice).lower()
    by_name = {name.lower(): code for code, (_, name) in table.items()}
    wanted = by_name.get(wanted, wanted)
    if wanted not in table:
        raise _unknown(wanted, list(list_voices()), "voice")
    return table[wanted][0]


def _unknown(name, known, what):
    near = difflib.get_close_matches(str(name), known, n=5, cutoff=0.5)
    return ValueError(
        f"unknown espeak-ng {what} {name!r}; nearest: "
        f"{', '.join(near) or 'none'}. speechbrain_taskarith.data."
        f"list_{what}s() has all {len(known)}."
    )


@functools.lru_cache(maxsize=4)
def _voices(folder):
    """Read `{code or identifier: (identifier, name)}` from the voice files.

    The engine's own look-up by code is not used: it does not know "en-gb",
    and it takes voices whose dictionary is missing.
    """
    claims = {}
    folder = Path(folder)
    root = folder / "lang"
    for path in sorted(filter(Path.is_file, root.rglob("*"))):
        text = path.read_text(encoding="utf-8", errors="replace")
        name, languages, dictionary = _parse_voice(text)
        if not languages or not (folder / f"{dictionary}_dict").is_file():
            continue
        identifier = path.relative_to(root).as_posix()
        for code, priority in [*languages, (identifier.lower(), 0)]:
            claim = (priority, identifier, name)
            claims[code] = min(claims.get(code, claim), claim)
    return {code: claim[1:] for code, claim in claims.items()}


def _parse_voice(text):
    """Return name, [(code, priority)], dictionary of a voice file."""
    name, dictionary, languages = "", None, []
    for line in text.splitlines():
        key, *values = re.sub(r"//.*", "", line).split() or [""]
        if key == "name":
            name = " ".join(values)
        elif key == "language" and values:
            # Lower is better, and 5 where the file does not say.
            priority = int(values[1]) if len(values) > 1 else 5
            languages.append((values[0].lower(), priority))
        elif key == "dictionary" and values:
            dictionary = values[0]
    if dictionary is None and languages:
        dictionary = languages[0][0].split("-")[0]
    return name, languages, dictionary


@functools.lru_cache(maxsize=4)
def _variants(folder):
    return tuple(sorted(os.listdir(os.path.join(folder, "voices", "!v"))))
