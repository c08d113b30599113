"""Exported files against the recogniser that they were made of."""

import time

import numpy as np
import torch

from speechbrain_taskarith.transducer.export.writing import needed

# Several segments, and a last one that is not whole.
_SEGMENTS = 5.4


class Exported:
    """The files of a folder in onnxruntime, on one thread."""

    def __init__(self, folder, graphs):
        runtime = needed()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.graphs = graphs
        self.sessions = {
            name: runtime.InferenceSession(
                str(folder / f"{name}.onnx"),
                options,
                providers=["CPUExecutionProvider"],
            )
            for name in graphs
        }

    def start(self, name):
        """Return a part's states at the beginning of a stream."""
        graph = self.graphs[name]
        given = dict(zip(graph.inputs, graph.example))
        return {n: np.zeros_like(given[n].numpy()) for n in graph.states}

    def run(self, name, states, *given):
        """Run a part; return its first output, and change the states."""
        graph = self.graphs[name]
        feed = dict(zip(graph.inputs, map(np.asarray, given)))
        out = self.sessions[name].run(list(graph.outputs), {**feed, **states})
        named = dict(zip(graph.outputs, out))
        states.update({n: named[new] for n, new in graph.states.items()})
        return out[0]


@torch.no_grad()
def compare(model, exported, vocabulary):
    """Return the largest difference by part, and seconds of an encoder step.

    On random samples, features and labels. A difference is absolute for small
    numbers and relative for large ones: |a - b| / (1 + |b|).
    """
    made = torch.Generator().manual_seed(0)
    worst = {}

    def note(part, found, expected):
        expected = np.asarray(expected)
        error = np.abs(found - expected) / (1 + np.abs(expected))
        # NaN is larger than all.
        worst[part] = float(np.max([worst.get(part, 0.0), error.max()]))

    features = _compare_frontend(model, exported, note, made)
    frames, seconds = _compare_encoder(model, exported, note, features)
    labels = torch.randint(vocabulary, (len(frames),), generator=made)
    labels[0] = model.searcher.blank_index
    _compare_search(model, exported, note, frames, labels)
    return worst, seconds


def _compare_frontend(model, exported, note, made):
    """Return the features of samples."""
    frontend, encoder = (exported.graphs[n] for n in ("frontend", "encoder"))
    step = model.encoder.segment_length * model.factor
    frames = encoder.example[0].shape[1] + int(_SEGMENTS * step)
    last = (frames - 1) * frontend.hop
    wave = torch.randn(1, last + 1, generator=made)
    ends = frontend.padding, frontend.window - frontend.padding - 1
    features = model.features(wave)
    if model.normalize is not None:
        features = model.normalize(features, torch.ones(1))
    padded = torch.nn.functional.pad(wave, ends)
    note("frontend", exported.run("frontend", {}, padded), features)
    return features


def _compare_encoder(model, exported, note, features):
    """Return the model's output [frames, E], and seconds of a step."""
    encoder, x = model.encoder, features
    if model.frontend is not None:
        x, _ = model.frontend(x)
    size, outs, seconds = encoder.segment_length, [], []
    context = encoder.make_streaming_context(1)
    states = exported.start("encoder")
    chunk = exported.graphs["encoder"].example[0].shape[1]
    for start in range(0, x.shape[1], size):
        given = x[:, start : start + size + encoder.right_context]
        expected = encoder.forward_streaming(given, context)
        part = features[:, start * model.factor :][:, :chunk]
        length = part.shape[1]
        part = torch.nn.functional.pad(part, (0, 0, 0, chunk - length))
        began = time.perf_counter()
        out = exported.run("encoder", states, part, [length])
        seconds.append(time.perf_counter() - began)
        note("encoder", out[:, : expected.shape[1]], expected)
        outs.append(expected[0])
    return torch.cat(outs), float(np.median(seconds))


def _compare_search(model, exported, note, frames, labels):
    """Read a label at each frame, from the beginning of a stream on."""
    predictor, joint = model.searcher.predictor, model.searcher.joint
    states, state = exported.start("predictor"), None
    states = {name: value[:, :1] for name, value in states.items()}
    for frame, label in zip(frames[:, None], labels):
        out, state = predictor(label[None, None], state)
        found = exported.run("predictor", states, label[None, None])
        note("predictor", found, out[:, 0])
        projected = joint.project_predictor(out[:, 0])
        scores = joint.log_probs(joint.project_encoder(frame), projected)
        note("joint", exported.run("joint", {}, frame, out[:, 0]), scores)
