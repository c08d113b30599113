"""The chunked joint equals the whole one; HAT; SpeechBrain's joints."""

import functools
import itertools
import math

import pytest
import torch
from transducer_oracles import brute_force, hat_formula

from speechbrain_taskarith.transducer import (
    HATJoint,
    HATOutput,
    RNNTJoint,
    SpeechBrainJoint,
    joint_transducer_loss,
    sequence_log_prob,
    transducer_loss,
)
from speechbrain_taskarith.transducer.joints.hat import hat_log_probs

FRAMES, LABELS = torch.tensor([9, 6, 2]), torch.tensor([3, 4, 0])


def setting(kind, dtype=torch.float64, blank=0):
    torch.manual_seed(5)
    joint = kind(6, 5, 8, 7, blank_index=blank).to(dtype)
    x = torch.randn(3, 9, 6, dtype=dtype, requires_grad=True)
    g = torch.randn(3, 5, 5, dtype=dtype, requires_grad=True)
    labels = torch.tensor([label for label in range(7) if label != blank])
    return joint, x, g, labels[torch.randint(0, 6, (3, 4))]


def chunked(joint, x, g, y, blank=0, **options):
    return joint_transducer_loss(
        joint, x, g, y, FRAMES / 9, LABELS / 4, blank, "none", **options
    )


@pytest.mark.parametrize("kind", [RNNTJoint, HATJoint])
@pytest.mark.parametrize("blank", [0, 6])
@pytest.mark.parametrize("budget", [1, 3000, 2**28])
def test_chunked_equals_whole(kind, blank, budget):
    joint, x, g, y = setting(kind, blank=blank)
    whole = transducer_loss(
        joint(x.unsqueeze(2), g.unsqueeze(1)),
        y,
        FRAMES / 9,
        LABELS / 4,
        blank,
        "none",
    )
    pieces = chunked(joint, x, g, y, blank, memory_budget=budget)
    assert torch.allclose(whole, pieces, rtol=1e-12)
    leaves = [x, g, *joint.parameters()]
    weights = torch.tensor([1.0, 0.3, -2.0], dtype=torch.float64)
    by_whole = torch.autograd.grad((whole * weights).sum(), leaves)
    by_pieces = torch.autograd.grad((pieces * weights).sum(), leaves)
    for one, other in zip(by_whole, by_pieces):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("kind", [RNNTJoint, HATJoint])
def test_dropping_unlikely_nodes_stays_below_float32(kind):
    # 120 x 31 nodes, most of them far from every likely alignment.
    torch.manual_seed(0)
    joint = kind(6, 5, 16, 20, blank_index=0)
    x = (3 * torch.randn(2, 120, 6)).requires_grad_()
    g = (3 * torch.randn(2, 31, 5)).requires_grad_()
    y, one = torch.randint(1, 20, (2, 30)), torch.ones(2)
    leaves = [x, g, *joint.parameters()]
    found = joint_transducer_loss(joint, x, g, y, one, one, 0)
    by_found = torch.autograd.grad(found, leaves)
    exact = joint.double()
    x2, g2 = (v.detach().double().requires_grad_() for v in (x, g))
    oracle = transducer_loss(
        exact(x2.unsqueeze(2), g2.unsqueeze(1)), y, one, one, 0
    )
    by_oracle = torch.autograd.grad(oracle, [x2, g2, *exact.parameters()])
    for a, b in zip(by_found, by_oracle):
        assert (a.double() - b).norm() / b.norm() < 2e-6


def test_sequences_that_share_an_encoder():
    joint, x, g, y = setting(RNNTJoint)
    rows = torch.tensor([1, 1, 0])
    found = sequence_log_prob(joint, x, g, y, FRAMES, LABELS, encoder_rows=rows)
    logits = joint(x[rows].unsqueeze(2), g.unsqueeze(1)).log_softmax(-1)
    for h in range(3):
        t, u = FRAMES[rows[h]], LABELS[h]
        oracle = brute_force(logits[h, :t, : u + 1], y[h, :u].tolist(), 0)
        assert found[h].item() == pytest.approx(oracle.item(), rel=1e-12)
    leaves = [x, *joint.parameters()]
    by_found = torch.autograd.grad(found[:2].sum(), leaves)
    oracle = sequence_log_prob(joint, x[rows], g, y, FRAMES[rows], LABELS)
    by_oracle = torch.autograd.grad(oracle[:2].sum(), leaves)
    for a, b in zip(by_found, by_oracle):
        assert torch.allclose(a, b)


def test_padding_and_frozen_parts():
    joint, x, g, y = setting(HATJoint)
    clean = chunked(joint, x, g, y)
    (by_clean,) = torch.autograd.grad(clean.sum(), g, retain_graph=True)
    dirty = x.detach().clone()
    dirty[1, 6:] = float("nan")
    for parameter in joint.parameters():
        parameter.requires_grad_(False)
    found = chunked(joint, dirty, g, y)
    (by_found,) = torch.autograd.grad(found.sum(), g)
    assert torch.equal(found, clean)
    assert torch.allclose(by_found, by_clean)
    assert not chunked(joint, x.detach(), g.detach(), y).requires_grad


class _TimeFirst(RNNTJoint):
    """Returns [B, T, J] of [T, B, J], as recurrent layers do."""

    def project_encoder(self, encoder_out):
        return _time_first(super().project_encoder(encoder_out))

    def project_predictor(self, predictor_out):
        return _time_first(super().project_predictor(predictor_out))


def _time_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def test_gradients_do_not_depend_on_how_a_projection_lies_in_memory():
    joint, x, g, y = setting(RNNTJoint)
    leaves = [x, g, *joint.parameters()]
    expected = torch.autograd.grad(chunked(joint, x, g, y).sum(), leaves)
    joint.__class__ = _TimeFirst
    assert not joint.project_encoder(x).is_contiguous()
    found = torch.autograd.grad(chunked(joint, x, g, y).sum(), leaves)
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, atol=1e-12)


def test_windows_spare_the_nodes_outside():
    joint, x, g, y = setting(RNNTJoint)
    first = torch.tensor([[0, 3, 5, 0], [0, 1, 2, 4], [9, 9, 9, 9]])
    windows = torch.stack([first, first + 1], -1)
    options = {"windows": windows, "zero_infinity": True}
    rows, scores = [], joint.scores
    joint.scores = lambda e, p: rows.append(len(e)) or scores(e, p)
    found = chunked(joint, x, g, y, **options)
    del joint.scores
    # Twice a few to try the joint, then the nodes inside.
    assert rows[2:] == [count_by_hand(windows)]
    logits = joint(x.unsqueeze(2), g.unsqueeze(1))
    whole = transducer_loss(
        logits, y, FRAMES / 9, LABELS / 4, 0, "none", **options
    )
    for row, (t, u) in enumerate(zip(FRAMES.tolist(), LABELS.tolist())):
        oracle = by_windows(
            logits[row].log_softmax(-1), y[row].tolist(), windows[row], t, u
        )
        assert found[row].item() == pytest.approx(-oracle)
        assert whole[row].item() == pytest.approx(-oracle)
    leaves = [x, g, *joint.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.sum(), leaves),
        torch.autograd.grad(whole.sum(), leaves),
    ):
        assert torch.allclose(one, other, atol=1e-12)
    late = {**options, "windows": windows + 9}
    assert chunked(joint, x, g, y, **late).tolist()[:2] == [0.0, 0.0]


def count_by_hand(windows):
    """Count the nodes between the window before and the end of the next."""
    count = 0
    for row, (frames, labels) in enumerate(zip(FRAMES, LABELS)):
        for t in range(frames):
            for u in range(labels + 1):
                begun = u == 0 or t >= windows[row, u - 1, 0]
                count += begun and (u == labels or t <= windows[row, u, 1])
    return int(count)


def by_windows(log_probs, target, windows, frames, labels):
    """Sum over the frames of every label, in order and inside its window."""
    total = 0.0
    for times in itertools.product(range(frames), repeat=labels):
        inside = all(w[0] <= t <= w[1] for t, w in zip(times, windows.tolist()))
        if not inside or list(times) != sorted(times):
            continue
        score, u = 0.0, 0
        for t in range(frames):
            while u < labels and times[u] == t:
                score += log_probs[t, u, target[u]].item()
                u += 1
            score += log_probs[t, u, 0].item()
        total += math.exp(score)
    return math.log(total)


def test_an_unknown_label_is_named_also_without_vocab_size():
    joint, x, g, y = setting(RNNTJoint)
    wrapped = SpeechBrainJoint(joint, blank_index=0)
    y[1, 2] = 7
    with pytest.raises(ValueError, match="row 1, label 2: 7 .*vocabulary of 7"):
        chunked(wrapped, x, g, y)


def test_autocast_is_kept_in_backward():
    joint, x, g, y = setting(RNNTJoint, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = chunked(joint, x, g, y)
    (by_low,) = torch.autograd.grad(low.sum(), x)
    (by_high,) = torch.autograd.grad(chunked(joint, x, g, y).sum(), x)
    assert torch.allclose(low, chunked(joint, x, g, y), rtol=0.02)
    assert 0 < (by_low - by_high).norm() / by_high.norm() < 0.05


def test_refusals():
    joint, x, g, y = setting(RNNTJoint)
    with pytest.raises(ValueError, match="made with blank_index 0"):
        chunked(joint, x, g, y, blank=1)
    with pytest.raises(ValueError, match="memory_budget 0"):
        chunked(joint, x, g, y, memory_budget=0)
    with pytest.raises(ValueError, match="room for 2"):
        chunked(joint, x, g[:, :3], y)
    with pytest.raises(ValueError, match="3 rows of the encoder but 2 of"):
        chunked(joint, x, g[:2], y)
    with pytest.raises(ValueError, match="3 for 2 utterances"):
        chunked(joint, x[:2], g, y)
    with pytest.raises(ValueError, match="vocabulary of 7"):
        chunked(joint, x, g, y + 40)
    with pytest.raises(ValueError, match="vocab_size"):
        HATOutput(4, vocab_size=5, blank_index=5)
    dropping = SpeechBrainJoint(
        lambda a, b: a + b, torch.nn.Dropout(0.1), blank_index=0
    )
    with pytest.raises(ValueError, match="dropout"):
        chunked(dropping, x, torch.randn(3, 5, 6).double(), y)


class Tied:
    """A joint by hand, whose output layer is the predictor's embedding."""

    def __init__(self):
        self.embedding = torch.nn.Embedding(7, 6).double()

    def joint(self, x, g):
        return torch.tanh(x + g) @ self.embedding.weight.T


def functions():
    """Return `{kind: (joint, parameters that it reads)}`."""
    torch.manual_seed(1)
    inner = torch.nn.Linear(6, 6).double()
    last, tied = torch.nn.Linear(6, 7).double(), Tied()
    leaf = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)

    def by_hand(x, g, layers):
        return layers[1](layers[0](x + g).tanh())

    inside = SpeechBrainJoint(lambda x, g: inner(x + g), last)
    return {
        "lambda": (lambda x, g: last((x + g).tanh()), [*last.parameters()]),
        "method": (tied.joint, [tied.embedding.weight]),
        "partial": (
            functools.partial(by_hand, layers=(inner, last)),
            [*inner.parameters(), *last.parameters()],
        ),
        "leaf": (lambda x, g: (x + g) @ leaf, [leaf]),
        "inside": (inside, [*inner.parameters(), *last.parameters()]),
    }


@pytest.mark.parametrize("kind", functions())
def test_parameters_that_a_function_reads_get_their_gradient(kind):
    joint, parameters = functions()[kind]
    x = torch.randn(3, 9, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randint(1, 7, (3, 4))
    whole = transducer_loss(
        joint(x.unsqueeze(2), g.unsqueeze(1)), y, FRAMES / 9, LABELS / 4, 0
    )
    pieces = chunked(joint, x, g, y, memory_budget=3000).mean()
    assert torch.allclose(whole, pieces)
    leaves = [x, g, *parameters]
    for one, other in zip(
        torch.autograd.grad(whole, leaves), torch.autograd.grad(pieces, leaves)
    ):
        assert one.any() and torch.allclose(one, other, atol=1e-12)


def test_what_backward_would_compute_otherwise_is_refused():
    joint, x, g, y = setting(RNNTJoint)
    wide = torch.randn(3, 5, 6).double()
    weight = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    before = weight * 2
    with pytest.raises(ValueError, match="computed before .*Mul"):
        chunked(lambda a, b: (a + b) @ before, x, wide, y)
    drop = torch.nn.functional.dropout
    with pytest.raises(ValueError, match="other scores when"):
        chunked(lambda a, b: drop(a + b, 0.1) @ weight, x, wide, y)
    joint.activation = torch.nn.RReLU()
    with pytest.raises(ValueError, match="other scores when"):
        chunked(joint, x, g, y)
    assert chunked(joint.eval(), x, g, y).isfinite().all()
    loss = chunked(joint, x, g, y).sum()
    with torch.no_grad():
        joint.output.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_hooks_see_scores_and_gradients_as_they_are():
    joint, x, g, y = setting(RNNTJoint)
    leaves = [x, *joint.parameters()]
    plain = chunked(joint, x, g, y)
    expected = torch.autograd.grad(plain.sum(), leaves)
    seen, grads = [], []
    joint.output.register_forward_hook(lambda m, a, out: seen.append(out))
    joint.output.register_full_backward_hook(lambda m, i, o: grads.append(o))
    found = torch.autograd.grad(chunked(joint, x, g, y).sum(), leaves)
    for one, other in zip(found, expected):
        assert torch.allclose(one, other)
    nodes = joint(x.unsqueeze(2), g.unsqueeze(1)).flatten(0, 2)
    pieces = [scores for scores in seen if len(scores) > 8]
    for scores in pieces:
        # Every row that a hook has kept is a row of the whole.
        near = torch.cdist(scores.detach(), nodes.detach()).amin(1)
        assert (near < 1e-6).all()
    assert len(pieces) == 2 and grads


def test_nan_in_padding_reaches_no_gradient():
    joint, x, g, y = setting(RNNTJoint)
    leaves = [x, g, *joint.parameters()]
    expected = torch.autograd.grad(chunked(joint, x, g, y).sum(), leaves)
    nan = float("nan")
    rows = torch.arange(9) >= FRAMES[:, None]
    labels = torch.arange(5) > LABELS[:, None]
    dirty_x = x.masked_fill(rows[..., None], nan)
    dirty_g = g.masked_fill(labels[..., None], nan)
    loss = chunked(joint, dirty_x, dirty_g, y)
    for one, other in zip(torch.autograd.grad(loss.sum(), leaves), expected):
        assert torch.allclose(one, other)


def test_a_loss_before_leaves_autocast_alone():
    joint, x, g, y = setting(RNNTJoint, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked(joint, x, g, y)
        logits = joint(x.unsqueeze(2), g.unsqueeze(1))
        grads = torch.autograd.grad(logits.sum(), [*joint.parameters()])
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("output", ["linear", "hat"])
def test_speechbrain_joint(output):
    from speechbrain.nnet.transducer.transducer_joint import Transducer_joint

    torch.manual_seed(0)
    last = torch.nn.Linear(6, 7) if output == "linear" else HATOutput(6, 7, 0)
    tjoint = Transducer_joint(joint="sum", nonlinearity=torch.nn.Tanh)
    joint = SpeechBrainJoint(tjoint, last, blank_index=0).double()
    x = torch.randn(3, 9, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randint(1, 7, (3, 4))
    # As a recipe computes it, without any joint of ours.
    logits = last(tjoint(x.unsqueeze(2), g.unsqueeze(1)))
    whole = transducer_loss(logits, y, FRAMES / 9, LABELS / 4, 0, "none")
    pieces = chunked(joint, x, g, y, memory_budget=2000)
    assert torch.allclose(whole, pieces)
    leaves = [x, g, *last.parameters()]
    for a, b in zip(
        torch.autograd.grad(whole.sum(), leaves),
        torch.autograd.grad(pieces.sum(), leaves),
    ):
        assert torch.allclose(a, b)
    internal = joint.internal_lm(g)
    assert torch.allclose(internal.exp().sum(-1), torch.ones(3, 5).double())
    assert torch.isneginf(internal[..., 0]).all()


@pytest.mark.parametrize("blank", [0, 3])
def test_hat_is_the_papers_formula(blank):
    torch.manual_seed(0)
    z = 3 * torch.randn(50, 4, dtype=torch.float64)
    oracle = hat_formula(z, blank)
    assert torch.allclose(hat_log_probs(z, blank).exp(), oracle, rtol=1e-10)


def test_hat_sums_to_one_and_keeps_its_gradient_for_any_blank_score():
    for score in torch.linspace(-40, 40, 81).tolist():
        z = torch.tensor([0.3, score, -1.0, 2.0], requires_grad=True)
        log_probs = hat_log_probs(z, 1)
        assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
        (grad,) = torch.autograd.grad(log_probs[0], z)
        # d log P(y) / d z_blank = -sigmoid(z_blank)
        exact = -torch.sigmoid(torch.tensor(score, dtype=torch.float64))
        assert grad[1].item() == pytest.approx(exact.item(), rel=1e-5)


def test_hat_gradcheck_through_the_loss():
    torch.manual_seed(0)
    joint = HATJoint(3, 2, 4, 5, blank_index=2).double()
    x = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    y, one = torch.tensor([[1, 4]]), torch.ones(1)
    assert torch.autograd.gradcheck(
        lambda *v: joint_transducer_loss(joint, *v, y, one, one, 2), (x, g)
    )


def test_internal_lm_is_the_joint_without_encoder():
    joint, _, g, _ = setting(HATJoint)
    found = joint.internal_lm(g)
    hidden = torch.tanh(g @ joint.predictor_layer.weight.T)
    scores = joint.output(hidden)[..., 1:]
    assert torch.allclose(found[..., 1:], scores.log_softmax(-1))
