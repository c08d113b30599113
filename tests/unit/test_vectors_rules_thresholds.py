"""The exact k-th largest of what streams by: sample, histograms, ties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_taskarith.vectors.engine import thresholds
from speechbrain_taskarith.vectors.engine.streaming import MemoryVectors, Stream
from speechbrain_taskarith.vectors.engine.thresholds import find_cuts


def oracle(numbers, k):
    """Which of the numbers survive: largest first, then first come."""
    order = np.argsort(-np.abs(numbers.astype(np.float64)), kind="stable")
    mask = np.zeros(len(numbers), bool)
    mask[order[:k]] = True
    return mask


def found(vectors, share, scope, chunk=1000, threads=1):
    """The masks that the cuts give, chunk by chunk."""
    stream = Stream(MemoryVectors(vectors), (), chunk, threads)
    (tables,) = find_cuts(stream, [share], scope)
    masks = [{n: [] for n in vectors[0]} for _ in vectors]
    work = stream.passes.workspace
    for place in stream.places():
        for index, table in enumerate(tables):
            tau = stream.vector(index, place, work)
            bits = thresholds.magnitude_bits(tau, work)
            mask = table[place.name].mask(bits, place, work)
            masks[index][place.name].append(mask.copy())
    return [{n: np.concatenate(parts) for n, parts in m.items()} for m in masks]


def check(vectors, share, scope, **how):
    masks = found(vectors, share, scope, **how)
    for vector, mask in zip(vectors, masks):
        groups = [list(vector)] if scope == "global" else [[n] for n in vector]
        for names in groups:
            numbers = np.concatenate([vector[n].numpy() for n in names])
            got = np.concatenate([mask[n] for n in names])
            k = round(share * len(numbers))
            assert got.sum() == k
            assert np.array_equal(got, oracle(numbers, k))


def many(kind, size=60_000):
    generator = torch.Generator().manual_seed(0)
    vectors = []
    for index in range(2):
        a = torch.randn(size, generator=generator)
        b = torch.randn(size // 3, generator=generator) * 5
        if kind == "bfloat16":
            a, b = a.bfloat16().float(), b.bfloat16().float()
        elif kind == "mostly zero":
            a[torch.rand(size, generator=generator) < 0.9] = 0
        elif kind == "constant":
            a, b = torch.full_like(a, -2.0), torch.full_like(b, 2.0)
        elif kind == "sorted":
            a, b = a.sort().values, b.sort().values
        elif kind == "few levels":
            a, b = a.round(), b.round()
        elif kind == "subnormal":
            a, b = a * 1e-40, b * 1e-40
        vectors.append({"a": a, "b": b, "c": a[:7].clone() + index})
    return vectors


KINDS = ["normal", "bfloat16", "mostly zero", "constant", "sorted",
         "few levels", "subnormal"]  # fmt: skip


@pytest.fixture(params=["collect all", "sample", "misled", "histograms"])
def way(request, monkeypatch):
    """Which of the ways to the threshold is taken."""
    if request.param == "collect all":
        return request.param
    monkeypatch.setattr(thresholds, "_SMALL", 1000)
    monkeypatch.setattr(thresholds, "_SMALLEST_SAMPLE", 1 << 12)
    monkeypatch.setattr(thresholds, "_SAMPLED_RUN", 64)
    if request.param == "misled":
        # A bracket that is far too narrow misses nearly always.
        monkeypatch.setattr(thresholds, "_ERRORS", 0.0)
    if request.param == "histograms":
        # No room: whatever is collected is too much.
        monkeypatch.setattr(thresholds, "_SMALL", -1)
        monkeypatch.setattr(thresholds, "_LARGEST_SHARE", 0.0)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_exactly_k_survive_and_they_are_the_right_ones(way, kind, scope):
    vectors = many(kind)
    for share in (1e-5, 0.2, 0.5, 0.9):
        check(vectors, share, scope, chunk=5000)


def test_a_sweep_is_enough_when_the_sample_is_good(monkeypatch):
    sweeps = []
    original = thresholds._sweep

    def counted(stream, searches, look, decide):
        sweeps.append(len(searches))
        return original(stream, searches, look, decide)

    monkeypatch.setattr(thresholds, "_sweep", counted)
    check(many("normal", 600_000), 0.2, "global", chunk=1 << 16)
    assert sweeps == [2, 0, 0, 0]


def test_what_is_collected_stays_small():
    """Of a million numbers, the bracket holds a few in a hundred."""
    held = []
    original = thresholds._Search.select

    def watched(self):
        held.append(self.held)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds._Search, "select", watched)
        vectors = [{"w": torch.randn(1 << 20)}]
        check(vectors, 0.2, "global", chunk=1 << 16)
    assert held[0] < 0.1 * (1 << 20)


@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    cut=st.integers(0, 60),
    share=st.floats(0, 1),
    chunk=st.integers(1, 20),
    threads=st.integers(1, 3),
)
def test_ties_are_broken_by_position(levels, cut, share, chunk, threads):
    numbers = torch.tensor(levels, dtype=torch.float32)
    vector = {"a": numbers[:cut].clone(), "b": numbers[cut:].clone()}
    vector = {n: v for n, v in vector.items() if len(v)}
    for scope in ("global", "tensor"):
        check([vector], share, scope, chunk=chunk, threads=threads)
