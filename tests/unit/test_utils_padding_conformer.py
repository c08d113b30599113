"""SpeechBrain's encoders encode an utterance alike in any batch."""

import copy

import pytest
import torch
from speechbrain.lobes.models.transformer.Branchformer import (
    BranchformerEncoderLayer,
)
from speechbrain.lobes.models.transformer.Conformer import ConvolutionModule
from speechbrain.lobes.models.transformer.TransformerASR import (
    EncoderWrapper,
    TransformerASR,
)

from speechbrain_taskarith.brains.networks import CTCNetwork, Seq2SeqNetwork
from speechbrain_taskarith.transducer import ChunkedEncoder
from speechbrain_taskarith.translation import AcousticEncoder
from speechbrain_taskarith.utils.lengths import ignore_padding

FRAMES = [24, 10, 1]


def conformer(
    kernel=15, decoders=0, module="conformer", attention="RelPosMHAXL"
):
    torch.manual_seed(0)
    return TransformerASR(
        tgt_vocab=5,
        input_size=8,
        d_model=16,
        nhead=2,
        num_encoder_layers=2,
        num_decoder_layers=decoders,
        d_ffn=16,
        attention_type=attention,
        positional_encoding=None,
        encoder_module=module,
        csgu_linear_units=12,
        normalize_before=True,
        causal=False,
        kernel_size=kernel,
    ).eval()


WRAPPED = {
    "chunks": lambda: ChunkedEncoder(conformer(), 4, 2),
    "chunks with all the past": lambda: ChunkedEncoder(conformer(31), 5),
    "translation": lambda: AcousticEncoder(EncoderWrapper(conformer()), 16),
    "ctc": lambda: CTCNetwork(
        EncoderWrapper(conformer()), torch.nn.Linear(16, 5)
    ),
    "seq2seq": lambda: Encoded(),
    "branchformer": lambda: AcousticEncoder(
        EncoderWrapper(conformer(5, module="branchformer")), 16
    ),
}


class Encoded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Seq2SeqNetwork(
            conformer(decoders=1), torch.nn.Linear(16, 5)
        )

    def forward(self, x, lens):
        return self.network.encode(x, lens)


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_batch_equals_singles_and_padding_may_be_nan(wrapped):
    encoder = wrapped().eval()
    x = torch.randn(3, 24, 8)
    for row, frames in enumerate(FRAMES):
        x[row, frames:] = 1e3 if row == 1 else float("nan")
    batch = encoder(x, torch.tensor(FRAMES) / 24)
    for row, frames in enumerate(FRAMES):
        single = encoder(x[row : row + 1, :frames], torch.ones(1))
        found = batch[row : row + 1, :frames]
        assert torch.allclose(found, single, atol=2e-5)
    loss = sum(batch[row, :n].square().sum() for row, n in enumerate(FRAMES))
    loss.backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("past", [0, 2, None])
def test_a_stream_equals_the_utterance_inside_a_batch(past):
    encoder = ChunkedEncoder(conformer(), 4, past).eval()
    x = torch.randn(2, 24, 8)
    batch = encoder(x, torch.tensor([1.0, 10 / 24]))[1, :10]
    context = encoder.make_streaming_context()
    pieces = [
        encoder.forward_streaming(chunk, context)
        for chunk in x[1:, :10].split(4, dim=1)
    ]
    assert torch.allclose(torch.cat(pieces, 1)[0], batch, atol=1e-4)


@pytest.mark.parametrize("module", ["conformer", "branchformer"])
def test_without_padding_nothing_changes_and_names_stay(module):
    plain, x = conformer(module=module), torch.randn(2, 24, 8)
    before = plain.encode(x, torch.ones(2))
    names = list(plain.state_dict())
    guarded = ignore_padding(plain)
    assert guarded is plain and list(plain.state_dict()) == names
    assert torch.equal(plain.encode(x, torch.ones(2)), before)
    assert torch.equal(plain.encode(x), before)


def test_an_encoder_without_chunks_is_refused_when_it_is_wrapped():
    other = TransformerASR(5, 8, 16, 2, 1, 0, 16, causal=False)
    with pytest.raises(ValueError, match="encoder_module: conformer"):
        ChunkedEncoder(other, 4)
    causal = conformer()
    causal.causal = True
    with pytest.raises(ValueError, match="causal: False"):
        ChunkedEncoder(causal, 4)


@pytest.mark.parametrize(
    "attention, positions",
    [
        ("regularMHA", "fixed_abs_sine"),  # TransformerASR's own
        ("regularMHA", None),
        ("hypermixing", None),
    ],
)
def test_attention_that_cannot_stream_is_refused(attention, positions):
    transformer = conformer(attention=attention)
    transformer.positional_encoding_type = positions
    with pytest.raises(ValueError, match="RelPosMHAXL or RoPEMHA"):
        ChunkedEncoder(transformer, 4)


@pytest.mark.parametrize("attention", ["RelPosMHAXL", "RoPEMHA"])
@pytest.mark.parametrize(
    "dtype, worst", [(torch.float64, 1e-6), (torch.bfloat16, 0.05)]
)
def test_other_types_of_weights(attention, dtype, worst):
    """Positions take their type, and are as exact as before."""
    encoder = ChunkedEncoder(conformer(attention=attention), 4, 2).eval()
    x = torch.randn(1, 200, 8)
    expected, other = encoder(x), copy.deepcopy(encoder).to(dtype)
    whole = other(x.to(dtype))
    assert whole.dtype == dtype

    def error(found):
        return (found.float() - expected).norm() / expected.norm()

    assert error(whole) < worst
    context = other.make_streaming_context()
    pieces = [
        other.forward_streaming(chunk, context)
        for chunk in x.to(dtype).split(4, dim=1)
    ]
    assert error(torch.cat(pieces, 1)) < worst
    back = other.float()
    assert back(x).dtype == torch.float32
    if dtype == torch.float64:
        torch.testing.assert_close(back(x), expected, rtol=1e-4, atol=1e-5)


def test_it_compiles_in_one_piece():
    layer = ignore_padding(conformer()).encoder.layers[0].convolution_module
    x, mask = torch.randn(2, 24, 16), torch.zeros(2, 24, 1, dtype=torch.bool)
    mask[1, 10:] = True
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, mask), layer(x, mask))
    assert torch.equal(compiled(x), layer(x))


def test_a_layer_with_mirrored_ends_compiles_in_one_piece():
    layer = ignore_padding(conformer(module="branchformer")).encoder.layers[0]
    x, mask = torch.randn(2, 24, 16), torch.zeros(2, 24, dtype=torch.bool)
    mask[1, 10:] = True
    positions = torch.randn(1, 47, 16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    found = compiled(x, src_key_padding_mask=mask, pos_embs=positions)[0]
    expected = layer(x, src_key_padding_mask=mask, pos_embs=positions)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("module", ["conformer", "branchformer"])
def test_copies_and_second_calls_are_alike(module):
    once = ignore_padding(conformer(module=module))
    x, lens = torch.randn(2, 24, 8), torch.tensor([1.0, 10 / 24])
    expected = once.encode(x, lens)
    twin = ignore_padding(copy.deepcopy(once))
    hooks = [
        len(part._forward_pre_hooks)
        for part in twin.modules()
        if isinstance(part, (ConvolutionModule, BranchformerEncoderLayer))
    ]
    assert hooks == [1, 1]
    assert torch.equal(twin.encode(x, lens), expected)
