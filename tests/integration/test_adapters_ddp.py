"""Two processes train adapters as one does with the whole batch."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from adapters_toy import ToyEncoder, scramble  # noqa: E402

from speechbrain_taskarith.adapters import AudioAdapterFusion, insert_adapters


class DropEncoder(ToyEncoder):
    """Leaves out the layers that it is told to; no dropout."""

    drop = ()

    def forward(self, x):
        x = self.front(x)
        for i, layer in enumerate(self.layers):
            layer.dropout.p = 0.0
            if i not in self.drop:
                x, _ = layer(x)
        return x


class CheckpointedEncoder(ToyEncoder):
    """Computes its layers anew in the backward pass, by the older way."""

    def forward(self, x):
        x = self.front(x).detach().requires_grad_()
        for layer in self.layers:
            x, _ = checkpoint(layer, x, use_reentrant=True)
        return x


# The last two with the penalty and the guided loss: in the backward pass of
# each process, and for the reference as a sum by hand.
STAGES = (
    *("us", "ST-A", "MT-A", "routed"),
    *("us checkpointed", "MT-A checkpointed"),
    *("ST-A added", "MT-A added"),
)


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 6, 4, generator=generator) for _ in range(3)]


def build(guided=False, kind=ToyEncoder, **arguments):
    torch.manual_seed(0)
    encoder = kind()
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
    kind = CheckpointedEncoder if "checkpointed" in stage else ToyEncoder
    encoder, handle = build(guided=added, kind=kind, **weights)
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


def unmatched():
    torch.manual_seed(0)
    encoder = DropEncoder().train()
    handle = insert_adapters(
        encoder,
        ["us", "german"],
        combination=AudioAdapterFusion(ln_init="match"),
    )
    scramble(torch.nn.ModuleList(layer.bank for layer in handle.layers))
    handle.train_composition("ST-A")
    return encoder, handle


def match(rank, folder):
    """Match LNs in passes that leave out layers, by the processes' own dice."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/match", rank=rank, world_size=2
    )
    encoder, handle = unmatched()
    made = [layer.combination for layer in handle.layers]
    x = torch.randn(2 + rank, 5 + rank, 4)
    with pytest.raises(ValueError, match="processes would meet"):
        encoder.layers[0](encoder.front(x))
    # As the combination that each layer had in the pass that matched it.
    frames = {}

    def note(one, inputs):
        frames.setdefault(made.index(one), one.combine(*inputs).detach())

    for one in made:
        one.register_forward_pre_hook(note)
    run = torch.nn.parallel.DistributedDataParallel(encoder)
    waiting = []
    for drop in (((1, 2), (2,))[rank], (), (), ()):
        encoder.drop = drop
        run(x).square().mean().backward()
        waiting.append([one.is_unmatched for one in made])
        same = torch.cat(
            [p.grad.flatten() for p in handle.trained_parameters()]
        )
        other = same.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(same, other)
    assert waiting == [[True] * 3, [False, False, True], *[[False] * 3] * 2]
    if rank == 0:
        del frames[1]  # of a later pass
    norms = [one.norm.state_dict() for one in made]
    alone = AudioAdapterFusion(handle.layers[0].bank, ln_init="match")
    inputs = encoder.front(x)
    alone(inputs)
    norms.append(alone.norm.state_dict())
    frames[3] = alone.combine(inputs).detach()
    torch.save((norms, frames), f"{folder}/{rank}.pt")
    # A compiled encoder waits as well, and has all gradients.
    encoder, handle = unmatched()
    run = torch.nn.parallel.DistributedDataParallel(encoder)
    run = torch.compile(run, backend="eager")
    for waits in (True, False, False):
        run(x).square().mean().backward()
        assert handle.layers[2].combination.is_unmatched == waits
        assert all(p.grad is not None for p in handle.trained_parameters())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_norms_are_matched_over_all_processes(tmp_path):
    torch.multiprocessing.spawn(match, (str(tmp_path),), nprocs=2)
    (one, first), (two, second) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for rank in range(2)
    )
    for i, (norm, other) in enumerate(zip(one, two)):
        assert torch.equal(norm["weight"], other["weight"])
        assert torch.equal(norm["bias"], other["bias"])
        o = [part[i].flatten(0, 1) for part in (first, second) if i in part]
        o = torch.cat(o).double()
        z = torch.nn.functional.layer_norm(o, (8,))
        for channel in range(8):
            line = np.polyfit(z[:, channel], o[:, channel], 1)
            got = norm["weight"][channel], norm["bias"][channel]
            np.testing.assert_allclose(got, line, rtol=1e-4, atol=1e-5)


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
