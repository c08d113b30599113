"""What adapters do in a recipe whose loop has no line about them.

The layers' hooks call a `Watch`, which finds the `Brain` that runs the
encoder on the call stack: its modules have names, its batch says which
utterances these are, its scaler and accumulation scale the loss.
"""

import logging
import sys
import threading
import weakref

import torch

from speechbrain_taskarith.adapters.bank import (
    COMBINED,
    MODES,
    adapter_key,
)
from speechbrain_taskarith.adapters.combination import attention
from speechbrain_taskarith.adapters.hooks import context
from speechbrain_taskarith.adapters.layer import utterance_positions
from speechbrain_taskarith.utils.patterns import first_match
from speechbrain_taskarith.utils.training import running_methods

logger = logging.getLogger(__name__)

# Methods of a Brain that have the batch as their first argument.
_STEPS = ("compute_forward", "fit_batch", "evaluate_batch")


class Watch:
    """Looks on at the forward passes of an encoder with adapters.

    Arguments
    ---------
    handle : AdapterHandle
        The adapters.
    sources : list of Source
        Files that are in the handle, but not yet held against the base.
    penalty, guide, tasks
        See `insert_adapters`.
    """

    def __init__(self, handle, sources=(), penalty=0.0, guide=0.0, tasks=None):
        self.handle, self.sources = handle, list(sources)
        self.penalty, self.guide, self.tasks = penalty, guide, tasks
        self.is_composition = False
        self.has_started = False
        self._brain = self._thread = self._batch = None
        #: {layer's name: (parameter, its hook)}, and whose turn it is.
        self._hooks, self._pending = {}, set()
        #: Names of the layers of this pass whose attention is guided.
        self._guided = set()

    @property
    def _route(self):
        return self.handle._route

    def __getstate__(self):
        gone = dict.fromkeys(("_brain", "_thread", "_batch"))
        return {**self.__dict__, **gone, "_hooks": {}, "_pending": set()}

    # ------------------------------------------------- at every forward pass

    def before(self, layer):
        """Do what has to be done before a layer's adapters are added."""
        busy = self.penalty or self.guide or self._route.follows_tasks
        trains = layer.training and torch.is_grad_enabled()
        starts = trains and not self.has_started
        # Nothing else may break a compiled graph.
        if busy or self.sources or starts:
            self._before(layer)

    @torch.compiler.disable
    def _before(self, layer):
        while self.sources:
            self.sources[0].check(self.handle)
            self.sources.pop(0)
        if not layer._loop.is_running:
            # Compiled, or the owner of the layers is not called as a whole.
            self.choose()
        if not (layer.training and torch.is_grad_enabled()):
            return
        if not self.has_started:
            self._find_brain()
            self._require_known_scale()
            self._report()
            self.has_started = True
        if self.penalty:
            self._hook_penalty(layer)

    def begin(self, layers):
        """Do what has to be done before a pass through some layers."""
        if layers and layers[0] is self.handle.layers[0]:
            self._guided = set()
        self.choose()

    def choose(self):
        """Take the adapters of the utterances that are being computed."""
        # A backward pass computes again what was chosen for its forward pass.
        if self._route.follows_tasks and not context.in_backward:
            bank = self.handle.layers[0].bank
            tasks = self.batch_tasks()
            self._route.follow(utterance_positions(tasks, bank))

    def ended(self, layers):
        """Forget the tasks that a loop has said for this pass."""
        if layers and layers[-1] is self.handle.layers[-1]:
            self._route.tasks = None

    def after(self, layer):
        """Do what needs the combination's attention."""
        if self.guide or self.handle.tasks is not None:
            self._after(layer)

    @torch.compiler.disable
    def _after(self, layer):
        training = layer.training and torch.is_grad_enabled()
        if self.guide and training and self.handle.in_use == COMBINED:
            self._hook_guidance(layer)
        if layer is self.handle.layers[-1]:
            self.handle.tasks = None

    def replaced(self, state, prefix):
        """Take note of a checkpoint that holds adapters: it wins.

        Arguments
        ---------
        state : dict
            Its state dict.
        prefix : str
            Of the handle's names in it.
        """
        own = self.handle.state_dict()
        gone, changed = [], False
        for source in list(self.sources):
            part = (
                ".combination."
                if source.name == COMBINED
                else f".bank.{adapter_key(source.name)}."
            )
            names = [name for name in own if part in name]
            if not any(prefix + name in state for name in names):
                continue
            gone.append(source.name)
            self.sources.remove(source)
            changed |= not all(
                torch.equal(own[n].cpu(), state[prefix + n].cpu())
                for n in names
                if prefix + n in state
                and own[n].shape == state[prefix + n].shape
            )
        if gone:
            logger.log(
                logging.WARNING if changed else logging.INFO,
                "the checkpoint holds adapters, which replace those of load: "
                "%s (%s)",
                ", ".join(gone),
                "with other values" if changed else "the same values",
            )

    # ------------------------------------------------- gradients of the loss

    def _loss_scale(self, like):
        """Return what the running Brain multiplies its loss by."""
        brain = self._brain and self._brain()
        if brain is None:
            return 1.0
        exact = torch.promote_types(like.dtype, torch.float32)
        one = torch.ones((), dtype=exact, device=like.device)
        return brain.scaler.scale(one) / brain.grad_accumulation_factor

    def _require_known_scale(self):
        """Refuse to add to a loss whose scale a recipe makes itself."""
        brain = self._brain and self._brain()
        if brain is None or not (self.penalty or self.guide):
            return
        own = type(brain).fit_batch
        if own is sys.modules["speechbrain.core"].Brain.fit_batch:
            return
        if brain.scaler.is_enabled() or brain.grad_accumulation_factor != 1:
            raise ValueError(
                f"penalty and guide: {type(brain).__name__} has a fit_batch "
                "of its own, so that the scale of its loss is not known; use "
                "grad_accumulation_factor 1 and precision fp32 or bf16, or "
                "add handle.penalty() and handle.attention_loss(...) in its "
                "compute_objectives"
            )

    def penalise(self, layers):
        """Add the penalty of layers; return the parameters that it is of."""
        if not self.penalty:
            return []
        return [p for layer in layers for p in self._hook_penalty(layer)]

    def _hook_penalty(self, layer):
        """Add the penalty's derivative to a gradient, once a backward pass.

        A hook of a parameter runs before the gradient is accumulated, and
        before DDP averages it over processes. Return the parameters.
        """
        made = layer.combination
        gradients = [] if made is None else made.penalty_gradient(self.penalty)
        trained = [p for p, _ in gradients if p.requires_grad]
        for parameter in trained:
            self._find_brain()
            self._pending.add(layer.name)
            known, hook = self._hooks.get(layer.name, (None, None))
            if known is parameter:
                continue
            if hook is not None:
                hook.remove()

            def add(gradient, layer=layer):
                if layer.name not in self._pending:
                    return gradient
                self._pending.discard(layer.name)
                made = layer.combination
                ((_, extra),) = made.penalty_gradient(self.penalty)
                scale = self._loss_scale(gradient)
                return gradient + (scale * extra.detach()).to(gradient)

            hook = parameter.register_hook(add)
            self._hooks[layer.name] = parameter, hook
        return trained

    def _hook_guidance(self, layer):
        """Add the derivative of `guide * attention_loss` to attention's."""
        made = layer.combination
        weights = attention.kept_attention(layer.name, made)
        if not weights.requires_grad:
            return
        tasks, lens = self.batch_tasks(), self._lengths()
        copy = weights.detach().requires_grad_()
        with torch.autocast(copy.device.type, enabled=False):
            cost = attention.guidance_cost(copy, made.names, tasks, lens)
            (extra,) = torch.autograd.grad(cost, copy)
        # The mean is over the layers that run, which is known at the end.
        ran = self._guided
        ran.add(layer.name)

        def add(gradient):
            scale = self._loss_scale(gradient) * self.guide / len(ran)
            return gradient + (scale * extra).to(gradient)

        weights.register_hook(add)

    # ---------------------------------------------------------- the recipe

    def _find_brain(self):
        """Return the batch of the running Brain, None without one."""
        brain, batch = running_brain()
        thread = threading.get_ident()
        if brain is not None:
            self._brain, self._thread = weakref.ref(brain), thread
            # Only where tasks are asked for: it holds the batch in memory.
            asked = self.guide or self._route.follows_tasks
            self._batch = batch if asked else None
        elif thread == self._thread:
            self._brain = self._batch = None
        # Else autograd's own thread, which computes checkpointed layers anew.
        return self._batch

    def batch_tasks(self):
        """Return the utterances' tasks of the batch that is being computed.

        Returns
        -------
        list of str
            One name an utterance, None for the base.

        Raises
        ------
        ValueError
            Nothing says them.
        """
        batch = self._find_brain()
        if self.handle.tasks is not None:
            return self.handle.tasks
        if self.tasks is None or batch is None:
            raise ValueError(
                "the utterances' tasks are not known: give insert_adapters "
                "tasks={pattern on utterance ids: task}, or say them before "
                "each forward pass by a line in the loop, e.g. "
                "adapters.tasks = batch.spk_id; or choose by adapters.use(...)"
            )
        if isinstance(self.tasks, str):
            return list(_item(batch, self.tasks))
        found = []
        for utterance in _item(batch, "id"):
            task = first_match(utterance, self.tasks, default=self)
            if task is self:
                raise ValueError(
                    f"utterance {utterance!r}: no pattern of tasks fits its "
                    f"id; there are {', '.join(self.tasks)}"
                )
            found.append(task)
        return found

    def _lengths(self):
        """Return the relative lengths of the batch, in a backward pass too."""
        return _relative_lengths(self._find_brain())

    @staticmethod
    def lengths():
        """Return the relative lengths of the running batch, or None."""
        return _relative_lengths(running_brain()[1])

    def _report(self):
        """Say what trains, and warn of what most likely was not meant."""
        handle, trained = self.handle, self.handle.trained_parameters()
        brain = self._brain and self._brain()
        logger.info("adapters, training begins: %s", handle.training_summary())
        if self.is_composition and handle.in_use == COMBINED:
            handle.warn_of_untrained()
        if handle.in_use is None and trained:
            logger.warning(
                "training begins, but none of the adapters that are to be "
                "trained is in use: give insert_adapters tasks={...}, or call "
                "handle.use([...]) before each batch"
            )
        elif handle.in_use is None:
            logger.warning(
                "training begins, but the adapters neither train nor are in "
                "use: say insert_adapters(train=...) with one of %s",
                ", ".join(map(repr, [*handle.names, *MODES])),
            )
        if brain is None:
            return
        ours = {id(parameter) for parameter in handle.parameters()}
        others = []
        for name, module in brain.modules.items():
            open_ones = {
                id(p): p.numel()
                for p in module.parameters()
                if p.requires_grad and id(p) not in ours
            }
            if open_ones:
                others.append(f"{name} ({sum(open_ones.values()):,})")
        if others:
            logger.warning(
                "beside the adapters, these train as well (parameters): %s. "
                "Whatever was learned before with the adapters sees them "
                "change; to hold them still: insert_adapters(freeze=...), "
                "e.g. freeze: !ref <modules>",
                ", ".join(others),
            )
        held = _optimised(brain)
        missing = [p for p in trained if id(p) not in held]
        if held and missing:
            logger.warning(
                "%d of %d trained tensors of the adapters are in no "
                "optimizer: the encoder has to be among the Brain's modules",
                len(missing),
                len(trained),
            )


def running_brain():
    """Return the Brain and the batch of the innermost step on the stack."""
    for _, arguments in running_methods(_STEPS):
        if len(arguments) > 1:
            return arguments[0], arguments[1]
    return None, None


def _optimised(brain):
    """Return the ids of all parameters that a Brain's optimizers hold."""
    optimizers = getattr(brain, "optimizers_dict", None) or {}
    optimizers = list(optimizers.values())
    if getattr(brain, "optimizer", None) is not None:
        optimizers.append(brain.optimizer)
    return {
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _relative_lengths(batch):
    """Return the lengths [B] of a batch's `sig`, None where it has none."""
    return getattr(getattr(batch, "sig", None), "lengths", None)


def _item(batch, key):
    """Return a batch's item, with an error that names what there is."""
    try:
        return getattr(batch, key)
    except AttributeError:
        pass
    try:
        return batch[key]
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            f"tasks: the batch has no {key!r}; see the output keys of the "
            "recipe's dataio_prepare"
        ) from None
