"""What makes SpeechBrain's recipes small: overrides of their YAML's values.

No structure changes: widths, numbers of layers, epochs and batch sizes, and
the made corpus in place of the real one.
"""

WIDTH = 32


def librispeech(corpus, domain):
    """Return what all LibriSpeech recipes share."""
    return {
        "data_folder": str(corpus.folder),
        "skip_prep": True,
        "train_csv": corpus.csv(domain, "train"),
        "valid_csv": corpus.csv(domain, "dev-clean"),
        "test_csv": [
            corpus.csv(domain, "test-clean"),
            corpus.csv(domain, "test-other"),
        ],
        "number_of_epochs": 2,
    }


def ctc(corpus, domain):
    """Return overrides of LibriSpeech/ASR/CTC/train_hf_wav2vec."""
    return {
        **librispeech(corpus, domain),
        "wav2vec2_hub": corpus.wav2vec2(),
        "wav2vec2": {"freeze": False},
        "freeze_wav2vec": False,
        "batch_size": 2,
        "test_batch_size": 2,
        "output_neurons": corpus.letters,
        "dnn_neurons": WIDTH,
        "enc": {"input_shape": [None, None, WIDTH]},
        "lr_wav2vec": 0.001,
        "test_beam_search": {"beam_size": 4},
    }


def transformer(corpus, domain):
    """Return overrides of LibriSpeech/ASR/transformer/conformer_small."""
    from speechbrain.lobes.models.transformer.TransformerLM import (
        TransformerLM,
    )

    lm = {
        "d_model": WIDTH,
        "nhead": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 0,
        "d_ffn": WIDTH,
    }
    model = TransformerLM(vocab=corpus.vocabulary, **lm)
    return {
        **librispeech(corpus, domain),
        "pretrained_lm_tokenizer_path": corpus.language_model(model, "lm"),
        "lm_model": lm,
        "output_neurons": corpus.vocabulary,
        "d_model": WIDTH,
        "nhead": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 1,
        "d_ffn": WIDTH,
        "CNN": {"out_channels": [8, 4]},
        "Transformer": {"input_size": 80},
        "dynamic_batching": False,
        "batch_size": 2,
        "num_workers": 0,
        "avg_checkpoints": 2,
        "valid_search_interval": 1,
        "valid_beam_size": 2,
        "test_beam_size": 2,
        "noam_annealing": {"n_warmup_steps": 4},
    }


def transducer(corpus, domain):
    """Return overrides of LibriSpeech/ASR/transducer/conformer_transducer."""
    from speechbrain.lobes.models.RNNLM import RNNLM

    lm = {
        "embedding_dim": WIDTH,
        "rnn_layers": 1,
        "rnn_neurons": WIDTH,
        "dnn_neurons": WIDTH,
    }
    model = RNNLM(output_neurons=corpus.vocabulary, **lm)
    return {
        **librispeech(corpus, domain),
        "pretrained_lm_tokenizer_path": corpus.language_model(model, "rnnlm"),
        "lm_model": lm,
        "output_neurons": corpus.vocabulary,
        "d_model": WIDTH,
        "joint_dim": WIDTH,
        "dec_dim": WIDTH,
        "nhead": 2,
        "num_encoder_layers": 1,
        "d_ffn": WIDTH,
        "CNN": {"out_channels": [8, 4]},
        "Transformer": {"input_size": 80},
        "precision": "fp32",
        "dynamic_batching": False,
        "batch_size": 2,
        "batch_size_valid": 2,
        "grad_accumulation_factor": 1,
        "num_workers": 0,
        "warmup_steps": 4,
        "avg_checkpoints": 2,
        "beam_size": 2,
    }


def whisper(corpus, domain):
    """Return overrides of CommonVoice/ASR/transformer/train_hf_whisper."""
    return {
        "data_folder": str(corpus.folder),
        "skip_prep": True,
        "train_csv": corpus.csv(domain, "train"),
        "valid_csv": corpus.csv(domain, "dev-clean"),
        "test_csv": corpus.csv(domain, "test-clean"),
        "whisper_hub": corpus.whisper(),
        "language": "en",
        "number_of_epochs": 2,
        "precision": "fp32",
        "eval_precision": "fp32",
        "batch_size": 2,
        "test_batch_size": 2,
        "grad_accumulation_factor": 1,
        "freeze_encoder": False,
        "lr_whisper": 0.001,
        "warmup_steps": 2,
        "max_decode_ratio": 0.1,
        "test_beam_size": 2,
    }


def iwslt(corpus, domain):
    """Return overrides of IWSLT22_lowresource/AST/train_w2v2_st."""
    return {
        "root_data_folder": str(corpus.folder),
        "data_folder": str(corpus.folder / domain / "iwslt"),
        "skip_prep": True,
        "vocab_size": 20,
        "wav2vec2_hub": corpus.wav2vec2(layers=2),
        "keep_n_layers": 1,
        "number_of_epochs": 2,
        "batch_size": 2,
        "test_batch_size": 2,
        "dataloader_options": {"num_workers": 0},
        "test_dataloader_options": {"num_workers": 0},
        "features_dim": WIDTH,
        "enc_dnn_neurons": WIDTH,
        "embedding_size": WIDTH,
        "d_model": WIDTH,
        "nhead": 2,
        "num_decoder_layers": 1,
        "d_ffn": WIDTH,
        "valid_beam_size": 2,
        "test_beam_size": 2,
    }


def fisher(corpus, domain):
    """Return overrides of Fisher-Callhome-Spanish/ST/transformer."""
    return {
        "data_folder": str(corpus.folder / domain / "fisher"),
        "tokenizer_file": str(corpus.tokenizer),
        "number_of_epochs": 2,
        "valid_search_epoch": 1,
        "batch_size": 2,
        "num_workers": 0,
        "grad_accumulation_factor": 1,
        "avg_checkpoints": 2,
        "d_model": WIDTH,
        "nhead": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "d_ffn": WIDTH,
        "output_neurons": corpus.vocabulary,
        "vocab_size": corpus.vocabulary,
        "CNN": {"out_channels": [8, 4]},
        "Transformer": {"input_size": 80},
        "valid_beam_size": 2,
        "test_beam_size": 2,
        "noam_annealing": {"n_warmup_steps": 4},
    }
