"""One loop over layers: which of them ran, and which were left out."""

import threading

import torch

from speechbrain_taskarith.adapters.bank import COMBINED
from speechbrain_taskarith.adapters.combination.matching import (
    is_distributed,
)
from speechbrain_taskarith.adapters.hooks import context


class Progress(threading.local):
    """How far the forward passes of a thread are."""

    def __init__(self):
        #: ids of the `LayerAdapters` whose layers are being computed.
        self.inside = set()
        #: A layer of which parts ran, but not the layer as a whole.
        self.passed_by = None


#: Of this thread.
PROGRESS = Progress()


class LayerLoop:
    """The layers that one module calls one after the other, and its passes.

    An encoder may call methods of its layers, where no hook fires; it may
    leave layers out. The first is an error at the first pass. Of the second,
    DDP must not notice anything.
    """

    def __init__(self, name, owner, route):
        self.name, self.owner, self.layers = name, owner, []
        self._route, self._is_linked = route, True
        #: Whether the owner's `forward` is running, and whether with gradients.
        self.is_running = self.has_gradients = False
        #: Whether processes have met here to match LNs.
        self.has_met = False
        self._hooks = (
            owner.register_forward_pre_hook(self._begin),
            owner.register_forward_hook(self._end, always_call=True),
        )

    def detach(self):
        """Restore the owner as it was."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, owner, inputs):
        made = [layer.combination for layer in self.layers]
        unmatched = [c for c in made if getattr(c, "is_unmatched", False)]
        if any(c.is_matching() for c in unmatched):
            self._meet(unmatched)
        if torch.compiler.is_compiling():
            return
        PROGRESS.passed_by, self._is_linked = None, False
        PROGRESS.inside.difference_update(map(id, self.layers))
        self.is_running, self.has_gradients = True, torch.is_grad_enabled()
        if self._route.watch is not None:
            # Not at the first layer, which a batch may leave out.
            self._route.watch.begin(self.layers)
        choice = self._route.choice
        if isinstance(choice, str) and choice == COMBINED:
            for layer in self.layers:
                # Not the last batch's, where this one leaves the layer out.
                layer.combination.forget_pass()

    @torch.compiler.disable
    def _meet(self, unmatched):
        """Match LNs by what all processes have seen in the last pass.

        Here, where all of them come by: each may leave out other layers.
        """
        if not is_distributed() or context.in_backward:
            return
        self.has_met = True
        sums = [
            c.norm.weight.new_zeros(6, len(c.norm.weight), dtype=torch.float64)
            if c.sums is None
            else c.sums
            for c in unmatched
        ]
        flat = torch.cat([one.flatten() for one in sums])
        torch.distributed.all_reduce(flat)
        parts = flat.split([one.numel() for one in sums])
        for combination, part in zip(unmatched, parts):
            combination.match(part.view(6, -1))

    def _end(self, owner, inputs, output):
        if torch.compiler.is_compiling():
            return
        self.is_running = self.has_gradients = False
        if self._route.watch is not None:
            self._route.watch.ended(self.layers)
        require_passed(None)

    def link(self, x):
        """Give a gradient to the adapters of layers that are left out.

        It is 0. DDP waits for every parameter's, and a penalty is added to it.
        """
        if self._is_linked or not torch.is_grad_enabled():
            return x
        self._is_linked, watch = True, self._route.watch
        parameters = [] if watch is None else watch.penalise(self.layers)
        # Not where checkpointing computes a layer anew: DDP would take the zeros
        # for the gradients of all layers that come after it.
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and not context.in_backward
        ):
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


def require_passed(layer):
    """Raise where an encoder went past the adapters of another layer."""
    missed, PROGRESS.passed_by = PROGRESS.passed_by, None
    if missed is None or missed is layer:
        return
    raise ValueError(
        f"adapters are in use, but layer {missed.name!r} was computed without "
        "its adapters: the encoder calls methods of its layers instead of the "
        "layers themselves (as torchaudio's Emformer.infer does). Use the "
        "encoder's forward, give insert_adapters(layers=...) modules that are "
        "called as a whole, or switch the adapters off by handle.use(None)"
    )
