"""A small translator of recordings, as a recipe's YAML makes it."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_taskarith.brains import TranslationBrain, WordLabels
from speechbrain_taskarith.data import write_audio
from speechbrain_taskarith.translation import (
    TaskNormWeights,
    TranslationObjective,
    save_translator,
)

RATE = 8000
SOURCE = WordLabels(["a", "b", "c", "d", "e"])
TARGET = WordLabels(["<s>", "</s>", "A", "B", "C", "D", "E", "<other>"])
YAML = """\
seed: 1
d_model: 16
norm_type: sentence
beam_size: 3
dropout: 0.0
features: !new:speechbrain.lobes.features.Fbank
    sample_rate: 8000
    n_mels: 10
    n_fft: 256
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: !ref <norm_type>
CNN: !new:speechbrain.lobes.models.convolution.ConvolutionFrontEnd
    input_shape: [null, null, 10]
    num_blocks: 1
    num_layers_per_block: 1
    out_channels: [!ref <d_model>]
    kernel_sizes: [3]
    strides: [2]
    residuals: [False]
    conv_module: !name:speechbrain.nnet.CNN.Conv1d
    activation: !name:torch.nn.GELU
    dropout: !ref <dropout>
Transformer: !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
    tgt_vocab: 6
    input_size: !ref <d_model>
    d_model: !ref <d_model>
    nhead: 2
    num_encoder_layers: 1
    num_decoder_layers: 0
    d_ffn: 16
    dropout: !ref <dropout>
    encoder_module: conformer
    attention_type: RoPEMHA
    kernel_size: 3
    normalize_before: True
    causal: False
decoder: !new:speechbrain_taskarith.translation.TranslationDecoder
    vocab_size: 9
    d_model: !ref <d_model>
    nhead: 2
    num_layers: 1
    dropout: !ref <dropout>
shrink: !new:speechbrain_taskarith.translation.CTCShrink
    uniform: 4
model: !new:speechbrain_taskarith.translation.SpeechTranslationModel
    acoustic: !new:speechbrain_taskarith.translation.AcousticEncoder
        frontend: !ref <CNN>
        encoder: !new:speechbrain.lobes.models.transformer.TransformerASR.EncoderWrapper
            transformer: !ref <Transformer>
        d_model: !ref <d_model>
    textual: !new:speechbrain_taskarith.translation.TextEncoder
        d_model: !ref <d_model>
        nhead: 2
        num_layers: 1
        dropout: !ref <dropout>
    decoder: !ref <decoder>
    source_vocab: 6
    shrink: !ref <shrink>
    looking_back: !new:speechbrain_taskarith.translation.LookingBack
        d_model: !ref <d_model>
        nhead: 2
        dropout: !ref <dropout>
modules:
    model: !ref <model>
    normalize: !ref <normalize>
search: !new:speechbrain_taskarith.translation.TranslationBeamSearch
    decoder: !ref <decoder>
    bos_index: 1
    eos_index: 2
    beam_size: !ref <beam_size>
    max_decode_ratio: 0.0
    least_steps: 8
    length_penalty: 1.2
translator:
    model: !ref <model>
    features: !ref <features>
    normalize: !ref <normalize>
    search: !ref <search>
    sample_rate: 8000
    bos_index: 1
    eos_index: 2
    blank_index: 0
"""


def wave_of(number, seconds=None):
    """Return an utterance: a tone for every word, [samples]."""
    g = torch.Generator().manual_seed(number)
    tones = [(number + i) % 5 for i in range(2 + number % 2)]
    steps = torch.arange(round(0.24 * RATE)) / RATE
    wave = [torch.sin(2 * torch.pi * 400 * (1 + t) * steps) for t in tones]
    wave = 0.3 * torch.cat(wave) if seconds is None else None
    if seconds is not None:
        wave = torch.zeros(round(seconds * RATE))
    return wave + 0.02 * torch.randn(len(wave), generator=g)


def item(number):
    """Return an utterance; its translation has its words in capitals."""
    words = [SOURCE.units[(number + i) % 5] for i in range(2 + number % 2)]
    said, meant = " ".join(words), " ".join(words).upper()
    return {
        "id": f"u{number}",
        "sig": wave_of(number),
        "source": SOURCE.encode(said),
        "target_bos": TARGET.encode(f"<s> {meant}"),
        "target_eos": TARGET.encode(f"{meant} </s>"),
        "wrd": said,
        "translation": meant,
    }


def loader(*numbers, batch_size=1):
    """Return a loader of these utterances."""
    return torch.utils.data.DataLoader(
        [item(number) for number in numbers],
        batch_size=batch_size,
        collate_fn=PaddedBatch,
    )


@functools.cache
def trained_once():
    """Train it until it translates; return a folder, the Brain and the rest.

    The folder holds its translator, and recordings u0.wav to u4.wav.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    brain, made = trained(folder, epochs=60)
    meant = [item(number)["translation"] for number in range(5)]
    for _ in range(10):
        brain.evaluate(loader(*range(5)), progressbar=False)
        if brain.hypotheses == meant:
            break
        brain.fit(range(20), loader(*range(5), batch_size=5))
    assert brain.hypotheses == meant, "the toy did not learn to translate"
    save(folder, made)
    return folder, brain, made, write_wavs(folder)


def trained(folder, epochs, text=YAML, **overrides):
    """Train it for some epochs; return the Brain and what the YAML made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.yaml").write_text(text)
    torch.manual_seed(0)
    made = load_hyperpyyaml(text, overrides)
    sb.create_experiment_directory(
        folder, hyperparams_to_save=folder / "train.yaml", overrides=overrides
    )
    brain = TranslationBrain(
        made["modules"],
        opt_class=functools.partial(torch.optim.Adam, lr=0.02),
        hparams={
            **made,
            "compute_features": made["features"],
            "main": "st",
            "objective": TranslationObjective(blank_index=0),
            "task_weights": TaskNormWeights(["asr", "mt"], interval=1000),
            "source_labels": SOURCE,
            "target_labels": TARGET,
            **{"bos_index": 1, "eos_index": 2, "greedy_tokens": 8},
        },
        run_opts={"device": "cpu", "noprogressbar": True},
    )
    brain.fit(range(epochs), loader(*range(5), batch_size=5))
    return brain, made


def save(folder, made, **changed):
    """Store the translator of a training in `folder/translator`."""
    folder = Path(folder)
    arguments = {"target_labels": TARGET, "source_labels": SOURCE, **changed}
    return save_translator(
        folder / "translator",
        made["translator"],
        folder / "hyperparams.yaml",
        **arguments,
    )


def write_wavs(folder):
    """Write recordings u0.wav to u4.wav; return their paths."""
    numbers = range(5)
    paths = [Path(folder) / f"u{number}.wav" for number in numbers]
    for number, path in zip(numbers, paths):
        write_audio(path, wave_of(number), RATE)
    return paths
