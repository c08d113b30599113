"""Multi-task speech translation: from frames to text.

Names are imported when first used, so that a recipe pays for what it uses.

Authors
 * speechbrain_taskarith contributors 2026
"""

import importlib

# The room's public names, by the file that holds them.
_WHERE = {
    "segments": ("Segments", "ctc_segments"),
    "shrink": ("CTCShrink", "Shrunk"),
    "looking_back": ("LookingBack",),
    "local_to_global": ("LocalToGlobal",),
    "noise": ("BlankNoise",),
    "contrastive": ("CrossModalContrastiveLoss",),
    "distillation": ("distillation_loss",),
    "task_weights": ("TaskNormWeights",),
    "aggregation": ("GradientAggregator",),
    "consistency": ("ConsistencyProbe", "gradient_consistency"),
    "entropy": ("plot_window_entropy", "window_entropy"),
    "guard": ("InputGuard",),
    "text_encoder": ("TextEncoder",),
    "decoder": ("TranslationDecoder",),
    "encoders": ("AcousticEncoder",),
    "model": ("SpeechTranslationModel",),
    "objectives": ("TranslationObjective",),
    "search": ("TranslationBeamSearch", "greedy_translation"),
    "initialise": ("initialise_from_text_translation",),
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
