"""The input layers of a streaming encoder: features and time reduction."""

import torch
from speechbrain.lobes.features import Fbank

from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask


class LocalFbank(Fbank):
    """SpeechBrain's log-mel features, each frame from its own samples alone.

    `Fbank` raises values more than 80 dB below the loudest frame of an
    utterance. A frame then depends on later ones, and the features of a stream
    differ from those of the file. This class only has a fixed floor.

    Arguments
    ---------
    **options : object
        Those of `speechbrain.lobes.features.Fbank`.

    Example
    -------
    >>> fbank = LocalFbank(sample_rate=16000, n_mels=40)
    >>> wave = torch.rand(1, 3200)
    >>> loud = torch.cat((wave, 1e4 * wave), dim=1)
    >>> bool(torch.allclose(fbank(wave)[:, :18], fbank(loud)[:, :18]))
    True
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.compute_fbanks.top_db = float("inf")


class TimeReduction(torch.nn.Module):
    """Stack neighbouring frames and project them: fewer and wider frames.

    The last stack of an utterance is filled up with zeros; padding is ignored.

    Arguments
    ---------
    input_size, output_size : int
        Width of a frame before stacking, and after the projection.
    factor : int
        Frames per stack.

    Example
    -------
    >>> reduce = TimeReduction(80, 512, factor=4)
    >>> x, lens = reduce(torch.rand(2, 10, 80), torch.tensor([1.0, 0.5]))
    >>> x.shape, lens.tolist()
    (torch.Size([2, 3, 512]), [1.0, 0.666...])
    """

    def __init__(self, input_size, output_size, factor=4):
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor {factor}: expected 1 or more frames")
        self.factor = factor
        self.linear = torch.nn.Linear(input_size * factor, output_size)

    def forward(self, x, lens=None):
        """Reduce the number of frames.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, input_size].
        lens : torch.Tensor or None
            [B], relative lengths; None takes all frames.

        Returns
        -------
        x : torch.Tensor
            [B, ceil(T / factor), output_size].
        lens : torch.Tensor
            [B], relative lengths of that, float64: exact when made absolute.
        """
        batch, time, width = x.shape
        frames = torch.full((batch,), time, device=x.device)
        if lens is not None:
            frames = absolute_lengths(lens, time).to(x.device)
            x = x.masked_fill(padding_mask(frames, time)[..., None], 0.0)
        x = torch.nn.functional.pad(x, (0, 0, 0, -time % self.factor))
        x = self.linear(x.reshape(batch, -1, width * self.factor))
        stacks = (frames + self.factor - 1) // self.factor
        return x, stacks.double() / x.shape[1]


class FeatureStream:
    """Turns portions of samples into the frames of the whole recording.

    `features(wave[1, T]) -> [1, frames, width]` is centred, pads its edges and
    does not normalise over the utterance: frame i is centred on sample
    `i * stride` and depends on `window` samples. A slice that begins at a
    multiple of the stride has the same frames as the whole, except for those at
    its edges; slices overlap, and these are dropped.
    """

    def __init__(self, features, window, stride):
        self.features = features
        self.stride = stride
        self.half = window // 2
        # Frames on each side that a cut may have changed: of an odd window
        # the larger half is before the centre.
        self.edge = -(-(window - self.half) // stride)
        self.samples = torch.zeros(0)
        self.offset = 0  # position of self.samples in the stream
        self.returned = 0  # frames
        self.total = 0  # samples received

    def push(self, samples):
        """Add samples [t]; return the frames certain now, or None."""
        self.samples = torch.cat((self.samples.to(samples), samples))
        self.total += len(samples)
        # The last frame whose window is complete.
        certain = (self.total - self.half) // self.stride + 1
        return self._frames(max(0, certain), last=False)

    def finish(self):
        """Return the remaining frames, or None."""
        if not self.total:
            return None
        return self._frames(self.total // self.stride + 1, last=True)

    def _frames(self, until, last):
        if until <= self.returned:
            return None
        first = max(0, self.returned - self.edge)
        start = first * self.stride - self.offset
        # Frames after the last certain one would be dropped.
        stop = (until - 1) * self.stride + self.half - self.offset + 1
        stop = None if last else stop
        frames = self.features(self.samples[None, start:stop])
        frames = frames[:, self.returned - first : until - first]
        self.returned = until
        drop = max(0, until - self.edge) * self.stride - self.offset
        self.samples = self.samples[drop:]
        self.offset += drop
        return frames
