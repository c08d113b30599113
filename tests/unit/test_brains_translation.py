"""The Brain of speech translation: losses, tasks, searches, resuming."""

from functools import partial

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.augment.augmenter import Augmenter
from speechbrain.dataio.batch import PaddedBatch
from translation_toy import toy_model

from speechbrain_taskarith.brains import (
    PieceLabels,
    RunningMeans,
    TranslationBrain,
    WordLabels,
    best_key,
)
from speechbrain_taskarith.data.batches import select_inputs
from speechbrain_taskarith.translation import (
    InputGuard,
    TaskNormWeights,
    TranslationObjective,
)
from speechbrain_taskarith.vectors import AtomicCheckpointer

SOURCE = WordLabels(["a", "b", "c", "d", "e"])
CTC = {"CTC_WER", "CTC_CER"}
TARGET = WordLabels(["<s>", "</s>", "A", "B", "C", "D", "E"])


def item(number, **changed):
    """Return an utterance; its translation has its words in capitals."""
    g = torch.Generator().manual_seed(number)
    words = [SOURCE.units[(number + i) % 5] for i in range(2 + number % 2)]
    said, meant = " ".join(words), " ".join(words).upper()
    return {
        "id": f"u{number}",
        "sig": torch.randn(20 + 2 * number, 5, generator=g),
        "source": SOURCE.encode(said),
        "target_bos": TARGET.encode(f"<s> {meant}"),
        "target_eos": TARGET.encode(f"{meant} </s>"),
        "wrd": said,
        "translation": meant,
        **changed,
    }


def loader(*batches):
    """Return a loader of batches, of utterances by number or as they are."""
    made = [
        PaddedBatch([one if isinstance(one, dict) else item(one) for one in b])
        for b in batches
    ]
    return torch.utils.data.DataLoader(
        made, batch_size=1, collate_fn=lambda batches: batches[0]
    )


def make_brain(
    kind=TranslationBrain,
    main="st",
    tasks=("asr", "mt"),
    lr=0.01,
    folder=None,
    weights=None,
    dropout=0.0,
    run_opts=None,
    **hparams,
):
    model = toy_model(dropout=dropout)
    weights = weights or TaskNormWeights(tasks, main=main, interval=1000)
    checkpointer = None
    if folder is not None:
        recoverables = {"model": model, "task_weights": weights}
        checkpointer = AtomicCheckpointer(folder, recoverables)
    return kind(
        {"model": model},
        opt_class=partial(torch.optim.SGD, lr=lr),
        hparams={
            "main": main,
            "objective": TranslationObjective(blank_index=0),
            "task_weights": weights,
            "source_labels": SOURCE,
            "target_labels": TARGET,
            "bos_index": 1,
            "eos_index": 2,
            "greedy_tokens": 4,
            "seed": 3,
            **hparams,
        },
        run_opts={"device": "cpu", "noprogressbar": True, **(run_opts or {})},
        checkpointer=checkpointer,
    )


def state(brain):
    return {k: v.clone() for k, v in brain.modules.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_loss_is_the_weighted_sum_of_the_objectives():
    weights = TaskNormWeights(initial={"asr": 0.5, "mt": 0.25})
    brain = make_brain(weights=weights)
    brain.should_step = True
    batch = PaddedBatch([item(0), item(1)])
    out = brain.compute_forward(batch, sb.Stage.TRAIN)
    loss = brain.compute_objectives(out, batch, sb.Stage.TRAIN)
    losses = brain.hparams.objective(
        out,
        source=batch.source[0],
        source_lens=batch.source[1],
        target_eos=batch.target_eos[0],
        target_lens=batch.target_eos[1],
    )
    expected = losses["st"] + 0.5 * losses["asr"] + 0.25 * losses["mt"]
    torch.testing.assert_close(loss, expected)
    assert brain.task_losses.means() == pytest.approx(
        {task: value.item() for task, value in losses.items()}
    )
    # Outside training the main task alone is computed.
    brain.on_stage_start(sb.Stage.VALID)
    brain.modules.eval()
    with torch.no_grad():
        out = brain.compute_forward(batch, sb.Stage.VALID)
        loss = brain.compute_objectives(out, batch, sb.Stage.VALID)
    assert out.mt is None
    torch.testing.assert_close(loss, losses["st"].detach())


def test_it_learns_to_translate(tmp_path):
    brain = make_brain(lr=0.02, folder=tmp_path)
    data = loader([0, 1, 2])
    before = None
    for _ in brain_epochs(brain, 60, data):
        before = before or brain.stats["loss"]
    # The last checkpoint: sentences of three words have no BLEU to choose by.
    brain.evaluate(data)
    assert brain.stats["loss"] < 0.5 * before
    assert brain.hypotheses == brain.references
    assert brain.ids == ["u0", "u1", "u2"]
    assert brain.stats["BLEU"] == pytest.approx(brain.scores.bleu)


def brain_epochs(brain, count, data):
    for epoch in range(count):
        brain.fit([epoch], data, data)
        yield epoch


class Search:
    """A search that always finds the same."""

    def __init__(self):
        self.calls = 0

    def __call__(self, encoded, lens):
        self.calls += 1
        found = [[torch.tensor(3), torch.tensor(4)]] * len(encoded)
        return found, None, None, None


def test_development_data_are_translated_greedily():
    search = Search()
    brain = make_brain(search=search)
    brain.fit([0], loader([0, 1]), loader([0, 1]))
    assert search.calls == 0 and len(brain.hypotheses) == 2
    brain.evaluate(loader([0, 1], [2]))
    assert search.calls == 2
    assert brain.hypotheses == ["A B"] * 3


def test_translations_begin_as_their_references_do():
    # The first token names the language to write: the same speech twice.
    other = item(0, translation="D E")
    other["target_bos"] = torch.cat([torch.tensor([7]), TARGET.encode("D E")])
    other["target_eos"] = TARGET.encode("D E </s>")
    both = loader([0, other])
    brain = make_brain(tasks=(), lr=0.2)
    brain.fit(range(60), both)
    brain.evaluate(both)
    assert brain.hypotheses == ["A B", "D E"]


@pytest.mark.parametrize(
    ("main", "tasks", "scores"),
    [
        ("st", (), {"BLEU", "chrF", "length_ratio", *CTC}),
        ("st", ("mt",), {"BLEU", "chrF", "length_ratio", *CTC}),
        ("st", ("asr",), {"BLEU", "chrF", "length_ratio", *CTC}),
        ("mt", (), {"BLEU", "chrF", "length_ratio"}),
        ("asr", (), CTC),
    ],
)
def test_scores_are_those_of_the_tasks(main, tasks, scores, tmp_path):
    brain = make_brain(main=main, tasks=tasks, folder=tmp_path)
    brain.fit([1], loader([0, 1]), loader([0, 1]))
    assert set(brain.stats) == scores | {"loss"}
    found = brain.checkpointer.find_checkpoint(**best_key(main))
    key = "CTC_WER" if main == "asr" else "BLEU"
    assert found.meta[key] == pytest.approx(brain.stats[key])
    assert set(brain.train_stats) == {"loss", main, *tasks}


def test_what_was_drawn_before_does_not_matter():
    found = []
    for drawn in (0, 7):
        brain = make_brain(dropout=0.3)
        for epoch in (1, 2):
            torch.rand(drawn)
            brain.fit([epoch], loader([0, 1], [2, 3]))
        found.append(state(brain))
    assert same(*found)
    # Another epoch draws something else.
    other = make_brain(dropout=0.3)
    for epoch in (1, 3):
        other.fit([epoch], loader([0, 1], [2, 3]))
    assert not same(found[0], state(other))


class Mixed(TranslationBrain):
    """Even batches have lost all their tasks."""

    def tasks_of(self, batch, stage):
        return () if batch.id[0] == "u0" else super().tasks_of(batch, stage)


def test_a_batch_without_tasks_is_not_trained_on():
    brains = [make_brain(kind=Mixed), make_brain()]
    brains[0].fit([1], loader([0], [1]))
    brains[1].fit([1], loader([1]))
    assert same(*map(state, brains))
    # Nor does it count as a loss of 0.
    assert brains[0].train_stats == brains[1].train_stats


def test_accumulated_batches_are_one_update():
    brain = make_brain(run_opts={"grad_accumulation_factor": 2})
    rates = []

    def annealing(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] = 0.5

    brain.lr_annealing = annealing
    brain.fit([1], loader([0], [1], [2], [3]))
    assert brain.hparams.task_weights.updates == 2
    assert rates == [0.01, 0.5]
    one = make_brain(run_opts={"grad_accumulation_factor": 2}, lr=0.5)
    one.fit([1], loader([0], [1], [2], [3]))
    # It moved before the first update, not behind it.
    assert same(state(brain), state(one))


class Killed(Exception):
    """Stands for a kill."""


class Dying(TranslationBrain):
    """Dies in front of the batch whose name it is told."""

    dies_at = None

    def on_fit_batch_start(self, batch, should_step):
        if batch.id[0] == self.dies_at:
            raise Killed
        super().on_fit_batch_start(batch, should_step)


def test_resumed_in_an_epoch_it_gives_the_same(tmp_path):
    def fresh(name):
        brain = make_brain(
            kind=Dying,
            folder=tmp_path / name,
            dropout=0.2,
            weights=TaskNormWeights(interval=2, floor=0.0),
            run_opts={
                "ckpt_interval_steps": 1,
                "grad_accumulation_factor": 2,
            },
        )
        counter = sb.utils.epoch_loop.EpochCounter(limit=1)
        brain.checkpointer.add_recoverable("counter", counter)
        data = [PaddedBatch([item(2 * n), item(2 * n + 1)]) for n in range(6)]
        train = sb.dataio.dataloader.SaveableDataLoader(
            data, batch_size=1, collate_fn=lambda batches: batches[0]
        )
        brain.checkpointer.add_recoverable("loader", train)
        return brain, (counter, train, loader([0, 1]))

    whole, given = fresh("whole")
    whole.fit(*given)
    # In the middle of an update: that batch is seen again.
    killed, given = fresh("killed")
    killed.dies_at = "u10"
    with pytest.raises(Killed):
        killed.fit(*given)
    resumed, given = fresh("killed")
    resumed.fit(*given)
    assert same(state(whole), state(resumed))
    assert resumed.train_stats == pytest.approx(whole.train_stats, rel=1e-12)
    weights = [b.hparams.task_weights for b in (whole, resumed)]
    assert weights[0].history == weights[1].history != []


# A space or one without width is a text and has no label.
@pytest.mark.parametrize("text", ["", " ", "\u200b"])
def test_who_is_left_out_does_not_hang_on_tasks_that_stopped(text):
    mute = item(1, wrd=text, source=torch.tensor([]).long())
    for weight in (1.0, 0.0):
        guard = InputGuard(skip_bad=True)
        weights = TaskNormWeights(initial={"asr": weight, "mt": weight})
        brain = make_brain(weights=weights, guard=guard)
        batch = PaddedBatch([item(0), mute, item(2)])
        brain.compute_forward(batch, sb.Stage.TRAIN)
        assert brain.inputs["ids"] == ["u0", "u2"]
        assert guard.counts == {"it has no transcript": 1}


def test_batch_without_its_bad_utterances():
    batch = PaddedBatch([item(number) for number in range(3)])
    x, lens = torch.rand(3, 5, 2), torch.tensor([0.4, 0.6, 1.0])
    taken = select_inputs(batch, x, lens, torch.tensor([0, 2]))
    assert taken["ids"] == ["u0", "u2"]
    assert taken["transcripts"] == ["a b", "c d"]
    assert taken["translations"] == ["A B", "C D"]
    assert torch.equal(taken["x"], x[[0, 2]])
    assert torch.equal(taken["lens"], lens[[0, 2]])
    for name in ("source", "target_bos", "target_eos"):
        assert torch.equal(taken[name], getattr(batch, name).data[[0, 2]])
    assert "x" not in select_inputs(batch, None, None)


def test_features_are_made_normalised_and_augmented():
    def half(waves):
        return waves / 2

    def silence(x, lens):
        return torch.zeros_like(x), lens

    brain = make_brain(compute_features=half, fea_augment=silence)
    batch = PaddedBatch([item(0), item(1)])
    out = brain.compute_forward(batch, sb.Stage.VALID)
    assert torch.equal(brain.inputs["x"], batch.sig[0] / 2)
    brain.compute_forward(batch, sb.Stage.TRAIN)
    assert not brain.inputs["x"].any()
    assert out.speech is not None


@pytest.mark.parametrize("concat_original", [False, True])
def test_an_augmenter_may_keep_the_original(concat_original):
    augmenter = Augmenter(
        concat_original=concat_original, augmentations=[Silence()]
    )
    guard = InputGuard(skip_bad=True)
    brain = make_brain(fea_augment=augmenter, guard=guard)
    mute = item(1, wrd="", source=torch.tensor([]).long())
    batch = PaddedBatch([item(0), mute, item(2)])
    brain.compute_forward(batch, sb.Stage.TRAIN)
    inputs, times = brain.inputs, 1 + concat_original
    assert inputs["ids"] == ["u0", "u2"] * times
    assert inputs["translations"] == ["A B", "C D"] * times
    for name in ("source", "target_bos", "target_eos"):
        kept = getattr(batch, name).data[[0, 2]]
        assert torch.equal(inputs[name], torch.cat([kept] * times))
    silent = torch.zeros_like(batch.sig[0][[0, 2]])
    wanted = [batch.sig[0][[0, 2]]] * concat_original + [silent]
    assert torch.equal(inputs["x"], torch.cat(wanted))
    brain.fit([1], loader([0, 1], [2, 3]))
    assert brain.task_losses.means()["st"] > 0
    with pytest.raises(ValueError, match="4 utterances for 2"):
        make_brain(
            fea_augment=lambda x, lens: (x.repeat(2, 1, 1), lens.repeat(2))
        ).fit([1], loader([0, 1]))


class Silence(torch.nn.Module):
    """An augmentation."""

    def forward(self, x):
        return torch.zeros_like(x)


def test_what_is_left_out_is_counted_by_epoch():
    mute = item(1, wrd="", source=torch.tensor([]).long())
    guard = InputGuard(skip_bad=True)
    brain = make_brain(guard=guard)
    brain.fit([1, 2], loader([0, mute, 2]), loader([0]))
    assert guard.counts == {"it has no transcript": 1}


class Pieces:
    """Stands for a SentencePiece processor."""

    def __len__(self):
        return 3

    def encode_as_ids(self, text):
        return ["xyz".index(letter) for letter in text]

    def decode_ids(self, ids):
        return "".join("xyz"[i] for i in ids)

    def id_to_piece(self, index):
        return "xyz"[index]


def test_pieces_stand_behind_what_is_reserved():
    labels = PieceLabels(Pieces(), ["<blank>", "<other>"])
    assert labels.encode("zx").tolist() == [4, 2]
    assert labels.encode("").dtype == torch.int64
    assert labels.decode([[4, 2], []]) == ["zx", ""]
    assert labels.pieces == ["<blank>", "<other>", "x", "y", "z"]
    for wrong in (1, 5):
        with pytest.raises(ValueError, match=f"label {wrong}: expected 2 to 4"):
            labels.decode([[wrong]])


def test_means_go_on_where_they_were_saved(tmp_path):
    figures = torch.rand(20, generator=torch.Generator().manual_seed(0))
    whole, first, second = RunningMeans(), RunningMeans(), RunningMeans()
    for figure in figures[:8]:
        first.add({"a": figure})
    first.save(tmp_path / "means.json")
    second.load(tmp_path / "means.json")
    for figure in figures[8:]:
        second.add({"a": figure})
    for figure in figures:
        whole.add({"a": figure})
    # To the bit: a resumed run's log is that of a run never killed.
    assert second.means() == whole.means()
    assert whole.means()["a"] == pytest.approx(float(figures.double().mean()))
    second.clear()
    assert second.means() == {}


def test_a_mean_leaves_out_what_is_not_finite(tmp_path):
    means = RunningMeans()
    for figure in (1.0, float("inf"), 2.0, float("nan")):
        means.add({"a": torch.tensor(figure), "b": torch.tensor(float("nan"))})
    means.save(tmp_path / "means.json")
    other = RunningMeans()
    other.load(tmp_path / "means.json")
    assert means.means() == other.means() == {"a": 1.5}


def aggregated(settings):
    """Return an aggregator as a YAML makes it."""
    pytest.importorskip("torchjd", reason="TORCHJD ABSENT: extra translation")
    name = "speechbrain_taskarith.translation.GradientAggregator"
    return load_hyperpyyaml(f"it: !new:{name}\n    {settings}\n")["it"]


def test_an_aggregator_of_sums_trains_as_the_weighted_sum():
    brains = [make_brain(), make_brain(aggregator=aggregated("name: Sum"))]
    for brain in brains:
        brain.fit(range(2), loader([0, 1], [2, 3, 4]))
    one, other = (brain.modules.model.state_dict() for brain in brains)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
    assert brains[1].train_stats == pytest.approx(brains[0].train_stats)


def test_an_aggregator_takes_the_place_of_the_sum():
    # A mean with weights of its own, never the sum.
    aggregator = aggregated("name: MGDA")
    brain, batch = make_brain(aggregator=aggregator), [0, 1, 2]
    (batch,) = loader(batch)
    brain.should_step, model = True, brain.modules.model
    out = brain.compute_forward(batch, sb.Stage.TRAIN)
    brain.compute_objectives(out, batch, sb.Stage.TRAIN).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    # By hand: the same class of torchjd, in place of backward.
    model.zero_grad()
    names = ("source", "source_lens", "target_eos", "target_lens")
    targets = {name: brain.inputs[name] for name in names}
    out = brain.compute_forward(batch, sb.Stage.TRAIN)
    losses = brain.hparams.objective(out, **targets)
    summed = torch.autograd.grad(
        sum(losses.values()), model.ctc_lin.weight, retain_graph=True
    )[0]
    aggregator.backward(losses, model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    assert not torch.allclose(found["ctc_lin.weight"], summed, rtol=1e-2)


def test_an_aggregator_accumulates_and_scales():
    aggregator = aggregated("name: Sum")
    weight = torch.nn.Parameter(torch.ones(3))
    unused = torch.nn.Parameter(torch.ones(3))
    losses = {"st": weight.sum(), "asr": 2 * weight[0]}
    total = aggregator.total(losses, [weight, unused], scale=2.0**16)
    (total / 2).backward()
    assert total.item() == 5.0 and unused.grad is None
    assert weight.grad.tolist() == [1.5, 0.5, 0.5]


def test_an_aggregator_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="expected a GradientAggregator"):
        make_brain(aggregator="PCGrad")


def test_a_warm_up_trains_auxiliary_tasks_and_holds_the_encoder():
    weights = TaskNormWeights(interval=1000, warm_up=2)
    brain = make_brain(
        weights=weights, warm_up_frozen=["acoustic.encoder"], lr=0.1
    )
    brain.modules.model.source_embedding.requires_grad_(False)
    seen = [state(brain)]
    for epoch in (1, 2, 3):
        brain.fit([epoch], loader([0, 1]))
        seen.append(state(brain))
        tasks = {"asr", "mt"} if epoch < 3 else {"st", "asr", "mt"}
        assert set(brain.train_stats) == {"loss", *tasks}

    def moved(name):
        pairs = zip(seen, seen[1:])
        return [not torch.equal(one[name], two[name]) for one, two in pairs]

    conv = next(n for n in seen[0] if n.startswith("acoustic.encoder."))
    assert moved(conv) == [False, False, True]
    assert moved("ctc_lin.weight") == [True, True, True]
    assert moved("decoder.seq_lin.weight") == [True, True, True]
    # What was frozen before stays so.
    assert moved("source_embedding.weight") == [False, False, False]


def test_what_the_warm_up_holds_rests_at_once():
    seen = []

    class Watching(TranslationBrain):
        def compute_forward(self, batch, stage):
            encoder = self.modules.model.acoustic.encoder
            modes = {module.training for module in encoder.modules()}
            seen.append((modes, self.modules.model.ctc_lin.training))
            return super().compute_forward(batch, stage)

    brain = make_brain(
        Watching,
        weights=TaskNormWeights(interval=1000, warm_up=2),
        warm_up_frozen=["acoustic.encoder"],
    )
    brain.fit([1], loader([0], [1], [2], [3]))
    # As in a run that is resumed at any of these batches.
    assert seen == [({False}, True)] * 2 + [({True}, True)] * 2


def test_an_update_that_an_epoch_leaves_open_is_in_no_norm():
    found = []
    for epochs in ([1, 2], [2]):
        brain = make_brain(
            lr=0.0,
            weights=TaskNormWeights(interval=1, average=1, floor=0.0),
            run_opts={"grad_accumulation_factor": 2},
        )
        for epoch in epochs:
            brain.fit([epoch], loader([0], [1], [2]))
        found.append([h["norms"] for h in brain.hparams.task_weights.history])
    assert found[0] == found[1] * 2 != []


def test_a_warm_up_without_the_shrink():
    seen = []

    class Watching(TranslationBrain):
        def compute_objectives(self, predictions, batch, stage):
            segments = predictions.speech.segments
            seen.append((stage == sb.Stage.TRAIN, segments is not None))
            return super().compute_objectives(predictions, batch, stage)

    weights = TaskNormWeights(interval=1000, warm_up=2)
    brain = make_brain(
        Watching, weights=weights, warm_up_without=["shrink"], lr=0.1
    )
    before = state(brain)
    for epoch in (1, 2, 3):
        brain.fit([epoch], loader([0, 1]), loader([0, 1]))
        if epoch == 2:
            warm = state(brain)
    trained, shrunk = zip(*seen)
    assert trained == (True, False) * 3
    assert shrunk == (False, True, False, True, True, True)
    names = [n for n in before if n.startswith("looking_back.")]
    assert all(torch.equal(before[n], warm[n]) for n in names)
    after = state(brain)
    assert not all(torch.equal(warm[n], after[n]) for n in names)
    with pytest.raises(
        ValueError, match="'shrunk' cannot be left out; .*noise"
    ):
        make_brain(
            weights=TaskNormWeights(warm_up=2), warm_up_without=["shrunk"]
        ).fit([1], loader([0, 1]))


class OfKinds(TranslationBrain):
    """Utterance 0 is text, all others are speech without transcripts."""

    def tasks_of(self, batch, stage):
        active = super().tasks_of(batch, stage)
        kind = ("mt",) if batch.id[0] == "u0" else ("st",)
        return tuple(task for task in kind if task in active)


@pytest.mark.parametrize("factor", [1, 2])
def test_batches_of_the_main_task_alone_count_in_the_warm_up(factor):
    weights = TaskNormWeights(["mt"], interval=1000, warm_up=3)
    brain = make_brain(
        kind=OfKinds,
        weights=weights,
        run_opts={"grad_accumulation_factor": factor},
    )
    before = state(brain)
    brain.fit([1], loader([0], [1], [0], [2]))
    assert weights.updates == 4 // factor
    after = state(brain)
    # Text alone was learned from, until the fourth update.
    learned = not torch.equal(before["ctc_lin.weight"], after["ctc_lin.weight"])
    assert learned == (factor == 1)
    name = "decoder.seq_lin.weight"
    assert not torch.equal(before[name], after[name])
    text = make_brain(
        kind=OfKinds,
        weights=TaskNormWeights(["mt"], warm_up=99),
        run_opts={"grad_accumulation_factor": factor},
    )
    text.fit([1], loader([0], [1], [0], [2]))
    if factor == 2:
        assert same(after, state(text))


def test_an_aggregator_waits_for_the_warm_up():
    weights = TaskNormWeights(["mt"], interval=1000, warm_up=9)
    brain = make_brain(
        kind=OfKinds, weights=weights, aggregator=aggregated("name: Sum")
    )
    before = state(brain)
    brain.fit([1], loader([1], [2]))
    assert same(before, state(brain)) and weights.updates == 2
