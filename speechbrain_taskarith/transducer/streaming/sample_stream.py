"""Features of a stream, equal to those of the whole recording."""

import torch


class FeatureStream:
    """Turn samples that come in any portions into frames.

    Frame i is centred on sample `i * stride` and depends on `window` samples.
    Slices that begin at a multiple of the stride and overlap by the window
    give the same frames as the whole does, once those at their cut edges are
    dropped.

    Arguments
    ---------
    features : callable
        `features(wave[1, T]) -> [1, frames, width]`, centred, padding its
        edges; a function of `window` samples a frame (no normalisation over
        the utterance).
    window : int
        Samples that a frame depends on.
    stride : int
        Samples between frames.

    Example
    -------
    >>> from speechbrain_taskarith.transducer import LocalFbank
    >>> fbank, wave = LocalFbank(), torch.rand(1, 5000)
    >>> stream = FeatureStream(fbank, window=400, stride=160)
    >>> parts = [stream.push(part) for part in wave[0].split(700)]
    >>> parts.append(stream.finish())
    >>> parts = torch.cat([part for part in parts if part is not None], 1)
    >>> bool(torch.allclose(parts, fbank(wave), atol=1e-4))
    True
    """

    def __init__(self, features, window, stride):
        if window < 1 or stride < 1:
            raise ValueError(
                f"window {window}, stride {stride}: expected samples, 1 or more"
            )
        self.features = features
        self.stride = stride
        self.half = window // 2
        # Frames on each side that a cut may have changed.
        self.edge = -(-self.half // stride)
        self.samples = torch.zeros(0)
        self.offset = 0  # of self.samples in the stream
        self.done = 0  # frames given out
        self.total = 0  # samples that came in

    def push(self, samples):
        """Take samples.

        Arguments
        ---------
        samples : torch.Tensor
            [t], any number.

        Returns
        -------
        torch.Tensor or None
            [1, frames, width] that are certain now; None where there is none.
        """
        self.samples = torch.cat((self.samples.to(samples), samples))
        self.total += len(samples)
        # The last frame whose window has come in.
        certain = (self.total - self.half) // self.stride + 1
        return self._frames(max(0, certain), last=False)

    def finish(self):
        """End the stream.

        Returns
        -------
        torch.Tensor or None
            [1, frames, width], the rest.
        """
        if not self.total:
            return None
        return self._frames(self.total // self.stride + 1, last=True)

    def _frames(self, until, last):
        if until <= self.done:
            return None
        first = max(0, self.done - self.edge)
        start = first * self.stride - self.offset
        stop = len(self.samples)
        if not last:
            # Up to what the last certain frame needs, and one edge more would
            # be dropped anyway.
            stop = (until - 1) * self.stride + self.half - self.offset + 1
            stop = min(stop, len(self.samples))
        found = self.features(self.samples[None, start:stop])
        found = found[:, self.done - first : until - first]
        self.done = until
        drop = max(0, until - self.edge) * self.stride - self.offset
        self.samples = self.samples[drop:]
        self.offset += drop
        return found
