"""All merging rules by name.

Each is a small object that holds numbers only, to be built in Python or by
`!new:` in YAML, and used as `rule(base, [tau, ...])`, `rule.combine([tau,
...])` or by `merge_checkpoints`. `rule.Rule` says what a rule is.

Authors
 * speechbrain_taskarith contributors 2026
"""

from .elementwise import (
    DELLA,
    TIES,
    Breadcrumbs,
    LinearAverage,
    Merge,
    TaskArithmetic,
)
from .fisher import Fisher
from .geometric import SLERP, Karcher, ModelStock, MultiSLERP
from .rule import Rule, from_description
from .spectral import TSVM, IsoC
from .wrappers import DARE, LiNeS

__all__ = [
    "DARE",
    "DELLA",
    "SLERP",
    "TIES",
    "TSVM",
    "Breadcrumbs",
    "Fisher",
    "IsoC",
    "Karcher",
    "LiNeS",
    "LinearAverage",
    "Merge",
    "ModelStock",
    "MultiSLERP",
    "Rule",
    "TaskArithmetic",
    "from_description",
]
