from .ctc import (
    CTCBrain as CTCBrain,
)
from .labels import (
    CharacterLabels as CharacterLabels,
)
from .labels import (
    WordLabels as WordLabels,
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
from .seq2seq import (
    Seq2SeqBrain as Seq2SeqBrain,
)
from .sharding import (
    ShardedBatch as ShardedBatch,
)
from .sharding import (
    shard_loader as shard_loader,
)
from .training import (
    fast_precision as fast_precision,
)
from .training import (
    optimizer_steps as optimizer_steps,
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
