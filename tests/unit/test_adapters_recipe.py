"""Adapters by one YAML block, in a Brain whose loop does not know of them."""

import copy
import logging

import numpy as np
import pytest
import speechbrain as sb
import torch
from adapters_toy import ToyEncoder, scramble
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.processing.features import InputNormalization

from speechbrain_taskarith.adapters import AudioAdapterFusion, insert_adapters

NAMES = ["us", "german"]
TASKS = {"us-*": "us", "de-*": "german"}


def utterances(number=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "id": f"{'us' if i % 2 else 'de'}-{i}",
            "spk_id": "us" if i % 2 else "german",
            "sig": torch.randn(4 + i, 4, generator=generator),
        }
        for i in range(number)
    ]


class Recipe(sb.Brain):
    """A recipe's Brain; its loop has no line about adapters."""

    def compute_forward(self, batch, stage):
        batch = batch.to(self.device)
        feats, lens = batch.sig
        feats = self.modules.normalize(feats.to(self.dtype), lens)
        return self.modules.ctc_lin(
            self.modules.Transformer(self.modules.CNN(feats))
        )

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()


def modules(dtype=torch.float32):
    torch.manual_seed(0)
    encoder = ToyEncoder()
    for layer in encoder.layers:
        layer.dropout.p = 0.0
    made = {
        "CNN": torch.nn.Linear(4, 4),
        "Transformer": encoder,
        "ctc_lin": torch.nn.Linear(8, 3),
        "normalize": InputNormalization(update_until_epoch=100),
    }
    made["normalize"](torch.randn(2, 30, 4), torch.ones(2))
    for module in made.values():
        module.to(dtype)
    return made


def run(made, kind=Recipe, epochs=2, checkpointer=None, **options):
    """Train as a recipe does; return the Brain."""
    scaled = options.pop("scaled", False)
    brain = kind(
        made,
        lambda parameters: torch.optim.SGD(parameters, 0.05),
        run_opts={"device": "cpu", "noprogressbar": True, **options},
        checkpointer=checkpointer,
    )
    brain.dtype = next(made["Transformer"].parameters()).dtype
    if scaled:  # as in half precision on a GPU
        brain.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data = torch.utils.data.DataLoader(
        utterances(), batch_size=2, collate_fn=PaddedBatch
    )
    brain.fit(range(1, epochs + 1), data)
    return brain


def states(made):
    return {
        f"{name}.{key}": torch.as_tensor(value).clone()
        for name, module in made.items()
        for key, value in {
            **module.state_dict(),
            **(
                module._statistics_dict()
                if isinstance(module, InputNormalization)
                else {}
            ),
        }.items()
    }


def changed(before, after):
    return {n for n in after if not torch.equal(before[n], after[n])}


def inserted(made, combination="fusion", scrambled=True, **others):
    handle = insert_adapters(
        made["Transformer"],
        NAMES,
        bottleneck=4,
        combination=combination,
        **others,
    )
    if scrambled:
        scramble(handle, seed=3)
    return handle


@pytest.mark.parametrize("form", ["dict", "list", "model"])
def test_only_what_was_asked_for_trains(form):
    made = modules()
    freeze = {
        "dict": made,
        "list": [made["CNN"], made["ctc_lin"], made["normalize"]],
        "model": [torch.nn.ModuleList(made.values())],
    }[form]
    inserted(made, train="german", freeze=freeze)
    before = states(made)
    run(made)
    moved = changed(before, states(made))
    assert moved and all("adapter_german" in name for name in moved)


@pytest.mark.parametrize("mode", ["ST-A", "MT-A"])
def test_composition_by_name(mode):
    made = modules()
    inserted(made, train=mode, freeze=made, penalty=0.01)
    before = states(made)
    run(made)
    moved = changed(before, states(made))
    assert any("combination" in name for name in moved)
    assert any("bank" in name for name in moved) == (mode == "MT-A")
    assert all("task_adapters" in name for name in moved)


def test_several_names_are_routed_by_the_utterances_ids():
    made = modules()
    handle = inserted(made, train=NAMES, freeze=made, tasks=TASKS)
    before = states(made)
    seen = []
    made["Transformer"].layers[2].register_forward_hook(
        lambda *_: seen.append(handle.in_use.tolist())
    )
    run(made, epochs=1)
    assert seen == [[1, 0]] * 3  # german first, see `utterances`
    moved = changed(before, states(made))
    assert {n.split("adapter_")[1].split(".")[0] for n in moved} == {*NAMES}


@pytest.mark.parametrize("whole", [True, False])
def test_a_batch_without_its_first_layer_is_routed_as_well(whole):
    made = modules()
    handle = inserted(made, train=NAMES, freeze=made, tasks=TASKS)
    encoder, seen = made["Transformer"], []

    def without_first(x):
        x = encoder.front(x)
        for layer in encoder.layers[1:]:
            x, _ = layer(x)
        seen.append(handle.in_use.tolist())
        return x

    class Apart(Recipe):
        def compute_forward(self, batch, stage):
            return without_first(batch.sig.data)

    if whole:
        encoder.forward = without_first
    run(made, Recipe if whole else Apart, epochs=1)
    assert seen == [[1, 0]] * 3


def test_a_later_choice_is_not_routed():
    made = modules()
    handle = inserted(made, train=NAMES, freeze=made, tasks=TASKS)
    encoder, outputs = made["Transformer"], []
    encoder.register_forward_hook(lambda *args: outputs.append(args))
    brain = run(made, epochs=1)
    data = torch.utils.data.DataLoader(
        utterances(2), batch_size=2, collate_fn=PaddedBatch
    )
    routed = handle.in_use
    for choice in (None, "us", "combined"):
        with handle.use(choice):
            brain.evaluate(data, progressbar=False)
            _, (x,), output = outputs[-1]
            assert handle.in_use == choice
            with torch.no_grad():
                assert torch.equal(encoder(x), output)
    brain.evaluate(data, progressbar=False)
    assert torch.equal(handle.in_use, routed)
    handle.train_composition("ST-A")
    before = states(made)
    run(made, epochs=1)
    moved = changed(before, states(made))
    assert moved and all("combination" in name for name in moved)


def test_several_names_by_one_line_in_the_loop():
    made = modules()
    handle = inserted(made, train=NAMES, freeze=made)

    class Said(Recipe):
        def compute_forward(self, batch, stage):
            handle.tasks = batch.spk_id
            return super().compute_forward(batch, stage)

    run(made, Said)
    by_line = states(made)
    made = modules()
    inserted(made, train=NAMES, freeze=made, tasks="spk_id")
    before = states(made)
    run(made)
    assert changed(before, by_line) and not changed(by_line, states(made))
    # Nor are those of the last batch taken again.
    with pytest.raises(ValueError, match="utterances' tasks are not known"):
        handle.encoder(torch.randn(2, 5, 4))


# ------------------------------------------------- the log and its warnings


def records(caplog, level=logging.WARNING):
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelno == level and "speechbrain_taskarith" in r.name
    ]


def test_what_trains_is_said_at_insertion_and_when_training_begins(caplog):
    caplog.set_level(logging.INFO)
    made = modules()
    handle = inserted(made, train="us", freeze=made)
    count = handle.count_parameters()
    line = (
        f"us trains: {count['trained']:,} parameters, {count['share']:.2g} % "
        f"of the base's {count['base']:,}; frozen: the encoder (ToyEncoder), "
        "CNN, ctc_lin, normalize"
    )
    assert f"adapters: {line}" in caplog.text
    assert "training begins" not in caplog.text
    run(made)
    assert caplog.text.count(f"training begins: {line}") == 1
    assert records(caplog) == []


def test_what_trains_beside_the_adapters_is_named(caplog):
    made = modules()
    inserted(made, train="us", freeze=[made["normalize"]])
    run(made)
    (warning,) = records(caplog)
    assert "CNN (20), ctc_lin (27)" in warning
    assert "freeze: !ref <modules>" in warning


def test_adapters_that_do_nothing_are_a_warning(caplog):
    made = modules()
    inserted(made, freeze=[made["CNN"], made["normalize"]])
    run(made)
    warning = records(caplog)[0]
    assert "neither train nor are in use" in warning
    assert "train=...) with one of 'us', 'german', 'ST-A', 'MT-A'" in warning


def test_several_trained_and_none_in_use_is_a_warning(caplog):
    made = modules()
    inserted(made).train_extraction(NAMES)
    made["Transformer"].train()
    made["Transformer"](torch.randn(2, 5, 4))
    assert "none of the adapters that are to be trained" in caplog.text


def test_an_optimizer_without_the_adapters_is_a_warning(caplog):
    made = modules()
    inserted(made, train="us", freeze=[made["CNN"], made["normalize"]])

    class Alone(Recipe):
        def init_optimizers(self):
            self.optimizer = self.opt_class(self.modules.ctc_lin.parameters())
            self.optimizers_dict = {"opt": self.optimizer}

    run(made, Alone)
    tensors = len(made["Transformer"].task_adapters.trained_parameters())
    assert f"{tensors} of {tensors} trained tensors" in caplog.text


def test_evaluation_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    made = modules()
    inserted(made)
    made["Transformer"].eval()(torch.randn(2, 5, 4))
    assert "training begins" not in caplog.text and not records(caplog)


# ------------------------------------------- the loss's gradient, exactly


class Explicit(Recipe):
    """The same recipe with the lines that the YAML saves."""

    guide = 0.0

    def compute_objectives(self, predictions, batch, stage):
        loss = super().compute_objectives(predictions, batch, stage)
        handle = self.modules.Transformer.task_adapters
        loss = loss + 50 * handle.penalty()  # of 0.01
        if self.guide:
            tasks = [TASKS[f"{name[:2]}-*"] for name in batch.id]
            lens = batch.sig.lengths
            loss = loss + self.guide * handle.attention_loss(tasks, lens)
        return loss


class ExplicitlyGuided(Explicit):
    guide = 0.7


@pytest.mark.parametrize("left_out", [0, 1, 2])
@pytest.mark.parametrize("mode", ["ST-A", "MT-A"])
def test_penalty_and_guide_where_a_layer_is_left_out(mode, left_out):
    results = []
    for kind in (Recipe, ExplicitlyGuided):
        made = modules(torch.float64)
        encoder = made["Transformer"]
        less = [m for i, m in enumerate(encoder.layers) if i != left_out]

        def forward(x, encoder=encoder, less=less):
            x = encoder.front(x)
            for layer in less:
                x, _ = layer(x)
            return x

        encoder.forward = forward
        arguments = {"penalty": 0.5, "guide": 0.7} if kind is Recipe else {}
        handle = inserted(
            made,
            AudioAdapterFusion(guided=True),
            train=mode,
            freeze=made,
            tasks=TASKS,
            **arguments,
        )
        run(made, kind)
        results.append(list(handle.parameters()))
    close(*results)


@pytest.mark.parametrize("mode", ["ST-A", "MT-A"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_accumulation_factor": 3},
        {"max_grad_norm": 0.05},
        {"precision": "bf16"},
        {"scaled": True},
        {"scaled": True, "grad_accumulation_factor": 2, "max_grad_norm": 0.05},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("guide", [0.0, 0.7])
def test_penalty_and_guide_equal_the_explicit_sum(mode, options, guide):
    single = options.keys() & {"scaled", "precision"}
    dtype = torch.float32 if single else torch.float64
    found = []
    for explicit in (False, True):
        made = modules(dtype)
        given = {} if explicit else {"penalty": 0.5, "guide": guide}
        if guide and not explicit:
            given["tasks"] = TASKS
        inserted(
            made,
            AudioAdapterFusion(guided=bool(guide), ln_init="small"),
            train=mode,
            freeze=made,
            **given,
        )
        start = states(made)
        kind = ExplicitlyGuided if guide else Explicit
        run(made, kind if explicit else Recipe, epochs=3, **dict(options))
        found.append(states(made))
    near = {"atol": 1e-5, "rtol": 1e-4}
    if dtype == torch.float64:
        near = {"atol": 1e-12, "rtol": 1e-10}
    elif "precision" in options:  # the smallest difference may round away
        near = {"atol": 2e-3, "rtol": 2e-2}
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], **near, msg=name)
    # Neither is nothing: without them, training ends elsewhere.
    made = modules(dtype)
    inserted(
        made,
        AudioAdapterFusion(guided=bool(guide), ln_init="small"),
        train=mode,
        freeze=made,
    )
    run(made, epochs=3, **dict(options))
    name = "Transformer.task_adapters.layers.0.combination.value.weight"
    plain = states(made)[name]
    assert (plain - found[0][name]).norm() > 1e-3 * (plain - start[name]).norm()


class Own(Recipe):
    """A recipe with a training step of its own."""

    def fit_batch(self, batch):
        outputs = self.compute_forward(batch, sb.Stage.TRAIN)
        loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
        loss.backward()
        self.optimizers_step()
        return loss.detach()


@pytest.mark.parametrize(
    "options", [{"grad_accumulation_factor": 2}, {"scaled": True}], ids=str
)
def test_a_loss_whose_scale_is_not_known_is_refused(options):
    made = modules()
    inserted(made, train="ST-A", freeze=made, penalty=0.01)
    with pytest.raises(ValueError, match="Own has a fit_batch of its own"):
        run(made, Own, **options)


def test_a_step_of_its_own_without_a_scale():
    found = []
    for kind in (Own, Recipe):
        made = modules()
        inserted(made, train="ST-A", freeze=made, penalty=0.5)
        run(made, kind)
        found.append(states(made))
    assert not changed(*found)


def gradients(encoder, x, passes=1, explicit=False):
    """Return those of some passes' loss, with or without the penalty."""
    handle = encoder.task_adapters
    handle.zero_grad()
    encoder.train()
    loss = sum(encoder(x).square().mean() for _ in range(passes))
    if explicit:
        handle._route.watch.penalty = 0.0
        loss = loss + handle.penalty()
    loss.backward()
    handle._route.watch.penalty = 0.01
    return [p.grad.clone() for p in handle.trained_parameters()]


def close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_penalty_counts_once_a_backward_pass(passes, recompute):
    encoder = modules(torch.float64)["Transformer"]
    fusion = AudioAdapterFusion(recompute=recompute)
    handle = insert_adapters(
        encoder,
        NAMES,
        bottleneck=4,
        combination=fusion,
        train="ST-A",
        penalty=0.01,
    )
    scramble(handle, seed=3)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    ours = gradients(encoder, x, passes)
    close(ours, gradients(encoder, x, passes))
    close(ours, gradients(copy.deepcopy(encoder), x, passes))
    twin = copy.deepcopy(encoder)
    close(ours, gradients(twin, x, passes, explicit=True))
    # Another combination has it as well.
    handle.set_combination(fusion)
    handle.train_composition("ST-A")
    scramble(handle, seed=4)
    ours = gradients(encoder, x, passes)
    twin = copy.deepcopy(encoder)
    close(ours, gradients(twin, x, passes, explicit=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_penalty_with_gradient_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    encoder = modules(torch.float64)["Transformer"]
    handle = insert_adapters(
        encoder, NAMES, bottleneck=4, combination="fusion", train="ST-A"
    )
    scramble(handle, seed=3)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    expected = gradients(copy.deepcopy(encoder), x, explicit=True)
    handle._route.watch.penalty = 0.01
    hidden = encoder.front(x).requires_grad_()
    for layer in encoder.layers:
        hidden = checkpoint(layer, hidden, use_reentrant=reentrant)[0]
    hidden.square().mean().backward()
    close(expected, [p.grad for p in handle.trained_parameters()])


def test_guide_by_one_line_in_the_loop():
    """Without ids that tell the task, the loop says it."""
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    tasks, results = ["us", "german", "us"], []
    for explicit in (False, True):
        encoder = modules(torch.float64)["Transformer"]
        handle = insert_adapters(
            encoder,
            NAMES,
            bottleneck=4,
            combination=AudioAdapterFusion(guided=True),
            train="MT-A",
            guide=0.0 if explicit else 0.5,
        )
        scramble(handle, seed=3)
        encoder.train()
        if not explicit:
            handle.tasks = tasks
        loss = encoder(x).square().mean()
        if explicit:
            loss = loss + 0.5 * handle.attention_loss(tasks)
        loss.backward()
        results.append([p.grad for p in handle.trained_parameters()])
        assert handle.tasks is None
    close(*results)
    # Used up: a forgotten line is no silent repetition.
    handle._route.watch.guide = 0.5
    with pytest.raises(ValueError, match="adapters.tasks = batch.spk_id"):
        encoder(x)


def test_norms_are_matched_over_the_frames_of_the_brains_batch():
    made, seen = modules(), []
    fusion = AudioAdapterFusion(ln_init="match")
    handle = inserted(made, fusion, scrambled=False, train="ST-A")
    combination = handle.layers[0].combination
    scramble(handle.layers[0].bank)

    def before(combination, inputs):
        if combination.is_unmatched:
            seen.append(combination.combine(inputs[0]).detach())

    def after(combination, inputs, output):
        if len(seen) == 1:
            seen.extend(
                p.detach().clone() for p in combination.norm.parameters()
            )

    combination.register_forward_pre_hook(before)
    combination.register_forward_hook(after)
    run(made)
    o, gain, bias = (part.double() for part in seen)
    o = torch.cat([o[0, :4], o[1, :5]])  # the first two utterances
    z = torch.nn.functional.layer_norm(o, (8,))
    for channel in range(8):
        line = np.polyfit(z[:, channel], o[:, channel], 1)
        got = gain[channel], bias[channel]
        np.testing.assert_allclose(got, line, rtol=1e-4, atol=1e-5)


def test_guide_by_a_key_of_the_batch_and_by_ids():
    found = []
    for tasks in (TASKS, "spk_id"):
        made = modules()
        inserted(made, train="ST-A", freeze=made, guide=0.5, tasks=tasks)
        run(made)
        found.append(states(made))
    assert not changed(*found)


@pytest.mark.parametrize(
    "tasks, message",
    [
        ({"us-*": "us"}, "utterance 'de-0': no pattern of tasks fits"),
        ("accent", "the batch has no 'accent'"),
        (None, r"adapters.tasks = batch.spk_id"),
    ],
)
def test_unknown_tasks_are_refused(tasks, message):
    made = modules()
    inserted(made, train="ST-A", freeze=made, guide=0.5, tasks=tasks)
    with pytest.raises(ValueError, match=message):
        run(made)


# ------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"train": "french"}, "no adapter 'french'; there are 'us', 'german'"),
        ({"train": ["us", "x"]}, "no adapter 'x'"),
        ({"train": 3}, "train is 3, expected the name of a task"),
        ({"train": "ST-A", "combination": None}, "there is no combination"),
        ({"names": ["us", "ST-A"]}, "'ST-A' cannot be the name"),
        ({"penalty": -1}, "penalty is -1, expected a number >= 0"),
        ({"penalty": "0.01x"}, "penalty is '0.01x'"),
        ({"penalty": 0.01, "combination": "mean"}, "AdapterMean has none"),
        ({"penalty": 0.01, "combination": None}, "None has none"),
        ({"guide": 0.5, "combination": "mean"}, "has no attention to guide"),
        ({"guide": float("nan")}, "guide is nan"),
        ({"tasks": {"a*": "x"}}, "tasks: no adapter 'x'"),
        ({"tasks": ["us"]}, r"tasks is \['us'\], expected"),
        ({"guide": 0.5, "tasks": {"a*": None}}, "not among the combined"),
        ({"freeze": ["CNN"]}, "freeze: 'CNN' is a str"),
        ({"freeze": {"CNN": None}}, "freeze: 'CNN' is a NoneType"),
        ({"load": {"x": "x.safetensors"}}, "load: there is no adapter 'x'"),
        ({"load": 3}, "load is 3, expected {name: path}"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments, message):
    made = modules()
    head = made["ctc_lin"]
    before = states(made)
    flags = [p.requires_grad for m in made.values() for p in m.parameters()]
    given = {"names": NAMES, "combination": "fusion", "freeze": [head]}
    with pytest.raises(ValueError, match=message):
        insert_adapters(made["Transformer"], **{**given, **arguments})
    assert not changed(before, states(made))
    assert states(made).keys() == before.keys()
    assert flags == [
        p.requires_grad for m in made.values() for p in m.parameters()
    ]
    assert not any(
        m._forward_hooks for module in made.values() for m in module.modules()
    )
    assert not list(head.children())
    insert_adapters(made["Transformer"], NAMES)
