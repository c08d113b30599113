"""SYN2REAL against the paper's equations, in plain loops and float64."""

import pytest
import torch

from speechbrain_taskarith.vectors import (
    TIES,
    ByLayer,
    TaskArithmetic,
    TaskVector,
    save_state,
    syn2real,
)


def make_state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "enc.weight": torch.randn(3, 4, generator=generator),
        "dec.bias": torch.randn(5, generator=generator),
        "norm.running_var": torch.rand(3, generator=generator),
        "steps": torch.tensor(seed),
    }


def naive(target, pairs, scale):
    """theta_syn^T + scale / n sum_i (theta_real^i - theta_syn^i)."""
    result = {}
    for name in ("enc.weight", "dec.bias"):
        flat = target[name].double().flatten().tolist()
        for index in range(len(flat)):
            total = 0.0
            for real, synthetic in pairs:
                total += real[name].double().flatten().tolist()[index]
                total -= synthetic[name].double().flatten().tolist()[index]
            flat[index] += scale * total / len(pairs)
        result[name] = torch.tensor(flat).double().reshape(target[name].shape)
    return result


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("scale", [0.2, 1.0, -0.5, 0.0])
def test_formula(number, scale):
    target = make_state(0)
    pairs = [(make_state(10 + i), make_state(20 + i)) for i in range(number)]
    edited = syn2real(target, pairs, scale=scale)
    for name, expected in naive(target, pairs, scale).items():
        torch.testing.assert_close(
            edited[name].double(), expected, atol=1e-6, rtol=1e-6
        )
    for name in ("norm.running_var", "steps"):
        assert torch.equal(edited[name], target[name])
    assert list(edited) == list(target)


def test_each_source_may_have_names_of_its_own():
    target = make_state(0)
    pairs = [(make_state(10 + i), make_state(20 + i)) for i in range(2)]
    wrapped = [
        {f"model.{name}": tensor for name, tensor in state.items()}
        for state in pairs[1]
    ]
    expected = syn2real(target, pairs, scale=0.5)
    found = syn2real(target, [pairs[0], tuple(wrapped)], scale=0.5)
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_default_scale_is_the_papers():
    target = {"w": torch.zeros(1)}
    pairs = [({"w": torch.ones(1)}, {"w": torch.zeros(1)})]
    assert syn2real(target, pairs)["w"].item() == pytest.approx(0.2)


def test_a_source_edited_by_its_own_vector_is_its_real_model():
    real, synthetic = make_state(1), make_state(2)
    edited = syn2real(synthetic, [(real, synthetic)], scale=1.0)
    for name in ("enc.weight", "dec.bias"):
        torch.testing.assert_close(edited[name], real[name])


def test_scale_by_parameter_and_choice_of_parameters():
    target, real, synthetic = (make_state(i) for i in range(3))
    edited = syn2real(target, [(real, synthetic)], scale={"enc.*": 0.5})
    delta = real["enc.weight"] - synthetic["enc.weight"]
    torch.testing.assert_close(
        edited["enc.weight"], target["enc.weight"] + 0.5 * delta
    )
    assert torch.equal(edited["dec.bias"], target["dec.bias"])
    edited = syn2real(target, [(real, synthetic)], exclude="enc.*")
    assert torch.equal(edited["enc.weight"], target["enc.weight"])
    assert not torch.equal(edited["dec.bias"], target["dec.bias"])


def test_paths_modules_and_a_lone_pair(tmp_path):
    models = [torch.nn.Linear(2, 2) for _ in range(3)]
    states = [
        {k: v.detach().clone() for k, v in m.state_dict().items()}
        for m in models
    ]
    expected = syn2real(states[0], [(states[1], states[2])])
    path = save_state(states[1], tmp_path / "real.ckpt")
    edited = syn2real(models[0], (path, models[2]))
    for name in expected:
        assert torch.equal(edited[name], expected[name])
    # Inputs are left alone.
    assert torch.equal(models[0].weight, states[0]["weight"])


def test_a_rule_combines_and_scale_scales():
    target = make_state(0)
    pairs = [(make_state(10 + i), make_state(20 + i)) for i in range(3)]
    edited = syn2real(target, pairs, scale=0.3, rule=TaskArithmetic(scale=9.0))
    for name in ("enc.weight", "dec.bias"):
        total = sum((r[name] - s[name]).double() for r, s in pairs)
        torch.testing.assert_close(
            edited[name].double(),
            target[name].double() + 0.3 * total,
            atol=1e-5,
            rtol=1e-5,
        )
    everything = syn2real(target, pairs, scale=0.3, rule=TIES(density=0.0))
    for name in target:
        assert torch.equal(everything[name], target[name])


@pytest.mark.parametrize(
    "pairs, match",
    [
        ([], "at least one"),
        ([("only one",)], r"pairs\[0\]"),
        ([{"w": torch.ones(1)}], r"pairs\[0\]"),
    ],
)
def test_bad_pairs(pairs, match):
    with pytest.raises(ValueError, match=match):
        syn2real(make_state(0), pairs)


def test_models_that_differ_are_listed():
    target, real, synthetic = (make_state(i) for i in range(3))
    target["extra"] = torch.ones(1)
    target["dec.bias"] = torch.ones(7)
    with pytest.raises(ValueError, match="extra(.|\n)*dec.bias"):
        syn2real(target, [(real, synthetic)])
    del real["enc.weight"]
    with pytest.raises(KeyError, match="enc.weight"):
        syn2real(make_state(0), [(real, synthetic)])


def test_nan_is_refused():
    target, real, synthetic = (make_state(i) for i in range(3))
    real["dec.bias"][2] = float("nan")
    with pytest.raises(ValueError, match="dec.bias"):
        syn2real(target, [(real, synthetic)])


def test_the_name_is_the_function_also_after_the_file_was_imported():
    import speechbrain_taskarith.vectors as room
    import speechbrain_taskarith.vectors.synthetic_to_real  # noqa: F401

    assert callable(room.syn2real) and callable(room.syn2real)


def naive_two_scales(target, pairs, base, target_scale, scale):
    """Return base + b (theta_syn^T - base) + a mean_i (real_i - syn_i)."""
    result = {}
    for name in ("enc.weight", "dec.bias"):
        flat = []
        for index in range(target[name].numel()):
            start = base[name].flatten()[index].item()
            own = target[name].flatten()[index].item() - start
            added = [
                real[name].flatten()[index].item()
                - synthetic[name].flatten()[index].item()
                for real, synthetic in pairs
            ]
            value = start + target_scale * own
            flat.append(value + scale * sum(added) / len(added))
        shape = target[name].shape
        result[name] = torch.tensor(flat, dtype=torch.float64).reshape(shape)
    return result


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(
    "target_scale, scale",
    [(0.5, 0.3), (0.0, 1.0), (0.7, 0.0), (1.3, -0.2), (1.0, 0.2), (-0.5, 2.0)],
)
def test_two_scales(number, target_scale, scale):
    target, base = make_state(0), make_state(1)
    pairs = [(make_state(10 + i), make_state(20 + i)) for i in range(number)]
    edited = syn2real(
        target, pairs, scale=scale, target_scale=target_scale, base=base
    )
    expected = naive_two_scales(target, pairs, base, target_scale, scale)
    for name in expected:
        torch.testing.assert_close(
            edited[name].double(), expected[name], atol=1e-6, rtol=1e-6
        )
    # Counters and running statistics are the target's, not the base's.
    for name in ("norm.running_var", "steps"):
        assert torch.equal(edited[name], target[name])
    assert list(edited) == list(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_scale_of_1_needs_no_base_and_changes_no_bit(dtype):
    target, base, real, synthetic = (
        {k: v.to(dtype) if v.ndim else v for k, v in make_state(i).items()}
        for i in range(4)
    )
    paper = TaskVector.between(synthetic, real).apply(
        target, 0.3, any_base=True
    )
    for more in (
        {},
        {"target_scale": 1.0, "base": base},
        {"target_scale": {"enc.*": 1}},
    ):
        edited = syn2real(target, (real, synthetic), scale=0.3, **more)
        for name in target:
            assert torch.equal(edited[name], paper[name]), name


def test_half_precision_is_rounded_once():
    target, base, real, synthetic = (
        {"w": torch.randn(50, generator=torch.manual_seed(i)).bfloat16()}
        for i in range(4)
    )
    how = {"scale": 0.3, "target_scale": 0.4, "base": base}
    t, b, r, s = (m["w"].double() for m in (target, base, real, synthetic))
    expected = b + 0.4 * (t - b) + 0.3 * (r - s)
    edited = syn2real(target, (real, synthetic), **how)["w"]
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited, expected.bfloat16())
    wide = syn2real(target, (real, synthetic), dtype="float32", **how)["w"]
    torch.testing.assert_close(wide, expected.float())


def test_both_scales_by_parameter():
    target, base, real, synthetic = (make_state(i) for i in range(4))
    edited = syn2real(
        target,
        (real, synthetic),
        scale={"dec.*": 0.5},
        target_scale={"enc.*": 0.25},
        base=base,
    )
    torch.testing.assert_close(
        edited["enc.weight"],
        0.75 * base["enc.weight"] + 0.25 * target["enc.weight"],
    )
    # A parameter without a target scale keeps all that the target learned.
    torch.testing.assert_close(
        edited["dec.bias"],
        target["dec.bias"] + 0.5 * (real["dec.bias"] - synthetic["dec.bias"]),
    )
    with pytest.raises(ValueError, match="'decoder.*' matches no"):
        syn2real(target, (real, synthetic), target_scale={"decoder.*": 0.5})


def test_what_is_excluded_is_the_targets_also_in_the_base():
    target, base, real, synthetic = (make_state(i) for i in range(4))
    base["dec.bias"] = torch.zeros(7)  # another vocabulary
    how = {"scale": 0.5, "target_scale": 0.5, "base": base}
    edited = syn2real(target, (real, synthetic), exclude="dec.*", **how)
    assert torch.equal(edited["dec.bias"], target["dec.bias"])
    assert not torch.equal(edited["enc.weight"], target["enc.weight"])
    with pytest.raises(ValueError, match="base and the target(.|\n)*dec.bias"):
        syn2real(target, (real, synthetic), **how)


def test_two_scales_of_files_folders_modules_and_wrappers(tmp_path):
    torch.manual_seed(0)
    models = [torch.nn.Linear(2, 2) for _ in range(4)]
    states = [
        {k: v.detach().clone() for k, v in m.state_dict().items()}
        for m in models
    ]
    how = {"scale": 0.3, "target_scale": 0.6}
    expected = syn2real(states[0], states[1:3], base=states[3], **how)
    real = save_state(states[1], tmp_path / "real.ckpt")
    folder = tmp_path / "synthetic"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_state(states[2], folder / "model.safetensors")
    wrapped = {f"module.{name}": tensor for name, tensor in states[3].items()}
    torch.save({"model": wrapped}, tmp_path / "base.pt")
    edited = syn2real(
        models[0], [(real, folder)], base=tmp_path / "base.pt", **how
    )
    assert list(edited) == list(expected)
    for name in expected:
        assert torch.equal(edited[name], expected[name])
    assert torch.equal(models[0].weight, states[0]["weight"])


def test_tied_tensors_stay_one():
    def tied(seed):
        state = make_state(seed)
        return {**state, "out.weight": state["enc.weight"]}

    models = [tied(seed) for seed in range(4)]
    edited = syn2real(
        models[0], models[1:3], scale=0.5, target_scale=0.5, base=models[3]
    )
    assert edited["out.weight"] is edited["enc.weight"]
    plain = naive_two_scales(models[0], [models[1:3]], models[3], 0.5, 0.5)
    torch.testing.assert_close(
        edited["out.weight"].double(), plain["enc.weight"], atol=1e-6, rtol=0
    )
    with pytest.raises(ValueError, match="two scales"):
        syn2real(
            models[0],
            models[1:3],
            target_scale={"out.*": 0.5},
            base=models[3],
        )
    # Sources that learned two tensors where the target has one.
    models[1] = {**models[1], "out.weight": models[1]["out.weight"] + 1}
    with pytest.raises(ValueError, match="out.weight"):
        syn2real(models[0], models[1:3], target_scale=0.5, base=models[3])


def test_a_rule_with_two_scales():
    target, base = make_state(0), make_state(1)
    pairs = [(make_state(10 + i), make_state(20 + i)) for i in range(3)]
    edited = syn2real(
        target,
        pairs,
        scale=0.3,
        target_scale=0.5,
        base=base,
        rule=TaskArithmetic(),
    )
    # The rule's sum is three times the mean.
    expected = naive_two_scales(target, pairs, base, 0.5, 0.9)
    for name in expected:
        torch.testing.assert_close(
            edited[name].double(), expected[name], atol=1e-5, rtol=1e-5
        )


def test_a_rule_that_scales_by_parameter_is_heard():
    target, real, synthetic = (make_state(i) for i in range(3))
    rule = ByLayer({"enc.*": TaskArithmetic(scale=0.5)}, TaskArithmetic())
    edited = syn2real(target, (real, synthetic), scale=0.4, rule=rule)
    for name, share in (("enc.weight", 0.2), ("dec.bias", 0.4)):
        delta = real[name] - synthetic[name]
        torch.testing.assert_close(edited[name], target[name] + share * delta)


def test_a_support_languages_own_vector():
    """Target plus real source minus base, as in arXiv 2601.07038."""
    target, base, real = (make_state(i) for i in range(3))
    edited = syn2real(
        target, (real, base), scale=0.3, target_scale=0.8, base=base
    )
    for name in ("enc.weight", "dec.bias"):
        b, d = base[name], target[name] - base[name]
        torch.testing.assert_close(
            edited[name], b + 0.8 * d + 0.3 * (real[name] - b)
        )


def test_refusals_of_the_second_scale():
    target, base, real, synthetic = (make_state(i) for i in range(4))
    pair = (real, synthetic)
    with pytest.raises(ValueError, match="give base="):
        syn2real(target, pair, target_scale=0.5)
    with pytest.raises(ValueError, match="give base="):
        syn2real(target, pair, target_scale={"enc.*": 0.5})
    with pytest.raises(ValueError, match="the target's own weights"):
        syn2real(target, pair, target_scale=0.5, base=dict(target))
    with pytest.raises(ValueError, match="finite"):
        syn2real(target, pair, target_scale=float("nan"), base=base)
    del base["enc.weight"]
    # Named also where the second scale is 1 and the base cancels out.
    for target_scale in (0.5, 1.0):
        with pytest.raises(ValueError, match="base and the target(.|\n)*enc.w"):
            syn2real(target, pair, target_scale=target_scale, base=base)
    vector = TaskVector.between(synthetic, real)
    with pytest.raises(ValueError, match="where a model is expected"):
        syn2real(target, pair, target_scale=0.5, base=vector)
    base = make_state(1)
    base["dec.bias"][1] = float("nan")
    with pytest.raises(ValueError, match="dec.bias"):
        syn2real(target, pair, target_scale=0.5, base=base)
