"""Contrastive, distillation and the objective, against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from translation_toy import toy_batch, toy_model

from speechbrain_taskarith.translation import (
    BlankNoise,
    CrossModalContrastiveLoss,
    CTCShrink,
    TranslationObjective,
    distillation_loss,
)
from speechbrain_taskarith.translation.model import (
    SpeechEncoding,
    TranslationOutput,
)


def info_nce(speech, speech_lens, text, text_lens, tau, names=None):
    """The formula, term by term; utterances of one name are no negatives."""

    def mean(x, lens, b):
        return x[b, : round(float(lens[b]) * x.shape[1])].mean(0)

    n, total = len(speech), 0.0
    for i in range(n):
        s = mean(speech, speech_lens, i)
        cosines = [
            F.cosine_similarity(s, mean(text, text_lens, j), 0) / tau
            for j in range(n)
        ]
        negatives = [
            cosine
            for j, cosine in enumerate(cosines)
            if j != i and (names is None or names[j] != names[i])
        ]
        total = total - torch.log(
            cosines[i].exp() / sum(map(torch.exp, [cosines[i], *negatives]))
        )
    return total / n


def sides():
    torch.manual_seed(0)
    speech = torch.randn(4, 6, 3).double()
    text = torch.randn(4, 5, 3).double()
    return (
        speech,
        torch.tensor([1, 0.5, 1 / 6, 1]),
        text,
        torch.linspace(0.4, 1, 4),
    )


def test_contrastive_is_the_formula():
    speech, s_lens, text, t_lens = sides()
    speech.requires_grad_()
    text.requires_grad_()
    found = CrossModalContrastiveLoss(0.3)(speech, s_lens, text, t_lens)
    expected = info_nce(speech, s_lens, text, t_lens, 0.3)
    torch.testing.assert_close(found, expected)
    a = torch.autograd.grad(found, [speech, text], allow_unused=True)
    b = torch.autograd.grad(expected, [speech])
    torch.testing.assert_close(a[0], b[0])
    assert a[1] is None, "text gets no gradient"


def test_contrastive_both_ways():
    speech, s_lens, text, t_lens = sides()
    both = CrossModalContrastiveLoss(0.3, detach_text=False, symmetric=True)
    expected = info_nce(speech, s_lens, text, t_lens, 0.3)
    expected = expected + info_nce(text, t_lens, speech, s_lens, 0.3)
    torch.testing.assert_close(both(speech, s_lens, text, t_lens), expected / 2)


# Rows 0 and 2 are the same text; row 1 only begins like it, and row 3 differs
# from it in nothing but the padding's label.
REPEATED = torch.tensor(
    [[3, 0, 0, 1], [3, 0, 9, 9], [3, 0, 0, 7], [3, 0, 0, 0]]
)
REPEATED_LENS, NAMES = torch.tensor([0.75, 0.5, 0.75, 1.0]), "abac"


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_same_transcript_is_no_negative(symmetric):
    speech, s_lens, text, t_lens = sides()
    speech.requires_grad_()
    loss = CrossModalContrastiveLoss(0.3, symmetric=symmetric)
    found = loss(speech, s_lens, text, t_lens, REPEATED, REPEATED_LENS)
    expected = info_nce(speech, s_lens, text, t_lens, 0.3, NAMES)
    if symmetric:
        back = info_nce(text, t_lens, speech, s_lens, 0.3, NAMES)
        expected = (expected + back) / 2
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, speech)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert found < loss(speech, s_lens, text, t_lens)


def test_a_batch_of_one_transcript_has_no_negative():
    """Otherwise nothing could bring the loss below log 3."""
    x, one = torch.randn(3, 2, 4, requires_grad=True), torch.ones(3)
    labels = torch.ones(3, 2).long()
    loss = CrossModalContrastiveLoss()
    found = loss(x, one, x[:1].expand(3, 2, 4), one, labels, one)
    found.backward()
    assert found.item() == 0 and not x.grad.any()
    as_released = loss(x, one, x[:1].expand(3, 2, 4), one)
    torch.testing.assert_close(as_released, torch.tensor(3.0).log())


@pytest.mark.parametrize("noisy", [False, True])
def test_the_objective_knows_repeated_transcripts(noisy):
    model = toy_model(noise=BlankNoise(0, probability=1.0) if noisy else None)
    inputs, targets = toy_batch()
    inputs["source"], inputs["source_lens"] = REPEATED % 6, REPEATED_LENS
    targets |= {k: inputs[k] for k in ("source", "source_lens")}
    out = model(tasks=("asr",), **inputs)
    plain = TranslationObjective(0, contrastive=0.0)(out, **targets)["asr"]
    for repeated, names in ((False, NAMES), (True, None)):
        objective = TranslationObjective(0, repeated_negatives=repeated)
        found = objective(out, **targets)["asr"] - plain
        speech, text = out.speech, out.text
        expected = sum(
            info_nce(s, speech.lens, t, text.lens, 0.1, names) / 2
            for s, t in (
                (speech.embedded, text.embedded),
                (speech.encoded, text.encoded),
            )
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_contrastive_does_not_see_padding():
    speech, s_lens, text, t_lens = sides()
    loss = CrossModalContrastiveLoss()
    clean = loss(speech, s_lens, text, t_lens)
    speech[1, 3:] = math.nan
    text[0, 2:] = math.nan
    assert torch.equal(loss(speech, s_lens, text, t_lens), clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contrastive_of_long_sequences_in_half_precision(dtype):
    """The sum over the frames is more than float16 holds."""
    torch.manual_seed(0)
    speech, text = (100 + 20 * torch.randn(3, 1000, 4) for _ in range(2))
    lens = torch.tensor([1.0, 0.5, 0.8])
    speech, text = speech.to(dtype), text.to(dtype)
    loss = CrossModalContrastiveLoss()
    expected = loss(speech.double(), lens, text.double(), lens)
    found = loss(speech, lens, text, lens)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def test_one_utterance_has_no_negative():
    x = torch.randn(1, 3, 4, requires_grad=True)
    one = torch.ones(1)
    loss = CrossModalContrastiveLoss()(x, one, torch.randn(1, 2, 4), one)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


def test_contrastive_bad_input():
    with pytest.raises(ValueError, match="temperature"):
        CrossModalContrastiveLoss(0.0)
    x, one = torch.zeros(2, 3, 4), torch.ones(2)
    with pytest.raises(ValueError, match="a transcript for every"):
        CrossModalContrastiveLoss()(x, one, x[:1], one[:1])


def test_distillation_is_the_divergence():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 5).double().requires_grad_()
    teacher = torch.randn(2, 3, 5).double().requires_grad_()
    lens = torch.tensor([1.0, 1 / 3])
    loss = distillation_loss(student, teacher, lens, temperature=2.0)
    rows = (
        torch.cat([student[0], student[1, :1]]),
        torch.cat([teacher[0], teacher[1, :1]]),
    )
    p, q = (row / 2.0 for row in rows)
    expected = (
        4 * F.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="sum") / 4
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None and student.grad[1, 1:].abs().max() == 0
    with pytest.raises(ValueError, match="the same vocabulary"):
        distillation_loss(student, teacher[:, :2], lens)


def test_objective_is_the_sum_of_the_paper():
    model = toy_model(shrink=True).eval()
    inputs, targets = toy_batch()
    out = model(tasks=("st", "asr", "mt"), **inputs)
    losses = TranslationObjective(0, st_smoothing=0.0)(out, **targets)
    b = len(inputs["x"])
    ce = F.cross_entropy(
        out.st.transpose(1, 2), targets["target_eos"], reduction="sum"
    )
    frames = (out.speech.frame_lens * out.speech.logits.shape[1]).round()
    ctc = F.ctc_loss(
        out.speech.logits.log_softmax(-1).transpose(0, 1),
        targets["source"],
        frames.long(),
        (targets["source_lens"] * 5).round().long(),
        reduction="sum",
    )
    speech, text = out.speech, out.text
    apart = sum(
        info_nce(s, speech.lens, t, text.lens, 0.1)
        for s, t in (
            (speech.embedded, text.embedded),
            (speech.encoded, text.encoded),
        )
    )
    aligned, close = ctc / b + apart / 2, {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(
        losses["st"], 0.7 * ce / b + 0.3 * aligned, **close
    )
    torch.testing.assert_close(losses["asr"], aligned, **close)
    split = TranslationObjective(0, st_smoothing=0.0, ctc_in_st=False)
    parts = split(out, **targets)
    torch.testing.assert_close(parts["st"], 0.7 * ce / b, **close)
    torch.testing.assert_close(parts["asr"], 0.3 * aligned, **close)
    smooth = F.cross_entropy(
        out.mt.transpose(1, 2),
        targets["target_eos"],
        reduction="sum",
        label_smoothing=0.2,
    )
    torch.testing.assert_close(losses["mt"], smooth / b)
    with pytest.raises(ValueError, match="ce_weight"):
        TranslationObjective(0, ce_weight=0.0)


def test_a_stopped_task_takes_away_its_own_term_only():
    model = toy_model().eval()
    inputs, targets = toy_batch()
    objective = TranslationObjective(0)
    every = objective(model(tasks=("st", "asr", "mt"), **inputs), **targets)
    alone = objective(model(tasks=("st",), **inputs), **targets)
    assert set(alone) == {"st"}
    torch.testing.assert_close(alone["st"], every["st"])
    alone["st"].backward()
    assert model.ctc_lin.weight.grad.abs().max() > 0


def test_speech_without_transcripts():
    model = toy_model().eval()
    inputs, targets = toy_batch()
    for part in (inputs, targets):
        del part["source"], part["source_lens"]
    out = model(tasks=("st",), **inputs)
    with pytest.raises(ValueError, match="'st' needs source.*ce_weight=1"):
        TranslationObjective(0)(out, **targets)
    losses = TranslationObjective(0, ce_weight=1.0)(out, **targets)
    assert set(losses) == {"st"}


def test_objective_leaves_out_what_was_not_computed():
    model = toy_model().eval()
    inputs, targets = toy_batch()
    objective = TranslationObjective(0, distillation=0.5)
    for tasks in (("st",), ("asr",), ("mt",), ("st", "mt")):
        out = model(tasks=tasks, **inputs)
        assert set(objective(out, **targets, tasks=tasks)) == set(tasks)
    both = objective(model(tasks=("st", "mt"), **inputs), **targets)
    alone = objective(model(tasks=("st",), **inputs), **targets, tasks=("st",))
    assert both["st"] > alone["st"], "distillation is a part of it"


def test_padded_targets_do_not_count():
    model = toy_model().eval()
    inputs, targets = toy_batch()
    targets["target_lens"] = torch.tensor([1.0, 0.4, 1.0, 1.0])
    objective = TranslationObjective(0)
    one = objective(model(tasks=("st",), **inputs), **targets)["st"]
    inputs["target_bos"][1, 3:] = 7
    targets["target_eos"][1, 2:] = 0
    other = objective(model(tasks=("st",), **inputs), **targets)["st"]
    assert torch.equal(one, other)


@pytest.mark.parametrize("noisy", [False, True])
def test_two_blanks_are_refused(noisy):
    noise = BlankNoise(4)
    model = toy_model(shrink=not noisy)
    if noisy:
        # As a recipe does, which knows the pieces only later.
        model.noise = noise
    else:
        model.shrink = CTCShrink(blank_index=4)
    inputs, targets = toy_batch()
    out = model(tasks=("st",), **inputs)
    with pytest.raises(ValueError, match=r"blank_index=0\), but .* is 4"):
        TranslationObjective(0)(out, **targets)
    TranslationObjective(4)(out, **targets)
    if not noisy:
        model.noise = BlankNoise(0)
        with pytest.raises(ValueError, match="blank is 0, .* CTC head 4"):
            model(tasks=("st",), **inputs)


def test_transcripts_without_a_path_are_named(caplog):
    """Six frames hold six labels, and five of which two repeat do not fit."""
    frames, objective = 6, TranslationObjective(0, contrastive=0.0)
    labels = torch.tensor(
        [[1, 2, 3, 4, 5, 1], [1, 1, 2, 2, 3, 0], [1, 1, 2, 3, 4, 4]]
    )
    lens = torch.tensor([1.0, 5 / 6, 5 / 6])
    logits = torch.randn(3, frames, 6, requires_grad=True)
    speech = SpeechEncoding(logits, torch.ones(3), *[None] * 4)
    out = TranslationOutput(speech, None, None, None, ("asr",))
    ids = ["six", "seven", "six too"]
    targets = {"source": labels, "source_lens": lens, "ids": ids}
    objective(out, **targets)["asr"].backward()
    assert caplog.text.count("CTC needs") == 1
    assert "utterance 'seven': CTC needs 7 frames" in caplog.text
    assert "transcript of 5 labels, and there are 6" in caplog.text
    found = logits.grad.abs().amax((1, 2)) > 0
    assert found.tolist() == [True, False, True]
    # Each once; without names by row.
    objective(out, **targets)
    assert caplog.text.count("CTC needs") == 1
    objective(out, **{**targets, "ids": None})
    assert "row 1 of the batch: CTC needs 7" in caplog.text
    # A corpus of them does not fill the log.
    for number in range(100):
        objective(out, **{**targets, "ids": [f"u{number}"] * 3})
    assert caplog.text.count("CTC needs") == 20
    assert caplog.text.count("no more are named") == 1


def test_distillation_without_its_teacher_is_told_once(caplog):
    model = toy_model()
    inputs, targets = toy_batch()
    objective = TranslationObjective(0, distillation=0.5)
    with torch.no_grad():
        objective(model(tasks=("st",), **inputs), **targets)
    objective(model(tasks=("st", "mt"), **inputs), **targets)
    assert "distillation" not in caplog.text
    for _ in range(2):
        objective(model(tasks=("st",), **inputs), **targets)
    assert caplog.text.count("distillation=0.5 does nothing") == 1
