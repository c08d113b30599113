"""Speech and its transcript close together, others apart."""

import torch
import torch.nn.functional as F

from speechbrain_taskarith.translation.losses.gathering import (
    gather_rows,
    processes,
)
from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask


class CrossModalContrastiveLoss(torch.nn.Module):
    """InfoNCE between speech and text, over the batches of all processes.

    `-log exp(cos(s_i, t_i) / tau) / sum_j exp(cos(s_i, t_j) / tau)`, with
    the means s and t over the valid frames and tokens (arXiv 2311.03810,
    after Ye et al. 2022, arXiv 2205.02444).

    Under DDP the texts of all processes are negatives, and losses are scaled
    so that the averaged gradient is that of one process with all utterances,
    also when batches differ in size. One utterance alone has no negative: its
    loss is 0.

    Arguments
    ---------
    temperature : float
        tau.
    detach_text : bool
        True: text gets no gradient; speech moves towards it.
    symmetric : bool
        True: the mean with the loss that finds speech for a text.
    gather : bool
        False: negatives of this process only.

    Example
    -------
    >>> loss = CrossModalContrastiveLoss(temperature=0.1)
    >>> speech, text = torch.eye(2)[:, None], torch.eye(2)[:, None]
    >>> float(loss(speech, torch.ones(2), text, torch.ones(2)))
    4.5...e-05
    """

    def __init__(
        self, temperature=0.1, detach_text=True, symmetric=False, gather=True
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: expected above 0")
        self.temperature = temperature
        self.detach_text = detach_text
        self.symmetric = symmetric
        self.gather = gather

    def forward(self, speech, speech_lens, text, text_lens):
        """Compare a batch of speech with its transcripts.

        Arguments
        ---------
        speech : torch.Tensor
            [B, S, d].
        speech_lens : torch.Tensor
            [B], relative lengths.
        text : torch.Tensor
            [B, U, d].
        text_lens : torch.Tensor
            [B], relative lengths.

        Returns
        -------
        torch.Tensor
            A scalar in nats, the mean over utterances.

        Raises
        ------
        ValueError
            Another number of texts, or another width.
        """
        if len(speech) != len(text) or speech.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"{tuple(speech.shape)} of speech, {tuple(text.shape)} of "
                "text: expected a transcript for every utterance, in vectors "
                "of the same width"
            )
        if self.detach_text:
            text = text.detach()
        speech = F.normalize(masked_mean(speech, speech_lens), dim=-1)
        text = F.normalize(masked_mean(text, text_lens), dim=-1)
        loss = self._find(speech, text)
        if self.symmetric:
            loss = (loss + self._find(text, speech)) / 2
        return loss

    def _find(self, queries, keys):
        first, share = 0, 1.0
        if self.gather and processes() > 1:
            keys, first = gather_rows(keys)
            # DDP averages over processes, not over utterances.
            share = len(queries) * processes() / len(keys)
        scores = queries @ keys.T / self.temperature
        own = torch.arange(len(queries), device=keys.device) + first
        return share * F.cross_entropy(scores, own)


def masked_mean(x, lens):
    """Average over what is not padding.

    Arguments
    ---------
    x : torch.Tensor
        [B, S, d]; padding may hold anything, also NaN.
    lens : torch.Tensor
        [B], relative lengths.

    Returns
    -------
    torch.Tensor
        [B, d].

    Example
    -------
    >>> x = torch.tensor([[[1.0], [3.0], [float("nan")]]])
    >>> masked_mean(x, torch.tensor([2 / 3])).tolist()
    [[2.0]]
    """
    lengths = absolute_lengths(lens, x.shape[1])
    outside = padding_mask(lengths, x.shape[1])[..., None]
    total = x.masked_fill(outside, 0.0).sum(1)
    return total / lengths.clamp(min=1).to(x.dtype)[:, None]
