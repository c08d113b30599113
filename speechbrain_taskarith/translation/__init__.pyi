from .encoders.acoustic import (
    AcousticEncoder as AcousticEncoder,
)
from .encoders.cache import (
    EncoderCache as EncoderCache,
)
from .encoders.whisper import (
    WhisperAcousticEncoder as WhisperAcousticEncoder,
)
from .inference.results import (
    TranslatedSegment as TranslatedSegment,
)
from .inference.results import (
    Translation as Translation,
)
from .inference.saving import (
    save_translator as save_translator,
)
from .inference.translator import (
    SpeechTranslator as SpeechTranslator,
)
from .input_guard import (
    InputGuard as InputGuard,
)
from .losses import (
    CrossModalContrastiveLoss as CrossModalContrastiveLoss,
)
from .losses import (
    TranslationObjective as TranslationObjective,
)
from .losses import (
    distillation_loss as distillation_loss,
)
from .model import (
    SpeechTranslationModel as SpeechTranslationModel,
)
from .multitask.consistency import (
    ConsistencyProbe as ConsistencyProbe,
)
from .multitask.consistency import (
    gradient_consistency as gradient_consistency,
)
from .multitask.gradients import (
    GradientAggregator as GradientAggregator,
)
from .multitask.history import (
    plot_task_weights as plot_task_weights,
)
from .multitask.history import (
    write_task_weights as write_task_weights,
)
from .multitask.task_weights import (
    TaskNormWeights as TaskNormWeights,
)
from .reduction.entropy import (
    plot_window_entropy as plot_window_entropy,
)
from .reduction.entropy import (
    window_entropy as window_entropy,
)
from .reduction.looking_back import (
    LookingBack as LookingBack,
)
from .reduction.segments import (
    Segments as Segments,
)
from .reduction.segments import (
    ctc_segments as ctc_segments,
)
from .reduction.shrink import (
    CTCShrink as CTCShrink,
)
from .reduction.shrink import (
    Shrunk as Shrunk,
)
from .search.searchers import (
    TranslationBeamSearch as TranslationBeamSearch,
)
from .search.searchers import (
    greedy_translation as greedy_translation,
)
from .shrinking_transformer import (
    ShrinkingTransformer as ShrinkingTransformer,
)
from .text.decoder import (
    TranslationDecoder as TranslationDecoder,
)
from .text.encoder import (
    TextEncoder as TextEncoder,
)
from .text.initialise import (
    initialise_from_text_translation as initialise_from_text_translation,
)
from .text.languages import (
    TargetLanguages as TargetLanguages,
)
from .text.local_to_global import (
    LocalExtractor as LocalExtractor,
)
from .text.local_to_global import (
    LocalToGlobal as LocalToGlobal,
)
from .text.noise import (
    BlankNoise as BlankNoise,
)
