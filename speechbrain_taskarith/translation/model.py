"""The whole model: from speech or its transcript to a translation."""

import math
from typing import NamedTuple

import torch

from speechbrain_taskarith.translation.encoders.acoustic import AcousticEncoder
from speechbrain_taskarith.translation.input_guard import check_lengths
from speechbrain_taskarith.translation.reduction.label_embedding import (
    LabelEmbedding,
)
from speechbrain_taskarith.translation.reduction.segments import Segments
from speechbrain_taskarith.translation.text.languages import TargetLanguages
from speechbrain_taskarith.translation.text.tying import tie
from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    frame_counts,
    padding_mask,
    relative_lengths,
)

# Parts of the model that training can do without.
OPTIONAL = ("shrink", "looking_back", "noise")


class SpeechEncoding(NamedTuple):
    """What `encode_speech` returns; lengths are relative."""

    logits: torch.Tensor  # [B, T, V], of the CTC head, on the frames
    frame_lens: torch.Tensor  # [B], of the frames
    embedded: torch.Tensor  # [B, S, d], shrunk and looked back
    encoded: torch.Tensor  # [B, S, d], from the textual encoder
    lens: torch.Tensor  # [B], of the last two
    segments: Segments | None  # None without shrinking
    blank_index: int | None = None  # of the CTC head, where a part knows it


class TextEncoding(NamedTuple):
    """What `encode_text` returns."""

    embedded: torch.Tensor  # [B, U, d]
    encoded: torch.Tensor  # [B, U, d], from the textual encoder
    lens: torch.Tensor  # [B], relative lengths: noise makes text longer


class TranslationOutput(NamedTuple):
    """What `SpeechTranslationModel` returns; None where no task needs it."""

    speech: SpeechEncoding | None
    text: TextEncoding | None
    st: torch.Tensor | None  # [B, W, V], logits of the translation of speech
    mt: torch.Tensor | None  # [B, W, V], of that of the transcript
    tasks: tuple = ("st", "asr", "mt")  # what was computed


class SpeechTranslationModel(torch.nn.Module):
    """Speech and text translation with shared textual encoder and decoder.

    `speech -> acoustic encoder -> (CTC) shrink -> looking back -> textual
    encoder -> decoder`, `text -> embedding (noise) -> textual encoder ->
    decoder` (arXiv 2311.03810). Each part may be left out by `None`.

    One call of `forward` computes all tasks, so that DDP sees one graph. Once
    a task stops, some parameters get no gradient: run DDP with SpeechBrain's
    `--find_unused_parameters`.

    Arguments
    ---------
    acoustic : torch.nn.Module
        `acoustic(x, lens) -> [B, T, d]`, or that and absolute lengths [B],
        e.g. `AcousticEncoder` or `WhisperAcousticEncoder`.
    textual : TextEncoder
        Shared by speech and text.
    decoder : TranslationDecoder
        Shared as well.
    source_vocab : int
        Labels of the CTC head and of the transcript, blank among them.
    shrink : CTCShrink, optional
        None: all frames go on.
    looking_back : LookingBack, optional
        None: what shrinking drops is lost.
    noise : BlankNoise, optional
        On the text side, in training.
    contrast : bool
        True: transcripts of speech are encoded, for the contrastive loss of
        "st" and "asr"; "asr" then needs them.
    tie_ctc : bool
        True: the CTC head's matrix is the transcripts' embedding, which puts
        speech where its text is.
    languages : dict of str: int or TargetLanguages, optional
        Target languages and their beginning tokens, kept in `languages`.
    labels : str, optional
        What the CTC head reads in a segment, as transcripts are embedded:
        `"added"` to the segment's vector, or `"alone"`, in its place, the
        best label only: with a shrink that drops blanks this is a cascade.

    Raises
    ------
    ValueError
        Parts that do not fit one another.

    Example
    -------
    >>> from speechbrain_taskarith import translation
    >>> class Tiny(torch.nn.Module):
    ...     def forward(self, x, lens):
    ...         return x
    >>> model = SpeechTranslationModel(
    ...     translation.AcousticEncoder(Tiny(), 8),
    ...     translation.TextEncoder(8, 2, num_layers=1),
    ...     translation.TranslationDecoder(9, 8, 2, num_layers=1),
    ...     source_vocab=5,
    ...     shrink=translation.CTCShrink(),
    ...     looking_back=translation.LookingBack(8, 2),
    ... )
    >>> out = model(
    ...     tasks=("st", "asr", "mt"),
    ...     x=torch.rand(2, 20, 8),
    ...     lens=torch.tensor([1.0, 0.7]),
    ...     source=torch.randint(1, 5, (2, 4)),
    ...     source_lens=torch.ones(2),
    ...     target_bos=torch.ones(2, 3).long(),
    ... )
    >>> out.st.shape, out.mt.shape
    (torch.Size([2, 3, 9]), torch.Size([2, 3, 9]))
    """

    def __init__(
        self,
        acoustic,
        textual,
        decoder,
        source_vocab,
        shrink=None,
        looking_back=None,
        noise=None,
        contrast=True,
        tie_ctc=False,
        languages=None,
        labels=None,
    ):
        super().__init__()
        d_model = textual.norm.normalized_shape[0]
        _check_widths(d_model, acoustic, decoder)
        self.acoustic = acoustic
        self.ctc_lin = torch.nn.Linear(d_model, source_vocab)
        self.source_embedding = torch.nn.Embedding(source_vocab, d_model)
        # Its output has the size of what comes from looking back.
        torch.nn.init.normal_(self.source_embedding.weight, std=d_model**-0.5)
        if tie_ctc:
            tie(self, "source_embedding.weight", "ctc_lin.weight")
        self.textual = textual
        self.decoder = decoder
        if languages is not None and not isinstance(languages, TargetLanguages):
            languages = TargetLanguages(languages)
        self.languages = languages
        _check_languages(languages, decoder)
        self.shrink = shrink
        self.looking_back = looking_back
        if looking_back is not None:
            looking_back.has_caller = True
        self.label_embedding = None
        if labels is not None:
            self.label_embedding = LabelEmbedding(d_model, labels)
        self.noise = noise
        self.contrast = contrast
        self.source_vocab = source_vocab
        self._left_out = frozenset()
        if looking_back is not None and shrink is None:
            raise ValueError(
                "looking_back without shrink: there is nothing to look back "
                "for; give both, or neither"
            )
        if labels is not None and shrink is None:
            raise ValueError(
                f"labels {labels!r} without shrink: they are those of "
                "segments; give both, or neither"
            )
        if labels == "alone" and looking_back is not None:
            raise ValueError(
                "labels 'alone' with looking_back: the segments' vectors are "
                "replaced, so that it would do nothing; give labels 'added', "
                "or no looking_back"
            )
        self._blank_index()

    def _blank_index(self):
        """Return the CTC head's blank, None if no part has one."""
        blank = getattr(self.shrink, "blank_index", None)
        token = getattr(self.noise, "blank_token", blank)
        if None not in (blank, token) and blank != token:
            raise ValueError(
                f"the noise's blank is {token}, that of the CTC head {blank}; "
                "noisy text looks like CTC output only if they are equal"
            )
        return token if blank is None else blank

    def leave_out(self, names):
        """Train without some parts, until called again.

        Evaluation has all of them. Without "shrink" nothing is looked back
        for, and no label embedded.

        Arguments
        ---------
        names : sequence of str
            Of "shrink", "looking_back" and "noise"; none: with all parts.
            `ValueError` for others.
        """
        if unknown := sorted(set(names) - set(OPTIONAL)):
            raise ValueError(
                f"{unknown[0]!r} cannot be left out; only "
                f"{', '.join(OPTIONAL)} can"
            )
        self._left_out = frozenset(names)

    def _optional(self, name):
        """Return a part, None where there is none now."""
        left_out = self.training and name in self._left_out
        return None if left_out else getattr(self, name)

    def parts(self):
        """Return `{part: module}`, as `TaskNormWeights.observe` takes it."""
        shared = ("acoustic", "textual", "decoder")
        return {part: getattr(self, part) for part in shared}

    def forward(
        self,
        tasks=("st",),
        x=None,
        lens=None,
        source=None,
        source_lens=None,
        target_bos=None,
        ids=None,
    ):
        """Compute what some tasks need, and no more.

        Arguments
        ---------
        tasks : sequence of str
            Of `"st"`, `"asr"`, `"mt"`; `ValueError` for others, and where an
            input that one needs is missing.
        x, lens : torch.Tensor, optional
            Features [B, T', F] or waveforms [B, T'], and their relative
            lengths [B]; needed by "st" and "asr".
        source, source_lens : torch.Tensor, optional
            Transcripts [B, U], and their relative lengths [B]; needed by
            "mt", and by "asr" with contrast. Given with "st", they are
            encoded for its contrastive loss.
        target_bos : torch.Tensor, optional
            [B, W], translations behind the beginning token; needed by "st"
            and "mt".
        ids : sequence of str, optional
            The utterances' names, for errors.

        Returns
        -------
        TranslationOutput
            `.speech`, `.text` (see `encode_speech` and `encode_text`), logits
            `.st` and `.mt` [B, W, V], `.tasks`; None where not needed.
        """
        self._check(tasks, x, source, target_bos)
        speech = text = st = mt = None
        if x is not None and {"st", "asr"} & set(tasks):
            speech = self.encode_speech(x, lens, ids)
        if "mt" in tasks:
            text = self.encode_text(source, source_lens)
            mt = self.decoder(target_bos, text.encoded, text.lens)
        elif self.contrast and speech is not None and source is not None:
            # Text gets no gradient from the contrastive loss.
            with torch.no_grad():
                text = self.encode_text(source, source_lens)
        if "st" in tasks:
            st = self.decoder(target_bos, speech.encoded, speech.lens)
        return TranslationOutput(speech, text, st, mt, tuple(tasks))

    def _check(self, tasks, x, source, target_bos):
        inputs = {"x": x, "source": source, "target_bos": target_bos}
        needs = {
            "st": ("x", "target_bos"),
            "asr": ("x", "source") if self.contrast else ("x",),
            "mt": ("source", "target_bos"),
        }
        for task in tasks:
            if task not in needs:
                raise ValueError(
                    f"unknown task {task!r}; known are {', '.join(needs)}"
                )
            for name in needs[task]:
                if inputs[name] is None:
                    raise ValueError(
                        f"task {task!r} needs {name}; leave the task out for "
                        "batches without it"
                    )

    def encode_speech(self, x, lens, ids=None):
        """Encode speech, given as `forward` takes it.

        Returns `.logits` [B, T, V], `.frame_lens` [B], `.embedded` [B, S, d],
        `.encoded` [B, S, d], `.lens` [B] and `.segments`.
        """
        named = isinstance(self.acoustic, AcousticEncoder)
        frames = self.acoustic(x, lens, **({"ids": ids} if named else {}))
        if isinstance(frames, tuple):
            frames, count = frames
        else:
            # Rounded once, for everything on this axis.
            count = frame_counts(lens, frames.shape[1])
        shrink = self._optional("shrink")
        looking_back = shrink and self._optional("looking_back")
        if shrink is None:
            size = frames.shape[1]
            check_lengths(count, size, "features", ids, wait=False)
        frame_lens = relative_lengths(count, frames.shape[1])
        # NaN in the padding would reach the gradient of the CTC head.
        outside = padding_mask(count, frames.shape[1])[..., None]
        frames = frames.masked_fill(outside, 0.0)
        logits = self.ctc_lin(frames)
        embedded, shrunk_lens, segments = frames, frame_lens, None
        if shrink is not None:
            embedded, shrunk_lens, segments = shrink(
                frames, logits, frame_lens, ids
            )
        pooled = embedded
        if looking_back is not None:
            embedded = looking_back(embedded, frames, frame_lens, segments)
        if segments is not None and self.label_embedding is not None:
            matrix = self.source_embedding.weight * self._text_scale
            added = self.label_embedding.gate is not None
            scores = self.ctc_lin(pooled) if added else None
            embedded = self.label_embedding(embedded, scores, matrix, segments)
        encoded = self.textual(embedded, shrunk_lens)
        return SpeechEncoding(
            *(logits, frame_lens, embedded, encoded, shrunk_lens, segments),
            blank_index=self._blank_index(),
        )

    def encode_text(self, tokens, lens):
        """Encode `source` and `source_lens`, as `forward` takes them.

        Returns `.embedded` and `.encoded` [B, U, d], and `.lens` [B]: noise
        makes text longer.
        """
        size = tokens.shape[1]
        counts = absolute_lengths(lens, size)
        check_lengths(counts, size, "transcripts", wait=False)
        noise = self._optional("noise")
        if noise is not None:
            tokens, lens = noise(tokens, lens)
        embedded = self.source_embedding(tokens) * self._text_scale
        return TextEncoding(embedded, self.textual(embedded, lens), lens)

    @property
    def _text_scale(self):
        """Return what brings an embedding to the size of speech."""
        return math.sqrt(self.source_embedding.embedding_dim)


def _check_widths(d_model, acoustic, decoder):
    """Refuse parts of another width than the textual encoder's."""
    head = getattr(decoder, "seq_lin", None)
    widths = {
        "acoustic encoder": getattr(acoustic, "d_model", d_model),
        "decoder": getattr(head, "in_features", d_model),
    }
    for part, width in widths.items():
        if width != d_model:
            raise ValueError(
                f"the {part} has a width of {width}, the textual encoder of "
                f"{d_model}; give both the same d_model"
            )


def _check_languages(languages, decoder):
    """Refuse a language's token that the decoder does not have."""
    size = getattr(decoder, "vocab_size", None)
    if languages is None or size is None:
        return
    for name, token in languages.tokens.items():
        if not 0 <= token < size:
            raise ValueError(
                f"language {name!r} has token {token}; the decoder has tokens "
                f"0 to {size - 1}"
            )
