"""A trained translator, loaded from a folder and used."""

import logging
import math
from typing import NamedTuple

import torch
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.inference.interfaces import Pretrained

from speechbrain_taskarith.data import cut_at_pauses, read_audio
from speechbrain_taskarith.translation.inference.loading import load_folder
from speechbrain_taskarith.translation.inference.results import (
    TranslatedSegment,
    Translation,
)
from speechbrain_taskarith.translation.model import SpeechEncoding
from speechbrain_taskarith.translation.search.searchers import (
    TranslationBeamSearch,
    greedy_translation,
)
from speechbrain_taskarith.utils.lengths import absolute_lengths

logger = logging.getLogger(__name__)


class EncodedSpeech(NamedTuple):
    """An utterance that `SpeechTranslator.encode` has read."""

    speech: SpeechEncoding  # of a batch of one
    seconds: float  # its duration
    start: float = 0.0  # where it begins in its recording


class SpeechTranslator(Pretrained):
    """Translates recordings with a model that `save_translator` has stored.

    Every utterance is encoded alone, so that its translation does not depend
    on what else is in a batch; the search decodes a batch at once.

    Arguments
    ---------
    modules : dict of str: torch.nn.Module
        `model`, a `SpeechTranslationModel`; `features` (waveforms to features)
        and `normalize` (SpeechBrain's `InputNormalization`) where it needs
        them.
    hparams : dict
        `sample_rate`, `bos_index`, `eos_index`, `target_text` (labels to
        text); `search` (a `TranslationBeamSearch`), else translations are
        greedy, of at most `greedy_tokens` (200, or the search's `least_steps`);
        `source_text` (labels of the CTC head to text) and `blank_index` (0);
        `languages`, a dict of target language: its beginning token.
    **options : object
        `run_opts` and `freeze_params` of SpeechBrain's `Pretrained`, e.g.
        `run_opts={"device": "cuda:0"}`.

    Example
    -------
    >>> from speechbrain_taskarith import translation as st
    >>> class Tiny(torch.nn.Module):
    ...     def forward(self, x, lens):
    ...         return x.unflatten(1, (-1, 8))
    >>> _ = torch.manual_seed(0)
    >>> model = st.SpeechTranslationModel(
    ...     st.AcousticEncoder(Tiny(), 8),
    ...     st.TextEncoder(8, 2, num_layers=1),
    ...     st.TranslationDecoder(6, 8, 2, num_layers=1),
    ...     source_vocab=3,
    ...     shrink=st.CTCShrink(),
    ... )
    >>> translator = SpeechTranslator(
    ...     {"model": model},
    ...     {
    ...         "sample_rate": 8000,
    ...         "target_text": lambda tokens: " ".join(map(str, tokens)),
    ...         **{"bos_index": 1, "eos_index": 2, "greedy_tokens": 5},
    ...     },
    ...     run_opts={"device": "cpu"},
    ... )
    >>> (found,) = translator.translate_batch(torch.randn(1, 80))
    >>> len(found.text.split()) <= 5, found.seconds
    (True, 0.01)
    """

    HPARAMS_NEEDED = ["sample_rate", "bos_index", "eos_index", "target_text"]
    MODULES_NEEDED = ["model"]

    def __init__(self, modules=None, hparams=None, **options):
        missing = [
            f"modules.{n}" for n in self.MODULES_NEEDED if n not in modules
        ]
        missing += [n for n in self.HPARAMS_NEEDED if n not in hparams]
        if missing:
            raise ValueError(
                f"a translator needs {', '.join(missing)}; save_translator "
                "writes a folder that has all"
            )
        super().__init__(modules, hparams, **options)
        self.sample_rate = self.hparams.sample_rate
        self.languages = dict(getattr(self.hparams, "languages", None) or {})
        self.search = getattr(self.hparams, "search", None)
        if self.search is not None:
            # Its decoder is the model's, which is there already.
            self.search.to(self.device).eval()
        # What a wider beam comes back to; a list, so that it is no module twice
        self._beam = [self.search]

    @classmethod
    def from_hparams(cls, source, trusted=False, savedir=None, **options):
        """Load a translator.

        Nothing of the folder is executed: its `hyperparams.yaml` may make
        objects of torch, SpeechBrain and this plugin only, and its weights are
        tensors.

        Arguments
        ---------
        source : str or pathlib.Path
            A folder that `save_translator` wrote, or the name of one on
            Hugging Face's hub.
        trusted : bool
            True: `hyperparams.yaml` may name anything, for a folder of your
            own whose encoder is a class of your own.
        savedir : str or pathlib.Path, optional
            Where a folder of the hub is kept; None: the hub's own cache.
        **options : object
            As for the class; and `overrides`, a dict of other values for
            `hyperparams.yaml`.

        Returns
        -------
        SpeechTranslator
            In evaluation mode, frozen.

        Raises
        ------
        FileNotFoundError
            No such folder; no description, weights or vocabulary in it.
        ValueError
            A description that would do more than make a model; weights that
            do not fit, or a damaged file; each by name.

        Example
        -------
        >>> SpeechTranslator.from_hparams("results/none")
        Traceback (most recent call last):
        FileNotFoundError: results/none: no such ...
        """
        overrides = options.pop("overrides", None)
        modules, hparams = load_folder(source, trusted, savedir, overrides)
        return cls(modules, hparams, **options)

    def translate_file(self, path, target=None, resample=False, longest=None):
        """Translate a recording.

        Arguments
        ---------
        path : str or pathlib.Path
            WAV, FLAC, OGG, MP3; several channels are averaged.
        target : str, optional
            Target language; may be left out where there is one only.
        resample : bool
            True: convert a recording of another sample rate. False: refuse it.
        longest : float, optional
            Cut a recording of more seconds at its pauses (`cut_at_pauses`), and
            translate part by part. None: it is translated as a whole.

        Returns
        -------
        Translation
            Its text, the segments of the speech and their times.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            An unreadable file, one of another rate, an unknown language; what
            the encoder refuses, e.g. speech beyond Whisper's window of 30 s
            (others have none); by name.
        """
        encoded = self.encode_file(path, resample, longest)
        found = Translation.joined(self.decode(encoded, target))
        _warn([found], [str(path)])
        return found

    def translate_batch(self, wavs, wav_lens=None, target=None):
        """Translate waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            [B, samples], at the model's sample rate; padding does not matter.
        wav_lens : torch.Tensor, optional
            [B], relative lengths.
        target : str or sequence of str, optional
            Target language, of all or of each.

        Returns
        -------
        list of Translation
            One for each.

        Raises
        ------
        ValueError
            Waveforms of another shape, or not one length for each.
        """
        if wavs.dim() != 2:
            raise ValueError(
                f"wavs of shape {tuple(wavs.shape)}: expected [batch, samples]"
            )
        if wav_lens is None:
            wav_lens = torch.ones(len(wavs))
        if len(wav_lens) != len(wavs):
            raise ValueError(
                f"{len(wav_lens)} lengths for {len(wavs)} waveforms; give one "
                "for each, as a share of the longest"
            )
        counts = absolute_lengths(wav_lens, wavs.shape[1]).tolist()
        names = [f"row {row}" for row in range(len(wavs))]
        encoded = [
            self.encode(wav[:count], name)
            for wav, count, name in zip(wavs, counts, names)
        ]
        found = self.decode(encoded, target)
        _warn(found, names)
        return found

    def forward(self, wavs, wav_lens=None, target=None):
        """As `translate_batch`."""
        return self.translate_batch(wavs, wav_lens, target)

    def encode_file(self, path, resample=False, longest=None):
        """Read a recording and encode it, for `decode`.

        Arguments
        ---------
        path, resample, longest
            See `translate_file`.

        Returns
        -------
        list of EncodedSpeech
            Of its parts, in order: one, unless it was cut.
        """
        rate, name = self.sample_rate, str(path)
        wave = read_audio(path, rate, resample)
        parts = [(0, len(wave))]
        if longest is not None:
            parts = cut_at_pauses(wave, rate, longest)
        return [
            self.encode(wave[start:end], name)._replace(start=start / rate)
            for start, end in parts
        ]

    @torch.no_grad()
    def encode(self, wave, name="the recording"):
        """Encode a waveform, for `decode`.

        Arguments
        ---------
        wave : torch.Tensor
            [samples], at the model's sample rate.
        name : str
            Of the recording, for errors.

        Returns
        -------
        EncodedSpeech
            Of this waveform.
        """
        wave = torch.as_tensor(wave)
        if wave.dim() != 1 or not len(wave) or not wave.is_floating_point():
            raise ValueError(
                f"{name}: {wave.dtype} of shape {tuple(wave.shape)}: expected "
                "samples [T], floating point within [-1, 1], at least one"
            )
        if not torch.isfinite(wave).all():
            raise ValueError(f"{name}: the samples hold NaN or infinity")
        seconds = len(wave) / self.sample_rate
        try:
            with self.inference_ctx:
                speech = self._encode(wave[None].float().to(self.device), name)
        except (ValueError, RuntimeError) as error:
            if name in str(error):
                raise
            raise ValueError(
                f"{name}: {seconds:.4f} s could not be encoded ({error}); is it "
                "too short, or too long for the encoder?"
            ) from error
        return EncodedSpeech(speech, seconds)

    def _encode(self, x, name):
        lens = torch.ones(1, device=self.device)
        if "features" in self.mods:
            x = self.mods.features(x)
        if "normalize" in self.mods:
            x = self.mods.normalize(x, lens)
        return self.mods.model.encode_speech(x, lens, [name])

    @torch.no_grad()
    def decode(self, encoded, target=None):
        """Translate what `encode` or `encode_file` has returned.

        Arguments
        ---------
        encoded : sequence of EncodedSpeech
            A batch.
        target : str or sequence of str, optional
            Target language, of all or of each.

        Returns
        -------
        list of Translation
            One for each.
        """
        if not encoded:
            return []
        targets, begin = self._targets(target, len(encoded))
        states = [_valid_frames(one.speech) for one in encoded]
        memory = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        counts = torch.tensor([len(state) for state in states])
        lens = (counts / memory.shape[1]).to(memory.device)
        with self.inference_ctx:
            found, longest = self._search(memory, lens, begin)
        translations = []
        rows = zip(encoded, found, targets, longest)
        for one, tokens, language, most in rows:
            tokens = [int(token) for token in tokens]
            translations.append(
                Translation(
                    self._text("target", tokens),
                    self._segments(one),
                    self._transcript(one.speech),
                    one.seconds,
                    language,
                    cut=len(tokens) >= most,
                )
            )
        return translations

    def check_target(self, target):
        """Raise the ValueError that `decode` would, for a target language.

        Arguments
        ---------
        target : str or None
            See `translate_file`.
        """
        self._targets(target, 1)

    def set_search(self, beam_size=None, length_penalty=None):
        """Change how translations are searched.

        Arguments
        ---------
        beam_size : int, optional
            1: greedy. None: as it is.
        length_penalty : float, optional
            See `TranslationBeamSearch`. None: as it is.
        """
        if beam_size is not None and not 1 <= beam_size < 10000:
            raise ValueError(
                f"beam_size {beam_size}: expected 1 (greedy) to 9999"
            )
        if beam_size == 1:
            if length_penalty is not None:
                raise ValueError(
                    "length_penalty with beam_size 1: a greedy search has "
                    "nothing to compare; give a wider beam"
                )
            if self.search is not None:
                self._beam = [self.search]
            self.search = None
            return
        if self.search is None and beam_size is None:
            if length_penalty is None:
                return
            raise ValueError(
                "length_penalty: this model translates greedily; give "
                "beam_size, too"
            )
        if self.search is None:
            self.search = self._beam[0]
        if self.search is None:
            self.search = TranslationBeamSearch(
                self.mods.model.decoder,
                self.hparams.bos_index,
                self.hparams.eos_index,
                max_decode_ratio=0.0,
                least_steps=self._greedy_tokens(),
            ).eval()
        if beam_size is not None:
            self.search.beam_size = beam_size
        if length_penalty is not None:
            self.search.length_penalty = length_penalty

    def _greedy_tokens(self):
        """Return the limit of a greedy search: that of the beam, if there is."""
        most = getattr(self._beam[0], "least_steps", 200)
        return getattr(self.hparams, "greedy_tokens", most)

    def _search(self, memory, lens, begin):
        """Return the translations, and how long each may be, in tokens."""
        # A searcher of SpeechBrain's begins as it was told to.
        usual = set(begin) == {self.hparams.bos_index}
        begin = torch.tensor(begin, device=memory.device)
        if self.search is not None:
            found = self.search(memory, lens, *([] if usual else [begin]))[0]
            # SpeechBrain's searchers have one for all, or do not tell.
            most = getattr(self.search, "max_decode_steps", math.inf)
            each = getattr(self.search, "most_steps", [most] * len(memory))
            return found, each
        longest = self._greedy_tokens()
        found = greedy_translation(
            self.mods.model.decoder,
            memory,
            lens,
            begin,
            self.hparams.eos_index,
            longest,
        )
        return found, [longest] * len(memory)

    def _targets(self, target, count):
        """Return the language and the beginning token of every utterance."""
        targets = target
        if target is None or isinstance(target, str):
            targets = [target] * count
        if len(targets) != count:
            raise ValueError(
                f"{len(targets)} target languages for {count} utterance(s)"
            )
        if len(self.languages) == 1:
            targets = [one or next(iter(self.languages)) for one in targets]
        there = ", ".join(self.languages) or "none: leave the language out"
        for one in targets:
            if one is None and self.languages:
                raise ValueError(
                    f"this model has several target languages ({there}); name "
                    "one as the target (--to)"
                )
            if one is not None and one not in self.languages:
                raise ValueError(
                    f"unknown target language {one!r}; this model has {there}"
                )
        bos = self.hparams.bos_index
        return targets, [self.languages.get(one, bos) for one in targets]

    def _segments(self, one):
        """Return the segments of an utterance, with their times."""
        found = one.speech.segments
        if found is None:
            return []
        count = int(found.lengths[0])
        shift = one.seconds / float(found.frame_lengths[0])
        times = (one.start + found.seconds(shift)[0, :count]).tolist()
        labels = found.labels[0, :count].tolist()
        return [
            TranslatedSegment(
                round(start, 4), round(end, 4), self._label(label)
            )
            for (start, end), label in zip(times, labels)
        ]

    def _label(self, label):
        return self._text("source", [label] if label != self._blank() else [])

    def _transcript(self, speech):
        if getattr(self.hparams, "source_text", None) is None:
            return None
        (labels,) = ctc_greedy_decode(
            speech.logits.float(), speech.frame_lens, self._blank()
        )
        return self._text("source", labels)

    def _text(self, side, labels):
        """Return labels as text, None without a vocabulary."""
        make_text = getattr(self.hparams, f"{side}_text", None)
        return make_text and " ".join(make_text(labels).split())

    def _blank(self):
        return getattr(self.hparams, "blank_index", 0)


def _valid_frames(speech):
    """Return [S, d] of a batch of one, without its padding."""
    (states,) = speech.encoded
    (count,) = absolute_lengths(speech.lens, len(states)).tolist()
    return states[:count]


def _warn(translations, names):
    for translation, name in zip(translations, names):
        if translation.doubt:
            logger.warning(f"{name}: {translation.doubt}")
