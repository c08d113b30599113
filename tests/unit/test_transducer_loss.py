"""The transducer loss against the sum over all alignments, and bad input."""

import inspect
import math

import pytest
import torch
from transducer_oracles import brute_force

from speechbrain_taskarith.transducer import (
    RNNTJoint,
    alignment_windows,
    joint_transducer_loss,
    lattice_log_prob,
    transducer_loss,
)

BLANKS = (0, 2, 4)


def batch(dtype=torch.float64, blank=0, scale=2.0):
    """Ragged: an empty target, a single frame, and a whole row."""
    made = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(4, 5, 4, 5, dtype=dtype, generator=made)
    labels = [label for label in range(5) if label != blank]
    pick = torch.randint(0, 4, (4, 3), generator=made)
    targets = torch.tensor(labels)[pick]
    frames, counts = torch.tensor([5, 3, 1, 4]), torch.tensor([3, 0, 2, 1])
    return logits.requires_grad_(), targets, frames, counts


def call(logits, targets, frames, counts, blank, **options):
    return transducer_loss(
        logits, targets, frames / 5, counts / 3, blank, **options
    )


def expected(logits, targets, frames, counts, blank):
    return torch.stack(
        [
            -brute_force(
                logits[b, :t, : u + 1].log_softmax(-1),
                targets[b, :u].tolist(),
                blank,
            )
            for b, (t, u) in enumerate(zip(frames.tolist(), counts.tolist()))
        ]
    )


@pytest.mark.parametrize("blank", BLANKS)
def test_value_and_gradient_are_those_of_all_alignments(blank):
    given = batch(blank=blank)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    found = call(*given, blank, reduction="none")
    oracle = expected(*given, blank)
    assert torch.allclose(found, oracle, rtol=1e-12)
    (by_found,) = torch.autograd.grad((weights * found).sum(), given[0])
    (by_oracle,) = torch.autograd.grad((weights * oracle).sum(), given[0])
    assert torch.allclose(by_found, by_oracle, atol=1e-12)
    assert not by_found[1, 3:].any() and not by_found[1, :, 1:].any()


def test_gradcheck():
    logits, *rest = batch()
    assert torch.autograd.gradcheck(
        lambda x: call(x, *rest, 0, reduction="none"), (logits,)
    )


def test_lattice_gradcheck_with_windows():
    made = torch.Generator().manual_seed(0)
    blank = -torch.rand(2, 4, 3, dtype=torch.float64, generator=made)
    label = -torch.rand(2, 4, 2, dtype=torch.float64, generator=made)
    frames, labels = torch.tensor([4, 3]), torch.tensor([2, 1])
    windows = torch.tensor([[[0, 1], [1, 3]], [[1, 2], [0, 0]]])
    assert torch.autograd.gradcheck(
        lambda b, y: lattice_log_prob(b, y, frames, labels, windows),
        (blank.requires_grad_(), label.requires_grad_()),
    )


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
)
def test_lower_precisions(dtype, tolerance):
    logits, *rest = batch(dtype=torch.float64)
    low = logits.detach().to(dtype).requires_grad_()
    exact = low.detach().double().requires_grad_()
    found, oracle = call(low, *rest, 0), call(exact, *rest, 0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(oracle.item(), rel=1e-6)
    (by_low,) = torch.autograd.grad(found, low)
    (by_exact,) = torch.autograd.grad(oracle, exact)
    assert by_low.dtype == dtype
    error = (by_low.double() - by_exact).norm() / by_exact.norm()
    assert error < tolerance


def test_long_lattice_in_float32_is_as_good_as_float64():
    made = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 200, 41, 8, generator=made).requires_grad_()
    targets = torch.randint(1, 8, (1, 40), generator=made)
    exact = logits.detach().double().requires_grad_()
    one, grads = torch.ones(1), []
    for x in (logits, exact):
        loss = transducer_loss(x, targets, one, one, 0)
        grads.append(torch.autograd.grad(loss, x)[0].double())
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert error < 1e-6


def test_agrees_with_torchaudio():
    logits, targets, frames, counts = batch(dtype=torch.float32)
    for reduction in ("none", "mean", "sum"):
        ours, theirs = (
            call(
                logits,
                targets,
                frames,
                counts,
                0,
                reduction=reduction,
                backend=backend,
            )
            for backend in ("torch", "torchaudio")
        )
        assert torch.allclose(ours, theirs, rtol=1e-5)
        grads = [
            torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]
            for x in (ours, theirs)
        ]
        assert torch.allclose(*grads, atol=2e-5)


def test_takes_what_speechbrain_takes():
    from speechbrain.nnet.losses import transducer_loss as theirs

    here = list(inspect.signature(transducer_loss).parameters.values())
    there = list(inspect.signature(theirs).parameters.values())
    for ours, other in zip(here, there):
        assert (ours.name, ours.default) == (other.name, other.default)


def test_probabilities_of_all_sequences_sum_to_one():
    # Two frames and at most two labels at a frame: the predictor sees the
    # count alone, and after two labels only a blank is left.
    torch.manual_seed(0)
    free = torch.randn(2, 3, 3, dtype=torch.float64)
    free[:, 2, 1:] = -torch.inf
    total = 0.0
    sequences = [()]
    for length in (1, 2):
        sequences += [
            tuple(int(d) for d in f"{i:0{length}b}") for i in range(2**length)
        ]
    for sequence in sequences:
        count = len(sequence)
        targets = torch.tensor([[digit + 1 for digit in sequence]]).long()
        loss = transducer_loss(
            free[None, :, : count + 1],
            targets.reshape(1, count),
            torch.ones(1),
            torch.ones(1),
            0,
        )
        total += math.exp(-loss.item())
    assert total == pytest.approx(1.0, abs=1e-12)


def test_padding_changes_nothing_even_nan():
    given = batch(dtype=torch.float32)
    clean = call(*given, 0, reduction="none")
    (by_clean,) = torch.autograd.grad(clean.sum(), given[0])
    logits, targets, frames, counts = given
    dirty = logits.detach().clone()
    targets = targets.clone()
    for b in range(4):
        dirty[b, frames[b] :] = float("nan")
        dirty[b, :, counts[b] + 1 :] = float("nan")
        targets[b, counts[b] :] = -100
    dirty.requires_grad_()
    found = call(dirty, targets, frames, counts, 0, reduction="none")
    (by_dirty,) = torch.autograd.grad(found.sum(), dirty)
    assert torch.equal(found, clean) and torch.equal(by_dirty, by_clean)


def test_ragged_batch_equals_singles():
    logits, targets, frames, counts = batch()
    together = call(logits, targets, frames, counts, 0, reduction="none")
    one = torch.ones(1)
    for b, (t, u) in enumerate(zip(frames.tolist(), counts.tolist())):
        alone = transducer_loss(
            logits[b : b + 1, :t, : u + 1],
            targets[b : b + 1, :u],
            one,
            one,
            0,
        )
        assert alone.item() == pytest.approx(together[b].item(), rel=1e-12)


def test_nan_in_use_gives_nan():
    logits, *rest = batch(dtype=torch.float32)
    bad = logits.detach().clone()
    bad[0, 2, 1, 3] = float("nan")
    found = call(bad, *rest, 0, reduction="none")
    assert found.isnan().tolist() == [True, False, False, False]


def test_fastemit_scales_label_gradients_only():
    made = torch.Generator().manual_seed(0)
    blank = -torch.rand(1, 4, 3, dtype=torch.float64, generator=made)
    label = -torch.rand(1, 4, 2, dtype=torch.float64, generator=made)
    lengths = torch.tensor([4]), torch.tensor([2])
    given = blank.requires_grad_(), label.requires_grad_()
    plain = lattice_log_prob(*given, *lengths)
    fast = lattice_log_prob(*given, *lengths, fastemit_lambda=0.5)
    assert plain.item() == fast.item()
    by_plain = torch.autograd.grad(plain.sum(), given)
    by_fast = torch.autograd.grad(fast.sum(), given)
    assert torch.equal(by_plain[0], by_fast[0])
    assert torch.allclose(1.5 * by_plain[1], by_fast[1])


def test_windows_leave_only_alignments_inside():
    logits, targets, _, _ = batch()
    logits, targets = logits[:1].detach(), targets[:1]
    log_probs = logits.log_softmax(-1)[0]
    one = torch.ones(1)
    windows = alignment_windows(torch.tensor([[0, 2, 3]]), 0, 1)
    found = transducer_loss(logits, targets, one, one, 0, windows=windows)
    total = 0.0
    y = targets[0].tolist()
    # Label u is emitted at frame e_u: every choice inside of the windows.
    for emitted in [(a, b, c) for a in (0, 1) for b in (2, 3) for c in (3, 4)]:
        score, u = 0.0, 0
        for t in range(5):
            while u < 3 and emitted[u] == t:
                score += log_probs[t, u, y[u]].item()
                u += 1
            score += log_probs[t, u, 0].item()
        total += math.exp(score)
    assert math.exp(-found.item()) == pytest.approx(total, rel=1e-12)


def test_no_alignment_is_infinite_and_has_no_gradient():
    logits, targets, _, _ = batch()
    one = torch.ones(1)
    windows = torch.tensor([[[4, 4], [0, 3], [0, 4]]])
    loss = transducer_loss(
        logits[:1], targets[:1], one, one, 0, windows=windows
    )
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == math.inf and not grad.any()


def test_zero_infinity_leaves_the_other_utterances():
    logits, targets, _, _ = batch()
    whole, one = torch.ones(4), torch.tensor([[4, 4], [0, 3], [0, 4]])
    free = torch.tensor([[0, 99]] * 3)
    windows = torch.stack([one, free, free, free])
    options = {"windows": windows, "reduction": "none"}
    each = transducer_loss(logits, targets, whole, whole, 0, **options)
    assert each[0] == math.inf and each[1:].isfinite().all()
    options.update(reduction="mean", zero_infinity=True)
    found = transducer_loss(logits, targets, whole, whole, 0, **options)
    assert found.item() == pytest.approx(each[1:].sum().item() / 4)
    (grad,) = torch.autograd.grad(found, logits)
    (expected,) = torch.autograd.grad(each[1:].sum() / 4, logits)
    assert torch.allclose(grad, expected)


def test_scores_of_minus_infinity_alone_are_impossible_not_nan():
    logits, targets, _, _ = batch()
    logits = logits.detach().clone()
    logits[0, 1] = -math.inf  # a frame that nothing leads out of
    logits.requires_grad_()
    whole = torch.ones(4)
    each = transducer_loss(logits, targets, whole, whole, 0, "none")
    assert each[0] == math.inf and each[1:].isfinite().all()
    (grad,) = torch.autograd.grad(each.sum(), logits)
    assert grad.isfinite().all() and not grad[0].any()


def test_an_empty_batch_is_refused():
    nothing, none = torch.zeros(0), torch.zeros(0, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="empty batch"):
        transducer_loss(torch.zeros(0, 5, 4, 7), none, nothing, nothing, 0)
    joint = RNNTJoint(6, 5, 8, 7)
    x, g = torch.zeros(0, 5, 6), torch.zeros(0, 4, 5)
    with pytest.raises(ValueError, match="empty batch"):
        joint_transducer_loss(joint, x, g, none, nothing, nothing, 0)


LENS = torch.tensor([1.0, 1.0])
BAD = {
    "input length of 0": (
        {"input_lens": torch.tensor([1.0, 0.0])},
        "input length of row 1",
    ),
    "one length for all": (
        {"input_lens": torch.ones(1)},
        "1 for 2 utterances",
    ),
    "a length too many": (
        {"target_lens": torch.ones(3)},
        "3 for 2 utterances",
    ),
    "absolute lengths": (
        {"input_lens": torch.tensor([3.0, 3.0])},
        "divided by",
    ),
    "NaN length": ({"input_lens": torch.tensor([1.0, torch.nan])}, "row 1"),
    "target length beyond": (
        {"target_lens": torch.tensor([1.0, 1.5])},
        "target length of row 1",
    ),
    "blank among targets": (
        {"targets": torch.tensor([[1, 2], [0, 1]])},
        "row 1, label 0: 0 is the blank",
    ),
    "label beyond the vocabulary": (
        {"targets": torch.tensor([[1, 2], [1, 9]])},
        "row 1, label 1: 9 is outside of the vocabulary of 4",
    ),
    "negative label": ({"targets": torch.tensor([[1, -1], [1, 1]])}, "-1 is"),
    "targets too long": (
        {"targets": torch.ones(2, 3, dtype=torch.long)},
        "room for 2",
    ),
    "blank index": ({"blank_index": 4}, "blank_index 4"),
    "negative blank index": ({"blank_index": -1}, "blank_index -1"),
    "backend": ({"backend": "cuda"}, "'torchaudio'"),
    "reduction": ({"reduction": "average"}, "'average'"),
    "shape": ({"logits": torch.zeros(2, 3, 4)}, "vocabulary"),
    "rows": ({"targets": torch.ones(3, 2, dtype=torch.long)}, "3 rows"),
    "float targets": ({"targets": torch.ones(2, 2)}, "label indices"),
    "numba without CUDA": ({"backend": "numba"}, "CUDA"),
    "windows elsewhere": (
        {
            "backend": "torchaudio",
            "windows": torch.zeros(2, 2, 2, dtype=torch.long),
        },
        "windows",
    ),
    "float64 elsewhere": (
        {
            "backend": "torchaudio",
            "logits": torch.zeros(2, 3, 3, 4, dtype=torch.float64),
        },
        "float64",
    ),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused(change, message):
    good = {
        "logits": torch.zeros(2, 3, 3, 4),
        "targets": torch.tensor([[1, 2], [3, 1]]),
        "input_lens": LENS,
        "target_lens": LENS,
        "blank_index": 0,
    }
    with pytest.raises(ValueError, match=message):
        transducer_loss(**{**good, **change})


def test_targets_without_columns():
    logits = torch.zeros(2, 3, 1, 4)
    targets = torch.zeros(2, 0, dtype=torch.long)
    loss = transducer_loss(logits, targets, LENS, LENS, 0)
    assert loss.item() == pytest.approx(3 * math.log(4))
