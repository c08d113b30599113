"""Gradient consistency and entropy: by hand, and without a trace."""

import copy
import math

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer
from translation_toy import toy_batch, toy_model

from speechbrain_taskarith.translation import (
    ConsistencyProbe,
    TranslationObjective,
    gradient_consistency,
    plot_window_entropy,
    window_entropy,
)

TASKS = ("st", "asr", "mt")


def losses_of(model):
    inputs, targets = toy_batch()
    return TranslationObjective(0)(model(tasks=TASKS, **inputs), **targets)


def test_cosines_are_those_of_single_passes():
    model = toy_model().double()
    inputs, targets = toy_batch()
    inputs["x"] = inputs["x"].double()
    losses = TranslationObjective(0)(model(tasks=TASKS, **inputs), **targets)
    found = gradient_consistency(losses, model, by="module")
    for part in ("acoustic", "textual", "decoder"):
        grads = {}
        for task in TASKS:
            model.zero_grad()
            losses[task].backward(retain_graph=True)
            grads[task] = torch.cat(
                [
                    (
                        p.grad if p.grad is not None else torch.zeros_like(p)
                    ).flatten()
                    for p in getattr(model, part).parameters()
                ]
            )
        for one, other in (("st", "asr"), ("st", "mt"), ("asr", "mt")):
            a, b = grads[one], grads[other]
            if a.norm() == 0 or b.norm() == 0:
                assert (one, other) not in found[part]
                continue
            expected = float(a @ b / (a.norm() * b.norm()))
            assert found[part][one, other] == pytest.approx(expected)
    assert ("st", "mt") not in found["acoustic"], "text has no acoustics"


def test_layers_are_told_apart():
    model = toy_model(layers=2)
    found = gradient_consistency(losses_of(model), model)
    assert "textual.layers.0" in found and "textual.layers.1" in found
    assert "textual.local.layers.1" in found and "ctc_lin" in found
    whole = gradient_consistency(losses_of(model), model, by=lambda n: "all")
    assert list(whole) == ["all"]
    # DDP's wrapper does not change the names.
    wrapped = torch.nn.ModuleDict({"module": model})
    assert set(gradient_consistency(losses_of(model), wrapped)) == set(found)
    by_module, same = (
        gradient_consistency(losses_of(model), module, by="module")
        for module in (model, wrapped)
    )
    assert list(same) == list(by_module) and len(same) > 3


def test_leaves_no_trace():
    model = toy_model(dropout=0.1)
    model.register_buffer("mean", torch.ones(3))
    losses = losses_of(model)
    losses["st"].backward(retain_graph=True)
    before = copy.deepcopy(model.state_dict())
    grads = [
        None if p.grad is None else p.grad.clone() for p in model.parameters()
    ]
    state = torch.get_rng_state()
    gradient_consistency(losses, model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for p, grad in zip(model.parameters(), grads):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    # And the graph is still there.
    sum(losses.values()).backward()


def test_probe_writes_log_csv_and_plot(tmp_path, caplog):
    caplog.set_level("INFO")
    model = toy_model(layers=1)
    probe = ConsistencyProbe(tmp_path / "c.csv", interval=2, by="module")
    for update in range(1, 5):
        found = probe.step(losses_of(model), model)
        assert (found is not None) == (update % 2 == 0)
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert lines[0] == "update,part,task,other,cosine"
    assert {line.split(",")[0] for line in lines[1:]} == {"2", "4"}
    assert "consistency of st and asr in acoustic" in caplog.text
    assert probe.plot(tmp_path / "c.png", ("asr", "st")).stat().st_size > 0
    with pytest.raises(ValueError, match="no consistency of 'st' and 'x'"):
        probe.plot(tmp_path / "d.png", ("st", "x"))
    assert probe.step({"st": losses_of(model)["st"]}, model) is None
    # It goes on where it was.
    Checkpointer(tmp_path, {"probe": probe}).save_checkpoint()
    again = ConsistencyProbe(interval=2)
    Checkpointer(tmp_path, {"probe": again}).recover_if_possible()
    assert again.updates == 5
    assert [list(row) for row in again.rows] == probe.rows


def test_bad_input():
    model = toy_model()
    loss = losses_of(model)["st"]
    with pytest.raises(ValueError, match="two tasks or more"):
        gradient_consistency({"st": loss}, model)
    with pytest.raises(ValueError, match="expected 'layer', 'module'"):
        gradient_consistency({"st": loss, "asr": loss}, model, by="depth")
    bad = gradient_consistency({"st": loss, "asr": math.nan * loss}, model)
    assert not any(bad.values()), "NaN has no direction"
    with pytest.raises(ValueError, match="interval 0"):
        ConsistencyProbe(interval=0)


def test_entropy_by_hand(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 10, 3).double()
    lens = torch.tensor([1.0, 0.5])
    found = window_entropy(x, lens, windows=(1, 4, 8, 16))
    assert set(found) == {1, 4, 8}
    assert found[1] == pytest.approx(0.0, abs=1e-9)
    values = []
    for b, first in ((0, 0), (0, 4), (1, 0)):
        y = x[b, first : first + 4]
        y = y / y.norm(dim=1, keepdim=True)
        spectrum = torch.linalg.svdvals(y).square() / 4
        values.append(float(-(spectrum * spectrum.log()).sum()))
    assert found[4] == pytest.approx(sum(values) / 3)
    # Repeated frames tell nothing new: that is why they can be shrunk.
    slow = window_entropy(x.repeat_interleave(2, 1), lens, windows=(8,))
    fast = window_entropy(x, lens, windows=(8,))
    assert slow[8] < fast[8]
    x[1, 5:] = math.nan
    assert window_entropy(x, lens, windows=(4,)) == {4: found[4]}
    with pytest.raises(ValueError, match="window 0"):
        window_entropy(x, lens, windows=(0,))
    plot = plot_window_entropy({"frames": found}, tmp_path / "e.png")
    assert plot.stat().st_size > 0
