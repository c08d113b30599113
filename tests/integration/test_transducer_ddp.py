"""Two processes train by MinWER though one of them has no gradient."""

import os
import socket

import torch
from torch.nn.parallel import DistributedDataParallel

from speechbrain_taskarith.transducer import (
    LSTMPredictor,
    MinWERLoss,
    RNNTJoint,
    TransducerBeamSearch,
)

TARGETS, WHOLE = torch.tensor([[1, 2]]), torch.ones(1)
# Of the first process all hypotheses have two errors.
LISTS = [[[[3, 4], [5, 3]]], [[[1, 2], [1, 3]]]]


class Trained(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        predictor = LSTMPredictor(6, 4, 5, num_layers=1)
        search = TransducerBeamSearch(predictor, RNNTJoint(7, 5, 8, 6), 0)
        self.encoder = torch.nn.Linear(7, 7)
        self.loss = MinWERLoss(search, 4, rnnt_weight=0.0, source="offline")

    def forward(self, x, lists):
        x = self.encoder(x)
        return self.loss(x, WHOLE, TARGETS, WHOLE, hypotheses=lists)


def features(rank):
    return torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(rank))


def train(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    network = Trained()
    model = DistributedDataParallel(network)
    for _ in range(2):
        network.zero_grad()
        model(features(rank), LISTS[rank]).backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    torch.save(grads, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_process_without_gradient_does_not_hang_the_other(tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    torch.multiprocessing.spawn(train, (port, str(tmp_path)), 2)
    alone = Trained()
    alone(features(1), LISTS[1]).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in alone.named_parameters():
            expected = parameter.grad / 2  # the mean of it and of zeros
            assert torch.allclose(found[name], expected, atol=1e-7), name
