"""Tiny random Hugging Face models, and SpeechBrain's wrappers of them."""

import torch


def save_encoder(folder, kind="Wav2Vec2", task="Model", **settings):
    """Save a wav2vec 2.0, HuBERT or WavLM, with its feature extractor."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "conv_dim": (8, 8),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 8),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "vocab_size": 12,
            "codevector_dim": 8,
            "proj_codevector_dim": 8,
            **settings,
        }
    )
    return _save(getattr(transformers, kind + task)(config), folder)


def save_whisper(folder, task="Model", **settings):
    """Save a Whisper, with its feature extractor."""
    import transformers

    config = transformers.WhisperConfig(
        **{
            "vocab_size": 40,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 20,
            "decoder_ffn_dim": 20,
            "max_source_positions": 50,
            "max_target_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
            **settings,
        }
    )
    return _save(getattr(transformers, f"Whisper{task}")(config), folder)


def _save(model, folder):
    import transformers

    whisper = "Whisper" in type(model).__name__
    extractor = "WhisperFeatureExtractor" if whisper else None
    extractor = extractor or "Wav2Vec2FeatureExtractor"
    # Not the initialisation, which is 1 and 0 in many tensors.
    generator = torch.Generator().manual_seed(len(str(folder)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    getattr(transformers, extractor)().save_pretrained(folder)
    return folder


def wrapper(kind, source, **settings):
    """Build SpeechBrain's wrapper of a folder, as a recipe does."""
    import importlib

    module, name = {
        "Wav2Vec2": ("wav2vec2", "Wav2Vec2"),
        "Hubert": ("hubert", "HuBERT"),
        "WavLM": ("wavlm", "WavLM"),
        "Whisper": ("whisper", "Whisper"),
    }[kind]
    module = importlib.import_module(
        f"speechbrain.integrations.huggingface.{module}"
    )
    settings.setdefault("save_path", f"{source}-cache")
    return getattr(module, name)(str(source), **settings)
