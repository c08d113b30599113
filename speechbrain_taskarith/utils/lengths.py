"""Lengths relative and absolute, their refusal, and padding that nobody reads.

Lengths are [B]; relative ones are SpeechBrain's, in (0, 1], of a padded
tensor of `size` steps.
"""

import os
import threading

import torch


class Refusals:
    """What makes a batch bad, asked of the device once.

    On the CPU `add` refuses at once. For tensors on a device `settle` waits for
    the answers, in one transfer, and then refuses by name; with `wait=False`
    the device asserts them itself, on CUDA, and the host goes on.

    Example
    -------
    >>> refusals = Refusals()
    >>> lengths = torch.tensor([3, 0])
    >>> refusals.add(lengths < 1, lambda: "row 1 is empty", "empty rows")
    Traceback (most recent call last):
        ...
    ValueError: row 1 is empty
    """

    def __init__(self):
        self._flags, self._reasons = [], []

    def add(self, bad, explain, what):
        """Refuse where `bad` [...] holds, by the message of `explain()`.

        `what` is wrong is for an assertion, which knows no rows.
        """
        if bad.device.type == "cpu":
            if bool(bad.any()):
                raise ValueError(explain())
        else:
            self._flags.append(bad.any())
            self._reasons.append((explain, what))

    def settle(self, wait=True):
        """Refuse the first that is bad."""
        flags, reasons = self._flags, self._reasons
        self._flags, self._reasons = [], []
        if not flags:
            return
        # Who debugs with this wants the names, and waits anyway.
        blocking = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        if not wait and flags[0].device.type == "cuda" and not blocking:
            for flag, (_, what) in zip(flags, reasons):
                torch._assert_async(
                    ~flag, f"{what}; CUDA_LAUNCH_BLOCKING=1 names the row"
                )
            return
        for bad, (explain, _) in zip(torch.stack(flags).tolist(), reasons):
            if bad:
                raise ValueError(explain())


def absolute_lengths(lens, size):
    """Return `round(lens * size)`, int64, without a device synchronisation.

    Not checked: NaN becomes the least integer there is.

    >>> absolute_lengths(torch.tensor([1.0, 0.5]), 7).tolist()
    [7, 4]
    """
    # In float64: 0.3 in float32 times a long tensor may round elsewhere.
    return (lens.double() * size).round().long()


def frame_counts(lens, size):
    """Return absolute lengths; a short utterance keeps one frame.

    A length of 0 stays 0, which is an error elsewhere.

    >>> frame_counts(torch.tensor([1.0, 0.01, 0.0]), 7).tolist()
    [7, 1, 0]
    """
    counts = absolute_lengths(lens, size)
    return torch.where(lens > 0, counts.clamp(min=1), counts)


def relative_lengths(lengths, size):
    """Return absolute lengths as relative ones, float32.

    >>> relative_lengths(torch.tensor([4, 2]), 4).tolist()
    [1.0, 0.5]
    """
    return lengths.float() / max(size, 1)


def padding_mask(lengths, size):
    """Return [B, size], True at padding, from absolute lengths.

    >>> padding_mask(torch.tensor([2, 1]), 2).tolist()
    [[False, False], [False, True]]
    """
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


def without_padding(x, lens):
    """Return [B, T, ...] with padding set to 0, of relative lengths [B].

    >>> x = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    >>> without_padding(x, torch.tensor([1.0, 0.5]))
    tensor([[1., 2.],
            [3., 0.]])
    """
    if lens is None:
        return x
    # Of a short utterance a frame stays, whatever is rounded.
    frames = absolute_lengths(lens.to(x.device), x.shape[1]).clamp(min=1)
    padding = padding_mask(frames, x.shape[1])
    return x.masked_fill(padding.view(*padding.shape, *[1] * (x.dim() - 2)), 0)


def ignore_padding(encoder):
    """Keep padding away from the convolutions of a module's encoder.

    SpeechBrain's Conformer masks what they return, not what they read, and its
    Branchformer masks nothing: the last frames of an utterance depend on the
    batch that it is in. Now they read what stands beyond the end of a single
    utterance: 0, or its own frames mirrored. Parameters and their names stay;
    a second call does nothing. Returns the module.
    """
    from speechbrain.lobes.models.transformer.Branchformer import (
        BranchformerEncoderLayer,
    )
    from speechbrain.lobes.models.transformer.Conformer import (
        ConvolutionModule,
    )

    for part in encoder.modules():
        if any(isinstance(h, _Enter) for h in part._forward_pre_hooks.values()):
            continue
        masks = {}
        if isinstance(part, ConvolutionModule):
            enter = _Enter(masks, 1, "mask")
            part.bottleneck.register_forward_hook(_Clear(masks))
        elif isinstance(part, BranchformerEncoderLayer):
            enter = _Enter(masks, 2, "src_key_padding_mask")
            conv = part.convolution_branch.csgu.conv
            conv.register_forward_pre_hook(_Mirror(masks))
            conv.register_forward_hook(_Crop(masks))
        else:
            continue
        part.register_forward_pre_hook(enter, with_kwargs=True)
    return encoder


# Objects, not closures: a deep copy of the module gets its own.


class _Enter:
    """Note the mask, True at padding, that a module is called with."""

    def __init__(self, masks, place, name):
        self.masks = masks  # by thread: several may share a model
        self.place, self.name = place, name

    def __call__(self, module, args, kwargs):
        here = len(args) > self.place
        mask = args[self.place] if here else kwargs.get(self.name)
        self.masks[_thread()] = mask


class _Clear:
    """Set padding to 0 in the input [B, C, T] of the depthwise convolution."""

    def __init__(self, masks):
        self.masks = masks

    def __call__(self, module, args, out):
        mask = self.masks.get(_thread())
        # Not kept: it would lie in copies and on the device.
        self.masks[_thread()] = None
        return None if mask is None else out.masked_fill(mask.mT, 0.0)


class _Mirror:
    """Mirror every row [T, C] of a convolution's input at its own end.

    The convolution itself mirrors where the tensor ends. The row is longer
    then, by as many frames as the kernel reads; `_Crop` drops them.
    """

    def __init__(self, masks):
        self.masks = masks

    def __call__(self, conv, args):
        mask = self.masks.get(_thread())
        if mask is None:
            return None
        x = args[0]
        last = (~mask).sum(1, keepdim=True) - 1
        frames = torch.arange(
            x.shape[1] + conv.kernel_size // 2, device=x.device
        )
        index = last - (frames - last).abs()
        index = index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2])
        return (x.gather(1, index),)


class _Crop:
    """Drop the frames that `_Mirror` added."""

    def __init__(self, masks):
        self.masks = masks

    def __call__(self, conv, args, out):
        mask = self.masks.get(_thread())
        self.masks[_thread()] = None
        return None if mask is None else out[:, : mask.shape[1]]


def _thread():
    # What is compiled runs in one.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
