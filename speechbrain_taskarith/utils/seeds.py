"""Random numbers that do not hang on what was drawn before."""

import random
import zlib

import torch


def seed_random_numbers(*key):
    """Seed torch's and Python's random numbers from what is at hand.

    Called before every batch with the seed of the run, the epoch and the
    step, it has a resumed run draw what it would have drawn if it had never
    been killed. NumPy's random numbers are left alone.

    `key` tells this draw from others: the seed of the run, the name of a
    training, epoch and step, the rank of the process; their text counts.
    Returns the seed, in [0, 2**32), the same in every process and run.

    Example
    -------
    >>> seed_random_numbers(1986, "german", 3)
    3871425046
    >>> first = torch.rand(2), random.random()
    >>> _ = torch.rand(5)
    >>> _ = seed_random_numbers(1986, "german", 3)
    >>> torch.equal(torch.rand(2), first[0]) and random.random() == first[1]
    True
    """
    # Not hash(): that of a text is another in every process.
    seed = zlib.crc32(" ".join(map(str, key)).encode())
    torch.manual_seed(seed)
    random.seed(seed)
    return seed
