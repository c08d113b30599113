"""A pre-trained encoder in two parts: frozen below, trained above."""

import hashlib
import inspect
import json

import torch

from speechbrain_taskarith.utils.lengths import padding_mask


def is_trained(parameter):
    """Tell whether a parameter is trained, or will be after a warm-up.

    Who freezes one for a while sets its `held`.
    """
    return parameter.requires_grad or getattr(parameter, "held", False)


class Layered:
    """How to run a pre-trained encoder of waveforms up to any of its stages.

    Stages are the layers, and a normalisation after them; all before them is
    the front. It holds no tensors: the encoder stays a plain module, with its
    own names.

    Arguments
    ---------
    name : str
        The family, for messages.
    width : int
        Of the output.
    """

    def __init__(self, name, width):
        self.name, self.width = name, width

    def layers(self, module):
        """Return the layers; none, if they cannot be run one by one."""
        raise NotImplementedError

    def stages(self, module):
        """Return all stages in order."""
        raise NotImplementedError

    def run(self, module, wavs, lengths, stop, ids=None):
        """Encode wavs [B, samples] with absolute lengths up to a stage.

        Returns the input [B, T, D] of stage `stop`, the output if there is
        none, and the absolute lengths [B] of its frames.
        """
        raise NotImplementedError

    def settings(self, module):
        """Return what decides the output beside the weights."""
        names = (
            "model_type",
            "num_attention_heads",
            "encoder_attention_heads",
            "hidden_act",
            "activation_function",
            "do_stable_layer_norm",
            "scale_embedding",
            "layer_norm_eps",
        )
        return {n: getattr(module.config, n, None) for n in names}

    def rest(self, module, hidden, counts, start, stop=None):
        """Go on from the input [B, T, D] of stage `start` to that of `stop`.

        None: to the output.
        """
        size = hidden.shape[1]
        outside = padding_mask(counts, size)[:, None, None]
        lowest = torch.finfo(hidden.dtype).min
        mask = hidden.new_zeros(outside.shape).masked_fill(outside, lowest)
        for stage in self.stages(module)[start:stop]:
            if isinstance(stage, torch.nn.LayerNorm):
                hidden = stage(hidden)
            else:
                # In older versions of transformers a needed argument, and a
                # tuple is returned.
                needed = inspect.signature(type(stage).forward).parameters
                extra = dict.fromkeys({"layer_head_mask"} & needed.keys())
                hidden = stage(hidden, attention_mask=mask, **extra)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden

    def freeze(self, module, trained_layers):
        """Train the last layers alone, and what comes after them."""
        layers, stages = self.layers(module), self.stages(module)
        most = len(layers)
        if type(trained_layers) is not int or not 0 <= trained_layers <= most:
            raise ValueError(
                f"trained_layers: {trained_layers!r}; this {self.name} has "
                f"{most} layers that can be trained apart: expected 0 (all "
                f"frozen) to {most}, or None to train all of it"
            )
        module.requires_grad_(False)
        if trained_layers:
            for stage in stages[most - trained_layers :]:
                stage.requires_grad_(True)

    def first_trained(self, module):
        """Return the first trained stage, past the last if all are frozen.

        None: something before the stages is trained. It is asked of the
        parameters, so that it holds whoever froze them.
        """
        stages = self.stages(module)
        inside = {id(p) for stage in stages for p in stage.parameters()}
        front = (p for p in module.parameters() if id(p) not in inside)
        if any(map(is_trained, front)):
            return None
        for place, stage in enumerate(stages):
            if any(map(is_trained, stage.parameters())):
                return place
        return len(stages)

    def fingerprint(self, module):
        """Return a hash of all that decides the output of the frozen part."""
        stages, first = self.stages(module), self.first_trained(module)
        trained = {
            id(tensor)
            for stage in stages[first:]
            for tensor in stage.state_dict(keep_vars=True).values()
        }
        described = {"stage": first, **self.settings(module)}
        digest = hashlib.sha256(
            json.dumps(described, sort_keys=True, default=str).encode()
        )
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) in trained:
                continue
            raw = tensor.detach().cpu().contiguous().flatten()
            digest.update(f"{name}{tuple(tensor.shape)}{raw.dtype}".encode())
            digest.update(raw.view(torch.uint8).numpy())
        return digest.hexdigest()

    def describe(self, module):
        """Say in a few words which encoder it is, for messages."""
        first, count = self.first_trained(module), len(self.layers(module))
        frozen = count if first is None else min(first, count)
        shown = f"{self.name} of width {self.width}"
        return f"{shown}, frozen up to layer {frozen}" if count else shown
