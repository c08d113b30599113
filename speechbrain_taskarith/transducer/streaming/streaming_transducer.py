"""A streaming recogniser: chunks of samples in, partial text out."""

import copy
import math
import time
import warnings
from dataclasses import dataclass

import torch

from speechbrain_taskarith.transducer.streaming.frontend import FeatureStream
from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    without_padding,
)

_STATISTICS = ("count", "glob_mean", "glob_std")


@dataclass(frozen=True)
class PartialResult:
    """The result of a stream so far.

    Arguments
    ---------
    text : str
        Text of the whole stream; a beam search may still change its end.
    tokens : list of int
        Its labels.
    frames : list of int
        The encoder frame at which each label was emitted.
    seconds : float
        Duration of the audio received.
    compute_seconds : float
        Time spent on computing, search results and text included.
    final : bool
        True at the end of the stream.

    Example
    -------
    >>> PartialResult("one", [1], [7], 2.0, 0.5, False).real_time_factor
    0.25
    """

    text: str
    tokens: list
    frames: list
    seconds: float
    compute_seconds: float
    final: bool

    @property
    def real_time_factor(self):
        """Computing time per second of audio; real time needs less than 1."""
        return self.compute_seconds / self.seconds if self.seconds else 0.0


class StreamingTransducer(torch.nn.Module):
    """Features, encoder, predictor and joint as one streaming recogniser.

    A stream has the same encoder output, and so the same text, as the whole
    recording; `transcribe` is the oracle of `stream`.

    Arguments
    ---------
    features : torch.nn.Module
        `features(wave[B, T]) -> [B, frames, width]` with
        `get_filter_properties()`, e.g. `LocalFbank`.
    encoder : torch.nn.Module
        `Emformer`, `ChunkedEncoder`, or one with their methods.
    searcher : torch.nn.Module
        `TransducerBeamSearch` or `TransducerGreedySearch`.
    detokenize : callable
        Takes a list of label indices, returns text.
    sample_rate : int
        Of the samples, in Hz.
    normalize : torch.nn.Module or None
        `normalize(features, lens)`: SpeechBrain's `InputNormalization` with
        `norm_type: global`. Others need the whole utterance.
    frontend : torch.nn.Module or None
        `TimeReduction`, or a module with its `factor`.

    Example
    -------
    >>> from speechbrain_taskarith import transducer
    >>> predictor = transducer.LSTMPredictor(5, 4, 6, num_layers=1)
    >>> joint = transducer.RNNTJoint(16, 6, 8, 5)
    >>> model = StreamingTransducer(
    ...     transducer.LocalFbank(n_mels=20),
    ...     transducer.Emformer(16, 4, 32, 2, 4, 1, 8),
    ...     transducer.TransducerGreedySearch(predictor, joint, 0),
    ...     detokenize=lambda tokens: " ".join(map(str, tokens)),
    ...     frontend=transducer.TimeReduction(20, 16, factor=4),
    ... ).eval()
    >>> wave = torch.randn(8000)
    >>> stream = model.stream()
    >>> for samples in wave.split(800):
    ...     partial = stream.feed(samples)
    >>> stream.finish().text == model.transcribe(wave)
    True
    >>> round(model.latency()["algorithmic"], 4)
    0.2125
    """

    def __init__(
        self,
        features,
        encoder,
        searcher,
        detokenize,
        sample_rate=16000,
        normalize=None,
        frontend=None,
    ):
        super().__init__()
        norm_type = getattr(normalize, "norm_type", "global")
        if norm_type != "global":
            raise ValueError(
                f"normalize with norm_type {norm_type!r} needs the whole "
                "utterance; a stream needs 'global'"
            )
        for name in ("deltas", "context"):
            if getattr(features, name, False):
                raise ValueError(
                    f"features with {name}=True: a frame then has values of "
                    "its neighbours, which a stream does not wait for; make "
                    f"them with {name}=False"
                )
        floor = getattr(features, "compute_fbanks", None)
        if math.isfinite(getattr(floor, "top_db", math.inf)):
            warnings.warn(
                f"{type(features).__name__} raises what is {floor.top_db} dB "
                "below the loudest frame, which a stream has not heard yet: "
                "it may differ from `transcribe`. LocalFbank does not",
                stacklevel=2,
            )
        properties = features.get_filter_properties()
        self.features = features
        self.encoder = encoder
        self.searcher = searcher
        self.detokenize = detokenize
        self.sample_rate = sample_rate
        self.normalize = normalize
        self.frontend = frontend
        self.window = properties.window_size
        self.stride = properties.stride
        self.factor = getattr(frontend, "factor", 1)

    # SpeechBrain keeps a normaliser's statistics as plain attributes. Here they
    # are tensors among the weights, so that one file is the recogniser.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.normalize is not None:
            for name in _STATISTICS:
                value = torch.as_tensor(getattr(self.normalize, name))
                destination[f"{prefix}normalize.{name}"] = value.detach()

    def _load_from_state_dict(self, state_dict, prefix, *options):
        missing, errors = options[2], options[4]
        # As earlier versions stored them.
        old = state_dict.pop(f"{prefix}_extra_state", None) or {}
        keys = {name: f"{prefix}normalize.{name}" for name in _STATISTICS}
        found = {
            n: state_dict.pop(k) for n, k in keys.items() if k in state_dict
        }
        found = {**old, **found}
        super()._load_from_state_dict(state_dict, prefix, *options)
        if self.normalize is None and found:
            errors.append(
                "weights of a model with a normaliser; build this one alike"
            )
        elif self.normalize is not None:
            missing += [keys[name] for name in _STATISTICS if name not in found]
            device = next(self.encoder.parameters()).device
            for name, value in found.items():
                value = torch.as_tensor(value)
                value = (
                    int(value)
                    if name == "count"
                    else value.to(device, copy=True)
                )
                setattr(self.normalize, name, value)

    def _apply(self, fn, *options):
        super()._apply(fn, *options)
        # Spectra and statistics are not for half precision.
        self.features.float()
        device = next(self.encoder.parameters()).device
        for name in _STATISTICS[1:] if self.normalize is not None else ():
            value = getattr(self.normalize, name)
            setattr(self.normalize, name, value.to(device))
        return self

    def frame_seconds(self):
        """Return the seconds of an encoder frame, as `latency` counts them."""
        return self.stride * self.factor / self.sample_rate

    def latency(self):
        """Return the algorithmic latency.

        Returns
        -------
        dict of str: float
            In seconds: `segment`, collected before it is encoded;
            `look_ahead` of the encoder; `features`, half a window;
            `algorithmic`, their sum: how long the first sample of a segment
            waits, computing time not included.
        """
        frame = self.frame_seconds()
        parts = {
            "segment": self.encoder.segment_length * frame,
            "look_ahead": self.encoder.right_context * frame,
            "features": self.window / 2 / self.sample_rate,
        }
        return {**parts, "algorithmic": sum(parts.values())}

    @torch.no_grad()
    def encode(self, waves, lens=None):
        """Encode whole recordings.

        Arguments
        ---------
        waves : torch.Tensor
            [B, T], on any device; padding is ignored, even NaN.
        lens : torch.Tensor or None
            [B], relative lengths.

        Returns
        -------
        encoder_out : torch.Tensor
            [B, frames, E].
        lens : torch.Tensor
            [B], relative lengths of that.
        """
        self._require_evaluation()
        waves = waves.to(next(self.encoder.parameters()).device)
        if lens is None:
            lens = torch.ones(len(waves))
        lens = lens.to(waves.device)
        x = self.features(without_padding(waves, lens))
        samples = absolute_lengths(lens, waves.shape[1])
        # A centred analysis gives one frame more than strides.
        frames = (samples // self.stride + 1).double()
        lens = (frames / x.shape[1]).clamp(max=1.0)
        if self.normalize is not None:
            x = self.normalize(x, lens)
        x = x.to(self._dtype())
        if self.frontend is not None:
            x, lens = self.frontend(x, lens)
        return self.encoder(x, lens), lens

    @torch.no_grad()
    def transcribe(self, wave):
        """Recognise a whole recording, without streaming.

        Arguments
        ---------
        wave : torch.Tensor
            [T], at the model's sample rate; as of `Stream.feed`.

        Returns
        -------
        str
            The text.
        """
        self._require_evaluation()
        wave = _checked_samples(wave, self.sample_rate, self.sample_rate)
        if not len(wave):
            return ""
        encoder_out, lens = self.encode(wave[None])
        found = self.searcher.decode(encoder_out, lens)
        return self.detokenize(found[0][0].tokens)

    def quantize(self, dtype="int8"):
        """Return a smaller copy; this model stays as it is.

        Features and normaliser stay in float32. Rounding is not the same in a
        stream and in the whole recording, so that their texts may differ
        where two labels are nearly as likely. Measure the copy's WER.

        Arguments
        ---------
        dtype : str
            `"int8"`: weights of linear layers and LSTMs, a quarter of their
            size, multiplied by activations that are rounded as they come. For
            CPUs, and not to be trained. `"bf16"`: all networks in bfloat16,
            half the size, on any device.

        Returns
        -------
        StreamingTransducer

        Raises
        ------
        ValueError
            Another `dtype`, or int8 for a model that is not on the CPU or not
            in float32.

        Example
        -------
        >>> from speechbrain_taskarith import transducer
        >>> predictor = transducer.LSTMPredictor(5, 4, 6, num_layers=1)
        >>> model = StreamingTransducer(
        ...     transducer.LocalFbank(n_mels=16),
        ...     transducer.Emformer(16, 4, 32, 2, 4, 1, 8),
        ...     transducer.TransducerGreedySearch(
        ...         predictor, transducer.RNNTJoint(16, 6, 8, 5), 0
        ...     ),
        ...     detokenize=str,
        ... ).eval()
        >>> small = model.quantize("bf16")
        >>> small.encode(torch.randn(1, 8000))[0].dtype
        torch.bfloat16
        """
        if dtype == "bf16":
            return copy.deepcopy(self).bfloat16()
        if dtype != "int8":
            raise ValueError(f"dtype={dtype!r}: expected 'int8' or 'bf16'")
        weight = next(self.encoder.parameters())
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(
                f"the model is {weight.dtype} on {weight.device}; int8 is for "
                "float32 on the CPU: move it there first"
            )
        with warnings.catch_warnings():
            # Its successor, torchao, has no LSTM.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.ao.quantization.quantize_dynamic(
                copy.deepcopy(self), {torch.nn.Linear, torch.nn.LSTM}
            )

    def _dtype(self):
        return next(self.encoder.parameters()).dtype

    def stream(self):
        """Start a stream. Several streams may share the model.

        Returns
        -------
        Stream
            With `feed` and `finish`.
        """
        self._require_evaluation()
        return Stream(self)

    def _require_evaluation(self):
        if self.training:
            raise RuntimeError(
                "the model is in training mode: dropout and running "
                "statistics would be active; call .eval() first"
            )


class Stream:
    """One stream of samples, made by `StreamingTransducer.stream`."""

    def __init__(self, model):
        self.model = model
        self.device = next(model.encoder.parameters()).device
        self.source = FeatureStream(self._features, model.window, model.stride)
        self.context = model.encoder.make_streaming_context(1)
        self.state = model.searcher.start(1, self.device)
        self.frames = None  # an incomplete stack
        self.encoder_in = None  # an incomplete segment
        self.compute_seconds = 0.0
        self.best = None  # text, tokens, frames of the segments so far
        self.ended = False

    def feed(self, samples, sample_rate=None):
        """Process samples [t], t >= 0; return the `PartialResult` so far.

        A tensor or NumPy array of floating point within [-1, 1], or of int16 as
        a microphone gives them (divided by 32768), at the model's rate: a
        `sample_rate` in Hz is checked. A ValueError refuses another rate,
        another shape and NaN, a RuntimeError all samples after the end.
        """
        return self._process(samples, sample_rate, final=False)

    def finish(self):
        """End the stream; return its final `PartialResult`."""
        return self._process(torch.zeros(0), None, final=True)

    @torch.no_grad()
    def _process(self, samples, sample_rate, final):
        if self.ended:
            raise RuntimeError("this stream has ended; start another")
        samples = _checked_samples(samples, sample_rate, self.model.sample_rate)
        began = time.perf_counter()
        new = self.source.push(samples.to(self.device))
        self.frames = _appended(self.frames, new)
        if final:
            self.frames = _appended(self.frames, self.source.finish())
        self._reduce(final)
        if self._encode(final) or self.best is None:
            best = self.model.searcher.results(self.state)[0][0]
            text = self.model.detokenize(best.tokens)
            self.best = text, best.tokens, best.frames
        self.ended = final
        self.compute_seconds += time.perf_counter() - began
        text, tokens, frames = self.best
        return PartialResult(
            text,
            list(tokens),
            list(frames),
            self.source.total / self.model.sample_rate,
            self.compute_seconds,
            final,
        )

    def _features(self, wave):
        x = self.model.features(wave)
        if self.model.normalize is not None:
            x = self.model.normalize(x, torch.ones(1, device=x.device))
        return x.to(self.model._dtype())

    def _reduce(self, final):
        """Turn complete stacks of frames into the encoder's input."""
        count = 0 if self.frames is None else self.frames.shape[1]
        if not final:
            count -= count % self.model.factor
        if count:
            stacks, self.frames = self.frames[:, :count], self.frames[:, count:]
            if self.model.frontend is not None:
                stacks, _ = self.model.frontend(stacks)
            self.encoder_in = _appended(self.encoder_in, stacks)

    def _encode(self, final):
        """Encode and search complete segments; tell whether there were any."""
        encoder = self.model.encoder
        size, ahead = encoder.segment_length, encoder.right_context
        needed, any_new = 1 if final else size + ahead, False
        while (
            self.encoder_in is not None and self.encoder_in.shape[1] >= needed
        ):
            chunk = self.encoder_in[:, : size + ahead]
            out = encoder.forward_streaming(chunk, self.context)
            self.state = self.model.searcher.advance(out, self.state)
            self.encoder_in = self.encoder_in[:, size:]
            any_new = True
        return any_new


def _checked_samples(samples, sample_rate, expected_rate):
    """Return samples as float32 [t]; refuse what would be misrecognised."""
    if sample_rate is not None and sample_rate != expected_rate:
        raise ValueError(
            f"samples at {sample_rate} Hz, the model takes {expected_rate} Hz; "
            "resample them (speechbrain_taskarith.data.audio.resample_wave)"
        )
    samples = torch.as_tensor(samples)
    if samples.dim() == 2 and len(samples) == 1:
        samples = samples[0]
    if samples.dim() != 1:
        raise ValueError(
            f"samples of shape {tuple(samples.shape)}: expected one channel [t]"
        )
    if samples.dtype == torch.int16:
        return samples / 32768.0
    if not samples.is_floating_point():
        raise ValueError(
            f"samples of type {samples.dtype}: expected floating point within "
            "[-1, 1], or int16"
        )
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("samples hold NaN or infinity")
    return samples.float()


def _appended(old, new):
    if old is None or new is None:
        return old if new is None else new
    return torch.cat((old, new), 1)
