"""Outputs of a frozen encoder on disk, computed once."""

import functools
import hashlib
import os
from pathlib import Path
from urllib.parse import quote

import safetensors
import safetensors.torch
import torch

from speechbrain_taskarith.data.audio import read_audio
from speechbrain_taskarith.translation.encoders.layered import is_trained
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.progress import progress

DTYPES = ("float16", "bfloat16", "float32")


class EncoderCache:
    """Keeps what comes out of the frozen part of an encoder.

    With a frozen encoder every epoch computes the same again. `fill` computes
    it once, a file for each utterance; then the cache is called in the place
    of reading the audio, and the encoder takes its tensors [T, D] as it takes
    waveforms. Where the last layers are trained, the input of the first of
    them is kept.

    A file tells of the encoder, by a hash of its frozen weights, and of the
    recording; what does not fit is refused. A killed `fill` goes on where it
    was.

    Waveforms can no longer be augmented.

    Arguments
    ---------
    encoder : AcousticEncoder
        Of waveforms, part of it frozen: a `WhisperAcousticEncoder`, or one
        around HuBERT or wav2vec 2.0.
    folder : str or pathlib.Path
        Of the files.
    dtype : str
        Of what is kept: "float16" (default), "bfloat16" or "float32".
    batch_size : int
        Utterances encoded at a time.
    sample_rate : int
        Of the encoder.
    resample : bool
        True: recordings of another rate are converted; False (default):
        refused.
    show_progress : bool
        A bar, on a terminal.

    Example
    -------
    >>> import transformers
    >>> from speechbrain_taskarith.data.audio import write_audio
    >>> from speechbrain_taskarith.translation import WhisperAcousticEncoder
    >>> small = transformers.WhisperConfig(
    ...     **{"d_model": 12, "encoder_layers": 1, "decoder_layers": 1},
    ...     **{"encoder_ffn_dim": 8, "max_source_positions": 50},
    ... )
    >>> whisper = transformers.WhisperModel(small)
    >>> encoder = WhisperAcousticEncoder(whisper, d_model=6)
    >>> folder = getfixture("tmp_path")
    >>> write_audio(folder / "a.wav", torch.rand(3200), 16000)
    >>> cache = EncoderCache(encoder, folder / "cache")
    >>> cache.fill({"a": {"wav": folder / "a.wav"}})
    1
    >>> x = cache("a", folder / "a.wav")
    >>> x.shape, x.dtype
    (torch.Size([10, 12]), torch.float16)
    >>> encoder(x[None], torch.ones(1))[0].shape
    torch.Size([1, 10, 6])
    """

    def __init__(
        self,
        encoder,
        folder,
        dtype="float16",
        batch_size=8,
        sample_rate=16000,
        resample=False,
        show_progress=True,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r}; expected {', '.join(DTYPES)}")
        self.encoder, self.folder = encoder, Path(folder)
        self.dtype, self.batch_size = getattr(torch, dtype), batch_size
        self.sample_rate, self.resample = sample_rate, resample
        self.show_progress = show_progress
        self._identity = self._weights = None

    def __getstate__(self):
        """Leave the encoder behind: a data loader's worker only reads."""
        self._known()
        return {**self.__dict__, "encoder": None}

    def fill(self, rows):
        """Compute what is not there.

        In several processes call it in one of them
        (`run_on_main(cache.fill, args=[rows])`).

        Arguments
        ---------
        rows : dict of str: dict
            Utterances by their names, as SpeechBrain reads a manifest
            (`dataset.data`): `wav`, the recording's path; and `start` and
            `duration` in seconds, if it is a part of the recording.

        Returns
        -------
        int
            How many were computed.

        Raises
        ------
        ValueError
            A file of another encoder; a recording that cannot be read, has
            another rate, is too long for the encoder, or gives values beyond
            `dtype`; each by name.
        """
        self._known()
        missing = [
            (name, *_place(row))
            for name, row in rows.items()
            if not self._is_there(name, *_place(row))
        ]
        bar = progress(
            total=len(missing),
            desc="encoding",
            unit="utt",
            show_progress=self.show_progress,
        )
        training = self.encoder.training
        self.encoder.eval()
        # Utterances of like length share a batch.
        window = 16 * self.batch_size
        try:
            with bar:
                for some in _batched(missing, window):
                    for batch in self._batches(some):
                        self._encode(batch)
                        bar.update(len(batch))
        finally:
            self.encoder.train(training)
        return len(missing)

    def __call__(self, name, wav=None, start=None, duration=None):
        """Read an utterance.

        Arguments
        ---------
        name : str
            The utterance.
        wav, start, duration
            The recording, as in `fill`, which must not have changed since;
            None: not checked.

        Returns
        -------
        torch.Tensor
            [T, D].

        Raises
        ------
        FileNotFoundError
            It was not computed.
        ValueError
            It was computed by another encoder, or from another recording, or
            its file is damaged.
        """
        path = self._path(name)
        if not path.exists():
            raise FileNotFoundError(
                f"utterance {name!r} is not in {self.folder} ({path.name}); "
                "call fill with the manifest that it is in"
            )
        try:
            with safetensors.safe_open(path, "pt") as file:
                found, x = file.metadata(), file.get_tensor("x")
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path}: damaged ({error}); remove it, and call fill again"
            ) from error
        self._check_encoder(path, found)
        if wav is not None:
            if not _same_audio(found, _audio(wav, start, duration), wav):
                raise ValueError(
                    f"utterance {name!r}: {wav} has changed since {path} was "
                    "computed from it; call fill again"
                )
        return x

    def _path(self, name):
        # Any name, even one with slashes, in one folder.
        quoted = quote(str(name), safe=" ()+,;=@[]")
        if len(quoted) > 200 or quoted.startswith("."):
            quoted = hashlib.sha256(str(name).encode()).hexdigest()
        return self.folder / f"{quoted}.safetensors"

    def _known(self):
        """Return fingerprint and description of the encoder.

        Anew where a frozen weight has changed, as by loading a checkpoint.
        """
        encoder = self.encoder
        if encoder is None:
            return self._identity
        weights = [
            (id(p), p._version, p.dtype, p.device, p.data_ptr())
            for p in encoder.parameters()
            if not is_trained(p)
        ]
        if _changed(self._weights, weights):
            if getattr(encoder, "first_trained", lambda: None)() is None:
                raise ValueError(
                    f"EncoderCache: nothing of {type(encoder).__name__} is "
                    "frozen, or it does not take waveforms; expected a "
                    "WhisperAcousticEncoder, or an AcousticEncoder around "
                    "HuBERT or wav2vec 2.0, with trained_layers"
                )
            self._identity = (
                encoder.reader.fingerprint(encoder.encoder),
                encoder.reader.describe(encoder.encoder),
            )
        self._weights = weights
        return self._identity

    def _check_encoder(self, path, found):
        fingerprint, shown = self._known()
        if found.get("encoder") != fingerprint:
            raise ValueError(
                f"{path} was computed by another encoder "
                f"({found.get('described')}) than this one ({shown}); give "
                "each encoder a folder of its own, or remove this one"
            )

    def _is_there(self, name, wav, start, duration):
        """Tell whether an utterance is there, of this encoder and recording."""
        path = self._path(name)
        if not path.exists():
            return False
        try:
            with safetensors.safe_open(path, "pt") as file:
                found = file.metadata()
        except safetensors.SafetensorError:
            return False
        self._check_encoder(path, found)
        same_type = found.get("dtype") == str(self.dtype)
        audio = _audio(wav, start, duration)
        return same_type and _same_audio(found, audio, wav)

    def _batches(self, utterances):
        read = [(u, self._read(*u)) for u in utterances]
        read.sort(key=lambda pair: len(pair[1]))
        return _batched(read, self.batch_size)

    def _read(self, name, wav, start, duration):
        audio = _audio(wav, start, duration)
        wave = _recording(
            str(wav), self.sample_rate, self.resample, *_version(audio)
        )
        if start is None:
            return wave
        first = round(start * self.sample_rate)
        part = wave[first : first + round(duration * self.sample_rate)]
        if not len(part):
            raise ValueError(
                f"utterance {name!r}: {wav} has "
                f"{len(wave) / self.sample_rate:.2f} s, nothing is left of "
                f"it from {start} s on"
            )
        return part

    def _encode(self, batch):
        """Encode and write a batch of utterances and their waveforms."""
        names = [utterance[0] for utterance, _ in batch]
        waves = [wave for _, wave in batch]
        x = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        lens = torch.tensor([len(wave) / x.shape[1] for wave in waves])
        device = next(self.encoder.parameters()).device
        hidden, counts = self.encoder.frozen(
            x.to(device), lens.to(device), names
        )
        kept = hidden.to(self.dtype).cpu()
        fingerprint, shown = self._known()
        rows = zip(batch, kept, counts.tolist())
        for (utterance, _), row, count in rows:
            row, audio = row[:count].contiguous(), _audio(*utterance[1:])
            if not row.isfinite().all():
                raise ValueError(
                    f"utterance {utterance[0]!r}: the encoder's output is NaN "
                    f"or beyond {self.dtype}; give dtype='float32'"
                )
            details = {
                "encoder": fingerprint,
                "described": shown,
                "dtype": str(self.dtype),
                **audio,
                "content": _content(str(utterance[1]), *_version(audio)),
            }
            data = safetensors.torch.save({"x": row}, details)
            with atomic_write(self._path(utterance[0])) as stream:
                stream.write(data)


def _changed(before, now):
    """Tell whether weights are others; moved to a device they are not.

    A data loader's worker could not read them there.
    """
    if before is None or len(before) != len(now):
        return True
    return any(
        old[:3] != new[:3] or (old[3] == new[3] and old[4] != new[4])
        for old, new in zip(before, now)
    )


def _place(row):
    """Return path, start and duration of an utterance's row."""
    if "wav" not in row:
        raise ValueError(
            f"a manifest's row has {', '.join(row)}, expected wav, the path "
            "of its recording"
        )
    if row.get("start") in (None, ""):
        return row["wav"], None, None
    if row.get("duration") in (None, ""):
        raise ValueError(
            f"a manifest's row of {row['wav']} has a start and no duration; "
            "give both, in seconds, or none"
        )
    return row["wav"], float(row["start"]), float(row["duration"])


def _audio(wav, start, duration):
    """Return what tells a recording, or a part of it, quickly."""
    try:
        status = os.stat(wav)
    except OSError as error:
        raise FileNotFoundError(
            f"{wav}: no such recording; check the manifest's data folder"
        ) from error
    return {
        "size": str(status.st_size),
        "time": str(status.st_mtime_ns),
        "start": str(None if start is None else float(start)),
        "duration": str(None if start is None else float(duration)),
    }


def _same_audio(found, audio, wav):
    """Compare; a copied file has another time, and is known by its content."""
    same = ("size", "start", "duration")
    if any(found.get(key) != audio[key] for key in same):
        return False
    return found.get("time") == audio["time"] or (
        found.get("content") == _content(str(wav), *_version(audio))
    )


def _version(audio):
    return audio["size"], audio["time"]


# The last one is kept: parts of a long recording follow one another.
@functools.lru_cache(maxsize=1)
def _recording(wav, sample_rate, resample, *version):
    return read_audio(wav, sample_rate, resample)


@functools.lru_cache(maxsize=1)
def _content(wav, *version):
    digest = hashlib.sha256()
    with open(wav, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _batched(items, size):
    return (items[i : i + size] for i in range(0, len(items), size))
