"""CTCBrain: loss, words, and models of SpeechBrain and transformers."""

import functools
import itertools
import math

import pytest
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.lobes.models.transformer.TransformerASR import (
    EncoderWrapper,
    TransformerASR,
)
from speechbrain.nnet.losses import ctc_loss
from speechbrain.nnet.schedulers import LinearWarmupScheduler

from speechbrain_taskarith.brains import (
    CharacterLabels,
    CTCBrain,
    CTCNetwork,
)
from speechbrain_taskarith.brains.ctc import bare
from speechbrain_taskarith.vectors import AtomicCheckpointer

LABELS = CharacterLabels("ab ")


def conformer(seed=0):
    torch.manual_seed(seed)
    transformer = TransformerASR(
        tgt_vocab=4,
        input_size=5,
        d_model=8,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=0,
        d_ffn=16,
        dropout=0.0,
        encoder_module="conformer",
        attention_type="RoPEMHA",
        kernel_size=3,
        normalize_before=True,
        causal=False,
    )
    return CTCNetwork(EncoderWrapper(transformer), torch.nn.Linear(8, 4))


def brain_of(model, checkpointer=None, **more):
    hparams = {
        "model": model,
        "tokenizer": LABELS,
        "blank_index": 0,
        "ctc_cost": functools.partial(
            ctc_loss, blank_index=0, reduction="batchmean"
        ),
        **more,
    }
    return CTCBrain(
        {"model": model},
        opt_class=functools.partial(torch.optim.Adam, lr=0.02),
        hparams=hparams,
        run_opts={"device": "cpu", "noprogressbar": True},
        checkpointer=checkpointer,
    )


def batch(texts=("ab b", "a"), size=(), steps=10):
    torch.manual_seed(1)
    return PaddedBatch(
        [
            {
                "id": f"{n}",
                "sig": torch.randn(steps - 3 * n, *size),
                "tokens": LABELS.encode(text),
                "wrd": text,
            }
            for n, text in enumerate(texts)
        ]
    )


def loader(*batches):
    return torch.utils.data.DataLoader(
        list(batches), batch_size=1, collate_fn=lambda batches: batches[0]
    )


def collapse(path):
    """A path of labels to its transcript: repeats, then blanks, go."""
    kept = [k for k, _ in itertools.groupby(path) if k != 0]
    return LABELS.decode([kept])[0]


def test_loss_is_the_sum_over_all_paths():
    """Brute force: every path of labels that collapses to the target."""
    model = conformer().eval()
    brain = brain_of(model)
    data = batch(("ab", "a"), (5,), steps=6)
    predictions = brain.compute_forward(data, sb.Stage.TRAIN)
    loss = brain.compute_objectives(predictions, data, sb.Stage.TRAIN)
    total = 0.0
    for row, (text, steps) in enumerate([("ab", 6), ("a", 3)]):
        scores = predictions[0][row].exp().tolist()
        of_text = 0.0
        for path in itertools.product(range(3), repeat=steps):
            if collapse(path) == text:
                of_text += math.prod(scores[t][k] for t, k in enumerate(path))
        total -= math.log(of_text)
    assert loss.item() == pytest.approx(total / 2, rel=1e-4)


def test_words_are_those_of_the_best_path_without_padding():
    model = conformer(2).eval()
    brain = brain_of(model)
    data = batch(("ab", "a"), (5,))
    brain.on_stage_start(sb.Stage.TEST)
    predictions = brain.compute_forward(data, sb.Stage.TEST)
    brain.compute_objectives(predictions, data, sb.Stage.TEST)
    best = predictions[0].argmax(-1).tolist()
    expected = [collapse(best[0][:10]), collapse(best[1][:7])]
    assert brain.hypotheses == expected
    assert brain.references == ["ab", "a"]


def test_overfits_and_saves_each_epoch(tmp_path):
    model = conformer()
    saver = AtomicCheckpointer(tmp_path, {"model": model})
    brain = brain_of(model, checkpointer=saver)
    data = loader(batch(size=(5,)))
    brain.fit(range(60), data, data)
    brain.evaluate(data)
    assert brain.report.wer == 0.0
    (checkpoint,) = saver.list_checkpoints()
    assert checkpoint.meta["WER"] == 0.0 and checkpoint.meta["epoch"] == 59


@pytest.mark.parametrize("keep_best", [False, True])
def test_the_best_checkpoint_is_kept_on_demand(tmp_path, keep_best):
    """Beside the newest; a training that gets worse again."""
    model = conformer()
    checkpointer = AtomicCheckpointer(tmp_path, {"model": model})
    brain = brain_of(model, checkpointer, keep_best=keep_best)
    data, wers = loader(batch(size=(5,))), []
    for epoch, wer in enumerate([60.0, 20.0, 40.0, 80.0]):
        brain.on_stage_start(sb.Stage.VALID, epoch)
        brain._train_loss = 0.0
        brain._ids, brain.references = ["u"], ["a a a a a"]
        wrong = round(wer / 20)
        brain.hypotheses = [" ".join(["b"] * wrong + ["a"] * (5 - wrong))]
        with torch.no_grad():
            next(model.parameters()).fill_(wer)
        brain.on_stage_end(sb.Stage.VALID, torch.tensor(1.0), epoch)
        wers.append(brain.report.wer)
    assert wers == [60.0, 20.0, 40.0, 80.0]
    kept = sorted(c.meta["WER"] for c in checkpointer.list_checkpoints())
    assert kept == ([20.0, 80.0] if keep_best else [80.0])
    brain.evaluate(data, min_key="WER")
    best = next(model.parameters()).flatten()[0].item()
    assert best == (20.0 if keep_best else 80.0)
    checkpointer.recover_if_possible()
    assert next(model.parameters()).flatten()[0].item() == 80.0


class Killed(Exception):
    """Stands for a kill."""


class Dying(CTCBrain):
    """Dies in front of a batch, counted from 1."""

    dies_at = None

    def on_fit_batch_start(self, batch, should_step):
        if self.step == self.dies_at:
            raise Killed


def test_resumed_within_an_update_it_gives_the_same(tmp_path):
    """No checkpoint holds the gradient of the batches before."""

    def fresh(name):
        model = conformer()
        saver = AtomicCheckpointer(tmp_path / name, {"model": model})
        options = {
            "device": "cpu",
            "noprogressbar": True,
            "ckpt_interval_steps": 1,
            "grad_accumulation_factor": 2,
        }
        brain = Dying(
            {"model": model},
            functools.partial(torch.optim.SGD, lr=0.1),
            vars(brain_of(model).hparams),
            options,
            saver,
        )
        texts = ("ab b", "b", "a", "ba", "ab", "bb")
        data = [batch((text, "a"), size=(5,)) for text in texts]
        train = sb.dataio.dataloader.SaveableDataLoader(
            data, batch_size=1, collate_fn=lambda batches: batches[0]
        )
        counter = sb.utils.epoch_loop.EpochCounter(limit=1)
        saver.add_recoverables({"loader": train, "counter": counter})
        return brain, (counter, train, loader(data[0]))

    whole, given = fresh("whole")
    whole.fit(*given)
    killed, given = fresh("killed")
    killed.dies_at = 4
    with pytest.raises(Killed):
        killed.fit(*given)
    resumed, given = fresh("killed")
    resumed.fit(*given)
    expected = whole.modules.model.state_dict()
    for name, found in resumed.modules.model.state_dict().items():
        assert torch.equal(found, expected[name]), name
    assert resumed._train_loss == whole._train_loss


def test_the_learning_rate_follows_its_schedule():
    model = conformer()
    annealing = LinearWarmupScheduler(0.02, 2, 6)
    brain = brain_of(model, lr_annealing=annealing)
    rates = []
    fit_batch = brain.fit_batch

    def watched(data):
        loss = fit_batch(data)
        rates.append(brain.optimizer.param_groups[0]["lr"])
        return loss

    brain.fit_batch = watched
    brain.fit(range(1), loader(*[batch(size=(5,))] * 6), None)
    assert rates == pytest.approx([0.01, 0.02, 0.015, 0.01, 0.005, 0.0])


def test_augmentation_is_for_training_only():
    calls = []

    def augment(x, lens):
        calls.append(x.shape)
        return x * 0.0, lens

    model = conformer().eval()
    brain = brain_of(model, fea_augment=augment)
    data = batch(size=(5,))
    train, _ = brain.compute_forward(data, sb.Stage.TRAIN)
    test, _ = brain.compute_forward(data, sb.Stage.TEST)
    assert len(calls) == 1 and not torch.allclose(train, test)


def test_an_augmentation_that_adds_copies_is_refused():
    brain = brain_of(
        conformer(),
        fea_augment=lambda x, lens: (x.repeat(2, 1, 1), lens.repeat(2)),
    )
    with pytest.raises(ValueError, match="concat_original"):
        brain.compute_forward(batch(size=(5,)), sb.Stage.TRAIN)


def test_loss_of_has_gradient_and_no_augmentation():
    model = conformer().eval()
    brain = brain_of(model, fea_augment=lambda x, lens: x * 0.0)
    data = batch(("ab",), (5,))
    loss = brain.loss_of(data)
    predictions = brain.compute_forward(data, sb.Stage.TEST)
    brain.on_stage_start(sb.Stage.TEST)
    plain = brain.compute_objectives(predictions, data, sb.Stage.TEST)
    assert loss.item() == pytest.approx(plain.item())
    loss.backward()
    assert model.ctc_lin.weight.grad.abs().sum() > 0


def test_bare_takes_the_wrapper_off():
    layer = torch.nn.Linear(1, 1)
    assert bare(torch.nn.DataParallel(layer)) is layer


def test_wav2vec2_conformer_from_a_local_folder(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2

    torch.manual_seed(0)
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(5, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        conv_depthwise_kernel_size=3,
        num_feat_extract_layers=2,
    )
    folder = tmp_path / "model"
    transformers.Wav2Vec2ConformerModel(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    encoder = Wav2Vec2(str(folder), str(tmp_path / "cache"))
    model = CTCNetwork(encoder, torch.nn.Linear(16, 4))
    brain = brain_of(model)
    data = batch(steps=1600)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    brain.fit(range(1), loader(data), loader(data))
    assert brain.report.words == 3
    moved = [
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    ]
    assert any(name.startswith("encoder.") for name in moved)
    assert any(name.startswith("ctc_lin.") for name in moved)


@pytest.mark.parametrize("text", ["ab", "a b", ""])
def test_labels_and_back(text):
    assert LABELS.decode([LABELS.encode(text).tolist()]) == [text]


@pytest.mark.parametrize("label", [-1, len(LABELS)])
def test_a_label_without_a_character(label):
    with pytest.raises(ValueError, match=f"label {label}: expected 0 to"):
        LABELS.decode([[1], [1, label]])


def test_blank_has_no_text():
    assert LABELS.decode([[0, 1, 0, 2], [0]]) == LABELS.decode([[1, 2], []])


def test_a_character_without_a_label():
    with pytest.raises(ValueError, match="'x'.*no label"):
        LABELS.encode("ax")
    with pytest.raises(ValueError, match="twice"):
        CharacterLabels("aba")
