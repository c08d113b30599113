from .bank import (
    AdapterBank as AdapterBank,
)
from .bank import (
    BottleneckAdapter as BottleneckAdapter,
)
from .combination.attention import (
    attention_stats as attention_stats,
)
from .combination.attention import (
    plot_attention as plot_attention,
)
from .combination.averaging import (
    AdapterMean as AdapterMean,
)
from .combination.averaging import (
    AdapterWeightedMean as AdapterWeightedMean,
)
from .combination.fusion import (
    AudioAdapterFusion as AudioAdapterFusion,
)
from .handle import (
    AdapterHandle as AdapterHandle,
)
from .insertion import (
    insert_adapters as insert_adapters,
)
from .insertion import (
    load_adapters as load_adapters,
)
