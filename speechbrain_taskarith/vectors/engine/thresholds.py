"""The exact k largest of very many numbers that only stream by.

Trimming a vector needs the k-th largest of its magnitudes, for hundreds of
millions of them, without holding or sorting them. One pass is enough nearly
always: a small sample tells between which two values the threshold lies; the
pass counts what is above and keeps what is between, about one in a hundred;
among these the exact one is selected. Where the sample misled, two histograms
over the bits find it as surely, in three more passes.

Equal magnitudes are told apart by position, so that exactly k survive. The
cut is one number and the position of the last survivor that equals it: from
these a chunk can be trimmed alone.
"""

from typing import NamedTuple

import numpy as np

from speechbrain_taskarith.vectors.engine.kernels import (
    finite_bits,
    magnitude_bits,
    pick,
)
from speechbrain_taskarith.vectors.engine.sampling import bracket, sample_places
from speechbrain_taskarith.vectors.engine.workspace import to_numpy

# Below so many elements the sample would not be smaller than the whole.
_SMALL = 1 << 17
# Largest share of the elements that may lie in the bracket before memory is
# saved by the histograms instead.
_MOST = 1 / 16
_TOP = 0x7FFFFFFF


class Cut(NamedTuple):
    """Where a vector, or a tensor of it, is cut.

    Arguments
    ---------
    bits : int
        What is larger survives (`magnitude_bits`).
    tensor : int
        Of the elements that equal `bits`, those in tensors before this one
        (by number in the vector) survive ...
    last : int
        ... and in this one those up to this index.
    """

    bits: int
    tensor: int = -1
    last: int = -1

    def mask(self, bits, place, tensor, work, key="mask"):
        """Return which elements of a chunk survive.

        Arguments
        ---------
        bits : array
            `magnitude_bits` of the chunk.
        place : Place
            The chunk.
        tensor : int
            The number of its tensor.
        work : Workspace
            Its buffer `key` takes the result.
        key : str
            The buffer.

        Returns
        -------
        array
            bool.
        """
        mask = work.array(key, place.size, "bool")
        if tensor == self.tensor:
            equal = min(max(self.last + 1 - place.start, 0), place.size)
        else:
            equal = place.size if tensor < self.tensor else 0
        if equal:
            work.xp.greater(bits[:equal], self.bits - 1, out=mask[:equal])
        if equal < place.size:
            work.xp.greater(bits[equal:], self.bits, out=mask[equal:])
        return mask


NOTHING = Cut(_TOP)
EVERYTHING = Cut(-1)


def survivors(density, numel):
    """Return how many elements a density keeps: `round(density * numel)`.

    Arguments
    ---------
    density : float
        Share in [0, 1].
    numel : int
        Number of elements.

    Returns
    -------
    int
        Halves are rounded to even, as Python's `round` does.
    """
    return round(density * numel)


def find_cuts(stream, shares, scope):
    """Find the cuts that keep shares of the largest magnitudes.

    Arguments
    ---------
    stream : Stream
        The vectors after the stages before this one.
    shares : sequence of float
        Of the elements, how many to keep; all are found in the same pass.
    scope : str
        `"global"`: one cut for a whole vector; `"tensor"`: one for each
        tensor.

    Returns
    -------
    list
        For every share, for every vector `{name: Cut}`.

    Raises
    ------
    ValueError
        NaN or infinity in a vector.
    """
    names = list(stream.source.shapes)
    domains = [names] if scope == "global" else [[name] for name in names]
    cuts = [[{} for _ in range(stream.source.number)] for _ in shares]
    searches = []
    for share, tables in zip(shares, cuts):
        for domain in domains:
            numel = sum(stream.numel[name] for name in domain)
            k = survivors(share, numel)
            for index, table in enumerate(tables):
                if 0 < k < numel:
                    search = _Search(index, domain, numel, k, stream)
                    searches.append((search, table))
                else:
                    found = NOTHING if k == 0 else EVERYTHING
                    table.update(dict.fromkeys(domain, found))
    _search([search for search, _ in searches], stream)
    for search, table in searches:
        table.update(dict.fromkeys(search.domain, search.locate(stream)))
    return cuts


def _search(searches, stream):
    """Find the values at which to cut."""
    _sample_all(searches, stream)
    _sweep(stream, searches, _Search.collect, _Search.select)
    for look, decide in (
        (_Search.count_high, _Search.decide_high),
        (_Search.count_low, _Search.decide_low),
        (_Search.count_equal, _Search.decide_equal),
    ):
        missed = [search for search in searches if search.cut is None]
        _sweep(stream, missed, look, decide)


class _Search:
    """The search for one cut of one vector."""

    def __init__(self, index, domain, numel, k, stream):
        self.index, self.domain, self.numel, self.k = index, domain, numel, k
        self.order = {n: i for i, n in enumerate(stream.source.shapes)}
        self.low, self.high = 0, _TOP
        self.seen, self.held, self.full = {}, 0, False
        self.histogram, self.cut = 0, None

    # -- the usual way: a bracket from a sample

    def collect(self, bits, place, work, lock):
        """Count what lies above the bracket, keep what lies inside."""
        xp, size = work.xp, place.size
        above = work.array("above", size, "bool")
        inside = work.array("inside", size, "bool")
        xp.greater(bits, self.high, out=above)
        xp.greater(bits, self.low - 1, out=inside)
        over = int(xp.count_nonzero(above))
        xp.not_equal(inside, above, out=inside)
        values = _compact(pick(bits, inside), size)
        self.held += len(values[0])
        if self.full or self.held > max(_SMALL, _MOST * self.numel):
            # The sample misled: what is held would grow without bound.
            self.full = True
            self.seen = {}
            return
        self.seen[place.index] = (place, over, *values)

    def select(self):
        """Find the cut among what was collected, if it is there."""
        if self.full:
            self.seen = {}
            return
        seen = [self.seen[key] for key in sorted(self.seen)]
        need = self.k - sum(over for _, over, _, _ in seen)
        pieces = [values for _, _, values, _ in seen]
        values = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        if all(counts is None for _, _, _, counts in seen):
            if not 0 < need <= len(values):
                return
            at = len(values) - need
            values.partition(at)
            bits = int(values[at])
            kept = need - int(np.count_nonzero(values[at:] > bits))
        else:
            weights = np.concatenate(
                [
                    np.ones(len(v), np.int64) if c is None else c
                    for _, _, v, c in seen
                ]
            )
            if not 0 < need <= weights.sum():
                return
            order = np.argsort(-values, kind="stable")
            total = np.cumsum(weights[order])
            bits = int(values[order[np.searchsorted(total, need)]])
            kept = need - int(weights[values > bits].sum())
        equal = [(place, _count_equal(v, c, bits)) for place, _, v, c in seen]
        self.settle(bits, kept, equal)

    def settle(self, bits, kept, equal):
        """Note the cut's value, how many of its equals are kept, and how
        many there are in each place."""
        self.seen = {}
        self.cut, self.kept = bits, kept
        self.equal = [(place, count) for place, count in equal if count]

    def locate(self, stream):
        """Find the position of the last element kept, and make the cut."""
        left, numbers = self.kept, iter(self.equal)
        place, count = next(numbers)
        while left > count:
            left -= count
            place, count = next(numbers)
        last = place.stop - 1
        if left < count:
            work = stream.passes.workspace
            tau = stream.vector(self.index, place, work)
            equal = to_numpy(magnitude_bits(tau, work) == self.cut)
            last = place.start + int(np.flatnonzero(equal)[left - 1])
        return Cut(self.cut, self.order[place.name], last)

    # -- the sure way: histograms of the upper, then of the lower bits

    def count_high(self, bits, place, work, lock):
        """Count by the upper sixteen bits."""
        self._count(to_numpy(bits) >> 15, lock)

    def decide_high(self):
        """Find the upper bits of the cut."""
        self.upper, self.need = self._rank(self.k)

    def count_low(self, bits, place, work, lock):
        """Count by the lower fifteen bits, where the upper ones fit."""
        bits = to_numpy(bits)
        self._count(bits[bits >> 15 == self.upper] & 0x7FFF, lock)

    def decide_low(self):
        """Find the lower bits."""
        lower, self.need = self._rank(self.need)
        self.value = self.upper << 15 | lower

    def count_equal(self, bits, place, work, lock):
        """Count what equals the cut."""
        count = int(np.count_nonzero(to_numpy(bits) == self.value))
        self.seen[place.index] = (place, count)

    def decide_equal(self):
        """Settle the cut."""
        equal = [self.seen[key] for key in sorted(self.seen)]
        self.settle(self.value, self.need, equal)

    def _count(self, digits, lock):
        counts = np.bincount(digits, minlength=1 << 16)
        with lock:
            self.histogram = self.histogram + counts

    def _rank(self, need):
        """Return the digit in which the rank falls, and what is left."""
        total, self.histogram = self.histogram, 0
        above = np.cumsum(total[::-1])[::-1]
        digit = int(np.flatnonzero(above >= need)[-1])
        return digit, need - int(above[digit] - total[digit])


def _compact(values, size):
    """Keep values once where many are equal (half-precision weights)."""
    if len(values) > size // 32:
        unique, counts = np.unique(values, return_counts=True)
        if len(unique) < len(values) // 4:
            return unique, counts
    return values, None


def _count_equal(values, counts, bits):
    equal = values == bits
    if counts is None:
        return int(np.count_nonzero(equal))
    return int(counts[equal].sum())


def _sample_all(searches, stream):
    """Choose the brackets of all searches from one sample."""
    domains = {}
    for search in searches:
        domains.setdefault(tuple(search.domain), []).append(search)
    for domain, members in domains.items():
        if members[0].numel < _SMALL:
            continue
        strata = sample_places(stream, domain, members[0].numel)
        spots = [(i, place) for i, (_, ps) in enumerate(strata) for place in ps]
        for index in sorted({search.index for search in members}):

            def look(spot, work, index=index):
                tau = stream.vector(index, spot[1], work)
                return to_numpy(magnitude_bits(tau, work)).copy()

            runs = [[] for _ in strata]
            found = stream.passes.run(look, spots)
            for (stratum, _), bits in zip(spots, found):
                runs[stratum].append(bits)
            sample = [(n, r) for (n, _), r in zip(strata, runs) if r]
            for search in members:
                if search.index == index:
                    share = search.k / search.numel
                    search.low, search.high = bracket(sample, share)


def _sweep(stream, searches, look, decide):
    """Show every chunk's magnitudes to the searches that want them."""
    wanted, left, number = {}, {}, stream.source.number
    # One vector after another, so that its magnitudes are taken once.
    for search in sorted(searches, key=lambda search: search.index):
        for name in search.domain:
            wanted.setdefault(name, []).append(search)
    spots = [p for p in stream.places() if p.name in wanted]
    chunks = {}
    for place in spots:
        chunks[place.name] = chunks.get(place.name, 0) + 1
    for search in searches:
        left[id(search)] = sum(chunks.get(name, 0) for name in search.domain)

    # The magnitudes tell of NaN and infinity too, at less cost; stages may
    # hide them.
    staged = bool(stream.ready)

    def visit(place, work):
        index = None
        for search in wanted[place.name]:
            if search.index != index:
                index = search.index
                tau = stream.vector(index, place, work, look=staged)
                bits = magnitude_bits(tau, work)
                if not (staged or stream.finite or finite_bits(bits)):
                    raise stream.source.not_finite_error(index, place)
            look(search, bits, place, work, stream.passes.lock)
        done = []
        with stream.passes.lock:
            for search in wanted[place.name]:
                left[id(search)] -= 1
                if not left[id(search)]:
                    done.append(search)
        for search in done:
            # Early, so that what a tensor collected is freed with it.
            decide(search)

    if spots:
        stream.passes.run(visit, spots, "thresholds")
    # A sweep over everything has looked at everything.
    if len(spots) == len(stream.places()):
        stream.finite |= len({s.index for s in searches}) == number
