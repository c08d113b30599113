"""Task weights by rule, against a naive loop; warm-up, ends, the history."""

import csv
import math

import pytest
import torch
from speechbrain.lobes.models.transformer.Transformer import (
    TransformerEncoderLayer,
)
from speechbrain.utils.checkpoints import Checkpointer
from translation_toy import Front, toy_batch, toy_model

from speechbrain_taskarith.translation import (
    AcousticEncoder,
    TaskNormWeights,
    TranslationObjective,
    plot_task_weights,
    write_task_weights,
)

PARTS = {"asr": ("acoustic",), "mt": ("textual", "decoder")}
SCALES = {"st": 1.0, "asr": 0.3, "mt": 0.6}
INTERVAL, AVERAGE, UPDATES = 4, 2, 13
EVERY, ALL = range(1, UPDATES + 1), slice(None)


class Attending(torch.nn.Module):
    """An acoustic encoder with self-attention."""

    def __init__(self):
        super().__init__()
        self.front = Front(5, 16)
        self.layer = TransformerEncoderLayer(16, 2, d_model=16)

    def forward(self, x, lens):
        return self.layer(self.front(x, lens))[0]


def start():
    model = toy_model(layers=1)
    model.acoustic = AcousticEncoder(Attending(), 16)
    return model.double()


def found_losses(model, update, tasks, rows=ALL, contrastive=0.0):
    """Return losses in float64, such that most ratios are below 1."""
    inputs, targets = (
        {k: v[rows] for k, v in part.items()} for part in toy_batch(4, update)
    )
    inputs["x"] = inputs["x"].double()
    out = model(tasks=tasks, **inputs)
    objective = TranslationObjective(0, contrastive=contrastive)
    losses = objective(out, **targets, tasks=tasks)
    return {task: SCALES[task] * loss for task, loss in losses.items()}


def layers_of(module, measured):
    """Return the parameters whose norms are averaged, a list for each."""
    if measured == "all":
        return [list(module.parameters())]
    return [
        [p]
        for name, p in module.named_parameters()
        if "out_proj.weight" in name and "multihead" not in name
    ]


def gradients(loss, layers):
    return [
        torch.autograd.grad(
            loss,
            layer,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for layer in layers
    ]


def mean_norm(layers):
    norms = [math.sqrt(sum(float((g * g).sum()) for g in x)) for x in layers]
    return sum(norms) / len(norms)


def weighted_sum(grads, weights):
    """Add several tasks' gradients, layer by layer."""
    return [
        [sum(weights[t] * g for t, g in zip(grads, row)) for row in zip(*layer)]
        for layer in zip(*grads.values())
    ]


def naive(rule, exponent, last, warm_up, measured):
    """Train by the formulas; return the weights after each update."""
    model, table, seen = start(), [], []
    weights, ended = {"asr": 1.0, "mt": 1.0}, set()
    for u in EVERY:
        running = [task for task in weights if task not in ended]
        tasks = (*running,) if u <= warm_up else ("st", *running)
        losses = found_losses(model, u, tasks, contrastive=1.0)
        inside = (u - 1) % INTERVAL >= INTERVAL - AVERAGE
        if rule != "none" and u > warm_up and inside and running:
            norms = {}
            for part, module in model.parts().items():
                layers = layers_of(module, measured)
                grads = {t: gradients(losses[t], layers) for t in tasks}
                main = grads["st"]
                if rule == "joint":
                    main = weighted_sum(grads, {"st": 1.0, **weights})
                for task in running:
                    factor = weights[task] if rule == "joint" else 1.0
                    own = factor * mean_norm(grads[task])
                    norms[task, part] = own, mean_norm(main)
            seen.append(norms)
        total = sum(weights.get(t, 1.0) * loss for t, loss in losses.items())
        train(model, total)
        if u % INTERVAL == 0 and seen:
            k = u // INTERVAL if exponent == "growing" else exponent
            for task in running:
                ratio = max(
                    sum(norms[task, part][0] for norms in seen)
                    / sum(norms[task, part][1] for norms in seen)
                    for part in PARTS[task]
                )
                weights[task] *= ratio ** (k / len(PARTS[task]))
                weights[task] = min(weights[task], 1.0)
                ended |= {task} if weights[task] < 0.1 else set()
            seen = []
        ended |= {task for task, end in last.items() if u >= end}
        table.append({t: 0.0 if t in ended else weights[t] for t in weights})
    return table, model


def train(model, total):
    model.zero_grad()
    total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad


def weights_by(rule, exponent=1.0, last=None, warm_up=0, measured="all"):
    return TaskNormWeights(
        interval=INTERVAL,
        average=AVERAGE,
        standard_errors=0.0,
        norms=rule,
        exponent=exponent,
        last_update=last,
        warm_up=warm_up,
        measured=measured,
    )


def run(weights, model, updates=EVERY, pieces=1, order=None):
    """Train as a recipe does; return the weights after each update."""
    table, size = [], 4 // pieces
    contrastive = 1.0 if pieces == 1 else 0.0
    for update in updates:
        gathered = 0.0
        for first in range(0, 4, size):
            losses = found_losses(
                model,
                update,
                weights.active,
                slice(first, first + size),
                contrastive,
            )
            losses = {t: losses[t] for t in order or losses if t in losses}
            if weights.due:
                weights.observe(losses, model.parts(), share=1 / pieces)
            gathered = gathered + weights.total(losses) / pieces
        train(model, gathered)
        weights.step()
        table.append({task: weights[task] for task in weights.tasks})
    return table


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


CASES = [
    ("isolated", 1.0, {}, 0, "all"),
    ("isolated", "growing", {"asr": 7}, 4, "all"),
    ("isolated", 0.5, {}, 0, "attention"),
    ("joint", 0.3, {"mt": 10}, 0, "all"),
    ("joint", "growing", {}, 5, "all"),
    ("joint", 0.5, {}, 0, "attention"),
    ("none", 1.0, {"asr": 5, "mt": 9}, 2, "all"),
    ("none", 1.0, {}, 0, "all"),
]


@pytest.mark.parametrize("settings", CASES, ids=lambda case: f"{case[:2]}")
def test_rules_are_their_formulas(settings):
    expected, other = naive(*settings)
    weights, model = weights_by(*settings), start()
    found = run(weights, model)
    for update, (one, two) in enumerate(zip(found, expected), 1):
        assert one == pytest.approx(two, rel=1e-9), f"update {update}"
    torch.testing.assert_close(flat(model), flat(other))
    rule, exponent, last, warm_up, _ = settings
    if rule == "none":
        assert [e["stopped"] for e in weights.history] == (
            [["asr"], ["asr", "mt"]] if last else []
        )
        return
    measured = [entry for entry in weights.history if entry["norms"]]
    ks = [entry["exponent"] for entry in measured]
    first = warm_up // INTERVAL + 1
    grown = list(range(first, first + len(ks)))
    assert ks == (grown if exponent == "growing" else [exponent] * len(ks))
    assert len(ks) > 1 and 0 < measured[0]["ratios"]["mt"]


@pytest.mark.parametrize("rule", ["isolated", "joint", "none"])
def test_neither_order_nor_accumulation_matters(rule):
    tables, models = [], []
    for order, pieces in (
        (None, 2),
        (("mt", "asr", "st"), 2),
        (None, 4),
    ):
        weights, model = weights_by(rule, 0.3), start()
        tables.append(run(weights, model, range(1, 9), pieces, order))
        models.append(flat(model))
    assert tables[0] == tables[1] and torch.equal(*models[:2])
    # A batch of one utterance, and of two: the sum of their gradients.
    torch.testing.assert_close(models[0], models[2])
    for one, two in zip(tables[0], tables[2]):
        assert one == pytest.approx(two, rel=1e-6)
    assert (tables[0][-1]["asr"] < 1) == (rule != "none")


@pytest.mark.parametrize("rule", ["isolated", "joint", "none"])
@pytest.mark.parametrize("stop", [2, 7])
def test_resumed_equals_uninterrupted(rule, stop, tmp_path):
    def fresh():
        settings = ("growing", {"mt": 9}, 3)
        weights, model = weights_by(rule, *settings), start()
        parts = {"weights": weights, "model": model}
        return weights, model, Checkpointer(tmp_path, parts)

    whole, model, _ = fresh()
    expected = run(whole, model)
    first, half, checkpointer = fresh()
    run(first, half, range(1, stop + 1))
    checkpointer.save_checkpoint()
    second, other, checkpointer = fresh()
    checkpointer.recover_if_possible()
    found = run(second, other, range(stop + 1, UPDATES + 1))
    assert found == expected[stop:] and second.state() == whole.state()
    assert torch.equal(flat(model), flat(other))


def linear_losses(gradient, main_gradient, share):
    """Return losses with these gradients; "st" holds a share of "asr"."""
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    asr, ce = weight @ gradient, weight @ main_gradient
    return {"st": ce + share * asr, "asr": asr}, weight


# ||L_A|| / ||0.7 CE||; the released ratio, to the power 1 + 2 + 3; isolated,
# with and without CTC in "st", the latter as 0.3 L_A / 0.7 CE.
TABLE = [
    (1.0, 0.57, 0.03, 0.92, 0.30),
    (4.0, 0.74, 0.16, 2.39, 1.20),
    (10.0, 0.76, 0.19, 3.03, 3.00),
]


@pytest.mark.parametrize("size, joint, power, isolated, split", TABLE)
def test_joint_norms_fall_by_construction(size, joint, power, isolated, split):
    """What the review worked out, at a cosine of 0.15."""
    main = torch.tensor([1.0, 0.0]).double()
    direction = torch.tensor([0.15, math.sqrt(1 - 0.15**2)]).double()
    own = size * direction
    losses, weight = linear_losses(own, main, 0.3)
    parts = {"acoustic": [weight]}

    def measure(weights, losses):
        weights.observe(losses, parts)
        weights.step()
        return weights.history[-1]["ratios"]["asr"]

    settings = {"interval": 1, "average": 1, "floor": 0.0}
    released = TaskNormWeights(
        ["asr"], norms="joint", exponent="growing", **settings
    )
    first = measure(released, losses)
    assert first == pytest.approx(joint, abs=0.006)
    assert first < 1 / 1.3
    # With that ratio kept, and as it is: the weight is in both norms.
    assert first**6 == pytest.approx(power, abs=0.006)
    expected = first
    for k in (2, 3):
        whole = main + (0.3 + expected) * own
        ratio = expected * float(own.norm() / whole.norm())
        assert measure(released, losses) == pytest.approx(ratio)
        expected *= ratio**k
    assert released["asr"] == pytest.approx(expected)
    assert released["asr"] < first**6
    plain = TaskNormWeights(["asr"], **settings)
    assert measure(plain, losses) == pytest.approx(isolated, abs=0.006)
    assert plain["asr"] == pytest.approx(min(1.0, isolated), abs=0.006)
    apart = {"st": weight @ main, "asr": 0.3 * (weight @ own)}
    old = TaskNormWeights(["asr"], **settings)
    assert measure(old, apart) == pytest.approx(split, abs=0.006)
    assert old["asr"] == pytest.approx(min(1.0, split), abs=0.006)


def test_joint_needs_both_tasks_in_one_update(caplog):
    weights = TaskNormWeights(["asr"], interval=1, average=1, norms="joint")
    losses, weight = linear_losses(torch.ones(3), torch.ones(3), 0.0)
    for task in ("st", "asr"):
        weights.observe({task: losses[task]}, {"acoustic": [weight]})
        weights.step()
    assert weights["asr"] == 1.0
    assert "needs both tasks in one update" in caplog.text
    weights.observe(losses, {"acoustic": [weight]})
    weights.step()
    assert weights["asr"] == pytest.approx(0.5)


def test_joint_weights_do_not_grow_beyond_their_cap():
    # Gradients against one another: the sum is smaller than its parts.
    losses, weight = linear_losses(torch.ones(3), -1.5 * torch.ones(3), 0.0)
    weights = TaskNormWeights(["asr"], interval=1, average=1, norms="joint")
    weights.observe(losses, {"acoustic": [weight]})
    weights.step()
    assert weights.history[0]["ratios"]["asr"] == pytest.approx(2.0)
    assert weights["asr"] == 1.0


def test_the_main_task_waits_for_the_warm_up():
    weights = TaskNormWeights(interval=4, average=2, warm_up=3)
    losses, weight = linear_losses(torch.ones(2), torch.ones(2), 0.3)
    losses["mt"] = weight.sum()
    for _ in range(3):
        assert weights.warming_up and weights.active == ("asr", "mt")
        assert weights["st"] == 0.0 and not weights.due
        total = weights.total(losses)
        assert torch.equal(
            torch.autograd.grad(total, weight, retain_graph=True)[0],
            2 * torch.ones(2),
        )
        # A batch with nothing else still takes part in its update.
        alone = weights.total({"st": losses["st"] + 1.0})
        alone.backward(retain_graph=True)
        assert alone == 0 and not weight.grad.any()
        weights.step()
    assert weights.active == ("st", "asr", "mt") and weights["st"] == 1.0
    # What the warm-up cut short is made up for.
    parts = dict.fromkeys(("acoustic", "textual", "decoder"), [weight])
    for _ in range(2):
        assert weights.due and not weights.history
        weights.observe(losses, parts)
        weights.step()
    assert [entry["update"] for entry in weights.history] == [5]


def test_without_auxiliary_tasks_there_is_no_warm_up():
    weights = TaskNormWeights(["asr"], warm_up=9, last_update={"asr": 2})
    weights.step()
    assert weights.active == ("asr",)
    weights.step()
    assert weights.active == ("st",) and not weights.warming_up
    assert TaskNormWeights([], warm_up=9).active == ("st",)


def test_last_update_of_a_resumed_run(tmp_path):
    first = TaskNormWeights(norms="none", interval=2)
    for _ in range(5):
        first.step()
    assert first.history == [] and first.active == ("st", "asr", "mt")
    first.save(tmp_path / "weights.json")
    second = TaskNormWeights(norms=None, last_update={"mt": 3})
    second.load(tmp_path / "weights.json")
    second.step()
    assert second.active == ("st", "asr")
    assert second.history[-1]["stopped"] == ["mt"]
    other = TaskNormWeights(norms="joint")
    with pytest.raises(ValueError, match="rule 'none', expected 'joint'"):
        other.load(tmp_path / "weights.json")


def test_table_plot_and_log_of_the_history(tmp_path, caplog):
    caplog.set_level("INFO")
    weights = TaskNormWeights(["asr"], interval=1, average=1, floor=0.3)
    losses, weight = linear_losses(torch.ones(2), 2 * torch.ones(2), 0.0)
    for _ in range(2):
        weights.observe(losses, {"acoustic": [weight]})
        weights.step()
    lines = [record.getMessage() for record in caplog.records]
    by_rule = "task weights by the rule 'isolated': asr"
    assert lines == [
        f"update 1: {by_rule} 0.5 (ratio 0.5)",
        f"update 2: {by_rule} 0.25 (ratio 0.5) and stopped",
    ]
    write_task_weights(weights.history, tmp_path / "weights.csv")
    with open(tmp_path / "weights.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["weight"] for row in rows] == ["0.5000", "0.0000"]
    assert {row["ratio"] for row in rows} == {"0.5000"}
    assert {row["rule"] for row in rows} == {"isolated"}
    plot_task_weights(weights.history, tmp_path / "weights.svg")
    assert (tmp_path / "weights.svg").stat().st_size > 5000
    with pytest.raises(ValueError, match="no history"):
        plot_task_weights([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"norms": "accumulated"},
        {"exponent": "grows"},
        {"exponent": -1.0},
        {"measured": "heads"},
        {"warm_up": -1},
        {"last_update": {"asr": 0}},
        {"last_update": {"st": 5}},
    ],
)
def test_settings_that_cannot_be(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}.*expected"):
        TaskNormWeights(**settings)


def test_parts_without_attention_are_refused():
    layer = torch.nn.Linear(2, 1)
    out = layer(torch.ones(1, 2)).sum()
    weights = TaskNormWeights(["asr"], interval=1, measured="attention")
    for part in (layer, list(layer.parameters())):
        with pytest.raises(ValueError, match="part 'acoustic'"):
            weights.observe({"st": out, "asr": out}, {"acoustic": part})
