"""CTC on characters, on manifests: what both recipes of it share.

The columns are those of the Whisper recipe (ID, duration, wav, text), so that
one manifest serves all models.
"""

import re
import unicodedata

import speechbrain as sb
from common.rows import SPEECH, load_rows
from manifest_checks import keep_short
from scoring import character_errors, normalize
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_taskarith.brains import CTCBrain
from speechbrain_taskarith.data import read_audio
from speechbrain_taskarith.metrics import wer


def letters(text, characters):
    """Return a text in the characters that have a label.

    Accents are taken off letters that have none with it; whatever else has no
    label separates words.
    """
    text = text.lower().replace("’", "'")
    kept = [c if c in characters else _bare(c) for c in text]
    kept = [c if c in characters else " " for c in "".join(kept)]
    return " ".join("".join(kept).split())


def _bare(character):
    """Take the accent off a letter."""
    apart = unicodedata.normalize("NFKD", character)
    return re.sub(r"[\u0300-\u036f]", "", apart).lower()


def read_manifest(path, data_root, characters, longest=None):
    """Read a manifest's rows, without what is longer than `longest` seconds.

    `data_root` stands for `$data_root` in paths. Returns
    `{ID: {duration, wav, text, letters, ...}}`.
    """
    rows = keep_short(path, load_rows(path, data_root, SPEECH), longest)
    for row in rows.values():
        row["letters"] = letters(row["text"], characters)
    silent = [key for key, row in rows.items() if not row["letters"]]
    if silent:
        raise ValueError(
            f"{path}: {len(silent)} utterances have no text in the characters "
            f"{characters!r}, e.g. {', '.join(silent[:3])}; add characters, "
            "or leave these utterances out"
        )
    return rows


def make_dataset(rows, tokenizer, sample_rate):
    """Make a data set with `sig`, `tokens` and `wrd`, as `CTCBrain` needs."""
    data = DynamicItemDataset(rows)

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return read_audio(wav, sample_rate, resample=True)

    data.add_dynamic_item(audio_pipeline)
    data.add_dynamic_item(tokenizer.encode, takes="letters", provides="tokens")
    data.set_output_keys(["id", "sig", "tokens", "text"])
    return data


def scored(texts):
    """Return `{ID: text}` as Whisper's normaliser of English writes it."""
    return {key: normalize(text, "en") for key, text in texts.items()}


class CharacterBrain(CTCBrain):
    """CTC on characters, scored as Whisper is.

    It reads hparams.valid_csv, hparams.train_logger and hparams.epoch_counter.
    """

    def _collect(self, batch, hypotheses):
        self.references |= dict(zip(batch.id, batch.text))
        self.hypotheses |= dict(zip(batch.id, hypotheses))

    def on_stage_start(self, stage, epoch=None):
        """Start a list of transcripts."""
        self.references, self.hypotheses = {}, {}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log, and keep an epoch's checkpoint."""
        stats = {"loss": stage_loss}
        if stage == sb.Stage.TRAIN:
            self.train_stats = stats
            if self.hparams.valid_csv is None:
                self.keep(epoch, {})
            return
        stats |= self.score()
        if stage == sb.Stage.VALID:
            self.keep(epoch, stats)
        else:
            self.hparams.train_logger.log_stats(
                {"Epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )

    def score(self):
        """Count the errors of what was found."""
        self.references = scored(self.references)
        self.hypotheses = scored(self.hypotheses)
        words = wer(self.references, self.hypotheses)
        characters = character_errors(self.references, self.hypotheses)
        return {"WER": words.wer, "CER": characters.wer}

    def keep(self, epoch, stats):
        """Log an epoch, and keep its checkpoint."""
        self.hparams.train_logger.log_stats(
            {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
            train_stats=self.train_stats,
            valid_stats=stats or None,
        )
        self.checkpointer.save_and_keep_only(
            meta={"epoch": epoch, **stats}, num_to_keep=1
        )
