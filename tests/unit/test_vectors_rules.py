"""Merging rules against `rules.reference`: the papers' formulas in float64."""

import hashlib
import math
import pickle
import re

import numpy as np
import pytest
import torch
from rules_toy import SHAPES, make

import speechbrain_taskarith.vectors as vectors_room
from speechbrain_taskarith.vectors import (
    TaskVector,
)
from speechbrain_taskarith.vectors.rules import (
    DARE,
    DELLA,
    PCB,
    SCE,
    SLERP,
    TIES,
    TSVM,
    BoostedTSVM,
    Breadcrumbs,
    ByLayer,
    Fisher,
    IsoC,
    IsoCTS,
    Karcher,
    LinearAverage,
    LiNeS,
    Merge,
    ModelStock,
    MultiSLERP,
    Rule,
    TaskArithmetic,
    from_description,
    reference,
)
from speechbrain_taskarith.vectors.rules.description import RULES, rule_class
from speechbrain_taskarith.vectors.rules.sparsifying.dare import RandomDrop
from speechbrain_taskarith.vectors.rules.sparsifying.ties import Magnitude


def wide(vector):
    """The whole vector as a list of Python floats, in order."""
    return [x for value in vector.values() for x in value.flatten().tolist()]


def unwide(numbers, like):
    out, begin = {}, 0
    for name, value in like.items():
        end = begin + value.numel()
        flat = torch.tensor(numbers[begin:end], dtype=torch.float64)
        out[name], begin = flat.reshape(value.shape), end
    return out


def assert_close(merged, expected, rtol=2e-6, atol=2e-6):
    assert list(merged) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            merged[name].double(), value.double(), rtol=rtol, atol=atol
        )


# ------------------------------------------------------------------ tests


@pytest.mark.parametrize("number", [1, 2, 5])
def test_linear_rules(number):
    vectors = make(number)
    weights = [0.5 + i for i in range(number)]
    columns = list(zip(*map(wide, vectors)))
    total = [sum(w * x for w, x in zip(weights, c)) for c in columns]
    mean = [x / sum(weights) for x in total]
    assert_close(
        TaskArithmetic(weights=weights).combine(vectors),
        unwide(total, vectors[0]),
    )
    assert_close(
        LinearAverage(weights).combine(vectors), unwide(mean, vectors[0])
    )
    plain = [sum(c) / number for c in columns]
    assert_close(
        Merge(combination="mean").combine(vectors), unwide(plain, vectors[0])
    )


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("elect", ["mass", "count"])
@pytest.mark.parametrize("density", [0, 0.07, 0.2, 0.5, 0.93, 1])
@pytest.mark.parametrize("levels", [None, 1, 3])
def test_ties(density, elect, scope, levels):
    for number in (1, 2, 3):
        vectors = make(number, seed=number, levels=levels)
        merged = TIES(density, trim=scope, elect=elect).combine(vectors)
        expected = reference.ties(vectors, density, scope, elect)
        assert_close(merged, expected)


@pytest.mark.parametrize(
    ("others", "expected"), [([3.0, 2.0], 1.0), ([-3.0, -2.0], -1.0)]
)
def test_ties_zero_sum_takes_the_majority_sign(others, expected):
    vectors = [
        {"w": torch.tensor([1.0, *others])},
        {"w": torch.tensor([-1.0, *others])},
    ]
    merged = TIES(density=1).combine(vectors)["w"]
    assert merged.tolist() == [expected, *others]


def test_ties_without_any_majority_is_zero():
    vectors = [
        {"w": torch.tensor([1.0, 2.0, -2.0])},
        {"w": torch.tensor([-1.0, 2.0, -2.0])},
    ]
    assert TIES(1).combine(vectors)["w"].tolist() == [0.0, 2.0, -2.0]


def test_one_vector_ties_is_magnitude_trimming():
    (vector,) = make(1, seed=5)
    merged = TIES(density=0.3).combine([vector])
    expected = reference.trim(torch.tensor(wide(vector)), 0.3)
    assert wide(merged) == expected.tolist()


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.1), (0, 0)])
def test_breadcrumbs(density, gamma, levels):
    vectors = make(3, seed=2, levels=levels)
    expected = reference.breadcrumbs(vectors, density, gamma)
    assert_close(Breadcrumbs(density, gamma).combine(vectors), expected)


def test_dare_entries_and_expectation():
    vector = {"w": torch.linspace(1, 2, 200_000)}
    for drop in (0.0, 0.3, 0.9):
        merged = DARE(drop, seed=1).combine([vector])["w"]
        kept = merged != 0
        torch.testing.assert_close(merged[kept], vector["w"][kept] / (1 - drop))
        share = kept.double().mean().item()
        error = 5 * math.sqrt(drop * (1 - drop) / len(kept)) + 1e-12
        assert abs(share - (1 - drop)) <= error
        mean = merged.double().mean().item()
        assert abs(mean - 1.5) <= 1.6 * error / (1 - drop) + 1e-6


def test_dare_masks_depend_on_seed_vector_and_name_alone():
    ones = {"a": torch.ones(1000), "b": torch.ones(1000)}
    mask = DARE(0.5).combine([ones])
    assert not torch.equal(mask["a"], mask["b"])
    again = DARE(0.5).combine([{"b": ones["b"], "a": ones["a"]}])
    assert torch.equal(mask["a"], again["a"])
    assert torch.equal(mask["b"], again["b"])
    other = DARE(0.5, seed=1).combine([ones])
    assert not torch.equal(mask["a"], other["a"])
    # Two vectors are dropped independently: sums of 0, 2 and 4 appear.
    both = DARE(0.5).combine([ones, ones])["a"]
    assert both.unique().tolist() == [0.0, 2.0, 4.0]
    # A longer tensor starts with the same mask.
    longer = DARE(0.5).combine([{"a": torch.ones(5000)}])
    assert torch.equal(longer["a"][:1000], mask["a"])


def test_dare_known_values():
    """The random numbers are part of the format: they never change."""
    merged = DARE(0.5, seed=3).combine([{"w": torch.ones(16)}])["w"]
    key = hashlib.sha256(b"3\x000\x00w").digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    words = generator.random_raw(8)
    low, high = words & 0xFFFFFFFF, words >> 32
    numbers = np.stack([low, high], 1).reshape(-1)
    assert (merged.numpy() != 0).tolist() == (numbers >= 2**31).tolist()


def test_dare_before_another_rule():
    vectors = make(3, seed=4)
    dropped = reference.drop(vectors, 7, lambda t: torch.full_like(t, 0.4))
    merged = DARE(0.4, seed=7, then=TIES(0.5)).combine(vectors)
    assert_close(merged, reference.ties(dropped, 0.5))


@pytest.mark.parametrize(
    "rule",
    [DARE(0.4), DARE(0.6, then=TIES(0.5)), DELLA(), DELLA(elect="none")],
    ids=repr,
)
def test_the_order_of_the_vectors_changes_nothing(rule):
    vectors = make(3, seed=6)
    # Equal vectors are no exception, nor is a zero of the other sign.
    vectors.append({n: v.clone() for n, v in vectors[0].items()})
    vectors[0]["norm"][2], vectors[3]["norm"][2] = 0.0, -0.0
    merged = rule.combine(vectors)
    for order in ((1, 0, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)):
        again = rule.combine([vectors[i] for i in order])
        # Sums of floats in another order: not more than their rounding.
        assert_close(again, merged, rtol=1e-6, atol=1e-6)


def test_integers_in_a_vector_are_named():
    vector = {"w": torch.ones(2), "steps": torch.tensor(3)}
    with pytest.raises(ValueError, match="'steps' is of type torch.int64"):
        TaskArithmetic().combine([vector])


@pytest.mark.parametrize("rule", [DARE(0.5), DELLA(0.5, 0.2)], ids=repr)
def test_the_order_of_tied_tensors_changes_nothing(rule):
    ones, other = make(2, seed=6), torch.randn(5)
    names = ["emb.weight", "b", "out.weight"]
    results = []
    for order in (names, names[::-1]):
        vectors = []
        for made in ones:
            table = next(iter(made.values()))
            held = {"emb.weight": table, "b": other, "out.weight": table}
            vectors.append({name: held[name] for name in order})
        results.append(rule.combine(vectors))
    for name in names:
        assert torch.equal(results[0][name], results[1][name])


@pytest.mark.parametrize("same", range(6))
def test_vectors_that_agree_in_their_first_tensors_have_an_order(same):
    """As where layers were frozen: the first ones that differ decide."""
    noise = torch.Generator().manual_seed(same)
    vectors = []
    for _ in range(3):
        vectors.append(
            {
                f"layer{i}": torch.full((300,), float(i))
                if i < same
                else torch.randn(300, generator=noise)
                for i in range(6)
            }
        )
    merged = DARE(0.4, seed=3).combine(vectors)
    assert_close(merged, reference.dare(vectors, 0.4, 3))
    again = DARE(0.4, seed=3).combine(vectors[::-1])
    assert_close(again, merged, rtol=1e-6, atol=1e-6)


def test_equal_vectors_are_dropped_independently():
    ones = {"a": torch.ones(1000)}
    both = DARE(0.5).combine([ones, dict(ones)])["a"]
    assert both.unique().tolist() == [0.0, 2.0, 4.0]


def test_della_probabilities_by_rank():
    row = torch.randn(40, generator=torch.Generator().manual_seed(0))
    matrix = row.repeat(20_000, 1)
    drop, epsilon = 0.6, 0.3
    merged = DELLA(drop, epsilon, elect="none").combine([{"w": matrix}])["w"]
    order = row.abs().argsort(descending=True)
    for rank, column in enumerate(order.tolist()):
        p = drop - epsilon / 2 + epsilon / len(row) * rank
        kept = merged[:, column] != 0
        values = merged[kept, column]
        torch.testing.assert_close(
            values, torch.full_like(values, row[column].item() / (1 - p))
        )
        share = 1 - kept.double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / len(matrix))


def test_della_equal_magnitudes_rank_by_position():
    ones = {"w": torch.ones(5)}
    merged = DELLA(0.5, 0.5, seed=2, elect="none").combine([ones])["w"]
    chances = [0.5 - 0.25 + 0.5 / 5 * rank for rank in range(5)]
    for value, p in zip(merged.tolist(), chances):
        assert value == 0 or math.isclose(value, 1 / (1 - p), rel_tol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("of", ["vectors", "weights"])
def test_slerp(t, scope, of):
    vectors = make(2, seed=9)
    base = make(1, seed=10)[0]
    models = [
        {n: v.double() + (base[n].double() if of == "weights" else 0)
         for n, v in vector.items()}
        for vector in vectors
    ]  # fmt: skip

    def arc(a, b):
        if not len(a):
            return a
        cosine = a @ b / (a.norm() * b.norm())
        w = torch.arccos(cosine.clamp(-1, 1))
        if torch.sin(w) < 1e-7:
            return (1 - t) * a + t * b
        return (torch.sin((1 - t) * w) * a + torch.sin(t * w) * b) / torch.sin(
            w
        )

    if scope == "global":
        a, b = (
            torch.cat([v.flatten() for v in model.values()]) for model in models
        )
        expected = unwide(arc(a, b).tolist(), base)
    else:
        expected = {
            n: arc(models[0][n].flatten(), models[1][n].flatten()).reshape(
                base[n].shape
            )
            for n in base
        }
    if of == "weights":
        expected = {n: v - base[n].double() for n, v in expected.items()}
    merged = SLERP(t, scope, of)(base, vectors)
    expected = {n: v + base[n].double() for n, v in expected.items()}
    assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_slerp_of_parallel_and_zero_vectors_is_linear():
    a = torch.tensor([1.0, 2.0])
    for b in (3 * a, -a, 0 * a):
        merged = SLERP(0.25).combine([{"w": a}, {"w": b}])["w"]
        torch.testing.assert_close(merged, 0.75 * a + 0.25 * b)


def test_karcher_mean_is_where_the_squared_angles_are_smallest():
    vectors = make(4, seed=11, shapes={"w": (6,)})
    weights = [1.0, 2.0, 0.5, 1.0]
    merged = Karcher(weights).combine(vectors)["w"].double()
    units = [v["w"].double() / v["w"].double().norm() for v in vectors]
    lengths = [v["w"].double().norm().item() for v in vectors]
    length = sum(w * x for w, x in zip(weights, lengths)) / sum(weights)
    assert math.isclose(merged.norm().item(), length, rel_tol=1e-6)
    # The gradient of the sum of squared angles vanishes there.
    mean = merged / merged.norm()
    gradient = torch.zeros(6, dtype=torch.float64)
    for w, unit in zip(weights, units):
        cosine = (unit @ mean).clamp(-1, 1)
        across = unit - cosine * mean
        gradient += w * torch.arccos(cosine) * across / across.norm()
    assert gradient.norm() < 1e-5


def test_karcher_of_two_is_half_way_on_the_arc():
    vectors = make(2, seed=12, shapes={"w": (5,)})
    units = [{"w": v["w"] / v["w"].norm()} for v in vectors]
    for rule in (Karcher(), MultiSLERP()):
        torch.testing.assert_close(
            rule.combine(units)["w"], SLERP(0.5).combine(units)["w"]
        )


def test_multislerp_is_one_tangent_step():
    vectors = make(3, seed=13, shapes={"w": (8,)})
    units = [v["w"].double() / v["w"].double().norm() for v in vectors]
    start = sum(units) / sum(units).norm()
    tangent = torch.zeros(8, dtype=torch.float64)
    for unit in units:
        cosine = unit @ start
        across = unit - cosine * start
        tangent += torch.arccos(cosine) * across / across.norm() / 3
    size = tangent.norm()
    expected = torch.cos(size) * start + torch.sin(size) * tangent / size
    length = sum(v["w"].double().norm() for v in vectors) / 3
    merged = MultiSLERP().combine(vectors)["w"]
    torch.testing.assert_close(merged.double(), expected * length)


def test_karcher_of_opposites_and_zeros():
    a = torch.tensor([1.0, 0.0])
    assert Karcher().combine([{"w": a}, {"w": -a}])["w"].tolist() == [0, 0]
    zeros = {"w": torch.zeros(2)}
    assert Karcher().combine([zeros, zeros])["w"].tolist() == [0, 0]
    # A zero vector halves the length and has no direction.
    merged = Karcher().combine([{"w": a}, zeros])["w"]
    torch.testing.assert_close(merged, a / 2)


def test_model_stock():
    vectors = make(3, seed=14)
    # Make them agree somewhat, as fine-tunings of one base do.
    shared = make(1, seed=15)[0]
    vectors = [{n: v + shared[n] for n, v in w.items()} for w in vectors]
    expected = {}
    for name in SHAPES:
        flat = [v[name].double().flatten() for v in vectors]
        if not len(flat[0]):
            expected[name] = vectors[0][name]
            continue
        angles = [
            math.acos(max(-1, min(1, (a @ b / (a.norm() * b.norm())).item())))
            for i, a in enumerate(flat)
            for b in flat[:i]
        ]
        cosine = max(math.cos(sum(angles) / len(angles)), 0)
        t = 3 * cosine / (1 + 2 * cosine)
        expected[name] = (t * sum(flat) / 3).reshape(SHAPES[name])
    assert_close(ModelStock().combine(vectors), expected, 1e-5, 1e-5)


def test_model_stock_of_equal_vectors_is_their_mean():
    (vector,) = make(1)
    merged = ModelStock().combine([vector] * 4)
    for name, value in vector.items():
        torch.testing.assert_close(merged[name], value)


def test_fisher():
    vectors = make(3, seed=16)
    fishers = [
        {n: torch.rand(s, generator=torch.Generator().manual_seed(i))
         for n, s in SHAPES.items()}
        for i in range(3)
    ]  # fmt: skip
    for fisher in fishers:
        fisher["norm"][2] = 0.0
    columns = zip(*map(wide, vectors), *map(wide, fishers))
    expected = []
    for column in columns:
        tau, weight = column[:3], column[3:]
        mass = sum(weight)
        if mass:
            expected.append(sum(t * w for t, w in zip(tau, weight)) / mass)
        else:
            expected.append(sum(tau) / 3)
    merged = Fisher(fishers).combine(vectors)
    assert_close(merged, unwide(expected, vectors[0]), 1e-5, 1e-5)


def test_lines_scales_grow_with_depth():
    names = [f"encoder.layers.{i}.ffn.weight" for i in range(5)]
    names += ["front.weight", "decoder.layers.10.a", "ctc.weight"]
    rule = LiNeS(TIES(scale=0.1), slope=0.4, top=["ctc.*"])
    scales = rule.scales(names)
    for layer in range(5):
        expected = 0.1 + 0.4 * layer / 4
        assert math.isclose(scales[names[layer]], expected)
    assert scales["front.weight"] == 0.1
    assert math.isclose(scales["ctc.weight"], 0.5)
    assert math.isclose(scales["decoder.layers.10.a"], 0.5)
    with pytest.raises(ValueError, match="no parameter name has a layer"):
        rule.scales(["a.weight"])


def test_lines_edits_by_its_scales():
    base, vectors = make(1, seed=20)[0], make(2, seed=21)
    rule = LiNeS(TaskArithmetic(scale=0.5), slope=1.0)
    edited = rule(base, vectors)
    for name, scale in {"enc.layers.0.w": 0.5, "enc.layers.1.w": 1.5}.items():
        total = vectors[0][name] + vectors[1][name]
        torch.testing.assert_close(edited[name], base[name] + scale * total)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_tsvm(precision):
    shapes = {"w": (12, 20), "conv": (6, 3, 5), "bias": (9,)}
    vectors = make(3, seed=17, shapes=shapes)
    expected = {}
    for name, shape in shapes.items():
        if name == "bias":
            expected[name] = sum(v[name].double() for v in vectors) / 3
            continue
        left, values, right = [], [], []
        kept = min(shape[0], math.prod(shape[1:])) // 3
        for vector in vectors:
            matrix = vector[name].double().reshape(shape[0], -1).numpy()
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
            left.append(u[:, :kept])
            values.append(s[:kept])
            right.append(vt[:kept].T)
        u, v = np.concatenate(left, 1), np.concatenate(right, 1)
        # The whitening of the paper by another road: U (U^T U)^(-1/2).
        whitened = []
        for matrix in (u, v):
            w, q = np.linalg.eigh(matrix.T @ matrix)
            whitened.append(matrix @ (q / np.sqrt(w)) @ q.T)
        merged = whitened[0] @ np.diag(np.concatenate(values)) @ whitened[1].T
        expected[name] = torch.from_numpy(merged).reshape(shape)
    merged = TSVM(precision=precision).combine(vectors)
    assert_close(merged, expected, 1e-4, 1e-4)


def test_tsvm_of_one_vector_is_the_vector():
    vectors = make(1, seed=18, shapes={"w": (6, 4)})
    merged = TSVM().combine(vectors)["w"]
    torch.testing.assert_close(merged, vectors[0]["w"], rtol=1e-5, atol=1e-5)


def test_tsvm_keeps_orthogonal_tasks_whole():
    a, b = torch.zeros(4, 4), torch.zeros(4, 4)
    a[0, 0], a[1, 1], b[2, 2], b[3, 3] = 4, 3, 2, 1
    merged = TSVM().combine([{"w": a}, {"w": b}])["w"]
    torch.testing.assert_close(merged, a + b)


def test_isoc_spectrum_is_flat():
    shapes = {"w": (12, 20), "bias": (9,)}
    vectors = make(3, seed=19, shapes=shapes)
    total = sum(v["w"].double() for v in vectors)
    u, s, vt = np.linalg.svd(total.numpy(), full_matrices=False)
    expected = {
        "w": torch.from_numpy(s.mean() * u @ vt),
        "bias": sum(v["bias"].double() for v in vectors) / 3,
    }
    assert_close(IsoC().combine(vectors), expected, 1e-5, 1e-5)


def test_spectral_rules_with_low_rank_and_zero_matrices():
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(8, 2, generator=generator) @ torch.randn(
        2, 10, generator=generator
    )
    merged = IsoC().combine([{"w": low}])["w"]
    values = torch.linalg.svdvals(merged.double())
    expected = torch.linalg.svdvals(low.double())[:2].mean()
    torch.testing.assert_close(
        values[:2], expected.repeat(2), rtol=1e-4, atol=0
    )
    assert values[2:].max() < 1e-5
    zeros = {"w": torch.zeros(8, 10)}
    for rule in (IsoC(), TSVM()):
        assert not rule.combine([zeros, zeros])["w"].any()
    torch.testing.assert_close(
        TSVM(share=1).combine([{"w": low}, zeros])["w"], low
    )


# ----------------------------------- every rule against its reference


def shared(number, seed):
    """Vectors that agree somewhat, as fine-tunings of one base do."""
    common = make(1, seed=seed)[0]
    return [
        {n: v + common[n] for n, v in vector.items()}
        for vector in make(number, seed=seed + 1)
    ]


FISHERS = [
    {n: v.abs() for n, v in vector.items()} for vector in make(3, seed=30)
]
PAIRS = {
    "TaskArithmetic": (
        TaskArithmetic(weights=[1, -2, 3]),
        lambda v: reference.task_arithmetic(v, [1, -2, 3]),
    ),
    "LinearAverage": (
        LinearAverage([1, 2, 3]),
        lambda v: reference.linear_average(v, [1, 2, 3]),
    ),
    "TIES": (TIES(), reference.ties),
    "Breadcrumbs": (Breadcrumbs(), reference.breadcrumbs),
    "Breadcrumbs global": (
        Breadcrumbs(0.3, 0.1, trim="global"),
        lambda v: reference.breadcrumbs(v, 0.3, 0.1, "global"),
    ),
    "DARE": (DARE(0.4, seed=3), lambda v: reference.dare(v, 0.4, 3)),
    "DARE, TIES": (
        DARE(0.4, then=TIES(0.5)),
        lambda v: reference.dare(v, 0.4, 0, lambda d: reference.ties(d, 0.5)),
    ),
    "DELLA": (DELLA(), reference.della),
    "DELLA count": (
        DELLA(0.6, 0.3, seed=5, elect="count"),
        lambda v: reference.della(v, 0.6, 0.3, 5, "count"),
    ),
    "DELLA none": (
        DELLA(elect="none"),
        lambda v: reference.della(v, elect="none"),
    ),
    "SLERP": (SLERP(0.3), lambda v: reference.slerp(v, 0.3)),
    "Karcher": (
        Karcher([1, 2, 3]),
        lambda v: reference.karcher(v, [1, 2, 3]),
    ),
    "Karcher global": (
        Karcher(scope="global"),
        lambda v: reference.karcher(v, scope="global"),
    ),
    "MultiSLERP": (
        MultiSLERP([1, 2, 3]),
        lambda v: reference.multi_slerp(v, [1, 2, 3]),
    ),
    "ModelStock": (ModelStock(), reference.model_stock),
    "ModelStock global": (
        ModelStock("global"),
        lambda v: reference.model_stock(v, "global"),
    ),
    "Fisher": (Fisher(FISHERS), lambda v: reference.fisher(v, FISHERS)),
    "TIES, each its own": (
        TIES([0.5, 0.2, 0.9], weights=[1, 2, -0.5]),
        lambda v: reference.ties(v, [0.5, 0.2, 0.9], weights=[1, 2, -0.5]),
    ),
    "PCB": (PCB(0.3), lambda v: reference.pcb(v, 0.3)),
    "SCE": (SCE(0.4), lambda v: reference.sce(v, 0.4)),
    "SCE of all": (SCE(), reference.sce),
    "ByLayer": (
        ByLayer({"*.0.*": TIES(0.4), "enc*": SCE(0.3)}, Karcher()),
        lambda v: reference.by_layer(
            v,
            {
                "*.0.*": lambda g: reference.ties(g, 0.4),
                "enc*": lambda g: reference.sce(g, 0.3),
                "*": reference.karcher,
            },
        ),
    ),
    "BoostedTSVM": (
        BoostedTSVM(precision="float64"),
        reference.boosted_tsv_m,
    ),
    "IsoCTS": (
        IsoCTS(common=0.4, precision="float64"),
        lambda v: reference.iso_cts(v, 0.4),
    ),
    "TSVM": (TSVM(precision="float64"), reference.tsv_m),
    "IsoC": (IsoC(precision="float64"), reference.iso_c),
}


@pytest.mark.parametrize("name", PAIRS)
def test_rule_is_its_reference(name):
    rule, oracle = PAIRS[name]
    vectors = shared(2 if name == "SLERP" else 3, seed=31)
    expected = oracle(vectors)
    assert all(value.dtype == torch.float64 for value in expected.values())
    assert_close(rule.combine(vectors), expected, 1e-5, 1e-5)


def test_lines_scales_are_its_reference():
    names = ["front.w", "enc.layers.0.w", "enc.layers.3.w", "dec.layers.0.w"]
    names += ["enc.layers.1.b", "dec.layers.7.w"]
    rule = LiNeS(TaskArithmetic(scale=0.2), slope=0.6)
    assert rule.scales(names) == reference.lines(names, 0.2, 0.6)


@pytest.mark.parametrize("name", RULES)
def test_docstring_names_paper_and_reference(name):
    text = rule_class(name).__doc__
    function = re.search(r"Reference:\s+`reference\.(\w+)`", text)[1]
    assert callable(getattr(reference, function))
    assert re.search(r"[A-Z]\w+ (et al\. |and [A-Z]\w+ )?\(?\d{4}", text)


# ------------------------------------------------------- what a rule checks


@pytest.mark.parametrize(
    ("make_rule", "match"),
    [
        (lambda: TIES(density=1.5), r"density=1\.5.*\[0, 1\]"),
        (lambda: TIES(density=float("nan")), r"density=nan.*\[0, 1\]"),
        (lambda: TIES(density="0.2"), r"density='0\.2'"),
        (lambda: TIES(density=True), "density=True"),
        (lambda: TIES(scale=math.inf), "scale=inf"),
        (lambda: TIES(scale={"*": math.nan}), r"scale\['\*'\]"),
        (lambda: TIES(scale={}), "at least one pattern"),
        (lambda: TIES(trim="layer"), "trim='layer'.*'global', 'tensor'"),
        (lambda: TIES(elect="none"), "elect='none'"),
        (lambda: DARE(drop=1), r"drop=1.*\[0, 1\)"),
        (lambda: DARE(0.5, seed=-1), "seed=-1"),
        (lambda: DARE(0.5, then=TIES(scale=0.5)), "scale to DARE"),
        (lambda: Breadcrumbs(0.9, 0.2), "sum of at most 1"),
        (lambda: DELLA(0.9, 0.3), "epsilon=0.3"),
        (lambda: SLERP(1.2), "t=1.2"),
        (lambda: SLERP(0.5, of="models"), "of='models'"),
        (lambda: Karcher(weights=[1, -1]), "none below zero"),
        (lambda: TaskArithmetic(weights=[1, math.nan]), r"weights\[1\]=nan"),
        (lambda: TSVM(share=0), "share=0"),
        (lambda: LiNeS(TIES(scale={"*": 1.0}), 0.1), "one number"),
        (lambda: LiNeS(TIES(), math.nan), "slope=nan"),
    ],
)
def test_arguments_out_of_range(make_rule, match):
    with pytest.raises(ValueError, match=match):
        make_rule()


def test_numbers_of_vectors():
    for rule, number in ((SLERP(0.5), 3), (SLERP(0.5), 1), (ModelStock(), 1),
                         (TIES(), 0)):  # fmt: skip
        with pytest.raises(ValueError, match="task vectors, got"):
            rule.combine(make(number))
    with pytest.raises(ValueError, match="weights: 2 entries for 3"):
        TaskArithmetic(weights=[1, 2]).combine(make(3))
    with pytest.raises(ValueError, match="sum other than zero"):
        LinearAverage([1, -1]).combine(make(2))


def test_vectors_that_do_not_match():
    one, other = make(2)
    with pytest.raises(KeyError, match="norm"):
        TIES().combine([one, {n: v for n, v in other.items() if n != "norm"}])
    with pytest.raises(ValueError, match="'norm' has shape"):
        TIES().combine([one, {**other, "norm": torch.zeros(3)}])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "rule",
    [
        TaskArithmetic(),
        TIES(),
        ModelStock(),
        # Also where the entry is dropped.
        DARE(0.9, seed=1),
        DARE(0.9, then=TIES(1)),
        DARE([0, 0.9]),
    ],
    ids=repr,
)
def test_nan_and_infinity_are_named(rule, bad):
    vectors = make(2)
    vectors[1]["norm"][3] = bad
    with pytest.raises(ValueError, match="task vector 2 of 2.*'norm'"):
        rule.combine(vectors)


@pytest.mark.parametrize("rule", [TIES, Breadcrumbs])
@pytest.mark.parametrize("first", [0.5, 0.1])
def test_nan_where_only_the_other_vector_is_cut_is_named(rule, first):
    # Of two entries the share 0.1 is none: no cut is looked for.
    vectors = make(2, shapes={"w": (100,), "b": (2,)})
    bad = 1 if first == 0.5 else 0
    vectors[bad]["b"][0] = math.nan
    rule = rule([first, 0.6 - first], trim="tensor")
    with pytest.raises(ValueError, match=f"vector {bad + 1} of 2.*'b'"):
        rule.combine(vectors)


def test_rules_leave_their_inputs_alone():
    rules = [TaskArithmetic(0.3), TIES(), DARE(0.5), Breadcrumbs(), DELLA(),
             ModelStock(), Karcher(), TSVM(), IsoC(), PCB(), SCE(), IsoCTS(),
             BoostedTSVM(), ByLayer({"enc*": TIES(weights=[1, 2])})]  # fmt: skip
    vectors = make(2, seed=1)
    before = [{n: v.clone() for n, v in w.items()} for w in vectors]
    for rule in rules:
        rule.combine(vectors)
        for vector, old in zip(vectors, before):
            for name, value in vector.items():
                assert torch.equal(value, old[name])


def test_ties_stay_tied_and_count_once():
    shared = torch.tensor([5.0, 4.0])
    vector = TaskVector({"emb": shared, "out": shared, "b": torch.ones(2)})
    merged = TIES(density=0.5).combine([vector])
    assert merged["emb"].data_ptr() == merged["out"].data_ptr()
    # 4 elements, of which 2 survive: both of the shared tensor.
    assert merged["emb"].tolist() == [5.0, 4.0]
    assert merged["b"].tolist() == [0.0, 0.0]
    dare = DARE(0.5).combine([vector])
    assert torch.equal(dare["emb"], dare["out"])


def test_scale_zero_gives_the_base_bit_for_bit():
    base = {"w": torch.tensor([-0.0, 0.0, 1e-45, 3.0])}
    edited = TIES(scale=0.0)(base, [{"w": torch.ones(4)}])
    assert torch.equal(
        edited["w"].view(torch.int32), base["w"].view(torch.int32)
    )


def test_scales_by_pattern():
    base, vectors = make(1)[0], make(2, seed=3)
    scale = {"enc.layers.0.*": 0.5, "norm": 2}
    edited = TaskArithmetic(scale)(base, vectors)
    total = {n: vectors[0][n] + vectors[1][n] for n in base}
    torch.testing.assert_close(edited["norm"], base["norm"] + 2 * total["norm"])
    assert torch.equal(edited["enc.layers.1.w"], base["enc.layers.1.w"])
    with pytest.raises(ValueError, match="layers.7"):
        TaskArithmetic({"enc.layers.7.*": 1.0})(base, vectors)


def test_ancestry_is_checked_and_kept():
    base = {"w": torch.zeros(3)}
    other = {"w": torch.ones(3)}
    taus = [TaskVector.between(base, {"w": torch.rand(3)}) for _ in range(2)]
    merged = TIES().combine(taus)
    assert merged.base_fingerprint == taus[0].base_fingerprint
    assert merged.metadata["rule"]["rule"] == "TIES"
    with pytest.raises(ValueError, match="is not the base"):
        TIES()(other, taus)
    TIES()(other, taus, any_base=True)


def test_looking_at_weights_needs_the_base():
    vectors, base = make(2), make(1, seed=9)[0]
    SLERP(0.5, of="weights").combine(vectors, base=base)
    with pytest.raises(ValueError, match="pass the base"):
        SLERP(0.5, of="weights").combine(make(2))


@pytest.mark.parametrize(
    "rule",
    [
        TaskArithmetic({"*": 0.3}, weights=[1, 2]),
        DARE(0.5, 0.3, then=TIES(0.4)),
        LiNeS(DELLA(), 0.3),
        Karcher(of="weights"),
        Merge([Magnitude(0.3), RandomDrop(0.2)], "count", "mean", 0.4),
        TSVM(precision="float64"),
        TIES([0.5, 0.2], weights=[1, 2]),
        ByLayer(
            {"enc*": DARE(0.2, then=TIES(1)), "norm": SLERP(0.1)},
            IsoCTS(common=0.5),
        ),
    ],
)
def test_descriptions_make_the_rule_again(rule):
    import json

    description = json.loads(json.dumps(rule.describe()))
    again = from_description(description)
    assert again.describe() == rule.describe()
    vectors = make(2)
    base = make(1, seed=8)[0]
    one, other = rule(base, vectors), again(base, vectors)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (DARE, {"drop": 0.5, "seed": 3}),
        (DELLA, {"drop": 0.5, "epsilon": 0.25, "seed": 3}),
        (Breadcrumbs, {"density": 0.5, "gamma": 0.25}),
        (PCB, {"density": 0.5}),
        (TSVM, {"share": 0.5}),
        (BoostedTSVM, {"beta": 0.5, "share": 0.25}),
        (TIES, {"density": [0.5, 1], "weights": [1, 2], "scale": {"w": 0.5}}),
    ],
)
def test_numbers_of_numpy_and_torch_become_pythons(kind, plain):
    def cast(value, number):
        if isinstance(value, list):
            return [cast(entry, number) for entry in value]
        if isinstance(value, dict):
            return {key: cast(entry, number) for key, entry in value.items()}
        return number(value)

    wanted = kind(**plain).describe()
    for number in (np.array, lambda v: np.array(v)[()], torch.tensor):
        found = kind(**cast(plain, number)).describe()
        # Equal numbers of NumPy have another text.
        assert repr(found) == repr(wanted)
        assert from_description(found).describe() == wanted


def test_numbers_of_a_rule_of_ones_own_become_pythons():
    class Own(Rule):
        def __init__(self, share, by_name):
            self.share, self.by_name = share, by_name

    found = Own(np.float64(0.5), {"*": np.float32(0.5)}).describe()
    assert repr(found["share"]) == "0.5"
    assert repr(found["by_name"]) == "{'*': 0.5}"


def test_lone_and_stored_vectors(tmp_path):
    one, two = (TaskVector(vector) for vector in make(2))
    path = one.save(tmp_path / "one.safetensors")
    base = make(1, seed=8)[0]
    for given in (one, dict(one), path, str(path), [path], (one,)):
        assert_close(TIES(1).combine(given), one, 0, 0)
        assert_close(TIES(1)(base, given, any_base=True), one.apply(
            base, any_base=True), 0, 0)  # fmt: skip
    both = TaskArithmetic().combine([path, two])
    assert_close(both, one + two, 0, 0)
    assert_close(TaskVector.mean(path), one, 0, 0)
    for wrong in (3, None, torch.nn.Linear(2, 2), [one, 3]):
        with pytest.raises(TypeError, match="expected a TaskVector.*between"):
            TIES(1).combine(wrong)


@pytest.mark.parametrize("name", RULES)
def test_rules_are_found_by_name_and_pickled(name):
    needed = {
        "DARE": {"drop": 0.5},
        "SLERP": {"t": 0.3},
        "Fisher": {"fishers": ["a.ckpt", "b.ckpt"]},
        "LiNeS": {"inner_rule": TIES(), "slope": 0.1},
        "ByLayer": {"rules": {"enc*": TIES()}},
        "SelectiveAttention": {"mix": 0.5},
    }
    rule = getattr(vectors_room, name)(**needed.get(name, {}))
    again = pickle.loads(pickle.dumps(rule))
    assert again.describe() == rule.describe()
    assert from_description(rule.describe()).describe() == rule.describe()
    assert "module" not in rule.describe()


def test_descriptions_name_only_our_rules():
    with pytest.raises(ValueError, match="no rule 'os.system'"):
        from_description({"rule": "os.system"})
    with pytest.raises(ValueError, match="sigma"):
        from_description({"rule": "TIES", "sigma": 1})
