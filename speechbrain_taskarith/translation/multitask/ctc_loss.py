"""CTC on logits: the loss of torch, on the labels that an utterance has."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from speechbrain_taskarith.utils.lengths import padding_mask


def ctc_loss(logits, labels, frames, words, blank_index, on_host=None):
    """Return `-log P(labels | logits)` of every utterance, 0 without a path.

    As `torch.nn.functional.ctc_loss` of the log-probabilities, which reads and
    writes the whole vocabulary several times, where an utterance has a few of
    its labels. Here these are taken out first, and the gradient `P(v) - (share
    of paths in v)` is written once.

    Arguments
    ---------
    logits : torch.Tensor
        [B, T, V], float32 or float64.
    labels : torch.Tensor
        [B, U], integers.
    frames, words : torch.Tensor
        [B], lengths of both.
    blank_index : int
        The blank.
    on_host : tuple of torch.Tensor, optional
        `frames` and `words` on the host, which then waits for no device.

    Returns
    -------
    torch.Tensor
        [B], nats.

    Example
    -------
    >>> logits, length = torch.zeros(1, 2, 4), torch.tensor([2])
    >>> ctc_loss(logits, torch.tensor([[3]]), length, length // 2, 0)
    tensor([1.6740])
    """
    counts = (frames, words) if on_host is None else on_host
    counts = [tuple(count.tolist()) for count in counts]
    return _CTC.apply(logits, labels, frames, words, blank_index, counts)


class _CTC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, frames, words, blank_index, counts):
        (batch, size), steps = labels.shape, logits.shape[1]
        outside = padding_mask(words, size)
        labels = labels.masked_fill(outside, blank_index)
        blanks = labels.new_full((batch, 1), blank_index)
        classes = torch.cat([blanks, labels], 1)
        # Equal labels are one class, their first: CTC parts them by a blank.
        equal = classes[:, None] == classes[:, :, None]
        own = equal.byte().argmax(2)[:, 1:]
        classes = classes[:, None].expand(-1, steps, -1)
        log_probs = logits.log_softmax(2)
        scores = log_probs.gather(2, classes)
        with torch.enable_grad():
            scores.requires_grad_()
            losses = F.ctc_loss(
                scores.transpose(0, 1),
                own,
                *counts,
                reduction="none",
            )
            (grad,) = torch.autograd.grad(losses.sum(), scores)
        losses, scores = losses.detach(), scores.detach()
        no_path = losses.isinf()
        idle = padding_mask(frames, steps) | no_path[:, None]
        # torch's gradient is P - share.
        share = (scores.exp() - grad).masked_fill(idle[..., None], 0.0)
        ctx.save_for_backward(log_probs, classes, share, idle)
        return losses.masked_fill(no_path, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        log_probs, classes, share, idle = ctx.saved_tensors
        grad = grad[:, None, None]
        out = log_probs.exp().mul_(grad)
        # Filled, not multiplied: logits may be NaN in the padding.
        out.masked_fill_(idle[..., None], 0.0)
        out.scatter_add_(2, classes, -grad * share)
        return out, None, None, None, None, None
