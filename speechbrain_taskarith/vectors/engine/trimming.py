"""What merging rules do to each vector alone: the ways of dropping entries.

A stage is a small object with the arguments; `prepare` looks at the vectors
(as left by the stages before it) and returns what edits a chunk.
"""

import hashlib
import math

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.kernels import magnitude_bits
from speechbrain_taskarith.vectors.engine.thresholds import find_cuts
from speechbrain_taskarith.vectors.engine.workspace import to_numpy
from speechbrain_taskarith.vectors.rules.description import describe

SCOPES = ("global", "tensor")


class Stage:
    """One thing done to each vector alone.

    A subclass says how many elements it must see at once (`granularity`)
    and what becomes of a chunk (`apply`); one that needs to look at whole
    vectors first returns another object from `prepare`.
    """

    def prepare(self, stream):
        """Look at the vectors.

        Arguments
        ---------
        stream : Stream
            The vectors after the stages before this one.

        Returns
        -------
        Stage
            What is used for the chunks.
        """
        return self

    def describe(self):
        """Write the stage down in plain types.

        Returns
        -------
        dict
            `{"stage": class name, argument: value, ...}`.
        """
        return describe(self, "stage")

    def granularity(self, shape):
        """Return the smallest number of elements that can be worked on.

        Arguments
        ---------
        shape : tuple of int
            The tensor's shape.

        Returns
        -------
        int
            1: any run will do.
        """
        return 1

    def apply(self, index, tau, place, work, out):
        """Edit a chunk of a vector.

        Arguments
        ---------
        index : int
            Which vector.
        tau : array
            float32; not to be written to, unless it is `out`.
        place : Place
            Where the chunk lies.
        work : Workspace
            For buffers.
        out : array
            float32, for the result; never the same memory as `tau`.

        Returns
        -------
        array
            `out`, or `tau` where nothing is to be changed.
        """
        raise NotImplementedError


class Magnitude(Stage):
    """Keep the largest magnitudes, the rest becomes zero.

    Exactly `round(density * numel)` entries survive; of equal magnitudes
    those that come first (TIES, Yadav et al. 2023, arXiv 2306.01708,
    section 4.1).

    Arguments
    ---------
    density : float
        Share that is kept, in [0, 1].
    scope : str
        `"global"`: of the whole vector; `"tensor"`: of each tensor.
    """

    def __init__(self, density, scope="global"):
        self.density = checks.in_range("density", density, 0, 1)
        self.scope = checks.one_of("trim", scope, SCOPES)

    def prepare(self, stream):
        """See `Stage.prepare`."""
        if self.density == 1:
            return self
        (cuts,) = find_cuts(stream, [self.density], self.scope)
        return _Trimmed(stream, cuts)

    def apply(self, index, tau, place, work, out):
        """See `Stage.apply`."""
        return tau


class Band(Stage):
    """Keep the magnitudes between the largest few and the small ones.

    Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795, section
    3): outliers and negligible entries are both masked, tensor by tensor.

    Arguments
    ---------
    density : float
        Share that is kept, in [0, 1].
    gamma : float
        Share of the largest magnitudes that is dropped, in [0, 1].
    scope : str
        `"tensor"` or `"global"`.
    """

    def __init__(self, density, gamma, scope="tensor"):
        self.density = checks.in_range("density", density, 0, 1)
        self.gamma = checks.in_range("gamma", gamma, 0, 1)
        if density + gamma > 1 + 1e-9:
            raise ValueError(
                f"density={density} and gamma={gamma}: expected a sum of at "
                "most 1, since the shares kept and cut off on top do not "
                "overlap"
            )
        self.scope = checks.one_of("trim", scope, SCOPES)

    def prepare(self, stream):
        """See `Stage.prepare`."""
        # Guard against 0.9 + 0.1 becoming 1.0000000000000002.
        both = min(self.density + self.gamma, 1)
        kept, dropped = find_cuts(stream, [both, self.gamma], self.scope)
        return _Trimmed(stream, kept, dropped)


class _Trimmed(Stage):
    """The cuts of every vector, applied."""

    def __init__(self, stream, cuts, dropped=None):
        self.number = {n: i for i, n in enumerate(stream.source.shapes)}
        self.cuts, self.dropped = cuts, dropped

    def apply(self, index, tau, place, work, out):
        xp, tensor = work.xp, self.number[place.name]
        bits = magnitude_bits(tau, work)
        cut = self.cuts[index][place.name]
        mask = cut.mask(bits, place, tensor, work)
        if self.dropped is not None:
            # What is dropped from the top is part of what was kept.
            cut = self.dropped[index][place.name]
            top = cut.mask(bits, place, tensor, work, "top")
            xp.not_equal(mask, top, out=mask)
        return xp.multiply(tau, mask, out=out)


class RandomDrop(Stage):
    """Drop entries at random and enlarge the others to make up for it.

    DARE (Yu et al. 2023, arXiv 2311.03099, equation 3): each entry is
    dropped with probability `drop`, the others are divided by `1 - drop`,
    so that the expectation stays.

    The random numbers are Philox4x64-10 in counter mode: the key is a hash
    of seed, vector and tensor name, the counter is the element's index. So
    the mask of an element depends on nothing else, whatever the order, the
    chunks, the threads or the machine.

    Arguments
    ---------
    drop : float
        Probability in [0, 1).
    seed : int
        Not negative.
    """

    def __init__(self, drop, seed=0):
        self.drop = checks.in_range("drop", drop, 0, 1, open_high=True)
        self.seed = checks.whole("seed", seed)

    def apply(self, index, tau, place, work, out):
        """See `Stage.apply`."""
        if self.drop == 0:
            return tau
        numbers = random_numbers(self.seed, index, place)
        keep = work.from_numpy(numbers >= round(self.drop * 2**32))
        work.xp.multiply(tau, keep, out=out)
        return work.xp.multiply(out, 1 / (1 - self.drop), out=out)


class DropByRank(Stage):
    """Drop at random, large magnitudes less often than small ones.

    MagPrune of DELLA (Deep et al. 2024, arXiv 2406.11617, section 3.1).
    Within each row (the weights that lead to one output; a vector is one
    row) the magnitudes are ranked, `r = 0` for the largest of `n`; entry
    `i` is dropped with probability `p_i = drop - epsilon / 2 +
    (epsilon / n) r_i`, and otherwise divided by `1 - p_i`. Equal magnitudes
    are ranked by position. The random numbers are those of `RandomDrop`.

    Arguments
    ---------
    drop : float
        Mean probability, in [0, 1).
    epsilon : float
        From the least to the greatest probability; `drop - epsilon / 2`
        and `drop + epsilon / 2` must lie in [0, 1).
    seed : int
        Not negative.
    """

    def __init__(self, drop, epsilon, seed=0):
        self.drop = checks.in_range("drop", drop, 0, 1, open_high=True)
        most = 2 * min(drop, 1 - drop)
        self.epsilon = checks.in_range("epsilon", epsilon, 0, most)
        self.seed = checks.whole("seed", seed)

    def granularity(self, shape):
        """See `Stage.granularity`: a row."""
        return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)

    def apply(self, index, tau, place, work, out):
        """See `Stage.apply`."""
        if self.drop == 0:
            return tau
        row = self.granularity(place.shape)
        numbers = random_numbers(self.seed, index, place)
        bits = to_numpy(magnitude_bits(tau, work)).reshape(-1, row)
        # One integer that sorts by magnitude and then by position.
        order = np.subtract(_UPPER, bits, dtype=np.int64) << 32
        order |= np.arange(row)
        order.sort(axis=1)
        order &= 0xFFFFFFFF
        by_rank = self.drop - self.epsilon / 2
        by_rank = by_rank + self.epsilon / row * np.arange(row)
        chance = np.empty(bits.shape)
        np.put_along_axis(chance, order, by_rank[None], axis=1)
        chance = chance.reshape(-1)
        factor = np.where(numbers >= chance * 2**32, 1 / (1 - chance), 0)
        factor = work.from_numpy(factor.astype(np.float32))
        return work.xp.multiply(tau, factor, out=out)


_UPPER = 0x7FFFFFFF


def random_numbers(seed, index, place):
    """Return the random numbers that belong to a chunk's elements.

    Arguments
    ---------
    seed : int
        The rule's seed.
    index : int
        Which vector.
    place : Place
        Which elements of which tensor.

    Returns
    -------
    numpy.ndarray
        uint32, uniform.

    Example
    -------
    >>> from speechbrain_taskarith.vectors.engine.workspace import Place
    >>> whole = random_numbers(0, 0, Place(0, "w", (9,), 0, 9))
    >>> part = random_numbers(0, 0, Place(0, "w", (9,), 3, 7))
    >>> bool((whole[3:7] == part).all())
    True
    """
    text = f"{seed}\0{index}\0{place.name}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    # A step of the counter makes four 64-bit words, that is, eight numbers.
    first, skip = divmod(place.start, 8)
    generator = np.random.Philox(key=key, counter=first)
    words = generator.random_raw((skip + place.size + 1) // 2)
    # Little-endian halves on every machine.
    halves = words.astype("<u8", copy=False).view("<u4")
    return halves[skip : skip + place.size]
