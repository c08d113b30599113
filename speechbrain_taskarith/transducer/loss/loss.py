"""The transducer loss, in the place of SpeechBrain's."""

from speechbrain_taskarith.transducer.loss.backends import BACKENDS
from speechbrain_taskarith.transducer.loss.lattice import (
    lattice_log_prob,
    usable_transitions,
)
from speechbrain_taskarith.transducer.loss.lengths import (
    check_targets,
    checked_lengths,
    reduced,
)
from speechbrain_taskarith.transducer.loss.transitions import (
    accumulate_type,
    dense_transitions,
    next_labels,
)


def transducer_loss(
    logits,
    targets,
    input_lens,
    target_lens,
    blank_index,
    reduction="mean",
    backend="auto",
    *,
    windows=None,
    fastemit_lambda=0.0,
):
    """Negative log-probability of the targets over all alignments, in nats.

    Takes what `speechbrain.nnet.losses.transducer_loss` takes, in its order:
    in a recipe's YAML the name after `!name:` is the whole change. It runs on
    any device, and its gradient is the derivative of its value (SpeechBrain's
    reports log P divided by the number of frames, with the gradient of the
    undivided one).

    The lattice is computed in float64 (see `lattice_log_prob`). The scores
    may be log-probabilities already, as `HATJoint` and `HATOutput` give them:
    normalising those once more changes nothing. `joint_transducer_loss` does
    the same without a tensor of this size.

    Arguments
    ---------
    logits : torch.Tensor
        [B, T, U + 1, V], raw scores; float64, float32, float16 or bfloat16.
    targets : torch.Tensor
        [B, U], label indices without blanks; padding may be anything.
    input_lens : torch.Tensor
        [B], relative lengths in (0, 1] of the second dimension of `logits`.
    target_lens : torch.Tensor
        [B], relative lengths in [0, 1] of `targets`; 0 is an empty target.
    blank_index : int
        Index of the blank among the V scores.
    reduction : str
        `"mean"` over the batch, `"sum"` or `"none"`.
    backend : str
        `"auto"` and `"torch"` are ours. Where installed: `"torchaudio"`
        (float32, float16), `"numba"` (SpeechBrain's, CUDA only), `"k2"`.
    windows : torch.Tensor or None
        [B, U, 2], frames at which labels may be emitted, see
        `alignment_windows`; ours only.
    fastemit_lambda : float
        0.01 or less is usual; ours only. See `lattice_log_prob`.

    Returns
    -------
    torch.Tensor
        A scalar, or [B] for `"none"`; float32 (float64 for float64 scores).
        NaN scores in use give NaN; a target without any alignment (possible
        with `windows`, or with scores of minus infinity) gives infinity and
        the gradient 0.

    Raises
    ------
    ValueError
        A length of 0 or beyond the tensor, a target that is longer than the
        scores allow, a blank or an unknown index among the targets, a blank
        index out of range, an unknown backend or reduction.
    ImportError
        A backend that is not installed.

    Example
    -------
    >>> import torch
    >>> logits = torch.zeros(1, 2, 2, 3, requires_grad=True)
    >>> targets, whole = torch.tensor([[1]]), torch.ones(1)
    >>> loss = transducer_loss(logits, targets, whole, whole, blank_index=0)
    >>> loss.exp()  # two alignments of three symbols, each 1/3
    tensor(13.5000, grad_fn=<ExpBackward0>)
    >>> loss.backward()
    """
    if logits.dim() != 4:
        raise ValueError(
            "logits: expected [batch, frames, labels + 1, vocabulary], found "
            f"shape {tuple(logits.shape)}"
        )
    if len(logits) != len(targets):
        raise ValueError(
            f"{len(logits)} rows of logits but {len(targets)} rows of targets"
        )
    frames = checked_lengths(input_lens, logits.shape[1], "input")
    labels = checked_lengths(target_lens, targets.shape[1], "target", least=0)
    device = logits.device
    frames, labels = frames.to(device), labels.to(device)
    targets = targets.to(device)
    check_targets(
        targets, labels, blank_index, logits.shape[3], logits.shape[2] - 1
    )
    # Longer targets than scores can only be padding now.
    targets = targets[:, : logits.shape[2] - 1]
    if backend in ("auto", "torch"):
        losses = _ours(
            logits,
            targets,
            frames,
            labels,
            blank_index,
            windows,
            fastemit_lambda,
        )
    elif backend in BACKENDS:
        if windows is not None or fastemit_lambda:
            raise ValueError(
                f"backend {backend!r} has neither windows nor FastEmit; "
                "choose backend='torch'"
            )
        run = BACKENDS[backend]
        losses = run(logits, targets, frames, labels, blank_index)
    else:
        raise ValueError(
            f"backend {backend!r}: expected 'auto', 'torch' or one of "
            f"{', '.join(map(repr, BACKENDS))}"
        )
    return reduced(losses, reduction)


def _ours(logits, targets, frames, labels, blank_index, windows, fastemit):
    if targets.shape[1] < logits.shape[2] - 1:
        logits = logits[:, :, : targets.shape[1] + 1]
    usable, _ = usable_transitions(logits.shape[:3], frames, labels)
    following = next_labels(targets, labels, blank_index)
    blank, label = dense_transitions(
        logits, following, blank_index, "softmax", usable
    )
    if windows is not None:
        windows = windows[:, : targets.shape[1]]
    log_prob = lattice_log_prob(
        blank, label[:, :, :-1], frames, labels, windows, fastemit
    )
    return -log_prob.to(accumulate_type(logits.dtype))
