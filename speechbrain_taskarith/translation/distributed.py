"""Several processes that train together: gathered rows and averages."""

import torch


def process_count():
    """Return how many processes train together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def process_rank():
    """Return which of them this process is, from 0."""
    return torch.distributed.get_rank() if process_count() > 1 else 0


def gather_rows(x):
    """Return the rows of all processes by rank, and where this one's begin.

    Batches may differ in size, the other axes may not. The gradients of all
    processes' losses come back to `x`.
    """
    if process_count() == 1:
        return x, 0
    sizes = [None] * process_count()
    torch.distributed.all_gather_object(sizes, len(x))
    first = sum(sizes[: process_rank()])
    return _Gather.apply(x, sizes, first), first


def average_(tensors):
    """Average tensors of one type over processes, in place, in one message."""
    if process_count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= process_count()
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
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded)
        return torch.cat([part[:n] for part, n in zip(gathered, sizes)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad[ctx.rows], None, None
