"""One global batch shared out over processes, padded as if it were whole.

SpeechBrain's distributed sampler gives each process utterances of its own,
which are padded to the longest of that process. Frame counts, masks and
edge frames then differ a little from a run on one process. Here every
process takes its part of the same batch, padded to the longest of all, so
that the mean of the processes' gradients is the gradient of the whole batch
and a run on several processes gives the result of one (up to the order of
floating-point sums).
"""

import torch
from speechbrain.dataio.batch import PaddedBatch, PaddedData
from speechbrain.dataio.dataloader import SaveableDataLoader

from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    relative_lengths,
)


class ShardedBatch:
    """Collate function: a process's part of a batch.

    Arguments
    ---------
    rank : int
        Number of this process.
    world_size : int
        Number of processes.

    Raises
    ------
    ValueError
        A batch that cannot be shared out equally; shards of unequal size
        would weigh utterances differently.

    Example
    -------
    >>> examples = [{"id": n, "sig": torch.ones(n)} for n in (2, 4)]
    >>> ShardedBatch(rank=0, world_size=2)(examples).sig
    PaddedData(data=tensor([[1., 1., 0., 0.]]), lengths=tensor([0.5000]))
    """

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def __call__(self, examples):
        """Return the part of this process, padded to the whole batch.

        Arguments
        ---------
        examples : list of dict
            The whole batch.

        Returns
        -------
        PaddedBatch
            Every `world_size`-th utterance.
        """
        if len(examples) % self.world_size:
            raise ValueError(
                f"a batch of {len(examples)} utterances for "
                f"{self.world_size} processes: choose a batch size and a "
                "number of utterances that they divide evenly"
            )
        batch = PaddedBatch(examples[self.rank :: self.world_size])
        for key in examples[0]:
            # What was padded: tensors, and NumPy's arrays that became some.
            padded = getattr(batch, key)
            if isinstance(padded, PaddedData):
                longest = max(len(example[key]) for example in examples)
                setattr(batch, key, _pad(padded, longest))
        return batch


def shard_loader(dataset, batch_size, **arguments):
    """Return a loader that gives each process its part of every batch.

    Arguments
    ---------
    dataset : Dataset
        The same in all processes.
    batch_size : int
        Utterances in a whole batch, over all processes.
    **arguments : object
        For `SaveableDataLoader`; `shuffle=True` would shuffle differently
        in each process and is refused.

    Returns
    -------
    SaveableDataLoader
        Also for a single process, where the part is the whole.

    Example
    -------
    >>> utterances = [{"id": f"u{n}", "sig": torch.ones(n)} for n in (2, 4, 3)]
    >>> [batch.id for batch in shard_loader(utterances, batch_size=2)]
    [['u2', 'u4'], ['u3']]
    """
    if arguments.get("shuffle"):
        raise ValueError(
            "shuffle=True draws another order in each process; shuffle the "
            "items before, or give a sampler that is seeded alike everywhere"
        )
    rank, world_size = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        world_size = torch.distributed.get_world_size()
    return SaveableDataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=ShardedBatch(rank, world_size),
        **arguments,
    )


def _pad(padded, longest):
    """Pad further on the right; lengths stay relative to the new width."""
    data, lengths = padded
    missing = longest - data.shape[1]
    if missing == 0:
        return padded
    padding = data.new_zeros(data.shape[0], missing, *data.shape[2:])
    # A product of two roundings may miss the exact length: go by samples.
    absolute = absolute_lengths(lengths, data.shape[1])
    lengths = relative_lengths(absolute, longest)
    return PaddedData(torch.cat([data, padding], dim=1), lengths)
