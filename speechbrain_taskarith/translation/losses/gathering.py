"""Rows of all processes together, with gradient."""

import torch


def processes():
    """Return how many processes train together.

    Returns
    -------
    int
        1 without `torch.distributed`.

    Example
    -------
    >>> processes()
    1
    """
    there = torch.distributed.is_available()
    if there and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def gather_rows(x):
    """Put the rows of all processes together, in the order of their ranks.

    Arguments
    ---------
    x : torch.Tensor
        [B, ...]; B may differ between processes, the rest may not.

    Returns
    -------
    rows : torch.Tensor
        [sum of B, ...]. The gradient of all processes' losses comes back.
    first : int
        Where this process's rows begin.

    Example
    -------
    >>> gather_rows(torch.ones(2, 3))[0].shape
    torch.Size([2, 3])
    """
    if processes() == 1:
        return x, 0
    sizes = [None] * processes()
    torch.distributed.all_gather_object(sizes, len(x))
    first = sum(sizes[: torch.distributed.get_rank()])
    return _Gather.apply(x, sizes, first), first


def average_(tensors):
    """Average tensors over processes, in place and in one message.

    Arguments
    ---------
    tensors : list of torch.Tensor
        Of one type and device; the same shapes on all processes.

    Example
    -------
    >>> average_([torch.ones(2)])
    """
    if processes() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= processes()
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts):
        tensor.copy_(part.view_as(tensor))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, first):
        ctx.rows = slice(first, first + len(x))
        # Collectives want equal shapes.
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(found, padded)
        return torch.cat([part[:n] for part, n in zip(found, sizes)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad[ctx.rows], None, None
