"""A tiny random Whisper folder with a tokenizer of bytes: all languages."""

import json

import torch


def save_tiny_whisper(folder, seconds=2, seed=0, without=(), **settings):
    """Save model, tokenizer and feature extractor; returns the folder.

    `without`: languages that the tokenizer does not have.
    """
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    folder.mkdir(parents=True)
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *(
            f"<|{language}|>"
            for language in LANGUAGES
            if language not in without
        ),
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
    ]
    letters = {c: n for n, c in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary = letters | {c: 256 + n for n, c in enumerate(special)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.WhisperTokenizer(
        vocab=vocabulary,
        merges=[],
        additional_special_tokens=special,
        bos_token="<|startoftranscript|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    positions = 50 * seconds
    config = transformers.WhisperConfig(
        **{
            "vocab_size": 51865,  # what SpeechBrain calls multilingual
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 20,
            "decoder_ffn_dim": 20,
            "max_source_positions": positions,
            "max_target_positions": 64,
            "pad_token_id": 256,
            "bos_token_id": 257,
            "eos_token_id": 256,
            "decoder_start_token_id": 257,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
            **settings,
        }
    )
    torch.manual_seed(seed)
    model = transformers.WhisperForConditionalGeneration(config)
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(chunk_length=seconds).save_pretrained(
        folder
    )
    return folder


def tell_languages(whisper):
    """Let a saved model be told language and task, as the public ones are."""
    import transformers

    tokens = json.loads((whisper / "vocab.json").read_text())
    config = transformers.GenerationConfig.from_pretrained(whisper)
    config._from_model_config = False
    config.is_multilingual = True
    names = [f"<|{name}|>" for name in ("nl", "cs", "en")]
    config.lang_to_id = {name: tokens[name] for name in names}
    config.task_to_id = {
        name: tokens[f"<|{name}|>"] for name in ("transcribe", "translate")
    }
    config.no_timestamps_token_id = tokens["<|notimestamps|>"]
    config.save_pretrained(whisper)
