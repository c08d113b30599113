"""The transducer lattice: log P(y|x) out of blank and label transitions.

Node (t, u) means: t frames are left behind, u labels are out. A blank leads
to (t + 1, u), label u + 1 to (t, u + 1). Everything that the vocabulary has to
do with lies in two small matrices, so that the recursion (Graves 2012, arXiv
1211.3711, equations 16 to 18) runs in float64 at no cost, an anti-diagonal
t + u at a time: nodes of one diagonal do not depend on one another.
"""

import torch
from torch.nn.functional import pad

_NEVER = float("-inf")


def lattice_log_prob(
    blank, label, frames, labels, windows=None, fastemit_lambda=0.0
):
    """Sum the probability of all alignments of every sequence.

    The recursion over nodes, with `alpha(0, 0) = 0`::

        alpha(t, u) = logaddexp(alpha(t - 1, u) + blank(t - 1, u),
                                alpha(t, u - 1) + label(t, u - 1))
        log P = alpha(T - 1, U) + blank(T - 1, U)

    The gradient is analytic: the derivative of log P by a transition's
    log-probability is the probability that an alignment takes it.

    Arguments
    ---------
    blank : torch.Tensor
        [B, T, U + 1], log-probability of a blank at every node; float32 or
        float64. What lies beyond `frames` and `labels` is not read.
    label : torch.Tensor
        [B, T, U], log-probability of label u + 1 at node (t, u).
    frames, labels : torch.Tensor
        [B], number of frames, 1 to T, and of labels, 0 to U.
    windows : torch.Tensor or None
        [B, U, 2], first and last frame (counted from 0, both included) at
        which a label may be emitted: alignment-restricted RNN-T (Mahadeokar
        2020, arXiv 2011.03072). See `alignment_windows`.
    fastemit_lambda : float
        FastEmit (Yu 2021, arXiv 2010.11148): gradients by label transitions
        are multiplied by `1 + fastemit_lambda`. The value stays log P, so
        with other values than 0 the gradient is not the value's derivative.

    Returns
    -------
    torch.Tensor
        [B], float64. Minus infinity, with a gradient of 0, where no
        alignment is possible; NaN where a transition in use is NaN.

    Example
    -------
    >>> blank = torch.full((1, 2, 2), 0.5).log()
    >>> label = torch.full((1, 2, 1), 0.5).log()
    >>> one = torch.ones(1, dtype=torch.long)
    >>> lattice_log_prob(blank, label, 2 * one, one).exp()  # two paths of 1/8
    tensor([0.2500], dtype=torch.float64)
    """
    usable_blank, usable_label = usable_transitions(
        blank.shape, frames, labels, windows
    )
    return _Lattice.apply(
        blank,
        label,
        usable_blank,
        usable_label,
        frames,
        labels,
        fastemit_lambda,
    )


def usable_transitions(shape, frames, labels, windows=None):
    """Mark the transitions that an alignment can take.

    Of a `shape` (B, T, U + 1); returns bool, blanks [B, T, U + 1] and labels
    [B, T, U].
    """
    t = torch.arange(shape[1], device=frames.device)[None, :, None]
    u = torch.arange(shape[2], device=frames.device)[None, None, :]
    inside = t < frames[:, None, None]
    blank = inside & (u <= labels[:, None, None])
    label = inside & (u[..., :-1] < labels[:, None, None])
    if windows is not None:
        windows = windows.to(frames.device)
        label = label & (t >= windows[:, None, :, 0])
        label = label & (t <= windows[:, None, :, 1])
        # What no label leads to, and what the next one is too late for.
        first, last = windows.unbind(-1)
        early = t < pad(first, (1, 0), value=0)[:, None]
        late = t > pad(last, (0, 1), value=0)[:, None]
        blank = blank & ~early & ~(late & (u < labels[:, None, None]))
    return blank, label


def alignment_windows(label_frames, left, right):
    """Return the frames at which alignment-restricted RNN-T may emit.

    Arguments
    ---------
    label_frames : torch.Tensor
        [B, U], the frame (counted from 0, after subsampling) at which a
        reference alignment ends each label.
    left, right : int
        How many frames earlier and later it may be emitted.

    Returns
    -------
    torch.Tensor
        [B, U, 2], first and last frame, for the `windows` of the losses.

    Raises
    ------
    ValueError
        A negative `left` or `right`.

    Example
    -------
    >>> alignment_windows(torch.tensor([[3, 7]]), left=1, right=2).tolist()
    [[[2, 5], [6, 9]]]
    """
    if left < 0 or right < 0:
        raise ValueError(
            f"left={left}, right={right}: expected numbers of frames, 0 or more"
        )
    return torch.stack((label_frames - left, label_frames + right), dim=-1)


class _Lattice(torch.autograd.Function):
    """log P of the lattice, with occupation probabilities as gradient."""

    @staticmethod
    def forward(
        ctx, blank, label, usable_blank, usable_label, frames, labels, fastemit
    ):
        skew_blank = _skew(blank, usable_blank, blank.shape[2])
        skew_label = _skew(label, usable_label, blank.shape[2])
        alpha = _alphas(skew_blank, skew_label)
        rows = torch.arange(len(frames), device=frames.device)
        last = (frames + labels - 1, rows, labels)
        log_prob = alpha[last] + skew_blank[last]
        ctx.save_for_backward(
            alpha, skew_blank, skew_label, log_prob, frames, labels
        )
        ctx.fastemit = fastemit
        ctx.shapes, ctx.dtype = (blank.shape, label.shape), blank.dtype
        return log_prob

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        alpha, skew_blank, skew_label, log_prob, frames, labels = (
            ctx.saved_tensors
        )
        beta = _betas(skew_blank, skew_label, frames, labels)
        # No alignment: all terms below are 0, and inf - inf must not be.
        through = alpha - torch.where(
            log_prob == _NEVER, torch.zeros_like(log_prob), log_prob
        ).unsqueeze(-1)
        grad = grad.unsqueeze(-1)
        by_blank = (through + skew_blank + beta[1:]).exp_() * grad
        by_label = through[..., :-1] + skew_label + beta[1:, :, 1:]
        by_label = by_label.exp_() * (grad * (1.0 + ctx.fastemit))
        return (
            _unskew(by_blank, ctx.shapes[0]).to(ctx.dtype),
            _unskew(by_label, ctx.shapes[1]).to(ctx.dtype),
            *(None,) * 5,
        )


def _skew(values, usable, width):
    """Turn [B, T, W] into [T + U, B, W] with diagonals t + u in front."""
    batch, time, own = values.shape
    skewed = values.new_full(
        (time + width - 1, batch, own), _NEVER, dtype=torch.float64
    )
    # The step from (t, u) to (t, u + 1) leads to the next diagonal.
    step = batch * own
    view = skewed.as_strided((batch, time, own), (own, step, step + 1))
    view.copy_(torch.where(usable, values.detach().double(), _NEVER))
    return skewed


def _unskew(skewed, shape):
    """Turn diagonals back into [B, T, W]."""
    batch, _, own = shape
    step = batch * own
    skewed = skewed.contiguous()
    return skewed.as_strided(shape, (own, step, step + 1))


# The two loops over diagonals. A kernel for one device replaces these two and
# nothing else; they stay as its oracle.


def _alphas(blank, label):
    """Return log-probabilities of reaching each node, [T + U, B, U + 1]."""
    alpha = torch.full_like(blank, _NEVER)
    alpha[0, :, 0] = 0.0
    stay, move = torch.empty_like(blank[0]), torch.empty_like(label[0])
    for n in range(1, len(blank)):
        torch.add(alpha[n - 1], blank[n - 1], out=stay)
        torch.add(alpha[n - 1, :, :-1], label[n - 1], out=move)
        alpha[n, :, 0] = stay[:, 0]
        alpha[n, :, 1:] = torch.logaddexp(stay[:, 1:], move)
    return alpha


def _betas(blank, label, frames, labels):
    """Return log-probabilities of ending from each node.

    [T + U + 1, B, U + 1]: the end of an utterance is the node behind its
    last blank, one diagonal on.
    """
    count, batch, width = blank.shape
    beta = blank.new_full((count + 1, batch, width), _NEVER)
    rows = torch.arange(batch, device=frames.device)
    beta[frames + labels, rows, labels] = 0.0
    stay, move = torch.empty_like(blank[0]), torch.empty_like(label[0])
    for n in range(count - 1, -1, -1):
        torch.add(blank[n], beta[n + 1], out=stay)
        torch.add(label[n], beta[n + 1, :, 1:], out=move)
        stay[:, :-1] = torch.logaddexp(stay[:, :-1], move)
        # Where an utterance ends nothing arrives: both are -inf but one.
        torch.maximum(beta[n], stay, out=beta[n])
    return beta
