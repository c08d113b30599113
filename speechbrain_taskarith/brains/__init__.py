"""Ready Brains and mixins: the other rooms inside `sb.Brain`'s hooks.

Names are imported when first used.

Authors
 * speechbrain_taskarith contributors 2026
"""

import importlib

# The room's public names, by the file that holds them.
_WHERE = {
    "labels": ("CharacterLabels", "WordLabels"),
    "networks": ("CTCNetwork", "Seq2SeqNetwork", "WhisperNetwork"),
    "ctc": ("CTCBrain",),
    "seq2seq": ("Seq2SeqBrain",),
    "checkpoints": ("AtomicCheckpointer",),
    "precision": ("fast_precision",),
    "sharding": ("ShardedBatch", "shard_loader"),
    "fine_tuning": ("FineTuneMixin", "copy_of"),
    "sequential": ("Domain", "SequentialMixin"),
    "digit_strings": ("DigitStringBrain",),
    "pieces": ("PieceLabels",),
    "running_means": ("RunningMeans",),
    "translation": ("TranslationBrain", "best_key"),
    "helper_processes": ("helpers", "is_helper"),
    "model_folder": ("ModelFolder",),
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
