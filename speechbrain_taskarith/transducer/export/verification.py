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
def compare(model, exported):
    """Return the largest difference by part, and seconds of an encoder step.

    On random samples, features and labels. A difference is absolute for small
    numbers and relative for large ones: |a - b| / (1 + |b|).
    """
    made = torch.Generator().manual_seed(0)
    frontend, encoder = (exported.graphs[n] for n in ("frontend", "encoder"))
    worst = {}

    def note(part, found, expected):
        expected = np.asarray(expected)
        error = np.abs(found - expected) / (1 + np.abs(expected))
        # NaN is larger than all.
        worst[part] = float(np.max([worst.get(part, 0.0), error.max()]))

    chunk = encoder.example[0].shape[1]
    step = model.encoder.segment_length * model.factor
    frames = chunk + int(_SEGMENTS * step)
    count = (frames - 1) * frontend.hop + 1
    wave = torch.randn(1, count, generator=made)
    ends = (
        frontend.padding,
        (frames - 1) * frontend.hop
        + frontend.window
        - frontend.padding
        - count,
    )
    found = exported.run("frontend", {}, torch.nn.functional.pad(wave, ends))
    features = model.features(wave)
    if model.normalize is not None:
        features = model.normalize(features, torch.ones(1))
    note("frontend", found, features)

    x = features
    if model.frontend is not None:
        x, _ = model.frontend(x)
    size = model.encoder.segment_length
    context, states = model.encoder.make_streaming_context(1), {}
    states, outs, seconds = exported.start("encoder"), [], []
    for number, start in enumerate(range(0, x.shape[1], size)):
        expected = model.encoder.forward_streaming(
            x[:, start : start + size + model.encoder.right_context], context
        )
        part = features[:, number * step : number * step + chunk]
        length = part.shape[1]
        part = torch.nn.functional.pad(part, (0, 0, 0, chunk - length))
        began = time.perf_counter()
        out = exported.run("encoder", states, part, [length])
        seconds.append(time.perf_counter() - began)
        note("encoder", out[:, : expected.shape[1]], expected)
        outs.append(expected[0])
    outs = torch.cat(outs)

    searcher = model.searcher
    vocabulary = len(searcher.joint.log_probs(*_projected(exported))[0])
    labels = torch.randint(vocabulary, (len(outs),), generator=made)
    labels[0] = searcher.blank_index
    states, expected = exported.start("predictor"), None
    states = {name: value[:, :1] for name, value in states.items()}
    for frame, label in zip(outs, labels):
        out, expected = searcher.predictor(label[None, None], expected)
        found = exported.run("predictor", states, label[None, None])
        note("predictor", found, out[:, 0])
        scores = searcher.joint.log_probs(
            searcher.joint.project_encoder(frame[None]),
            searcher.joint.project_predictor(out[:, 0]),
        )
        note("joint", exported.run("joint", {}, frame[None], out[:, 0]), scores)
    return worst, float(np.median(seconds[1:]))


def _projected(exported):
    joint = exported.graphs["joint"]
    encoder, predictor = joint.example
    return (
        joint.joint.project_encoder(encoder),
        joint.joint.project_predictor(predictor),
    )
