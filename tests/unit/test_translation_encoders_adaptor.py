"""Layers of one's own behind Whisper, HuBERT, wav2vec 2.0 and any encoder."""

import math

import pytest
import torch
from hugging_face_toy import save_encoder, save_whisper, wrapper
from speechbrain.lobes.models.transformer.TransformerASR import (
    EncoderWrapper,
    TransformerASR,
)

from speechbrain_taskarith.translation import (
    AcousticEncoder,
    LocalExtractor,
    WhisperAcousticEncoder,
)

pytest.importorskip("transformers")

WIDTH = 12
SIZES = {"whisper": (16000, 9001, 320, 1), "any": (90, 61, 24, 1)}
KINDS = ("whisper", "Hubert", "Wav2Vec2", "any")


class Front(torch.nn.Module):
    """An encoder that halves the frames, and says how many there are."""

    def __init__(self, told):
        super().__init__()
        self.conv = torch.nn.Conv1d(5, 16, 3, 2, 1)
        self.told = told

    def forward(self, x, lens):
        frames = self.conv(x.transpose(1, 2)).transpose(1, 2)
        counts = ((lens * x.shape[1]).round().long() + 1) // 2
        return (frames, counts) if self.told else frames


def conformer(attention="RoPEMHA"):
    """Make the layers that recipes put behind a frozen encoder."""
    torch.manual_seed(0)
    layers = TransformerASR(
        tgt_vocab=3,
        input_size=WIDTH,
        d_model=WIDTH,
        nhead=2,
        num_encoder_layers=2,
        num_decoder_layers=0,
        d_ffn=16,
        dropout=0.2,
        encoder_module="conformer",
        attention_type=attention,
        kernel_size=5,
        normalize_before=True,
        causal=False,
    )
    return EncoderWrapper(transformer=layers)


@pytest.fixture(params=KINDS)
def encoder(request, tmp_path):
    """An encoder with and without an adaptor, and ragged input for it."""
    torch.manual_seed(0)
    kind, settings = request.param, {"trained_layers": 0}
    if kind == "whisper":
        make, inner = (
            WhisperAcousticEncoder,
            save_whisper(tmp_path / "w", encoder_layers=2, dropout=0.2),
        )
    elif kind == "any":
        make, inner = AcousticEncoder, Front(told=True)
        settings["d_encoder"] = 16
    else:
        folder = save_encoder(tmp_path / "e", kind, num_hidden_layers=2)
        make, inner = AcousticEncoder, wrapper(kind, folder)
    plain = make(inner, WIDTH, **settings)
    adapted = make(inner, WIDTH, **settings, adaptor=conformer())
    adapted.load_state_dict(plain.state_dict(), strict=False)
    sizes = SIZES.get(kind, (1200, 803, 411, 45))
    shape = (5,) if kind == "any" else ()
    x = [torch.randn(size, *shape).double() for size in sizes]
    return plain.double().eval(), adapted.double().eval(), x


def batch_of(x, padding=math.nan):
    padded = torch.nn.utils.rnn.pad_sequence(
        x, batch_first=True, padding_value=padding
    )
    return padded, torch.tensor([len(one) / padded.shape[1] for one in x])


def test_it_is_called_on_the_frames_of_each_utterance(encoder):
    plain, adapted, x = encoder
    frames, counts = plain(*batch_of(x))
    found, lengths = adapted(*batch_of(x))
    assert torch.equal(lengths, counts)
    assert found.shape == frames.shape and found.isfinite().all()
    for row, count in enumerate(counts.tolist()):
        one = frames[row : row + 1, :count]
        expected = adapted.adaptor(one, torch.ones(1).double())
        torch.testing.assert_close(found[row, :count], expected[0])
        assert not torch.allclose(found[row, :count], one[0])
        assert not found[row, count:].any()
        alone, same = adapted(x[row][None], torch.ones(1))
        assert same.tolist() == [count]
        torch.testing.assert_close(found[row, :count], alone[0])


def test_it_alone_trains_and_its_gradient_sees_no_padding(encoder):
    _, adapted, x = encoder

    def gradients(*batches):
        adapted.zero_grad()
        for padded, lens in batches:
            adapted(padded, lens)[0].square().sum().backward()
        learnt = adapted.named_parameters()
        return {n: p.grad for n, p in learnt if p.grad is not None}

    together = gradients(batch_of(x))
    apart = gradients(*[(one[None], torch.ones(1)) for one in x])
    assert {n.split(".")[0] for n in together} == {"adaptor", "projection"}
    whole = [
        n
        for n, p in adapted.adaptor.named_parameters()
        if "custom_tgt_module" not in n and p.requires_grad
    ]
    assert {f"adaptor.{n}" for n in whole} <= set(together)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], msg=name)


def test_it_trains_while_the_encoder_rests(encoder):
    _, adapted, x = encoder
    adapted.train()
    assert adapted.adaptor.training and not adapted.encoder.training
    first, second = adapted(*batch_of(x))[0], adapted(*batch_of(x))[0]
    assert not torch.equal(first, second), "its dropout is on"
    adapted.adaptor.eval()
    first, second = adapted(*batch_of(x))[0], adapted(*batch_of(x))[0]
    assert torch.equal(first, second), "the encoder's is not"


def test_it_takes_what_a_cache_holds(encoder):
    _, adapted, x = encoder
    if adapted.first_trained() is None:
        pytest.skip("only encoders of waveforms have a cache")
    hidden, counts = adapted.frozen(*batch_of(x))
    lens = counts / hidden.shape[1]
    outside = torch.arange(hidden.shape[1]) >= counts[:, None]
    hidden = hidden.masked_fill(outside[..., None], math.nan)
    found, again = adapted(hidden, lens)
    expected, _ = adapted(*batch_of(x))
    assert torch.equal(again, counts)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", ["RoPEMHA", "RelPosMHAXL"])
@pytest.mark.parametrize("told", [False, True])
def test_lengths_come_from_the_encoder_or_from_the_input(told, attention):
    torch.manual_seed(0)
    adaptor = conformer(attention)
    acoustic = AcousticEncoder(Front(told), WIDTH, 16, adaptor=adaptor).eval()
    x, lens = torch.randn(2, 40, 5), torch.tensor([1.0, 0.5])
    found = acoustic(x, lens)
    assert isinstance(found, tuple) == told
    frames = found[0] if told else found
    alone = acoustic(x[1:, :20], torch.ones(1))
    alone = alone[0] if told else alone
    torch.testing.assert_close(frames[1, :10], alone[0], rtol=1e-4, atol=1e-5)
    # One that is told a wrong length is noticed.
    wrong = acoustic(x, torch.tensor([1.0, 0.75]))
    wrong = wrong[0] if told else wrong
    assert not torch.allclose(wrong[1, :10], alone[0], atol=1e-3)


def test_a_local_one_reads_no_further_than_its_kernel():
    adaptor = LocalExtractor(WIDTH, kernel_size=5).double().eval()
    acoustic = AcousticEncoder(torch.nn.Identity(), WIDTH, adaptor=adaptor)
    acoustic.encoder.forward = lambda x, lens: x
    x = torch.randn(2, 12, WIDTH).double().requires_grad_()
    lens = torch.tensor([1.0, 0.5])
    found = acoustic(x, lens)
    for row, frame, near in ((0, 6, range(4, 9)), (1, 5, range(3, 6))):
        (gradient,) = torch.autograd.grad(
            found[row, frame].sum(), x, retain_graph=True
        )
        read = gradient.abs().amax(-1).nonzero().tolist()
        assert read == [[row, other] for other in near]


@pytest.mark.parametrize("kind", ["Whisper", "Hubert", "lengths", "none"])
def test_stacked_frames_are_those_of_a_naive_loop(kind, tmp_path):
    torch.manual_seed(0)
    sizes, shape, settings = (1200, 803, 411, 45), (), {"trained_layers": 0}
    if kind == "Whisper":
        make, inner = WhisperAcousticEncoder, save_whisper(tmp_path / "w")
        sizes = SIZES["whisper"]
    elif kind == "Hubert":
        make, inner = (
            AcousticEncoder,
            wrapper(kind, save_encoder(tmp_path / "e", kind)),
        )
    else:
        make, inner = AcousticEncoder, Front(told=kind == "lengths")
        sizes, shape, settings = SIZES["any"], (5,), {"d_encoder": 16}
    stacked = make(inner, WIDTH, stacked_frames=3, **settings).double().eval()
    width = stacked.projection.in_features // 3
    raw = make(inner, width, **settings).double().eval()
    x = [torch.randn(size, *shape).double() for size in sizes]
    found, lengths = stacked(*batch_of(x))
    assert found.isfinite().all()
    found.square().sum().backward()
    gradient = stacked.projection.weight.grad.clone()
    stacked.zero_grad()

    total = 0.0
    for row, one in enumerate(x):
        frames = raw(one[None], torch.ones(1))
        frames = frames[0] if isinstance(frames, tuple) else frames
        if kind == "none":  # its length is a share of the batch's
            frames = frames[:, : max(1, round(len(one) / sizes[0] * 45))]
        count = math.ceil(frames.shape[1] / 3)
        assert lengths[row] == count
        for start in range(count):
            three = torch.zeros(3, width, dtype=torch.double)
            part = frames[0, 3 * start : 3 * start + 3]
            three[: len(part)] = part
            expected = stacked.projection(three.flatten())
            total = total + expected.square().sum()
            torch.testing.assert_close(found[row, start], expected)
        assert not found[row, count:].any()
    total.backward()
    torch.testing.assert_close(stacked.projection.weight.grad, gradient)


def test_fewer_than_one_frame_cannot_be_stacked():
    with pytest.raises(ValueError, match="stacked_frames: 0, expected 1"):
        AcousticEncoder(Front(told=True), 16, stacked_frames=0)
