"""PCB: entries compete within their vector and with the other vectors'."""

import math

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.streaming import Stream
from speechbrain_taskarith.vectors.engine.thresholds import find_cuts
from speechbrain_taskarith.vectors.rules.base import Rule

# Share of the smallest and of the largest magnitudes that are clipped.
_CLIPPED = 1e-4


class PCB(Rule):
    """Parameter competition balancing.

    Du et al. 2024 (arXiv 2410.02396), over whole vectors: with
    the magnitudes `a_i`, clipped at both ends and brought to [0, 1], entry
    by entry the score is `exp(N a_i^2) tanh(tau_i sum_j tau_j)`: how much it
    matters in its vector, times how much it agrees with all. The share
    `density` of the highest scores, brought to [0, 1], are the weights of a
    weighted mean; all others weigh nothing. This is the formula of the
    authors' code, which has these two functions in place of the paper's
    softmax. Reference: `reference.pcb`.

    Arguments
    ---------
    density : float
        Share of the entries of each vector that take part, in (0, 1]; the
        authors use 0.05 to 0.1.
    scale : float or dict
        See `Rule`; the authors search around 1.

    Example
    -------
    >>> import torch
    >>> tau = {"w": torch.arange(1.0, 20001.0)}
    >>> merged = PCB(density=0.1).combine([tau])["w"]
    >>> round((merged != 0).double().mean().item(), 3)
    0.1
    """

    whole_tensors = False

    def __init__(self, density=0.1, scale=1.0):
        super().__init__(scale)
        self.density = checks.positive_share("density", density)

    def bytes_per_element(self, number):
        """See `Rule.bytes_per_element`: all vectors and scores at once."""
        return 96 + 12 * number

    def prepare(self, stream):
        """See `Rule.prepare`: how to score, and each vector's best scores."""
        total = sum(stream.numel.values())
        if not total:
            return None
        low = total - int(total * _CLIPPED)
        high = total - max(int(total * (1 - _CLIPPED) - 1), 0)
        limits = _find_largest(stream, low), _find_largest(stream, high)
        scores = _Scores(stream, list(zip(*limits)))
        kept = total - min(int(total * (1 - self.density)), total - 1)
        scores.rank(kept, total)
        return scores

    def merge(self, vectors, place, work, scores):
        """See `Rule.merge`."""
        xp, size = work.xp, place.size
        total, mass = work.zeros("sum", size), work.zeros("mass", size)
        part = work.array("part", size)
        for index, (tau, score) in enumerate(scores.chunks(vectors, work)):
            least, best = scores.least[index], scores.best[index]
            if best > least:
                score = xp.clip((score - least) / (best - least), 0, 1)
            else:
                # All are equal: none wins.
                score = xp.ones_like(score)
            xp.add(mass, score, out=mass)
            low, high = scores.limits[index]
            clipped = xp.sign(tau) * xp.clip(abs(tau), low, high)
            xp.multiply(clipped, score, out=part)
            xp.add(total, part, out=total)
        mass[mass == 0] = 1
        return xp.divide(total, mass, out=total)


def _find_largest(stream, rank):
    """Return each vector's magnitude of this rank (1: the largest)."""
    total = sum(stream.numel.values())
    if rank == total:

        def smallest(place, work):
            taus = stream.vectors(place, work)
            return [float(abs(tau).min()) for tau in taus]

        found = stream.passes.run(smallest, stream.places(), "smallest")
        return [min(column) for column in zip(*found)]
    (tables,) = find_cuts(stream, [rank / total], "global")
    found = []
    for table in tables:
        bits = np.array([max(cut.bits for cut in table.values())], np.int32)
        found.append(float(bits.view(np.float32)[0]))
    return found


class _Scores:
    """The scores of each vector's entries; `limits` are the clipping's."""

    def __init__(self, stream, limits):
        self.stream, self.limits = stream, limits

    def chunks(self, vectors, work):
        """Return `(tau, score)` of each vector for a chunk."""
        xp, taus = work.xp, []
        for index, tau in enumerate(vectors):
            row = work.array(f"row{index}", len(tau))
            row[:] = tau
            taus.append(row)
        total = sum(taus[1:], start=taus[0])
        found = []
        for tau, (low, high) in zip(taus, self.limits):
            inside = xp.clip(abs(tau), low, high) - low
            inside = (inside / ((high - low) or 1)) ** 2
            # A common factor of exp(-N) changes nothing, and never overflows.
            matters = xp.exp(len(taus) * (inside - 1))
            found.append((tau, matters * xp.tanh(tau * total)))
        return found

    def of(self, place, work):
        """Return the scores of all vectors for a chunk."""
        vectors = self.stream.vectors(place, work)
        return [score for _, score in self.chunks(vectors, work)]

    def rank(self, kept, total):
        """Find each vector's `best` score, and the `least` of those kept."""
        stream = self.stream

        def highest(place, work):
            return [float(score.max()) for score in self.of(place, work)]

        found = stream.passes.run(highest, stream.places(), "scores")
        self.best = [max(column) for column in zip(*found)]

        def side(sign, rank):
            source = _Side(self, sign)
            ranked = Stream(source, (), stream.chunk, passes=stream.passes)
            return _find_largest(ranked, rank)

        self.least = side(1, kept)
        if min(self.least) == 0:
            # Fewer scores are positive than are kept.
            below = side(-1, total - kept + 1)
            pairs = zip(self.least, below)
            self.least = [above or -low for above, low in pairs]


class _Side:
    """The scores of one sign, as a source of a stream; others are zero."""

    def __init__(self, scores, sign):
        self.scores, self.sign = scores, sign
        source = scores.stream.source
        self.shapes, self.number = source.shapes, source.number
        self.xp, self.device = source.xp, source.device

    def vector(self, index, place, work):
        """Return a chunk of one vector's scores."""
        score = self.scores.of(place, work)[index]
        return work.xp.clip(self.sign * score, 0, math.inf)
