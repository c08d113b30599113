"""The recogniser that `FSDD/ASR/transducer` leaves, read again."""

import sys
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_taskarith.transducer.streaming.folder import load_transcriber

RECIPE = Path(__file__).resolve().parents[2] / "recipes/FSDD/ASR/transducer"
LABELS = ["<blank>", "1", "null", "a, b", "\\d", "\u0142"]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    import report

    yield report
    sys.modules.pop("report", None)


def test_the_saved_recogniser_has_sizes_labels_and_weights(report, tmp_path):
    sizes = {"d_model": 32, "nhead": 2, "labels": LABELS, "vocab_size": 6}
    text = report.DESCRIPTION.read_text(encoding="utf-8")
    made = load_hyperpyyaml(text, sizes)
    report.save_transcriber(made, tmp_path)
    read = load_transcriber(tmp_path)
    assert read.detokenize.labels == LABELS
    expected = made["transcriber"].state_dict()
    found = read.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
