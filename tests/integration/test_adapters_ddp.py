"""Two processes train adapters as one does with the whole batch."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from adapters_toy import ToyEncoder, scramble  # noqa: E402

from speechbrain_taskarith.adapters import AudioAdapterFusion, insert_adapters

# The last two with the penalty and the guided loss: in the backward pass of
# each process, and for the reference as a sum by hand.
STAGES = ("us", "ST-A", "MT-A", "routed", "ST-A added", "MT-A added")


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 6, 4, generator=generator) for _ in range(3)]


def build(guided=False, **arguments):
    torch.manual_seed(0)
    encoder = ToyEncoder()
    for layer in encoder.layers:
        layer.dropout.p = 0.0
    handle = insert_adapters(
        encoder,
        ["us", "german"],
        bottleneck=4,
        combination=AudioAdapterFusion(guided=guided),
        **arguments,
    )
    scramble(handle, seed=2)
    return encoder, handle


def train(stage, rank=None):
    """Return the adapters after three steps; `rank` sees half a batch."""
    from torch.nn.parallel import DistributedDataParallel

    added = "added" in stage
    by_hand = added and rank is None
    weights = {"penalty": 0.5, "guide": 0.7} if added and not by_hand else {}
    encoder, handle = build(guided=added, **weights)
    if stage[:4] in ("ST-A", "MT-A"):
        handle.train_composition(stage[:4])
    else:
        both = ["us", "german"]
        handle.train_extraction(both if stage == "routed" else "us")
    if rank is None:
        run = encoder
    else:
        # As sb.Brain with both of them in its modules: the second wrapper's
        # forward is never called, and it must not be in the way.
        run = DistributedDataParallel(encoder)
        DistributedDataParallel(handle)
    # Not Adam: it makes the sign of a rounding error a whole step.
    optimizer = torch.optim.SGD(handle.trained_parameters(), 0.02)
    encoder.train()
    for batch in batches():
        names = ["german", "us", "us", "us"]
        if rank is not None:
            part = slice(2 * rank, 2 * rank + 2)
            batch, names = batch[part], names[part]
        if stage == "routed":
            handle.use(names)
        if weights:
            handle.tasks = names
        loss = run(batch).square().mean()
        if by_hand:
            loss = loss + 50 * handle.penalty()  # 0.01 by default
            loss = loss + 0.7 * handle.attention_loss(names)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle.state_dict()


def process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for stage in STAGES:
        torch.save(train(stage, rank), f"{folder}/{stage}.{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    start = build()[1].state_dict()
    for stage in STAGES:
        alone = train(stage)
        first, second = (
            torch.load(tmp_path / f"{stage}.{rank}.pt", weights_only=True)
            for rank in range(2)
        )
        moved = 0
        for name, tensor in alone.items():
            assert torch.equal(first[name], second[name]), (stage, name)
            torch.testing.assert_close(
                first[name], tensor, atol=1e-5, rtol=1e-4, msg=stage + name
            )
            moved += not torch.equal(tensor, start[name])
        assert moved
