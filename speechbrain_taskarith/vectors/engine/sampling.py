"""A sample of the magnitudes, and what it tells of a threshold."""

import math

import numpy as np

from speechbrain_taskarith.vectors.engine.workspace import Place

# Sample: this share of the elements, but at least so many, in runs of about
# so many.
_SHARE = 1 / 256
_FEWEST = 1 << 14
_RUN = 1 << 10
# Half the bracket's width in standard errors of the sampled rank: four miss
# once in some ten thousand times, and a miss costs time, not exactness.
_ERRORS = 4.0


def bracket(strata, share):
    """Choose two values between which a threshold surely lies.

    Arguments
    ---------
    strata : list of tuple
        For each stratum (each large tensor; all small ones together) its
        number of elements, and the sampled runs of magnitude bits. An equal
        share of each was taken, so that what counts is how runs of the same
        stratum differ.
    share : float
        Of the elements, how many lie above the threshold.

    Returns
    -------
    low, high : int
        The bracket, both ends included.
    """
    values = np.sort(np.concatenate([run for _, r in strata for run in r]))
    size, total = len(values), sum(numel for numel, _ in strata)
    guess = values[min(int((1 - share) * size), size - 1)]
    variances, parts = [], []
    for numel, runs in strata:
        above = np.array([np.mean(run > guess) for run in runs])
        # Runs that lie side by side resemble one another, and the sample
        # is spread evenly: differences of neighbours tell its error.
        if len(runs) > 1:
            variances.append(np.mean(np.diff(above) ** 2) / 2)
            parts.append((numel, len(runs), variances[-1]))
        else:
            parts.append((numel, 1, None))
    typical = np.mean(variances) if variances else share * (1 - share)
    error = math.sqrt(
        sum(
            (numel / total) ** 2
            * (typical if variance is None else variance)
            / count
            for numel, count, variance in parts
        )
    )
    error = max(error, math.sqrt(share * (1 - share) / size))
    width = _ERRORS * error + 2 / size
    low = math.floor((1 - share - width) * size)
    high = math.ceil((1 - share + width) * size)
    return (
        int(values[low]) if low >= 0 else 0,
        int(values[high]) if high < size else 0x7FFFFFFF,
    )


def sample_places(stream, domain, numel):
    """Choose what is sampled.

    Arguments
    ---------
    stream : Stream
        The vectors.
    domain : sequence of str
        The tensors that a threshold is for.
    numel : int
        How many elements they have together.

    Returns
    -------
    list of tuple
        For each stratum its number of elements and the places.
    """
    share = min(max(_SHARE, _FEWEST / numel), 1)
    large = [n for n in domain if stream.numel[n] * share >= _RUN]
    small = [n for n in domain if stream.numel[n] * share < _RUN]
    strata = []
    for names in [[name] for name in large] + [small] * bool(small):
        size = sum(stream.numel[name] for name in names)
        wanted = round(size * share)
        runs = max(1, round(wanted / _RUN))
        spots = []
        for run in range(runs):
            start = (2 * run + 1) * size // (2 * runs)
            spots += _between(stream, names, start, start + wanted // runs)
        strata.append((size, spots))
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
