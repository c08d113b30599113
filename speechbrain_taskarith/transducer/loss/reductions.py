"""From the losses of utterances to the one number that is trained on."""

import torch


def reduced(losses, reduction, frames, zero_infinity=False):
    """Reduce -log P [B] of utterances of `frames` [B]."""
    if zero_infinity:
        losses = losses.masked_fill(losses == float("inf"), 0.0)
    if reduction in ("mean", "batchmean"):
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    if reduction == "none":
        return losses
    if reduction == "speechbrain":
        return _SpeechBrainMean.apply(losses, frames)
    raise ValueError(
        f"reduction {reduction!r}: expected 'mean' (over the batch), 'sum', "
        "'none' or 'speechbrain' (the gradient of 'sum', a value by frames)"
    )


class _SpeechBrainMean(torch.autograd.Function):
    """The mean of losses by their frames, with the gradient of their sum."""

    @staticmethod
    def forward(ctx, losses, frames):
        ctx.shape = losses.shape
        return (losses / frames).mean()

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(ctx.shape), None
