#!/usr/bin/env python3
"""Whisper with a shorter input window.

Whisper reads 30 s, however short an utterance is. Where the longest utterance
has 6 s, a window of 6 s takes a fifth of the encoder's work. The positions of
the encoder are fixed sinusoids: the window is cut by leaving the last ones
out, and no weight changes. Whisper was trained on 30 s, so a model with a cut
window is tuned on a little speech before anything is compared.

To write a folder that `transformers` and this recipe load:
> python whisper_window.py openai/whisper-base whisper-base-6s --seconds 6
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from speechbrain_taskarith.utils.optional import require

# SpeechBrain's own message does not name our extra.
transformers = require("transformers", "huggingface", "Whisper")
from speechbrain.decoders.seq2seq import (  # noqa: E402
    S2SWhisperGreedySearcher,
)
from speechbrain.integrations.huggingface.whisper import Whisper  # noqa: E402

# The encoder's convolutions halve the rate of the features, 100 a second.
POSITIONS_PER_SECOND = 50


class WindowedWhisper(Whisper):
    """SpeechBrain's Whisper, with the input window of its folder.

    Three things differ from the parent class. The input is padded to the window
    of the model (`max_source_positions`), not always to 30 s. The floor of the
    log-Mel spectrum is that of each utterance, as in Whisper's own code; the
    parent takes the loudest of the batch, so that an utterance's features
    depend on its neighbours. Under autocast the embedding, where it is not
    frozen, is cast once for all steps of a search, not at each.

    Arguments
    ---------
    source : str
        Name on the hub, or a folder as `transformers` writes it.
    save_path : str
        Where downloads are kept.
    **kwargs
        As the parent class takes them.
    """

    def __init__(self, source, save_path, **kwargs):
        check_whisper(source)
        super().__init__(source, save_path, **kwargs)

    @property
    def languages(self):
        """Codes of the languages that it can be told."""
        if not self.is_multilingual:
            return {"en"}
        return languages_of(self.tokenizer)

    def load_weights(self, state):
        """Take weights of a checkpoint or of a `transformers` folder."""
        state = {k: v for k, v in state.items() if k != "proj_out.weight"}
        # Constants of the features, which a `transformers` folder lacks.
        self.load_state_dict({"_mel_filters": self._mel_filters} | state)

    @property
    def window(self):
        """Length of the input in seconds."""
        return self.config.max_source_positions / POSITIONS_PER_SECOND

    def _get_mel(self, wav):
        length = round(self.window * self.sampling_rate)
        return self.log_mel_spectrogram(self.pad_or_trim(wav, length))

    def forward_decoder(
        self,
        encoder_states,
        decoder_input_ids,
        use_cache=True,
        past_key_values=None,
    ):
        """Return logits [batch, tokens, pieces], None and the cache.

        With a cache only the last token is looked at, as the parent does it.
        """
        if self.output_attentions:
            return super().forward_decoder(
                encoder_states, decoder_input_ids, use_cache, past_key_values
            )
        if past_key_values is not None:
            decoder_input_ids = decoder_input_ids[:, -1:]
        decoder = self.model.decoder
        found = decoder(
            encoder_hidden_states=encoder_states,
            input_ids=decoder_input_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        # Autocast keeps the cast of a weight, but not of its transpose.
        logits = torch.nn.functional.linear(
            found.last_hidden_state, decoder.embed_tokens.weight
        )
        return logits.float(), None, found.past_key_values

    def log_mel_spectrogram(self, audio, padding=0):
        """Return [batch, mels, frames], each utterance by itself."""
        rows = [
            super(WindowedWhisper, self).log_mel_spectrogram(row, padding)
            for row in audio.split(1)
        ]
        return torch.cat(rows)


class WordsSearcher(S2SWhisperGreedySearcher):
    """SpeechBrain's greedy search, for what is found only.

    The parent goes on with a whole batch until its longest utterance ends, and
    keeps the log-probabilities of all pieces at all steps. Here an utterance
    that has ended leaves the batch. Nothing is sampled: `temperature` is 0.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.temperature != 0:
            raise ValueError(
                f"temperature {self.temperature}: expected 0; SpeechBrain's "
                "S2SWhisperGreedySearcher samples"
            )

    @torch.no_grad()
    def forward(self, enc_states, wav_len):
        """Return as the parent, but None for lengths and scores."""
        memory = self.reset_mem(len(enc_states), device=enc_states.device)
        hyps = [[] for _ in enc_states]
        searched = torch.arange(len(enc_states), device=enc_states.device)
        tokens = torch.full_like(searched, self.bos_index)
        ratios = self.min_decode_ratio, self.max_decode_ratio
        for _ in range(*(int(enc_states.shape[1] * ratio) for ratio in ratios)):
            logits, memory, _ = self.forward_step(
                tokens, memory, enc_states, None
            )
            tokens = logits.argmax(dim=-1)
            goes_on = tokens != self.eos_index
            if not goes_on.all():
                # Ended ones leave.
                tokens, memory = tokens[goes_on], memory[goes_on]
                searched, enc_states = searched[goes_on], enc_states[goes_on]
                if self.use_kv_cache:
                    kept = goes_on.nonzero().squeeze(1)
                    self.kv_cache.batch_select_indices(kept)
            for row, token in zip(searched.tolist(), tokens.tolist()):
                hyps[row].append(token)
            if not len(searched) or self._check_end_condition(memory):
                break
        return hyps, None, None, None


def check_whisper(source):
    """Refuse a name or folder that is no Whisper."""
    try:
        kind = transformers.AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        raise OSError(
            f"{source}: neither a folder with a Whisper model nor a name that "
            "could be downloaded. Without network, copy the folder from a "
            f"machine with it (hf download {source} --local-dir whisper) and "
            "give its path"
        ) from error
    if kind != "whisper":
        raise ValueError(f"{source}: a {kind} model; expected a Whisper")


def languages_of(tokenizer):
    """Return the codes of the languages that a tokenizer has a token for."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    # The list is that of the newest models; what is not there is "unknown".
    missing = (None, tokenizer.unk_token_id)
    return {
        code
        for code in LANGUAGES
        if tokenizer.convert_tokens_to_ids(f"<|{code}|>") not in missing
    }


def cut_window(source, output, seconds):
    """Write a Whisper folder whose input window is `seconds` long.

    Whole seconds: `transformers` counts its chunks in them.
    """
    check_whisper(source)
    positions = seconds * POSITIONS_PER_SECOND
    model = transformers.WhisperForConditionalGeneration.from_pretrained(source)
    encoder = model.model.encoder
    if not 0 < positions <= encoder.config.max_source_positions:
        whole = encoder.config.max_source_positions / POSITIONS_PER_SECOND
        raise ValueError(
            f"--seconds {seconds}: expected more than 0 and at most {whole:g}, "
            f"the window of {source}"
        )
    kept = encoder.embed_positions.weight.detach()[:positions].clone()
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(kept)
    encoder.max_source_positions = positions
    model.config.max_source_positions = positions
    processor = transformers.AutoProcessor.from_pretrained(source)
    extractor = processor.feature_extractor
    extractor.chunk_length = seconds
    extractor.n_samples = seconds * extractor.sampling_rate
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    write_folder(output, model, processor)


def save_whisper(whisper, source, output):
    """Write a tuned `WindowedWhisper` as `transformers` folder of `source`."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(source)
    model.model.load_state_dict(whisper.model.state_dict())
    write_folder(
        output, model, transformers.AutoProcessor.from_pretrained(source)
    )


def write_folder(output, *parts):
    """Write a folder; it has its name only when it is whole."""
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} is there already; give another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        whole = Path(folder, "whisper")
        for part in parts:
            part.save_pretrained(whole)
        whole.rename(output)


def main(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="hub name or folder")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument(
        "--seconds", type=int, required=True, help="length of the window"
    )
    given = parser.parse_args(arguments)
    try:
        cut_window(given.source, given.output, given.seconds)
    except (OSError, ValueError) as error:
        sys.exit(f"whisper_window.py: {error}")


if __name__ == "__main__":
    main()
