"""A corpus of a few made utterances, in the formats that the recipes read.

Every word is a chord of its own over some noise; a domain (an "accent") moves
all chords. Nothing is fetched: the tokenizer, the language models and the
Hugging Face folders are made here as well.
"""

import csv
import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch

RATE = 16000
WIDTH = 32
PITCH = {"us": 1.0, "de": 1.3}
# The domains meet the same words, and so the letters, in another order.
WORDS = {"us": "ONE TWO THREE FOUR FIVE SIX SEVEN NINE".split()}
WORDS["de"] = WORDS["us"][::-1]
SPLITS = {"train": 6, "dev-clean": 2, "test-clean": 2, "test-other": 2}


def speech(words, pitch, generator):
    """Return a quarter of a second for every word, as `[samples]`."""
    time = torch.arange(RATE // 4) / RATE
    parts = []
    for word in words:
        seed = zlib.crc32(word.encode())
        tones = [200 + 40 * (seed >> shift & 31) for shift in (0, 5, 10)]
        waves = [torch.sin(2 * math.pi * pitch * t * time) for t in tones]
        parts.append(0.1 * sum(waves))
    signal = torch.cat(parts)
    return signal + 0.01 * torch.randn(signal.shape, generator=generator)


def utterances(domain):
    """Yield `(split, ID, words)` of a domain, the same on every machine."""
    random = np.random.default_rng(zlib.crc32(domain.encode()))
    for split, count in SPLITS.items():
        for i in range(count):
            # The first ones say every word between them.
            first = split == "train" and i < 2
            words = (
                WORDS[domain][4 * i : 4 * i + 4]
                if first
                else list(random.choice(WORDS[domain], 3 + i % 2))
            )
            yield split, f"{domain}-{split}-{i}", words


class Corpus:
    """The made corpus of a folder.

    Arguments
    ---------
    folder : pathlib.Path
        Where it goes, with everything that a recipe would download.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        # What a recipe of letters has as outputs: these, a space, the blank.
        self.letters = len(set("".join(WORDS["us"]))) + 2
        for domain in WORDS:
            self._make_domain(domain)
        self.tokenizer = self.folder / "tokenizer.model"
        self.vocabulary = self._make_tokenizer()

    def csv(self, domain, split):
        """Return the path of a split's table, as LibriSpeech has it."""
        return str(self.folder / domain / f"{split}.csv")

    def _make_domain(self, domain):
        generator = torch.Generator().manual_seed(zlib.crc32(domain.encode()))
        folder = self.folder / domain
        folder.mkdir(parents=True)
        rows = {split: [] for split in SPLITS}
        for split, name, words in utterances(domain):
            path = folder / f"{name}.wav"
            signal = speech(words, PITCH[domain], generator)
            soundfile.write(path, signal.numpy(), RATE)
            rows[split].append(
                {
                    "ID": name,
                    "duration": len(signal) / RATE,
                    "wav": str(path),
                    "spk_id": domain,
                    "wrd": " ".join(words),
                }
            )
        for split, table in rows.items():
            with open(self.csv(domain, split), "w", newline="") as file:
                writer = csv.DictWriter(file, table[0])
                writer.writeheader()
                writer.writerows(table)
        self._make_translations(domain, rows)

    def _make_translations(self, domain, rows):
        """Write the two translation corpora: the text, said backwards."""
        for split, name in (
            ("train", "train"),
            ("dev-clean", "dev"),
            ("test-clean", "dev2"),
            ("test-other", "test"),
        ):
            iwslt, fisher = {}, {}
            for row in rows[split]:
                text = " ".join(reversed(row["wrd"].split()))
                iwslt[row["ID"]] = {
                    "path": row["wav"],
                    "trans": text,
                    "duration": row["duration"],
                }
                fisher[row["ID"]] = {
                    "wav": row["wav"],
                    "duration": row["duration"],
                    "transcription": row["wrd"],
                    **{f"translation_{i}": text for i in range(4)},
                }
            for corpus, table, path in (
                ("iwslt", iwslt, f"{name}.json".replace("dev.", "valid.")),
                ("fisher", fisher, f"{name}/data.json"),
            ):
                path = self.folder / domain / corpus / path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(table))

    def _make_tokenizer(self):
        """Train a tokenizer on the words; return the size of its vocabulary."""
        import sentencepiece

        with open(self.tokenizer, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([" ".join(WORDS["us"])] * 4),
                model_writer=file,
                model_type="char",
                vocab_size=40,
                hard_vocab_limit=False,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                minloglevel=2,
            )
        return sentencepiece.SentencePieceProcessor(
            model_file=str(self.tokenizer)
        ).get_piece_size()

    def language_model(self, model, name):
        """Save a language model with the tokenizer; return their folder."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / "lm.ckpt")
        shutil.copy(self.tokenizer, folder / "tokenizer.ckpt")
        return str(folder)

    def wav2vec2(self, layers=1):
        """Save a random wav2vec2 as transformers would; return its folder."""
        import transformers

        folder = self.folder / f"wav2vec2-{layers}"
        if not folder.exists():
            torch.manual_seed(0)
            config = transformers.Wav2Vec2Config(
                hidden_size=WIDTH,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=WIDTH,
                conv_dim=(16,) * 7,
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
                do_stable_layer_norm=True,
                feat_extract_norm="layer",
                mask_time_prob=0.0,
                layerdrop=0.0,
            )
            transformers.Wav2Vec2Model(config).save_pretrained(folder)
            transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
        return str(folder)

    def whisper(self, seed=0):
        """Save a random Whisper as transformers would; return its folder."""
        import transformers
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        folder = self.folder / f"whisper-{seed}"
        if not folder.exists():
            torch.manual_seed(seed)
            letters = list(bytes_to_unicode().values())
            special = ["endoftext", "startoftranscript", "en", "translate"]
            special += ["transcribe", "startoflm", "startofprev", "nospeech"]
            special = [f"<|{name}|>" for name in (*special, "notimestamps")]
            special += ["<|0.00|>"]
            names = [*letters, *special]
            tokenizer = transformers.WhisperTokenizer(
                vocab={name: i for i, name in enumerate(names)},
                merges=[],
                pad_token=special[0],
            )
            tokenizer.add_special_tokens(
                {"additional_special_tokens": special[1:]}
            )
            end = tokenizer.convert_tokens_to_ids(special[0])
            config = transformers.WhisperConfig(
                vocab_size=len(tokenizer),
                num_mel_bins=80,
                d_model=WIDTH,
                encoder_layers=1,
                encoder_attention_heads=2,
                encoder_ffn_dim=WIDTH,
                decoder_layers=1,
                decoder_attention_heads=2,
                decoder_ffn_dim=WIDTH,
                max_target_positions=64,
                pad_token_id=end,
                bos_token_id=end,
                eos_token_id=end,
                decoder_start_token_id=end + 1,
            )
            transformers.WhisperModel(config).save_pretrained(folder)
            transformers.WhisperFeatureExtractor().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "normalizer.json").write_text("{}")
        return str(folder)
