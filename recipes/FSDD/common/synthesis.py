"""Synthetic recordings of single words, by many clean voices."""

import dataclasses
import os
import random

from speechbrain_taskarith.data import (
    EspeakVoice,
    Recording,
    encode_audio,
    write_manifest,
)
from speechbrain_taskarith.utils.files import (
    atomic_folder,
    read_json,
    remove_leftovers,
    write_json,
)
from speechbrain_taskarith.utils.progress import progress

DIGITS = tuple("ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split())

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
    pitch; another seed gives others. The waveforms go into a cache in memory
    (`Recording.wav` is the key in it), or into `folder` as FLAC files with a
    `manifest.csv`, all at once when the last is spoken.

    Returns a list of Recording: speaker = voice, accent = the voice's language.
    """
    if (cache is None) == (folder is None):
        raise ValueError("give either a cache or a folder, and not both")
    if cache is not None and cache.sample_rate != sample_rate:
        raise ValueError(
            f"sample_rate={sample_rate} but the cache holds "
            f"{cache.sample_rate} Hz"
        )
    spoken = progress(
        _speak(words, voices, takes, sample_rate, seed, split, prefix),
        total=len(words) * len(voices) * takes,
        desc="synthetic speech",
        show_progress=show_progress,
    )
    if folder is not None:
        return _write(spoken, os.path.abspath(folder), sample_rate)
    recordings = []
    for recording, wave in spoken:
        cache.put(recording.wav, wave)
        recordings.append(recording)
    return recordings


def _speak(words, voices, takes, sample_rate, seed, split, prefix):
    """Yield (Recording, waveform); its `wav` is its ID."""
    for voice in voices:
        for take in range(takes):
            rng = random.Random(f"{seed} {voice} {take}")
            speaker = EspeakVoice(
                voice, rate=rng.randint(120, 220), pitch=rng.randint(30, 70)
            )
            for word in words:
                wave = speaker(spoken_form(word, voice), sample_rate)
                ID = f"{prefix}_{word}_{voice}_{take}"
                recording = Recording(
                    ID=ID,
                    duration=round(len(wave) / sample_rate, 4),
                    wav=ID,
                    spk_id=voice,
                    wrd=word,
                    accent=voice.split("+")[0],
                    split=split,
                )
                yield recording, wave


def _write(spoken, folder, sample_rate):
    recordings = []
    with atomic_folder(folder) as inside:
        (inside / "audio").mkdir()
        for recording, wave in spoken:
            name = os.path.join("audio", recording.ID + ".flac")
            # The folder is flushed as a whole, and renamed after that.
            (inside / name).write_bytes(encode_audio(wave, sample_rate, "flac"))
            wav = os.path.join(folder, name)
            recordings.append(dataclasses.replace(recording, wav=wav))
        write_manifest(inside / "manifest.csv", recordings, folder)
    return recordings


def prepare_synthetic_digits(
    save_folder, words, voices, takes, sample_rate=16000, skip_prep=False
):
    """Make `<split>/manifest.csv` of synthetic digits, unless it is there.

    `takes` is `{split: recordings of each word by each voice}`; the splits
    differ in speeds and pitches.
    """
    if skip_prep:
        return
    remove_leftovers(save_folder)
    for number, (split, count) in enumerate(takes.items()):
        settings = {
            "words": list(words),
            "voices": list(voices),
            "takes": count,
            "sample_rate": sample_rate,
        }
        folder = os.path.join(save_folder, split)
        marker = os.path.join(save_folder, f"{split}.json")
        if os.path.isfile(marker) and read_json(marker) == settings:
            continue
        synthesize_digits(
            words,
            voices,
            count,
            sample_rate=sample_rate,
            seed=number,
            split=split,
            prefix=f"synthetic-{split}",
            folder=folder,
        )
        # Last, since it says that the folder holds these.
        write_json(marker, settings)


def spoken_form(word, voice):
    """Return what to hand to a voice so that it says an English word.

    The word in lower case (capitals may be spelled out), or, for a digit and
    a voice of `ACCENT_SPELLINGS`, as that language writes its sound.
    """
    language = voice.split("+")[0].split("-")[0]
    return ACCENT_SPELLINGS.get(language, {}).get(word.upper(), word.lower())
