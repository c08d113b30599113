"""The parts of a recogniser as modules of fixed shape, one a file.

Each has `example`, its inputs; `inputs` and `outputs`, their names; and
`states`, `{input: output}` of what is handed from one call to the next and is
0 at the beginning of a stream.
"""

import copy
import math

import torch
from speechbrain.lobes.features import Fbank
from torch.utils._pytree import tree_flatten, tree_unflatten

from speechbrain_taskarith.transducer.export.conformer import (
    ConformerStep,
    newest,
)
from speechbrain_taskarith.transducer.streaming.chunked_encoder import (
    ChunkedEncoder,
)
from speechbrain_taskarith.transducer.streaming.emformer import (
    Emformer,
)


class FrontendGraph(torch.nn.Module):
    """Samples [1, n] to normalised features [1, frames, width].

    Not centred: frame i is made of `window` samples from `i * hop` on. The
    spectrum is a convolution with the windowed Fourier basis; its phase, which
    the magnitude does not have, depends on where the window begins.
    """

    inputs, outputs, states = ("samples",), ("features",), {}

    def __init__(self, model):
        super().__init__()
        features = model.features
        if not isinstance(features, Fbank) or math.isfinite(
            features.compute_fbanks.top_db
        ):
            raise ValueError(
                f"features {type(features).__name__} cannot be exported: "
                "expected LocalFbank, whose frames depend on their own "
                "samples alone"
            )
        stft, bank = features.compute_STFT, features.compute_fbanks
        self.window, self.hop = stft.win_length, stft.hop_length
        # What a centred analysis puts in front of the first sample.
        self.padding = stft.n_fft // 2 - (stft.n_fft - self.window) // 2
        angle = torch.outer(
            torch.arange(bank.n_stft).double(),
            torch.arange(self.window).double(),
        ) * (2 * math.pi / stft.n_fft)
        basis = torch.stack((angle.cos(), angle.sin())) * stft.window.double()
        self.register_buffer("basis", basis.flatten(0, 1)[:, None].float())
        # As the bank has them, whatever their shape.
        linear = copy.deepcopy(bank)
        linear.log_mel = False
        mels = linear(torch.eye(bank.n_stft)[None])[0].detach()
        self.register_buffer("mels", mels)
        self.floor, self.multiplier = bank.amin, float(bank.multiplier)
        self.reference = self.multiplier * bank.db_multiplier
        mean, std = torch.zeros(1), torch.ones(1)
        if (normalize := model.normalize) is not None:
            mean = torch.as_tensor(normalize.glob_mean).float()
            if normalize.std_norm:
                std = torch.as_tensor(normalize.glob_std).float()
            std = std.clamp(min=normalize.epsilon)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.example = (torch.zeros(1, self.window + 3 * self.hop),)
        self.shapes = ({1: torch.export.Dim("count", min=self.window)},)

    def forward(self, samples):
        """Analyse some frames."""
        parts = torch.nn.functional.conv1d(
            samples[:, None], self.basis, stride=self.hop
        )
        real, imaginary = parts.chunk(2, 1)
        power = (real.square() + imaginary.square()).transpose(1, 2)
        energies = (power @ self.mels).clamp(min=self.floor)
        x = self.multiplier * energies.log10() - self.reference
        return (x - self.mean) / self.std


class EncoderGraph(torch.nn.Module):
    """One step: features [1, n, width] of a segment and what it looks ahead.

    `length` [1] of them exist, fewer at the end of a stream. `seen` [1] counts
    the encoder's frames so far: what the other states hold of them is valid.
    """

    def __init__(self, model):
        super().__init__()
        encoder = model.encoder
        self.frontend, self.factor = model.frontend, model.factor
        self.segment = encoder.segment_length
        frames = self.segment + encoder.right_context
        if isinstance(encoder, Emformer):
            self.step = _EmformerStep(encoder)
        elif isinstance(encoder, ChunkedEncoder):
            self.step = ConformerStep(encoder)
        else:
            raise ValueError(
                f"encoder {type(encoder).__name__} cannot be exported; "
                "expected Emformer or ChunkedEncoder"
            )
        width = model.features.compute_fbanks.n_mels
        kept = self.step.shapes()
        self.kept = [name for name, shape in kept.items() if 0 not in shape]
        names = [*self.kept, "seen"]
        self.inputs = ("features", "length", *names)
        self.outputs = (
            "encoder_out",
            "out_length",
            *(f"new_{n}" for n in names),
        )
        self.states = {name: f"new_{name}" for name in names}
        count = frames * self.factor
        self.example = (
            torch.zeros(1, count, width),
            torch.tensor([count]),
            *(torch.zeros(kept[name]) for name in self.kept),
            torch.zeros(1, dtype=torch.long),
        )
        self.shapes = None

    def forward(self, features, length, *states):
        """Encode a segment."""
        *kept, seen = states
        there = torch.arange(features.shape[1]) < length
        x = features.masked_fill(~there[None, :, None], 0.0)
        if self.frontend is not None:
            x, _ = self.frontend(x)
        frames = (length + self.factor - 1) // self.factor
        own = (torch.arange(x.shape[1]) < frames)[None]
        out, kept = self.step(x, own, seen, dict(zip(self.kept, kept)))
        out_length = frames.clamp(max=self.segment)
        kept = [kept[name] for name in self.kept]
        return out[:, : self.segment], out_length, *kept, seen + out_length


class _EmformerStep(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def shapes(self):
        layers, width = len(self.encoder.layers), self.encoder.input_dim
        return {
            "left": (layers, 1, self.encoder.left_context, 2 * width),
            "memory": (layers, 1, self.encoder.memory_size, width),
        }

    def forward(self, x, own, seen, kept):
        encoder = self.encoder
        context = encoder.make_streaming_context(1)
        segments = (seen + encoder.segment_length - 1) // encoder.segment_length
        context.left_mask = newest(encoder.left_context, seen)
        context.memory_mask = newest(encoder.memory_size, segments)
        for name, value in kept.items():
            setattr(context, name, list(value.unbind(0)))
        out = encoder.encode_segment(x, own, context)
        return out, {n: torch.stack(getattr(context, n)) for n in kept}


class PredictorGraph(torch.nn.Module):
    """A label [n, 1] and the state; the blank and zeros at the beginning."""

    def __init__(self, predictor, blank_index):
        super().__init__()
        self.predictor = predictor
        # Two rows: a dimension of one would be taken for a constant.
        label = torch.full((2, 1), blank_index)
        with torch.no_grad():
            state = predictor(label)[1]
        leaves, self.structure = tree_flatten(state)
        names = [f"state_{number}" for number in range(len(leaves))]
        self.inputs = ("label", *names)
        self.outputs = ("predictor_out", *(f"new_{name}" for name in names))
        self.states = {name: f"new_{name}" for name in names}
        self.example = (label, *map(torch.zeros_like, leaves))
        rows = torch.export.Dim("rows")
        self.shapes = ({0: rows}, tuple({1: rows} for _ in leaves))

    def forward(self, label, *states):
        """Read a label."""
        state = tree_unflatten(list(states), self.structure) if states else None
        out, state = self.predictor(label, state)
        return out[:, 0], *tree_flatten(state)[0]


class JointGraph(torch.nn.Module):
    """An encoder's frame [n, E] and a predictor's output [n, P]."""

    inputs, outputs = ("encoder_out", "predictor_out"), ("log_probs",)
    states = {}

    def __init__(self, joint, encoder_dim, predictor_dim):
        super().__init__()
        self.joint = joint
        self.example = (
            torch.zeros(2, encoder_dim),
            torch.zeros(2, predictor_dim),
        )
        rows = torch.export.Dim("rows")
        self.shapes = ({0: rows}, {0: rows})

    def forward(self, encoder_out, predictor_out):
        """Score blank and labels, [n, V]."""
        return self.joint.log_probs(
            self.joint.project_encoder(encoder_out),
            self.joint.project_predictor(predictor_out),
        )
