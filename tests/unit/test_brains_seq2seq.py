"""Seq2SeqBrain: SpeechBrain's Transformer and a tiny random Whisper."""

import itertools
import json
import math

import pytest
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.nnet.losses import nll_loss

from speechbrain_taskarith.brains import (
    CharacterLabels,
    Seq2SeqBrain,
    Seq2SeqNetwork,
    WhisperNetwork,
)
from speechbrain_taskarith.brains.seq2seq import greedy_search
from speechbrain_taskarith.vectors.lifelong.penalties import LwF

BOS, EOS = 4, 5


def cost(*args, **kwargs):
    return nll_loss(*args, **kwargs, reduction="batchmean")


def network(seed=0):
    torch.manual_seed(seed)
    transformer = TransformerASR(
        tgt_vocab=6,
        input_size=4,
        d_model=8,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        d_ffn=16,
        dropout=0.0,
        causal=False,
    )
    return Seq2SeqNetwork(transformer, torch.nn.Linear(8, 6))


def brain_of(model, **more):
    hparams = {
        "model": model,
        "tokenizer": CharacterLabels("abc"),
        "seq_cost": cost,
        "prompt": [BOS],
        "eos_index": EOS,
        "max_tokens": 6,
        **more,
    }
    return Seq2SeqBrain(
        {"model": model},
        opt_class=lambda p: torch.optim.Adam(p, lr=0.02),
        hparams=hparams,
        run_opts={"device": "cpu", "noprogressbar": True},
    )


def batch():
    torch.manual_seed(3)
    labels = CharacterLabels("abc")
    return PaddedBatch(
        [
            {
                "id": word,
                "sig": torch.randn(8 + len(word), 4),
                "tokens": labels.encode(word),
                "wrd": word,
            }
            for word in ("abca", "cb")
        ]
    )


def loader(*batches):
    return torch.utils.data.DataLoader(
        list(batches), batch_size=1, collate_fn=lambda batches: batches[0]
    )


def test_loss_is_the_sum_over_tokens_and_the_end():
    model = network()
    model.eval()
    brain = brain_of(model)
    predictions = brain.compute_forward(batch(), sb.Stage.TRAIN)
    loss = brain.compute_objectives(predictions, batch(), sb.Stage.TRAIN)
    log_probs, _ = predictions
    total = 0.0
    for row, tokens in enumerate([[1, 2, 3, 1, EOS], [3, 2, EOS]]):
        for step, token in enumerate(tokens):
            total -= log_probs[row, step, token].item()
    assert loss.item() == pytest.approx(total / 2, rel=1e-5)


def test_step_by_step_scores_equal_those_of_training():
    model = network()
    model.eval()
    x, lens = torch.randn(2, 9, 4), torch.tensor([1.0, 5 / 9])
    tokens = torch.tensor([[BOS, 1, 2], [BOS, 3, 1]])
    whole = model(x, lens, tokens)
    encoded = model.encode(x, lens)
    for step in range(3):
        last = model.decode(tokens[:, : step + 1], encoded, lens)
        assert torch.allclose(last, whole[:, step], atol=1e-5)


def test_greedy_search_follows_the_best_token():
    """Every prefix scored by hand, one utterance at a time."""
    model = network(1)
    model.eval()
    x, lens = torch.randn(3, 9, 4), torch.tensor([1.0, 0.7, 0.4])
    encoded = model.encode(x, lens)
    found = greedy_search(model, encoded, lens, [BOS], EOS, 5)
    for row in range(3):
        tokens = [BOS]
        for _ in range(5):
            scores = model.decode(
                torch.tensor([tokens]), encoded[row : row + 1], lens[row, None]
            )[0]
            best = max(range(6), key=lambda n: scores[n].item())
            if best == EOS:
                break
            tokens.append(best)
        assert found[row] == tokens[1:]


def test_hypotheses_are_without_prompt_and_blank():
    model = network()
    brain = brain_of(model, searcher=lambda *_: [[[0, 1, BOS, 3], [BOS, 0]]])
    brain.evaluate(loader(batch()), progressbar=False)
    assert brain.hypotheses == ["ac", ""]


def test_overfits_two_utterances():
    torch.manual_seed(0)
    brain = brain_of(network())
    brain.fit(range(80), loader(batch()), None)
    brain.checkpointer = None
    brain.evaluate(loader(batch()))
    assert brain.report.wer == 0.0


def test_distillation_works_on_tokens():
    model = network()
    brain = brain_of(model)
    model.eval()
    method = LwF(temperature=1.0)
    method.before_task(model, 2)
    with torch.no_grad():
        model.seq_lin.bias += torch.randn(6)
    predictions = brain.compute_forward(batch(), sb.Stage.TRAIN)
    new, lens = predictions
    features, feature_lens, bos = brain._inputs
    old = method.teacher(features, feature_lens, bos)
    expected = 0.0
    for row, valid in enumerate((5, 3)):
        expected += (
            sum(
                (
                    old[row, t, v].exp() * (old[row, t, v] - new[row, t, v])
                ).item()
                for t, v in itertools.product(range(valid), range(6))
            )
            / valid
            / 2
        )
    assert lens.tolist() == pytest.approx([1.0, 0.6])
    found = brain.penalty(method, predictions).item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert not math.isclose(found, 0.0)


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    """A tiny random Whisper with its feature extractor and tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>"]
    special += ["<|transcribe|>", "<|translate|>", "<|notimestamps|>"]
    vocabulary = {c: n for n, c in enumerate("abcĠ")}
    vocabulary["<|endoftext|>"] = 4
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = transformers.WhisperTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        additional_special_tokens=special[1:],
    )
    tokenizer.save_pretrained(folder)
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=1500,
        max_target_positions=20,
        pad_token_id=4,
        bos_token_id=4,
        eos_token_id=4,
        decoder_start_token_id=5,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    transformers.WhisperModel(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    return folder


def test_whisper_from_a_local_folder(whisper_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from speechbrain.integrations.huggingface.whisper import Whisper

    whisper = Whisper(str(whisper_folder), str(tmp_path))
    model = WhisperNetwork(whisper)
    labels = CharacterLabels("abc")
    prompt = [5, 8]
    brain = brain_of(model, prompt=prompt, eos_index=4, tokenizer=labels)
    data = PaddedBatch(
        [
            {
                "id": word,
                "sig": torch.randn(16000),
                "tokens": labels.encode(word),
                "wrd": word,
            }
            for word in ("ab", "c")
        ]
    )
    model.eval()
    predictions = brain.compute_forward(data, sb.Stage.VALID)
    assert predictions[0].shape == (2, 3, whisper.model.config.vocab_size)
    tokens = torch.tensor([[*prompt, 1, 2]])
    x = data.sig.data[:1]
    whole = model(x, None, tokens)
    encoded = model.encode(x, None)
    assert torch.allclose(
        model.decode(tokens, encoded, None), whole[:, -1], atol=1e-5
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    brain.fit(range(1), loader(data), None)
    moved = [
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    ]
    assert any("decoder" in name for name in moved)
    assert any("encoder" in name for name in moved)
