from .base import (
    Rule as Rule,
)
from .base import (
    from_description as from_description,
)
from .elementwise import (
    DELLA as DELLA,
)
from .elementwise import (
    TIES as TIES,
)
from .elementwise import (
    Breadcrumbs as Breadcrumbs,
)
from .elementwise import (
    LinearAverage as LinearAverage,
)
from .elementwise import (
    Merge as Merge,
)
from .elementwise import (
    TaskArithmetic as TaskArithmetic,
)
from .fisher import (
    Fisher as Fisher,
)
from .geometric import (
    SLERP as SLERP,
)
from .geometric import (
    Karcher as Karcher,
)
from .geometric import (
    ModelStock as ModelStock,
)
from .geometric import (
    MultiSLERP as MultiSLERP,
)
from .spectral import (
    TSVM as TSVM,
)
from .spectral import (
    IsoC as IsoC,
)
from .wrappers import (
    DARE as DARE,
)
from .wrappers import (
    LiNeS as LiNeS,
)
