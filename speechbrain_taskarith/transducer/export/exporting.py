"""`export_transducer`: a recogniser's folder to files for onnxruntime."""

from dataclasses import dataclass
from pathlib import Path

import torch

from speechbrain_taskarith.transducer.export.description import (
    DESCRIPTION,
    TOKENS,
    describe,
    token_lines,
)
from speechbrain_taskarith.transducer.export.graphs import (
    EncoderGraph,
    FrontendGraph,
    JointGraph,
    PredictorGraph,
)
from speechbrain_taskarith.transducer.export.verification import (
    Exported,
    compare,
)
from speechbrain_taskarith.transducer.export.writing import (
    halve,
    needed,
    quantise,
    write_onnx,
)
from speechbrain_taskarith.transducer.streaming.folder import load_transcriber
from speechbrain_taskarith.utils.files import atomic_folder, write_json

# The largest difference of a part, as `compare` counts it.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "int8": 0.5}
_SMALLER = {"fp16": halve, "int8": quantise}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the PyTorch model.

    Arguments
    ---------
    folder, dtype : str
        Where it lies; the type of the weights.
    megabytes : dict of str: float
        Size by file, in 10^6 bytes.
    differences : dict of str: float
        Largest difference by part, on random samples, features and labels:
        `|a - b| / (1 + |b|)`.
    difference : float
        The largest of them.
    step_seconds : float
        Time of one step of the encoder in onnxruntime, on one thread (median).
    step_audio : float
        Seconds of audio that a step takes.

    Example
    -------
    >>> sizes, parts = {"encoder.onnx": 2.0}, {"encoder": 1e-6}
    >>> ExportReport("out", "fp32", sizes, parts, 1e-6, 0.01, 0.16).dtype
    'fp32'
    """

    folder: str
    dtype: str
    megabytes: dict
    differences: dict
    difference: float
    step_seconds: float
    step_audio: float


def export_transducer(
    folder, output, *, to="onnx", dtype="fp32", overwrite=False
):
    """Write a streaming recogniser as files that run without PyTorch.

    The new folder holds `frontend.onnx` (samples to normalised features),
    `encoder.onnx` (a step of a stream, with its states), `predictor.onnx`,
    `joint.onnx` (log-probabilities of blank and labels), `transducer.json`
    (what a reader has to know), and `tokens.txt` where the labels are known.
    It is written whole or not at all, and only if onnxruntime computes with it
    what PyTorch does.

    Arguments
    ---------
    folder : str or pathlib.Path
        A recogniser, as `taskarith transcribe --model` reads it:
        `hyperparams.yaml` with the key `transcriber`, and `transcriber.ckpt`.
        Its features are `LocalFbank`; its encoder is an `Emformer`, or a
        `ChunkedEncoder` with a `left_context`.
    output : str or pathlib.Path
        The new folder.
    to : str
        `"onnx"`.
    dtype : str
        `"fp32"`; `"fp16"`, half the size, as fast; or `"int8"`, weights of
        linear layers, LSTMs and embeddings: a quarter of the size, and faster.
        Measure the WER: rounding may change a word.
    overwrite : bool
        Replace an earlier export of that name.

    Returns
    -------
    ExportReport

    Raises
    ------
    ValueError
        Another `to` or `dtype`; a part that cannot be exported; files that
        compute something else than the model; an output that holds the model,
        or something else than an export.
    FileExistsError
        An output that exists.
    ImportError
        One of the packages of the extra `export` is missing.

    Example
    -------
    >>> export_transducer("recogniser", "device", dtype="bf16")
    Traceback (most recent call last):
      ...
    ValueError: dtype='bf16': expected 'fp32', 'fp16' or 'int8'...
    """
    model, graphs, vocabulary = checked_parts(
        folder, output, to, dtype, overwrite
    )
    with atomic_folder(output) as new:
        for name, graph in graphs.items():
            try:
                write_onnx(graph, new / f"{name}.onnx")
            except torch.onnx.errors.OnnxExporterError as error:
                raise ValueError(_refusal(model, name, error)) from error
            # Spectra are not for other types.
            if dtype in _SMALLER and name != "frontend":
                _SMALLER[dtype](new / f"{name}.onnx")
        differences, seconds = compare(model, Exported(new, graphs), vocabulary)
        _check_differences(differences, dtype, folder)
        tokens = token_lines(
            model.detokenize, vocabulary, model.searcher.blank_index
        )
        if tokens:
            text = "".join(f"{line}\n" for line in tokens)
            (new / TOKENS).write_text(text, encoding="utf-8")
        write_json(
            new / DESCRIPTION,
            describe(model, graphs, dtype, vocabulary, tokens),
        )
        sizes = {p.name: p.stat().st_size / 1e6 for p in sorted(new.iterdir())}
    return ExportReport(
        str(output),
        dtype,
        sizes,
        differences,
        max(differences.values()),
        seconds,
        model.latency()["segment"],
    )


def checked_parts(folder, output, to, dtype, overwrite):
    """Return model, parts and vocabulary size of what may be exported."""
    if to != "onnx":
        raise ValueError(f"to={to!r}: expected 'onnx'")
    if dtype not in TOLERANCE:
        raise ValueError(
            f"dtype={dtype!r}: expected 'fp32', 'fp16' or 'int8' (on a CPU "
            "onnxruntime computes nothing else)"
        )
    _check_output(Path(output), Path(folder), overwrite)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        needed(module)
    model = load_transcriber(folder)
    return model, *_graphs(model)


@torch.no_grad()
def _graphs(model):
    """Return the parts of a model by name, and the size of the vocabulary."""
    searcher = model.searcher
    graphs = {
        "frontend": FrontendGraph(model),
        "encoder": EncoderGraph(model),
        "predictor": PredictorGraph(searcher.predictor, searcher.blank_index),
    }
    widths = [
        graph(*graph.example)[0].shape[-1]
        for name, graph in graphs.items()
        if name != "frontend"
    ]
    joint = graphs["joint"] = JointGraph(searcher.joint, *widths)
    return graphs, joint(*joint.example).shape[-1]


def _refusal(model, name, error):
    part = getattr(model, name, None) or getattr(model.searcher, name, model)
    text = " ".join(str(error).split())[:300]
    return f"{name} {type(part).__name__} cannot be exported: {text}"


def _check_differences(differences, dtype, folder):
    for part, value in differences.items():
        # NaN is not below.
        if not value <= TOLERANCE[dtype]:
            raise ValueError(
                f"{folder}: the exported {part} differs by {value:.2g} from "
                f"the model; expected {TOLERANCE[dtype]:g} or less in {dtype}. "
                "Nothing was written"
            )


def _check_output(output, folder, overwrite):
    here = output.resolve()
    if here in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(
            f"{output}: is (or holds) the model itself; name another output"
        )
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{output}: exists already; choose another name or use "
            "overwrite=True"
        )
    if not (output / DESCRIPTION).is_file():
        raise ValueError(
            f"{output}: is no export (it has no {DESCRIPTION}), and is not "
            "replaced; choose another name"
        )
