from .averaging.arithmetic import LinearAverage as LinearAverage
from .averaging.arithmetic import TaskArithmetic as TaskArithmetic
from .averaging.fisher import Fisher as Fisher
from .base import Rule as Rule
from .by_layer.by_layer import ByLayer as ByLayer
from .by_layer.lines import LiNeS as LiNeS
from .by_layer.selective_attention import (
    SelectiveAttention as SelectiveAttention,
)
from .description import from_description as from_description
from .geometric.karcher import Karcher as Karcher
from .geometric.model_stock import ModelStock as ModelStock
from .geometric.slerp import SLERP as SLERP
from .geometric.slerp import MultiSLERP as MultiSLERP
from .sparsifying.breadcrumbs import Breadcrumbs as Breadcrumbs
from .sparsifying.dare import DARE as DARE
from .sparsifying.della import DELLA as DELLA
from .sparsifying.pcb import PCB as PCB
from .sparsifying.sce import SCE as SCE
from .sparsifying.ties import TIES as TIES
from .sparsifying.ties import Merge as Merge
from .spectral.iso_c import IsoC as IsoC
from .spectral.iso_c import IsoCTS as IsoCTS
from .spectral.tsv_m import TSVM as TSVM
from .spectral.tsv_m import BoostedTSVM as BoostedTSVM
