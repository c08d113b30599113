"""HuBERT, wav2vec 2.0 and any other encoder: lengths, padding, what trains."""

import copy
import logging
import math

import pytest
import torch
from hugging_face_toy import save_encoder, save_whisper, wrapper

from speechbrain_taskarith.translation import AcousticEncoder

transformers = pytest.importorskip("transformers")

SIZES = (1200, 803, 411, 45, 5)  # 45 samples are a frame
# Of size base, and of size large.
BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
KINDS = {
    "hubert": ("Hubert", BASE),
    "large hubert": ("Hubert", {**LARGE, "num_conv_pos_embeddings": 5}),
    "wav2vec2": ("Wav2Vec2", BASE),
    "large wav2vec2": ("Wav2Vec2", {**LARGE, "conv_bias": True}),
    "wavlm": ("WavLM", BASE),
}


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    """SpeechBrain's wrapper, and if its layers can be trained apart."""
    kind, settings = KINDS[request.param]
    folder = save_encoder(
        tmp_path / "encoder",
        kind,
        **{"num_hidden_layers": 3, "hidden_dropout": 0.3, **settings},
        layerdrop=0.2,
    )
    encoder = wrapper(kind, folder).double()
    return encoder, request.param != "wavlm"


@pytest.fixture
def waves():
    torch.manual_seed(1)
    return [torch.randn(size).double() + 0.3 for size in SIZES]


def batch_of(waves):
    x = torch.nn.utils.rnn.pad_sequence(
        waves, batch_first=True, padding_value=math.nan
    )
    return x, torch.tensor([len(w) / x.shape[1] for w in waves])


def test_a_batch_is_its_utterances_one_by_one(made, waves):
    encoder, _ = made
    acoustic = AcousticEncoder(encoder, 12).double().eval()
    found, counts = acoustic(*batch_of(waves))
    assert found.isfinite().all()
    for row, (wave, count) in enumerate(zip(waves, counts.tolist())):
        alone, one = acoustic(wave[None], torch.ones(1))
        assert one.tolist() == [count] and alone.shape[1] == count
        torch.testing.assert_close(found[row, :count], alone[0])
        if len(wave) < 45:
            assert count == 1, "less than a frame is a frame"
            continue
        # SpeechBrain's own, which sees no padding here.
        expected = acoustic.projection(encoder(wave[None], torch.ones(1)))
        torch.testing.assert_close(alone, expected)
        lengths = encoder.model._get_feat_extract_output_lengths(len(wave))
        assert count == int(lengths)


def test_gradients_do_not_depend_on_padding(made, waves):
    encoder, _ = made
    acoustic = AcousticEncoder(encoder, 16).double().eval()

    def gradients(*batches):
        acoustic.zero_grad()
        for x, lens in batches:
            acoustic(x, lens)[0].square().sum().backward()
        learnt = acoustic.named_parameters()
        return {n: p.grad for n, p in learnt if p.grad is not None}

    together = gradients(batch_of(waves[:3]))
    apart = gradients(*[(w[None], torch.ones(1)) for w in waves[:3]])
    assert len(together) > 40
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name])


@pytest.mark.parametrize("trained", [0, 1, 3])
def test_last_layers_are_trained(made, waves, trained):
    encoder, apart = made
    x, lens = batch_of(waves)
    expected = AcousticEncoder(copy.deepcopy(encoder), 16).double().eval()
    expected = expected(x, lens)[0]
    if trained and not apart:
        with pytest.raises(ValueError, match="wavlm has 0 layers"):
            AcousticEncoder(encoder, 16, trained_layers=trained)
        return
    acoustic = AcousticEncoder(encoder, 16, trained_layers=trained).train()
    layers = encoder.model.encoder.layers
    modes = [layer.training for layer in layers]
    assert modes == [i >= 3 - trained for i in range(3)]
    assert not encoder.model.training
    first, second = acoustic(x, lens)[0], acoustic(x, lens)[0]
    assert torch.equal(first, second) == (trained == 0)
    assert first.requires_grad == (trained > 0)
    if trained:
        first.sum().backward()
    for layer, learns in zip(layers, modes):
        learnt = [p.grad is not None for p in layer.parameters()]
        assert all(learnt) if learns else not any(learnt)
    acoustic.eval()
    torch.testing.assert_close(acoustic(x, lens)[0], expected)
    # The frozen part by itself, as a cache has it.
    hidden, counts = acoustic.frozen(x, lens)
    assert not hidden.requires_grad
    found, again = acoustic(hidden, counts / hidden.shape[1])
    assert torch.equal(again, counts)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("option", ["output_norm", "output_all_hiddens"])
def test_an_option_that_reads_the_padding_is_named(tmp_path, option, caplog):
    folder = save_encoder(tmp_path / "x", "Hubert")
    AcousticEncoder(wrapper("Hubert", folder, **{option: False}), 16)
    assert not caplog.records
    AcousticEncoder(wrapper("Hubert", folder, **{option: True}), 16)
    assert f"HuBERT with {option}: frames" in caplog.text


def test_frozen_by_its_own_wrapper(tmp_path, waves):
    folder = save_encoder(tmp_path / "x", "Hubert", hidden_dropout=0.5)
    acoustic = AcousticEncoder(wrapper("Hubert", folder, freeze=True), 16)
    x, lens = batch_of([wave.float() for wave in waves])
    acoustic.train()
    assert torch.equal(acoustic(x, lens)[0], acoustic(x, lens)[0])
    assert acoustic.frozen(x, lens)[0].shape[2] == 16


def test_modules_of_transformers(tmp_path, waves):
    x, lens = batch_of([wave.float() for wave in waves])
    folder = save_encoder(tmp_path / "x", "Hubert", **BASE)
    model = transformers.HubertModel.from_pretrained(folder).eval()
    found, counts = AcousticEncoder(model, 16)(x, lens)
    alone = model(waves[1][None].float()).last_hidden_state
    torch.testing.assert_close(
        found[1, : counts[1]], alone[0], atol=1e-5, rtol=0
    )
    task = transformers.HubertForCTC.from_pretrained(folder).eval()
    task.hubert.load_state_dict(model.state_dict())
    assert torch.equal(AcousticEncoder(task, 16)(x, lens)[0], found)
    copied = copy.deepcopy(AcousticEncoder(model, 16))
    assert torch.equal(copied(x, lens)[0], found)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(waves[1][None].float()).last_hidden_state
        ours = AcousticEncoder(model, 16, trained_layers=1).eval()(x, lens)[0]
    # About as far off as transformers itself is.
    allowed = 4 * (cast - alone).abs().mean()
    assert 0 < (ours - found)[1, : counts[1]].abs().mean() < allowed


def test_widths_that_do_not_fit(tmp_path):
    folder = save_encoder(tmp_path / "x", "Hubert")
    with pytest.raises(ValueError, match="d_encoder: 768, .* width of 16"):
        AcousticEncoder(wrapper("Hubert", folder), 8, d_encoder=768)
    acoustic = AcousticEncoder(wrapper("Hubert", folder), 8)
    with pytest.raises(ValueError, match=r"hubert was given \(1, 4, 80\)"):
        acoustic(torch.rand(1, 4, 80), torch.ones(1))
    with pytest.raises(ValueError, match=r"expected .* 6\]; give its width"):
        AcousticEncoder(Steps(), 8, 6)(torch.rand(1, 5, 3), torch.ones(1))


def test_whisper_that_pads_to_its_window_is_refused(tmp_path):
    folder = save_whisper(tmp_path / "whisper")
    whisper = transformers.WhisperModel.from_pretrained(folder)
    for encoder in (
        whisper,
        whisper.encoder,
        wrapper("Whisper", folder, encoder_only=True),
    ):
        with pytest.raises(ValueError, match="use WhisperAcousticEncoder"):
            AcousticEncoder(encoder, 16)


class Steps(torch.nn.Module):
    """Returns every second step, and anything behind them."""

    def __init__(self, behind=None, steps=None):
        super().__init__()
        self.behind, self.steps = behind, steps
        self.drop = torch.nn.Dropout(0.5)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, lens):
        x = self.scale * self.drop(x)[:, ::2]
        if self.steps is not None:
            x = x.new_zeros(len(x), self.steps, x.shape[2])
        return x if self.behind is None else (x, self.behind)


def test_lengths_that_an_encoder_returns_are_believed():
    x, lens = torch.rand(2, 9, 3), torch.tensor([1.0, 0.6])
    for behind in (torch.tensor([5, 2]), torch.tensor([1.0, 0.4])):
        frames, counts = AcousticEncoder(Steps(behind), 4, 3)(x, lens)
        assert counts.tolist() == [5, 2] and counts.dtype == torch.int64
        assert not frames[1, 2:].any() and frames[1, 1].any()
    # Attention, a recurrent state, nothing.
    for behind in (torch.rand(1, 2, 3), [torch.rand(2)], (torch.rand(2),), {}):
        assert AcousticEncoder(Steps(behind), 3)(x, lens).shape == (2, 5, 3)


def test_a_length_that_stays_is_reported(caplog):
    caplog.set_level(logging.WARNING)
    lens = torch.ones(1)
    moving, fixed = (
        AcousticEncoder(Steps(), 3),
        AcousticEncoder(Steps(steps=7), 3),
    )
    for size in (8, 8, 9, 30, 8):
        moving(torch.rand(1, size, 3), lens)
    for size in (8, 8, 9):
        fixed(torch.rand(1, size, 3), lens)
    assert not caplog.records
    for size in (30, 8, 30):
        fixed(torch.rand(1, size, 3), lens)
    assert len(caplog.records) == 1
    assert "Steps returns 7 frames for batches of 9 and of 30" in caplog.text


@pytest.mark.parametrize("trained_layers", [None, 0, 1])
def test_a_frontend_stands_before_pretrained_encoders(
    made, waves, trained_layers
):
    encoder, apart = made
    if trained_layers and not apart:
        pytest.skip("its layers are not trained apart")

    class Gain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(2.0).double())

        def forward(self, x):
            # Another shape of the wave: encoders may normalise its loudness.
            return self.gain * x + x**3

    front = Gain()
    acoustic = AcousticEncoder(
        encoder, 12, frontend=front, trained_layers=trained_layers
    ).train()
    if trained_layers == 0:
        assert not any(m.training for m in acoustic.encoder.modules())
    acoustic.double().eval()
    plain = AcousticEncoder(encoder, 12, trained_layers=trained_layers)
    plain.double().eval().projection = acoustic.projection
    x, lens = batch_of(waves)
    found, counts = acoustic(x, lens)
    with torch.no_grad():
        wanted, others = plain(front(x), lens)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(counts, others)
    found.square().sum().backward()
    assert front.gain.grad.abs() > 0
    with pytest.raises(ValueError, match="expected waveforms"):
        AcousticEncoder(encoder, 12, frontend=torch.nn.Unflatten(1, (-1, 1)))(
            torch.rand(1, 1200).double(), torch.ones(1)
        )


def test_any_encoder_can_be_frozen():
    torch.manual_seed(0)
    frontend = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)
    ).requires_grad_(False)
    acoustic = AcousticEncoder(Steps(), 4, 3, frontend, trained_layers=0)
    acoustic.train()
    x, lens = torch.rand(2, 9, 3), torch.ones(2)
    assert torch.equal(acoustic(x, lens), acoustic(x, lens))
    assert acoustic.projection.training and not acoustic.encoder.training
    with pytest.raises(ValueError, match="layers of Steps are not known"):
        AcousticEncoder(Steps(), 4, 3, trained_layers=1)
    with pytest.raises(ValueError, match="does not take waveforms"):
        acoustic.frozen(x, lens)
    with pytest.raises(ValueError, match="an empty batch"):
        acoustic(x[:0], lens[:0])
