"""The scale search: what it finds, what it leaves behind, what it refuses."""

import csv
import itertools
import math

import pytest
import torch

from speechbrain_taskarith.metrics import wer as wer_of
from speechbrain_taskarith.vectors import (
    TaskVector,
    refuse_test_split,
    search_scale,
    search_scales,
)
from speechbrain_taskarith.vectors.application import edit_into


class Model(torch.nn.Module):
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = torch.nn.Linear(7, 5)
        self.decoder = torch.nn.Linear(5, 3)
        self.norm = torch.nn.BatchNorm1d(5)
        self.to(dtype)

    def forward(self, x):
        return self.decoder(self.norm(self.encoder(x)))


def make(seed=0, dtype=torch.float32):
    model = Model(seed, dtype)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    other = {
        k: v.clone() for k, v in Model(seed + 1, dtype).state_dict().items()
    }
    return model, base, TaskVector.between(base, other)


def position(model, base, tau, name):
    """How far along tau a parameter is, by projection."""
    delta = tau[name].double()
    moved = model.state_dict()[name].double() - base[name].double()
    return ((moved * delta).sum() / (delta * delta).sum()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_evaluated_has_the_bytes_of_apply(dtype):
    model, base, tau = make(dtype=dtype)
    seen = []

    def wer(model):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return 1.0 + len(seen)

    scales = [0.0, 0.1, 0.37, 1.0]
    search_scale(model, base, tau, wer, scales, hopeless=None)
    assert len(seen) == len(scales)
    for scale, state in zip(scales, seen):
        expected = tau.apply(base, scale)
        for name in base:
            assert torch.equal(state[name], expected[name]), (scale, name)


@pytest.mark.parametrize("numel", [0, 1, (1 << 17) - 1, (1 << 17) + 3])
def test_editing_in_pieces_equals_editing_whole(numel):
    torch.manual_seed(0)
    base, delta = torch.randn(numel), torch.randn(numel)
    tensor = torch.empty(numel)
    edit_into(tensor, base, delta, 0.3, "w")
    assert torch.equal(tensor, base + delta * 0.3)
    wide = torch.empty(4, 6).t()  # not contiguous
    base, delta = torch.randn(6, 4), torch.randn(6, 4)
    edit_into(wide, base, delta, -0.7, "w")
    assert torch.equal(wide, base + delta * -0.7)


def test_the_best_scale_wins_and_the_model_is_restored():
    model, base, tau = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def wer(model):
        return 10 + (position(model, base, tau, "encoder.weight") - 0.4) ** 2

    search = search_scale(model, base, tau, wer, [0, 0.2, 0.4, 0.6, 1.0])
    assert search.best == 0.4
    assert search.best_wer == pytest.approx(10)
    assert [row["scale"] for row in search.table] == [0, 0.2, 0.4, 0.6, 1.0]
    assert [row["best"] for row in search.table] == [0, 0, 1, 0, 0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_model_comes_back_as_it_came_also_when_it_is_not_the_base():
    model, base, tau = make()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []

    def wer(model):
        seen.append(model.state_dict()["encoder.bias"].clone())
        return 1.0

    search_scale(model, base, tau, wer, [0.0])
    assert torch.equal(seen[0], base["encoder.bias"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_leaving_the_best():
    model, base, tau = make()
    wers = iter([3.0, 1.0, 2.0])
    search = search_scale(
        model, base, tau, lambda m: next(wers), [0.1, 0.2, 0.3], leave="best"
    )
    assert search.best == 0.2
    expected = tau.apply(base, 0.2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_an_exception_restores_weights_buffers_and_modes():
    model, base, tau = make()
    model.train()
    model.decoder.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def wer(model):
        model.eval()
        model.norm.running_mean.add_(5)
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the decoder broke")
        return 1.0

    with pytest.raises(RuntimeError, match="the decoder broke"):
        search_scale(model, base, tau, wer, [0.1, 0.2, 0.3], leave="best")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training and not model.decoder.training


def test_an_evaluation_cannot_spoil_the_next_by_changing_buffers():
    model, base, tau = make()
    seen = []

    def wer(model):
        seen.append(model.norm.running_mean.clone())
        model.train()
        model(torch.randn(8, 7))
        return 1.0

    search_scale(model, base, tau, wer, [0.1, 0.2, 0.3])
    assert len(seen) == 3
    for mean in seen:
        assert torch.equal(mean, base["norm.running_mean"])


def test_parameters_outside_the_vector_are_the_bases_while_searching():
    model, base, tau = make()
    with torch.no_grad():
        model.decoder.weight.zero_()

    def wer(model):
        assert torch.equal(model.decoder.weight, base["decoder.weight"])
        return 1.0

    search_scale(model, base, tau.restrict("encoder.*"), wer, [0.5])
    assert not model.decoder.weight.any()


def test_groups_find_the_minimum_of_a_separable_error():
    model, base, tau = make()
    best = {"encoder": 0.6, "decoder": 0.2, "*": 0.4}
    scales = [0.0, 0.2, 0.4, 0.6, 0.8]

    def error(at):
        return 1 + sum((at[group] - best[group]) ** 2 for group in best)

    def wer(model):
        return error(
            {
                "encoder": position(model, base, tau, "encoder.weight"),
                "decoder": position(model, base, tau, "decoder.weight"),
                "*": position(model, base, tau, "norm.weight")
                if tau["norm.weight"].any()
                else 0.4,
            }
        )

    search = search_scale(
        model,
        base,
        tau,
        wer,
        scales,
        groups={"encoder": "encoder.*", "decoder": ["decoder.*"]},
        hopeless=None,
        rounds=5,
    )
    # Brute force over the whole grid.
    grid = min(
        itertools.product(scales, scales),
        key=lambda at: error({"encoder": at[0], "decoder": at[1], "*": 0.4}),
    )
    assert (
        search.best_by_group["encoder"],
        search.best_by_group["decoder"],
    ) == grid
    # What it returns is what apply takes.
    edited = tau.apply(base, search.best)
    delta = tau["encoder.weight"]
    torch.testing.assert_close(
        edited["encoder.weight"], base["encoder.weight"] + 0.6 * delta
    )
    # No setting is paid for twice.
    settings = [
        tuple(v for k, v in row.items() if k.startswith("scale"))
        for row in search.table
    ]
    assert len(settings) == len(set(settings))


def test_groups_with_scales_of_their_own_and_none_left_over():
    model, base, tau = make()
    tau = tau.restrict(["encoder.*", "decoder.*"])

    def wer(model):
        return 1 + abs(position(model, base, tau, "encoder.weight") - 0.35)

    search = search_scale(
        model,
        base,
        tau,
        wer,
        {"*": [0.1, 0.3], "encoder.*": [0.35, 0.4], "decoder.*": [0.5]},
        groups=["encoder.*", "decoder.*"],
    )
    assert search.best == {"encoder.*": 0.35, "decoder.*": 0.3}


def test_hopeless_settings_end_their_side():
    model, base, tau = make()
    calls = []

    def wer(model):
        scale = position(model, base, tau, "encoder.weight")
        calls.append(round(scale, 3))
        return 10.0 if scale < 0.35 else 25.0

    search = search_scale(
        model, base, tau, wer, [-0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8]
    )
    assert 0.4 in calls and 0.6 not in calls and 0.8 not in calls
    assert -0.4 in calls
    states = {row["scale"]: row["state"] for row in search.table}
    assert states[0.4] == "hopeless"
    assert states[0.6] == states[0.8] == "skipped"
    assert search.best == 0.0  # of equals, the one nearest the base


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_hopeless_and_never_best(bad):
    model, base, tau = make()
    wers = iter([bad, 7.0, 8.0])
    search = search_scale(
        model, base, tau, lambda m: next(wers), [0.1, -0.2, -0.3], hopeless=None
    )
    assert search.best == -0.2
    assert search.table[0]["state"] == "hopeless"
    with pytest.raises(ValueError, match="no scale gave a usable"):
        search_scale(model, base, tau, lambda m: math.nan, [0.1, 0.2])


def test_constraint_old_domains_may_not_suffer():
    model, base, tau = make()
    table = {
        0.0: {"old": 10.0, "new": 40.0},
        0.25: {"old": 10.5, "new": 30.0},
        0.5: {"old": 12.0, "new": 10.0},
        1.0: {"old": 14.0, "new": 6.0},
    }

    def wer(model):
        at = position(model, base, tau, "encoder.weight")
        return table[min(table, key=lambda s: abs(s - at))]

    scales = [0.25, 0.5, 1.0]
    free = search_scale(model, base, tau, wer, scales)
    assert free.best == 1.0  # the least mean
    search = search_scale(
        model, base, tau, wer, scales, max_degradation=0.1, domains=["old"]
    )
    assert search.best == 0.25
    assert [row["state"] for row in search.table] == [
        "ok", "ok", "forbidden", "forbidden",
    ]  # fmt: skip
    assert search.table[1]["domains"] == {"old": 10.5, "new": 30.0}
    strict = search_scale(
        model, base, tau, wer, scales, max_degradation=0.0, domains=["old"]
    )
    assert strict.best == 0.0
    with pytest.raises(ValueError, match="greek"):
        search_scale(
            model, base, tau, wer, [0.5], max_degradation=0.1,
            domains=["greek"],
        )  # fmt: skip
    with pytest.raises(ValueError, match="domain"):
        search_scale(
            model, base, tau, lambda m: 1.0, [0.5], max_degradation=0.1
        )
    with pytest.raises(ValueError, match=r"protects \['old'\], and their word"):
        search_scale(
            model, base, tau, lambda m: {"old": math.nan, "new": 1.0},
            [0.5], max_degradation=0.1, domains=["old"],
        )  # fmt: skip


@pytest.mark.parametrize(
    "split",
    ["test", "test-clean", "Test_other", "tst-COMMON", "eval92", "devtest",
     "accentTest", "TEST", "my.test.csv", "eval2000"],
)  # fmt: skip
def test_test_splits_are_refused(split):
    model, base, tau = make()

    def wer(model):
        raise AssertionError("must not be evaluated")

    for arguments in ({"split": split}, {"select_on": split}):
        with pytest.raises(ValueError, match="looks like test data"):
            search_scale(model, base, tau, wer, [0.1], **arguments)
    wer.split = split
    with pytest.raises(ValueError, match="looks like test data"):
        search_scale(model, base, tau, wer, [0.1])


@pytest.mark.parametrize(
    "split", ["valid", "dev-clean", "validation", "latest", "contest", "dev"]
)
def test_other_splits_are_not(split):
    refuse_test_split(split)


def test_the_oracle_says_so_in_every_row():
    model, base, tau = make()
    search = search_scale(
        model, base, tau, lambda m: 1.0, [0.1, 0.2],
        split="test", select_on="real_target",
    )  # fmt: skip
    assert search.oracle
    assert all(row["oracle"] for row in search.table)
    assert all(row["select_on"] == "real_target" for row in search.table)
    plain = search_scale(model, base, tau, lambda m: 1.0, [0.1])
    assert not plain.oracle and plain.select_on == "valid"


@pytest.mark.parametrize(
    "scales, groups, match",
    [
        ([], None, "at least one"),
        ([float("nan")], None, "finite"),
        ([0.1], ["enc.*"], "matches no"),
        ({"encoder.*": [0.1], "x": [1]}, ["encoder.*"], "no groups"),
    ],
)
def test_bad_arguments(scales, groups, match):
    model, base, tau = make()
    with pytest.raises(ValueError, match=match):
        search_scale(model, base, tau, lambda m: 1.0, scales, groups=groups)


def test_weights_of_another_model_are_refused():
    model, base, tau = make()
    del base["decoder.bias"]
    with pytest.raises((ValueError, KeyError), match="decoder.bias"):
        search_scale(model, base, tau, lambda m: 1.0, [0.1])


def test_a_vector_of_another_base_is_taken():
    """As SYN2REAL's sources give one; also one that knows no base."""
    model, base, tau = make()
    other = {name: tensor + 1 for name, tensor in base.items()}
    for vector in (tau, dict(tau)):
        search = search_scale(model, other, vector, lambda m: 1.0, [0.1])
        assert search.best == 0.1
    tau.apply(other, search.best, any_base=True)


def test_stored_vectors_are_taken(tmp_path):
    model, base, tau = make()
    path = tau.save(tmp_path / "tau.safetensors")
    assert search_scale(model, base, path, lambda m: 1.0, [0.1]).best == 0.1
    found = search_scales(model, base, {"a": path}, lambda m: 1.0, [0.1])
    assert found.best == {"a": 0}
    with pytest.raises(TypeError, match="expected a TaskVector.*got list"):
        search_scale(model, base, [tau], lambda m: 1.0, [0.1])


def test_reports_are_taken_for_a_wer():
    model, base, tau = make()
    report = wer_of(["a b"], ["a c"])
    for result in (report, {"us": report}):
        search = search_scale(model, base, tau, lambda m, r=result: r, [0.1])
        assert search.best_wer == 50.0
    with pytest.raises(TypeError, match="expected a WER.*got None"):
        search_scale(model, base, tau, lambda m: None, [0.1])


def test_tied_parameters_are_edited_once():
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)}
    )
    model["b"].weight = model["a"].weight
    base = {k: v.clone() for k, v in model.state_dict().items()}
    tau = TaskVector.between(base, {k: v + 1 for k, v in base.items()})

    def wer(model):
        torch.testing.assert_close(model["a"].weight, base["a.weight"] + 0.5)
        return 1.0

    search_scale(model, base, tau, wer, [0.5])
    assert torch.equal(model["b"].weight, base["a.weight"])


def test_csv_and_plot(tmp_path):
    model, base, tau = make()

    def wer(model):
        at = position(model, base, tau, "encoder.weight")
        return {"us": 10 + (at - 0.3) ** 2, "german": 20 + (at - 0.3) ** 2}

    search = search_scale(
        model, base, tau, wer, [0, 0.3, 0.6], groups=["encoder.*"]
    )
    search.to_csv(tmp_path / "scales.csv")
    rows = list(csv.DictReader(open(tmp_path / "scales.csv")))
    assert len(rows) == len(search.table)
    assert float(rows[0]["wer us"]) == search.table[0]["domains"]["us"]
    search.plot(tmp_path / "scales.png")
    assert (tmp_path / "scales.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "scales.csv", "scales.png",
    ]  # fmt: skip
    assert search.to_dict()["best"] == search.best
