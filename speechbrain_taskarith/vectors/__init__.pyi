from .analysis import (
    cosine_matrix as cosine_matrix,
)
from .analysis import (
    layer_norms as layer_norms,
)
from .analysis import (
    plot_cosine_matrix as plot_cosine_matrix,
)
from .analysis import (
    plot_layer_norms as plot_layer_norms,
)
from .analysis import (
    sign_agreement as sign_agreement,
)
from .editing.editor import (
    SequentialEditor as SequentialEditor,
)
from .editing.log import (
    Edit as Edit,
)
from .engine.statistics import (
    pool_normalizers as pool_normalizers,
)
from .engine.statistics import (
    reestimate_statistics as reestimate_statistics,
)
from .lora import (
    lora_deltas as lora_deltas,
)
from .merge import (
    MergeReport as MergeReport,
)
from .merge import (
    merge_checkpoints as merge_checkpoints,
)
from .recipe_hooks.atomic_checkpointer import (
    AtomicCheckpointer as AtomicCheckpointer,
)
from .recipe_hooks.editing_checkpointer import (
    EditingCheckpointer as EditingCheckpointer,
)
from .recipe_hooks.pretrainer import (
    TaskVectorPretrainer as TaskVectorPretrainer,
)
from .rules import (
    DARE as DARE,
)
from .rules import (
    DELLA as DELLA,
)
from .rules import (
    PCB as PCB,
)
from .rules import (
    SCE as SCE,
)
from .rules import (
    SLERP as SLERP,
)
from .rules import (
    TIES as TIES,
)
from .rules import (
    TSVM as TSVM,
)
from .rules import (
    BoostedTSVM as BoostedTSVM,
)
from .rules import (
    Breadcrumbs as Breadcrumbs,
)
from .rules import (
    ByLayer as ByLayer,
)
from .rules import (
    Fisher as Fisher,
)
from .rules import (
    IsoC as IsoC,
)
from .rules import (
    IsoCTS as IsoCTS,
)
from .rules import (
    Karcher as Karcher,
)
from .rules import (
    LinearAverage as LinearAverage,
)
from .rules import (
    LiNeS as LiNeS,
)
from .rules import (
    Merge as Merge,
)
from .rules import (
    ModelStock as ModelStock,
)
from .rules import (
    MultiSLERP as MultiSLERP,
)
from .rules import (
    Rule as Rule,
)
from .rules import (
    SelectiveAttention as SelectiveAttention,
)
from .rules import (
    TaskArithmetic as TaskArithmetic,
)
from .scales.grid import (
    search_scales as search_scales,
)
from .scales.search import (
    refuse_test_split as refuse_test_split,
)
from .scales.search import (
    search_scale as search_scale,
)
from .scales.table import (
    ScaleGrid as ScaleGrid,
)
from .scales.table import (
    ScaleSearch as ScaleSearch,
)
from .sharing.card import (
    ModelCard as ModelCard,
)
from .sharing.stored_vector import (
    push_folder as push_folder,
)
from .states.readers import (
    as_state as as_state,
)
from .states.readers import (
    open_state as open_state,
)
from .states.speechbrain_folder import (
    find_checkpoint_folder as find_checkpoint_folder,
)
from .states.state import (
    State as State,
)
from .states.vocabulary import (
    align_vocabulary as align_vocabulary,
)
from .states.vocabulary import (
    read_vocabulary as read_vocabulary,
)
from .states.writers import (
    save_checkpoint as save_checkpoint,
)
from .states.writers import (
    save_state as save_state,
)
from .synthetic_to_real import (
    syn2real as syn2real,
)
from .task_vector import (
    TaskVector as TaskVector,
)
