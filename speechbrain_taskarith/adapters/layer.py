"""What goes into an encoder: adapters behind its layers."""

import functools
import inspect
import logging

import torch

from speechbrain_taskarith.adapters.bank import COMBINED
from speechbrain_taskarith.adapters.combination.attention import valid_frames
from speechbrain_taskarith.adapters.combination.averaging import (
    AdapterMean,
    AdapterWeightedMean,
)
from speechbrain_taskarith.adapters.combination.base import Combination
from speechbrain_taskarith.adapters.combination.fusion import (
    AudioAdapterFusion,
)
from speechbrain_taskarith.adapters.combination.matching import (
    PASS,
    Pass,
    is_distributed,
)
from speechbrain_taskarith.adapters.combination.running import (
    STRETCH,
    Stretch,
)
from speechbrain_taskarith.adapters.hooks import context
from speechbrain_taskarith.adapters.hooks.layer_loop import (
    PROGRESS,
    require_passed,
)
from speechbrain_taskarith.adapters.hooks.rows import utterances_of
from speechbrain_taskarith.utils.lengths import padding_mask

logger = logging.getLogger(__name__)

#: The name of the handle among the encoder's children.
CHILD = "task_adapters"

# Among a layer's named arguments; no name that one could have.
_STREAM = "context of a stream"

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
    # A caller may fill its own tensor anew for the next batch.
    return choice.to(torch.long, copy=True)


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
            # Before other hooks, which collect the layers' outputs: those of
            # transformers stay once hidden states were asked for.
            layer.register_forward_hook(
                self._forward_hook, prepend=True, with_kwargs=True
            ),
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
        PROGRESS.inside.add(id(self))

    def _before_part(self, part, inputs):
        if torch.compiler.is_compiling() or self._route.choice is None:
            return
        if id(self) in PROGRESS.inside:
            return
        # Checkpointing computes the layer again in the backward pass, and
        # may have the hooks' part outside.
        if not context.in_backward:
            require_passed(self)
            PROGRESS.passed_by = self

    def _forward_streaming(self, method, *args, **kwargs):
        self._before_layer(self._layer, args)
        output = method(*args, **kwargs)
        stream = kwargs.get("context", args[1] if len(args) > 1 else None)
        if self._is_running() and not hasattr(stream, "__dict__"):
            raise ValueError(
                f"layer {self.name!r} got no streaming context, where the "
                "running scores are kept; use "
                "AudioAdapterFusion(running=False)"
            )
        named = {**kwargs, _STREAM: stream}
        return self._forward_hook(self._layer, args, named, output)

    def _is_combined(self):
        choice = self._route.choice
        return isinstance(choice, str) and choice == COMBINED

    def _is_running(self):
        """Tell whether the average of all scores so far is in use."""
        return self._is_combined() and getattr(
            self.combination, "running", False
        )

    def _over_time(self, x, inputs, named):
        """Add a combination whose scores are averaged over the frames so far.

        A layer whose frames are not in order, as our Emformer's, says how many
        `segments` an utterance has as rows one after the other, and how long
        they are without the copied frames behind; in a stream its `context`
        keeps what it needs for the next call.
        """
        self._require_batch_first()
        for given in (*inputs, *named.values()):
            length = getattr(given, "get_seq_length", None)
            if callable(length) and length() > x.shape[1]:
                raise ValueError(
                    f"layer {self.name!r} has a key-value cache, so that the "
                    "running average of the scores would start anew at every "
                    "step; decode with use_cache=False, or combine with "
                    "AudioAdapterFusion(running=False)"
                )
        stream, step = named.get(_STREAM), None
        if not getattr(self._layer, "frames_in_order", True):
            stream = named.get("context")
            step = named.get("segment_length")
            if step is None:
                raise ValueError(
                    f"layer {self.name!r} works on blocks of an utterance, "
                    "over which scores cannot be averaged; use "
                    "AudioAdapterFusion(running=False)"
                )
        if stream is None and step is None:
            return self(x)
        kept = {}
        if stream is not None:
            kept = vars(stream).setdefault("running_scores", {})
        before = kept.get(self.name)
        stretch = Stretch(before, named.get("segments", 1), step)
        x = self._along(stretch, x)
        kept[self.name] = stretch.after
        return x

    @torch.compiler.disable  # a graph does not know which stretch it has
    def _along(self, stretch, x):
        token = STRETCH.set(stretch)
        try:
            return self(x)
        finally:
            STRETCH.reset(token)

    def _forward_hook(self, layer, inputs, named, output):
        """Add the adapters to what the layer returns, a tensor or a tuple."""
        watch = self._route.watch
        if watch is not None:
            watch.before(self)
        self._remember()
        if self._route.choice is None:
            return output  # the very object that the base returned
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            PROGRESS.inside.discard(id(self))
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
        made = self.combination
        unmatched = getattr(made, "is_unmatched", False) and made.is_matching()
        if unmatched and self._is_combined():
            x = self._to_match(x, inputs, named)
        else:
            x = self._added(x, inputs, named)
        if self._is_combined():
            made.last_valid = self._unmasked(x, inputs, named, frames)
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

    def _remember(self):
        """Keep what this pass goes through for its backward pass."""
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() or self._loop.has_gradients:
            self._route.remember()

    def _added(self, x, inputs, named):
        if self._is_running():
            return self._over_time(x, inputs, named)
        return self(x)

    @torch.compiler.disable  # as `Combination._match`
    def _to_match(self, x, inputs, named):
        """Add a combination whose LN this batch is to match."""
        is_deferred = is_distributed()
        if is_deferred and not self._loop.has_met:
            raise ValueError(
                f"layer {self.name!r} does not run inside the forward method "
                f"of {self._loop.name or 'the encoder'!r}, where several "
                "processes would meet to match LayerNorms; call that, or use "
                "another ln_init than 'match'"
            )
        valid = self._valid_frames(x, inputs, named)
        token = PASS.set(Pass(valid, is_deferred))
        try:
            return self._added(x, inputs, named)
        finally:
            PASS.reset(token)

    def _valid_frames(self, x, inputs, named):
        """Return which frames of x are no padding, None where not known.

        By what the layer was told, else by the running Brain's batch.
        """
        valid, watch = self._unmasked(x, inputs, named), self._route.watch
        lens = None if watch is None else watch.lengths()
        if valid is not None or lens is None:
            return valid
        swapped = self._is_frames_first()
        if swapped:
            x = x.transpose(0, 1)
        valid = valid_frames(x, lens)
        if valid.shape != x.shape[:-1]:
            return None
        return valid.t() if swapped else valid

    def _unmasked(self, x, inputs, named, frames=None):
        """Return which frames of x no mask of the layer leaves out.

        None: not known, as in a graph. `frames`: of each row, where known.
        """
        if torch.compiler.is_compiling():
            return None
        if frames is not None:
            frames = torch.tensor(frames, device=x.device)
            return ~padding_mask(frames, x.shape[1])
        swapped = self._is_frames_first()
        if swapped:
            x = x.transpose(0, 1)
        mask, attended = (
            named.get(name)
            for name in ("src_key_padding_mask", "attention_mask")
        )
        if mask is not None:
            # Of torch's own encoder it is a float, -inf at padding.
            valid = ~mask if mask.dtype == torch.bool else mask == 0
        elif isinstance(attended, torch.Tensor) and attended.dim() == 4:
            # Of transformers: [B, 1, T, T], what the last frame attends to.
            last = attended[:, 0, -1]
            valid = last if last.dtype == torch.bool else last == 0
        elif (
            isinstance(attended, torch.Tensor)
            and attended.dim() == 2
            and not attended.is_floating_point()
        ):  # of WavLM, and with flash attention: [B, T], 0 at padding
            valid = attended != 0
        elif "segment_length" in named:  # our Emformer: its own frames
            valid = inputs[-1][-1].clone()
            valid[:, named["segment_length"] :] = False  # copies
        else:
            return None
        if valid.shape != x.shape[:-1]:
            return None
        return valid.t() if swapped else valid

    def forward(self, x):
        """Return x [B, T, d] with what is in use added."""
        choice = self._route.choice
        if choice is None:
            return x
        if (
            self.training
            and not torch.is_grad_enabled()
            and not self._loop.has_gradients  # else checkpointing does it
        ):
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

    def _is_frames_first(self):
        heads = [
            m
            for m in self._layer.children()
            if isinstance(m, torch.nn.MultiheadAttention)
        ]
        theirs = type(self._layer).__module__ == "torchaudio.models.emformer"
        return theirs or any(not head.batch_first for head in heads)

    def _require_batch_first(self):
        """Refuse what tells utterances from frames, where those come first."""
        if self._is_frames_first():
            raise ValueError(
                f"layer {self.name!r} has frames first ([T, B, d]), so that "
                "neither adapters of single utterances nor running scores "
                "work; use one name for the batch, or batch_first=True"
            )

    def _routed(self, x, choice):
        self._require_batch_first()
        if x.dim() != 3:
            raise ValueError(
                f"layer {self.name!r} returns {tuple(x.shape)}; adapters of "
                "single utterances need [B, T, d]"
            )
        blocks = not getattr(self._layer, "frames_in_order", True)
        try:
            kept, times = utterances_of(len(x), len(choice), in_blocks=blocks)
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from None
        index = self._route.positions(choice, x.device)
        if kept is not None:
            index = index[kept]
        if times != 1:
            index = index.repeat_interleave(times)
        added = x + self.bank.routed(x, index.clamp(min=0))
        # Not x + 0: the base's rows stay as they are to the last bit.
        here = (index >= 0).view(-1, 1, 1)
        return torch.where(here, added.to(x.dtype), x)
