"""Streaming transducers: loss, HAT, MinWER, Emformer, search, transfer.

Names are imported when first used, so that a recipe pays for what it uses.

Authors
 * speechbrain_taskarith contributors 2026
"""

import importlib

# The room's public names, by the file that holds them.
_WHERE = {
    "lattice": ("alignment_windows", "lattice_log_prob"),
    "loss": ("transducer_loss",),
    "joint": ("RNNTJoint", "joint_transducer_loss", "sequence_log_prob"),
    "hat": ("HATJoint", "HATOutput"),
    "predictor": ("LSTMPredictor", "SpeechBrainPredictor"),
    "speechbrain_joint": ("SpeechBrainJoint",),
    "search": ("TransducerBeamSearch",),
    "greedy": ("TransducerGreedySearch", "TransducerSampler"),
    "hypotheses": ("Hypothesis", "SearchResult"),
    "min_wer": ("MinWERLoss", "min_wer_loss"),
    "emformer": ("Emformer",),
    "frontend": ("LocalFbank", "TimeReduction"),
    "transfer": ("TransferReport", "transfer_encoder"),
    "streaming": ("PartialResult", "StreamingTransducer"),
    "text": ("LabelText", "SentencePieceText"),
    "chunked_encoder": ("ChunkedEncoder",),
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
