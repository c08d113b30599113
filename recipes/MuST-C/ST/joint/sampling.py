"""Batches of several kinds of data, one of each kind for every update."""

import torch


class KindSampler(torch.utils.data.Sampler):
    """A batch of every kind in turn, the main kind last.

    With a `grad_accumulation_factor` of the number of kinds, an update has one
    batch of each. An epoch is one pass over the main kind; the others repeat
    as often as needed. With several processes, as many batches of a kind
    follow one another: all processes train on the same kind.

    Arguments
    ---------
    kinds : sequence of tuple
        `(offset, batch sampler)` for each kind; the offset is added to the
        sampler's numbers. The last one is the main kind.
    processes : int
        Number of processes that share the batches.

    Example
    -------
    >>> text, speech = [[0, 1], [2]], [[0], [1], [2]]
    >>> list(KindSampler([(3, text), (0, speech)]))
    [[3, 4], [0], [5], [1], [3, 4], [2]]
    """

    def __init__(self, kinds, processes=1):
        self.kinds, self.processes = list(kinds), processes

    def __len__(self):
        _, main = self.kinds[-1]
        whole = len(main) // self.processes * self.processes
        return whole * len(self.kinds)

    def __iter__(self):
        *others, (offset, main) = self.kinds
        streams = [(shift, _endless(sampler)) for shift, sampler in others]
        streams.append((offset, iter(main)))
        for _ in range(len(main) // self.processes):
            for shift, stream in streams:
                for _ in range(self.processes):
                    yield [shift + number for number in next(stream)]

    def set_epoch(self, epoch):
        """Draw other batches; the Brain calls this before every epoch."""
        for _, sampler in self.kinds:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


def _endless(sampler):
    while True:
        yield from sampler
