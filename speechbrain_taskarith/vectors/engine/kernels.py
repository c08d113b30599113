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
    """Return the bits of `|values|` (float32) as int32.

    Larger for larger magnitudes; NaN and infinity from `0x7F800000` on.
    """
    xp = work.xp
    bits = work.array(key, len(values), "int32")
    return xp.bitwise_and(values.view(xp.int32), _WITHOUT_SIGN, out=bits)


def finite_bits(bits):
    """Tell whether no `magnitude_bits` stand for NaN or infinity."""
    return not len(bits) or int(bits.max()) < _INFINITE


def pick(values, mask):
    """Return a copy of the values where a mask is true, as NumPy."""
    if isinstance(values, np.ndarray):
        # Faster than indexing where few are true.
        return values.compress(mask)
    return values[mask].cpu().numpy()


def weighted_sum(vectors, weights, place, work):
    """Return `sum_i w_i tau_i` of a chunk, in the buffer `sum`.

    Each of the float32 vectors need be valid only until the next is taken.
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

    A float64 matrix for every `run` of elements, to be added in order. All
    vectors must be valid at once.
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
