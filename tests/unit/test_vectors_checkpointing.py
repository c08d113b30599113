"""Editing by a recipe's YAML alone, with real SpeechBrain objects.

The recipe below is written as upstream's are; the tests change its YAML, never
its code.
"""

import os
import shutil

import numpy as np
import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.checkpoints import (
    Checkpointer,
    average_checkpoints,
)
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_taskarith.utils.hub.cards import read_card
from speechbrain_taskarith.vectors import (
    TIES,
    EditingCheckpointer,
    TaskArithmetic,
    TaskVector,
    TaskVectorPretrainer,
    as_state,
    find_checkpoint_folder,
    open_state,
    save_checkpoint,
    save_state,
)

# -- a recipe, as upstream writes them ---------------------------------------

YAML = """
seed: 7
__set_seed: !apply:speechbrain.utils.seed_everything [!ref <seed>]
output_folder: !PLACEHOLDER
save_folder: !ref <output_folder>/save
number_of_epochs: 2
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
epoch_counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: !ref <number_of_epochs>
encoder: !new:torch.nn.Linear
    in_features: 3
    out_features: 4
output: !new:torch.nn.Linear
    in_features: 4
    out_features: 1
modules:
    encoder: !ref <encoder>
    output: !ref <output>
    normalize: !ref <normalize>
model: !new:torch.nn.ModuleList
    - [!ref <encoder>, !ref <output>]
opt_class: !name:torch.optim.Adam
    lr: 0.05
"""

PLAIN = """
checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: !ref <save_folder>
    recoverables:
        model: !ref <model>
        normalizer: !ref <normalize>
        counter: !ref <epoch_counter>
"""

EDITING = """
base: !PLACEHOLDER
checkpointer: !new:speechbrain_taskarith.vectors.EditingCheckpointer
    checkpoints_dir: !ref <save_folder>
    recoverables:
        model: !ref <model>
        normalizer: !ref <normalize>
        counter: !ref <epoch_counter>
    edited: model
    base: !ref <base>
    rule: !new:speechbrain_taskarith.vectors.TIES {density: 0.5, scale: 0.6}
"""


class Regression(sb.Brain):
    """Stands for an ASR Brain; the hooks are those that recipes write."""

    def compute_forward(self, batch, stage):
        x, _ = batch
        x = self.modules.normalize(x, epoch=self.hparams.epoch_counter.current)
        return self.modules.output(torch.tanh(self.modules.encoder(x)))

    def compute_objectives(self, predictions, batch, stage):
        return (predictions.squeeze(-1) - batch[1]).square().mean()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.VALID:
            self.checkpointer.save_and_keep_only(
                meta={"WER": float(stage_loss)}, min_keys=["WER"]
            )
        if stage == sb.Stage.TEST:
            self.test_loss = float(stage_loss)


class Killed(Exception):
    pass


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 8, 5, 3, generator=generator) + 2
    batches = [(batch, batch.sum(-1) * 0.3 + seed) for batch in x]
    return torch.utils.data.DataLoader(batches, batch_size=None)


def recipe(yaml, folder, seed, kill_after=None, **overrides):
    """A train.py: build from YAML, fit, evaluate."""
    hparams = load_hyperpyyaml(
        yaml, {"output_folder": str(folder), **overrides}
    )
    brain = Regression(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts={"device": "cpu", "noprogressbar": True},
        checkpointer=hparams["checkpointer"],
    )
    if "pretrainer" in hparams:
        hparams["pretrainer"].collect_files()
        hparams["pretrainer"].load_collected()
    if kill_after is not None:
        steps = iter(range(kill_after))

        def die(*_, **__):
            if next(steps, None) is None:
                raise Killed

        brain.on_fit_batch_end = die
    brain.fit(hparams["epoch_counter"], data(seed), data(seed + 100))
    brain.fitted = as_copy(hparams["model"])
    brain.evaluate(data(seed + 200), min_key="WER")
    return brain


def as_copy(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def listed(folder):
    """Return what a folder holds besides the lock."""
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def assert_same(one, other):
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def us(tmp_path_factory):
    """The base model, trained by the recipe as it is."""
    folder = tmp_path_factory.mktemp("us")
    recipe(YAML + PLAIN, folder, seed=0)
    return folder / "save"


# -- EditingCheckpointer -------------------------------------------------------


def test_the_yaml_alone_adds_editing(us, tmp_path):
    brain = recipe(YAML + EDITING, tmp_path, seed=1, base=str(us))
    base = open_state(us)
    folder = find_checkpoint_folder(tmp_path / "save", min_key="WER")
    finetuned = open_state(folder / "model.finetuned.ckpt")
    tau = TaskVector.between(base, finetuned)
    expected = TIES(density=0.5, scale=0.6)(base, [tau])
    # What is kept ...
    assert_same(dict(open_state(folder / "model.ckpt")), expected)
    # ... and what is evaluated is the edited model.
    assert_same(brain.hparams.model.state_dict(), expected)
    assert not torch.equal(expected["0.weight"], base["0.weight"])
    assert not torch.equal(expected["0.weight"], finetuned["0.weight"])


def test_fine_tuning_starts_from_the_base_and_runs_unedited(us, tmp_path):
    """One epoch by hand from the base gives the fine-tuned weights."""
    recipe(YAML + EDITING, tmp_path, 1, base=str(us), number_of_epochs=1)
    [kept] = (tmp_path / "save").rglob("model.finetuned.ckpt")
    base = find_checkpoint_folder(us)
    hparams = load_hyperpyyaml(
        YAML + PLAIN, {"output_folder": str(tmp_path / "hand")}
    )
    model, normalize = hparams["model"], hparams["normalize"]
    model.load_state_dict(dict(open_state(base)))
    normalize._load(base / "normalizer.ckpt")
    optimizer = torch.optim.Adam(
        [*hparams["encoder"].parameters(), *hparams["output"].parameters()],
        lr=0.05,
    )
    normalize.eval()  # its statistics stay the base's
    for x, y in data(1):
        hidden = torch.tanh(hparams["encoder"](normalize(x, epoch=1)))
        loss = (hparams["output"](hidden).squeeze(-1) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [*hparams["encoder"].parameters(),
             *hparams["output"].parameters()], 5.0,
        )  # fmt: skip
        optimizer.step()
    for name, tensor in open_state(kept).items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


@pytest.mark.parametrize("kill_after", [1, 6])
def test_a_killed_run_resumed_equals_one_that_was_not(us, tmp_path, kill_after):
    whole = recipe(YAML + EDITING, tmp_path / "whole", 1, base=str(us))
    with pytest.raises(Killed):
        recipe(YAML + EDITING, tmp_path / "killed", 1, kill_after, base=str(us))
    resumed = recipe(YAML + EDITING, tmp_path / "killed", 1, base=str(us))
    assert_same(whole.fitted, resumed.fitted)
    assert_same(as_copy(whole.hparams.model), as_copy(resumed.hparams.model))
    assert whole.test_loss == resumed.test_loss


def test_evaluation_alone_and_other_settings_afterwards(us, tmp_path):
    trained = recipe(YAML + EDITING, tmp_path, seed=1, base=str(us))
    edited = as_copy(trained.hparams.model)

    def evaluate(yaml):
        hparams = load_hyperpyyaml(
            yaml, {"output_folder": str(tmp_path), "base": str(us)}
        )
        brain = Regression(
            modules=hparams["modules"],
            hparams=hparams,
            run_opts={"device": "cpu", "noprogressbar": True},
            checkpointer=hparams["checkpointer"],
        )
        brain.evaluate(data(201), min_key="WER")
        return as_copy(hparams["model"])

    assert_same(evaluate(YAML + EDITING), edited)
    # Another scale in the YAML: the edit is made anew, nothing is trained.
    other = evaluate((YAML + EDITING).replace("scale: 0.6", "scale: 0.0"))
    assert_same(other, dict(open_state(us)))


def test_stock_tools_see_the_edited_model(us, tmp_path):
    brain = recipe(YAML + EDITING, tmp_path, seed=1, base=str(us))
    edited = as_copy(brain.hparams.model)
    hparams = load_hyperpyyaml(YAML + PLAIN, {"output_folder": str(tmp_path)})
    stock = hparams["checkpointer"]
    found = stock.recover_if_possible(min_key="WER")
    assert_same(as_copy(hparams["model"]), edited)
    assert found.meta["taskarith"]["editing"]["model"]["rule"]["scale"] == 0.6
    assert_same(average_checkpoints([found], "model"), edited)
    model = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)])
    pretrainer = Pretrainer(
        loadables={"model": model},
        paths={"model": str(found.path / "model.ckpt")},
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    assert_same(as_copy(model), edited)
    card = read_card(found.path)
    assert card["rule"]["rule"] == "TIES"


def make_checkpointer(folder, base, **arguments):
    model = torch.nn.Linear(2, 2)
    arguments = {"rule": TaskArithmetic(scale=0.5), **arguments}
    return model, EditingCheckpointer(
        folder, {"model": model}, edited="model", base=base, **arguments
    )


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    return save_state(model.state_dict(), tmp_path / "base.ckpt")


def test_editing_twice_does_not_happen(tmp_path, base):
    """Fit, save, fit again, save: always base + 0.5 (raw - base)."""
    model, checkpointer = make_checkpointer(tmp_path / "save", base)
    start = open_state(base)["weight"].clone()
    for round_ in range(3):
        checkpointer.add_recoverable(
            "optimizer", torch.optim.SGD(model.parameters(), lr=0.1)
        )
        checkpointer.recover_if_possible()
        torch.testing.assert_close(model.weight.detach(), start + round_)
        with torch.no_grad():
            model.weight.add_(1)
        checkpointer.save_and_keep_only()
        checkpointer.recover_if_possible()
        torch.testing.assert_close(
            model.weight.detach(), start + 0.5 * (round_ + 1)
        )


def test_weights_can_be_asked_for(tmp_path, base):
    model, checkpointer = make_checkpointer(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")  # the base
    start = model.weight.detach().clone()
    assert torch.equal(start, open_state(base)["weight"])
    with torch.no_grad():
        model.weight.add_(2)
    checkpointer.save_checkpoint()
    checkpointer.recover_if_possible()
    torch.testing.assert_close(model.weight.detach(), start + 1)
    checkpointer.recover_if_possible(weights="finetuned")
    torch.testing.assert_close(model.weight.detach(), start + 2)
    with pytest.raises(ValueError, match="weights='raw'"):
        checkpointer.recover_if_possible(weights="raw")


def test_meta_is_made_plain_and_listing_goes_on_working(tmp_path, base):
    _, checkpointer = make_checkpointer(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    checkpointer.save_checkpoint(
        meta={
            "WER": np.float32(4.5),
            "loss": torch.tensor(1.25),
            "shape": (1, 2),
            "n": np.int64(3),
        }
    )
    [found] = Checkpointer(tmp_path / "save").list_checkpoints()
    assert found.meta["WER"] == 4.5 and found.meta["loss"] == 1.25
    assert found.meta["shape"] == [1, 2] and found.meta["n"] == 3
    with pytest.raises(ValueError, match="meta.model"):
        checkpointer.save_checkpoint(meta={"model": torch.nn.Linear(1, 1)})
    assert len(checkpointer.list_checkpoints()) == 1


def test_a_failing_save_leaves_no_checkpoint(tmp_path, base):
    model, checkpointer = make_checkpointer(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    checkpointer.save_checkpoint()

    class Unsavable:
        pass

    checkpointer.add_recoverable("odd", Unsavable())
    with pytest.raises(RuntimeError, match="Don't know how to save"):
        checkpointer.save_checkpoint()
    del checkpointer.recoverables["odd"]
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="weight"):
        checkpointer.save_checkpoint()
    assert len(checkpointer.list_checkpoints()) == 1
    assert len(listed(tmp_path / "save")) == 1


def test_half_deleted_checkpoints_do_not_count(tmp_path, base):
    _, checkpointer = make_checkpointer(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    checkpointer.save_checkpoint(name="one")
    checkpointer.save_checkpoint(name="two")
    # As rmtree leaves it when killed after its first file.
    (tmp_path / "save" / "CKPT+two" / "model.ckpt").unlink()
    (tmp_path / "save" / ".partial-1-CKPT+three").mkdir()
    assert [c.path.name for c in checkpointer.list_checkpoints()] == [
        "CKPT+one"
    ]
    # The next run that saves sweeps them away.
    _, again = make_checkpointer(tmp_path / "save", base)
    again.recover_if_possible(weights="finetuned")
    again.save_checkpoint(name="four")
    assert listed(tmp_path / "save") == ["CKPT+four", "CKPT+one"]


def test_a_named_checkpoint_can_be_saved_again(tmp_path, base):
    model, checkpointer = make_checkpointer(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    checkpointer.save_checkpoint(name="best")
    with torch.no_grad():
        model.weight.add_(1)
    saved = checkpointer.save_checkpoint(name="best", meta={"WER": 1.0})
    assert saved.path == tmp_path / "save" / "CKPT+best"
    assert listed(tmp_path / "save") == ["CKPT+best"]
    checkpointer.recover_if_possible(weights="finetuned")
    torch.testing.assert_close(
        model.weight.detach(), open_state(base)["weight"] + 1
    )


def test_another_base_is_refused_on_resuming(tmp_path, base):
    _, checkpointer = make_checkpointer(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    checkpointer.save_checkpoint()
    save_state(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.ckpt")
    _, other = make_checkpointer(tmp_path / "save", tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="other.ckpt"):
        other.recover_if_possible(weights="finetuned")


def test_evaluation_needs_no_base(tmp_path, base):
    model, checkpointer = make_checkpointer(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    with torch.no_grad():
        model.weight.add_(1)
    checkpointer.save_checkpoint()
    expected = open_state(base)["weight"] + 0.5
    os.unlink(base)
    model, moved = make_checkpointer(tmp_path / "save", base)
    moved.recover_if_possible()
    torch.testing.assert_close(model.weight.detach(), expected)
    with pytest.raises(FileNotFoundError, match="base.ckpt"):
        moved.recover_if_possible(weights="finetuned")


def test_checkpoints_from_before_the_editing_are_edited_on_loading(
    tmp_path, base
):
    trained = torch.nn.Linear(2, 2)
    Checkpointer(tmp_path / "save", {"model": trained}).save_checkpoint()
    model, checkpointer = make_checkpointer(tmp_path / "save", base)
    checkpointer.recover_if_possible()
    start = open_state(base)["weight"]
    torch.testing.assert_close(
        model.weight.detach(), start + 0.5 * (trained.weight.detach() - start)
    )
    checkpointer.recover_if_possible(weights="finetuned")
    assert torch.equal(model.weight, trained.weight)


def test_a_base_that_does_not_fit_or_is_not_there(tmp_path, base):
    save_state(torch.nn.Linear(3, 2).state_dict(), tmp_path / "wide.ckpt")
    _, checkpointer = make_checkpointer(tmp_path / "s", tmp_path / "wide.ckpt")
    with pytest.raises(ValueError, match="wide.ckpt"):
        checkpointer.recover_if_possible(weights="finetuned")
    _, checkpointer = make_checkpointer(tmp_path / "s", tmp_path / "no.ckpt")
    with pytest.raises(FileNotFoundError, match="no.ckpt"):
        checkpointer.recover_if_possible(weights="finetuned")


def test_what_cannot_be_edited_is_refused(tmp_path, base):
    normalizer = sb.processing.features.InputNormalization()
    with pytest.raises(ValueError, match="plain state dict"):
        EditingCheckpointer(
            tmp_path / "s",
            {"model": normalizer},
            base=base,
            rule=TaskArithmetic(),
        )
    with pytest.raises(ValueError, match="custom hooks"):
        EditingCheckpointer(
            tmp_path / "s",
            {"model": torch.nn.Linear(2, 2)},
            base=base,
            rule=TaskArithmetic(),
            custom_save_hooks={"model": lambda obj, path: None},
        )


def test_several_recoverables_and_patterns(tmp_path):
    torch.manual_seed(0)
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    stock = Checkpointer(tmp_path / "us", {"enc": one, "dec": two})
    stock.save_checkpoint(meta={"WER": 3.0}, name="best")
    with torch.no_grad():
        one.weight.add_(100)
    stock.save_checkpoint(meta={"WER": 9.0}, name="last")
    checkpointer = EditingCheckpointer(
        tmp_path / "save",
        {"enc": one, "dec": two},
        edited=["enc", "dec"],
        base=tmp_path / "us",
        base_min_key="WER",
        rule=TaskArithmetic(),
        scale=0.25,
        exclude="bias",
    )
    checkpointer.recover_if_possible(weights="finetuned")
    start = as_copy(one)
    assert start["weight"].abs().max() < 50  # the best, not the last
    with torch.no_grad():
        for module in (one, two):
            for parameter in module.parameters():
                parameter.add_(4)
    checkpointer.save_checkpoint()
    checkpointer.recover_if_possible()
    torch.testing.assert_close(one.weight.detach(), start["weight"] + 1)
    assert torch.equal(one.bias, start["bias"])


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_recoverable_recovers(tmp_path, wrap):
    model = torch.nn.Linear(3, 4)
    checkpointer = EditingCheckpointer(
        tmp_path / "save",
        {"model": wrap(model)},
        edited="model",
        base=save_state(as_copy(model), tmp_path / "start.ckpt"),
        rule=TaskArithmetic(0.5),
    )
    checkpointer.recover_if_possible(weights="finetuned")
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    checkpointer.save_and_keep_only(meta={"WER": 1.0})
    for weights, expected in (("edited", 0.5), ("finetuned", 1)):
        torch.nn.init.zeros_(model.weight)
        checkpointer.recover_if_possible(weights=weights)
        torch.testing.assert_close(model.weight.detach(), start + expected)


def _distributed(rank, folder, base, port):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
        LOCAL_RANK=str(rank), WORLD_SIZE="2",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, checkpointer = make_checkpointer(folder, base)
    checkpointer.add_recoverable(
        "optimizer", torch.optim.SGD(model.parameters(), lr=0.1)
    )
    checkpointer.recover_if_possible()
    with torch.no_grad():
        model.weight.add_(1)
    checkpointer.save_and_keep_only(meta={"WER": 1.0})
    found = checkpointer.recover_if_possible(min_key="WER")
    expected = open_state(base)["weight"] + 0.5
    torch.testing.assert_close(model.weight.detach(), expected)
    assert found.path.name.startswith("CKPT+")
    torch.distributed.destroy_process_group()


def test_two_processes_save_once_and_both_load(tmp_path, base):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _distributed,
        (str(tmp_path / "save"), str(base), port),
        nprocs=2,
        start_method="fork",
    )
    assert len(listed(tmp_path / "save")) == 1


# -- TaskVectorPretrainer ------------------------------------------------------


def test_a_recipe_starts_from_a_merged_model_by_its_yaml(us, tmp_path):
    base = open_state(us)
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = {n: t + torch.randn_like(t) for n, t in base.items()}
        tau = TaskVector.between(base, other)
        paths.append(str(tau.save(tmp_path / f"{seed}.safetensors")))
    yaml = (
        YAML
        + PLAIN
        + f"""
pretrainer: !new:speechbrain_taskarith.vectors.TaskVectorPretrainer
    collect_in: !ref <output_folder>/collected
    loadables: {{model: !ref <model>, normalizer: !ref <normalize>}}
    paths: {{model: {us}, normalizer: {us}}}
    vectors: {{model: [{paths[0]}, {paths[1]}]}}
    rule: !new:speechbrain_taskarith.vectors.TaskArithmetic {{scale: 0.2}}
"""
    )
    (tmp_path / "run").mkdir()
    brain = recipe(yaml, tmp_path / "run", 1, number_of_epochs=0)
    expected = TaskArithmetic(scale=0.2)(
        base, [TaskVector.load(path) for path in paths]
    )
    assert_same(as_copy(brain.hparams.model), expected)


def vector_for(base, path, add=1.0):
    state = open_state(base)
    tau = TaskVector.between(state, {k: v + add for k, v in state.items()})
    return tau.save(path)


def test_pretrainer_checks_ancestry(tmp_path, base):
    other = save_state(
        torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.ckpt"
    )
    vector = vector_for(base, tmp_path / "tau.safetensors")
    model = torch.nn.Linear(2, 2)
    before = as_copy(model)

    def load(**arguments):
        pretrainer = TaskVectorPretrainer(
            loadables={"model": model},
            paths={"model": str(other)},
            vectors={"model": str(vector)},
            **arguments,
        )
        pretrainer.collect_files()
        pretrainer.load_collected()

    with pytest.raises(ValueError, match="tau.safetensors.*another base"):
        load()
    assert_same(as_copy(model), before)
    load(any_base=True, scale=0.5)
    torch.testing.assert_close(
        model.weight.detach(), open_state(other)["weight"] + 0.5
    )


def test_pretrainer_is_strict_and_loads_all_or_nothing(tmp_path, base):
    good, bad = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)
    before = as_copy(good)
    pretrainer = TaskVectorPretrainer(
        loadables={"good": good, "bad": bad},
        paths={"good": str(base), "bad": str(base)},
        vectors={"good": [str(vector_for(base, tmp_path / "tau.safetensors"))]},
    )
    pretrainer.collect_files()
    with pytest.raises(ValueError, match="bias: not in bad"):
        pretrainer.load_collected()
    assert_same(as_copy(good), before)
    wide = torch.nn.Linear(3, 2)
    pretrainer = TaskVectorPretrainer(
        loadables={"wide": wide}, paths={"wide": str(base)}
    )
    pretrainer.collect_files()
    with pytest.raises(ValueError, match="weight.*in the file"):
        pretrainer.load_collected()


def test_pretrainer_collects_from_default_source_and_other_formats(
    us, tmp_path
):
    model = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)])
    normalizer = sb.processing.features.InputNormalization()
    pretrainer = TaskVectorPretrainer(
        loadables={"model": model, "normalizer": normalizer}
    )
    pretrainer.collect_files(default_source=str(us))
    pretrainer.load_collected()
    assert_same(as_copy(model), dict(open_state(us)))
    assert int(normalizer.count) > 0
    path = save_state(open_state(us), tmp_path / "us.safetensors")
    again = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)])
    pretrainer = TaskVectorPretrainer(
        collect_in=tmp_path / "collected",
        loadables={"model": again},
        paths={"model": str(path)},
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    assert_same(as_copy(again), as_copy(model))


def test_pretrainer_bad_arguments(tmp_path, base):
    with pytest.raises(ValueError, match="no loadables called"):
        TaskVectorPretrainer(
            loadables={"model": torch.nn.Linear(2, 2)},
            vectors={"nomodel": "x.safetensors"},
        )
    vector = str(vector_for(base, tmp_path / "tau.safetensors"))
    pretrainer = TaskVectorPretrainer(
        loadables={"model": torch.nn.Linear(2, 2)},
        paths={"model": str(base)},
        vectors={"model": [vector, vector]},
    )
    pretrainer.collect_files()
    with pytest.raises(ValueError, match="which rule|by which rule"):
        pretrainer.load_collected()


# -- checkpoint folders --------------------------------------------------------


def full_checkpoint(folder, seed, shift=0.0):
    """A checkpoint with all that a recipe's has; returns its objects."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    normalizer = sb.processing.features.InputNormalization()
    normalizer.train()
    features = torch.randn(4, 6, 3) + shift
    normalizer(features, torch.ones(4))
    counter = sb.utils.epoch_loop.EpochCounter(5)
    counter.current = 3
    recoverables = {
        "model": model,
        "optimizer": optimizer,
        "normalizer": normalizer,
        "counter": counter,
    }
    saved = Checkpointer(folder, recoverables).save_checkpoint(
        meta={"WER": 12.0}
    )
    return saved.path, recoverables, features


def fresh():
    return {
        "model": torch.nn.Linear(3, 2),
        "normalizer": sb.processing.features.InputNormalization(),
        "counter": sb.utils.epoch_loop.EpochCounter(5),
    }


def test_a_folder_of_ours_is_found_and_loaded(tmp_path):
    source, parts, _ = full_checkpoint(tmp_path / "base", 0)
    edited = {k: v + 1 for k, v in parts["model"].state_dict().items()}
    path = save_checkpoint(
        {"model": edited},
        tmp_path / "out" / "CKPT+merged",
        like=tmp_path / "base",
        meta={"WER": 4.0},
        metadata={"rule": "TIES", "parents": ("a", "b")},
    )
    assert sorted(p.name for p in path.iterdir()) == [
        "CKPT.yaml", "counter.ckpt", "model.ckpt", "normalizer.ckpt",
    ]  # fmt: skip
    new = fresh()
    found = Checkpointer(tmp_path / "out", new).recover_if_possible(
        min_key="WER"
    )
    assert found.path == path
    assert found.meta["taskarith"]["parents"] == ["a", "b"]
    assert found.meta["taskarith"]["policy"] == {
        "model": "edit", "normalizer": "copy", "counter": "copy",
        "optimizer": "drop",
    }  # fmt: skip
    assert_same(as_copy(new["model"]), edited)
    assert torch.equal(
        new["normalizer"].glob_mean, parts["normalizer"].glob_mean
    )
    assert new["counter"].current == parts["counter"].current
    assert open_state(path).fingerprint == as_state(edited).fingerprint


def test_normalisers_are_pooled_by_count(tmp_path):
    one, parts, first = full_checkpoint(tmp_path / "one", 0)
    two, _, second = full_checkpoint(tmp_path / "two", 1, shift=5.0)
    save_checkpoint(
        {"model": parts["model"]},
        tmp_path / "out" / "CKPT+merged",
        like=one,
        pool=[two],
        policy={"normalizer": "pool", "counter": "drop"},
    )
    normalizer = sb.processing.features.InputNormalization()
    Checkpointer(
        tmp_path / "out",
        {"model": torch.nn.Linear(3, 2), "normalizer": normalizer},
    ).recover_if_possible()
    everything = torch.cat([first, second]).double().reshape(-1, 3)
    assert int(normalizer.count) == len(everything)
    torch.testing.assert_close(
        normalizer.glob_mean.double(), everything.mean(0), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(
        normalizer.glob_std.double(),
        everything.std(0, unbiased=False),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"policy": {"nomodel*": "copy"}}, ValueError, "nomodel"),
        ({"policy": {"counter": "average"}}, ValueError, "average"),
        ({"policy": {"normalizer": "pool"}}, ValueError, "pool="),
        (
            {"policy": {"counter": "pool"}, "pool": ["SELF"]},
            ValueError,
            "counter.ckpt",
        ),
        ({"meta": {"model": object()}}, ValueError, "meta.model"),
    ],
)
def test_bad_policies_write_nothing(tmp_path, arguments, error, match):
    source, parts, _ = full_checkpoint(tmp_path / "base", 0)
    if arguments.get("pool"):
        arguments = {**arguments, "pool": [source]}
    with pytest.raises(error, match=match):
        save_checkpoint(
            {"model": parts["model"]},
            tmp_path / "out" / "CKPT+x",
            like=source,
            **arguments,
        )
    assert not list((tmp_path).glob("out/*"))


def test_states_must_fit_and_names_must_be_found(tmp_path):
    source, parts, _ = full_checkpoint(tmp_path / "base", 0)
    target = tmp_path / "out" / "CKPT+x"
    with pytest.raises(ValueError, match="bias"):
        save_checkpoint(
            {"model": {"weight": torch.ones(2, 3)}}, target, like=source
        )
    with pytest.raises(ValueError, match="weight"):
        whole = {n: t.long() for n, t in parts["model"].state_dict().items()}
        save_checkpoint({"model": whole}, target, like=source)
    with pytest.raises(FileNotFoundError, match="whisper"):
        save_checkpoint({"whisper": parts["model"]}, target, like=source)
    with pytest.raises(ValueError, match="CKPT"):
        save_checkpoint({"model": parts["model"]}, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no whole"):
        find_checkpoint_folder(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="CER"):
        find_checkpoint_folder(tmp_path / "base", min_key="CER")
    shutil.rmtree(tmp_path / "base")
