"""A small encoder with everything that adapters have to live with."""

import math

import numpy as np
import torch

from speechbrain_taskarith.adapters import AdapterBank


class ToyLayer(torch.nn.Module):
    """Convolution, BatchNorm, dropout; returns a tuple, as SpeechBrain's."""

    def __init__(self, width):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.mix = torch.nn.Conv1d(width, width, 3, padding=1)
        self.statistics = torch.nn.BatchNorm1d(width)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x):
        mixed = self.statistics(self.mix(self.norm(x).transpose(1, 2)))
        return x + self.dropout(mixed.transpose(1, 2)), None


class ToyEncoder(torch.nn.Module):
    """Three layers of width 8."""

    def __init__(self, width=8, layers=3):
        super().__init__()
        self.front = torch.nn.Linear(4, width)
        self.layers = torch.nn.ModuleList(
            ToyLayer(width) for _ in range(layers)
        )

    def forward(self, x):
        x = self.front(x)
        for layer in self.layers:
            x, _ = layer(x)
        return x


def scramble(module, seed=0, scale=0.3):
    """Give every parameter values that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((scale * noise).to(parameter))


def make_bank(number=3, width=8, bottleneck=4, dtype=torch.float64, **others):
    """Return a bank whose adapters all do something."""
    names = [f"task {i}" for i in range(number)]
    bank = AdapterBank(names, width, bottleneck, **others).to(dtype)
    scramble(bank, seed=number)
    return bank


def numbers(tensor):
    return tensor.detach().double().numpy()


def naive_adapter(adapter, frame):
    """a(x) for one frame, from the formula, in NumPy float64."""
    x = frame
    if adapter.norm is not None:
        variance = ((x - x.mean()) ** 2).mean()
        x = (x - x.mean()) / math.sqrt(variance + adapter.norm.eps)
        x = x * numbers(adapter.norm.weight) + numbers(adapter.norm.bias)
    z = numbers(adapter.down.weight) @ x + numbers(adapter.down.bias)
    h = z / (1 + np.exp(-z))  # SiLU
    return numbers(adapter.up.weight) @ h + numbers(adapter.up.bias)


def naive_norm(norm, o):
    variance = ((o - o.mean()) ** 2).mean()
    o = (o - o.mean()) / math.sqrt(variance + norm.eps)
    return o * numbers(norm.weight) + numbers(norm.bias)


def naive_fusion(fusion, frame):
    """o for one frame, from the formula, and its weights."""
    outputs = [naive_adapter(fusion.bank[n], frame) for n in fusion.names]
    query = numbers(fusion.query.weight) @ frame + numbers(fusion.query.bias)
    scores = np.array(
        [query @ (numbers(fusion.key.weight) @ a) for a in outputs]
    )
    if fusion.scaled:
        scores = scores / math.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    weights = weights / weights.sum()
    value = numbers(fusion.value.weight)
    return sum(w * (value @ a) for w, a in zip(weights, outputs)), weights
