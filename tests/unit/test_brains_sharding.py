"""Shares of a batch: together and padded, they are the batch."""

import numpy
import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_taskarith.brains import ShardedBatch, shard_loader


def examples(count=6):
    torch.manual_seed(0)
    sizes = [37, 11, 50, 23, 41, 8][:count]
    return [
        {"id": f"u{n}", "sig": torch.randn(n), "tokens": torch.arange(n % 5)}
        for n in sizes
    ]


@pytest.mark.parametrize("kind", [torch.Tensor, numpy.ndarray])
def test_shares_together_are_the_batch(kind):
    batch = examples()
    if kind is numpy.ndarray:
        batch = [{**e, "sig": e["sig"].numpy()} for e in batch]
    whole = PaddedBatch(batch)
    shares = [ShardedBatch(rank, 2)(batch) for rank in (0, 1)]
    for key in ("sig", "tokens"):
        data = torch.zeros_like(whole[key].data)
        lengths = torch.zeros(6)
        for rank, share in enumerate(shares):
            data[rank::2] = share[key].data
            lengths[rank::2] = share[key].lengths
        assert torch.equal(data, whole[key].data)
        assert torch.equal(lengths, whole[key].lengths)
    assert shares[0].id + shares[1].id == ["u37", "u50", "u41", "u11"] + [
        "u23",
        "u8",
    ]


def test_padding_of_more_dimensions():
    batch = [{"id": n, "x": torch.ones(n, 3)} for n in (2, 5)]
    share = ShardedBatch(0, 2)(batch)
    assert share.x.data.shape == (1, 5, 3)
    assert share.x.data[0, 2:].abs().sum() == 0


def test_uneven_batches_are_refused():
    with pytest.raises(ValueError, match="5 utterances for 2 processes"):
        ShardedBatch(0, 2)(examples(5))


def test_one_process_sees_everything():
    loader = shard_loader(examples(), batch_size=4)
    assert [len(batch) for batch in loader] == [4, 2]


def test_shuffling_is_refused():
    with pytest.raises(ValueError, match="another order"):
        shard_loader(examples(), batch_size=2, shuffle=True)
