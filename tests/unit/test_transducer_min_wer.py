"""MinWER: the gradient P_i (W_i - E[W]), masks, sources and statistics."""

import itertools

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_taskarith.transducer import (
    HATJoint,
    LSTMPredictor,
    MinWERLoss,
    RNNTJoint,
    SpeechBrainJoint,
    TransducerBeamSearch,
    TransducerGreedySearch,
    min_wer_loss,
    transducer_loss,
)

ERRORS = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 5.0]], dtype=torch.float64)


def test_gradient_is_the_formula():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    loss = min_wer_loss(scores, ERRORS)
    (grad,) = torch.autograd.grad(loss, scores)
    probs = scores.detach().softmax(1)
    expected = (probs * ERRORS).sum(1, keepdim=True)
    assert torch.allclose(grad, probs * (ERRORS - expected) / 2)
    centred = (probs * (ERRORS - ERRORS.mean(1, keepdim=True))).sum(1)
    assert loss.item() == pytest.approx(centred.mean().item())


@pytest.mark.parametrize("junk", [0.0, 50.0, float("nan"), float("-inf")])
def test_masked_hypotheses_are_not_there(junk):
    torch.manual_seed(0)
    scores = torch.randn(2, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    given = scores.masked_fill(~mask, junk).requires_grad_()
    loss = min_wer_loss(given, ERRORS, mask)
    (grad,) = torch.autograd.grad(loss, given)
    short = scores[:1, :2].requires_grad_()
    whole = scores[1:].requires_grad_()
    alone = 0.5 * min_wer_loss(short, ERRORS[:1, :2])
    alone = alone + 0.5 * min_wer_loss(whole, ERRORS[1:])
    by_short, by_whole = torch.autograd.grad(alone, (short, whole))
    assert loss.item() == pytest.approx(alone.item())
    assert torch.allclose(grad[:1, :2], by_short)
    assert torch.allclose(grad[1:], by_whole)
    assert grad[0, 2] == 0


def test_bad_lists():
    with pytest.raises(ValueError, match="row 1 has no hypothesis"):
        mask = torch.tensor([[True], [False]])
        min_wer_loss(torch.zeros(2, 1), torch.zeros(2, 1), mask)
    with pytest.raises(ValueError, match="one shape"):
        min_wer_loss(torch.zeros(2, 2), torch.zeros(2, 1))


def test_a_list_of_impossible_hypotheses_is_named():
    """Not NaN for the whole batch; a single one has no share."""
    never, errors = float("-inf"), torch.tensor([[0, 1], [1, 2]])
    log_probs = torch.tensor([[0.0, never], [0.0, -1.0]], requires_grad=True)
    loss = min_wer_loss(log_probs, errors)
    share = torch.tensor(-1.0).sigmoid().item()
    assert loss.item() == pytest.approx((-0.5 + share - 0.5) / 2)
    assert torch.autograd.grad(loss, log_probs)[0].isfinite().all()
    with pytest.raises(ValueError, match="row 1: every hypothesis has"):
        min_wer_loss(
            log_probs.detach().flip(0) + torch.tensor([never, 0]), errors
        )


def setting(kind=RNNTJoint, dropout=0.0):
    torch.manual_seed(3)
    predictor = LSTMPredictor(6, 4, 5, num_layers=1, dropout=dropout).double()
    joint = kind(7, 5, 8, 6, blank_index=0).double()
    search = TransducerBeamSearch(predictor, joint, 0, beam_size=4)
    x = torch.randn(3, 6, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, 2, 3], [4, 5, 0], [0, 0, 0]])
    lens = torch.tensor([1.0, 0.5, 1.0]), torch.tensor([1.0, 2 / 3, 0.0])
    return search, x, targets, lens


LISTS = [
    [[1, 2, 3], [1, 2], [], [1, 2]],
    [[4, 5], [5]],
    [[], [1]],
]
FRAMES = [6, 3, 6]
WORDS = {1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}


def oracle(search, x, lists, truth, rnnt_weight):
    """The loss by the formulas, one hypothesis at a time."""
    one, total, rnnt = torch.ones(1), 0.0, 0.0

    def log_prob(row, tokens):
        y = torch.tensor([tokens], dtype=torch.long).reshape(1, -1)
        out, _ = search.predictor(torch.tensor([[0, *tokens]]))
        frames = x[row : row + 1, : FRAMES[row]]
        logits = search.joint(frames.unsqueeze(2), out.unsqueeze(1))
        return -transducer_loss(logits, y, one, one, 0)

    for row, hypotheses in enumerate(lists):
        unique = [list(t) for t in dict.fromkeys(map(tuple, hypotheses))]
        probs = torch.stack([log_prob(row, t) for t in unique]).softmax(0)
        errors = torch.tensor(
            [float(edits(truth[row], t)) for t in unique]
        ).double()
        total = total + (probs * (errors - errors.mean())).sum()
        rnnt = rnnt - log_prob(row, truth[row])
    return (total + rnnt_weight * rnnt) / len(lists)


def edits(a, b):
    """Levenshtein distance, as the textbook writes it."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        edits(a[1:], b) + 1,
        edits(a, b[1:]) + 1,
        edits(a[1:], b[1:]) + (a[0] != b[0]),
    )


@pytest.mark.parametrize("kind", [RNNTJoint, HATJoint])
@pytest.mark.parametrize("rnnt_weight", [0.0, 0.3])
def test_offline_lists_against_the_formulas(kind, rnnt_weight):
    search, x, targets, lens = setting(kind)
    loss = MinWERLoss(search, 4, rnnt_weight, source="offline")
    found = loss(x, lens[0], targets, lens[1], hypotheses=LISTS)
    truth = [[1, 2, 3], [4, 5], []]
    expected = oracle(search, x, LISTS, truth, rnnt_weight)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    leaves = [x, *search.predictor.parameters(), *search.joint.parameters()]
    for a, b in zip(
        torch.autograd.grad(found, leaves, allow_unused=True),
        torch.autograd.grad(expected, leaves, allow_unused=True),
    ):
        assert torch.allclose(a, b, atol=1e-10)


def test_words_are_counted_after_detokenizing():
    search, x, targets, lens = setting()
    spell = {1: "on", 2: "e", 3: " two", 4: "x", 5: "y"}

    def detokenize(tokens):
        return "".join(spell[token] for token in tokens)

    loss = MinWERLoss(search, 4, source="offline", detokenize=detokenize)
    lists = [[[1, 2, 3], [1, 3], [3]], [[4, 5], [4]], [[]]]
    errors = loss._errors([[1, 2, 3], [4, 5], []], lists, None)
    # "one two": "on two" has one error, "two" one; "xy": "x" one.
    assert errors == [[0, 1, 1], [0, 1], [0]]
    by_text = loss._errors(
        [[1, 2, 3], [4, 5], []], lists, ["one two", "xy", "word"]
    )
    assert by_text == [[0, 1, 1], [0, 1], [1]]
    with pytest.raises(ValueError, match="1 references for 3"):
        loss(x, lens[0], targets, lens[1], ["one"], lists)
    # Text and labels are never equal.
    with pytest.raises(ValueError, match="give MinWERLoss a detokenize"):
        MinWERLoss(search, 4, source="offline")(
            x, lens[0], targets, lens[1], ["one", "two", "x"], lists
        )


def test_lists_without_difference_are_skipped_and_counted():
    search, x, targets, lens = setting()
    loss = MinWERLoss(search, 4, 0.0, source="offline")
    same = [[[1, 2, 4], [1, 2, 5]], [[4, 5]], [[]]]
    found = loss(x, lens[0], targets, lens[1], hypotheses=same)
    assert found.item() == 0.0 and found.requires_grad
    found.backward()
    assert not x.grad.any()
    statistics = loss.statistics()
    assert statistics["with_gradient"] == 0.0
    assert statistics["oracle_wer"] == statistics["expected_wer"] == 20.0
    loss(x, lens[0], targets, lens[1], hypotheses=LISTS)
    assert loss.statistics()["with_gradient"] == 50.0
    assert loss.statistics()["hypotheses"] == (4 + 3 + 2 + 2) / 6
    loss.reset()
    assert loss.statistics()["oracle_wer"] == 0.0


def test_a_resumed_epoch_goes_on_counting(tmp_path):
    search, x, targets, lens = setting()

    def loss_and_checkpointer():
        loss = MinWERLoss(search, 4, 0.0, source="offline")
        return loss, Checkpointer(tmp_path, {"min_wer": loss})

    def step(loss, lists):
        loss(x, lens[0], targets, lens[1], hypotheses=lists)

    killed, checkpointer = loss_and_checkpointer()
    step(killed, LISTS)
    path = checkpointer.save_checkpoint().path
    assert (path / "min_wer.ckpt").stat().st_size < 200  # no weights
    whole = killed.statistics()
    resumed, checkpointer = loss_and_checkpointer()
    checkpointer.recover_if_possible()
    assert resumed.statistics() == whole
    for loss in (killed, resumed):
        step(loss, [[[1, 2, 4], [1]], [[4, 5]], [[]]])
    assert resumed.statistics() == killed.statistics() != whole


@pytest.mark.parametrize("source", ["beam", "sample"])
def test_decoding_leaves_training_alone(source):
    search, x, targets, lens = setting(dropout=0.5)
    search.train()
    search.joint.activation.eval()  # a part that somebody has frozen
    loss = MinWERLoss(search, 4, 0.1, source=source)
    found = loss(x, lens[0], targets, lens[1])
    assert found.isfinite() and found.requires_grad
    assert search.predictor.training and search.predictor.dropout.training
    assert not search.joint.activation.training
    found.backward()
    assert x.grad.isfinite().all() and x.grad.any()


def tiny(blank=2.5):
    """A model of two labels, for which all that is likely can be listed."""
    torch.manual_seed(4)
    predictor = LSTMPredictor(3, 4, 5, num_layers=1).double()
    joint = RNNTJoint(6, 5, 8, 3, blank_index=0).double()
    with torch.no_grad():
        joint.output.weight.mul_(2)
        joint.output.bias[0] += blank
    search = TransducerBeamSearch(predictor, joint, 0, beam_size=4)
    x = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    parameters = [*predictor.parameters(), *joint.parameters()]
    return search, x, [x, *parameters]


def enumerated(search, x, truth, longest=9):
    """Return E[errors] over all label sequences, and their probability."""
    total = mass = 0.0
    for length in range(longest + 1):
        lists = [*itertools.product((1, 2), repeat=length)]
        y = torch.tensor(lists, dtype=torch.long).view(len(lists), length)
        out, _ = search.predictor(torch.nn.functional.pad(y, (1, 0)))
        one = torch.ones(len(y))
        logits = search.joint(x.unsqueeze(2), out.unsqueeze(1))
        probs = (-transducer_loss(logits, y, one, one, 0, "none")).exp()
        errors = [edits(truth, list(tokens)) for tokens in lists]
        total = total + (probs * torch.tensor(errors)).sum()
        mass = mass + probs.sum().item()
    return total, mass


def flat(loss, leaves):
    grads = torch.autograd.grad(loss, leaves)
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("draws, batch", [(2, 6000), (16, 800)])
def test_samples_give_the_gradient_of_the_expected_errors(draws, batch):
    search, x, leaves = tiny()
    expected, mass = enumerated(search, x, [1, 2])
    assert mass > 0.999
    exact = flat(expected, leaves)
    loss = MinWERLoss(search, draws, rnnt_weight=0.0, source="sample")
    torch.manual_seed(0)
    many = x.expand(batch, -1, -1)
    whole, targets = torch.ones(batch), torch.tensor([[1, 2]] * batch)
    found = loss(many, whole, targets, whole)
    assert found.item() == pytest.approx(expected.item(), abs=0.05)
    estimate = flat(found, leaves)
    assert torch.cosine_similarity(estimate, exact, 0) > 0.99
    assert estimate.norm() / exact.norm() == pytest.approx(1.0, abs=0.15)
    words = loss.statistics()["expected_wer"] * 2 / 100
    assert words == pytest.approx(found.item())


def test_samples_that_are_cut_are_told():
    search, x, _ = tiny(blank=-1.0)
    loss = MinWERLoss(search, 4, source="sample", max_symbols=1)
    y, one = torch.tensor([[1, 2]]), torch.ones(1)
    with pytest.warns(UserWarning, match=r"reached max_symbols \(1\)"):
        loss(x, one, y, one)


def test_without_any_gradient_every_parameter_still_has_one():
    search, x, targets, lens = setting()
    loss = MinWERLoss(search, 4, 0.0, source="offline")
    same = [[[1, 2, 4]], [[4, 5]], [[]]]
    dirty = x.detach().clone()
    dirty[1, 3:] = float("nan")
    found = loss(dirty, lens[0], targets, lens[1], hypotheses=same)
    assert found.item() == 0.0
    found.backward()
    for parameter in search.parameters():
        assert not parameter.grad.any()


def test_a_bad_hypothesis_is_named():
    search, x, targets, lens = setting()
    inner = search.joint
    # A joint that does not say how many labels there are.
    search.joint = SpeechBrainJoint(inner, blank_index=0)
    loss = MinWERLoss(search, 4, source="offline")
    assert search.joint.vocab_size is None
    for bad, why in ((6, "vocabulary of 6"), (0, "is the blank"), (-1, "of 6")):
        lists = [[[1]], [[4, 5], [5, bad]], [[]]]
        message = f"hypothesis 1 of utterance 1: {bad} .*{why}"
        with pytest.raises(ValueError, match=message):
            loss(x, lens[0], targets, lens[1], hypotheses=lists)
    with pytest.raises(ValueError, match="row 0, label 2: 6 .*vocabulary of 6"):
        loss(x, lens[0], targets + 3, lens[1], hypotheses=LISTS)


def test_training_lowers_the_expected_errors():
    search, x, targets, lens = setting()
    parameters = [*search.predictor.parameters(), *search.joint.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.03)
    loss = MinWERLoss(search, 4, 0.0)
    values = []
    for _ in range(60):
        loss.reset()
        optimizer.zero_grad()
        loss(x.detach(), lens[0], targets, lens[1]).backward()
        optimizer.step()
        values.append(loss.statistics()["expected_wer"])
    assert values[-1] < 0.5 * values[0]


def test_bad_settings():
    search, x, targets, lens = setting()
    for options in ({"n_best": 1}, {"n_best": 5}, {"source": "lattice"}):
        with pytest.raises(ValueError, match="n_best|source"):
            MinWERLoss(search, **options)
    greedy = TransducerGreedySearch(search.predictor, search.joint, 0)
    with pytest.raises(ValueError, match=r"n_best 4: .* beam_size \(1\)"):
        MinWERLoss(greedy)
    for source in ("sample", "offline"):
        MinWERLoss(greedy, source=source)
    offline = MinWERLoss(search, 4, source="offline")
    with pytest.raises(ValueError, match="expected `hypotheses`"):
        offline(x, lens[0], targets, lens[1])
    with pytest.raises(ValueError, match="row 2: an empty n-best list"):
        lists = [[[1]], [[1]], []]
        offline(x, lens[0], targets, lens[1], hypotheses=lists)
    with pytest.raises(ValueError, match="is the blank"):
        offline(x, lens[0], targets, torch.ones(3), hypotheses=LISTS)


def test_made_in_yaml_as_the_guide_says():
    name = "speechbrain_taskarith.transducer.MinWERLoss"
    hparams = load_hyperpyyaml(f"min_wer: !name:{name}\n    n_best: 3\n")
    search, x, targets, lens = setting()
    loss = hparams["min_wer"](searcher=search, detokenize=str)
    assert isinstance(loss, MinWERLoss)
    assert (loss.n_best, loss.rnnt_weight) == (3, 0.1)
    assert loss(x, lens[0], targets, lens[1]).isfinite()
