"""CTC shrink against a loop over utterances, segments and frames."""

import logging
import math

import pytest
import torch
from translation_toy import runs_of_labels, shrink_batch

from speechbrain_taskarith.translation import CTCShrink, ctc_segments

POOLINGS = ("first", "mean", "weighted", "softmax")
LENS = [13, 1, 7, 12, 2]


def loop(x, logits, lens, pooling, drop_blank=False, blank=0):
    """Shrink one frame after the other, as it is written in the docstring."""
    rows = []
    for b in range(len(x)):
        n = round(float(lens[b]) * x.shape[1])
        probs = [logits[b, t].softmax(0) for t in range(n)]
        labels = [int(logits[b, t].argmax()) for t in range(n)]
        groups = []
        for t, label in enumerate(labels):
            if t and label == labels[t - 1]:
                groups[-1].append(t)
            else:
                groups.append([t])
        kept = [g for g in groups if not (drop_blank and labels[g[0]] == blank)]
        row = []
        for group in kept or groups:
            p = torch.stack([probs[t][labels[group[0]]] for t in group])
            weight = {
                "first": torch.eye(len(group), dtype=x.dtype)[0],
                "mean": torch.full_like(p, 1 / len(group)),
                "weighted": p / p.sum(),
                "softmax": p.softmax(0),
            }[pooling]
            row.append(weight @ x[b, group])
        rows.append(torch.stack(row))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("drop_blank", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_equals_the_loop(pooling, drop_blank):
    for seed in range(4):
        x, logits, lens = shrink_batch(LENS, seed=seed)
        x.requires_grad_()
        logits.requires_grad_()
        train = pooling in ("weighted", "softmax")
        shrink = CTCShrink(
            pooling=pooling, drop_blank=drop_blank, train_weights=train
        )
        shrunk = shrink(x, logits, lens)
        expected = loop(x, logits, lens, pooling, drop_blank)
        torch.testing.assert_close(shrunk.x, expected)
        weight = torch.randn_like(expected)
        inputs = [x, logits] if train else [x]
        ours = torch.autograd.grad((shrunk.x * weight).sum(), inputs)
        theirs = torch.autograd.grad((expected * weight).sum(), inputs)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)
        count = (shrunk.lens * shrunk.x.shape[1]).round().long()
        assert torch.equal(count, shrunk.segments.lengths)
        assert int(count.min()) >= 1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck(pooling):
    x, logits, lens = shrink_batch([6, 3], width=2, vocab=3)
    train = pooling in ("weighted", "softmax")
    shrink = CTCShrink(pooling=pooling, train_weights=train)
    x.requires_grad_()
    logits.requires_grad_(train)
    assert torch.autograd.gradcheck(
        lambda a, b: shrink(a, b, lens).x, (x, logits)
    )


def test_weights_are_trained_only_where_asked():
    x, logits, lens = shrink_batch(LENS)
    x.requires_grad_()
    logits.requires_grad_()
    CTCShrink(pooling="weighted")(x, logits, lens).x.sum().backward()
    assert logits.grad is None
    with pytest.raises(ValueError, match="no weights to train"):
        CTCShrink(pooling="mean", train_weights=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_nan_in_the_padding_changes_no_bit(pooling, dtype):
    x, logits, lens = shrink_batch(LENS, dtype=dtype)
    train = pooling in ("weighted", "softmax")
    shrink = CTCShrink(pooling=pooling, train_weights=train)
    outside = torch.arange(13) >= torch.tensor(LENS)[:, None]
    results = []
    for filling in (0.0, math.nan):
        a = x.masked_fill(outside[..., None], filling).requires_grad_()
        b = logits.masked_fill(outside[..., None], filling).requires_grad_()
        shrunk = shrink(a, b, lens)
        shrunk.x.float().square().sum().backward()
        results.append([shrunk.x, a.grad, shrunk.segments.ids])
        if train:
            # Of the padding's own scores the gradient may be what it likes.
            results[-1].append(b.grad[~outside])
        assert not a.grad[outside].any()
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_a_batch_equals_its_utterances():
    x, logits, lens = shrink_batch(LENS)
    shrink = CTCShrink(pooling="weighted")
    whole = shrink(x, logits, lens)
    for b, n in enumerate(LENS):
        alone = shrink(x[b : b + 1, :n], logits[b : b + 1, :n], torch.ones(1))
        count = int(whole.segments.lengths[b])
        torch.testing.assert_close(whole.x[b : b + 1, :count], alone.x)
        assert not whole.x[b, count:].any()


def test_nothing_is_lost_and_nothing_shrinks_twice():
    x, logits, lens = shrink_batch(LENS)
    shrunk = CTCShrink(pooling="mean")(x, logits, lens)
    found = shrunk.segments
    # Means times counts are the sum over all frames.
    total = (shrunk.x * found.counts[..., None]).sum(1)
    inside = torch.arange(13) < torch.tensor(LENS)[:, None]
    torch.testing.assert_close(total, (x * inside[..., None]).sum(1))
    assert torch.equal(found.counts.sum(1), torch.tensor(LENS))
    # Labels of neighbouring segments differ, so each stays what it is.
    scores = torch.nn.functional.one_hot(found.labels.clamp(min=0), 5)
    again = CTCShrink(pooling="mean")(shrunk.x, scores.double(), shrunk.lens)
    assert torch.equal(again.x, shrunk.x)


def test_segments_map_back_to_frames_and_time():
    labels = torch.tensor([[0, 0, 3, 3, 3, 0, 4], [2, 2, 0, 9, 9, 9, 9]])
    found = ctc_segments(labels, torch.tensor([7, 3]))
    assert found.ids.tolist() == [
        [0, 0, 1, 1, 1, 2, 3],
        [0, 0, 1, -1, -1, -1, -1],
    ]
    assert found.starts.tolist() == [[0, 2, 5, 6], [0, 2, 3, 3]]
    assert found.counts.tolist() == [[2, 3, 1, 1], [2, 1, 0, 0]]
    assert found.labels.tolist() == [[0, 3, 0, 4], [2, 0, -1, -1]]
    torch.testing.assert_close(
        found.seconds(0.5)[0],
        torch.tensor([[0, 1], [1, 2.5], [2.5, 3], [3, 3.5]]),
    )
    assert found.compression.tolist() == [7 / 4, 1.5]
    values = torch.arange(8.0).view(2, 4, 1)
    back = found.expand(values).squeeze(-1)
    assert back.tolist() == [[0, 0, 1, 1, 1, 2, 3], [4, 4, 5, 0, 0, 0, 0]]


def test_dropped_blanks():
    labels = torch.tensor([[0, 3, 3, 0, 3, 0, 0], [0, 0, 0, 0, 5, 5, 5]])
    found = ctc_segments(labels, torch.tensor([7, 4]), drop_blank=True)
    # A blank parts equal labels; blanks alone stay one segment.
    assert found.ids.tolist() == [
        [-1, 0, 0, -1, 1, -1, -1],
        [0, 0, 0, 0, -1, -1, -1],
    ]
    assert found.counts.tolist() == [[2, 1], [4, 0]]
    assert found.owners().tolist()[0] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("frames", [1, 40])
def test_blanks_alone_keep_one_vector(frames):
    x = torch.randn(2, frames, 3)
    logits = torch.zeros(2, frames, 4)
    logits[..., 0] = 5.0
    for drop in (False, True):
        shrunk = CTCShrink(pooling="mean", drop_blank=drop)(
            x, logits, torch.ones(2)
        )
        assert shrunk.segments.lengths.tolist() == [1, 1]
        torch.testing.assert_close(shrunk.x, x.mean(1, keepdim=True))


@pytest.mark.parametrize("drop_blank", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_fixed_capacity(pooling, drop_blank):
    x, logits, lens = shrink_batch(LENS)
    free = CTCShrink(pooling=pooling, drop_blank=drop_blank)(x, logits, lens)
    fixed = CTCShrink(pooling=pooling, drop_blank=drop_blank, capacity=13)
    shrunk = fixed(x, logits, lens)
    size = free.x.shape[1]
    assert torch.equal(shrunk.x[:, :size], free.x)
    assert shrunk.x.shape[1] == 13 and not shrunk.x[:, size:].any()
    assert torch.equal(shrunk.segments.lengths, free.segments.lengths)
    assert (shrunk.lens * 13).round().tolist() == (
        free.segments.lengths.tolist()
    )
    # Too small: the last segment takes the rest.
    small = CTCShrink(pooling=pooling, drop_blank=drop_blank, capacity=2)
    less = small(x, logits, lens)
    assert torch.equal(less.x[:, :1], free.x[:, :1])
    assert int(less.segments.lengths.max()) == 2
    if not drop_blank:
        assert torch.equal(less.segments.counts.sum(1), torch.tensor(LENS))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_compiles_whole(pooling):
    x, logits, lens = shrink_batch(LENS)
    shrink = CTCShrink(pooling=pooling, capacity=8)
    compiled = torch.compile(shrink, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = compiled(a, logits, lens), shrink(b, logits, lens)
    assert torch.equal(ours.x, theirs.x)
    assert torch.equal(ours.segments.ids, theirs.segments.ids)
    ours.x.square().sum().backward()
    theirs.x.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_a_collapsed_head_is_reported_and_cut_evenly(caplog):
    x = torch.randn(2, 200, 3)
    logits = torch.zeros(2, 200, 4)
    logits[0, :, 0] = 5.0
    logits[1] += 5 * torch.nn.functional.one_hot(
        runs_of_labels(1, 200, 4)[0], 4
    )
    lens = torch.tensor([0.6, 1.0])
    with caplog.at_level(logging.WARNING):
        plain = CTCShrink()(x, logits, lens)
    assert "1 of 2 utterance(s) are almost nothing but blanks" in caplog.text
    assert int(plain.segments.lengths[0]) == 1
    safe = CTCShrink(pooling="mean", uniform=8)
    shrunk = safe(x, logits, lens)
    assert int(shrunk.segments.lengths[0]) == 15
    torch.testing.assert_close(
        shrunk.x[0, :15], x[0, :120].view(15, 8, 3).mean(1)
    )
    # The other utterance is as it was.
    assert torch.equal(shrunk.segments.ids[1], plain.segments.ids[1])
    assert safe.watch.statistics()["blank_utterances"] == 50.0
    assert "cut evenly" in caplog.text


@pytest.mark.parametrize("frames", [70, 300])
def test_a_word_in_a_long_silence_is_no_collapse(frames):
    labels = torch.zeros(2, frames, dtype=torch.long)
    labels[0, 30:32] = 5
    logits = torch.nn.functional.one_hot(labels, 7).float()
    x = torch.rand(2, frames, 3)
    shrink = CTCShrink(drop_blank=True, uniform=4)
    out = shrink(x, logits, torch.ones(2))
    assert out.segments.labels[0, 0] == 5 and out.segments.lengths[0] == 1
    assert torch.equal(out.x[0, 0], x[0, 30])
    # Blanks alone are one, and are cut evenly.
    assert out.segments.lengths[1] == -(-frames // 4)
    assert torch.equal(out.x[1, : out.segments.lengths[1]], x[1, ::4])


def test_a_noisy_head_is_reported(caplog):
    x = torch.randn(1, 30, 3)
    labels = torch.arange(30) % 4
    logits = torch.nn.functional.one_hot(labels, 4)[None].float()
    with caplog.at_level(logging.WARNING):
        CTCShrink()(x, logits, torch.ones(1))
        assert "new label at almost every frame" in caplog.text
        # Of a single frame nothing can be said.
        caplog.clear()
        CTCShrink()(x[:, :1], logits[:, :1], torch.ones(1))
    assert not caplog.text


def test_warnings_do_not_flood(caplog):
    shrink = CTCShrink()
    logits = torch.zeros(1, 100, 4)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            shrink(torch.randn(1, 100, 2), logits, torch.ones(1))
    assert len(caplog.records) == 2


def test_bad_input_is_named():
    x, logits, lens = shrink_batch(LENS)
    shrink, ids = CTCShrink(), [f"utt{i}" for i in range(5)]
    with pytest.raises(ValueError, match="'utt1' have a length of 0"):
        shrink(x, logits, torch.tensor([1.0, 0, 1, 1, 1]), ids)
    with pytest.raises(ValueError, match="row 2 of the batch.*length of 26"):
        shrink(x, logits, torch.tensor([1.0, 1, 2, 1, 1]))
    with pytest.raises(ValueError, match="length of NaN"):
        shrink(x, logits, torch.tensor([1.0, 1, math.nan, 1, 1]), ids)
    with pytest.raises(ValueError, match="score the same frames"):
        shrink(x, logits[:, :-1], lens)
    with pytest.raises(ValueError, match="5 utterances .* 4 lengths"):
        shrink(x, logits, lens[:4])
    with pytest.raises(ValueError, match="blank_index 5 is outside"):
        CTCShrink(blank_index=5)(x, logits, lens)
    bad = logits.clone()
    bad[3, 2] = math.nan
    with pytest.raises(ValueError, match="scores of utterance 'utt3' are NaN"):
        shrink(x, bad, lens, ids)
    for settings, words in (
        ({"pooling": "max"}, "expected one of"),
        ({"uniform": 0}, "expected 1 to max_ratio"),
        ({"min_ratio": 70}, "min_ratio < max_ratio"),
    ):
        with pytest.raises(ValueError, match=words):
            CTCShrink(**settings)
    labels = torch.zeros(2, 3, dtype=torch.long)
    for wrong, words in (
        ((labels.float(), torch.tensor([3, 3])), "expected integers"),
        ((labels[:, :0], torch.tensor([0, 0])), "at least one frame"),
        ((labels, torch.tensor([3.0, 3.0])), "absolute numbers of frames"),
        ((labels, torch.tensor([3, 4])), "row 1 .* length of 4"),
    ):
        with pytest.raises(ValueError, match=words):
            ctc_segments(*wrong)
    with pytest.raises(ValueError, match="capacity 0"):
        ctc_segments(labels, torch.tensor([3, 3]), capacity=0)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_second_derivatives_are_refused(pooling):
    x, logits, lens = shrink_batch([6, 4])
    x.requires_grad_()
    out = CTCShrink(pooling=pooling)(x, logits, lens).x.square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
