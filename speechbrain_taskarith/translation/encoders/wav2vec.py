"""wav2vec 2.0, HuBERT and their kin, without a trace of the padding."""

import logging
import threading

import torch
from torch.nn.functional import pad

from speechbrain_taskarith.translation.encoders.layered import Layered
from speechbrain_taskarith.utils.lengths import padding_mask

logger = logging.getLogger(__name__)

#: By `config.model_type`, and whether the layers can be run one by one.
FAMILIES = {
    "wav2vec2": True,
    "hubert": True,
    "wavlm": False,
    "wav2vec2-conformer": False,
    "data2vec-audio": False,
    "unispeech": False,
    "unispeech-sat": False,
}


class Wav2Vec(Layered):
    """Runs a model of `transformers`, bare or in SpeechBrain's wrapper.

    Batches give what single utterances give: waveforms are normalised, and
    the first convolution's output too, over an utterance's own samples.

    Arguments
    ---------
    encoder : torch.nn.Module
        See `bare`.
    """

    def __init__(self, encoder):
        model = bare(encoder)
        super().__init__(model.config.model_type, model.config.hidden_size)
        self.normalize = getattr(encoder, "normalize_wav", False)
        self.lengths = {}  # by thread: several may share a model
        first = model.feature_extractor.conv_layers[0]
        norm = getattr(first, "layer_norm", None)
        if isinstance(norm, torch.nn.GroupNorm):
            norm.register_forward_hook(_ValidNorm(self.lengths, first.conv))

    def layers(self, module):
        """As `Layered.layers`."""
        model = bare(module)
        apart = FAMILIES[model.config.model_type] and not getattr(
            model, "adapter", None
        )
        return list(model.encoder.layers) if apart else []

    def stages(self, module):
        """As `Layered.stages`."""
        layers = self.layers(module)
        config = bare(module).config
        if layers and getattr(config, "do_stable_layer_norm", False):
            return [*layers, bare(module).encoder.layer_norm]
        return layers

    def settings(self, module):
        """As `Layered.settings`."""
        config = bare(module).config
        return {
            **super().settings(bare(module)),
            "normalize": self.normalize,
            "strides": list(config.conv_stride),
        }

    def run(self, module, wavs, lengths, stop, ids=None):
        """As `Layered.run`."""
        model = bare(module)
        config = model.config
        field = 1  # samples that the first frame reads
        layers = zip(config.conv_kernel, config.conv_stride)
        for kernel, stride in reversed(list(layers)):
            field = (field - 1) * stride + kernel
        if self.normalize:
            wavs = _normalised(wavs, lengths)
        # Less than a frame is a frame; nothing at all is left to the caller.
        read = lengths.clamp(min=field)
        wavs = pad(wavs, (0, max(0, field - wavs.shape[1])))
        counts = model._get_feat_extract_output_lengths(read)
        inside = ~padding_mask(read, wavs.shape[1])
        stages, here = self.stages(module), threading.get_ident()
        catch = None
        if stop < len(stages):
            catch = stages[stop].register_forward_pre_hook(_stop, prepend=True)
        self.lengths[here] = read
        weights = model.feature_extractor.conv_layers[0].conv.weight
        try:
            hidden = model(
                wavs.to(weights.dtype), attention_mask=inside.long()
            ).last_hidden_state
        except _Reached as reached:
            hidden = reached.hidden
        finally:
            del self.lengths[here]
            if catch is not None:
                catch.remove()
        return hidden, torch.where(lengths > 0, counts, 0)


def bare(encoder):
    """Return the model of `transformers` inside a wrapper, or itself."""
    model = encoder.model if hasattr(encoder, "normalize_wav") else encoder
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def is_wav2vec(encoder):
    """Tell whether an encoder of this kind can be run as `Wav2Vec` does.

    Not with those options of the wrapper that change its output.
    """
    config = getattr(bare(encoder), "config", None)
    if getattr(config, "model_type", None) not in FAMILIES:
        return False
    for option in ("output_norm", "output_all_hiddens"):
        if getattr(encoder, option, False):
            logger.warning(
                "%s with %s: frames of speech depend on how much padding a "
                "batch has, and none of its layers can be trained alone; "
                "leave it out",
                *(type(encoder).__name__, option),
            )
            return False
    return True


def _normalised(wavs, lengths):
    """Normalise each waveform by itself, as the wrapper does a single one."""
    outside = padding_mask(lengths, wavs.shape[1])
    count = lengths.clamp(min=1)[:, None]
    mean = wavs.sum(1, keepdim=True) / count
    rows = (wavs - mean).masked_fill(outside, 0.0)
    variance = rows.square().sum(1, keepdim=True) / count
    return rows * (variance + 1e-5).rsqrt()


class _Reached(Exception):
    """The stage up to which to run is reached."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden


def _stop(stage, args):
    raise _Reached(args[0])


class _ValidNorm:
    """Normalise every channel over an utterance's own steps alone.

    wav2vec 2.0 and HuBERT of size base normalise over time, padding and all.
    An object, not a closure: a deep copy of the module gets its own.
    """

    def __init__(self, lengths, conv):
        self.lengths = lengths
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]

    def __call__(self, norm, args, out):
        lengths = self.lengths.get(threading.get_ident())
        if lengths is None or norm.num_groups != norm.num_channels:
            return None
        x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        steps = (lengths - self.kernel) // self.stride + 1
        outside = padding_mask(steps, x.shape[2])[:, None]
        steps = steps.clamp(min=1)[:, None, None]
        mean = x.masked_fill(outside, 0.0).sum(2, keepdim=True) / steps
        x = (x - mean).masked_fill(outside, 0.0)
        variance = x.square().sum(2, keepdim=True) / steps
        x = x * (variance + norm.eps).rsqrt()
        x = x * norm.weight[:, None] + norm.bias[:, None]
        return x.to(out.dtype)
