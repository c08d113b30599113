"""DARE: drop entries at random and rescale, then any other rule."""

import hashlib

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.rules.averaging.arithmetic import (
    TaskArithmetic,
)
from speechbrain_taskarith.vectors.rules.base import Stage, check_rule
from speechbrain_taskarith.vectors.rules.wrapper import Wrapper


class RandomDrop(Stage):
    """What `DARE` does to each vector; the expectation stays.

    The random numbers are Philox4x64-10 in counter mode: the key is a hash of
    seed, vector and tensor name, the counter is the element's index.
    """

    def __init__(self, drop, seed=0):
        self.drop = checks.in_range("drop", drop, 0, 1, open_high=True)
        self.seed = checks.whole("seed", seed)

    def apply(self, index, tau, place, work, out):
        """Multiply by the mask, then by `1 / (1 - drop)`."""
        if self.drop == 0:
            return tau
        numbers = random_numbers(self.seed, index, place)
        keep = work.from_numpy(numbers >= round(self.drop * 2**32))
        work.xp.multiply(tau, keep, out=out)
        return work.xp.multiply(out, 1 / (1 - self.drop), out=out)


def random_numbers(seed, index, place):
    """Return the uint32 random numbers of a chunk's elements."""
    text = f"{seed}\0{index}\0{place.name}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    # A step of the counter makes four 64-bit words, that is, eight numbers.
    first, skip = divmod(place.start, 8)
    generator = np.random.Philox(key=key, counter=first)
    words = generator.random_raw((skip + place.size + 1) // 2)
    # Little-endian halves on every machine.
    halves = words.astype("<u8", copy=False).view("<u4")
    return halves[skip : skip + place.size]


class DARE(Wrapper):
    """Drop entries at random and rescale, then another rule.

    Yu et al. 2023 (arXiv 2311.03099, equation 3): each entry of each vector
    is dropped with probability `drop`, the others are divided by `1 - drop`.
    Which ones depends on the seed, the vector's number, the tensor's name and
    the entry's index, and on nothing else: not on order, chunks, threads or
    machine. Reference: `reference.dare`.

    Arguments
    ---------
    drop : float
        Probability, in [0, 1).
    scale : float or dict
        See `Rule`. It is DARE's scale that counts; that of `then` must be 1.
    seed : int
        Not negative.
    then : Rule or None
        What to do with the vectors afterwards, e.g.
        `TIES(density=1)` for the combination known as DARE-TIES. None: task
        arithmetic.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.ones(100_000)}
    >>> merged = DARE(drop=0.9).combine([tau])["w"]
    >>> merged.unique(), bool(abs(merged.mean() - 1) < 0.05)
    (tensor([ 0., 10.]), True)
    """

    def __init__(self, drop, scale=1.0, seed=0, then=None):
        self.drop, self.seed = drop, seed
        self.scale = checks.scale(scale)
        then = TaskArithmetic() if then is None else then
        self.inner = self.then = check_rule(then, "then")
        if then.scales_by_parameter():
            raise ValueError(
                f"then={then!r} scales by the parameter, which would be left "
                "out; put it outside: LiNeS(DARE(...), slope=...)"
            )
        if then.scale != 1:
            raise ValueError(
                f"then={then!r} has a scale of its own; give the scale to DARE"
            )
        self._drop = RandomDrop(drop, seed)

    # Dropping comes before what the other rule does to each vector.
    stages = property(lambda self: (self._drop, *self.then.stages))
