"""Arithmetic on chunks, against the operators that NumPy and torch share.

All functions write into buffers of a `Workspace`, so that a chunk's numbers
stay in the cache from one operation to the next. A float's magnitude is
compared as the integer of the same bits without the sign: for finite numbers
the order is the same, and integers compare, count and sort faster.
"""

import numpy as np

_WITHOUT_SIGN = 0x7FFFFFFF
_INFINITE = 0x7F800000


def magnitude_bits(values, work, key="bits"):
    """Return the bits of `|values|` as int32.

    Arguments
    ---------
    values : array
        float32, one-dimensional.
    work : Workspace
        Its buffer `key` takes the result.
    key : str
        The buffer.

    Returns
    -------
    array
        int32; larger for larger magnitudes; NaN and infinity from
        `0x7F800000` on.
    """
    xp = work.xp
    bits = work.array(key, len(values), "int32")
    return xp.bitwise_and(values.view(xp.int32), _WITHOUT_SIGN, out=bits)


def all_finite(values):
    """Tell whether float32 values hold neither NaN nor infinity.

    Arguments
    ---------
    values : array
        float32, NumPy or torch.

    Returns
    -------
    bool
        True where all are finite.
    """
    if not len(values):
        return True
    # Both reductions carry a NaN to their result.
    low, high = values.min(), values.max()
    return bool(low > -np.inf) and bool(high < np.inf)


def finite_bits(bits):
    """Tell the same of what `magnitude_bits` gave.

    Arguments
    ---------
    bits : array
        int32, one-dimensional.

    Returns
    -------
    bool
        True where no element stands for NaN or infinity.
    """
    return not len(bits) or int(bits.max()) < _INFINITE


def pick(values, mask):
    """Return the values where a mask is true, as NumPy.

    Arguments
    ---------
    values : array
        NumPy or torch, one-dimensional.
    mask : array
        bool.

    Returns
    -------
    numpy.ndarray
        A copy.
    """
    if isinstance(values, np.ndarray):
        # Faster than indexing where few are true.
        return values.compress(mask)
    return values[mask].cpu().numpy()


def weighted_sum(vectors, weights, place, work):
    """Return `sum_i w_i tau_i` of a chunk.

    Arguments
    ---------
    vectors : iterable of arrays
        float32, each valid until the next.
    weights : sequence of float
        One for each.
    place : Place
        The chunk.
    work : Workspace
        Its buffer `sum` takes the result.

    Returns
    -------
    array
        float32.
    """
    xp = work.xp
    total = work.array("sum", place.size)
    for number, (weight, tau) in enumerate(zip(weights, vectors)):
        if number == 0:
            xp.multiply(tau, float(weight), out=total)
        elif weight == 1:
            xp.add(total, tau, out=total)
        else:
            part = work.array("part", place.size)
            xp.multiply(tau, float(weight), out=part)
            xp.add(total, part, out=total)
    return total


def dot_table(vectors, place, work, run):
    """Return all dot products between the vectors of a chunk.

    Arguments
    ---------
    vectors : sequence of arrays
        float32, all valid at once.
    place : Place
        The chunk.
    work : Workspace
        For buffers.
    run : int
        Sums are taken over runs of so many elements.

    Returns
    -------
    list of numpy.ndarray
        A float64 matrix for every run, to be added in order.
    """
    xp, number = work.xp, len(vectors)
    tables = []
    for begin in range(0, place.size, run):
        end = min(begin + run, place.size)
        wide = work.array("wide", number * (end - begin), "float64")
        wide = wide.reshape(number, end - begin)
        for row, tau in zip(wide, vectors):
            row[:] = tau[begin:end]
        product = work.array("product", end - begin, "float64")
        table = np.zeros((number, number))
        for i in range(number):
            for j in range(i + 1):
                xp.multiply(wide[i], wide[j], out=product)
                table[i, j] = table[j, i] = float(product.sum())
        tables.append(table)
    return tables
