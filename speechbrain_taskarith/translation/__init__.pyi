from .encoders import (
    AcousticEncoder as AcousticEncoder,
)
from .guard import (
    InputGuard as InputGuard,
)
from .losses.contrastive import (
    CrossModalContrastiveLoss as CrossModalContrastiveLoss,
)
from .losses.distillation import (
    distillation_loss as distillation_loss,
)
from .losses.objectives import (
    TranslationObjective as TranslationObjective,
)
from .model import (
    SpeechTranslationModel as SpeechTranslationModel,
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
from .search.searches import (
    TranslationBeamSearch as TranslationBeamSearch,
)
from .search.searches import (
    greedy_translation as greedy_translation,
)
from .tasks.aggregation import (
    GradientAggregator as GradientAggregator,
)
from .tasks.consistency import (
    ConsistencyProbe as ConsistencyProbe,
)
from .tasks.consistency import (
    gradient_consistency as gradient_consistency,
)
from .tasks.entropy import (
    plot_window_entropy as plot_window_entropy,
)
from .tasks.entropy import (
    window_entropy as window_entropy,
)
from .tasks.task_weights import (
    TaskNormWeights as TaskNormWeights,
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
from .text.local_to_global import (
    LocalToGlobal as LocalToGlobal,
)
from .text.noise import (
    BlankNoise as BlankNoise,
)
