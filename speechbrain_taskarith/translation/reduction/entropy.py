"""Spectral entropy of windows: how much neighbouring frames repeat."""

import torch

from speechbrain_taskarith.metrics import plot_by_layer
from speechbrain_taskarith.utils.lengths import absolute_lengths


def window_entropy(x, lens, windows=(2, 4, 8, 16, 32)):
    """Return the spectral entropy of windows of a representation.

    `-sum_i l_i ln l_i` with the eigenvalues l of `Y Y^T / w`, Y being the w
    vectors of a window at unit length: 0 where they all point the same way,
    `ln w` where they are orthogonal (its exponential is the effective rank of
    Roy and Vetterli, 2007). Frames of speech repeat themselves, so their
    entropy rises slowly with the window; that of text, and of speech that is
    well shrunk, rises at once.

    Arguments
    ---------
    x : torch.Tensor
        [B, S, d].
    lens : torch.Tensor
        [B], relative lengths.
    windows : sequence of int
        Sizes w. Windows lie side by side, whole ones only.

    Returns
    -------
    dict of int: float
        `{w: mean entropy in nats}`; sizes that no utterance fills are left
        out.

    Example
    -------
    >>> same = torch.ones(1, 8, 4)
    >>> apart = torch.eye(4).repeat(2, 1)[None]
    >>> round(abs(window_entropy(same, torch.ones(1), [4])[4]), 4)
    0.0
    >>> round(window_entropy(apart, torch.ones(1), [4])[4], 4)
    1.3863
    """
    lengths = absolute_lengths(lens, x.shape[1]).tolist()
    entropies = {}
    for size in windows:
        if size < 1:
            raise ValueError(f"window {size}: expected at least 1")
        pieces = [
            row[: length // size * size].detach().reshape(-1, size, x.shape[2])
            for row, length in zip(x, lengths)
        ]
        pieces = torch.cat(pieces).double()
        if not len(pieces):
            continue
        pieces = torch.nn.functional.normalize(pieces, dim=-1)
        gram = pieces @ pieces.transpose(1, 2) / size
        values = torch.linalg.eigvalsh(gram).clamp(min=0)
        entropies[size] = float(torch.special.entr(values).sum(1).mean())
    return entropies


def plot_window_entropy(curves, path):
    """Draw entropy by window size, for several representations.

    Arguments
    ---------
    curves : dict of str: dict of int: float
        `{name: what window_entropy returned}`.
    path : str or pathlib.Path
        `.png`, `.pdf` or `.svg`.

    Returns
    -------
    pathlib.Path
        The file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "entropy.png"
    >>> x = torch.randn(2, 32, 8)
    >>> plot_window_entropy({"frames": window_entropy(x, torch.ones(2))}, path)
    PosixPath(...entropy.png')
    """
    return plot_by_layer(
        curves,
        path,
        kind="line",
        title="Entropy of a representation",
        ylabel="entropy of a window (nats)",
        xlabel="frames in a window",
    )
