"""CTC on an utterance's own labels, against torch's on all labels."""

import pytest
import torch
import torch.nn.functional as F

from speechbrain_taskarith.translation.multitask.ctc_loss import ctc_loss


def of_torch(logits, labels, frames, words, blank):
    return F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        labels,
        tuple(frames.tolist()),
        tuple(words.tolist()),
        blank=blank,
        reduction="none",
        zero_infinity=True,
    )


def value_and_gradient(loss, logits, labels, frames, words, blank, factors):
    logits = logits.clone().requires_grad_()
    losses = loss(logits, labels, frames, words, blank)
    (grad,) = torch.autograd.grad((losses * factors).sum(), logits)
    return losses.detach(), grad


@pytest.mark.parametrize("vocab", [2, 3, 7, 40])
@pytest.mark.parametrize("last", [False, True])
def test_value_and_gradient_are_torchs(vocab, last):
    """Ragged, repeated, empty, too long, weighted by either sign."""
    torch.manual_seed(vocab)
    blank = vocab - 1 if last else 0
    infeasible = 0
    for _ in range(20):
        logits = 3 * torch.randn(6, 9, vocab).double()
        labels = torch.randint(1, vocab, (6, 5)) - int(last)
        frames = torch.randint(1, 10, (6,))
        words = torch.randint(0, 6, (6,))
        given = (logits, labels, frames, words, blank, torch.randn(6).double())
        found = value_and_gradient(ctc_loss, *given)
        expected = value_and_gradient(of_torch, *given)
        torch.testing.assert_close(found, expected)
        infeasible += int((expected[0] == 0).sum())
    assert infeasible > 0, "some transcripts are too long"


def test_what_pads_does_not_matter():
    torch.manual_seed(0)
    logits = torch.randn(2, 8, 6)
    labels = torch.tensor([[1, 2, 3], [4, 4, 0]])
    frames, words = torch.tensor([8, 5]), torch.tensor([3, 2])
    given = (frames, words, 0, torch.ones(2))
    clean = value_and_gradient(ctc_loss, logits, labels, *given)
    logits[1, 5:] = torch.nan
    labels[1, 2] = 5
    found = value_and_gradient(ctc_loss, logits, labels, *given)
    for one, other in zip(clean, found):
        assert torch.equal(one, other)


def test_labels_that_are_almost_impossible():
    """Probabilities that float32 has no number for."""
    logits = torch.zeros(1, 4, 5)
    logits[..., 1] = 300.0
    given = (torch.tensor([[2, 3]]), torch.tensor([4]), torch.tensor([2]), 0)
    found = value_and_gradient(ctc_loss, logits, *given, torch.ones(1))
    exact = (logits.double(), *given, torch.ones(1).double())
    for one, other in zip(found, value_and_gradient(of_torch, *exact)):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-6)
    assert 500 < float(found[0]) < 1300


def test_a_diverged_head_is_no_missing_path():
    logits = torch.full((1, 3, 4), torch.nan)
    length = torch.tensor([2])
    assert ctc_loss(logits, torch.ones(1, 2).long(), length, length, 0).isnan()
