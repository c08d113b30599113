"""A translator whose YAML takes the method from a shipped fragment."""

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from translator_toy import SOURCE, TARGET

from speechbrain_taskarith.translation import SpeechTranslator, save_translator

YAML = """\
source_vocab: 6
translation: !apply:speechbrain_taskarith.fragment
    name: translation/joint
    source_vocab: !ref <source_vocab>
    target_vocab: 9
    d_model: 8
    nhead: 2
    d_ffn: 8
    num_encoder_layers: 1
    num_decoder_layers: 1
    pooling: mean
model: !new:speechbrain_taskarith.translation.SpeechTranslationModel
    acoustic: !new:speechbrain_taskarith.translation.AcousticEncoder
        encoder: !new:speechbrain.lobes.models.transformer.TransformerASR.EncoderWrapper
            transformer: !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
                tgt_vocab: 6
                input_size: 10
                d_model: 8
                nhead: 2
                num_encoder_layers: 1
                num_decoder_layers: 0
                d_ffn: 8
                encoder_module: conformer
                attention_type: RoPEMHA
                kernel_size: 3
                normalize_before: True
                causal: False
        d_model: 8
    textual: !ref <translation.textual>
    decoder: !ref <translation.decoder>
    source_vocab: !ref <source_vocab>
    shrink: !ref <translation.shrink>
    looking_back: !ref <translation.looking_back>
    noise: !ref <translation.noise>
translator:
    model: !ref <model>
    features: !new:speechbrain.lobes.features.Fbank
        n_mels: 10
    search: !new:speechbrain_taskarith.translation.TranslationBeamSearch
        decoder: !ref <translation.decoder>
        bos_index: 1
        eos_index: 2
        least_steps: 6
    sample_rate: 16000
    bos_index: 1
    eos_index: 2
"""


def test_the_folder_needs_no_fragment(tmp_path):
    (tmp_path / "train.yaml").write_text(YAML)
    made = load_hyperpyyaml(YAML)
    folder = save_translator(
        tmp_path / "translator",
        made["translator"],
        tmp_path / "train.yaml",
        TARGET,
        SOURCE,
    )
    text = (folder / "hyperparams.yaml").read_text()
    assert "apply" not in text and "BlankNoise" not in text
    translator = SpeechTranslator.from_hparams(
        source=folder, run_opts={"device": "cpu"}
    )
    model = translator.mods.model
    assert model.shrink.pooling == "mean"
    assert translator.search.model is model.decoder
    wave = torch.randn(1, 4000) / 10
    with torch.no_grad():
        x = made["translator"]["features"](wave)
        mine = made["model"].eval().encode_speech(x, torch.ones(1))
    found = translator.encode(wave[0]).speech
    assert torch.equal(mine.encoded, found.encoded)


def test_an_object_in_a_fragment_cannot_be_written_down(tmp_path):
    text = YAML.replace(
        "    pooling: mean\n", "    textual: !new:torch.nn.Identity\n"
    )
    (tmp_path / "train.yaml").write_text(text)
    made = load_hyperpyyaml(YAML)
    with pytest.raises(ValueError, match="translation/joint with a"):
        save_translator(
            tmp_path / "translator",
            made["translator"],
            tmp_path / "train.yaml",
            TARGET,
        )
