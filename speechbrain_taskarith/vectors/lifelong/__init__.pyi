from .memory import (
    JointTraining as JointTraining,
)
from .memory import (
    Replay as Replay,
)
from .methods import (
    Averaging as Averaging,
)
from .methods import (
    FineTuning as FineTuning,
)
from .methods import (
    PartialUpdate as PartialUpdate,
)
from .penalties import (
    EWC as EWC,
)
from .penalties import (
    LwF as LwF,
)
