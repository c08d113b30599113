"""A weight and a density for each model, and a rule for each group."""

import pytest
import torch

from speechbrain_taskarith.commands.weights import merge as command
from speechbrain_taskarith.vectors import (
    TaskVector,
    merge_checkpoints,
    open_state,
)
from speechbrain_taskarith.vectors.rules import (
    DARE,
    DELLA,
    PCB,
    SCE,
    TIES,
    TSVM,
    BoostedTSVM,
    Breadcrumbs,
    ByLayer,
    IsoC,
    IsoCTS,
    Karcher,
    LiNeS,
    ModelStock,
    SelectiveAttention,
    TaskArithmetic,
    from_description,
    reference,
)
from speechbrain_taskarith.vectors.rules.description import (
    from_plain,
    with_each,
)

SHAPES = {
    "enc.layers.0.w": (8, 10),
    "enc.layers.1.w": (4, 3, 5),
    "enc.norm": (20,),
    "dec.w": (6, 6),
    "dec.b": (),
}
WEIGHTS = [[1, 1, 1], [1, 2, 0.5], [0.25, -2, 0.5]]
DENSITIES = [0.5, 0.2, 0.9]


def make(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        for _ in range(number)
    ]


def trimmed(tau, density):
    """The `int(density numel)` largest magnitudes of a tensor."""
    flat = tau.double().flatten()
    order = flat.abs().argsort(descending=True, stable=True)
    out = torch.zeros_like(flat)
    kept = order[: round(density * len(flat))]
    out[kept] = flat[kept]
    return out


def as_mergekit(sparse, weights, elect, normalize):
    """mergekit's generalised task arithmetic, from its documented steps."""
    sparse = torch.stack(sparse)
    weights = torch.tensor(weights, dtype=torch.float64)[:, None]
    weighted = sparse * weights
    take = torch.ones_like(weighted)
    if elect:
        sign = torch.where(weighted.sum(0) >= 0, 1, -1)
        take = (weighted.sign() == sign).double()
    divisor = (weights * take).sum(0)
    divisor[divisor == 0] = 1
    merged = (weighted * take).sum(0)
    return merged / divisor if normalize else merged


def assert_close(got, expected, tolerance=2e-6):
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].double(),
            value.double().reshape(got[name].shape),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("weights", WEIGHTS)
def test_ties_with_weights_and_densities_is_mergekits(weights):
    vectors = make(3)
    rule = TIES(DENSITIES, trim="tensor", weights=weights)
    expected = {}
    for name in SHAPES:
        sparse = [trimmed(v[name], d) for v, d in zip(vectors, DENSITIES)]
        expected[name] = as_mergekit(sparse, weights, True, True)
    assert_close(rule.combine(vectors), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("elect", ["none", "mass"])
def test_breadcrumbs_with_weights_is_mergekits(weights, elect):
    vectors, gamma = make(3, seed=1), 0.1
    rule = Breadcrumbs(DENSITIES, gamma, elect=elect, weights=weights)
    expected = {}
    for name in SHAPES:
        sparse = [
            trimmed(v[name], min(d + gamma, 1)) - trimmed(v[name], gamma)
            for v, d in zip(vectors, DENSITIES)
        ]
        chosen = elect == "mass"
        expected[name] = as_mergekit(sparse, weights, chosen, chosen)
    assert_close(rule.combine(vectors), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_dare_and_della_with_weights(weights):
    vectors, drops = make(3, seed=2), [0.5, 0.0, 0.3]
    alone = []
    for index in range(3):
        only = [float(i == index) for i in range(3)]
        rule = DARE(drops, then=TaskArithmetic(weights=only))
        alone.append(rule.combine(vectors))
    rule = DARE(drops, then=TIES(1, trim="tensor", weights=weights))
    expected = {
        name: as_mergekit(
            [v[name].double().flatten() for v in alone], weights, True, True
        )
        for name in SHAPES
    }
    assert_close(rule.combine(vectors), expected)
    assert_close(alone[1], vectors[1])
    # DELLA with all its masks' weight on one vector is that vector's.
    for index in range(3):
        only = [float(i == index) for i in range(3)]
        rule = DELLA([0.4, 0.5, 0.6], weights=only, elect="none")
        merged = rule.combine(vectors)["enc.layers.0.w"]
        tau = vectors[index]["enc.layers.0.w"]
        kept = merged != 0
        assert torch.equal(merged[kept].sign(), tau[kept].sign())
        assert (merged[kept].abs() > tau[kept].abs()).all()


def test_weights_that_are_all_equal_change_nothing():
    vectors = make(3, seed=3)
    for elect in ("mass", "count"):
        plain = TIES(0.4, elect=elect).combine(vectors)
        twos = TIES(0.4, elect=elect, weights=[2, 2, 2]).combine(vectors)
        assert_close(twos, plain)


def test_one_vector_with_a_weight():
    (vector,) = make(1)
    merged = TIES(0.5, weights=[3]).combine([vector])
    assert_close(merged, reference.ties([vector], 0.5))
    merged = Breadcrumbs(1, 0, weights=[3]).combine([vector])
    assert_close(merged, {n: 3 * v for n, v in vector.items()})


@pytest.mark.parametrize(
    ("rule", "weights", "densities", "expected"),
    [
        (TIES(), [1, 2], [0.5, 0.1], TIES([0.5, 0.1], weights=[1, 2])),
        (
            DARE(0.5, then=TIES(1)),
            [1, 2],
            [0.75, 0.25],
            DARE([0.25, 0.75], then=TIES(1, weights=[1, 2])),
        ),
        (DELLA(), None, [0.5, 0.25], DELLA([0.5, 0.75])),
        (
            LiNeS(TIES(), 0.1),
            [1, 2],
            [0.5, 0.1],
            LiNeS(TIES([0.5, 0.1], weights=[1, 2]), 0.1),
        ),
        (
            ByLayer({"a": TIES()}, TSVM()),
            [1, 2],
            None,
            ByLayer({"a": TIES(weights=[1, 2])}, TSVM(weights=[1, 2])),
        ),
        (IsoC(), [1, 2], None, IsoC(weights=[1, 2])),
        (Karcher(), [1, 2], None, Karcher([1, 2])),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_weights_and_densities_become_arguments(
    rule, weights, densities, expected
):
    found = with_each(rule, weights=weights, densities=densities)
    assert found.describe() == expected.describe()
    assert from_description(found.describe()).describe() == found.describe()


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        (ModelStock(), {"weights": [1, 2]}, "weights: ModelStock has none"),
        (TSVM(), {"densities": [1, 1]}, "densities: TSVM has none"),
        (ByLayer({"*": TIES()}, PCB()), {"weights": [1, 2]}, "PCB has none"),
        (TIES(), {"densities": [1, 2]}, r"densities\[1\]=2"),
        (TIES(), {"weights": [1, 2, 3]}, "weights: 3 entries for 2"),
        (TIES(), {"densities": [1, 1, 1]}, "3 entries for 2"),
        (DARE(0.5), {"densities": [0, 1]}, r"drop\[0\]=1"),
    ],
)
def test_what_cannot_be_weighted_is_refused_by_name(
    rule, given, message, tmp_path
):
    base, *models = make(3)
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(
            base, models, rule, tmp_path / "out.safetensors", **given
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "rule",
    [
        TIES(DENSITIES, weights=[1, 2, 0.5]),
        DARE([0.1, 0.5, 0.9], then=TIES(0.5, weights=[1, 2, 3])),
        PCB(0.3),
        SCE(0.5),
        ByLayer({"enc.layers.*": TIES(0.3), "enc*": DELLA()}, TSVM(0.5)),
        ByLayer({"enc.layers.*": LiNeS(PCB(), 0.4), "dec.w": Karcher()}),
    ],
    ids=repr,
)
def test_streams_the_same_bytes(rule, threads, tmp_path):
    base, *models = make(4, seed=5)
    taus = [TaskVector.between(base, model) for model in models]
    expected = rule(base, taus)
    output = tmp_path / "merged.safetensors"
    merge_checkpoints(
        base,
        models,
        rule,
        output,
        show_progress=False,
        threads=threads,
        chunk=7,
    )
    merged = open_state(output)
    for name, value in expected.items():
        assert torch.equal(merged[name], value), name


@pytest.mark.parametrize(
    "rule",
    [
        TIES([0.2, 0.5], weights=[1, -0.5]),
        TIES(elect="count", weights=[1, 2]),
        DARE([0.1, 0.5], then=TIES(0.5)),
        DELLA(elect="none"),
        PCB(0.3),
        SCE(0.4),
        TSVM(weights=[1, 2]),
        BoostedTSVM(),
        IsoC(),
        IsoCTS(common=0.4),
        SelectiveAttention(0.3, attention=["enc*"]),
        ByLayer({"enc*": TIES(0.4)}, DARE(0.5)),
    ],
    ids=repr,
)
def test_torch_computes_what_numpy_does(rule, tmp_path):
    """A device's arrays are torch's; here those of the CPU stand for them."""
    base, *models = make(3, seed=11)
    found = []
    for device in ("cpu", "cpu:0"):
        path = tmp_path / f"{device[3:]}.safetensors"
        merge_checkpoints(base, models, rule, path, device=device)
        found.append(open_state(path))
    assert_close(dict(found[1]), dict(found[0]), 1e-5)


def test_descriptions_from_before_still_make_their_rule():
    old = {"rule": "TIES", "density": 0.5, "scale": 0.6, "elect": "mass"}
    assert from_description({**old, "trim": "global"}).describe() == (
        TIES(0.5, 0.6).describe()
    )


def test_a_merge_file_with_weights_and_groups(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from speechbrain_taskarith.__main__ import main
    from speechbrain_taskarith.vectors import save_state

    base, *models = make(3, seed=6)
    save_state(base, "base.safetensors")
    save_state(models[0], "a.safetensors")
    save_state(models[1], "b.safetensors")
    (tmp_path / "merge.yaml").write_text(
        "base: base.safetensors\n"
        "finetuned: [a.safetensors, b.safetensors]\n"
        "rule:\n"
        "    name: by-layer\n"
        "    rules:\n"
        '        "enc.*": {name: TIES, scale: 0.5}\n'
        "    default: {name: breadcrumbs, gamma: 0.0}\n"
        "weights: [1, 2]\n"
        "densities: [0.5, 0.25]\n"
        "output: out.safetensors\n"
    )
    assert main(["merge", "merge.yaml"]) == 0
    rule = ByLayer(
        {"enc.*": TIES([0.5, 0.25], 0.5, weights=[1, 2])},
        Breadcrumbs([0.5, 0.25], 0.0, weights=[1, 2]),
    )
    expected = rule(base, [TaskVector.between(base, m) for m in models[:2]])
    found = open_state("out.safetensors")
    assert all(torch.equal(found[n], v) for n, v in expected.items())
    flags = ["--weights", "3", "1", "--rule", "TIES", "--densities", "1", "1"]
    flags += ["-o", "flags.safetensors"]
    assert main(["merge", "merge.yaml", *flags]) == 0
    rule = TIES([1.0, 1.0], weights=[3, 1])
    expected = rule(base, [TaskVector.between(base, m) for m in models[:2]])
    found = open_state("flags.safetensors")
    assert all(torch.equal(found[n], v) for n, v in expected.items())
    assert command.read_plan("merge.yaml").weights == [1, 2]
    assert main(["merge", "merge.yaml", "--rule", "ModelStock"]) != 0
    assert "densities: ModelStock has none" in capsys.readouterr().err


# ----------------------------------------------------------------- by layer


def test_each_group_is_merged_as_if_it_were_the_model():
    base, *vectors = make(4, seed=7)
    rules = {
        "enc.layers.*": TIES(0.3, 0.5),
        "enc*": TSVM(),
        "*": Karcher(scale=2),
    }
    rule = ByLayer({k: rules[k] for k in ("enc.layers.*", "enc*")}, rules["*"])
    names = {
        "enc.layers.*": ["enc.layers.0.w", "enc.layers.1.w"],
        "enc*": ["enc.norm"],
        "*": ["dec.w", "dec.b"],
    }
    merged, edited = rule.combine(vectors), rule(base, vectors)
    for pattern, group in names.items():
        part = [{n: v[n] for n in group} for v in vectors]
        alone = rules[pattern].combine(part)
        applied = rules[pattern]({n: base[n] for n in group}, part)
        for name in group:
            assert torch.equal(merged[name], alone[name])
            assert torch.equal(edited[name], applied[name])


def test_a_group_has_its_own_prevailing_sign():
    tie = torch.tensor([1.0, 2.0, 2.0])
    vectors = [
        {
            "a": tie * torch.tensor([s, 1.0, 1.0]),
            "b": -tie * torch.tensor([s, 1, 1]),
        }
        for s in (1.0, -1.0)
    ]
    merged = ByLayer({"a": TIES(1), "b": TIES(1)}).combine(vectors)
    assert merged["a"].tolist() == [1, 2, 2]
    assert merged["b"].tolist() == [-1, -2, -2]


def test_what_matches_nothing_stays_the_bases_bits():
    base, *vectors = make(3, seed=8)
    base["dec.b"] = torch.tensor(-0.0)
    edited = ByLayer({"enc*": TIES()})(base, vectors)
    for name in ("dec.w", "dec.b"):
        assert torch.equal(
            edited[name].view(torch.int32), base[name].view(torch.int32)
        )
    vectors[0]["dec.w"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="task vector 1 of 2.*'dec.w'"):
        ByLayer({"enc*": TIES()})(base, vectors)


def test_groups_that_are_wrong_are_refused():
    base, *vectors = make(4)
    with pytest.raises(ValueError, match="'enk\\*' matches no parameter"):
        ByLayer({"enk*": TIES()})(base, vectors)
    with pytest.raises(TypeError, match=r"rules\['a'\]: expected a Rule"):
        ByLayer({"a": "TIES"})
    with pytest.raises(ValueError, match="expected {pattern: rule}"):
        ByLayer([TIES()])
    with pytest.raises(ValueError, match="2 task vectors|exactly 2"):
        ByLayer({"enc*": SelectiveAttention(0.5)}, TIES()).combine(vectors)
    with pytest.raises(ValueError, match="scales by the parameter"):
        LiNeS(ByLayer({"*": TIES()}), 0.1)
    with pytest.raises(ValueError, match="no argument 'scale'"):
        from_plain({"name": "ByLayer", "rules": {"*": "TIES"}}, scale=0.5)


# -------------------------------------------------- the rules of the ASR study


def test_pcb_with_few_positive_scores():
    """A small vector against a large one: all its scores are negative."""
    (tau,) = make(1, seed=9)
    small = {n: -0.1 * v for n, v in tau.items()}
    merged = PCB(0.2).combine([tau, small])
    assert_close(merged, reference.pcb([tau, small], 0.2), 1e-4)


def test_pcb_of_equal_entries_is_the_mean():
    vectors = [{"w": torch.ones(5)}, {"w": torch.ones(5)}]
    assert PCB().combine(vectors)["w"].tolist() == [1.0] * 5
    assert PCB().combine([{"w": torch.zeros(3)}])["w"].tolist() == [0.0] * 3


def test_sce_drops_what_no_vector_differs_in():
    a = {"w": torch.tensor([1.0, 5.0, 0.0])}
    b = {"w": torch.tensor([1.0, -1.0, 0.0])}
    merged = SCE(0.99).combine([a, b])["w"]
    assert merged.tolist() == [0, 0, 0]  # int(0.99 * 1): none is selected
    with pytest.raises(ValueError, match="at least 2"):
        SCE().combine([a])


@pytest.mark.parametrize("density", [0.1, 0.34, 0.5, 0.99])
def test_sce_selects_the_first_of_equal_variances(density):
    generator = torch.Generator().manual_seed(3)
    vectors = [
        {"w": torch.randint(-1, 2, (50,), generator=generator) * 0.1}
        for _ in range(3)
    ]
    merged = SCE(density).combine(vectors)
    assert_close(merged, reference.sce(vectors, density))


ATTENTION = {
    **{f"encoder.layers.{i}.self_attn.q_proj.weight": (3, 3) for i in range(4)},
    **{f"decoder.layers.{i}.encoder_attn.v_proj.bias": (3,) for i in range(2)},
    "encoder.layers.1.fc1.weight": (3, 3),
    "encoder.conv1.weight": (2, 3),
}


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_selective_attention_mixes_attention_layer_by_layer(mix):
    target, general = (
        {n: torch.randn(s) for n, s in ATTENTION.items()} for _ in range(2)
    )
    rule = SelectiveAttention(mix, alpha=0.4)
    merged = rule.combine([target, general])
    for name in ATTENTION:
        share = 1.0
        if "_proj" in name:
            layer = int(name.split(".")[2])
            last = 4 if name.startswith("encoder") else 2
            share = mix ** (0.4 * (layer + 1) / last)
        expected = share * target[name] + (1 - share) * general[name]
        torch.testing.assert_close(merged[name], expected)
    expected = reference.selective_attention([target, general], mix, 0.4)
    assert_close(merged, expected)


def test_selective_attention_without_depth_is_the_first_model():
    target, general = (
        {n: torch.randn(s) for n, s in ATTENTION.items()} for _ in range(2)
    )
    merged = SelectiveAttention(0.5, alpha=0).combine([target, general])
    assert_close(merged, target)


def test_selective_attention_without_attention_is_refused():
    with pytest.raises(ValueError, match="no parameter of a layer matches"):
        SelectiveAttention(0.5).combine(make(2))


def test_two_rules_for_one_tied_tensor_are_refused(tmp_path):
    models = [{"emb.w": torch.randn(4, 3), "w": torch.ones(2)} for _ in "ab"]
    for model in models:
        model["out.w"] = model["emb.w"]
    base, tuned = models
    tau = TaskVector.between(base, tuned)
    rule = ByLayer({"emb.*": TIES(0.3), "*": TaskArithmetic()})
    output = tmp_path / "merged.safetensors"
    match = "'out.w' and 'emb.w' are one tensor, but ByLayer has two rules"
    for merge in (
        lambda: rule.combine([tau]),
        lambda: rule(base, [tau]),
        lambda: merge_checkpoints(base, [tuned], rule, output),
    ):
        with pytest.raises(ValueError, match=match):
            merge()
    assert not output.exists()
    rule = ByLayer({"*.w": TIES(0.3)}, TaskArithmetic())
    merged = rule(base, [tau])
    assert merged["out.w"] is merged["emb.w"]
