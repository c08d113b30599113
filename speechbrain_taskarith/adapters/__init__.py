"""Many small adapters on one frozen encoder, and what combines them.

Names are imported when first used.

Authors
 * speechbrain_taskarith contributors 2026
"""

import importlib

# The room's public names, by the file that holds them.
_WHERE = {
    "bottleneck": ("BottleneckAdapter",),
    "bank": ("AdapterBank",),
    "averaging": ("AdapterMean", "AdapterWeightedMean"),
    "fusion": ("AudioAdapterFusion",),
    "insertion": ("insert_adapters",),
    "handle": ("AdapterHandle",),
    "attention": ("attention_stats", "plot_attention"),
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
