"""Weights as vectors: read, subtract, merge, edit in sequence, choose a scale.

Names are imported when first used: streaming a merge needs no torch, and a
recipe pays for what it uses.

Authors
 * speechbrain_taskarith contributors 2026
"""

import importlib

# The room's public names, by the file that holds them.
_WHERE = {
    "states": ("State", "as_state"),
    "state_readers": ("open_state",),
    "state_writers": ("save_state",),
    "task_vector": ("TaskVector",),
    "rules": (
        "DARE",
        "DELLA",
        "TIES",
        "Breadcrumbs",
        "Fisher",
        "IsoC",
        "Karcher",
        "LiNeS",
        "LinearAverage",
        "ModelStock",
        "Merge",
        "MultiSLERP",
        "Rule",
        "SLERP",
        "TSVM",
        "TaskArithmetic",
    ),
    "merge": ("MergeReport", "merge_checkpoints"),
    "synthetic_to_real": ("syn2real",),
    "sequential": ("Edit", "SequentialEditor"),
    "selection": ("refuse_test_split", "search_scale"),
    "scale_table": ("ScaleSearch",),
    "analysis": (
        "cosine_matrix",
        "layer_norms",
        "plot_cosine_matrix",
        "plot_layer_norms",
        "sign_agreement",
    ),
    "atomic_checkpointer": ("AtomicCheckpointer",),
    "checkpointing": ("EditingCheckpointer",),
    "pretraining": ("TaskVectorPretrainer",),
    "checkpoint_folder": ("find_checkpoint_folder", "save_checkpoint"),
    "lora": ("lora_deltas",),
    "model_card": ("ModelCard",),
    "statistics": ("pool_normalizers", "reestimate_statistics"),
    "vocabulary": ("align_vocabulary", "read_vocabulary"),
}
_FILE_OF = {name: file for file, names in _WHERE.items() for name in names}

__all__ = sorted(_FILE_OF)


def __getattr__(name):
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_FILE_OF[name]}", __name__)
    return getattr(module, name)


def __dir__():
    return __all__
