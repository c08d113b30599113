"""Two processes train speech translation as one does with the whole batch."""

import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from translation_toy import toy_batch, toy_model  # noqa: E402

from speechbrain_taskarith.translation import (
    ConsistencyProbe,
    CrossModalContrastiveLoss,
    GradientAggregator,
    TaskNormWeights,
    TranslationObjective,
    gradient_consistency,
)

TASKS = ("st", "asr", "mt")


RULES = {
    "isolated": {"exponent": 0.5},
    "joint": {"norms": "joint", "exponent": 0.5, "last_update": {"mt": 3}},
    # The main task begins with the second update.
    "growing": {"exponent": "growing", "warm_up": 1},
    "none": {"norms": "none", "last_update": {"asr": 2}},
}


def train(rank=None, rule="isolated", updates=4):
    """Train with task weights; `rank` sees half of every batch."""
    from torch.nn.parallel import DistributedDataParallel

    model = toy_model()
    forward = model
    if rank is not None:
        forward = DistributedDataParallel(model, find_unused_parameters=True)
    # Not Adam: it makes the sign of a rounding error a whole step.
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    weights = TaskNormWeights(interval=2, floor=0.05, **RULES[rule])
    objective = TranslationObjective(0)
    cosines = []
    for update in range(updates):
        parts = toy_batch(4, seed=update)
        if rank is not None:
            own = slice(2 * rank, 2 * rank + 2)
            parts = [{k: v[own] for k, v in p.items()} for p in parts]
        tasks = weights.active if update < 3 else ("st",)
        for parameter in model.acoustic.parameters():
            parameter.requires_grad_(not weights.warming_up)
        losses = objective(forward(tasks=tasks, **parts[0]), **parts[1])
        if weights.due:
            weights.observe(losses, model.parts())
        if len(losses) > 1 and rule == "isolated":
            table = gradient_consistency(losses, model, by="module")
            cosines += [v for pairs in table.values() for v in pairs.values()]
        optimizer.zero_grad()
        weights.total(losses).backward()
        optimizer.step()
        weights.step()
    return {
        "model": model.state_dict(),
        "cosines": torch.tensor(cosines),
        "norms": torch.tensor(
            [n for h in weights.history for n in h["norms"].values()]
        ),
        "weights": torch.tensor(
            [w for h in weights.history for w in h["weights"].values()]
        ),
    }


def sides(rank=None):
    """Contrastive losses of batches of 1 and 3, and their gradient."""
    g = torch.Generator().manual_seed(0)
    lens = torch.tensor([1.0, 0.5, 0.75, 1.0])
    speech = torch.randn(4, 4, 3, generator=g)
    text = torch.randn(4, 4, 3, generator=g)
    weight = torch.eye(3).requires_grad_()
    other = torch.eye(3).requires_grad_()
    # Rows 0 and 2 are one text, of batches that are padded otherwise.
    labels = torch.tensor(
        [[1, 2, 0, 0], [1, 2, 3, 0], [1, 2, 5, 5], [1, 4, 4, 4]]
    )
    label_lens = torch.tensor([0.5, 0.75, 0.5, 1.0])
    own = slice(None)
    if rank is not None:
        own = slice(0, 1) if rank == 0 else slice(1, 4)
    if rank == 0:
        labels, label_lens = labels[:, :3], label_lens * 4 / 3
    loss = CrossModalContrastiveLoss(0.5, detach_text=False, symmetric=True)
    value = loss(
        *(speech[own] @ weight, lens[own], text[own] @ other, lens[own]),
        *(labels[own], label_lens[own]),
    )
    value.backward()
    found = torch.cat([weight.grad, other.grad, value.detach().expand(1, 3)])
    if rank is not None:
        # As DDP does.
        torch.distributed.all_reduce(found)
        found /= 2
    return found


MIXED = (TASKS, ("mt",))


def mixed(rank=None):
    """Gradients and cosines of a batch of speech and one of text."""
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for aggregate in (False, True)[: 1 + (find_spec("torchjd") is not None)]:
        model = toy_model()
        forward, own = model, range(2)
        if rank is not None:
            forward = DistributedDataParallel(
                model, find_unused_parameters=True
            )
            own = [rank]
        losses = {}
        for kind in own:
            inputs, targets = toy_batch(2, seed=kind)
            out = forward(tasks=MIXED[kind], **inputs)
            for task, loss in TranslationObjective(0)(out, **targets).items():
                # What two processes average.
                loss = loss / len(own)
                losses[task] = losses[task] + loss if task in losses else loss
        tables = {
            "cosines": gradient_consistency(losses, model, by="module"),
            "probe": ConsistencyProbe(interval=1).step(losses, model),
        }
        for name, table in tables.items():
            found[name] = torch.tensor(
                [c for p in sorted(table) for _, c in sorted(table[p].items())]
            )
        if aggregate:
            aggregator = GradientAggregator("Sum")
            aggregator.total(losses, forward).backward()
        else:
            sum(losses.values()).backward()
        found[f"gradient {aggregate}"] = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )
    return found


def evaluated():
    """The contrastive loss of a batch in evaluation."""
    speech, lens = torch.eye(4)[:, None], torch.ones(4)
    with torch.no_grad():
        loss = CrossModalContrastiveLoss(0.5)
        return loss(speech, lens, speech.flip(0), lens)


def process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        *("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60)),
        **{"rank": rank, "world_size": 2},
    )
    found = {rule: train(rank, rule) for rule in RULES}
    found["sides"] = sides(rank)
    found["mixed"] = mixed(rank)
    if rank == 0:
        # Without gradient nobody waits for the others.
        found["evaluated"] = evaluated()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    first, second = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for rank in range(2)
    )
    start = toy_model().state_dict()
    for rule in RULES:
        same(first[rule], second[rule], train(rule=rule), start)
    torch.testing.assert_close(first["sides"], sides(), atol=1e-5, rtol=1e-4)
    assert torch.equal(first["evaluated"], evaluated())
    for name, expected in mixed().items():
        assert torch.equal(first["mixed"][name], second["mixed"][name]), name
        torch.testing.assert_close(
            first["mixed"][name], expected, atol=1e-4, rtol=1e-3, msg=name
        )


def same(first, second, alone, start):
    """Assert that both processes found what one found, and learned."""
    for name, tensor in alone["model"].items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(
            first["model"][name], tensor, atol=2e-5, rtol=1e-3, msg=name
        )
    moved = [
        n for n, t in alone["model"].items() if not torch.equal(t, start[n])
    ]
    assert len(moved) > 40
    for name in ("norms", "cosines", "weights"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(
            first[name], alone[name], atol=1e-3, rtol=1e-3
        )
    assert len(alone["weights"]) > 0
