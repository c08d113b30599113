"""Comparing task vectors against NumPy over flat float64 vectors."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_taskarith.vectors import TaskVector, analysis, save_state
from speechbrain_taskarith.vectors.analysis import (
    cosine_matrix,
    layer_norms,
    plot_cosine_matrix,
    plot_layer_norms,
    sign_agreement,
)

SHAPES = {
    "front.weight": (3, 5),
    "encoder.layers.0.weight": (7, 4),
    "encoder.layers.1.weight": (7, 4),
    "encoder.layers.10.weight": (11,),
    "encoder.scalar": (),
    "empty": (0,),
}


def vectors(count, seed, zeros=0.0):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        vector = {}
        for name, shape in SHAPES.items():
            tensor = torch.randn(shape, generator=generator)
            keep = torch.rand(shape, generator=generator) >= zeros
            vector[name] = tensor * keep
        result.append(vector)
    return result


def flat(vector):
    parts = [tensor.double().flatten().numpy() for tensor in vector.values()]
    return np.concatenate(parts)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000), st.integers(1, 40))
def test_cosines_match_numpy_whatever_the_block(count, seed, block):
    taus = vectors(count, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "_BLOCK", block)
        got = cosine_matrix(taus)
    rows = np.stack([flat(tau) for tau in taus])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), rows @ rows.T, atol=1e-12)
    assert (got.diagonal() == 1).all()
    assert torch.equal(got, got.T)


def test_scale_and_sign():
    (tau,) = vectors(1, 0)
    others = [{k: s * v for k, v in tau.items()} for s in (1e-3, -1e4)]
    expected = [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
    got = cosine_matrix([tau, *others])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-7)
    assert got.abs().max() <= 1.0


def test_sums_are_in_float64():
    # In float32 a product of 0.25 vanishes beside 4096^2: the result would
    # be 1 exactly.
    a = {"w": torch.cat([torch.tensor([4096.0]), torch.full((1000,), 0.5)])}
    b = {"w": torch.cat([torch.tensor([4096.0]), torch.full((1000,), -0.5)])}
    dot = 4096.0**2 - 250
    norm = 4096.0**2 + 250
    got = cosine_matrix([a, b])[0, 1].item()
    assert got == pytest.approx(dot / norm, rel=1e-14)


def test_half_precision_vectors():
    taus = vectors(2, 1)
    halves = [{k: v.bfloat16() for k, v in tau.items()} for tau in taus]
    exact = cosine_matrix(
        [{k: v.float() for k, v in h.items()} for h in halves]
    )
    assert torch.equal(cosine_matrix(halves), exact)


def test_a_zero_vector_has_cosine_zero_and_a_warning(caplog):
    (tau,) = vectors(1, 0)
    zero = {k: torch.zeros_like(v) for k, v in tau.items()}
    with caplog.at_level(logging.WARNING):
        got = cosine_matrix([tau, zero])
    assert got.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert "vector 1 is zero" in caplog.text
    assert "vector 0" not in caplog.text


def test_patterns_choose_parameters():
    a, b = vectors(2, 0)
    part = ["encoder.layers.1.weight", "encoder.scalar"]
    expected = cosine_matrix([{n: t[n] for n in part} for t in (a, b)])
    assert torch.equal(cosine_matrix([a, b], include=part), expected)
    everything_else = [name for name in SHAPES if name not in part]
    assert torch.equal(cosine_matrix([a, b], exclude=everything_else), expected)
    with pytest.raises(ValueError, match="decoder"):
        cosine_matrix([a, b], include="decoder.*")


@pytest.mark.parametrize("measure", [cosine_matrix, sign_agreement])
def test_vectors_that_do_not_fit_are_named(measure):
    a, b = vectors(2, 0)
    with pytest.raises(ValueError, match="no task vectors"):
        measure([])
    with pytest.raises(ValueError, match="0 and 1 .* same parameters: extra"):
        measure([a, {**b, "extra": torch.ones(1)}])
    with pytest.raises(ValueError, match="same parameters: empty"):
        measure([a, {k: v for k, v in b.items() if k != "empty"}])
    with pytest.raises(ValueError, match="'front.weight' has the shapes"):
        measure([a, {**b, "front.weight": torch.ones(5, 3)}])
    for bad in (math.nan, math.inf):
        b["encoder.scalar"] = torch.tensor(bad)
        with pytest.raises(ValueError, match="vector 1: 'encoder.scalar'"):
            measure([a, b])


def test_stored_vectors_and_models_are_taken(tmp_path):
    a, b = map(TaskVector, vectors(2, 0))
    paths = [a.save(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"]
    b.save(paths[1], encoding="sparse")
    for measure in (cosine_matrix, sign_agreement):
        assert torch.equal(measure(paths), measure([a, b]))
        assert measure(a).shape == measure(paths[0]).shape == (1, 1)
        with pytest.raises(TypeError, match="expected a TaskVector.*got int"):
            measure([a, 1])
    cosine = a.cosine(b)
    assert a.cosine(dict(b)) == a.cosine(paths[1]) == cosine
    assert a.dot(paths[1]) == a.dot(b)
    base = save_state(dict(b), tmp_path / "base.ckpt")
    assert layer_norms(paths[0], base=base) == layer_norms(a, base=dict(b))


def test_order_of_names_does_not_matter():
    a, b = vectors(2, 0)
    turned = dict(reversed(b.items()))
    assert torch.equal(cosine_matrix([a, b]), cosine_matrix([a, turned]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000), st.floats(0, 0.8))
def test_sign_agreement_by_counting(count, seed, zeros):
    taus = vectors(count, seed, zeros)
    got = sign_agreement(taus).numpy()
    rows = [flat(tau) for tau in taus]
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            both = [(x, y) for x, y in zip(a, b) if x != 0 and y != 0]
            if not both:
                assert math.isnan(got[i, j])
                continue
            agree = sum((x > 0) == (y > 0) for x, y in both)
            assert got[i, j] == pytest.approx(agree / len(both), abs=1e-12)


def test_no_shared_entry_is_nan_with_a_warning(caplog):
    a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    with caplog.at_level(logging.WARNING):
        got = sign_agreement([a, b])
    assert math.isnan(got[0, 1]) and got[0, 0] == 1.0
    assert "vectors 0 and 1 share no" in caplog.text


def test_norms_match_numpy_and_add_up():
    (tau,) = vectors(1, 0)
    norms = layer_norms(tau, depth=2)
    for layer, norm in norms.items():
        parts = {
            name: tensor
            for name, tensor in tau.items()
            if ".".join(name.split(".")[:2]) == layer
        }
        assert norm == pytest.approx(np.linalg.norm(flat(parts)), rel=1e-12)
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    assert total == pytest.approx(np.linalg.norm(flat(tau)), rel=1e-12)
    assert norms["empty"] == 0.0


@pytest.mark.parametrize(
    "name, layer",
    [
        ("1.encoder.layers.3.norm.weight", "1.encoder.layers.3"),
        ("model.encoder.layers.11.fc1.bias", "model.encoder.layers.11"),
        ("0.convblock_0.convs.conv_0.weight", "0.convblock_0.convs.conv_0"),
        ("2.w.weight", "2.w"),
        ("0.weight", "0"),
        ("weight", "weight"),
        ("net.0.1.weight", "net.0"),
    ],
)
def test_default_layers(name, layer):
    assert list(layer_norms({name: torch.ones(2)})) == [layer]


def test_layers_come_in_the_models_order():
    names = [
        "front.weight",
        "enc.layers.10.a",
        "enc.layers.2.b",
        "enc.norm.weight",
        "ctc.weight",
    ]
    got = layer_norms({name: torch.ones(1) for name in names})
    assert list(got) == [
        "front",
        "enc.layers.2",
        "enc.layers.10",
        "enc.norm",
        "ctc",
    ]


def test_depth_is_counted_in_parts():
    (tau,) = vectors(1, 0)
    assert list(layer_norms(tau, depth=1)) == ["front", "encoder", "empty"]
    assert len(layer_norms(tau, depth=9)) == len(tau)
    with pytest.raises(ValueError, match="depth is 0"):
        layer_norms(tau, depth=0)


def test_norms_relative_to_the_base():
    tau = {"a.0.w": torch.tensor([3.0, 4.0]), "b.w": torch.zeros(2)}
    base = {
        "a.0.w": torch.tensor([0.0, 10.0]),
        "b.w": torch.zeros(2),
        "more": torch.ones(1),
    }
    assert layer_norms(tau, base=base) == {"a.0": 0.5, "b": 0.0}
    grown = {**base, "b.w": torch.zeros(3)}
    with pytest.raises(ValueError, match="'b.w' has shape .2,."):
        layer_norms(tau, base=grown)
    with pytest.raises(ValueError, match="no parameter 'b.w'"):
        layer_norms(tau, base={"a.0.w": base["a.0.w"]})


def test_nan_is_named():
    with pytest.raises(ValueError, match="'w' holds NaN"):
        layer_norms({"w": torch.tensor([math.nan])})


def test_plots(tmp_path):
    taus = dict(zip(["news", "music"], vectors(2, 0)))
    matrix = cosine_matrix(taus.values())
    norms = {name: layer_norms(tau) for name, tau in taus.items()}
    many = {str(i): norms["news"] for i in range(6)}
    paths = [
        plot_cosine_matrix(matrix, list(taus), tmp_path / "cosine.png"),
        plot_layer_norms(norms["news"], tmp_path / "one.png"),
        plot_layer_norms(norms, tmp_path / "two.png", relative=True),
        plot_layer_norms(many, tmp_path / "many.png"),
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="2 vectors, there are 1 names"):
        plot_cosine_matrix(matrix, ["news"], tmp_path / "bad.png")
