"""BLEU, chrF and their bootstrap are sacrebleu's; COMET is its authors'."""

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from speechbrain_taskarith.metrics import (
    comet_score,
    compare_translations,
    translation_intervals,
    translation_scores,
)
from speechbrain_taskarith.metrics.translation_quality import bootstrap

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
    # Without spaces characters are counted: half of them are missing.
    cut = translation_scores(
        ["我爱北京天安门广场"], ["我爱北京"], tokenize="zh"
    )
    assert cut.length_ratio == 4 / 9
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


WORDS = "le chat dort ici il pleut sur un lit à Paris ce soir encore".split()


def corpora(size=60, seed=0):
    """Return references, a poor system's and a better system's lines."""
    drawn = random.Random(seed)
    references = [
        " ".join(drawn.choices(WORDS, k=drawn.randint(4, 9)))
        for _ in range(size)
    ]

    def spoiled(share):
        return [
            " ".join(
                drawn.choice(WORDS) if drawn.random() < share else word
                for word in line.split()
            )
            for line in references
        ]

    return references, spoiled(0.5), spoiled(0.3)


def test_paired_bootstrap_is_sacrebleus(monkeypatch):
    sacrebleu = pytest.importorskip("sacrebleu", reason="SACREBLEU ABSENT")
    from sacrebleu.significance import PairedTest

    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    references, poor, better = corpora()
    for first, second in ((poor, better), (better, poor)):
        found = compare_translations(references, first, second, resamples=400)
        _, theirs = PairedTest(
            [("first", first), ("second", second)],
            {"BLEU": sacrebleu.BLEU(), "chrF": sacrebleu.CHRF()},
            [references],
            test_type="bs",
            n_samples=400,
        )()
        for ours, name in (("BLEU", "BLEU"), ("chrF", "chrF2")):
            one, other = theirs[name]
            assert found[ours].p_value == pytest.approx(other.p_value)
            assert found[ours].difference == pytest.approx(
                other.score - one.score
            )
    clear = compare_translations(references, poor, better)["BLEU"]
    assert clear.low > 0 and clear.p_value < 0.05
    assert clear.probability_of_improvement > 0.95
    assert clear.low < clear.difference < clear.high


def test_equal_systems_do_not_differ():
    references = ["le chat dort ici", "il pleut à Paris", "où est-il ?"] * 4
    worse = ["le chat", "il pleut", "où"] * 4
    found = compare_translations(references, worse, list(worse), resamples=99)
    for paired in found.values():
        assert (paired.difference, paired.p_value) == (0.0, 1.0)


def test_a_systems_interval_is_that_of_a_plain_bootstrap():
    sacrebleu = pytest.importorskip("sacrebleu", reason="SACREBLEU ABSENT")
    references, poor, _ = corpora(30)
    found = translation_intervals(references, poor, resamples=300, level=0.9)
    # The slow way: draw sentences, score them as a corpus.
    drawn = np.random.default_rng(12345).choice(30, size=(300, 30))
    scores = {"BLEU": [], "chrF": []}
    for chosen in drawn:
        sets = [[references[i] for i in chosen]]
        lines = [poor[i] for i in chosen]
        scores["BLEU"].append(sacrebleu.BLEU().corpus_score(lines, sets).score)
        scores["chrF"].append(sacrebleu.CHRF().corpus_score(lines, sets).score)
    for name, values in scores.items():
        expected = np.quantile(values, [0.05, 0.95])
        assert found[name] == pytest.approx(tuple(expected), abs=1e-6)


def test_blocks_are_drawn_as_a_whole():
    sacrebleu = pytest.importorskip("sacrebleu", reason="SACREBLEU ABSENT")
    references, poor, better = corpora(20)
    # Every sentence twice, as two seeds translate it.
    both = (references * 2, poor + better, better + better)
    blocks = list(range(20)) * 2
    found = compare_translations(*both, resamples=200, blocks=blocks)["BLEU"]
    differences = []
    for chosen in np.random.default_rng(12345).choice(20, size=(200, 20)):
        rows = [i for block in chosen for i in (block, block + 20)]
        sets = [[both[0][i] for i in rows]]
        one, other = (
            sacrebleu.BLEU().corpus_score([side[i] for i in rows], sets).score
            for side in both[1:]
        )
        differences.append(other - one)
    expected = np.quantile(differences, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-6)
    # Drawn one by one they look more certain.
    alone = compare_translations(*both, resamples=200)["BLEU"]
    assert alone.difference == pytest.approx(found.difference)
    same = compare_translations(*both, resamples=200, blocks=range(40))["BLEU"]
    assert same == alone
    with pytest.raises(ValueError, match="block label"):
        compare_translations(*both, blocks=[0])


def test_chunks_do_not_matter(monkeypatch):
    pytest.importorskip("sacrebleu", reason="SACREBLEU ABSENT")
    references, poor, better = corpora(20)
    whole = compare_translations(references, poor, better, resamples=50)
    monkeypatch.setattr(bootstrap, "_CHUNK_ENTRIES", 60)
    assert compare_translations(references, poor, better, resamples=50) == whole


def test_bootstrap_refuses_what_makes_no_sense():
    pytest.importorskip("sacrebleu", reason="SACREBLEU ABSENT")
    for wrong in ({"resamples": 0}, {"level": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            translation_intervals(REFERENCES, HYPOTHESES, **wrong)
    with pytest.raises(ValueError, match="as many"):
        compare_translations(REFERENCES, HYPOTHESES, HYPOTHESES[:1])
    # One sentence: there is nothing to vary.
    (low, high) = translation_intervals(["a b c d"], ["a b c d"])["BLEU"]
    assert low == high == pytest.approx(100)


class Model:
    """Stands for a COMET model; its wiring is tested, not its scores."""

    def predict(self, rows, batch_size, gpus):
        self.asked = (rows, batch_size, gpus)
        scores = [float(row["mt"] == row["ref"]) for row in rows]
        return SimpleNamespace(
            scores=scores, system_score=sum(scores) / len(scores)
        )


def test_comet_is_asked_as_it_wants(monkeypatch, tmp_path):
    model, loaded = Model(), []

    def download_model(name):
        raise KeyError(f"Model '{name}' not supported by COMET.")

    comet = SimpleNamespace(
        load_from_checkpoint=lambda path: loaded.append(path) or model,
        download_model=download_model,
    )
    monkeypatch.setitem(sys.modules, "comet", comet)
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"")
    found = comet_score(["a", "b"], ["A", "C"], ["A", "B"], path, 4)
    assert found == (0.5, [1.0, 0.0]) and loaded == [str(path)]
    assert model.asked == (
        [
            {"src": "a", "mt": "A", "ref": "A"},
            {"src": "b", "mt": "C", "ref": "B"},
        ],
        4,
        0,
    )
    for wrong in ("nobody/no-model", str(tmp_path / "none.ckpt")):
        with pytest.raises(FileNotFoundError, match="path of a COMET"):
            comet_score(["a"], ["A"], ["A"], wrong)
    with pytest.raises(ValueError, match="as many"):
        comet_score(["a"], ["A", "B"], ["A", "B"], path)
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(ImportError, match=r"speechbrain_taskarith\[comet\]"):
        comet_score(["a"], ["A"], ["A"], path)
