"""Comparing task vectors: how similar they are, and where they are large.

Vectors are read tensor by tensor, so that comparing many vectors of a large
model needs memory for one tensor of each. Any mapping from parameter name to
tensor will do.
"""

import logging
import math
from collections import defaultdict
from itertools import accumulate

import torch

from speechbrain_taskarith.metrics.plots import plot_by_layer, plot_heat_map
from speechbrain_taskarith.utils.patterns import select
from speechbrain_taskarith.vectors.products import counted, ties_of
from speechbrain_taskarith.vectors.states.readers import as_model
from speechbrain_taskarith.vectors.task_vector import (
    as_vector,
    as_vectors,
)

logger = logging.getLogger(__name__)

# Entries of each vector turned to float64 at a time: 2 MiB per vector.
_BLOCK = 1 << 18


def cosine_matrix(vectors, *, include=("*",), exclude=()):
    """Cosine similarity of every pair of task vectors.

    `cos(a, b) = <a, b> / (|a| |b|)` over all parameters together (tied ones
    count once), as Ilharco et al., "Editing models with task arithmetic", 2023
    (section 5) compare tasks. Products are summed in float64.

    Arguments
    ---------
    vectors : sequence of TaskVector
        N vectors (or their paths, or mappings name -> tensor) with the same
        parameters.
    include, exclude : str or sequence of str
        Shell patterns on whole parameter names: those that count, and those
        that do not.

    Returns
    -------
    torch.Tensor
        float64, [N, N], in [-1, 1], symmetric, ones on the diagonal. A zero
        vector has no direction: its row, column and diagonal entry are 0,
        and a warning names it.

    Raises
    ------
    ValueError
        No vectors, other parameters or shapes, or NaN or infinity in one.

    Example
    -------
    >>> a = {"weight": torch.tensor([[1.0, 0.0]]), "bias": torch.zeros(1)}
    >>> b = {"weight": torch.tensor([[1.0, 1.0]]), "bias": torch.zeros(1)}
    >>> cosine_matrix([a, b])
    tensor([[1.0000, 0.7071],
            [0.7071, 1.0000]], dtype=torch.float64)
    """
    vectors = as_vectors(vectors)
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for block in _blocks(vectors, include, exclude):
        gram += block @ block.T
    norms = gram.diagonal().sqrt()
    for i in (norms == 0).nonzero().flatten().tolist():
        logger.warning(
            f"vector {i} is zero and has no direction: its cosine with every "
            "vector is set to 0"
        )
    scale = norms.masked_fill(norms == 0, 1.0)
    cosine = (gram / scale / scale[:, None]).clamp(-1, 1)
    # Rounding must not make a vector differ from itself.
    cosine.diagonal().copy_((norms > 0).to(torch.float64))
    return (cosine + cosine.T) / 2


def sign_agreement(vectors, *, include=("*",), exclude=()):
    """Share of entries on which two task vectors agree in sign.

    Counted over the entries that are non-zero in both; about 0.5 for
    unrelated vectors. Entries that disagree are what TIES resolves (Yadav
    et al., "TIES-Merging", 2023, section 3.2).

    Arguments
    ---------
    vectors, include, exclude
        As in `cosine_matrix`.

    Returns
    -------
    torch.Tensor
        float64, [N, N], in [0, 1], symmetric. NaN, with a warning, where
        two vectors share no non-zero entry: 0 would read as "always
        opposite".

    Example
    -------
    >>> a = {"weight": torch.tensor([1.0, -2.0, 3.0, 0.0])}
    >>> b = {"weight": torch.tensor([5.0, -1.0, -1.0, 9.0])}
    >>> sign_agreement([a, b])[0, 1].item()
    0.6666666666666666
    """
    vectors = as_vectors(vectors)
    shape = (2, len(vectors), len(vectors))
    difference, shared = torch.zeros(shape, dtype=torch.float64)
    for block in _blocks(vectors, include, exclude):
        sign = block.sign()
        # Of s shared entries, a agree and s - a do not: the product of the
        # signs sums to a - (s - a).
        difference += sign @ sign.T
        shared += sign.abs() @ sign.abs().T
    for i, j in (shared == 0).triu().nonzero().tolist():
        logger.warning(
            f"vectors {i} and {j} share no non-zero entry: their sign "
            "agreement is not defined (NaN)"
        )
    return (difference / shared + 1) / 2


def layer_norms(vector, depth=None, *, base=None, include=("*",), exclude=()):
    """Euclidean norm of a task vector, layer by layer.

    Arguments
    ---------
    vector : TaskVector
        The vector, its path, or any mapping name -> tensor.
    depth : int or None
        How many dotted parts of a parameter's name make a layer (`2`:
        `encoder.layers`). None cuts behind the first number that is not the
        very first part (`1.encoder.layers.3.norm.weight` belongs to
        `1.encoder.layers.3`), or before the last part where there is none.
    base : path, torch.nn.Module, mapping, State or None
        The base model: norms are then relative to the norm of the base's
        layer, `|tau_l| / |theta_l|`; 0 / 0 is 0.
    include, exclude : str or sequence of str
        As in `cosine_matrix`.

    Returns
    -------
    dict of str: float
        By layer, in the order of the names, numbers in counting order.

    Raises
    ------
    ValueError
        A depth below 1, NaN or infinity in the vector or the base, or
        parameters that the base lacks or has in another shape.

    Example
    -------
    >>> tau = {
    ...     "layers.10.weight": torch.ones(2, 2),
    ...     "layers.2.weight": torch.tensor([3.0]),
    ...     "layers.2.bias": torch.tensor([4.0]),
    ... }
    >>> layer_norms(tau)
    {'layers.2': 5.0, 'layers.10': 2.0}
    """
    if depth is not None and depth < 1:
        raise ValueError(f"depth is {depth}, expected a whole number >= 1")
    vector = as_vector(vector)
    base = None if base is None else as_model(base)
    squares, base_squares = defaultdict(float), defaultdict(float)
    ties, seen = ties_of(vector), set()
    for name in select(vector.keys(), include, exclude):
        tensor, layer = vector[name], _layer(name, depth)
        if (layer, ties.get(name, name)) in seen:
            continue
        seen.add((layer, ties.get(name, name)))
        squares[layer] += _square(tensor, name)
        if base is None:
            continue
        if name not in base.keys():
            raise ValueError(
                f"the base has no parameter {name!r}; give the base this "
                "vector was taken from"
            )
        reference = base[name]
        if reference.shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)} in the vector and "
                f"{tuple(reference.shape)} in the base; give the base this "
                "vector was taken from"
            )
        base_squares[layer] += _square(reference, name)
    norms = {layer: math.sqrt(squares[layer]) for layer in _in_order(squares)}
    if base is not None:
        for layer, norm in norms.items():
            reference = math.sqrt(base_squares[layer])
            if norm > 0:  # 0 / 0 is 0
                norms[layer] = norm / reference if reference else math.inf
    return norms


def plot_cosine_matrix(
    matrix, names, path, *, title="Cosine similarity of task vectors"
):
    """Draw a cosine matrix as an annotated heat map, of two vectors as a bar.

    Arguments
    ---------
    matrix : torch.Tensor
        [N, N] with N >= 2, from `cosine_matrix`.
    names : sequence of str
        N names; another number is a `ValueError`.
    path : str or pathlib.Path
        `.png`, `.pdf` or `.svg`.
    title : str
        Above the plot.

    Returns
    -------
    pathlib.Path
        The file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "cosine.png"
    >>> plot_cosine_matrix(torch.eye(2), ["news", "music"], path).name
    'cosine.png'
    """
    matrix, names = torch.as_tensor(matrix).tolist(), list(names)
    if len(names) != len(matrix) or len(names) < 2:
        raise ValueError(
            f"the matrix is of {len(matrix)} vectors, there are {len(names)} "
            "names; give one each, of two vectors or more"
        )
    # Below the diagonal: it is 1, and the other half the same.
    below = [
        [row[c] if c <= r else math.nan for c in range(len(names) - 1)]
        for r, row in enumerate(matrix[1:])
    ]
    most = max(abs(v) for line in below for v in line if math.isfinite(v))
    # Not paler than they are, where all of them are small.
    reach = 1.0 if len(names) == 2 else max(0.1, most)
    return plot_heat_map(
        below,
        names[1:],
        names[:-1],
        path,
        title=title,
        # Opposite vectors in one colour, alike ones in another, white at 0.
        colours="RdBu_r",
        limits=(-reach, reach),
        form="{:.2f}",
        unit="cosine",
    )


def plot_layer_norms(
    norms, path, *, relative=False, title="Task vector by layer"
):
    """Draw norms by layer, of one vector or of several.

    Arguments
    ---------
    norms : dict of str: float, or dict of str: dict of str: float
        From `layer_norms`; or `{name: layer_norms(...)}`.
    relative : bool
        True labels the axis as relative to the base.
    path, title
        As in `plot_cosine_matrix`.

    Returns
    -------
    pathlib.Path
        The file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "norms.png"
    >>> plot_layer_norms({"layers.0": 0.5, "layers.1": 0.7}, path).name
    'norms.png'
    """
    # Bars of many vectors are too thin to read.
    nested = sum(hasattr(value, "keys") for value in norms.values())
    return plot_by_layer(
        norms,
        path,
        kind="line" if nested > 4 else "bar",
        title=title,
        ylabel="norm / norm of the base" if relative else "norm",
    )


def _blocks(vectors, include, exclude):
    """Yield all vectors side by side, float64 [N, at most _BLOCK]."""
    if not vectors:
        raise ValueError("no task vectors; give one or more")
    names = select(vectors[0].keys(), include, exclude)
    for i, vector in enumerate(vectors):
        if odd := sorted(set(vectors[0].keys()) ^ set(vector.keys())):
            raise ValueError(
                f"vectors 0 and {i} do not have the same parameters: "
                f"{', '.join(odd[:5])}"
                f"{f' and {len(odd) - 5} more' if len(odd) > 5 else ''} are "
                "in one only; compare vectors of one architecture"
            )
    for name in counted(vectors, names):
        tensors = [_flat(vector, name, i) for i, vector in enumerate(vectors)]
        shapes = {shape for _, shape in tensors}
        if len(shapes) > 1:
            raise ValueError(
                f"{name!r} has the shapes "
                f"{' and '.join(map(str, sorted(shapes)))}; compare vectors "
                "of one architecture"
            )
        parts = [flat.split(_BLOCK) for flat, _ in tensors]
        for blocks in zip(*parts):
            yield torch.stack([block.double() for block in blocks])


def _flat(vector, name, i):
    tensor = vector[name].detach()
    if not torch.isfinite(tensor).all():
        raise _diverged(f"vector {i}: {name!r}")
    return tensor.reshape(-1).cpu(), tuple(tensor.shape)


def _square(tensor, name):
    """Sum of squares in float64, a block at a time."""
    flat = tensor.detach().reshape(-1).cpu()
    parts = [part.to(torch.float64) for part in flat.split(_BLOCK)]
    total = math.fsum(part.dot(part).item() for part in parts)
    if not math.isfinite(total):
        raise _diverged(repr(name))
    return total


def _diverged(what):
    return ValueError(
        f"{what} holds NaN or infinity; the training run it comes from "
        "diverged, take another checkpoint"
    )


def _layer(name, depth):
    parts = name.split(".")
    if depth is None:
        depth = next(
            (i + 1 for i, p in enumerate(parts) if i and p.isdigit()),
            max(1, len(parts) - 1),
        )
    return ".".join(parts[:depth])


def _in_order(layers):
    """Sort numbers by value, other parts as they first appear.

    The order of the file is the order of the model, except that safetensors
    sorts names as text, which puts layer 10 before layer 2.
    """
    rank, keys = {}, {}
    for layer in layers:
        parts = layer.split(".")
        starts = accumulate(parts, "{}.{}".format)
        ranks = [rank.setdefault(start, len(rank)) for start in starts]
        keys[layer] = [
            (0, int(part)) if part.isdigit() else (1, at)
            for part, at in zip(parts, ranks)
        ]
    return sorted(layers, key=keys.get)
