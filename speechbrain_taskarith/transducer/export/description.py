"""What a reader of exported files has to know: `transducer.json`, tokens."""

import torch

from speechbrain_taskarith import __version__
from speechbrain_taskarith.transducer.export.writing import (
    OPSET,
    needed,
)
from speechbrain_taskarith.transducer.streaming.text import (
    LabelText,
    SentencePieceText,
)

DESCRIPTION = "transducer.json"
TOKENS = "tokens.txt"
# As SentencePiece, for a space: a line of tokens ends with a space and number.
_SPACE = "\u2581"


def describe(model, graphs, dtype, vocabulary, tokens):
    """Return the content of `transducer.json`."""
    features, frontend = model.features, graphs["frontend"]
    bank, stft = features.compute_fbanks, features.compute_STFT
    encoder = model.encoder
    step = encoder.segment_length * model.factor
    return {
        "format": 1,
        "dtype": dtype,
        "sample_rate": model.sample_rate,
        "features": {
            "kind": "log mel",
            "n_mels": bank.n_mels,
            "n_fft": stft.n_fft,
            "window": frontend.window,
            "window_kind": "hamming",
            "hop": frontend.hop,
            "padding": frontend.padding,
            "f_min": bank.f_min,
            "f_max": bank.f_max,
            "floor": bank.amin,
            "decibels": bank.multiplier,
            "mean": frontend.mean.tolist(),
            "std": frontend.std.tolist(),
        },
        "encoder": {
            "kind": type(encoder).__name__,
            "chunk": graphs["encoder"].example[0].shape[1],
            "step": step,
            "look_ahead": encoder.right_context * model.factor,
            "frames_per_step": encoder.segment_length,
        },
        "search": {
            "blank_index": model.searcher.blank_index,
            "vocabulary": vocabulary,
            "max_symbols": model.searcher.max_symbols,
        },
        "tokens": TOKENS if tokens else None,
        "latency": model.latency(),
        "models": {name: _interface(graph) for name, graph in graphs.items()},
        "versions": {
            "speechbrain_taskarith": __version__,
            "torch": torch.__version__,
            "onnx": needed("onnx").__version__,
            "onnxruntime": needed().__version__,
            "opset": OPSET,
        },
    }


def _interface(graph):
    """Name a file's inputs and outputs, and the states among them."""
    examples = dict(zip(graph.inputs, graph.example))
    dynamic = dict(zip(graph.inputs, _flat(graph.shapes, len(examples))))

    def shape(name):
        free = dynamic[name] or {}
        return [
            free[place].__name__ if place in free else size
            for place, size in enumerate(examples[name].shape)
        ]

    def tensor(name):
        kind = str(examples[name].dtype).removeprefix("torch.")
        return {"name": name, "shape": shape(name), "dtype": kind}

    return {
        "inputs": [tensor(n) for n in graph.inputs if n not in graph.states],
        "outputs": [n for n in graph.outputs if n not in graph.states.values()],
        "states": [
            {**tensor(name), "output": output, "initial": 0}
            for name, output in graph.states.items()
        ],
    }


def _flat(shapes, count):
    """Return the free dimensions of every input; those of states are a tuple."""
    flat = []
    for one in shapes or ({},) * count:
        flat += one if isinstance(one, tuple) else [one]
    return flat


def token_lines(detokenize, vocabulary, blank_index):
    """Return lines `token index`, as sherpa-onnx reads them, or None.

    A token that begins a word has SentencePiece's mark in front.
    """
    if isinstance(detokenize, LabelText):
        labels = [detokenize.separator + one for one in detokenize.labels]
    elif isinstance(detokenize, SentencePieceText):
        pieces = detokenize.processor
        labels = ["<unk>"] * detokenize.offset
        labels += map(pieces.id_to_piece, range(pieces.get_piece_size()))
    else:
        return None
    labels = labels[:vocabulary]
    if blank_index < len(labels):
        labels[blank_index] = "<blk>"
    return [
        f"{label.replace(' ', _SPACE)} {index}"
        for index, label in enumerate(labels)
    ]
