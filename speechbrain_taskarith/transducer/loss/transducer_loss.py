"""`transducer_loss`, in place of SpeechBrain's, and its other backends."""

import torch

from speechbrain_taskarith.transducer.loss.input_checks import (
    check_targets,
    checked_lengths,
)
from speechbrain_taskarith.transducer.loss.lattice import (
    lattice_log_prob,
    usable_transitions,
)
from speechbrain_taskarith.transducer.loss.reductions import reduced
from speechbrain_taskarith.transducer.loss.transitions import (
    accumulate_type,
    dense_transitions,
    next_labels,
)
from speechbrain_taskarith.utils.lengths import Refusals


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
    zero_infinity=False,
):
    """Negative log-probability of the targets over all alignments, in nats.

    Takes the arguments of `speechbrain.nnet.losses.transducer_loss`, in the
    same order, and runs on any device. **In a recipe's YAML, say `reduction:
    speechbrain` beside the name**: SpeechBrain's default reports the mean of
    `-log P / T` with the gradient of the **sum** of `-log P` over the batch.
    The default here is the mean of `-log P`, with the derivative of that as
    its gradient: B times less against the recipe's other losses.

    The lattice is computed in float64 (see `lattice_log_prob`). The scores
    may already be log-probabilities, as `HATJoint` and `HATOutput` return
    them: normalising them again changes nothing. `joint_transducer_loss`
    computes the same without a tensor of this size.

    Arguments
    ---------
    logits : torch.Tensor
        [B, T, U + 1, V], raw scores; float64, float32, float16 or bfloat16.
    targets : torch.Tensor
        [B, U], label indices without blanks; padding is ignored.
    input_lens : torch.Tensor
        [B], relative lengths in (0, 1] of the second dimension of `logits`.
    target_lens : torch.Tensor
        [B], relative lengths in [0, 1] of `targets`; 0 is an empty target.
    blank_index : int
        Index of the blank among the V scores.
    reduction : str
        `"mean"` over the batch, `"sum"` or `"none"`: the gradient is the
        derivative of the value. `"speechbrain"`: value and gradient as
        SpeechBrain's `"mean"` has them.
    backend : str
        `"auto"` and `"torch"` are this one. If installed: `"torchaudio"`
        (float32, float16), `"numba"` (SpeechBrain's, CUDA only), `"k2"`.
    windows : torch.Tensor or None
        [B, U, 2], frames at which labels may be emitted, see
        `alignment_windows`; not in other backends.
    fastemit_lambda : float
        0.01 or less is usual; not in other backends. See `lattice_log_prob`.
    zero_infinity : bool
        Count an utterance without any alignment as 0, as `torch.nn.CTCLoss`
        does: otherwise it makes the mean of the batch infinite.

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
        An empty batch, a length of 0 or beyond the tensor, a target that is longer than the
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
    refusals = Refusals()
    frames = checked_lengths(
        input_lens, logits.shape[:2], "input", refusals=refusals
    )
    labels = checked_lengths(target_lens, targets.shape, "target", 0, refusals)
    device, width = logits.device, logits.shape[3]
    # Where they lie: on the CPU that costs no wait.
    check_targets(
        targets, labels, blank_index, width, logits.shape[2] - 1, refusals
    )
    frames, labels = frames.to(device), labels.to(device)
    targets = targets.to(device)
    # Longer targets than scores can only be padding now.
    targets = targets[:, : logits.shape[2] - 1]
    if backend not in ("auto", "torch"):
        if windows is not None or fastemit_lambda:
            raise ValueError(
                f"backend {backend!r} has neither windows nor FastEmit; "
                "choose backend='torch'"
            )
        if backend not in BACKENDS:
            raise ValueError(
                f"backend {backend!r}: expected 'auto', 'torch' or one of "
                f"{', '.join(map(repr, BACKENDS))}"
            )
        given = (logits, targets, frames, labels, blank_index)
        try:
            losses = BACKENDS[backend](*given)
        except ImportError as error:
            raise ImportError(
                f"backend {backend!r} needs a package of that name (numba for "
                "CUDA: pip install numba-cuda; k2: one built for this version "
                "of torch); or choose backend='torch'"
            ) from error
        return reduced(losses, reduction, frames, zero_infinity)
    logits = logits[:, :, : targets.shape[1] + 1]
    if windows is not None:
        windows = windows[:, : targets.shape[1]]
    usable, _ = usable_transitions(logits.shape[:3], frames, labels, windows)
    following = next_labels(targets, labels, blank_index)
    blank, label = dense_transitions(
        logits, following, blank_index, "softmax", usable
    )
    log_prob = lattice_log_prob(
        blank, label[:, :, :-1], frames, labels, windows, fastemit_lambda
    )
    losses = -log_prob.to(accumulate_type(logits.dtype))
    return reduced(losses, reduction, frames, zero_infinity)


# Losses of other packages under one signature: options where installed, and
# oracles for tests. Logits [B, T, U + 1, V], targets [B, U], absolute lengths
# [B]; they return [B] in nats.


def _torchaudio_loss(logits, targets, frames, labels, blank_index):
    import torchaudio

    if logits.dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"backend 'torchaudio' has no {logits.dtype}; choose "
            "backend='torch' or convert the scores to float32"
        )
    if logits.numel() >= 2**31:
        raise ValueError(
            f"backend 'torchaudio' cannot index {logits.numel()} scores "
            "(2**31 and more); choose backend='torch', or "
            "joint_transducer_loss, which never holds them at once"
        )
    # It wants the tensor to end with the longest utterance and target.
    frames, labels = frames.int(), labels.int()
    max_frames, max_labels = int(frames.max()), int(labels.max())
    return torchaudio.functional.rnnt_loss(
        logits[:, :max_frames, : max_labels + 1].contiguous(),
        targets[:, :max_labels].int().contiguous(),
        frames,
        labels,
        blank=blank_index,
        reduction="none",
    )


def _numba_loss(logits, targets, frames, labels, blank_index):
    if not logits.is_cuda:
        raise ValueError(
            "backend 'numba' runs on CUDA only; choose backend='torch'"
        )
    from speechbrain.integrations.numba.transducer_loss import Transducer

    value = Transducer.apply(
        logits.float().log_softmax(-1),
        targets.int().contiguous(),
        frames.int(),
        labels.int(),
        blank_index,
        "none",
    )
    # It divides its value by the number of frames, but not its gradient.
    return value + value.detach() * (frames - 1)


def _k2_loss(logits, targets, frames, labels, blank_index):
    import k2

    none = torch.zeros_like(labels)
    return k2.rnnt_loss(
        logits=logits.float(),
        symbols=next_labels(targets, labels, blank_index)[:, :-1],
        termination_symbol=blank_index,
        boundary=torch.stack((none, none, labels, frames), 1),
        reduction="none",
    )


BACKENDS = {
    "torchaudio": _torchaudio_loss,
    "numba": _numba_loss,
    "k2": _k2_loss,
}
