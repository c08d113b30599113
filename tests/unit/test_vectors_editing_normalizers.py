"""Normalisers, adapters and precision in a run that is edited."""

import pytest
import torch
from adapters_toy import ToyEncoder
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_taskarith.adapters import insert_adapters
from speechbrain_taskarith.vectors import (
    EditingCheckpointer,
    TaskArithmetic,
    save_state,
)

SCALE = 0.25


def frames(seed):
    generator = torch.Generator().manual_seed(seed)
    return seed + (seed + 1) * torch.randn(5, 40, 3, generator=generator)


def listen(normalizer, seed):
    """As in training: the statistics are counted, or not."""
    normalizer.train()
    return normalizer(frames(seed), torch.ones(5))


def statistics(source):
    """Return count, mean and deviation of a normaliser or a file of one."""
    if not isinstance(source, InputNormalization):
        source = torch.load(source, weights_only=True)
        values = [source[k] for k in ("count", "glob_mean", "glob_std")]
    else:
        values = [source.count, source.glob_mean, source.glob_std]
    return [torch.as_tensor(value).double() for value in values]


def same(one, other):
    pairs = list(zip(one, other))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def us(tmp_path):
    """A base with statistics; returns its folder and its normaliser."""
    torch.manual_seed(0)
    model, normalizer = torch.nn.Linear(3, 3), InputNormalization()
    listen(normalizer, 1)
    recoverables = {"model": model, "normalizer": normalizer}
    Checkpointer(tmp_path / "us", recoverables).save_checkpoint()
    return tmp_path / "us", normalizer


def make(folder, base, **arguments):
    recoverables = {
        "model": torch.nn.Linear(3, 3),
        "normalizer": InputNormalization(),
    }
    arguments = {"rule": TaskArithmetic(scale=SCALE), **arguments}
    checkpointer = EditingCheckpointer(
        folder, recoverables, base=base, **arguments
    )
    return checkpointer, recoverables["normalizer"]


def pooled(*seeds):
    normalizer = InputNormalization()
    for seed in seeds:
        listen(normalizer, seed)
    return statistics(normalizer)


def test_base_holds_them_still_in_training_too(tmp_path, us):
    base, before = us
    checkpointer, normalizer = make(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    before.eval()
    assert torch.equal(listen(normalizer, 4), before(frames(4), torch.ones(5)))
    saved = checkpointer.save_checkpoint()
    assert same(statistics(saved.path / "normalizer.ckpt"), statistics(before))
    # The run that goes on, and an evaluation.
    for weights in ("finetuned", "edited"):
        checkpointer, normalizer = make(tmp_path / "save", base)
        checkpointer.recover_if_possible(weights=weights)
        if weights == "finetuned":
            listen(normalizer, 5)
        assert same(statistics(normalizer), statistics(before))
    # Changed in spite of all: refused, not saved.
    checkpointer.recover_if_possible(weights="finetuned")
    normalizer.glob_mean += 1
    with pytest.raises(RuntimeError, match="normalizer.*pooled or scaled"):
        checkpointer.save_checkpoint()


def test_pooled_goes_on_counting(tmp_path, us):
    base, _ = us
    checkpointer, normalizer = make(
        tmp_path / "save", base, normalizers="pooled"
    )
    checkpointer.recover_if_possible(weights="finetuned")
    listen(normalizer, 4)
    saved = checkpointer.save_checkpoint()
    for found in (normalizer, saved.path / "normalizer.ckpt"):
        for one, other in zip(statistics(found), pooled(1, 4)):
            torch.testing.assert_close(one, other)


def test_scaled_obeys_the_law(tmp_path, us):
    """In every run that follows, and however often it is saved."""
    base, before = us
    start, seeds = statistics(before), [1]
    for seed in (4, 5):
        checkpointer, normalizer = make(
            tmp_path / "save", base, normalizers="scaled"
        )
        checkpointer.recover_if_possible(weights="finetuned")
        listen(normalizer, seed)
        seeds.append(seed)
        checkpointer.save_and_keep_only()
        for _ in range(2):
            found = checkpointer.recover_if_possible()
            tuned = statistics(found.path / "normalizer.finetuned.ckpt")
            for one, other in zip(tuned, pooled(*seeds)):
                torch.testing.assert_close(one, other)
            kept = statistics(found.path / "normalizer.ckpt")
            assert same(kept, statistics(normalizer))
            assert kept[0] == start[0]  # the count is the base's
            for i in (1, 2):
                torch.testing.assert_close(
                    kept[i], start[i] + SCALE * (tuned[i] - start[i])
                )
            checkpointer.save_and_keep_only()  # as recipes do when they test
    checkpointer, normalizer = make(
        tmp_path / "save", base, normalizers="scaled",
        rule=TaskArithmetic(scale=0.0),
    )  # fmt: skip
    checkpointer.recover_if_possible()
    assert same(statistics(normalizer), start)


def test_scaled_needs_one_scale_that_keeps_deviations_positive(tmp_path, us):
    base, _ = us
    with pytest.raises(ValueError, match="must be one number"):
        make(tmp_path / "save", base, normalizers="scaled", scale={"*": 0.5})
    with pytest.raises(ValueError, match="normalizers='both'"):
        make(tmp_path / "save", base, normalizers="both")
    checkpointer, normalizer = make(
        tmp_path / "save", base, normalizers="scaled", scale=-9.0
    )
    checkpointer.recover_if_possible(weights="finetuned")
    listen(normalizer, 4)
    with pytest.raises(ValueError, match="normalizer.*deviation negative"):
        checkpointer.save_checkpoint()
    assert not checkpointer.list_checkpoints()


@pytest.mark.parametrize("mode", ["base", "pooled", "scaled"])
@pytest.mark.parametrize("kind", ["file", "start"])
def test_a_base_without_statistics(tmp_path, mode, kind, caplog):
    base = "start"
    if kind == "file":
        base = save_state(torch.nn.Linear(3, 3), tmp_path / "base.ckpt")
    for seeds in ((4,), (4, 5)):  # begin, and go on
        checkpointer, normalizer = make(
            tmp_path / "save", base, normalizers=mode
        )
        checkpointer.recover_if_possible(weights="finetuned")
        assert "has no statistics" in caplog.text
        listen(normalizer, seeds[-1])
        saved = checkpointer.save_checkpoint()
        kept = statistics(saved.path / "normalizer.ckpt")
        for one, other in zip(kept, pooled(*seeds)):
            torch.testing.assert_close(one, other)


def test_a_start_with_statistics_is_held(tmp_path, us):
    _, before = us
    for _ in range(2):
        checkpointer, normalizer = make(tmp_path / "save", "start")
        normalizer._load_statistics_dict(before._statistics_dict())
        checkpointer.recover_if_possible(weights="finetuned")
        listen(normalizer, 4)
        assert same(statistics(normalizer), statistics(before))


# -- adapters ------------------------------------------------------------------


def test_adapters_in_an_edited_module_stay_as_trained(tmp_path):
    torch.manual_seed(0)
    base = save_state(ToyEncoder(), tmp_path / "base.ckpt")
    start = torch.load(base)
    names = {"task_adapters"}

    def begin():
        encoder = ToyEncoder()
        handle = insert_adapters(encoder, ["us"], bottleneck=4)
        checkpointer = EditingCheckpointer(
            tmp_path / "save", {"model": encoder}, base=base,
            rule=TaskArithmetic(scale=SCALE),
        )  # fmt: skip
        return encoder, handle, checkpointer

    encoder, handle, checkpointer = begin()
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    checkpointer.recover_if_possible(weights="finetuned")
    for name, tensor in encoder.state_dict().items():
        adapter = bool(names & set(name.split(".")))
        expected = before[name] if adapter else start[name]
        assert torch.equal(tensor, expected), name
    handle.use("us")
    encoder.requires_grad_(True)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        encoder(torch.randn(2, 5, 4)).square().mean().backward()
        optimizer.step()
    trained = {n: t.clone() for n, t in encoder.state_dict().items()}
    checkpointer.save_checkpoint()
    encoder, _, checkpointer = begin()
    for _ in range(2):
        found = checkpointer.recover_if_possible()
        for name, tensor in encoder.state_dict().items():
            if names & set(name.split(".")):
                assert torch.equal(tensor, trained[name]), name
            elif "statistics" in name and name.split(".")[-1] not in (
                "weight",
                "bias",
            ):
                assert torch.equal(tensor, start[name]), name
            else:
                torch.testing.assert_close(
                    tensor,
                    start[name] + SCALE * (trained[name] - start[name]),
                )
        tuned = torch.load(found.path / "model.finetuned.ckpt")
        assert all(torch.equal(tuned[n], trained[n]) for n in trained)
        checkpointer.save_and_keep_only()


def test_a_base_of_another_kind_of_adapter_is_refused_at_the_start(tmp_path):
    base = save_state(ToyEncoder(), tmp_path / "base.ckpt")
    encoder = torch.nn.ModuleDict({"lora": torch.nn.Linear(2, 2)})
    encoder.update(ToyEncoder().named_children())
    checkpointer = EditingCheckpointer(
        tmp_path / "save", {"model": encoder}, base=base, rule=TaskArithmetic()
    )
    with pytest.raises(ValueError, match="lora.weight: not in the file"):
        checkpointer.recover_if_possible(weights="finetuned")
