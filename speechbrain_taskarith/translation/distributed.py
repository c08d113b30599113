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


def names_of_all(names):
    """Return the names that any process has, in one order on all of them."""
    found = [list(names)]
    if process_count() > 1:
        found = [None] * process_count()
        torch.distributed.all_gather_object(found, list(names))
    return list(dict.fromkeys(name for some in found for name in some))


def shares_of(flags, device):
    """Return for each flag the share of the processes in which it is set."""
    shares = torch.tensor(flags, dtype=torch.float32)
    if process_count() > 1:
        shares = shares.to(device)
        average_([shares])
    return shares.tolist()


def gather_rows(x):
    """Return the rows of all processes by rank, and where this one's begin.

    The third value is how many processes have any; all have to call it. Where
    sizes differ, other axes than the first are padded with 0 to the longest.
    The gradients of all processes' losses come back to `x`.
    """
    if process_count() == 1:
        return x, 0, 1
    from torch.distributed.nn.functional import all_gather

    found = [None] * process_count()
    torch.distributed.all_gather_object(found, (tuple(x.shape), x.dtype))
    sizes = [size for size, _ in found]
    dtype = next((kind for size, kind in found if size[0]), x.dtype)
    # Collectives want equal shapes and types.
    padded = x.new_zeros([max(axis) for axis in zip(*sizes)], dtype=dtype)
    padded[tuple(map(slice, x.shape))] = x
    rows = [part[: size[0]] for part, size in zip(all_gather(padded), sizes)]
    counts = [size[0] for size in sizes]
    first = sum(counts[: process_rank()])
    return torch.cat(rows), first, sum(count > 0 for count in counts)


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
