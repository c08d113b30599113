"""Synthetic recordings of single words, by many clean voices."""

import os
import random

from speechbrain_taskarith.data.audio import write_audio
from speechbrain_taskarith.data.espeak import EspeakVoice
from speechbrain_taskarith.data.manifests import Recording, write_manifest
from speechbrain_taskarith.utils.progress import progress

DIGITS = (
    "ZERO",
    "ONE",
    "TWO",
    "THREE",
    "FOUR",
    "FIVE",
    "SIX",
    "SEVEN",
    "EIGHT",
    "NINE",
)

# How a speaker of another language would write what they say, so that the
# voice of that language, with its own sounds, says the English word.
ACCENT_SPELLINGS = {
    "de": dict(
        zip(
            DIGITS,
            "siero wann tuh srie fohr faif sicks säwen äit nain".split(),
        )
    ),
    "el": dict(
        zip(
            DIGITS,
            "ζίρο γουάν του θρι φορ φάιβ σιξ σέβεν έιτ νάιν".split(),
        )
    ),
    "fr": dict(
        zip(
            DIGITS,
            "zirau ouanne tou sri fore faïve sikse sévenne éite naïne".split(),
        )
    ),
}

# Voices of the synthetic side. The speakers below share none of them.
SYNTHETIC_VOICES = tuple(
    f"{language}+{variant}"
    for variant in "f1 m1 f2 m2 f3 m3 f4 m4 f5 m5 m6 m7".split()
    for language in ("en-us", "en-gb")
)


def synthesize_digits(
    words=DIGITS,
    voices=SYNTHETIC_VOICES,
    takes=4,
    *,
    sample_rate=16000,
    seed=0,
    split="train",
    prefix="syn",
    cache=None,
    folder=None,
    show_progress=True,
):
    """Make synthetic recordings of single words by many voices.

    Each take of a voice has its own speed (120 to 220 words per minute) and
    pitch. The waveforms go into a cache in memory, or into files.

    Arguments
    ---------
    words : sequence of str
        What to say, one recording for each word, voice and take.
    voices : sequence of str
        espeak-ng voices, e.g. `"en-us+f3"`.
    takes : int
        Recordings of each word by each voice.
    sample_rate : int
        In Hz.
    seed : int
        Another seed gives other speeds and pitches.
    split : str
        What the recordings are for: `"train"`, `"valid"`, ...
    prefix : str
        Beginning of the IDs.
    cache : AudioCache, optional
        Where the waveforms go; then `Recording.wav` is the key in it.
    folder : str, optional
        Where FLAC files and `manifest.csv` go. Either this or `cache`.
    show_progress : bool
        Show a progress bar.

    Returns
    -------
    list of Recording
        Speaker = voice, accent = the voice's language code.

    Example
    -------
    >>> from common.digits import AudioCache, make_digit_strings
    >>> cache = AudioCache(16000)
    >>> takes = synthesize_digits(
    ...     ["ONE", "TWO"], ["en-us+f3"], takes=2, cache=cache
    ... )
    >>> [take.ID for take in takes]
    ['syn_ONE_en-us+f3_0', 'syn_TWO_en-us+f3_0',
     'syn_ONE_en-us+f3_1', 'syn_TWO_en-us+f3_1']
    >>> items = make_digit_strings(takes, 5)
    """
    if (cache is None) == (folder is None):
        raise ValueError("give either a cache or a folder, and not both")
    if cache is not None and cache.sample_rate != sample_rate:
        raise ValueError(
            f"sample_rate={sample_rate} but the cache holds "
            f"{cache.sample_rate} Hz"
        )
    plan = [
        (voice, take, word)
        for voice in voices
        for take in range(takes)
        for word in words
    ]
    recordings = []
    for voice, take, word in progress(
        plan, desc="synthetic speech", enable=show_progress
    ):
        rng = random.Random(f"{seed} {voice} {take}")
        speaker = EspeakVoice(
            voice, rate=rng.randint(120, 220), pitch=rng.randint(30, 70)
        )
        wave = speaker(spoken_form(word, voice), sample_rate)
        ID = f"{prefix}_{word}_{voice}_{take}"
        if cache is not None:
            wav = ID
            cache.put(wav, wave)
        else:
            wav = os.path.abspath(os.path.join(folder, "audio", ID + ".flac"))
            write_audio(wav, wave, sample_rate)
        recordings.append(
            Recording(
                ID=ID,
                duration=round(len(wave) / sample_rate, 4),
                wav=wav,
                spk_id=voice,
                wrd=word,
                accent=voice.split("+")[0],
                split=split,
            )
        )
    if folder is not None:
        write_manifest(os.path.join(folder, "manifest.csv"), recordings, folder)
    return recordings


def spoken_form(word, voice):
    """Return what to hand to a voice so that it says an English word.

    Arguments
    ---------
    word : str
        A word of the transcript.
    voice : str
        espeak-ng voice.

    Returns
    -------
    str
        The word in lower case (capitals may be spelled out), or, for a
        digit and a voice of `ACCENT_SPELLINGS`, as that language writes its
        sound.

    Example
    -------
    >>> spoken_form("NINE", "de+f2"), spoken_form("NINE", "en-us")
    ('nain', 'nine')
    """
    language = voice.split("+")[0].split("-")[0]
    return ACCENT_SPELLINGS.get(language, {}).get(word.upper(), word.lower())
