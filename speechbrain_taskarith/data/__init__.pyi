from .audio import (
    encode_audio as encode_audio,
)
from .audio import (
    read_audio as read_audio,
)
from .audio import (
    resample_wave as resample_wave,
)
from .audio import (
    to_pcm16 as to_pcm16,
)
from .audio import (
    write_audio as write_audio,
)
from .corpora import (
    SIMULATED_SPEAKERS as SIMULATED_SPEAKERS,
)
from .corpora import (
    SimulatedSpeaker as SimulatedSpeaker,
)
from .corpora import (
    make_digits_corpus as make_digits_corpus,
)
from .digits import (
    AudioCache as AudioCache,
)
from .digits import (
    DigitStringLoader as DigitStringLoader,
)
from .digits import (
    load_digit_string as load_digit_string,
)
from .digits import (
    make_digit_strings as make_digit_strings,
)
from .espeak import (
    EspeakVoice as EspeakVoice,
)
from .espeak import (
    list_variants as list_variants,
)
from .espeak import (
    list_voices as list_voices,
)
from .manifests import (
    ManifestError as ManifestError,
)
from .manifests import (
    Recording as Recording,
)
from .manifests import (
    read_manifest as read_manifest,
)
from .manifests import (
    write_manifest as write_manifest,
)
from .simulate import (
    RecordingSimulator as RecordingSimulator,
)
from .synthesis import (
    ACCENT_SPELLINGS as ACCENT_SPELLINGS,
)
from .synthesis import (
    DIGITS as DIGITS,
)
from .synthesis import (
    SYNTHETIC_VOICES as SYNTHETIC_VOICES,
)
from .synthesis import (
    spoken_form as spoken_form,
)
from .synthesis import (
    synthesize_digits as synthesize_digits,
)
