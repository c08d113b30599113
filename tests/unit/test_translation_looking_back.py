"""Looking back: exact against a plain softmax, windowed against exact."""

import math

import pytest
import torch
from translation_toy import shrink_batch

from speechbrain_taskarith.translation import CTCShrink, LookingBack
from speechbrain_taskarith.translation.reduction.windowed_attention import (
    windowed_attention,
)

LENS = [13, 1, 7, 12]


def plain(module, shrunk, frames, lens, segments=None):
    """Attend with loops over utterances, segments and heads, in the formula."""
    rows = torch.zeros_like(shrunk)
    width = frames.shape[-1] // module.nhead
    q, k, v = module.query(shrunk), module.key(frames), module.value(frames)
    for b in range(len(shrunk)):
        n = round(float(lens[b]) * frames.shape[1])
        count = shrunk.shape[1]
        if segments is not None:
            count = int(segments.lengths[b])
        for s in range(count):
            seen = list(range(n))
            if segments is not None and module.window is not None:
                owner = segments.owners()[b].tolist()
                seen = [t for t in seen if abs(owner[t] - s) <= module.window]
            for h in range(module.nhead):
                part = slice(h * width, (h + 1) * width)
                scores = k[b, seen, part] @ q[b, s, part] / math.sqrt(width)
                rows[b, s, part] = scores.softmax(0) @ v[b, seen, part]
    x = module.norm1(shrunk + module.output(rows))
    return module.norm2(x + module.ffn(x))


def batch(drop_blank=False, width=8):
    x, logits, lens = shrink_batch(LENS, width=width)
    return x, lens, CTCShrink(drop_blank=drop_blank)(x, logits, lens)


@pytest.fixture(params=["dense", "runs"])
def form(request, monkeypatch):
    """Both ways to compute a window."""
    name = "speechbrain_taskarith.translation.reduction.looking_back"
    least = 10**9 if request.param == "dense" else 0
    monkeypatch.setattr(f"{name}.DENSE_BELOW", least)


@pytest.mark.parametrize("window", [None, math.inf, 0, 1, 3, 100])
@pytest.mark.parametrize("drop_blank", [False, True])
def test_equals_the_formula(window, drop_blank, form):
    x, lens, shrunk = batch(drop_blank)
    module = LookingBack(8, 2, dropout=0.0, window=window).double()
    found = module(shrunk, x, lens)
    inside = shrunk.segments.mask[..., None]
    expected = plain(module, shrunk.x, x, lens, shrunk.segments)
    torch.testing.assert_close(found, expected * inside)


def test_an_infinite_window_is_the_exact_form(form):
    x, lens, shrunk = batch()
    exact = LookingBack(8, 2, dropout=0.0).double()
    wide = LookingBack(8, 2, dropout=0.0, window=10**6).double()
    wide.load_state_dict(exact.state_dict())
    assert torch.equal(wide(shrunk, x, lens), exact(shrunk, x, lens))


@pytest.mark.parametrize("window", [0, 1, 5])
def test_gradients_of_the_window(window, form):
    x, lens, shrunk = batch()
    module = LookingBack(8, 2, dropout=0.0, window=window).double()
    weight = torch.randn_like(shrunk.x) * shrunk.segments.mask[..., None]
    grads = []
    for function in (module, lambda *a: plain(module, *a)):
        a = shrunk.x.clone().requires_grad_()
        b = x.clone().requires_grad_()
        out = function(a, b, lens, shrunk.segments)
        leaves = [a, b, *module.parameters()]
        grads.append(torch.autograd.grad((out * weight).sum(), leaves))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-6)


def test_gradcheck():
    x, _, shrunk = batch(width=2)
    segments = shrunk.segments
    q = torch.randn(4, 2, shrunk.x.shape[1], 2).double().requires_grad_()
    k, v = (
        torch.randn(4, 2, 13, 2).double().requires_grad_() for _ in range(2)
    )
    assert torch.autograd.gradcheck(
        lambda *a: windowed_attention(*a, segments, 1), (q, k, v)
    )


def test_dropout_keeps_the_mean_and_its_gradient_is_of_the_same_mask():
    x, _, shrunk = batch(width=2)
    q = torch.randn(4, 1, shrunk.x.shape[1], 2).double()
    k, v = (torch.randn(4, 1, 13, 2).double() for _ in range(2))
    args = (shrunk.segments, 1)
    torch.manual_seed(0)
    drawn = [windowed_attention(q, k, v, *args, 0.5) for _ in range(400)]
    mean = torch.stack(drawn).mean(0)
    kept = windowed_attention(q, k, v, *args)
    assert (mean - kept).abs().max() < 0.5
    assert not torch.equal(drawn[0], drawn[1])

    def seeded(*inputs):
        torch.manual_seed(3)
        return windowed_attention(*inputs, *args, 0.5)

    inputs = [part.requires_grad_() for part in (q, k, v)]
    assert torch.autograd.gradcheck(seeded, inputs)


@pytest.mark.parametrize("window", [None, 1])
def test_nan_in_the_padding_changes_no_bit(window, form):
    x, lens, shrunk = batch()
    module = LookingBack(8, 2, dropout=0.0, window=window).double()
    outside = torch.arange(13) >= torch.tensor(LENS)[:, None]
    results = []
    for filling in (0.0, math.nan):
        frames = x.masked_fill(outside[..., None], filling).requires_grad_()
        module.zero_grad()
        out = module(shrunk, frames, lens)
        out.square().sum().backward()
        results.append(
            [out, frames.grad, *(p.grad.clone() for p in module.parameters())]
        )
        assert not frames.grad[outside].any()
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_large_scores_stay_finite(form):
    x, lens, shrunk = batch()
    module = LookingBack(8, 2, dropout=0.0, window=1).double()
    torch.nn.init.normal_(module.query.weight, std=300.0)
    out = module(shrunk, x, lens)
    assert out.isfinite().all()
    inside = shrunk.segments.mask[..., None]
    expected = plain(module, shrunk.x, x, lens, shrunk.segments) * inside
    torch.testing.assert_close(out, expected)


def test_dropped_blanks_are_found_again():
    x, logits, lens = shrink_batch([6], width=8)
    logits = torch.nn.functional.one_hot(
        torch.tensor([[2, 0, 0, 0, 3, 3]]), 5
    ).double()
    shrunk = CTCShrink(drop_blank=True)(x, logits, lens)
    x = x.requires_grad_()
    module = LookingBack(8, 2, dropout=0.0, window=0).double()
    module(shrunk, x, lens).square().sum().backward()
    assert x.grad[0, 1:4].abs().min() > 0


def test_bad_input():
    x, lens, shrunk = batch()
    with pytest.raises(ValueError, match="does not divide"):
        LookingBack(8, 3)
    for window in (-1, math.nan):
        with pytest.raises(ValueError, match="neighbouring segments"):
            LookingBack(8, 2, window=window)
    with pytest.raises(ValueError, match="which frames a segment came from"):
        LookingBack(8, 2, window=1).double()(shrunk.x, x, lens)
    module = LookingBack(8, 2).double()
    with pytest.raises(ValueError, match="expected the shrunk sequence"):
        module(shrunk.x[:2], x, lens)
    with pytest.raises(ValueError, match="segments of"):
        module(shrunk, x[:, :-1], lens)
