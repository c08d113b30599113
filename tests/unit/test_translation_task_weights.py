"""Task weights: norms by hand, order, accumulation, resuming, torchjd."""

import math

import pytest
import torch
import torch.nn.functional as F
from speechbrain.utils.checkpoints import Checkpointer
from translation_toy import toy_batch, toy_model

from speechbrain_taskarith.translation import (
    GradientAggregator,
    TaskNormWeights,
    TranslationObjective,
)

TASKS = ("st", "asr", "mt")


def losses_of(model, inputs, targets, tasks=TASKS):
    out = model(tasks=tasks, **inputs)
    return TranslationObjective(0)(out, **targets, tasks=tasks)


def norms_by_hand(model, inputs, targets):
    """Return `{(task, part): norm}` from one backward pass a task."""
    table = {}
    for task in TASKS:
        model.zero_grad()
        losses_of(model, inputs, targets)[task].backward()
        for part, module in model.parts().items():
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            squares = sum(float(g.double().square().sum()) for g in grads)
            table[task, part] = math.sqrt(squares)
    model.zero_grad()
    return table


def expected_weights(norms, k=1.0):
    def ratio(task, part):
        return min(1.0, norms[task, part] / norms["st", part])

    mt = max(ratio("mt", "textual"), ratio("mt", "decoder"))
    return {"asr": ratio("asr", "acoustic") ** k, "mt": mt ** (k / 2)}


@pytest.mark.parametrize("k", [1.0, 2.5])
def test_weights_are_the_formula(k):
    model = toy_model().double()
    inputs, targets = doubled(toy_batch())
    # So that neither ratio is capped.
    scaled = {"asr": 0.05, "mt": 0.05, "st": 1.0}
    norms = {
        key: norm * scaled[key[0]]
        for key, norm in norms_by_hand(model, inputs, targets).items()
    }
    expected = expected_weights(norms, k)
    assert all(0.0 < w < 1 for w in expected.values())
    weights = TaskNormWeights(interval=1, exponent=k, floor=0.0)
    losses = losses_of(model, inputs, targets)
    losses = {t: scaled[t] * loss for t, loss in losses.items()}
    weights.observe(losses, model.parts())
    assert all(p.grad is None for p in model.parameters())
    weights.step()
    for task, value in expected.items():
        assert weights[task] == pytest.approx(value, rel=1e-9)
    assert weights["st"] == 1.0


def doubled(batch):
    return [
        {
            name: t.double() if t.is_floating_point() and name == "x" else t
            for name, t in part.items()
        }
        for part in batch
    ]


def measure(weights, factors):
    """Measure a task with these ratios, the same batch for both tasks."""
    layer = torch.nn.Linear(2, 1)
    for factor in factors:
        out = layer(torch.ones(1, 2)).sum()
        losses = {"st": out, "asr": factor * out}
        weights.observe(losses, {"acoustic": layer})
        weights.step()
    return weights["asr"]


def test_weights_are_capped_at_one_and_may_recover():
    weights = TaskNormWeights(["asr"], interval=1)
    assert measure(weights, [10.0]) == 1.0
    assert measure(weights, [0.5, 0.5]) == 0.25
    assert measure(weights, [2.0]) == 0.5
    assert measure(weights, [10.0]) == 1.0


def test_norms_are_averaged_and_a_ratio_counts_as_far_as_it_is_certain():
    factors = [0.2, 0.3, 0.4, 0.5]
    plain = TaskNormWeights(["asr"], interval=4, standard_errors=0.0)
    assert measure(plain, factors) == pytest.approx(0.35)
    # The mean of the four has a standard error of 0.1291 / 2.
    error = 0.129099 / 2 / 0.35
    sure = TaskNormWeights(["asr"], interval=4, standard_errors=2.0)
    expected = 0.35 * math.exp(2 * error)
    assert measure(sure, factors) == pytest.approx(expected, rel=1e-5)
    unsure = TaskNormWeights(["asr"], interval=4, standard_errors=99.0)
    assert measure(unsure, factors) == 1.0
    # Only the last `average` updates of an interval are measured.
    short = TaskNormWeights(["asr"], interval=4, average=2)
    due = []
    for _ in range(4):
        due.append(short.due)
        short.step()
    assert due == [False, False, True, True]


def same_task_twice(measurements, factor=1.0, **settings):
    """Weigh a task against itself on other batches; return all weights."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(20, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)
    )
    truth = torch.randn(20, 5)
    weights = TaskNormWeights(["asr"], floor=0.1, **settings)

    def loss():
        x = torch.randn(16, 20)
        return F.cross_entropy(net(x), (x @ truth).argmax(1))

    seen = []
    for _ in range(measurements * weights.interval):
        losses = {"st": loss(), "asr": factor * loss()}
        weights.observe(losses, {"acoustic": net})
        weights.step()
        seen.append(weights["asr"])
    return seen


def test_noise_stops_no_task():
    seen = same_task_twice(200, interval=5)
    assert min(seen) > 0.8, "a task compared with itself stays near 1"
    assert 0.0 in same_task_twice(200, interval=1), "one batch would stop it"
    # Half the gradient is seen through the noise.
    assert 0.0 in same_task_twice(8, interval=5, factor=0.5)


def batches_of_one_kind(weights, factor, updates, kinds=("st", "asr", "mt")):
    """Train on batches that hold one task each, in turn."""
    torch.manual_seed(0)
    parts = {
        part: torch.nn.Linear(1, 1)
        for part in ("acoustic", "textual", "decoder")
    }
    for update in range(updates):
        kind = kinds[update % len(kinds)]
        # Each part has a gradient of 1 for "st", of `factor` for others.
        loss = sum(layer(torch.ones(1, 1)).sum() for layer in parts.values())
        losses = {kind: loss if kind == "st" else factor * loss}
        if weights.due:
            weights.observe(losses, parts)
        if kind in weights.active:
            weights.total(losses)
        weights.step()


@pytest.mark.parametrize("interval, average", [(7, 10), (10, 1), (20, 4)])
@pytest.mark.parametrize("factor, k", [(5.0, 1.0), (0.8, 0.5)])
def test_batches_of_one_kind_at_a_time(interval, average, factor, k):
    weights = TaskNormWeights(interval=interval, average=average, exponent=k)
    batches_of_one_kind(weights, factor, 2 * interval + 10)
    count = len(weights.history)
    assert count == 2 + (interval == 7)
    expected = min(1.0, factor) ** (k * count)
    assert weights["asr"] == pytest.approx(expected)
    assert weights["mt"] == pytest.approx(expected**0.5)


def test_a_task_that_was_not_seen_keeps_its_weight(caplog):
    weights = TaskNormWeights(interval=8, average=2)
    batches_of_one_kind(weights, 0.5, 14, kinds=("st", "mt"))
    # Measured on until the next measurement begins, at the 15th update.
    assert weights["asr"] == 1.0 and weights["mt"] == pytest.approx(0.5**0.5)
    assert [entry["update"] for entry in weights.history] == [14]
    assert "'asr' is not measured, and its weight stays 1" in caplog.text
    assert "no gradient of 'asr' in the last 8 update(s)" in caplog.text
    assert "task 'mt' is not measured" not in caplog.text


def test_a_frozen_part_is_not_waited_for(caplog):
    weights = TaskNormWeights(["asr"], interval=50, average=2)
    layer = torch.nn.Linear(2, 1).requires_grad_(False)
    head = torch.nn.Linear(1, 1)
    measured = 0
    for _ in range(100):
        measured += weights.due
        out = head(layer(torch.ones(1, 2))).sum()
        weights.observe({"st": out, "asr": out}, {"acoustic": layer})
        weights.step()
    assert weights["asr"] == 1.0 and measured == 2 + 18 + 2
    assert "frozen parameters" in caplog.text


def test_a_gradient_of_zero_is_not_a_small_one(caplog):
    weights = TaskNormWeights(["asr"], interval=1)
    assert measure(weights, [0.0]) == 1.0
    assert "'asr' is not measured" in caplog.text
    assert weights.active == ("st", "asr")
    # Nor does one of many count.
    weights = TaskNormWeights(["asr"], interval=4, standard_errors=0.0)
    assert measure(weights, [0.5, 0.0, 0.5, 0.5]) == pytest.approx(0.5)


def test_resumed_in_a_measurement(tmp_path):
    whole = TaskNormWeights(interval=6, average=3)
    batches_of_one_kind(whole, 0.9, 10)
    for stop in (5, 8):
        first = TaskNormWeights(interval=6, average=3)
        batches_of_one_kind(first, 0.9, stop)
        first.save(tmp_path / "weights.json")
        second = TaskNormWeights(interval=6, average=3)
        second.load(tmp_path / "weights.json")
        assert second.due
        kinds = [("st", "asr", "mt")[i % 3] for i in range(stop, 10)]
        batches_of_one_kind(second, 0.9, 10 - stop, kinds)
        assert second.state() == whole.state()


def start():
    model = toy_model()
    return model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def run(weights, order=TASKS, pieces=1, updates=(0, 1, 2, 3), parts=None):
    """Train a toy as a recipe does; return its parameters."""
    model, optimizer = parts or start()
    for update in updates:
        whole = toy_batch(4, seed=update)
        size = 4 // pieces
        optimizer.zero_grad()
        for first in range(0, 4, size):
            inputs, targets = (
                {k: v[first : first + size] for k, v in part.items()}
                for part in whole
            )
            # A contrastive loss knows its own batch only: left out.
            objective = TranslationObjective(
                0, 0.95, contrastive=0.0, ctc_in_st=False
            )
            out = model(tasks=weights.active, **inputs)
            found = objective(out, **targets, tasks=weights.active)
            found = {t: found[t] for t in order if t in found}
            if weights.due:
                weights.observe(found, model.parts(), share=1 / pieces)
            (weights.total(found) / pieces).backward()
        optimizer.step()
        weights.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_order_of_tasks_does_not_matter():
    one = TaskNormWeights(("asr", "mt"), interval=2, exponent=0.3)
    other = TaskNormWeights(("mt", "asr"), interval=2, exponent=0.3)
    a = run(one, ("st", "asr", "mt"))
    b = run(other, ("mt", "st", "asr"))
    assert torch.equal(a, b) and one.history == other.history
    assert 0 < one["asr"] <= 1


def test_accumulation_does_not_matter():
    one = TaskNormWeights(interval=2, exponent=0.3, floor=0.0)
    other = TaskNormWeights(interval=2, exponent=0.3, floor=0.0)
    torch.testing.assert_close(
        run(one, pieces=1), run(other, pieces=2), rtol=1e-3, atol=1e-5
    )
    assert len(one.history) == len(other.history) == 2
    for a, b in zip(one.history, other.history):
        assert a["norms"] == pytest.approx(b["norms"], rel=1e-3)


def test_a_task_below_the_floor_stops_for_good():
    layer = torch.nn.Linear(2, 1)
    weights = TaskNormWeights(["asr"], interval=1, floor=0.3)
    for _ in range(2):
        assert weights.active == ("st", "asr")
        out = layer(torch.ones(1, 2)).sum()
        losses = {"st": out, "asr": 0.5 * out}
        weights.observe(losses, {"acoustic": layer})
        weights.step()
    assert weights.active == ("st",) and weights["asr"] == 0
    assert not weights.due
    losses = {"st": torch.tensor(2.0), "asr": torch.tensor(9.0)}
    assert float(weights.total(losses)) == 2.0


def test_resumed_equals_uninterrupted(tmp_path):
    def fresh():
        weights = TaskNormWeights(interval=2, exponent=0.3)
        model, optimizer = start()
        parts = {"weights": weights, "model": model, "optimizer": optimizer}
        return weights, (model, optimizer), Checkpointer(tmp_path, parts)

    whole, parts, _ = fresh()
    expected = run(whole, updates=range(6), parts=parts)
    # Stopped in the middle of an interval.
    first, parts, checkpointer = fresh()
    run(first, updates=range(3), parts=parts)
    checkpointer.save_checkpoint()
    second, parts, checkpointer = fresh()
    checkpointer.recover_if_possible()
    assert second.updates == 3 and second.due
    found = run(second, updates=range(3, 6), parts=parts)
    assert torch.equal(found, expected)
    assert second.history == whole.history
    assert second["asr"] == whole["asr"] < 1


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "weights.ckpt"
    TaskNormWeights(["asr"]).save(path)
    with pytest.raises(ValueError, match="weights.ckpt: holds weights of"):
        TaskNormWeights(["mt"]).load(path)
    for wrong in ("[]", "{}", '{"tasks": ["asr"]}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="weights.ckpt: (not a|holds)"):
            TaskNormWeights(["asr"]).load(path)
    path.write_text('{"tasks": ["as')
    with pytest.raises(ValueError, match="expected JSON"):
        TaskNormWeights(["asr"]).load(path)


def test_a_norm_that_is_not_finite_changes_nothing(caplog):
    layer = torch.nn.Linear(2, 1)
    weights = TaskNormWeights(["asr"], interval=1)
    out = layer(torch.ones(1, 2)).sum()
    for bad in (
        {"asr": math.nan * out, "st": out},
        {"asr": out, "st": out * math.inf},
    ):
        weights.observe(bad, {"acoustic": layer})
        weights.step()
    assert weights["asr"] == 1.0
    assert "not finite" in caplog.text
    # Without any gradient of the main task there is nothing to compare with.
    weights.observe({"asr": out, "st": 0 * out}, {"acoustic": layer})
    weights.step()
    assert weights["asr"] == 1.0


def test_bad_input():
    weights = TaskNormWeights(interval=1)
    with pytest.raises(ValueError, match="unknown task 'slu'; known are 'st'"):
        weights.total({"st": torch.ones(()), "slu": torch.ones(())})
    with pytest.raises(ValueError, match="unknown task 'slu'"):
        weights["slu"]
    with pytest.raises(ValueError, match="unknown task 'slu'"):
        TaskNormWeights(initial={"slu": 1.0})
    for settings in ({"initial": {"st": 0.5}}, {"parts": {"st": ["shared"]}}):
        with pytest.raises(ValueError, match="'st' is the main task"):
            TaskNormWeights(**settings)
    with pytest.raises(ValueError, match="losses of no task"):
        weights.total({})
    with pytest.raises(ValueError, match="modules lack"):
        weights.observe({"st": torch.ones(())}, {})
    for settings in (
        {"main": "asr"},
        {"tasks": ("mt", "mt")},
        {"interval": 0},
        {"floor": 1.0},
        {"exponent": math.nan},
        {"average": 0},
        {"standard_errors": -1.0},
        {"standard_errors": math.inf},
    ):
        with pytest.raises(ValueError, match="expected"):
            TaskNormWeights(**settings)


def test_torchjd_aggregators_by_name():
    pytest.importorskip("torchjd", reason="TORCHJD ABSENT: extra translation")
    first = torch.nn.Parameter(torch.zeros(2))
    second = torch.nn.Parameter(torch.zeros(1))

    def losses():
        # Gradients (1, 0) and (-1, 1) on what is shared.
        return {
            "st": first[0] + second.sum(),
            "asr": -first[0] + first[1],
        }

    GradientAggregator("pcgrad").backward(losses(), [first, second])
    # Each row without its part along the other: (1, 0, 1) and (-1, 1, 0)
    # have the product -1 and the squares 2 and 2.
    one = torch.tensor([1.0, 0, 1]) + torch.tensor([-1.0, 1, 0]) / 2
    two = torch.tensor([-1.0, 1, 0]) + torch.tensor([1.0, 0, 1]) / 2
    found = torch.cat([first.grad, second.grad])
    torch.testing.assert_close(found, one + two)
    # Added up, as backward does.
    GradientAggregator("Sum").backward(losses(), [first, second])
    summed = torch.cat([first.grad, second.grad]) - found
    torch.testing.assert_close(summed, torch.tensor([0.0, 1, 1]))
    GradientAggregator("mgda").backward(losses(), [first, second])
    with pytest.raises(ValueError, match="no aggregator 'best'.*PCGrad"):
        GradientAggregator("best")
    with pytest.raises(ValueError) as refused:
        GradientAggregator("WeightedAggregator")
    assert "Weighted" not in str(refused.value).partition("it has")[2]
    with pytest.raises(
        ValueError, match=r"'CAGrad'\): missing .*'c'.*CAGrad\(c"
    ):
        GradientAggregator("cagrad")
    with pytest.raises(ValueError, match="'Mean'.*unexpected .*'c'"):
        GradientAggregator("Mean", c=1.0)
    with pytest.raises(ValueError, match="no losses"):
        GradientAggregator("Sum").backward({}, [first])


@pytest.mark.parametrize(
    "name, settings, package",
    [("UPGrad", {}, "quadprog"), ("CAGrad", {"c": 0.5}, "cvxpy")],
)
def test_aggregators_name_the_packages_that_they_lack(name, settings, package):
    pytest.importorskip("torchjd", reason="TORCHJD ABSENT: extra translation")
    weight = torch.nn.Parameter(torch.ones(2))
    try:
        aggregator = GradientAggregator(name, **settings)
    except ImportError as error:
        assert f"GradientAggregator({name!r}): " in str(error)
        assert package in str(error) and "pip install" in str(error)
    else:
        aggregator.backward({"st": weight.sum(), "asr": -weight[0]}, [weight])
        assert weight.grad is not None


def test_torchjd_absent(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchjd", None)
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r"speechbrain_taskarith\[transl"):
        GradientAggregator("PCGrad")
