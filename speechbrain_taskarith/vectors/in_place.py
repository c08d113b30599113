"""Writing `base + scale * delta` into a tensor, in as few passes as it takes."""

import torch

# Elements worked on at a time: the piece of scaled vector stays in the cache,
# so that memory is passed three times (two tensors read, one written). A GPU
# wants larger pieces, for fewer launches.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 22}


@torch.no_grad()
def edit_into(tensor, base, delta, scale):
    """Write `base + scale * delta` into a tensor.

    The product is rounded before it is added, as `TaskVector.apply` does,
    so that both give the same bytes; a fused multiply-add would give other
    last bits than the merge engine, and on other machines.

    Arguments
    ---------
    tensor : torch.Tensor
        Is overwritten.
    base : torch.Tensor
        Of the tensor's dtype and shape, on its device; may be the tensor
        itself.
    delta : torch.Tensor
        float32, the same shape and device.
    scale : float
        0 copies the base's bytes.

    Example
    -------
    >>> weight = torch.ones(2)
    >>> edit_into(weight, weight, torch.tensor([2.0, 0.0]), 0.5)
    >>> weight
    tensor([2., 1.])
    """
    if scale == 0:
        tensor.copy_(base)
        return
    if not tensor.is_contiguous():
        tensor.copy_(base.float() + delta * scale)
        return
    chunk = _CHUNK.get(tensor.device.type, _CHUNK["cuda"])
    target, source, step = tensor.view(-1), base.reshape(-1), delta.reshape(-1)
    # Not torch's default type, which a program may have changed.
    scratch = torch.empty(
        min(chunk, len(step)), dtype=torch.float32, device=tensor.device
    )
    for start in range(0, len(step), chunk):
        part = slice(start, start + chunk)
        scaled = scratch[: len(step[part])]
        torch.mul(step[part], scale, out=scaled)
        if target.dtype == torch.float32:
            torch.add(source[part], scaled, out=target[part])
        else:
            target[part] = scaled.add_(source[part].float())
