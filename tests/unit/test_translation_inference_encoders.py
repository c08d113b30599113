"""Translators around encoders of Hugging Face: no hub and no origin needed."""

import shutil

import pytest
import speechbrain as sb
import torch
from hugging_face_toy import save_encoder, save_whisper
from hyperpyyaml import load_hyperpyyaml
from translator_toy import SOURCE, TARGET

from speechbrain_taskarith.data import write_audio
from speechbrain_taskarith.translation import SpeechTranslator, save_translator

WRAPPED = """\
acoustic: !new:speechbrain_taskarith.translation.AcousticEncoder
    encoder: !new:speechbrain.integrations.huggingface.{name}
        source: !ref <source>
        save_path: !ref <source>
        freeze: {freeze}
    d_model: 8
    d_encoder: 16
"""
WHISPER = """\
acoustic: !new:speechbrain_taskarith.translation.WhisperAcousticEncoder
    source: !ref <source>
    d_model: 8
    trained_layers: 1
"""
REST = """\
source: !PLACEHOLDER
decoder: !new:speechbrain_taskarith.translation.TranslationDecoder
    vocab_size: 9
    d_model: 8
    nhead: 2
    num_layers: 1
    tie_embedding: True
model: !new:speechbrain_taskarith.translation.SpeechTranslationModel
    acoustic: !ref <acoustic>
    textual: !new:speechbrain_taskarith.translation.TextEncoder
        d_model: 8
        nhead: 2
        num_layers: 1
    decoder: !ref <decoder>
    source_vocab: 6
    shrink: !new:speechbrain_taskarith.translation.CTCShrink
    tie_ctc: True
translator:
    model: !ref <model>
    features: null
    sample_rate: 16000
    bos_index: 1
    eos_index: 2
    greedy_tokens: 6
"""
KINDS = {
    "HuBERT": (WRAPPED.format(name="hubert.HuBERT", freeze=True), "Hubert"),
    "wav2vec 2.0": (
        WRAPPED.format(name="wav2vec2.Wav2Vec2", freeze=False),
        "Wav2Vec2",
    ),
    "Whisper": (WHISPER, "Whisper"),
}


@pytest.mark.parametrize("encoder, kind", KINDS.values(), ids=KINDS)
def test_the_encoder_comes_along(encoder, kind, tmp_path):
    origin = tmp_path / "origin"
    if kind == "Whisper":
        save_whisper(origin)
    else:
        save_encoder(origin, kind)
    (tmp_path / "train.yaml").write_text(encoder + REST)
    overrides = {"source": str(origin)}
    made = load_hyperpyyaml(encoder + REST, overrides)
    sb.create_experiment_directory(
        tmp_path / "run", tmp_path / "train.yaml", overrides
    )
    made["model"].eval()
    with torch.no_grad():
        # As after a training: not what the folder of origin holds.
        for parameter in made["model"].parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    folder = save_translator(
        tmp_path / "translator",
        made["translator"],
        tmp_path / "run/hyperparams.yaml",
        TARGET,
        SOURCE,
    )
    shutil.rmtree(origin)
    described = (folder / "hyperparams.yaml").read_text()
    assert str(tmp_path) not in described
    # Weights are stored once.
    inside = [path for path in folder.rglob("*") if path.is_file()]
    big = [p.name for p in inside if p.stat().st_size > 10000]
    assert big == ["model.safetensors"]
    translator = SpeechTranslator.from_hparams(
        source=folder, run_opts={"device": "cpu"}
    )
    wave = torch.randn(1, 4000).clamp(-3, 3) / 4
    with torch.no_grad():
        mine = made["model"].encode_speech(wave, torch.ones(1))
        found = translator.mods.model.encode_speech(wave, torch.ones(1))
    assert torch.equal(mine.logits, found.logits)
    assert torch.equal(mine.encoded, found.encoded)
    model = translator.mods.model
    assert model.ctc_lin.weight is model.source_embedding.weight
    (one,) = translator.translate_batch(wave)
    assert one.segments[-1].end == pytest.approx(0.25, abs=0.001)
    # Two seconds: the toy Whisper's window has one, the others have none.
    path = tmp_path / "long.wav"
    write_audio(path, torch.randn(32000).clamp(-3, 3) / 4, 16000)
    if kind == "Whisper":
        with pytest.raises(ValueError, match=r"long.wav' has 2.00 s.* has 1 s"):
            translator.translate_file(path)
    else:
        assert translator.translate_file(path).seconds == 2.0
    with open(folder / "hyperparams.yaml", "a") as stream:
        stream.write(
            "more: !new:speechbrain.integrations.huggingface.wav2vec2.Wav2Vec2"
            "\n    source: here\n    save_path: here\n"
            "    trust_remote_code: True\n"
        )
    with pytest.raises(ValueError, match="'trust_remote_code' is refused"):
        SpeechTranslator.from_hparams(source=folder)
