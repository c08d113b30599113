"""Rules on whole matrices where they are fragile: rank, agreement, types."""

import pytest
import torch

from speechbrain_taskarith.vectors import (
    TaskVector,
    merge_checkpoints,
    open_state,
)
from speechbrain_taskarith.vectors.rules import (
    TSVM,
    BoostedTSVM,
    IsoC,
    IsoCTS,
    reference,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PRECISIONS = ["float32", "float64"]
SIZE, RANK = 96, 4


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def low_rank(seed, size=SIZE, rank=RANK, std=0.01):
    """What a LoRA adds: of low rank, entries of about `std`."""
    left = random(size, rank, seed=seed)
    right = random(rank, size + 7, seed=seed + 100)
    return left @ right * std / rank**0.5


def tuned(dtype, seeds, size=SIZE):
    """A base and what LoRAs make of it, all stored in one type."""
    base = {"w": (0.05 * random(size, size + 7)).to(dtype)}
    models = [
        {"w": (base["w"].double() + low_rank(s, size).double()).to(dtype)}
        for s in seeds
    ]
    return base, models


def values_of(matrix):
    return torch.linalg.svdvals(matrix.double())


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.norm())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["memory", "files"])
def test_a_lora_has_its_rank_in_every_type(dtype, precision, way, tmp_path):
    base, models = tuned(dtype, [1])
    rule = IsoC(precision=precision)
    if way == "memory":
        tau = TaskVector.between(base, models[0])
        merged = rule.combine([tau], base=base)["w"]
    else:
        output = tmp_path / "out.safetensors"
        merge_checkpoints(base, models, rule, output, dtype="float32")
        merged = open_state(output)["w"].double() - base["w"].double()
    values = values_of(merged)
    expected = values_of(low_rank(1))[:RANK].mean()
    # Half precision moves the values themselves by its rounding.
    rtol = {torch.bfloat16: 0.02, torch.float16: 3e-3}.get(dtype, 1e-3)
    torch.testing.assert_close(
        values[:RANK], expected.repeat(RANK), rtol=rtol, atol=0
    )
    assert values[RANK] < 1e-3 * expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [TSVM, IsoC, IsoCTS, BoostedTSVM])
def test_loras_of_every_type_merge_as_the_exact_ones(rule, dtype):
    base, models = tuned(dtype, [1, 2, 3])
    taus = [TaskVector.between(base, model) for model in models]
    exact = [{"w": low_rank(seed)} for seed in (1, 2, 3)]
    oracle = {
        TSVM: reference.tsv_m,
        IsoC: reference.iso_c,
        IsoCTS: reference.iso_cts,
        BoostedTSVM: reference.boosted_tsv_m,
    }[rule](exact)["w"]
    tolerance = {torch.bfloat16: 0.2, torch.float16: 0.03}.get(dtype, 1e-3)
    for precision in PRECISIONS:
        merged = rule(precision=precision).combine(taus, base=base)["w"]
        assert relative(merged, oracle) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [TSVM, IsoC])
def test_half_precision_without_the_base_is_refused(rule, dtype):
    base, models = tuned(dtype, [1])
    tau = TaskVector.between(base, models[0])
    if dtype in (torch.float32, torch.float64):
        values = values_of(rule().combine([tau])["w"])
        assert values[RANK] < 1e-3 * values[0]
        return
    with pytest.raises(
        ValueError, match=r"'w' has few.*combine\(vectors, base"
    ):
        rule().combine([tau])


def test_a_bfloat16_vector_file_has_its_rank(tmp_path):
    base, models = tuned(torch.float32, [1])
    path = tmp_path / "tau.safetensors"
    TaskVector.between(base, models[0]).save(path, encoding="bf16")
    output = tmp_path / "out.safetensors"
    merge_checkpoints(base, [path], IsoC(), output)
    merged = open_state(output)["w"].double() - base["w"].double()
    values = values_of(merged)
    assert values[RANK] < 1e-3 * values[0]
    assert values[RANK - 1] > 0.999 * values[0]


def test_what_is_all_rounding_is_nothing():
    """What rounding to bfloat16 makes of no training is no direction."""
    exact = random(40, 50)
    base = {"w": exact.bfloat16()}
    tuned = {"w": (exact + 1e-4 * random(40, 50, seed=1)).bfloat16()}
    tau = TaskVector.between(base, tuned)
    assert tau["w"].any()
    for rule in (IsoC(), TSVM(), IsoCTS(), BoostedTSVM()):
        assert not rule.combine([tau, tau], base=base)["w"].any()


@pytest.mark.parametrize("way", ["memory", "files", "vector files"])
@pytest.mark.parametrize("rule", [TSVM, IsoC, IsoCTS, BoostedTSVM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_type_of_the_base_is_no_rounding(dtype, rule, way, tmp_path):
    """Half-precision weights, tuned in float32, moved by less than a step."""
    half = {"w": (0.05 * random(40, 50)).to(dtype)}
    full = {"w": half["w"].float()}
    models = [{"w": full["w"] + 1e-5 * random(40, 50, seed=s)} for s in (1, 2)]
    edits = []
    for base in (half, full):
        taus = [TaskVector.between(base, model) for model in models]
        if way == "memory":
            edits.append(rule().combine(taus, base=base)["w"])
            continue
        sources = models
        if way == "vector files":
            sources = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
            for tau, path in zip(taus, sources):
                tau.save(path)
        output = tmp_path / "out.safetensors"
        merge_checkpoints(base, sources, rule(), output, dtype="float32")
        edits.append(open_state(output)["w"] - full["w"])
    assert edits[0].norm() > 1e-5
    assert torch.equal(*edits)


def test_a_vector_file_of_half_precision_weights_has_its_rank(tmp_path):
    base, models = tuned(torch.bfloat16, [1])
    path, output = tmp_path / "tau.safetensors", tmp_path / "out.safetensors"
    TaskVector.between(base, models[0]).save(path)
    merge_checkpoints(base, [path], IsoC(), output, dtype="float32")
    values = values_of(open_state(output)["w"] - base["w"].float())
    assert values[RANK - 1] > 0.9 * values[0]
    assert values[RANK] < 1e-3 * values[0]


@pytest.mark.parametrize("rule", [TSVM, IsoC, IsoCTS, BoostedTSVM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_was_not_trained_is_no_rounding(dtype, rule, tmp_path):
    """A frozen model adds nothing, from memory or from files."""
    base = {"w": random(16, 16).to(dtype)}
    steps = 0.02 * random(16, 16, seed=1)
    model = {"w": (base["w"].float() + steps).to(dtype)}
    frozen = {"w": base["w"].clone()}
    taus = [TaskVector.between(base, one) for one in (frozen, model)]
    output = tmp_path / "out.safetensors"
    merge_checkpoints(base, [frozen, model], rule(), output)
    merged = rule()(base, taus)["w"]
    assert torch.equal(open_state(output)["w"], merged)
    if rule is IsoC:
        alone = IsoC()(base, taus[1:])["w"]
        assert torch.equal(merged, alone)


# ------------------------------------------------------ vectors that agree


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("number", [2, 3])
def test_identical_vectors_give_the_kept_part_of_one(number, precision):
    tau = random(24, 31, seed=5)
    kept = 24 // number
    u, s, v = torch.linalg.svd(tau.double(), full_matrices=False)
    expected = u[:, :kept] * s[:kept] @ v[:kept]
    rule = TSVM(precision=precision)
    merged = rule.combine([{"w": tau}] * number)["w"]
    assert relative(merged, expected) < 1e-5
    assert (
        relative(reference.tsv_m([{"w": tau}] * number)["w"], expected) < 1e-9
    )


def test_opposite_vectors_cancel():
    tau = random(24, 31, seed=5)
    for precision in PRECISIONS:
        merged = TSVM(precision=precision).combine([{"w": tau}, {"w": -tau}])
        assert merged["w"].norm() < 1e-4 * tau.norm()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perturbation_of_the_last_bits_changes_little(sign):
    tau, other = random(24, 31, seed=5), random(24, 31, seed=6)
    near = sign * tau + 1e-7 * other
    exact = TSVM().combine([{"w": tau}, {"w": sign * tau}])["w"]
    results = [
        TSVM(precision=precision).combine([{"w": tau}, {"w": near}])["w"]
        for precision in PRECISIONS
    ]
    for merged in results:
        assert float((merged - exact).norm() / tau.norm()) < 1e-4


def test_independent_vectors_are_as_before():
    """The polar factor of a matrix of full rank is the usual one."""
    vectors = [{"w": random(24, 31, seed=s)} for s in (1, 2, 3)]
    lefts, sizes, rights = [], [], []
    for vector in vectors:
        u, s, v = torch.linalg.svd(vector["w"].double(), full_matrices=False)
        lefts.append(u[:, :8])
        sizes.append(s[:8])
        rights.append(v[:8])
    polar = []
    for matrix in (torch.cat(lefts, 1), torch.cat(rights)):
        p, _, q = torch.linalg.svd(matrix, full_matrices=False)
        polar.append(p @ q)
    expected = polar[0] * torch.cat(sizes) @ polar[1]
    assert relative(TSVM().combine(vectors)["w"], expected) < 1e-5


# ------------------------------------------------------------- the variants


@pytest.mark.parametrize("energy", ["sum", "squares"])
@pytest.mark.parametrize("beta", [0.1, 0.3, 0.7, 1])
def test_boosting_raises_the_small_singular_values_only(beta, energy):
    tau = random(12, 17, seed=3)
    before = values_of(tau)
    share = before if energy == "sum" else before**2
    at = next(
        k for k in range(12) if share[: k + 1].sum() >= beta * share.sum()
    )
    expected = torch.maximum(before, before[at] if beta < 1 else before[-1])
    rule = BoostedTSVM(beta=beta, energy=energy)
    merged = rule.combine([{"w": tau}])["w"]
    torch.testing.assert_close(
        values_of(merged), expected, rtol=1e-5, atol=1e-5
    )


def test_boosting_makes_no_direction_out_of_rounding():
    merged = BoostedTSVM().combine([{"w": low_rank(1)}])["w"]
    values = values_of(merged)
    assert values[RANK] < 1e-5 * values[0]


def test_iso_cts_has_a_flat_spectrum_and_all_common_is_iso_c():
    vectors = [{"w": random(20, 26, seed=s)} for s in (1, 2, 3)]
    values = values_of(IsoCTS(common=0.5).combine(vectors)["w"])
    torch.testing.assert_close(
        values, values.mean().expand(20), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        IsoCTS(common=1).combine(vectors)["w"],
        IsoC().combine(vectors)["w"],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("rule", [TSVM, BoostedTSVM, IsoC, IsoCTS])
def test_weights_are_factors_of_the_vectors(rule):
    vectors = [
        {"w": random(9, 12, seed=s), "b": random(5, seed=s + 9)}
        for s in (1, 2, 3)
    ]
    weights = [0.5, 2, -1]
    scaled = [
        {n: w * t for n, t in vector.items()}
        for w, vector in zip(weights, vectors)
    ]
    how = {"precision": "float64"}
    merged = rule(weights=weights, **how).combine(vectors)
    expected = rule(**how).combine(scaled)
    for name in merged:
        torch.testing.assert_close(
            merged[name], expected[name], rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match="weights: 3 entries for 2"):
        rule(weights=weights).combine(vectors[:2])
