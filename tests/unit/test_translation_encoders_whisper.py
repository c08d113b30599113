"""Whisper cut to the speech, against transformers' own 30 s form."""

import copy
import pickle
import shutil

import pytest
import safetensors.torch
import torch
from hugging_face_toy import save_encoder, save_whisper, wrapper

from speechbrain_taskarith.translation import WhisperAcousticEncoder

transformers = pytest.importorskip("transformers")

WINDOW = 50  # frames of 320 samples, of the toy
SIZES = (16000, 15900, 9001, 8000, 321, 320, 1)


@pytest.fixture
def folder(tmp_path):
    return save_whisper(tmp_path / "whisper", encoder_layers=3, dropout=0.3)


@pytest.fixture
def waves():
    torch.manual_seed(1)
    return [0.1 * torch.randn(size).double() for size in SIZES]


def batch_of(waves, padding=float("nan"), longer=0):
    x = torch.nn.utils.rnn.pad_sequence(
        waves, batch_first=True, padding_value=padding
    )
    x = torch.nn.functional.pad(x, (0, longer), value=padding)
    return x, torch.tensor([len(w) / x.shape[1] for w in waves])


def full_mel(wave):
    """Return [1, mels, steps] of the whole window, by transformers."""
    extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    made = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    return made.input_features


def naive(encoder, wave):
    """Embed the whole window, keep the frames of speech, run the layers."""
    frames = -(-len(wave) // 320)
    x = torch.nn.functional.gelu(encoder.conv1(full_mel(wave).double()))
    x = torch.nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
    x = (x + encoder.embed_positions.weight)[:, :frames]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)[0]


@pytest.mark.parametrize("size", SIZES)
def test_features_are_those_of_transformers(folder, size):
    torch.manual_seed(size)
    wave = 0.1 * torch.randn(size)
    encoder = WhisperAcousticEncoder(folder, 16)
    mel = encoder.reader.log_mel(wave[None], -(-size // 320))
    expected = full_mel(wave)
    # Products of other sizes are rounded otherwise by some processors.
    torch.testing.assert_close(
        mel, expected[..., : mel.shape[2]], rtol=0, atol=1e-5
    )
    # All that the frames' convolutions read is there.
    assert mel.shape[2] >= min(2 * -(-size // 320) + 1, 2 * WINDOW)


def test_a_whole_window_is_what_transformers_makes_of_it(folder, waves):
    encoder = WhisperAcousticEncoder(folder, 16).double()
    for wave in waves[:2]:
        found, lengths = encoder(wave[None], torch.ones(1))
        expected = encoder.encoder(full_mel(wave).double()).last_hidden_state
        assert lengths.tolist() == [WINDOW]
        # The features are float32 inside transformers.
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_is_its_utterances_one_by_one(folder, waves):
    encoder = WhisperAcousticEncoder(folder, 12).double()
    for longer in (0, 700):  # padding beyond the window
        found, lengths = encoder(*batch_of(waves, longer=longer))
        assert found.isfinite().all()
        assert lengths.tolist() == [-(-size // 320) for size in SIZES]
        for row, (wave, count) in enumerate(zip(waves, lengths.tolist())):
            alone, one = encoder(wave[None], torch.ones(1))
            assert one.tolist() == [count] and alone.shape[1] == count
            torch.testing.assert_close(found[row, :count], alone[0])
            expected = encoder.projection(naive(encoder.encoder, wave))
            torch.testing.assert_close(alone[0], expected, atol=1e-5, rtol=1e-5)


def test_gradients_do_not_depend_on_padding(folder, waves):
    encoder = WhisperAcousticEncoder(folder, 16, None).double().eval()

    def gradients(*batches):
        encoder.zero_grad()
        for x, lens in batches:
            frames, lengths = encoder(x, lens)
            for row, count in zip(frames, lengths.tolist()):
                row[:count].square().sum().backward(retain_graph=True)
        return {n: p.grad for n, p in encoder.named_parameters()}

    together = gradients(batch_of(waves[1:4]))
    apart = gradients(*[(w[None], torch.ones(1)) for w in waves[1:4]])
    assert len(together) > 40
    for name, gradient in together.items():
        if "positions" not in name:  # frozen in some versions
            torch.testing.assert_close(gradient, apart[name])


def test_an_utterance_beyond_the_window_is_named(folder):
    encoder = WhisperAcousticEncoder(folder, 16)
    x, lens = torch.zeros(2, 16001), torch.tensor([0.5, 1.0])
    with pytest.raises(ValueError, match=r"'u2' has 1.00 s.*window has 1 s"):
        encoder(x, lens, ids=["u1", "u2"])
    with pytest.raises(ValueError, match="row 1 of the batch.*Cut it into"):
        encoder(x, lens)
    with pytest.raises(ValueError, match="an empty batch"):
        encoder(x[:0], lens[:0])


@pytest.mark.parametrize("trained", [0, 1, 2, 3, None])
def test_what_is_trained(folder, waves, trained):
    encoder = WhisperAcousticEncoder(folder, 16, trained).double().train()
    layers = encoder.encoder.layers
    expected = [trained is None or i >= 3 - trained for i in range(3)]
    assert [layer.training for layer in layers] == expected
    x, lens = batch_of(waves[:3])
    # Dropout of 0.3 where it is trained, none elsewhere.
    first, second = encoder(x, lens)[0], encoder(x, lens)[0]
    assert torch.equal(first, second) == (trained == 0)
    if trained == 0:
        assert not first.requires_grad
        return
    first.sum().backward()
    for layer, learns in zip(layers, expected):
        for parameter in layer.parameters():
            assert (parameter.grad is not None) == learns
    learns = encoder.encoder.conv1.weight.grad is not None
    assert learns == (trained is None)
    encoder.eval()
    again = encoder(x, lens)[0]
    whole = WhisperAcousticEncoder(folder, 16, None).double().eval()
    assert torch.equal(again, whole(x, lens)[0])


@pytest.mark.parametrize("trained", [-1, 4, 1.0, True])
def test_layers_that_are_not_there(folder, trained):
    with pytest.raises(ValueError, match="3 layers .* expected 0"):
        WhisperAcousticEncoder(folder, 16, trained)


def test_what_is_frozen_goes_in_by_itself(folder, waves):
    for trained in (0, 1, 3):
        encoder = WhisperAcousticEncoder(folder, 12, trained).double()
        encoder.eval()
        x, lens = batch_of(waves)
        hidden, counts = encoder.frozen(x, lens)
        assert not hidden.requires_grad
        expected = encoder(x, lens)
        found = encoder(hidden, counts / hidden.shape[1])
        assert torch.equal(found[1], counts)
        torch.testing.assert_close(found[0], expected[0])
    with pytest.raises(ValueError, match=r"expected waveforms .* 16\]"):
        encoder(torch.zeros(1, 3, 12), torch.ones(1))
    whole = WhisperAcousticEncoder(folder, 12, None)
    with pytest.raises(ValueError, match="nothing .* is frozen"):
        whole.frozen(x, lens)
    with pytest.raises(ValueError, match=r"expected waveforms .*samples\]$"):
        whole(torch.zeros(1, 3, 16), torch.ones(1))


def test_sources_of_one_encoder(folder, waves):
    x, lens = batch_of(waves)
    expected = WhisperAcousticEncoder(folder, 16).double()(x, lens)[0]
    whole = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    speechbrain = wrapper("Whisper", folder, encoder_only=True)
    sources = {
        "text": str(folder),
        "task": whole,
        "model": whole.model,
        "encoder": whole.model.encoder,
        "SpeechBrain": speechbrain,
    }
    for name, source in sources.items():
        encoder = WhisperAcousticEncoder(copy.deepcopy(source), 16).double()
        assert torch.equal(encoder(x, lens)[0], expected), name
        assert "decoder" not in str(list(encoder.state_dict())), name
    # Without weights, for a model whose checkpoint follows.
    (folder / "model.safetensors").unlink()
    bare = WhisperAcousticEncoder(folder, 16, weights=False).double()
    assert not torch.equal(bare(x, lens)[0], expected)
    bare.load_state_dict(encoder.state_dict())
    assert torch.equal(bare(x, lens)[0], expected)
    with pytest.raises(ValueError, match="weights are missing or damaged"):
        WhisperAcousticEncoder(folder, 16)


def test_sources_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download openai/whisper-x"):
        WhisperAcousticEncoder("openai/whisper-x", 16)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        WhisperAcousticEncoder(tmp_path / "nothing", 16)
    hubert = save_encoder(tmp_path / "hubert", "Hubert")
    with pytest.raises(ValueError, match="a hubert model, expected a Whisper"):
        WhisperAcousticEncoder(hubert, 16)
    with pytest.raises(ValueError, match="Linear holds no Whisper"):
        WhisperAcousticEncoder(torch.nn.Linear(1, 1), 16)
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    del tensors["encoder.layers.1.fc1.bias"]
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 .*encoder.layers.1.fc1.bias"):
        WhisperAcousticEncoder(folder, 16)
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValueError, match="damaged"):
        WhisperAcousticEncoder(folder, 16)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match="config.json is missing"):
        WhisperAcousticEncoder(folder, 16)


def test_copies_and_number_types(folder, waves):
    encoder = WhisperAcousticEncoder(folder, 12, 1).eval()
    x, lens = batch_of([wave.float() for wave in waves])
    expected, _ = encoder(x, lens)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(x, lens)[0], expected)
    half = copy.deepcopy(encoder).bfloat16()
    assert half(x, lens)[0].dtype == torch.bfloat16
    # About as far off as transformers itself is, on a whole window.
    mel = full_mel(waves[0])
    own = encoder.encoder(mel).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        cast = encoder(x, lens)[0]
        cast.sum().backward()
        own_cast = encoder.encoder(mel).last_hidden_state
    own_half = half.encoder(mel.bfloat16()).last_hidden_state
    for found, other in ((cast, own_cast), (half(x, lens)[0], own_half)):
        error = ((other.float() - own) @ encoder.projection.weight.T).abs()
        assert 0 < (found.float() - expected)[0].abs().mean() < 4 * error.mean()
    learnt = encoder.encoder.layers[2].fc1.weight.grad
    assert learnt is not None and learnt.isfinite().all()
