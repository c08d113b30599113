"""The transducer losses of other packages, under one signature.

They are options where installed, and oracles for tests. All return the
negative log-probability of every utterance in nats.
"""

import torch

from speechbrain_taskarith.utils.lengths import padding_mask


def torchaudio_loss(logits, targets, frames, labels, blank_index):
    """Run `torchaudio.functional.rnnt_loss`.

    Arguments
    ---------
    logits : torch.Tensor
        [B, T, U + 1, V], float32 or float16, fewer than 2**31 elements.
    targets : torch.Tensor
        [B, U].
    frames, labels : torch.Tensor
        [B], absolute lengths.
    blank_index : int
        The blank.

    Returns
    -------
    torch.Tensor
        [B].
    """
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
    time, most = int(frames.max()), int(labels.max())
    return torchaudio.functional.rnnt_loss(
        logits[:, :time, : most + 1].contiguous(),
        targets[:, :most].int().contiguous(),
        frames,
        labels,
        blank=blank_index,
        reduction="none",
    )


def numba_loss(logits, targets, frames, labels, blank_index):
    """Run SpeechBrain's kernels; see `torchaudio_loss` for the arguments.

    Arguments
    ---------
    logits, targets, frames, labels, blank_index
        As `torchaudio_loss`, on a CUDA device.

    Returns
    -------
    torch.Tensor
        [B].
    """
    if not logits.is_cuda:
        raise ValueError(
            "backend 'numba' runs on CUDA only; choose backend='torch'"
        )
    try:
        from speechbrain.integrations.numba.transducer_loss import Transducer
    except ImportError as error:
        raise ImportError(
            "backend 'numba' needs the package 'numba' with CUDA: pip install "
            "numba-cuda; or choose backend='torch'"
        ) from error
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


def k2_loss(logits, targets, frames, labels, blank_index):
    """Run `k2.rnnt_loss`; see `torchaudio_loss` for the arguments.

    Arguments
    ---------
    logits, targets, frames, labels, blank_index
        As `torchaudio_loss`.

    Returns
    -------
    torch.Tensor
        [B].
    """
    try:
        import k2
    except ImportError as error:
        raise ImportError(
            "backend 'k2' needs the package 'k2', built for this version of "
            "torch; or choose backend='torch'"
        ) from error
    boundary = torch.zeros(len(logits), 4, dtype=torch.long)
    boundary[:, 2], boundary[:, 3] = labels.cpu(), frames.cpu()
    other = 1 if blank_index == 0 else 0
    used = ~padding_mask(labels, targets.shape[1])
    return k2.rnnt_loss(
        logits=logits.float(),
        symbols=torch.where(used, targets.long(), other),
        termination_symbol=blank_index,
        boundary=boundary.to(logits.device),
        reduction="none",
    )


BACKENDS = {
    "torchaudio": torchaudio_loss,
    "numba": numba_loss,
    "k2": k2_loss,
}
