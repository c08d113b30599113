"""The losses of speech translation and its auxiliary tasks."""

import torch
import torch.nn.functional as F

from speechbrain_taskarith.translation.losses.contrastive import (
    CrossModalContrastiveLoss,
)
from speechbrain_taskarith.translation.losses.distillation import (
    distillation_loss,
)
from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask


class TranslationObjective:
    """One loss a task, so that their sum is the paper's.

    | task | loss |
    |---|---|
    | `"st"` | `0.7 CE` |
    | `"asr"` | `0.3 (CTC + contrastive)` |
    | `"mt"` | CE with label smoothing 0.2 |

    `st + asr` is `L_ST = 0.7 CE + 0.3 (CTC + contrastive)` (arXiv
    2311.03810); apart, they can be weighted, and the auxiliary one stopped.
    The contrastive loss is the mean of two: where text is embedded, and at
    the textual encoder's output. Cross-entropy and CTC are
    `-log P(y | x)` in nats, averaged over the batch.

    Arguments
    ---------
    blank_index : int
        The blank of the CTC head.
    ce_weight : float
        Of the translation of speech; CTC and contrastive get the rest.
    st_smoothing : float
        Label smoothing of "st".
    mt_smoothing : float
        Label smoothing of "mt".
    temperature : float
        Of the contrastive loss.
    contrastive : float
        Factor of the contrastive loss; 0 leaves it out.
    distillation : float
        Factor of `distillation_loss` from "mt" to "st" where both are
        computed, as a part of "st"; 0 leaves it out.

    Example
    -------
    >>> from speechbrain_taskarith.translation.model import TranslationOutput
    >>> objective = TranslationObjective(blank_index=0)
    >>> out = TranslationOutput(None, None, None, torch.zeros(1, 2, 4))
    >>> losses = objective(
    ...     out, target_eos=torch.tensor([[1, 3]]), target_lens=torch.ones(1)
    ... )
    >>> {task: round(float(loss), 4) for task, loss in losses.items()}
    {'mt': 2.7726}
    """

    def __init__(
        self,
        blank_index,
        ce_weight=0.7,
        st_smoothing=0.1,
        mt_smoothing=0.2,
        temperature=0.1,
        contrastive=1.0,
        distillation=0.0,
    ):
        if not 0 < ce_weight <= 1:
            raise ValueError(f"ce_weight {ce_weight}: expected (0, 1]")
        self.blank_index = blank_index
        self.ce_weight = ce_weight
        self.st_smoothing, self.mt_smoothing = st_smoothing, mt_smoothing
        self.contrastive, self.distillation = contrastive, distillation
        self.contrast = CrossModalContrastiveLoss(temperature)

    def __call__(
        self,
        output,
        source=None,
        source_lens=None,
        target_eos=None,
        target_lens=None,
        tasks=None,
    ):
        """Return the loss of every task that was computed.

        Arguments
        ---------
        output : TranslationOutput
            Of `SpeechTranslationModel`.
        source : torch.Tensor, optional
            [B, U], transcripts, for "asr".
        source_lens : torch.Tensor, optional
            [B], relative lengths.
        target_eos : torch.Tensor, optional
            [B, W], translations with the end token, for "st" and "mt".
        target_lens : torch.Tensor, optional
            [B], relative lengths.
        tasks : sequence of str, optional
            Tasks to look at; those that the model was asked for by default.

        Returns
        -------
        dict of str: torch.Tensor
            A scalar for each task.
        """
        tasks = output.tasks if tasks is None else tasks
        losses = {}
        if "st" in tasks and output.st is not None:
            loss = cross_entropy(
                output.st, target_eos, target_lens, self.st_smoothing
            )
            losses["st"] = self.ce_weight * loss
            if self.distillation and output.mt is not None:
                losses["st"] = losses["st"] + self.distillation * (
                    distillation_loss(output.st, output.mt, target_lens)
                )
        if "asr" in tasks and output.speech is not None and source is not None:
            losses["asr"] = (1 - self.ce_weight) * self._asr(
                output, source, source_lens
            )
        if "mt" in tasks and output.mt is not None:
            losses["mt"] = cross_entropy(
                output.mt, target_eos, target_lens, self.mt_smoothing
            )
        return losses

    def _asr(self, output, source, source_lens):
        speech, text = output.speech, output.text
        loss = ctc(
            speech.logits,
            source,
            speech.frame_lens,
            source_lens,
            self.blank_index,
        )
        if self.contrastive and text is not None:
            apart = self.contrast(
                speech.embedded, speech.lens, text.embedded, text.lens
            ) + self.contrast(
                speech.encoded, speech.lens, text.encoded, text.lens
            )
            loss = loss + self.contrastive * apart / 2
        return loss


def cross_entropy(logits, targets, lens, smoothing=0.0):
    """Return `-log P(y | x)`, averaged over the batch.

    Arguments
    ---------
    logits : torch.Tensor
        [B, U, V].
    targets : torch.Tensor
        [B, U].
    lens : torch.Tensor
        [B], relative lengths.
    smoothing : float
        Label smoothing.

    Returns
    -------
    torch.Tensor
        A scalar in nats.

    Example
    -------
    >>> targets = torch.tensor([[1, 2]])
    >>> float(cross_entropy(torch.zeros(1, 2, 4), targets, torch.tensor([0.5])))
    1.386...
    """
    size = targets.shape[1]
    outside = padding_mask(absolute_lengths(lens, size), size)
    total = F.cross_entropy(
        logits.flatten(0, 1),
        targets.masked_fill(outside, -100).flatten(),
        label_smoothing=smoothing,
        reduction="sum",
    )
    return total / len(targets)


def ctc(logits, targets, lens, target_lens, blank_index):
    """Return CTC's `-log P(y | x)`, averaged over the batch.

    Utterances with fewer frames than their transcript needs count as 0, as
    in SpeechBrain.

    Arguments
    ---------
    logits : torch.Tensor
        [B, T, V].
    targets : torch.Tensor
        [B, U].
    lens, target_lens : torch.Tensor
        [B], relative lengths.
    blank_index : int
        The blank.

    Returns
    -------
    torch.Tensor
        A scalar in nats.

    Example
    -------
    >>> one = torch.ones(1)
    >>> float(ctc(torch.zeros(1, 1, 4), torch.tensor([[2]]), one, one, 0))
    1.386...
    """
    # Sums over alignments: in float32 at least.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        targets,
        absolute_lengths(lens, logits.shape[1]),
        absolute_lengths(target_lens, targets.shape[1]),
        blank=blank_index,
        reduction="sum",
        zero_infinity=True,
    )
    return total / len(targets)
