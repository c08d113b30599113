from .ctc import (
    CTCBrain as CTCBrain,
)
from .fine_tuning import (
    FineTuneMixin as FineTuneMixin,
)
from .fine_tuning import (
    copy_of as copy_of,
)
from .helper_processes import (
    helpers as helpers,
)
from .helper_processes import (
    is_helper as is_helper,
)
from .labels import (
    CharacterLabels as CharacterLabels,
)
from .labels import (
    WordLabels as WordLabels,
)
from .model_folder import (
    ModelFolder as ModelFolder,
)
from .networks import (
    CTCNetwork as CTCNetwork,
)
from .networks import (
    Seq2SeqNetwork as Seq2SeqNetwork,
)
from .networks import (
    WhisperNetwork as WhisperNetwork,
)
from .pieces import (
    PieceLabels as PieceLabels,
)
from .precision import (
    fast_precision as fast_precision,
)
from .seq2seq import (
    Seq2SeqBrain as Seq2SeqBrain,
)
from .sequential import (
    Domain as Domain,
)
from .sequential import (
    SequentialMixin as SequentialMixin,
)
from .sharding import (
    ShardedBatch as ShardedBatch,
)
from .sharding import (
    shard_loader as shard_loader,
)
from .translation import (
    RunningMeans as RunningMeans,
)
from .translation import (
    TranslationBrain as TranslationBrain,
)
from .translation import (
    best_key as best_key,
)
