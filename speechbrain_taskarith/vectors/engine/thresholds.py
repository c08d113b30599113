"""The exact k largest of very many numbers that only stream by.

Trimming a vector needs the k-th largest of its magnitudes, for hundreds of
millions of them, without holding or sorting them. One pass is enough nearly
always:

1. sample: about one element in 256 tells between which two values the
   threshold lies (`_sample`, `_bracket`);
2. select: a pass counts what is above this bracket and keeps what is inside,
   about one in a hundred; among these the exact value is selected
   (`_Search.collect`, `_Search.select`);
3. locate: of the elements that equal it, the first ones survive
   (`_Search.locate`).

Where the sample misled, two histograms over the bits find the value as surely,
in three more passes (`_Search.count` twice, `_Search.count_equal`).

Equal magnitudes are told apart by position, so that exactly k survive. The
cut is one number and the position of the last survivor that equals it: from
these a chunk can be trimmed alone.
"""

import collections
import itertools
import math
from typing import NamedTuple

import numpy as np

from speechbrain_taskarith.vectors.checks import one_each
from speechbrain_taskarith.vectors.engine.workspace import (
    INFINITE,
    Place,
    magnitude_bits,
    to_numpy,
)

# Below so many elements the sample would not be smaller than the whole.
_SMALL = 1 << 17
# Largest share of the elements that may lie in the bracket before memory is
# saved by the histograms instead.
_LARGEST_SHARE = 1 / 16
# Sample: this share of the elements, but at least so many, in runs of about
# so many.
_SAMPLED_SHARE = 1 / 256
_SMALLEST_SAMPLE = 1 << 14
_SAMPLED_RUN = 1 << 10
# Half the bracket's width in standard errors of the sampled rank: four miss
# once in some ten thousand times, and a miss costs time, not exactness.
_ERRORS = 4.0
_TOP = 0x7FFFFFFF


class Cut(NamedTuple):
    """Where a tensor is cut: what is larger than `bits` survives.

    Of the elements that equal `bits` (see `magnitude_bits`) those up to
    index `last` survive.
    """

    bits: int
    last: int = -1

    def mask(self, bits, place, work, key="mask"):
        """Return which elements of a chunk survive."""
        mask = work.array(key, place.size, "bool")
        equal = min(max(self.last + 1 - place.start, 0), place.size)
        if equal:
            work.xp.greater(bits[:equal], self.bits - 1, out=mask[:equal])
        if equal < place.size:
            work.xp.greater(bits[equal:], self.bits, out=mask[equal:])
        return mask


NOTHING = Cut(_TOP)
EVERYTHING = Cut(-1)


def find_cuts(stream, shares, scope):
    """Find the cuts that keep shares of the largest magnitudes.

    Of `n` elements exactly `round(share * n)` are kept, for each share and
    each vector of the stream: over the whole vector (`scope="global"`) or in
    each tensor (`"tensor"`). A share may be a list, one for each vector.
    Returns, for every share, for every vector `{name: Cut}`. Raises for NaN
    or infinity in a vector.
    """
    names = list(stream.source.shapes)
    domains = [names] if scope == "global" else [[name] for name in names]
    cuts = [[{} for _ in range(stream.source.number)] for _ in shares]
    searches, tables = [], []
    for share, per_vector in zip(shares, cuts):
        each = one_each("share", share, len(per_vector))
        for domain in domains:
            numel = sum(stream.numel[name] for name in domain)
            for index, table in enumerate(per_vector):
                k = round(each[index] * numel)
                if 0 < k < numel:
                    searches.append(_Search(index, domain, numel, k))
                    tables.append(table)
                else:
                    cut = NOTHING if k == 0 else EVERYTHING
                    table.update(dict.fromkeys(domain, cut))
    large = [search for search in searches if search.numel >= _SMALL]
    if large:
        _sample(large, stream)
    for look, decide in (
        (_Search.collect, _Search.select),
        (_Search.count, _Search.narrow),
        (_Search.count, _Search.narrow),
        (_Search.count_equal, _Search.settle_counted),
    ):
        missed = [search for search in searches if search.value is None]
        _sweep(stream, missed, look, decide)
    for search, table in zip(searches, tables):
        table.update(search.locate(stream))
    return cuts


class _Search:
    """The search for one cut of one vector."""

    def __init__(self, index, domain, numel, k):
        self.index, self.domain, self.numel, self.k = index, domain, numel, k
        self.low, self.high = 0, _TOP
        # By chunk: what the pass found; how much it is; whether too much.
        self.seen, self.held, self.full = {}, 0, False
        self.value = None
        # Without a bracket: bits found so far, and the rank among the rest.
        self.upper, self.need, self.histogram = None, k, 0

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
        # On the CPU faster than indexing where few are true.
        on_cpu = isinstance(bits, np.ndarray)
        picked = bits.compress(inside) if on_cpu else bits[inside]
        values = _compact(to_numpy(picked), size)
        self.held += len(values[0])
        if self.full or self.held > max(_SMALL, _LARGEST_SHARE * self.numel):
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
                [np.ones(len(v), int) if c is None else c for *_, v, c in seen]
            )
            if not 0 < need <= weights.sum():
                return
            order = np.argsort(-values, kind="stable")
            total = np.cumsum(weights[order])
            bits = int(values[order[np.searchsorted(total, need)]])
            kept = need - int(weights[values > bits].sum())
        equal = [(place, _equal_count(v, c, bits)) for place, _, v, c in seen]
        self.settle(bits, kept, equal)

    def settle(self, value, kept, equal):
        """Note the threshold, how many equals survive, and where they are."""
        self.seen = {}
        self.value, self.kept = value, kept
        self.equal = [(place, count) for place, count in equal if count]

    def locate(self, stream):
        """Find the position of the last survivor; return `{name: Cut}`."""
        left, numbers = self.kept, iter(self.equal)
        place, count = next(numbers)
        while left > count:
            left -= count
            place, count = next(numbers)
        last = place.stop - 1
        if left < count:
            work = stream.passes.workspace
            tau = stream.vector(self.index, place, work)
            equal = to_numpy(magnitude_bits(tau, work) == self.value)
            last = place.start + int(np.flatnonzero(equal)[left - 1])
        # Of its equals, those in earlier tensors survive, later ones do not.
        cuts = dict.fromkeys(self.domain, Cut(self.value))
        for name in self.domain[: self.domain.index(place.name)]:
            cuts[name] = Cut(self.value, stream.numel[name])
        cuts[place.name] = Cut(self.value, last)
        return cuts

    # -- the sure way: histograms of the upper, then of the lower bits

    def count(self, bits, place, work, lock):
        """Count by the upper sixteen bits; once they are found, by the rest."""
        bits = to_numpy(bits)
        digits = bits >> 15
        if self.upper is not None:
            digits = bits[digits == self.upper] & 0x7FFF
        counts = np.bincount(digits, minlength=1 << 16)
        with lock:
            self.histogram = self.histogram + counts

    def narrow(self):
        """Find the digit in which the rank falls, and the rank within it."""
        above = np.cumsum(self.histogram[::-1])[::-1]
        digit = int(np.flatnonzero(above >= self.need)[-1])
        self.need -= int(above[digit] - self.histogram[digit])
        self.histogram = 0
        if self.upper is None:
            self.upper = digit
        else:
            self.candidate = self.upper << 15 | digit

    def count_equal(self, bits, place, work, lock):
        """Count what equals the cut."""
        count = int(np.count_nonzero(to_numpy(bits) == self.candidate))
        self.seen[place.index] = (place, count)

    def settle_counted(self):
        """Settle the cut."""
        equal = [self.seen[key] for key in sorted(self.seen)]
        self.settle(self.candidate, self.need, equal)


def _compact(values, size):
    """Keep values once where many are equal (half-precision weights)."""
    if len(values) > size // 32:
        unique, counts = np.unique(values, return_counts=True)
        if len(unique) < len(values) // 4:
            return unique, counts
    return values, None


def _equal_count(values, counts, bits):
    equal = values == bits
    return int(
        np.count_nonzero(equal) if counts is None else counts[equal].sum()
    )


def _sample(searches, stream):
    """Choose the brackets of searches from one sample of each vector."""
    domains = {}
    for search in searches:
        domains.setdefault(tuple(search.domain), []).append(search)
    for domain, members in domains.items():
        strata = _sample_places(stream, domain, members[0].numel)
        places = [(i, p) for i, (_, ps) in enumerate(strata) for p in ps]
        for index in sorted({search.index for search in members}):

            def look(numbered, work, index=index):
                tau = stream.vector(index, numbered[1], work)
                return to_numpy(magnitude_bits(tau, work)).copy()

            runs = [[] for _ in strata]
            sampled = stream.passes.run(look, places)
            for (stratum, _), bits in zip(places, sampled):
                runs[stratum].append(bits)
            sample = [(n, r) for (n, _), r in zip(strata, runs) if r]
            for search in members:
                if search.index == index:
                    share = search.k / search.numel
                    search.low, search.high = _bracket(sample, share)


def _bracket(strata, share):
    """Choose two values between which a threshold surely lies.

    A stratum (each large tensor; all small ones together) is its number of
    elements and the sampled runs of magnitude bits. An equal share of each
    was taken, so what counts is how runs of the same stratum differ.
    """
    values = np.sort(np.concatenate([run for _, r in strata for run in r]))
    size, total = len(values), sum(numel for numel, _ in strata)
    guess = values[min(int((1 - share) * size), size - 1)]
    variances = {}
    for number, (_, runs) in enumerate(strata):
        above = np.array([np.mean(run > guess) for run in runs])
        # Runs that lie side by side resemble one another, and the sample
        # is spread evenly: differences of neighbours tell its error.
        if len(runs) > 1:
            variances[number] = np.mean(np.diff(above) ** 2) / 2
    known = list(variances.values())
    typical = np.mean(known) if known else share * (1 - share)
    variance = sum(
        (numel / total) ** 2 * variances.get(number, typical) / len(runs)
        for number, (numel, runs) in enumerate(strata)
    )
    error = math.sqrt(max(variance, share * (1 - share) / size))
    width = _ERRORS * error + 2 / size
    low = math.floor((1 - share - width) * size)
    high = math.ceil((1 - share + width) * size)
    return (
        int(values[low]) if low >= 0 else 0,
        int(values[high]) if high < size else _TOP,
    )


def _sample_places(stream, domain, numel):
    """Return what is sampled: each stratum's number of elements and places."""
    share = min(max(_SAMPLED_SHARE, _SMALLEST_SAMPLE / numel), 1)
    large = [n for n in domain if stream.numel[n] * share >= _SAMPLED_RUN]
    small = [n for n in domain if stream.numel[n] * share < _SAMPLED_RUN]
    strata = []
    for names in [[name] for name in large] + [small] * bool(small):
        size = sum(stream.numel[name] for name in names)
        wanted = round(size * share)
        runs = max(1, round(wanted / _SAMPLED_RUN))
        places = []
        for run in range(runs):
            start = (2 * run + 1) * size // (2 * runs)
            places += _between(stream, names, start, start + wanted // runs)
        strata.append((size, places))
    return strata


def _between(stream, names, start, stop):
    """Return the places of elements `[start, stop)` of tensors in a row."""
    found, begin = [], 0
    for name in names:
        shape, numel = stream.source.shapes[name], stream.numel[name]
        low, high = max(start - begin, 0), min(stop - begin, numel)
        if low < high:
            unit = stream.granularity(shape)
            low, high = low // unit * unit, -(-high // unit) * unit
            found.append(Place(0, name, shape, low, min(high, numel)))
        begin += numel
    return found


def _sweep(stream, searches, look, decide):
    """Show every chunk's magnitudes to the searches that want them."""
    wanted, number = {}, stream.source.number
    # One vector after another, so that its magnitudes are taken once.
    for search in sorted(searches, key=lambda search: search.index):
        for name in search.domain:
            wanted.setdefault(name, []).append(search)
    places = [p for p in stream.places() if p.name in wanted]
    chunks = collections.Counter(place.name for place in places)
    left = {s: sum(chunks[name] for name in s.domain) for s in searches}

    # NaN and infinity show in the magnitudes too, at less cost, unless a
    # stage has hidden them.
    staged = bool(stream.ready)

    def visit(place, work):
        index = None
        for search in wanted[place.name]:
            if search.index != index:
                index = search.index
                tau = stream.vector(index, place, work, look=staged)
                bits = magnitude_bits(tau, work)
                known = staged or stream.finite
                if not known and int(bits.max()) >= INFINITE:
                    raise stream.source.not_finite_error(index, place)
            look(search, bits, place, work, stream.passes.lock)
        done = []
        with stream.passes.lock:
            for search in wanted[place.name]:
                left[search] -= 1
                if not left[search]:
                    done.append(search)
        for search in done:
            # Early, so that what a tensor collected is freed with it.
            decide(search)

    if places:
        stream.passes.run(visit, places, "thresholds")
    # Looked at everything? Where each vector has a share of its own, a tensor
    # may be searched in some of them only.
    seen = {(s.index, name) for s in searches for name in s.domain}
    held = {place.name for place in stream.places()}
    every = itertools.product(range(number), held)
    stream.finite |= seen.issuperset(every)
