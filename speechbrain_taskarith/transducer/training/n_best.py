"""Small things around n-best lists."""

import contextlib

import torch


def n_best_tensors(sequences, padding, device):
    """Pad label sequences.

    Arguments
    ---------
    sequences : list of list of int
        At least one; empty ones are allowed.
    padding : int
        What to fill up with.
    device : torch.device
        Where.

    Returns
    -------
    tokens : torch.Tensor
        [H, U], int64.
    lengths : torch.Tensor
        [H].

    Example
    -------
    >>> tokens, lengths = n_best_tensors([[3, 4], []], 0, "cpu")
    >>> tokens.tolist(), lengths.tolist()
    ([[3, 4], [0, 0]], [2, 0])
    """
    most = max(map(len, sequences))
    rows = [list(one) + [padding] * (most - len(one)) for one in sequences]
    tokens = torch.tensor(rows, dtype=torch.long, device=device)
    lengths = torch.tensor([len(one) for one in sequences], device=device)
    return tokens.view(len(sequences), most), lengths


@contextlib.contextmanager
def evaluation_mode(module):
    """Put a module into evaluation mode, and every part back as it was.

    Arguments
    ---------
    module : torch.nn.Module
        Whose parts may be in different modes (a frozen one, say).

    Yields
    ------
    torch.nn.Module
        The same.

    Example
    -------
    >>> layer = torch.nn.Dropout(0.5)
    >>> with evaluation_mode(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, training in before:
            part.training = training
