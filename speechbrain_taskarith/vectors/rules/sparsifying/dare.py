"""DARE: drop entries at random and rescale, then any other rule."""

import copy
import hashlib

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.workspace import to_numpy
from speechbrain_taskarith.vectors.rules.averaging.arithmetic import (
    TaskArithmetic,
)
from speechbrain_taskarith.vectors.rules.base import Stage, check_rule
from speechbrain_taskarith.vectors.rules.wrapper import Wrapper


class Random(Stage):
    """A stage that drops entries at random; `drop` is how many.

    The random numbers are Philox4x64-10 in counter mode: the key is a hash of
    seed, vector and tensor name (the least of tied names, so that their order
    does not count), the counter is the element's index.
    """

    one_each = ("drop",)

    def __init__(self, drop, seed=0):
        self.drop = checks.shares("drop", drop, open_high=True)
        self.seed = checks.whole("seed", seed)

    # Of each vector its drop rate, and its number in the key; of each tensor
    # its name there.
    drops, numbers, names = None, None, None

    def prepare(self, stream):
        """Number the vectors by their content, not by their place in a list."""
        number = stream.source.number
        ready = copy.copy(self)
        ready.drops = checks.one_each("drop", self.drop, number)
        ready.names = _least_names(stream.source)
        if any(ready.drops):
            ready.numbers = _order_by_content(stream, ready.names)
        return ready

    def random_numbers(self, index, place):
        """Return the uint32 random numbers of a chunk's elements."""
        name = self.names[place.name]
        text = f"{self.seed}\0{self.numbers[index]}\0{name}".encode()
        key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
        # A step of the counter makes four 64-bit words, that is, eight
        # numbers.
        first, skip = divmod(place.start, 8)
        generator = np.random.Philox(key=key, counter=first)
        words = generator.random_raw((skip + place.size + 1) // 2)
        # Little-endian halves on every machine.
        halves = words.astype("<u8", copy=False).view("<u4")
        return halves[skip : skip + place.size]


def _least_names(source):
    """Return `{name: the least of the names that are tied to it}`."""
    names = {name: name for name in source.shapes}
    for twin, name in source.twins.items():
        if name in names:
            names[name] = min(names[name], twin)
    return names


def _order_by_content(stream, least):
    """Return the rank of each vector among all by its content.

    Vectors that are given in another order keep their masks. Equal vectors
    have ranks of their own, and so masks of their own.
    """
    number = stream.source.number
    if number == 1:
        return [0]
    by_name = {}
    for place in stream.places():
        by_name.setdefault(least[place.name], []).append(place)
    contents, names, step = [()] * number, sorted(by_name), 1
    # Mostly the first tensor tells them apart: what follows decides nothing.
    while names and len(set(contents)) < number:
        for name in names[:step]:
            found = _sums(stream, by_name[name])
            contents = [(*one, part) for one, part in zip(contents, found)]
        names, step = names[step:], 2 * step
    order = sorted(range(number), key=contents.__getitem__)
    ranks = [0] * number
    for rank, index in enumerate(order):
        ranks[index] = rank
    return ranks


def _sums(stream, places):
    """Return of each vector a sum over the bits of some chunks."""

    def visit(place, work):
        # Sums of whole numbers: no chunk or thread changes them.
        start = 2 * place.start + 1
        odd = np.arange(start, start + 2 * place.size, 2, dtype=np.uint64)
        sums = []
        for tau in stream.vectors(place, work):
            # Zeros of both signs are one number.
            bits = (to_numpy(tau) + np.float32(0)).view(np.uint32)
            sums.append(int((bits * odd).sum(dtype=np.uint64)))
        return sums

    found = stream.passes.run(visit, places)
    return [sum(parts) % 2**64 for parts in zip(*found)]


class RandomDrop(Random):
    """What `DARE` does to each vector; the expectation stays."""

    # Zero times either is NaN.
    carries_nan = True

    def apply(self, index, tau, place, work, out):
        """Multiply by the mask, then by `1 / (1 - drop)`."""
        drop = self.drops[index]
        if drop == 0:
            return tau
        numbers = self.random_numbers(index, place)
        keep = work.from_numpy(numbers >= round(drop * 2**32))
        work.xp.multiply(tau, keep, out=out)
        return work.xp.multiply(out, 1 / (1 - drop), out=out)


class DARE(Wrapper):
    """Drop entries at random and rescale, then another rule.

    Yu et al. 2023 (arXiv 2311.03099, equation 3): each entry of each vector
    is dropped with probability `drop`, the others are divided by `1 - drop`.
    Which ones depends on the seed, the vector's rank by content among those
    given, the tensor's name (the least of tied ones) and the entry's index,
    and on nothing else: not on the order of the vectors or tensors, chunks,
    threads or machine. The
    expectation stays with task arithmetic; before a sign election it does
    not (see docs/rules.md). Reference: `reference.dare`.

    Arguments
    ---------
    drop : float or sequence of float
        Probability, in [0, 1). A list: one for each vector.
    scale : float or dict
        See `Rule`. It is DARE's scale that counts; that of `then` must be 1.
    seed : int
        Not negative.
    then : Rule or None
        What to do with the vectors afterwards, e.g.
        `TIES(density=1)` for the combination known as DARE-TIES. None: task
        arithmetic. Weights of the vectors are its: `TIES(density=1,
        weights=[1, 2])`.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.ones(100_000)}
    >>> merged = DARE(drop=0.9).combine([tau])["w"]
    >>> merged.unique(), bool(abs(merged.mean() - 1) < 0.05)
    (tensor([ 0., 10.]), True)
    """

    def __init__(self, drop, scale=1.0, seed=0, then=None):
        self._drop = RandomDrop(drop, seed)
        self.drop, self.seed = self._drop.drop, self._drop.seed
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

    # Dropping comes before what the other rule does to each vector.
    stages = property(lambda self: (self._drop, *self.then.stages))
