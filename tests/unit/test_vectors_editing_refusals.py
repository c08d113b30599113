"""What `EditingCheckpointer` refuses, by name and with nothing changed."""

import copy
import gc
import hashlib
import os
import pickle
import weakref

import pytest
import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.utils.checkpoints import Checkpointer, average_checkpoints

from speechbrain_taskarith.vectors import (
    DARE,
    SLERP,
    TIES,
    ByLayer,
    EditingCheckpointer,
    LiNeS,
    ModelStock,
    TaskArithmetic,
    open_state,
    save_state,
)


def tree(folder):
    """Return a hash of every file below a folder, but the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def weights(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    return save_state(torch.nn.Linear(2, 2), tmp_path / "base.ckpt")


def make(folder, base, model=None, **arguments):
    model = torch.nn.Linear(2, 2) if model is None else model
    arguments = {"rule": TaskArithmetic(scale=0.5), **arguments}
    return model, EditingCheckpointer(
        folder, {"model": model}, base=base, **arguments
    )


def train(model, optimizer=None):
    """One step of an optimizer that no checkpointer knows."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def trained(folder, base, **arguments):
    model, checkpointer = make(folder, base, **arguments)
    checkpointer.recover_if_possible(weights="finetuned")
    train(model)
    checkpointer.save_checkpoint(meta={"WER": 1.0})
    return model, checkpointer


# -- optimizers ----------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
)
def test_edited_weights_are_not_trained(tmp_path, base, build):
    model, checkpointer = trained(tmp_path / "save", base)
    checkpointer.recover_if_possible(min_key="WER")
    before, files = weights(model), tree(tmp_path)
    with pytest.raises(RuntimeError, match="'model', which holds edited"):
        train(model, build(model.parameters()))
    assert_same(weights(model), before)
    assert tree(tmp_path) == files
    # The remedy that the message names.
    checkpointer.recover_if_possible(weights="finetuned")
    train(model, build(model.parameters()))


def test_weights_that_never_were_the_base_are_not_trained(tmp_path, base):
    model, checkpointer = make(tmp_path / "save", base)
    with pytest.raises(RuntimeError, match="not loaded from the base"):
        train(model)
    with pytest.raises(RuntimeError, match="not loaded from the base"):
        checkpointer.save_checkpoint()
    assert not list((tmp_path / "save").glob("CKPT*"))
    # What is as built may be trained first where that is the base.
    model, checkpointer = make(tmp_path / "other", "start")
    train(model)
    before = weights(model)
    checkpointer.recover_if_possible(weights="finetuned")
    assert_same(weights(model), before)


def test_an_amp_scaler_that_skips_a_step(tmp_path, base):
    model, checkpointer = make(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    checkpointer.save_checkpoint()
    checkpointer.recover_if_possible()
    with pytest.raises(RuntimeError, match="edited"):
        train(model)


def test_other_optimizers_and_frozen_weights_do_not_matter(tmp_path, base):
    model, checkpointer = trained(tmp_path / "save", base)
    checkpointer.recover_if_possible()
    train(torch.nn.Linear(2, 2))
    model.requires_grad_(False)
    head = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(
        [*model.parameters(), *head.parameters()], lr=0.1
    )
    with pytest.raises(RuntimeError, match="holds edited"):
        optimizer.step()  # gradients of before the freezing
    optimizer.zero_grad()
    head(model(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    checkpointer.save_checkpoint()


def test_a_checkpointer_that_is_gone_watches_no_more(tmp_path, base):
    model, checkpointer = trained(tmp_path / "save", base)
    checkpointer.recover_if_possible()
    gone = weakref.ref(checkpointer)
    del checkpointer
    gc.collect()
    assert gone() is None
    train(model)
    model.load_state_dict(weights(model))
    module = weakref.ref(model)
    del model
    gc.collect()
    assert module() is None


def test_copies_of_a_module_are_not_watched(tmp_path, base):
    model, checkpointer = trained(tmp_path / "save", base)
    checkpointer.recover_if_possible()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(torch.nn.Linear(2, 2).state_dict())
        train(other)
    checkpointer.save_checkpoint()


# -- loads from outside --------------------------------------------------------


class Wrapped(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("by", ["itself", "a wrapper"])
def test_what_is_loaded_from_outside_is_not_saved(tmp_path, base, by):
    model, checkpointer = trained(tmp_path / "save", base)
    files = tree(tmp_path)
    loader = model if by == "itself" else Wrapped(model)
    loader.load_state_dict({k: v + 1 for k, v in loader.state_dict().items()})
    for act in (checkpointer.save_checkpoint, lambda: train(model)):
        with pytest.raises(RuntimeError, match="loaded from outside"):
            act()
    assert tree(tmp_path) == files


def test_a_part_that_is_loaded_from_outside(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    _, checkpointer = make(tmp_path / "save", "start", model)
    checkpointer.recover_if_possible(weights="finetuned")
    Wrapped(model[1]).load_state_dict(Wrapped(model[0]).state_dict())
    with pytest.raises(RuntimeError, match="its part '1' was loaded"):
        train(model)


def test_a_known_checkpoint_that_is_loaded_by_hand(tmp_path, base):
    rule = TaskArithmetic(scale=0.3)
    model, checkpointer = trained(tmp_path / "save", base, rule=rule)
    train(model)
    checkpointer.save_checkpoint(meta={"WER": 2.0})
    best, last = checkpointer.find_checkpoints(min_key="WER")
    for name in ("model", "model.finetuned"):
        model.load_state_dict(torch.load(best.paramfiles[name]))
        if name == "model":
            with pytest.raises(RuntimeError, match="holds edited"):
                train(model)
        saved = checkpointer.save_checkpoint()
        for file in ("model.ckpt", "model.finetuned.ckpt"):
            assert_same(
                dict(open_state(saved.path / file)),
                dict(open_state(best.path / file)),
            )


def test_a_mean_of_what_was_found_before_another_search(tmp_path, base):
    model, checkpointer = trained(tmp_path / "save", base)
    for wer in (2.0, 3.0):
        train(model)
        checkpointer.save_checkpoint(meta={"WER": wer})
    best = checkpointer.find_checkpoints(min_key="WER", max_num_checkpoints=2)
    checkpointer.recover_if_possible()
    model.load_state_dict(average_checkpoints(best, "model"))
    saved = checkpointer.save_checkpoint()
    tuned = [open_state(c.path / "model.finetuned.ckpt") for c in best]
    for name, kept in open_state(saved.path / "model.finetuned.ckpt").items():
        torch.testing.assert_close(kept, (tuned[0][name] + tuned[1][name]) / 2)
    # One that nobody gave it is unknown.
    two = [
        open_state(path / "model.ckpt")
        for path in sorted((tmp_path / "save").glob("CKPT+*"))[:2]
    ]
    model.load_state_dict(
        {n: 0.3 * two[0][n] + 0.7 * two[1][n] for n in two[0]}
    )
    with pytest.raises(RuntimeError, match="loaded from outside"):
        checkpointer.save_checkpoint()


def test_pretrained_weights_before_the_first_recovery_are_normal(
    tmp_path, base
):
    model, checkpointer = make(tmp_path / "save", base)
    model.load_state_dict(torch.nn.Linear(2, 2).state_dict())
    checkpointer.recover_if_possible(weights="finetuned")
    assert_same(weights(model), dict(open_state(base)))


# -- the base, the settings ----------------------------------------------------


def test_a_base_of_another_architecture_changes_nothing(tmp_path, base):
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    before = [weights(one), weights(two)]
    checkpointer = EditingCheckpointer(
        tmp_path / "save",
        {"one": one, "two": two},
        edited=["one", "two"],
        base={"one": base, "two": base},
        rule=TaskArithmetic(),
    )
    with pytest.raises(ValueError, match="base.ckpt.*'two'"):
        checkpointer.recover_if_possible(weights="finetuned")
    assert_same(weights(one), before[0])
    assert_same(weights(two), before[1])
    assert not tree(tmp_path / "save")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rule": TaskArithmetic(scale=0.4)}, "rule"),
        ({"rule": TIES(density=0.5, scale=0.5)}, "rule"),
        ({"scale": 0.3}, "scale"),
        ({"exclude": "bias"}, "exclude"),
        ({"normalizers": "pooled"}, "normalizers"),
    ],
)
def test_settings_that_changed_between_trainings(tmp_path, base, change, named):
    trained(tmp_path / "save", base)
    model, checkpointer = make(tmp_path / "save", base, **change)
    before, files = weights(model), tree(tmp_path)
    with pytest.raises(ValueError, match=f"was trained with {named}:"):
        checkpointer.recover_if_possible(weights="finetuned")
    assert_same(weights(model), before)
    assert tree(tmp_path) == files
    checkpointer.recover_if_possible()  # evaluation may


UNUSABLE = [
    ({"rule": ModelStock()}, "at least 2 task vectors, got 1"),
    ({"rule": SLERP(0.5)}, "exactly 2 task vectors, got 1"),
    ({"rule": TIES(weights=[1, 2])}, "weights: 2 entries for 1"),
    ({"rule": TIES(density=[0.5, 0.5])}, "density: 2 entries for 1"),
    ({"rule": LiNeS(DARE([0.5, 0.5]), 0.5)}, "drop: 2 entries for 1"),
    ({"rule": ByLayer({"*": TIES(weights=[1, 2])})}, "weights: 2 entries"),
    ({"rule": LiNeS(TIES(), 0.5)}, "no parameter name has a layer"),
    ({"rule": ByLayer({"zz*": TIES()})}, "'zz[*]' matches no parameter"),
    ({"rule": TIES(scale={"zz*": 1})}, "'zz[*]' matches no parameter"),
    ({"include": ["encoder.*"]}, "'encoder.[*]' matches no parameter"),
    ({"scale": {"encoder.*": 0.5}}, "'encoder.[*]' matches no parameter"),
    ({"scale": "abc"}, "scale='abc'"),
]


@pytest.mark.parametrize(("arguments", "match"), UNUSABLE)
def test_what_no_edit_can_use_is_refused_before_the_training(
    tmp_path, base, arguments, match
):
    model = torch.nn.Linear(2, 2)
    before = weights(model)
    with pytest.raises(ValueError, match=match):
        _, checkpointer = make(tmp_path / "save", base, model, **arguments)
        checkpointer.recover_if_possible(weights="finetuned")
    assert_same(weights(model), before)
    # As well where the weights are those of a plain Checkpointer.
    Checkpointer(tmp_path / "plain", {"model": model}).save_checkpoint()
    with pytest.raises(ValueError, match=match):
        _, checkpointer = make(tmp_path / "plain", base, **arguments)
        checkpointer.recover_if_possible(weights="finetuned")


def test_a_base_that_is_gone_when_training_goes_on(tmp_path, base):
    trained(tmp_path / "save", base)
    os.unlink(base)
    _, checkpointer = make(tmp_path / "save", base)
    with pytest.raises(FileNotFoundError, match="base.ckpt"):
        checkpointer.recover_if_possible(weights="finetuned")


def test_a_start_that_is_gone_or_damaged(tmp_path):
    folder = tmp_path / "save"
    trained(folder, "start")
    file = folder / "start" / "model.ckpt"
    stored = file.read_bytes()
    changed = {k: v + 1 for k, v in open_state(file).items()}
    for damage, message in (
        (lambda: file.write_bytes(stored[: len(stored) // 2]), "model.ckpt"),
        (lambda: save_state(changed, file), "was fine-tuned from"),
        (lambda: (file.unlink(), file.parent.rmdir()), "are missing"),
    ):
        damage()
        _, checkpointer = make(folder, "start")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            checkpointer.recover_if_possible(weights="finetuned")
    checkpointer.recover_if_possible()  # the kept edit needs no base


def test_other_recoverables_than_those_edited_before(tmp_path, base):
    trained(tmp_path / "save", base)
    other = EditingCheckpointer(
        tmp_path / "save",
        {"model": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)},
        edited=["model", "head"],
        base=base,
        rule=TaskArithmetic(scale=0.5),
    )
    with pytest.raises(ValueError, match="'head' was not edited there"):
        other.recover_if_possible(weights="finetuned")
    other = EditingCheckpointer(
        tmp_path / "x", {"net": torch.nn.Linear(2, 2)}, base=base,
        rule=TaskArithmetic(),
    )  # fmt: skip
    with pytest.raises(KeyError, match="no recoverable 'model'; there are net"):
        other.recover_if_possible(weights="finetuned")


def test_checkpoints_without_editing_are_named(tmp_path, base, caplog):
    stock = Checkpointer(tmp_path / "save", {"model": torch.nn.Linear(2, 2)})
    stock.save_checkpoint()
    _, checkpointer = make(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    assert "was saved without editing" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_edit_that_overflows(tmp_path, dtype):
    model = torch.nn.Linear(1, 1, bias=False).to(dtype)
    high = torch.finfo(dtype).max
    base = save_state(
        {"weight": torch.full((1, 1), high / 2, dtype=dtype)},
        tmp_path / "base.ckpt",
    )
    _, checkpointer = make(
        tmp_path / "save", base, model, rule=TaskArithmetic(scale=3.0)
    )
    checkpointer.recover_if_possible(weights="finetuned")
    model.weight.data.mul_(1.9)
    with pytest.raises(ValueError, match="'weight'.*too large for"):
        checkpointer.save_checkpoint()
    assert not tree(tmp_path / "save")


# -- two checkpointers on one folder -------------------------------------------


def test_two_of_one_process(tmp_path, base):
    """The later takes over; the earlier may train no more before it recovers."""
    one, first = make(tmp_path / "save", base)
    first.recover_if_possible(weights="finetuned")
    train(one)
    two, second = make(tmp_path / "save", base)
    second.recover_if_possible(weights="finetuned")
    for act in (lambda: train(one), first.save_checkpoint):
        with pytest.raises(RuntimeError, match="another EditingCheckpointer"):
            act()
    train(two)
    second.save_checkpoint()
    first.recover_if_possible(weights="finetuned")
    train(one)


def test_two_processes(tmp_path, base):
    model, checkpointer = make(tmp_path / "save", base)
    checkpointer.recover_if_possible(weights="finetuned")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _, other = make(tmp_path / "save", base)
            other.recover_if_possible(min_key="WER")  # reading is free
            other.recover_if_possible(weights="finetuned")
        except RuntimeError as error:
            said = str(error)
            named = f"process {os.getppid()}" in said and "save" in said
            code = 0 if named and "another checkpoints_dir" in said else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    train(model)
    checkpointer.save_checkpoint()


# -- tokens --------------------------------------------------------------------


def encoder(letters):
    found = CTCTextEncoder()
    found.insert_blank(index=0)
    for letter in letters:
        found.add_label(letter)
    return found


@pytest.fixture
def save_folder(tmp_path):
    """A base with a label encoder in its save folder."""
    model = torch.nn.Linear(2, 2)
    Checkpointer(tmp_path / "us", {"model": model}).save_checkpoint()
    encoder("NEF").save(tmp_path / "us" / "label_encoder.txt")
    return tmp_path / "us"


def test_label_encoders_of_base_and_run(tmp_path, save_folder):
    model, checkpointer = make(tmp_path / "save", save_folder)
    encoder("WOZ").save(tmp_path / "save" / "label_encoder.txt")
    before = weights(model)
    with pytest.raises(ValueError) as caught:
        checkpointer.recover_if_possible(weights="finetuned")
    said = str(caught.value)
    for part in (
        "us/label_encoder.txt",
        "save/label_encoder.txt",
        "row 1 is 'N' there and 'W' here",
        "Copy",
        "align_vocabulary",
    ):
        assert part in said
    assert_same(weights(model), before)
    encoder("NEF").save(tmp_path / "save" / "label_encoder.txt")
    checkpointer.recover_if_possible(weights="finetuned")


def test_encoders_among_the_recoverables(tmp_path, save_folder):
    model = torch.nn.Linear(2, 2)
    for letters, fits in (("NEF", True), ("FEN", False), ("", True)):
        checkpointer = EditingCheckpointer(
            tmp_path / f"save{letters}",
            {"model": model, "tokenizer": encoder(letters)},
            base=save_folder,
            rule=TaskArithmetic(),
        )
        if letters == "":
            checkpointer.recoverables["tokenizer"] = CTCTextEncoder()
        if fits:
            checkpointer.recover_if_possible(weights="finetuned")
            continue
        with pytest.raises(ValueError, match="'tokenizer' in memory"):
            checkpointer.recover_if_possible(weights="finetuned")


def test_sentencepiece_models(tmp_path, save_folder):
    import sentencepiece

    (save_folder / "label_encoder.txt").unlink()
    folders = {}
    for name, words in (("us", "one two three"), ("save", "uno dos tres")):
        folders[name] = tmp_path / name
        folders[name].mkdir(exist_ok=True)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words.split() * 9),
            model_prefix=str(folders[name] / "9_char"),
            vocab_size=9,
            model_type="char",
            hard_vocab_limit=False,
            minloglevel=2,
        )
    (folders["us"] / "9_char.vocab").unlink()
    _, checkpointer = make(tmp_path / "save", save_folder)
    with pytest.raises(ValueError, match="9_char.model.*this run's"):
        checkpointer.recover_if_possible(weights="finetuned")
