"""The losses of speech translation and its auxiliary tasks."""

import logging
import math

import torch
import torch.nn.functional as F

from speechbrain_taskarith.translation.distributed import (
    gather_rows,
    names_of_all,
    process_count,
)
from speechbrain_taskarith.translation.input_guard import utterance_name
from speechbrain_taskarith.translation.model import TextEncoding
from speechbrain_taskarith.translation.multitask.ctc_loss import ctc_loss
from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask

logger = logging.getLogger(__name__)
# Utterances named in the log.
MOST_NAMED = 20


class CrossModalContrastiveLoss(torch.nn.Module):
    """InfoNCE between speech and text, over the batches of all processes.

    Called with speech [B, S, d], relative lengths [B], text [B, U, d] and its
    lengths [B], it returns a scalar in nats, the mean over utterances. Padding
    is ignored, even NaN; other numbers or widths of text are a `ValueError`.

    Called with the transcripts' labels [B, W] and their relative lengths [B]
    as well, it leaves the other utterances of the same transcript out of the
    sum: they are no negatives. Without them every other text is one, as in the
    authors' code.

    `-log exp(cos(s_i, t_i) / tau) / sum_j exp(cos(s_i, t_j) / tau)`, with
    the means s and t over the valid frames and tokens (arXiv 2311.03810,
    after Ye et al. 2022, arXiv 2205.02444).

    Under DDP the texts of all processes are negatives, and losses are scaled
    so that the averaged gradient is that of one process with all utterances,
    also when batches differ in size. All of them have to call it: one without
    utterances with 0 rows, whose loss is 0 and counts in the average. One
    utterance alone has no negative: its loss is 0.

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

    def forward(
        self, speech, speech_lens, text, text_lens, labels=None, label_lens=None
    ):
        """Return the loss of a batch, see `CrossModalContrastiveLoss`."""
        if len(speech) != len(text) or speech.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"{tuple(speech.shape)} of speech, {tuple(text.shape)} of "
                "text: expected a transcript for every utterance, in vectors "
                "of the same width"
            )
        if self.detach_text:
            text = text.detach()
        speech = F.normalize(_masked_mean(speech, speech_lens), dim=-1)
        text = F.normalize(_masked_mean(text, text_lens), dim=-1)
        own = None
        if labels is not None:
            lengths = absolute_lengths(label_lens, labels.shape[1])
            # 0 behind the last label, as `gather_rows` pads.
            outside = padding_mask(lengths, labels.shape[1])
            own = (labels + 1).masked_fill(outside, 0)
        loss = self._retrieve(speech, text, own)
        if self.symmetric:
            loss = (loss + self._retrieve(text, speech, own)) / 2
        return loss

    def _retrieve(self, queries, keys, own):
        first, share, labels = 0, 1.0, own
        if self.gather and _processes_train():
            keys, first, holders = gather_rows(keys)
            # DDP averages over processes, not over utterances.
            share = len(queries) * holders / max(1, len(keys))
            if own is not None:
                labels, *_ = gather_rows(own)
        if not len(queries):
            # Of the graph: the backward pass of the others may need it.
            return keys[:0].sum()
        scores = queries @ keys.T / self.temperature
        matches = torch.arange(len(queries), device=keys.device) + first
        if own is not None:
            own = F.pad(own, (0, labels.shape[1] - own.shape[1]))
            same = (own[:, None] == labels).all(-1)
            same = same.scatter(1, matches[:, None], False)
            scores = scores.masked_fill(same, -math.inf)
        return share * F.cross_entropy(scores, matches)


def _processes_train():
    """Whether several processes do this: one of them may evaluate alone."""
    return torch.is_grad_enabled() and process_count() > 1


def _masked_mean(x, lens):
    # A sum over a thousand frames is too large for float16.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    lengths = absolute_lengths(lens, x.shape[1])
    outside = padding_mask(lengths, x.shape[1])[..., None]
    total = x.masked_fill(outside, 0.0).sum(1)
    return total / lengths.clamp(min=1).to(x.dtype)[:, None]


def distillation_loss(student, teacher, lens, temperature=1.0):
    """Return the divergence of a student's words from a teacher's.

    `tau^2 KL(teacher || student)` at temperature tau (Hinton et al. 2015,
    arXiv 1503.02531), as a mean over tokens. The teacher gets no gradient.

    Arguments
    ---------
    student, teacher : torch.Tensor
        [B, U, V], logits or log-probabilities of speech translation and of
        text translation, for the same prefixes; else a `ValueError`.
    lens : torch.Tensor
        [B], relative lengths on the axis U.
    temperature : float
        tau.

    Returns
    -------
    torch.Tensor
        A scalar in nats.

    Example
    -------
    >>> scores = torch.randn(2, 3, 5)
    >>> float(distillation_loss(scores, scores + 1.0, torch.ones(2)).abs()) < 1e-6
    True
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}: "
            "expected the same targets and the same vocabulary"
        )
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    size = student.shape[1]
    outside = padding_mask(absolute_lengths(lens, size), size)
    total = divergence.masked_fill(outside, 0.0).sum()
    return temperature**2 * total / (~outside).sum()


class TranslationObjective:
    """One loss a task: `L_ST + w_asr L_asr + w_mt L_mt` is the whole.

    The losses (arXiv 2311.03810):

    - `"st"`: `L_ST = 0.7 CE + 0.3 (CTC + contrastive)`;
    - `"asr"`: `CTC + contrastive`;
    - `"mt"`: CE with label smoothing 0.2.

    Where an auxiliary task stops, only its own term goes:
    the main loss keeps CTC, without which the head decays and the shrink with
    it. The contrastive loss is the mean of two: where text is embedded, and at
    the textual encoder's output. Cross-entropy and CTC are
    `-log P(y | x)` in nats, averaged over the batch. CTC has no path for a
    transcript with more labels (and one more for each repetition) than there
    are frames: such an utterance has a CTC loss of 0, and is named in the log.

    Arguments
    ---------
    blank_index : int
        The blank of the CTC head; `ValueError` at the first batch if the
        model shrinks by another, or its noise writes another.
    ce_weight : float
        Of the translation of speech; CTC and contrastive get the rest. 1: no
        CTC in `"st"`, for speech without transcripts.
    st_smoothing, mt_smoothing : float
        Label smoothing of "st" and "mt".
    temperature : float
        Of the contrastive loss.
    contrastive, distillation : float
        Factors of the contrastive loss, and of `distillation_loss` from "mt"
        to "st" where both are computed, as a part of "st"; 0 leaves it out.
    ctc_in_st : bool
        False: `L_ST` is split, "st" is `0.7 CE` and "asr"
        `0.3 (CTC + contrastive)`; nothing trains the CTC head once "asr" has
        stopped.
    repeated_negatives : bool
        True: utterances of the same transcript are negatives of one another,
        as in the authors' code. No training can tell them apart: with k of
        them in a batch the contrastive loss of each is log k or more.

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
        ctc_in_st=True,
        repeated_negatives=False,
    ):
        if not 0 < ce_weight <= 1:
            raise ValueError(f"ce_weight {ce_weight}: expected (0, 1]")
        self.blank_index = blank_index
        self.ce_weight = ce_weight
        self.st_smoothing, self.mt_smoothing = st_smoothing, mt_smoothing
        self.contrastive, self.distillation = contrastive, distillation
        self.ctc_in_st = ctc_in_st
        self.repeated_negatives = repeated_negatives
        self.contrast = CrossModalContrastiveLoss(temperature)
        self._warned = set()

    @property
    def st_needs_source(self):
        """Whether the loss of "st" needs transcripts."""
        return self.ctc_in_st and self.ce_weight < 1

    def __call__(
        self,
        output,
        source=None,
        source_lens=None,
        target_eos=None,
        target_lens=None,
        tasks=None,
        ids=None,
    ):
        """Return the loss of every task that was computed.

        Arguments
        ---------
        output : TranslationOutput
            Of `SpeechTranslationModel`.
        source, source_lens : torch.Tensor, optional
            As for the model, for "asr" and, unless `ce_weight` is 1, "st".
        target_eos, target_lens : torch.Tensor, optional
            [B, W], translations with the end token, and their relative
            lengths [B], for "st" and "mt".
        tasks : sequence of str, optional
            Tasks to compute; by default those that the model computed.
        ids : sequence of str, optional
            The utterances' names, for warnings.

        Returns
        -------
        dict of str: torch.Tensor
            A scalar for each task.
        """
        tasks = output.tasks if tasks is None else tasks
        st, mt, losses = output.st, output.mt, {}
        aligned = None
        needed = self._needs_aligned(tasks, output, source)
        if needed:
            aligned = self._ctc(output.speech, source, source_lens, ids)
        if self.contrastive:
            contrast = self._contrast(output, needed, source, source_lens)
            if needed:
                aligned = aligned + self.contrastive * contrast
        if "st" in tasks and st is not None:
            losses["st"] = self.ce_weight * _cross_entropy(
                st, target_eos, target_lens, self.st_smoothing
            )
            if self.st_needs_source:
                losses["st"] = losses["st"] + (1 - self.ce_weight) * aligned
            if self.distillation and mt is None and st.requires_grad:
                self._warn_once(
                    "distillation",
                    f"distillation={self.distillation:g} does nothing in a "
                    "batch without 'mt', its teacher, and nothing at all once "
                    "that task has stopped",
                )
            if self.distillation and mt is not None:
                distilled = distillation_loss(st, mt, target_lens)
                losses["st"] = losses["st"] + self.distillation * distilled
        if "asr" in tasks and aligned is not None:
            share = 1 if self.ctc_in_st else 1 - self.ce_weight
            losses["asr"] = share * aligned
        if "mt" in tasks and mt is not None:
            losses["mt"] = _cross_entropy(
                mt, target_eos, target_lens, self.mt_smoothing
            )
        return losses

    def _needs_aligned(self, tasks, output, source):
        """Tell whether a task needs CTC; refuse "st" without transcripts."""
        st = "st" in tasks and output.st is not None and self.st_needs_source
        if st and source is None:
            raise ValueError(
                "'st' needs source and source_lens: its loss holds "
                f"{1 - self.ce_weight:g} (CTC + contrastive). For speech "
                "without transcripts use TranslationObjective(ce_weight=1)"
            )
        asr = "asr" in tasks and output.speech is not None
        return st or (asr and source is not None)

    def _ctc(self, speech, source, source_lens, ids):
        if speech.blank_index not in (None, self.blank_index):
            raise ValueError(
                f"TranslationObjective(blank_index={self.blank_index}), but "
                f"the model's blank is {speech.blank_index} (CTCShrink, "
                "BlankNoise): give all of them the CTC head's"
            )
        # CTC sums over alignments: in float32 at least.
        dtype = torch.promote_types(speech.logits.dtype, torch.float32)
        logits = speech.logits.to(dtype)
        frames = absolute_lengths(speech.frame_lens, logits.shape[1])
        words = absolute_lengths(source_lens, source.shape[1])
        # One transfer; `ctc_loss` takes lengths from the host.
        on_host = torch.stack(
            [frames, words, _least_frames(source, words)]
        ).cpu()
        loss = ctc_loss(
            *(logits, source, frames, words, self.blank_index), on_host[:2]
        )
        frames, words, least = on_host
        for row in (frames < least).nonzero().flatten().tolist():
            name = utterance_name(row, ids)
            many = len(self._warned) >= MOST_NAMED
            self._warn_once(
                "more" if many else name,
                "more transcripts have no path of CTC: no more are named"
                if many
                else f"{name}: CTC needs {int(least[row])} frames for its "
                f"transcript of {int(words[row])} labels, and there are "
                f"{int(frames[row])}: its CTC loss is 0. Use fewer labels "
                "(pieces, not characters) or shorter frames, or remove it",
            )
        return loss.sum() / len(source)

    def _contrast(self, output, needed, source, source_lens):
        """Return the contrastive loss; it gathers the texts of all processes.

        A process that has none of its own (a batch of text, say) takes part
        without utterances: the others would wait for it.
        """
        speech, text = output.speech, output.text
        own = needed and text is not None
        together = _processes_train()
        if not (names_of_all(["own"] * own) if together else own):
            return 0.0
        if not own:
            logits = (output.st, output.mt, getattr(speech, "logits", None))
            device = next(x.device for x in logits if x is not None)
            none = torch.zeros(0, 1, 1, device=device)
            source, source_lens = none[..., 0].long(), none[:, 0, 0]
            speech = text = TextEncoding(none, none, source_lens)
        # The transcripts as they are: noise would make equal ones differ.
        known = () if self.repeated_negatives else (source, source_lens)
        return (
            self.contrast(
                *(speech.embedded, speech.lens, text.embedded, text.lens),
                *known,
            )
            + self.contrast(
                *(speech.encoded, speech.lens, text.encoded, text.lens), *known
            )
        ) / 2

    def _warn_once(self, what, message):
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(message)


def _least_frames(labels, lengths):
    """Return the frames CTC needs: a blank parts a label from its like."""
    inside = ~padding_mask(lengths, labels.shape[1])
    repeated = (labels[:, 1:] == labels[:, :-1]) & inside[:, 1:]
    return lengths + repeated.sum(1)


def _cross_entropy(logits, targets, lens, smoothing):
    """Return `-log P(y | x)` in nats, averaged over the batch."""
    size = targets.shape[1]
    outside = padding_mask(absolute_lengths(lens, size), size)
    total = F.cross_entropy(
        logits.flatten(0, 1),
        targets.masked_fill(outside, -100).flatten(),
        label_smoothing=smoothing,
        reduction="sum",
    )
    return total / len(targets)
