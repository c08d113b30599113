"""SYN2REAL against the paper's equations, in plain loops and float64."""

import pytest
import torch

from speechbrain_taskarith.vectors import (
    TIES,
    TaskArithmetic,
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
