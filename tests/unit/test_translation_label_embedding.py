"""Segments as the text of their CTC labels: loops, a cascade, gradients."""

import math

import pytest
import torch
from speechbrain.decoders.ctc import ctc_greedy_decode
from translation_toy import shrink_batch, toy_batch, toy_model

from speechbrain_taskarith.translation import (
    AcousticEncoder,
    CTCShrink,
    SpeechTranslationModel,
    TextEncoder,
    TranslationDecoder,
    TranslationObjective,
    ctc_segments,
)
from speechbrain_taskarith.translation.reduction.label_embedding import (
    GATE,
    LabelEmbedding,
)


class Same(torch.nn.Module):
    def forward(self, x, lens):
        return x


def cascade(width=16):
    """Return a model that takes frames of that width."""
    torch.manual_seed(0)
    return SpeechTranslationModel(
        AcousticEncoder(Same(), width),
        TextEncoder(width, 2, 2),
        TranslationDecoder(8, width, 2, 1),
        source_vocab=6,
        shrink=CTCShrink(drop_blank=True),
        labels="alone",
    ).eval()


@pytest.mark.parametrize("labels", ["added", "alone"])
def test_is_the_sum_of_the_formula(labels):
    x, scores, _ = shrink_batch([7, 4], vocab=5, width=4)
    matrix = torch.randn(5, 4, dtype=torch.float64)
    # Segments of a frame each.
    lengths = torch.tensor([7, 4])
    segments = ctc_segments(torch.arange(14).view(2, 7), lengths)
    best = scores.argmax(-1).masked_fill(segments.labels < 0, -1)
    segments = segments._replace(labels=best)
    embed = LabelEmbedding(4, labels).double()
    out = embed(x, scores, matrix, segments)
    for b, length in enumerate([7, 4]):
        for s in range(length):
            exps = [math.exp(score) for score in scores[b, s].tolist()]
            shares = [e / sum(exps) for e in exps]
            if labels == "alone":
                best = max(range(5), key=exps.__getitem__)
                shares = [float(v == best) for v in range(5)]
            wanted = sum(share * row for share, row in zip(shares, matrix))
            if labels == "added":
                wanted = wanted + GATE * x[b, s]
            torch.testing.assert_close(out[b, s], wanted)
        assert not out[b, length:].any()


@pytest.mark.parametrize("pooling", ["first", "mean", "softmax"])
def test_labels_alone_are_a_cascade(pooling):
    model = cascade()
    model.shrink = CTCShrink(drop_blank=True, pooling=pooling)
    frames = torch.randn(3, 20, 16)
    lens = torch.tensor([1.0, 0.6, 0.05])
    frames[1, 12:] = frames[2, 1:] = math.nan
    logits = model.ctc_lin(frames)
    read = ctc_greedy_decode(logits, lens, blank_id=0)
    found = model.encode_speech(frames, lens)
    for b, labels in enumerate(read):
        text = model.encode_text(torch.tensor([labels or [0]]), torch.ones(1))
        count = int(found.segments.lengths[b])
        assert count == max(1, len(labels))
        torch.testing.assert_close(found.embedded[b, :count], text.embedded[0])
        torch.testing.assert_close(
            found.encoded[b, :count], text.encoded[0], rtol=1e-4, atol=1e-5
        )
        assert not found.embedded[b, count:].any()


def test_silence_is_one_blank():
    model = cascade()
    with torch.no_grad():
        model.ctc_lin.bias[0] = 1e4
    found = model.encode_speech(torch.randn(1, 9, 16), torch.ones(1))
    blank = model.encode_text(torch.tensor([[0]]), torch.ones(1))
    torch.testing.assert_close(found.encoded, blank.encoded)


@pytest.mark.parametrize("labels", ["added", "alone"])
def test_what_gets_a_gradient(labels):
    model = toy_model(labels=labels, look=labels == "added")
    inputs, targets = toy_batch()
    objective = TranslationObjective(0, ctc_in_st=False, contrastive=0.0)
    objective(model(tasks=("st",), **inputs), **targets)["st"].backward()
    assert model.source_embedding.weight.grad.any()
    # The best label is chosen, a posterior is calculated with.
    others = [model.ctc_lin.weight]
    if labels == "added":
        others.append(model.looking_back.key.weight)
        others.append(model.label_embedding.gate)
    for parameter in others:
        grad = parameter.grad
        assert (grad is not None and bool(grad.any())) == (labels == "added")


@pytest.mark.parametrize("pooling", ["first", "mean", "softmax"])
def test_padding_changes_nothing(pooling):
    model = toy_model(labels="added").eval()
    model.shrink = CTCShrink(pooling=pooling)
    model.acoustic = AcousticEncoder(Same(), 16)
    frames, lens = torch.randn(2, 9, 16), torch.tensor([1.0, 5 / 9])
    clean = model.encode_speech(frames, lens)
    frames[1, 5:] = math.nan
    assert torch.equal(model.encode_speech(frames, lens).encoded, clean.encoded)
    alone = model.encode_speech(frames[1:, :5], torch.ones(1))
    count = int(clean.segments.lengths[1])
    torch.testing.assert_close(
        clean.encoded[1:, :count], alone.encoded, rtol=1e-4, atol=1e-5
    )


def test_a_fixed_capacity_gives_the_same():
    x = torch.randn(2, 11, 5)
    lens = torch.tensor([1.0, 0.5])
    model = toy_model(labels="added").eval()
    usual = model.encode_speech(x, lens).embedded
    model.shrink = CTCShrink(capacity=9)
    fixed = model.encode_speech(x, lens).embedded
    torch.testing.assert_close(fixed[:, : usual.shape[1]], usual)
    assert not fixed[:, usual.shape[1] :].any()


def test_is_left_out_with_the_shrink():
    model = toy_model(labels="added")
    inputs, _ = toy_batch()
    plain = toy_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    for part in (model, plain):
        part.leave_out(["shrink"])
    found = [
        m.encode_speech(inputs["x"], inputs["lens"]) for m in (model, plain)
    ]
    assert torch.equal(found[0].embedded, found[1].embedded)
    model.leave_out(())
    other = model.encode_speech(inputs["x"], inputs["lens"])
    assert other.embedded.shape != found[0].embedded.shape


def test_needs_segments():
    with pytest.raises(ValueError, match="labels 'added' without shrink"):
        toy_model(shrink=False, labels="added")


def test_labels_alone_leave_nothing_to_look_back_for():
    with pytest.raises(ValueError, match="looking_back: .* do nothing"):
        toy_model(look=True, labels="alone")


def test_unknown_labels_are_refused():
    with pytest.raises(ValueError, match="expected 'added', 'alone' or None"):
        toy_model(labels="soft")
