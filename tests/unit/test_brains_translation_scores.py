"""What a translation Brain tests: the mean of checkpoints, tokens, scores."""

import logging

import jiwer
import pytest
import torch
from test_brains_translation import TARGET, item, loader, make_brain
from translation_toy import toy_model

from speechbrain_taskarith.brains.ctc import bare
from speechbrain_taskarith.vectors import AtomicCheckpointer


def with_tied_head(folder, compiled=False, **hparams):
    """Return a Brain whose CTC head is tied to the embedding."""
    brain = make_brain(lr=0.1, **hparams)
    model = toy_model(tie_ctc=True, seed=2)
    model.register_buffer("steps", torch.tensor(3))
    brain.modules["model"] = model
    if compiled:
        brain.modules["model"] = torch.compile(model, backend="eager")
    brain.checkpointer = AtomicCheckpointer(folder, {"model": model})
    return brain


@pytest.mark.parametrize("compiled", [False, True])
def test_the_mean_of_the_last_checkpoints_is_tested(tmp_path, caplog, compiled):
    brain = with_tied_head(tmp_path, compiled, average_last=3)
    data = loader([0, 1], [2])
    for epoch in range(5):
        brain.fit([epoch], data, data)
    saved = brain.checkpointer.find_checkpoints()
    # The last three, and of equally good ones the best three.
    last = saved[:3]
    assert [one.meta["epoch"] for one in last] == [4, 3, 2]
    states = [torch.load(one.paramfiles["model"]) for one in last]
    assert not torch.equal(*(s["ctc_lin.weight"] for s in states[:2]))
    brain.evaluate(data, max_key="BLEU")
    model = bare(brain.modules["model"])
    found = model.state_dict()
    for name, tensor in found.items():
        stored = torch.stack([state[name] for state in states]).double()
        torch.testing.assert_close(tensor.double(), stored.mean(0))
    assert found["steps"].dtype == torch.int64 and found["steps"] == 3
    assert model.ctc_lin.weight is model.source_embedding.weight
    with caplog.at_level(logging.WARNING):
        brain.hparams.average_last = 40
        brain.evaluate(data, max_key="BLEU")
    assert "there are" in caplog.text and "40" in caplog.text


def test_checkpoints_within_epochs_do_not_count_as_the_last(tmp_path):
    brain = with_tied_head(tmp_path, average_last=3)
    brain.ckpt_interval_steps = 3
    score, falling = brain._score, iter([60, 50, 40, 30, 20, 10])

    def lower(loss):
        score(loss)
        brain.stats["BLEU"] = next(falling)

    brain._score = lower
    data = loader([0, 1], [2], [0], [1])
    for epoch in range(6):
        brain.fit([epoch], data, data)
    saved = brain.checkpointer.find_checkpoints()
    # The last three, which are averaged, and the best three.
    assert [one.meta.get("epoch") for one in saved] == [5, 4, 3, 2, 1, 0]


def test_one_checkpoint_is_as_before(tmp_path):
    brain = with_tied_head(tmp_path)
    data = loader([0, 1])
    for epoch in range(3):
        brain.fit([epoch], data, data)
    # The last one and the best one.
    assert len(brain.checkpointer.list_checkpoints()) <= 2


def test_characters_are_counted_beside_words():
    brain = make_brain(tasks=("asr",))
    data = loader([0, 1], [2])
    brain.fit([0], data)
    brain.on_stage_start("test")
    brain.transcripts = ["a b c", "d e"]
    brain.ctc_hypotheses = ["a c c", "de"]
    brain._score(0.0)
    assert brain.stats["CTC_WER"] == pytest.approx(60.0)
    expected = 100 * jiwer.cer(brain.transcripts, brain.ctc_hypotheses)
    assert brain.stats["CTC_CER"] == pytest.approx(expected)


class Search:
    """Writes the token that it was told to begin with."""

    def __call__(self, encoded, lens, begin=None):
        first = torch.full((len(encoded),), 1) if begin is None else begin
        return [[token] for token in first], None, None, None


def test_each_utterance_begins_with_its_languages_token():
    brain = make_brain(search=Search(), greedy_tokens=3)
    decoder = brain.modules["model"].decoder
    decoder.embedding.emb.Embedding.weight.data *= 5
    decoder.seq_lin.weight.data *= 5
    decoder.seq_lin.bias.data[2] = -99
    into = {}
    for token in ("A", "E"):
        target = TARGET.encode(f"{token} B C D")
        into[token] = item(1, target_bos=target)
    brain.evaluate(loader([into["A"], into["E"]], [0]))
    assert brain.hypotheses == ["A", "E", "<s>"]
    brain.hparams.search = None
    brain.evaluate(loader([into["A"], into["E"]]))
    together = brain.hypotheses
    assert together[0] != together[1]
    for number, token in enumerate(("A", "E")):
        brain.evaluate(loader([into[token]]))
        assert brain.hypotheses == together[number : number + 1]
