"""Manifests, synthetic speech, strings of words, and simulated recordings.

Authors
 * speechbrain_taskarith contributors 2026
"""

from speechbrain_taskarith.data.audio import (
    encode_audio,
    read_audio,
    resample_wave,
    to_pcm16,
    write_audio,
)
from speechbrain_taskarith.data.corpora import (
    SIMULATED_SPEAKERS,
    SimulatedSpeaker,
    make_digits_corpus,
)
from speechbrain_taskarith.data.digits import (
    AudioCache,
    DigitStringLoader,
    load_digit_string,
    make_digit_strings,
)
from speechbrain_taskarith.data.espeak import (
    EspeakVoice,
    list_variants,
    list_voices,
)
from speechbrain_taskarith.data.manifests import (
    ManifestError,
    Recording,
    read_manifest,
    write_manifest,
)
from speechbrain_taskarith.data.simulate import RecordingSimulator
from speechbrain_taskarith.data.synthesis import (
    ACCENT_SPELLINGS,
    DIGITS,
    SYNTHETIC_VOICES,
    spoken_form,
    synthesize_digits,
)

__all__ = [
    "ACCENT_SPELLINGS",
    "AudioCache",
    "DIGITS",
    "DigitStringLoader",
    "EspeakVoice",
    "ManifestError",
    "Recording",
    "RecordingSimulator",
    "SIMULATED_SPEAKERS",
    "SYNTHETIC_VOICES",
    "SimulatedSpeaker",
    "encode_audio",
    "list_variants",
    "list_voices",
    "load_digit_string",
    "make_digit_strings",
    "make_digits_corpus",
    "read_audio",
    "read_manifest",
    "resample_wave",
    "spoken_form",
    "synthesize_digits",
    "to_pcm16",
    "write_audio",
    "write_manifest",
]
