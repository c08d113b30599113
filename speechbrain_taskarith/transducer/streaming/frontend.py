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
    input_size : int
        Width of a frame.
    output_size : int
        Width after the projection.
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
        stacks = torch.div(
            frames + self.factor - 1, self.factor, rounding_mode="floor"
        )
        return x, stacks.double() / x.shape[1]
