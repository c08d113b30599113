"""BLEU and chrF are sacrebleu's, with signatures."""

import sys

import pytest

from speechbrain_taskarith.metrics import translation_scores

REFERENCES = ["le chat dort sur le lit .", "il pleut à Paris ce soir"]
HYPOTHESES = ["le chat dort sur un lit .", "il pleut ce soir"]


def test_scores_are_sacrebleus():
    sacrebleu = pytest.importorskip(
        "sacrebleu", reason="SACREBLEU ABSENT: extra translation"
    )
    report = translation_scores(REFERENCES, HYPOTHESES)
    bleu = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES])
    chrf = sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES])
    assert report.bleu == bleu.score and report.chrf == chrf.score
    assert report.length_ratio == 11 / 13 and report.sentences == 2
    assert "tok:13a" in report.bleu_signature
    assert "nc:6" in report.chrf_signature
    assert "length ratio 0.846 (2 sentences)" in str(report)
    lower = translation_scores(
        [line.upper() for line in REFERENCES], HYPOTHESES, lowercase=True
    )
    assert lower.bleu == pytest.approx(report.bleu)
    assert "case:lc" in lower.bleu_signature
    two = translation_scores([REFERENCES, HYPOTHESES], HYPOTHESES)
    assert two.bleu == pytest.approx(100.0)
    perfect = translation_scores(REFERENCES, REFERENCES)
    assert perfect.bleu == pytest.approx(100.0) == perfect.chrf
    assert translation_scores(REFERENCES, ["", ""]).bleu == 0.0
    for bad in ((REFERENCES, HYPOTHESES[:1]), ([], [])):
        with pytest.raises(ValueError, match="as many, and at least one"):
            translation_scores(*bad)


@pytest.mark.parametrize(
    "references, hypotheses, text",
    [
        ("abc", ["abc"], "single string"),
        (["abc"], "abc", "single string"),
        (["a", "b"], ["x", None], "sentence 1: the hypothesis is None"),
        ([None, "b"], ["x", "y"], "sentence 0: the reference is None"),
        ([["a", 3.5]], ["x", "y"], "sentence 1: the reference is 3.5"),
    ],
)
def test_what_is_no_sentence_is_named(references, hypotheses, text):
    pytest.importorskip("sacrebleu", reason="SACREBLEU ABSENT")
    with pytest.raises(TypeError, match=text):
        translation_scores(references, hypotheses)


def test_without_sacrebleu_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"speechbrain_taskarith\[transl"):
        translation_scores(REFERENCES, HYPOTHESES)
