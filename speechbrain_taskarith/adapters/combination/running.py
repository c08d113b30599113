"""Scores averaged over all frames so far, of utterances, blocks and streams."""

import contextvars

import torch
from torch.nn import functional as F

#: The `Stretch` that is being computed; None where a call has whole utterances.
STRETCH = contextvars.ContextVar("stretch of an utterance", default=None)


class Stretch:
    """Which stretch of its utterances a call has.

    `before` is the sum of the scores [B, 1, N] and the number of the frames
    before it, None at the beginning; `after` will be that of the next one. An
    utterance has `blocks` rows that lie side by side; they follow one another
    every `step` frames (None: all of a row) and then have copies of the next
    ones' frames.
    """

    def __init__(self, before=None, blocks=1, step=None):
        # Not changed, so that a checkpointed pass can be computed again.
        self.before, self.blocks, self.step = before, blocks, step
        self.after = None


def running_mean(scores, stretch=None):
    """Average scores [..., T, N] over each frame and all before it."""
    frames = scores.shape[-2]
    count = torch.arange(
        1, frames + 1, dtype=scores.dtype, device=scores.device
    ).unsqueeze(-1)
    total = scores.cumsum(-2)
    if stretch is None:
        return total / count
    before, number = stretch.before or (0.0, 0)
    blocks = stretch.blocks
    step = frames if stretch.step is None else stretch.step
    sums = scores[..., :step, :].sum(-2, keepdim=True)
    earlier, first = before, number
    if blocks > 1:
        sums = sums.unflatten(0, (-1, blocks))
        # Of the blocks in front of each one, and the number of their frames.
        earlier = F.pad(sums.cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0))
        earlier = earlier + (before.unsqueeze(1) if number else 0.0)
        first = number + step * torch.arange(blocks, device=scores.device)
        first = first.repeat(len(sums)).view(-1, 1, 1)
        earlier, sums = earlier.flatten(0, 1), sums.sum(1)
    stretch.after = (before + sums).detach(), number + blocks * step
    return (total + earlier) / (count + first)
