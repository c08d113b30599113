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
from .pauses import (
    cut_at_pauses as cut_at_pauses,
)
from .text import (
    LabelText as LabelText,
)
from .text import (
    SentencePieceText as SentencePieceText,
)
