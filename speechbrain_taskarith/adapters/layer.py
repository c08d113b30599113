"""What goes into an encoder: adapters behind its layers."""

import contextvars
import functools
import inspect
import logging
import threading

import torch

from speechbrain_taskarith.adapters.bank import COMBINED
from speechbrain_taskarith.adapters.combination.averaging import (
    AdapterMean,
    AdapterWeightedMean,
)
from speechbrain_taskarith.adapters.combination.base import Combination
from speechbrain_taskarith.adapters.combination.fusion import (
    HISTORY,
    AudioAdapterFusion,
)

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
        made.to(bank.device, bank.dtype).requires_grad_(False).train(
            bank.training
        )
    return made


class Chosen:
    """One choice, and what holds again once it turns out to be a `with`'s."""

    def __init__(self, value):
        self.value, self.instead = value, None


#: The choices of the `with` blocks around: (route, its `Chosen`, the next).
_AROUND = contextvars.ContextVar("adapters in use", default=None)


class Route:
    """What is in use, shared by all layers of an encoder.

    A choice is None, an adapter's name, `COMBINED`, or positions [B] (-1:
    the base).
    """

    def __init__(self):
        #: Where no `with` says something else; `Chosen`.
        self.everywhere = Chosen(None)
        #: Chosen last, by any thread: for compiled graphs, which cannot look
        #: into contexts, and for autograd's threads, which have none.
        self.latest = None
        self.has_warned = False
        #: The next batch's tasks, where a loop says them.
        self.tasks = None
        #: What looks on, a `Watch`, or None.
        self.watch = None
        self._moved = {}

    @property
    def choice(self):
        """Return what is in use here: in this thread or asyncio task."""
        if torch.compiler.is_compiling():
            return self.latest
        own = self.own()
        if own is not None:
            return own.value
        return self.latest if in_backward() else self.everywhere.value

    def own(self):
        """Return the `Chosen` of the innermost `with`, None without one."""
        around = _AROUND.get()
        while around is not None and around[0] is not self:
            around = around[2]
        return None if around is None else around[1]

    def __getstate__(self):
        # A copy goes through what is in use where it is made.
        everywhere = Chosen(self.choice)
        return {**vars(self), "everywhere": everywhere, "_moved": {}}

    def positions(self, choice, device):
        """Return positions on a device, moved there once."""
        known, moved = self._moved.get(device, (None, None))
        if choice is not known:
            moved = choice.to(device)
            self._moved[device] = (choice, moved)
        return moved


class Use:
    """A choice: from now on, or for a `with` block and what runs in it.

    In a `with`, other threads and asyncio tasks keep their own.
    """

    def __init__(self, route, choice):
        self._route, self._chosen, self._token = route, Chosen(choice), None
        self._own = route.own()
        if self._own is not None:
            self._before, self._own.value = self._own.value, choice
        else:
            self._before, route.everywhere = route.everywhere, self._chosen
        route.latest = choice

    def __enter__(self):
        route, chosen = self._route, self._chosen
        if self._own is not None:
            self._own.value = self._before
        else:
            # Another thread may be between its `use` and its `with`, too.
            while self._before.instead is not None:
                self._before = self._before.instead
            chosen.instead = self._before
            if route.everywhere is chosen:
                route.everywhere = self._before
        self._token = _AROUND.set((route, chosen, _AROUND.get()))
        return self

    def __exit__(self, *error):
        _AROUND.reset(self._token)
        self._route.latest = self._route.choice


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


class _Progress(threading.local):
    """How far the forward passes of a thread are."""

    def __init__(self):
        #: ids of the `LayerAdapters` whose layers are being computed.
        self.inside = set()
        #: A layer of which parts ran, but not the layer as a whole.
        self.passed_by = None


_PROGRESS = _Progress()


class LayerLoop:
    """The layers that one module calls one after the other, and its passes.

    An encoder may call methods of its layers, where no hook fires; it may
    leave layers out. The first is an error at the first pass. Of the second,
    DDP must not notice anything.
    """

    def __init__(self, name, owner, route):
        self.name, self.owner, self.layers = name, owner, []
        self._route, self._is_linked = route, True
        self._hooks = (
            owner.register_forward_pre_hook(self._begin),
            owner.register_forward_hook(self._end),
        )

    def detach(self):
        """Restore the owner as it was."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, owner, inputs):
        if torch.compiler.is_compiling():
            return
        _PROGRESS.passed_by, self._is_linked = None, False
        _PROGRESS.inside.difference_update(map(id, self.layers))
        choice = self._route.choice
        if isinstance(choice, str) and choice == COMBINED:
            for layer in self.layers:
                # Not the last batch's, where this one leaves the layer out.
                made = layer.combination
                made.last_weights = made.live_weights = None

    def _end(self, owner, inputs, output):
        if not torch.compiler.is_compiling():
            require_passed(None)

    def link(self, x):
        """Give a gradient to the adapters of layers that are left out.

        It is 0. DDP waits for every parameter's.
        """
        if (
            self._is_linked
            or not torch.is_grad_enabled()
            or not torch.distributed.is_available()
            or not torch.distributed.is_initialized()
        ):
            return x
        self._is_linked = True
        parameters = [
            p
            for layer in self.layers
            for p in layer.parameters()
            if p.requires_grad
        ]
        return _Link.apply(x, *parameters) if parameters else x


class _Link(torch.autograd.Function):
    """x as it is; parameters that did nothing to it get a gradient of 0."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        zeros = [
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.like
        ]
        return gradient, *zeros


def in_backward():
    """Tell whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def require_passed(layer):
    """Raise where an encoder went past the adapters of another layer."""
    missed, _PROGRESS.passed_by = _PROGRESS.passed_by, None
    if missed is None or missed is layer:
        return
    raise ValueError(
        f"adapters are in use, but layer {missed.name!r} was computed without "
        "its adapters: the encoder calls methods of its layers instead of the "
        "layers themselves (as torchaudio's Emformer.infer does). Use the "
        "encoder's forward, give insert_adapters(layers=...) modules that are "
        "called as a whole, or switch the adapters off by handle.use(None)"
    )


class LayerAdapters(torch.nn.Module):
    """One layer's bank and combination, and the hook that adds them to it."""

    def __init__(self, name, layer, bank, combination, loop):
        super().__init__()
        self.bank, self.combination = bank, combination
        self.name, self._route, self._loop = name, loop._route, loop
        loop.layers.append(self)
        # Not by setattr, which would make it a submodule.
        self.__dict__["_layer"] = layer
        # What runs whenever the layer does, by whatever method.
        parts = [
            m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm)
        ] or list(layer.children())
        self._hooks = [
            layer.register_forward_pre_hook(self._before_layer),
            layer.register_forward_hook(self._forward_hook, with_kwargs=True),
            *(p.register_forward_pre_hook(self._before_part) for p in parts),
        ]
        # SpeechBrain's streaming calls this method and no hook.
        if hasattr(layer, "forward_streaming"):
            method = layer.forward_streaming
            # A partial, which copies can copy, unlike a closure.
            stream = functools.partial(self._forward_streaming, method)
            stream.__signature__ = inspect.signature(method)
            layer.forward_streaming = stream

    def detach(self):
        """Restore the layer as it was."""
        for hook in self._hooks:
            hook.remove()
        vars(self._layer).pop("forward_streaming", None)

    def _before_layer(self, layer, inputs):
        if torch.compiler.is_compiling() or self._route.choice is None:
            return
        require_passed(self)
        _PROGRESS.inside.add(id(self))

    def _before_part(self, part, inputs):
        if torch.compiler.is_compiling() or self._route.choice is None:
            return
        if id(self) in _PROGRESS.inside:
            return
        # Checkpointing computes the layer again in the backward pass, and
        # may have the hooks' part outside.
        if not in_backward():
            require_passed(self)
            _PROGRESS.passed_by = self

    def _forward_streaming(self, method, *args, **kwargs):
        self._before_layer(self._layer, args)
        output = method(*args, **kwargs)
        history = None
        if self._is_running():
            context = kwargs.get("context", args[1] if len(args) > 1 else None)
            histories = vars(context).setdefault("running_scores", {})
            history = histories.setdefault(self.name, [])
        token = HISTORY.set(history)
        try:
            return self._forward_hook(self._layer, args, {}, output)
        finally:
            HISTORY.reset(token)

    def _is_running(self):
        """Tell whether the average of all scores so far is in use."""
        choice = self._route.choice
        combined = isinstance(choice, str) and choice == COMBINED
        return combined and getattr(self.combination, "running", False)

    def _require_whole(self, inputs, named, frames):
        """Refuse running scores where a call has not all frames so far."""
        self._require_batch_first()
        if not getattr(self._layer, "frames_in_order", True):
            raise ValueError(
                f"layer {self.name!r} works on blocks of an utterance, over "
                "which scores cannot be averaged; use "
                "AudioAdapterFusion(running=False)"
            )
        for given in (*inputs, *named.values()):
            length = getattr(given, "get_seq_length", None)
            if callable(length) and length() > frames:
                raise ValueError(
                    f"layer {self.name!r} has a key-value cache, so that the "
                    "running average of the scores would start anew at every "
                    "step; decode with use_cache=False, or combine with "
                    "AudioAdapterFusion(running=False)"
                )

    def _forward_hook(self, layer, inputs, named, output):
        """Add the adapters to what the layer returns, a tensor or a tuple."""
        watch = self._route.watch
        if watch is not None:
            watch.before(self)
        if self._route.choice is None:
            return output  # the very object that the base returned
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            _PROGRESS.inside.discard(id(self))
            require_passed(self)
        if layer is not self._layer:
            raise ValueError(
                f"layer {self.name!r} runs as a copy that has no adapters of "
                "its own, as torch.nn.DataParallel makes them; use "
                "DistributedDataParallel, or one device"
            )
        x = output
        if isinstance(output, (tuple, list)) and output:
            x = output[0]
        # What torch.nn.TransformerEncoder makes of a padded batch.
        frames = None
        if isinstance(x, torch.Tensor) and x.is_nested:
            frames = [len(row) for row in x.unbind()]
            x = x.to_padded_tensor(0.0)
        width = self.bank.d_model
        if not isinstance(x, torch.Tensor) or x.shape[-1] != width:
            what = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
            raise ValueError(
                f"layer {self.name!r} returns {what}, expected a tensor "
                f"[B, T, {width}] or a tuple that starts with one; choose "
                "other layers or another d_model"
            )
        if self._is_running():
            self._require_whole(inputs, named, x.shape[1])
        x = self(x)
        if frames is not None:
            rows = [row[:number] for row, number in zip(x, frames)]
            x = torch.nested.as_nested_tensor(rows)
        if self.training and not is_compiling:
            x = self._loop.link(x)
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
        dtype = x.dtype
        if not torch.is_autocast_enabled(x.device.type):
            # In the adapters' own precision: a base in half has adapters in
            # float32, which could not be trained otherwise.
            x = x.to(self.bank.dtype)
        if isinstance(choice, torch.Tensor):
            return self._routed(x, choice).to(dtype)
        if choice == COMBINED:
            return self.combination(x).to(dtype)
        return (x + self.bank[choice](x)).to(dtype)

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

    def _require_batch_first(self):
        """Refuse what tells utterances from frames, where those come first."""
        heads = [
            m
            for m in self._layer.children()
            if isinstance(m, torch.nn.MultiheadAttention)
        ]
        theirs = type(self._layer).__module__ == "torchaudio.models.emformer"
        if theirs or any(not head.batch_first for head in heads):
            raise ValueError(
                f"layer {self.name!r} has frames first ([T, B, d]), so that "
                "neither adapters of single utterances nor running scores "
                "work; use one name for the batch, or batch_first=True"
            )

    def _routed(self, x, choice):
        self._require_batch_first()
        # Beams and samples of an utterance stand side by side, as do the
        # blocks of our Emformer.
        times = len(x) // max(len(choice), 1) if x.dim() == 3 else 0
        if not len(x) == times * len(choice):
            raise ValueError(
                f"layer {self.name!r}: {len(choice)} utterance(s) were named "
                f"by use(...), but the batch is {tuple(x.shape)}; call "
                "use(...) for every batch, with one name an utterance"
            )
        index = self._route.positions(choice, x.device)
        if times != 1:
            index = index.repeat_interleave(times)
        added = x + self.bank.routed(x, index.clamp(min=0))
        # Not x + 0: the base's rows stay as they are to the last bit.
        here = (index >= 0).view(-1, 1, 1)
        return torch.where(here, added.to(x.dtype), x)
