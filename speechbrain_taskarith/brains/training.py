"""What a training needs to know: a fast precision, and its length."""

import torch


def fast_precision(device=None):
    """Return the fastest precision that trains safely on a device.

    bfloat16 where the device calculates in it (about twice as fast, with
    the range of float32, so that no loss scaling is needed), else float32.
    float16 is never chosen.

    Arguments
    ---------
    device : str, torch.device or None
        Where the models are, e.g. `"cpu"`, `"cuda:1"`; None: a GPU if there
        is one, as SpeechBrain chooses.

    Returns
    -------
    str
        `"bf16"` or `"fp32"`, for SpeechBrain's `run_opts["precision"]`.

    Example
    -------
    >>> fast_precision("cpu") in ("bf16", "fp32")
    True
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        native = _cpu_has_bfloat16()
    elif device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = False
    return "bf16" if native else "fp32"


def _cpu_has_bfloat16():
    """Ask for bfloat16 instructions, and oneDNN, which uses them."""
    if not torch.backends.mkldnn.is_available():
        return False
    # The public way, of newer versions of torch.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") == "x86_64":
        return any(capabilities.get(n) for n in ("avx512_bf16", "amx_bf16"))
    # Elsewhere a private name is all there is; should it go, the answer is
    # no, which costs time and nothing else.
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


class WholeUpdates:
    """Of a Brain: save only after whole updates.

    A checkpoint holds no gradients: what a resumed run accumulates would lack
    those of the batches before.
    """

    def _should_save_intra_epoch_ckpt(self, *when):
        whole = self.step % self.grad_accumulation_factor == 0
        return super()._should_save_intra_epoch_ckpt(*when) and whole


def optimizer_steps(brain, train_loader, epochs):
    """Return how many steps the optimizer takes in `brain.fit`.

    A schedule that ends with the training needs to know. Under DDP each
    process has a part of the batches; with gradient accumulation several
    batches make a step, and those left at the end of an epoch make none.

    Arguments
    ---------
    brain : sb.Brain
        Its `grad_accumulation_factor` counts.
    train_loader : DataLoader
        What `fit` gets: of this process, as `brain.make_dataloader` or
        `shard_loader` makes it.
    epochs : int
        As many as `fit` trains for.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        An epoch has fewer batches than make a step: nothing would be learned.

    Example
    -------
    >>> import speechbrain as sb, torch
    >>> brain = sb.Brain(run_opts={"grad_accumulation_factor": 2})
    >>> loader = torch.utils.data.DataLoader(range(9), batch_size=2)
    >>> optimizer_steps(brain, loader, epochs=3)
    6
    """
    batches, factor = len(train_loader), brain.grad_accumulation_factor
    if batches < factor:
        raise ValueError(
            f"grad_accumulation_factor: {factor}, but an epoch has {batches} "
            "batches in each process, so that the optimizer would never take "
            "a step. Lower it, or the batch size"
        )
    return batches // factor * epochs
