"""Tied matrices, target languages, and encoders inside the whole model."""

import copy
import io
import zipfile

import pytest
import torch
from hugging_face_toy import save_encoder, save_whisper, wrapper
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.checkpoints import Checkpointer
from translation_toy import toy_batch, toy_model

from speechbrain_taskarith.translation import (
    AcousticEncoder,
    CTCShrink,
    LookingBack,
    SpeechTranslationModel,
    TargetLanguages,
    TextEncoder,
    TranslationDecoder,
    TranslationObjective,
    WhisperAcousticEncoder,
    initialise_from_text_translation,
)

TASKS = ("st", "asr", "mt")


def tied_model(seed=0):
    model = toy_model(seed=seed, tie_ctc=True)
    torch.manual_seed(seed)
    model.decoder = TranslationDecoder(8, 16, 2, 1, 32, 0.0, tie_embedding=True)
    return model


def losses_of(model):
    inputs, targets = toy_batch()
    out = model(tasks=TASKS, **inputs)
    return TranslationObjective(0)(out, **targets)


def test_tied_is_one_parameter():
    model, free = tied_model(), toy_model()
    free.decoder = TranslationDecoder(8, 16, 2, 1, 32, 0.0)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, free)]
    assert count[1] - count[0] == 6 * 16 + 8 * 16
    # Its gradient is the sum of both uses, each in a model without the tie.
    free.load_state_dict(copy.deepcopy(model.state_dict()))
    for made in (model, free):
        sum(losses_of(made).values()).backward()
    ways = {
        model.ctc_lin.weight: (free.ctc_lin, free.source_embedding),
        model.decoder.seq_lin.weight: (
            free.decoder.seq_lin,
            free.decoder.embedding.emb.Embedding,
        ),
    }
    for tied, uses in ways.items():
        torch.testing.assert_close(
            tied.grad, uses[0].weight.grad + uses[1].weight.grad
        )
        assert all(use.weight.grad.any() for use in uses)
    torch.optim.SGD(model.parameters(), 0.1).step()
    for other in (model, copy.deepcopy(model).double(), copy.deepcopy(model)):
        assert other.ctc_lin.weight is other.source_embedding.weight
        decoder = other.decoder
        embedding = decoder.embedding.emb.Embedding.weight
        assert decoder.seq_lin.weight is embedding


def test_tied_is_saved_once_and_loads(tmp_path):
    model = tied_model()
    torch.save(model.state_dict(), stream := io.BytesIO())
    names = zipfile.ZipFile(stream).namelist()
    written = [name for name in names if "/data/" in name]
    assert len(written) == len(model.state_dict()) - 2
    state = {n: t.clone() for n, t in model.state_dict().items()}
    # One name is enough, and two that are equal.
    half = {n: t for n, t in state.items() if n != "ctc_lin.weight"}
    for given in (state, half):
        other = tied_model(1)
        other.load_state_dict(given)
        assert torch.equal(other.ctc_lin.weight, model.source_embedding.weight)
        assert other.ctc_lin.weight is other.source_embedding.weight
    state["ctc_lin.weight"] += 1
    with pytest.raises(ValueError, match="ctc_lin.weight differ, and are tied"):
        tied_model(1).load_state_dict(state)
    with pytest.raises(ValueError, match="decoder.seq_lin.weight differ"):
        tied_model(1).load_state_dict(toy_model(tie_ctc=True).state_dict())
    # Through SpeechBrain's checkpointer, with an optimizer.
    resumed = tied_model(2)
    savers = []
    for made in (model, resumed):
        optimizer = torch.optim.Adam(made.parameters(), 0.01)
        savers.append(
            Checkpointer(tmp_path, {"model": made, "optimizer": optimizer})
        )
        for _ in range(2 if made is model else 0):
            sum(losses_of(made).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
    savers[0].save_checkpoint()
    savers[1].recover_if_possible()
    for saver in savers:
        made, optimizer = saver.recoverables.values()
        sum(losses_of(made).values()).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_tied_text_model_sets_the_head():
    text, speech = tied_model(1), tied_model(2)
    initialise_from_text_translation(speech, text)
    assert torch.equal(speech.ctc_lin.weight, text.source_embedding.weight)
    assert not torch.equal(speech.ctc_lin.bias, text.ctc_lin.bias)


def test_languages_are_named_and_checked():
    model = toy_model(languages={"de": 3, "fr": 4})
    assert model.languages.bos(["fr", "de", "fr"]).tolist() == [4, 3, 4]
    assert model.languages.bos("de") == 3
    for wrong in ("nl", ["de", "nl"]):
        with pytest.raises(ValueError, match="'nl' is unknown; known are de"):
            model.languages.bos(wrong)
    with pytest.raises(ValueError, match="'fr' has token 8; .* tokens 0 to 7"):
        toy_model(languages=TargetLanguages({"fr": 8}))
    for wrong in ({}, {"de": 3, "fr": 3}):
        with pytest.raises(ValueError, match="a token of its own for each"):
            TargetLanguages(wrong)
    with pytest.raises(ValueError, match="user_defined_symbols=<de>,<fr>"):
        TargetLanguages.for_pieces(["<de>"], ["de", "fr"])


def test_the_language_decides_the_translation():
    """Of one text two translations are learnt, by the first token alone."""
    model = toy_model(languages={"de": 3, "fr": 4})
    inputs, targets = toy_batch(2)
    inputs["source"] = inputs["source"][:1].repeat(2, 1)
    inputs["source_lens"] = torch.ones(2)
    bos = model.languages.bos(["de", "fr"])
    inputs["target_bos"] = torch.cat(
        [bos[:, None], inputs["target_bos"][:, 1:]], 1
    )
    del inputs["x"], inputs["lens"]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        out = model(tasks=("mt",), **inputs)
        loss = torch.nn.functional.cross_entropy(
            out.mt.transpose(1, 2), targets["target_eos"]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(out.mt.argmax(-1), targets["target_eos"])


def test_parts_of_another_width():
    parts = {
        "acoustic": AcousticEncoder(torch.nn.Identity(), 8),
        "textual": TextEncoder(8, 2, 1),
        "decoder": TranslationDecoder(9, 8, 2, 1),
        "source_vocab": 5,
    }
    SpeechTranslationModel(**parts)
    for name, other in (
        ("acoustic encoder", AcousticEncoder(torch.nn.Identity(), 6)),
        ("decoder", TranslationDecoder(9, 6, 2, 1)),
    ):
        wrong = {**parts, name.split()[0]: other}
        with pytest.raises(ValueError, match=f"the {name} has a width of 6"):
            SpeechTranslationModel(**wrong)


YAML = """
acoustic: !new:speechbrain_taskarith.translation.WhisperAcousticEncoder
    source: {source}
    d_model: 16
    trained_layers: 1
features: !new:speechbrain_taskarith.translation.EncoderCache
    encoder: !ref <acoustic>
    folder: {folder}
model: !new:speechbrain_taskarith.translation.SpeechTranslationModel
    acoustic: !ref <acoustic>
    textual: !new:speechbrain_taskarith.translation.TextEncoder
        d_model: 16
        nhead: 2
        num_layers: 1
    decoder: !new:speechbrain_taskarith.translation.TranslationDecoder
        vocab_size: 8
        d_model: 16
        nhead: 2
        num_layers: 1
        tie_embedding: True
    source_vocab: 6
    shrink: !new:speechbrain_taskarith.translation.CTCShrink
    looking_back: !new:speechbrain_taskarith.translation.LookingBack
        d_model: 16
        nhead: 2
    tie_ctc: True
    languages:
        de: 5
        fr: 6
"""


def test_a_yaml_names_all_of_it(tmp_path):
    source = save_whisper(tmp_path / "whisper", encoder_layers=2)
    made = load_hyperpyyaml(
        YAML.format(source=source, folder=tmp_path / "features")
    )
    model = made["model"]
    assert made["features"].encoder is model.acoustic
    assert model.languages.bos("fr") == 6
    inputs, targets = toy_batch(2)
    inputs.update(x=torch.randn(2, 9000), lens=torch.tensor([1.0, 0.5]))
    objective = TranslationObjective(0)
    out = model(tasks=TASKS, **inputs)
    sum(objective(out, **targets).values()).backward()
    layers = model.acoustic.encoder.layers
    assert layers[0].fc1.weight.grad is None
    assert layers[1].fc1.weight.grad.any()


@pytest.mark.parametrize("kind", ["Whisper", "Hubert"])
def test_the_model_knows_which_frames_are_speech(kind, tmp_path):
    """A batch is encoded, shrunk and looked at as single utterances are."""
    if kind == "Whisper":
        folder = save_whisper(tmp_path / "encoder", max_source_positions=1500)
        acoustic = WhisperAcousticEncoder(folder, 16)
    else:
        folder = save_encoder(tmp_path / "encoder", kind)
        acoustic = AcousticEncoder(wrapper(kind, folder), 16)
    torch.manual_seed(0)
    model = SpeechTranslationModel(
        acoustic,
        TextEncoder(16, 2, 1),
        TranslationDecoder(8, 16, 2, 1),
        source_vocab=6,
        shrink=CTCShrink(),
        looking_back=LookingBack(16, 2),
    )
    model = model.double().eval()
    waves = [torch.randn(n).double() for n in (16000, 9600, 321)]
    x = torch.nn.utils.rnn.pad_sequence(
        waves, batch_first=True, padding_value=float("nan")
    )
    lens = torch.tensor([len(wave) / x.shape[1] for wave in waves])
    found = model.encode_speech(x, lens)
    frames = found.segments.frame_lengths.tolist()
    if kind == "Whisper":
        assert found.logits.shape[1] == 50 and frames == [50, 30, 2]
    for row, wave in enumerate(waves):
        alone = model.encode_speech(wave[None], torch.ones(1))
        count = alone.encoded.shape[1]
        assert alone.segments.frame_lengths.tolist() == frames[row : row + 1]
        torch.testing.assert_close(found.encoded[row, :count], alone.encoded[0])
        assert round(float(found.lens[row]) * found.encoded.shape[1]) == count
    lens[1] = 0.0
    with pytest.raises(ValueError, match="'b' have a length of 0"):
        model.encode_speech(x, lens, ids=["a", "b", "c"])
