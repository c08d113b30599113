"""Fingerprints: what tells one set of weights from another.

A fingerprint is a SHA-256 over SHA-256 leaves, one leaf per tensor, so that
threads may hash tensors side by side and an engine may hash what it streams
by anyway. It depends on names, dtypes, shapes and bytes and on nothing else:
the same weights have the same fingerprint in every file format.
"""

import hashlib


def leaf(name, info):
    """Start the hash of one tensor; its bytes are to be added by `update`.

    Arguments
    ---------
    name : str
        The parameter's name.
    info : TensorInfo
        Its dtype and shape.

    Returns
    -------
    hashlib hash object
        Already fed with name, dtype and shape.
    """
    shape = ",".join(str(size) for size in info.shape)
    start = f"{name}\0{info.dtype}\0{shape}\0".encode()
    return hashlib.sha256(start)


def combine(digests):
    """Make the fingerprint out of the leaves' digests.

    Arguments
    ---------
    digests : dict
        `{name: bytes}`; the order does not matter.

    Returns
    -------
    str
        64 hexadecimal digits.

    Example
    -------
    >>> combine({"a": b"1", "b": b"2"}) == combine({"b": b"2", "a": b"1"})
    True
    """
    root = hashlib.sha256()
    for name in sorted(digests):
        root.update(digests[name])
    return root.hexdigest()


def short(fingerprint):
    """Return the first 12 digits, enough for people and messages.

    Arguments
    ---------
    fingerprint : str or None
        A fingerprint.

    Returns
    -------
    str
        Its start, or `"none"`.
    """
    return fingerprint[:12] if fingerprint else "none"
