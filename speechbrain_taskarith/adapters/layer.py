"""What goes into an encoder: adapters behind its layers, and a guard."""

import dataclasses
import functools
import inspect
import logging

import torch

from speechbrain_taskarith.adapters.bank import COMBINED
from speechbrain_taskarith.adapters.combination.averaging import (
    AdapterMean,
    AdapterWeightedMean,
)
from speechbrain_taskarith.adapters.combination.base import Combination
from speechbrain_taskarith.adapters.combination.fusion import AudioAdapterFusion

logger = logging.getLogger(__name__)

#: The name of the handle among the encoder's children.
CHILD = "task_adapters"

#: The combinations that have a short name.
KINDS = {
    "mean": AdapterMean,
    "weighted_mean": AdapterWeightedMean,
    "fusion": AudioAdapterFusion,
}


def make_combination(combination, bank, names=None):
    """Return a fresh combination of a bank's adapters, or None.

    `combination` is what `insert_adapters` takes; `names` None combines all
    adapters, or those of the template.
    """
    if combination is None:
        return None
    if isinstance(combination, str):
        combination = KINDS.get(combination, combination)
    if isinstance(combination, Combination):
        made = combination.for_bank(bank, names)
    elif callable(combination) and names is None:
        # One of the user's own need not take names.
        made = combination(bank)
    elif callable(combination):
        made = combination(bank, names=names)
    else:
        raise ValueError(
            f"combination is {combination!r}, expected one of "
            f"{', '.join(KINDS)}, an instance, or None"
        )
    if made is not None:
        like = next(bank.parameters())
        made.to(like).requires_grad_(False).train(bank.training)
    return made


@dataclasses.dataclass(eq=False)
class Route:
    """What is in use, shared by all layers of an encoder."""

    #: None, an adapter's name, `COMBINED`, or positions [B] (-1: the base).
    choice: object = None
    has_warned: bool = False
    #: The next batch's tasks, where a loop says them.
    tasks: object = None
    #: What looks on, a `Watch`, or None.
    watch: object = None
    _moved: dict = dataclasses.field(default_factory=dict)

    def positions(self, device):
        """Return the positions on a device, moved there once."""
        choice, moved = self._moved.get(device, (None, None))
        if choice is not self.choice:
            moved = self.choice.to(device)
            self._moved[device] = (self.choice, moved)
        return moved


def utterance_positions(choice, bank):
    """Return the positions [B] in a bank of each utterance's adapter.

    `choice` has names, None for the base, or is a tensor of positions.
    """
    if not isinstance(choice, torch.Tensor):
        choice = list(choice)
        bank.require(*(name for name in choice if name is not None))
        return torch.tensor(
            [-1 if name is None else bank.names.index(name) for name in choice],
            dtype=torch.long,
        )
    whole = not (choice.is_floating_point() or choice.is_complex())
    if choice.dim() != 1 or not whole or choice.dtype == torch.bool:
        raise ValueError(
            f"utterances' adapters are a {choice.dtype} tensor of shape "
            f"{tuple(choice.shape)}; expected whole numbers [B]"
        )
    if choice.numel():
        lowest, highest = int(choice.min()), int(choice.max())
        if not -1 <= lowest <= highest < len(bank):
            raise ValueError(
                f"positions of adapters go from {lowest} to {highest}; "
                f"expected -1 (the base) to {len(bank) - 1}"
            )
    return choice.to(torch.long)


class LayerAdapters(torch.nn.Module):
    """One layer's bank and combination, and the hook that adds them to it."""

    def __init__(self, name, layer, bank, combination, route):
        super().__init__()
        self.bank, self.combination = bank, combination
        self.name, self._route = name, route
        # Not by setattr, which would make it a submodule.
        self.__dict__["_layer"] = layer
        self._hook_handle = layer.register_forward_hook(self._forward_hook)
        # SpeechBrain's streaming calls this method and no hook.
        if hasattr(layer, "forward_streaming"):
            method = layer.forward_streaming
            # A partial, which copies can copy, unlike a closure.
            stream = functools.partial(self._forward_streaming, method)
            stream.__signature__ = inspect.signature(method)
            layer.forward_streaming = stream

    def detach(self):
        """Restore the layer as it was."""
        self._hook_handle.remove()
        vars(self._layer).pop("forward_streaming", None)

    def _forward_streaming(self, method, *args, **kwargs):
        return self._forward_hook(self._layer, args, method(*args, **kwargs))

    def _forward_hook(self, layer, inputs, output):
        """Add the adapters to what the layer returns, a tensor or a tuple."""
        watch = self._route.watch
        if watch is not None:
            watch.before(self)
        if self._route.choice is None:
            return output  # the very object that the base returned
        x = output
        if isinstance(output, (tuple, list)) and output:
            x = output[0]
        width = self.bank.d_model
        if not isinstance(x, torch.Tensor) or x.shape[-1] != width:
            what = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
            raise ValueError(
                f"layer {self.name!r} returns {what}, expected a tensor "
                f"[B, T, {width}] or a tuple that starts with one; choose "
                "other layers or another d_model"
            )
        x = self(x)
        if watch is not None:
            watch.after(self)
        if not isinstance(output, (tuple, list)):
            return x
        rest = (x, *output[1:])
        if hasattr(output, "_fields"):  # a namedtuple
            return type(output)(*rest)
        return type(output)(rest)

    def forward(self, x):
        """Return x [B, T, d] with what is in use added."""
        choice = self._route.choice
        if choice is None:
            return x
        if self.training and not torch.is_grad_enabled():
            self._warn_of_no_grad()
        if isinstance(choice, torch.Tensor):
            return self._routed(x, choice)
        if choice == COMBINED:
            return self.combination(x).to(x.dtype)
        return (x + self.bank[choice](x)).to(x.dtype)

    def _warn_of_no_grad(self):
        """Say once that a wrapper keeps the adapters from learning."""
        if torch.compiler.is_compiling() or self._route.has_warned:
            return
        if any(p.requires_grad for p in self.parameters()):
            self._route.has_warned = True
            logger.warning(
                "the encoder runs under no_grad in training mode, so that "
                "the adapters learn nothing: give SpeechBrain's wrapper "
                "freeze: False (its weights are frozen anyway)"
            )

    def _routed(self, x, choice):
        if x.dim() != 3 or len(choice) != len(x):
            raise ValueError(
                f"layer {self.name!r}: {len(choice)} utterance(s) were named "
                f"by use(...), but the batch is {tuple(x.shape)}; call "
                "use(...) for every batch, with one name an utterance"
            )
        index = self._route.positions(x.device)
        added = x + self.bank.routed(x, index.clamp(min=0))
        # Not x + 0: the base's rows stay as they are to the last bit.
        here = (index >= 0).view(-1, 1, 1)
        return torch.where(here, added.to(x.dtype), x)


class StatisticsGuard(torch.nn.Module):
    """A child that keeps its parent's running statistics still.

    `parent.train()` reaches every child, this one last. It then puts what
    updates statistics in `forward` back into evaluation mode, so that the
    training loop need not remember. Dropout is left alone.
    """

    def __init__(self, parent):
        super().__init__()
        # Not by setattr, which would make the parent its child's child.
        self.__dict__["_parent"] = parent

    def train(self, mode=True):
        """Take the mode, and put the parent's statistics to evaluation."""
        super().train(mode)
        for module in self._parent.modules():
            if isinstance(module, torch.nn.modules.batchnorm._NormBase):
                updates = module.track_running_stats
            else:
                # By what they have, since SpeechBrain takes seconds to import.
                updates = (
                    hasattr(module, "update_until_epoch")
                    or hasattr(module, "glob_mean")
                    or type(module).__name__
                    in ("_SpectralNorm", "SpectralNorm")
                )
            if updates:
                module.training = False
        return self

    def forward(self, x, *others, **named):
        """Return x: containers such as `Sequential` call all their children."""
        return x
