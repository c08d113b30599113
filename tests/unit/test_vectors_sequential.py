"""SequentialEditor against the paper's formula, and against a harsh life."""

import multiprocessing
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechbrain_taskarith.utils.hub.cards import read_card
from speechbrain_taskarith.vectors import (
    DARE,
    TIES,
    LiNeS,
    ModelStock,
    Rule,
    SequentialEditor,
    TaskArithmetic,
    TaskVector,
    as_state,
    open_state,
    save_state,
)

ENCODINGS = ("lossless", "bf16", "int8", "sparse", "sparse-bf16", "sparse-int8")


def make_state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": torch.randn(4, 6, generator=generator).to(dtype),
        "encoder.bias": torch.randn(5, generator=generator).to(dtype),
        "norm.running_mean": torch.randn(3, generator=generator),
        "norm.num_batches_tracked": torch.tensor(seed),
    }


def tuned(state, seed):
    """A fine-tuned model: the state plus a small random step."""
    step = make_state(seed)
    return {
        name: (tensor.float() + 0.1 * step[name].float()).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor + 7
        for name, tensor in state.items()
    }


def same_bytes(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes()


def learn_all(editor, names, seed=10):
    states = [editor.state()]
    for number, name in enumerate(names):
        editor.learn(name, tuned(editor.state(), seed + number))
        states.append(editor.state())
    return states


def listing(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    )


def naive_task_arithmetic(base, finetuned, scale):
    """theta = base + scale (finetuned - base), one number at a time."""
    result = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point() or "running" in name:
            result[name] = tensor.double()
            continue
        values = [
            b + scale * (f - b)
            for b, f in zip(
                tensor.double().flatten().tolist(),
                finetuned[name].double().flatten().tolist(),
            )
        ]
        result[name] = torch.tensor(values).double().reshape(tensor.shape)
    return result


def test_each_edit_is_the_papers_formula(tmp_path):
    base = make_state(0)
    editor = SequentialEditor(base, TaskArithmetic(scale=0.4), tmp_path / "e")
    expected = base
    for seed, name in enumerate(["german", "greek", "french"]):
        before = editor.state()
        finetuned = tuned(before, seed)
        expected = naive_task_arithmetic(before, finetuned, 0.4)
        after = editor.learn(name, finetuned)
        for key in base:
            torch.testing.assert_close(
                after[key].double(), expected[key], atol=1e-6, rtol=1e-6
            )
    assert [edit.name for edit in editor.log] == ["german", "greek", "french"]
    assert all(edit.exact for edit in editor.log)


def test_ties_of_one_vector_trims_by_magnitude(tmp_path):
    base = make_state(0)
    editor = SequentialEditor(
        base, TIES(density=0.5, scale=0.6), tmp_path / "e", encoding="sparse"
    )
    finetuned = tuned(base, 3)
    after = editor.learn("german", finetuned)
    names = ["encoder.weight", "encoder.bias"]
    tau = torch.cat(
        [(finetuned[n] - base[n]).double().flatten() for n in names]
    )
    kept = round(0.5 * tau.numel())
    threshold = tau.abs().sort(descending=True).values[kept - 1]
    trimmed = torch.where(tau.abs() >= threshold, tau, 0.0)
    got = torch.cat([(after[n] - base[n]).double().flatten() for n in names])
    torch.testing.assert_close(got, 0.6 * trimmed, atol=1e-6, rtol=1e-5)


def test_scale_one_is_fine_tuning_and_zero_learns_nothing(tmp_path):
    base = make_state(0)
    finetuned = tuned(base, 1)
    one = SequentialEditor(base, TaskArithmetic(), tmp_path / "one")
    after = one.learn("german", finetuned, scale=1.0)
    for name in ("encoder.weight", "encoder.bias"):
        torch.testing.assert_close(after[name], finetuned[name])
    zero = SequentialEditor(base, TaskArithmetic(), tmp_path / "zero")
    same_bytes(zero.learn("german", finetuned, scale=0.0), base)


def test_counters_and_running_statistics_are_the_bases(tmp_path):
    base = make_state(0)
    editor = SequentialEditor(base, TaskArithmetic(), tmp_path / "e")
    after = editor.learn("german", tuned(base, 1))
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(after[name], base[name])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_undo_gives_every_state_back_bit_for_bit(tmp_path, encoding):
    editor = SequentialEditor(
        make_state(0),
        TIES(density=0.3, scale=0.7),
        tmp_path / "e",
        encoding=encoding,
    )
    names = ["german", "greek", "french"]
    states = learn_all(editor, names)
    for index in (2, 1, 0):
        removed = editor.undo(names[index])
        assert removed.name == names[index]
        same_bytes(editor.state(), states[index])
    # Until the next edit they may come back; then their vectors are gone.
    editor.learn("other", tuned(editor.state(), 9))
    kept = listing(tmp_path / "e")
    assert sum(name.startswith("vectors") for name in kept) == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_process_resumes_with_the_same_bytes(tmp_path, encoding):
    editor = SequentialEditor(
        make_state(0, torch.bfloat16),
        TIES(density=0.4, scale={"encoder.weight": 0.5, "*": 0.2}),
        tmp_path / "e",
        encoding=encoding,
    )
    final = learn_all(editor, ["german", "greek"])[-1]
    editor.close()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)
        with SequentialEditor.resume(tmp_path / "e") as again:
            # The rule comes back from the log too: one more edit.
            now = again.state()
            now |= {"next": again.learn("x", tuned(now, 5))["encoder.bias"]}
            sender.send(
                {
                    k: v.view(torch.uint8).numpy().tobytes()
                    if v.dtype == torch.bfloat16
                    else v.numpy().tobytes()
                    for k, v in now.items()
                }
            )

    process = context.Process(target=child)
    process.start()
    sender.close()
    got = receiver.recv()
    process.join()
    for name, tensor in final.items():
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.uint8)
        assert got[name] == tensor.numpy().tobytes()
    with SequentialEditor.resume(tmp_path / "e") as again:
        bias = again.state()["encoder.bias"].view(torch.uint8)
        assert got["next"] == bias.numpy().tobytes()


def test_dropping_a_middle_edit_reapplies_and_says_so(tmp_path):
    base = make_state(0)
    editor = SequentialEditor(base, TaskArithmetic(scale=0.5), tmp_path / "e")
    learn_all(editor, ["a", "b", "c"])
    vectors = {name: editor.vector(name) for name in "abc"}
    editor.undo("b")
    expected = vectors["a"].apply(base, 0.5)
    expected = vectors["c"].apply(expected, 0.5, any_base=True)
    same_bytes(editor.state(), expected)
    assert [(e.name, e.exact) for e in editor.log] == [
        ("a", True),
        ("c", False),
    ]
    assert editor.history[-1]["action"] == "undo"
    assert editor.history[-1]["name"] == "b"


def test_reordering_and_back_gives_the_first_bytes(tmp_path):
    editor = SequentialEditor(
        make_state(0), TaskArithmetic(scale=0.5), tmp_path / "e"
    )
    first = learn_all(editor, ["a", "b", "c"])[-1]
    vectors = {name: editor.vector(name) for name in "abc"}
    log = editor.reorder(["c", "a", "b"])
    assert [e.exact for e in log] == [False, False, False]
    expected = make_state(0)
    for name in "cab":
        expected = vectors[name].apply(expected, 0.5, any_base=True)
    same_bytes(editor.state(), expected)
    editor.close()
    with SequentialEditor.resume(tmp_path / "e") as again:
        log = again.reorder(["a", "b", "c"])
        assert [e.exact for e in log] == [True, True, True]
        same_bytes(again.state(), first)


def test_one_over_t_is_the_running_average(tmp_path):
    base = {"w": torch.zeros(1)}
    editor = SequentialEditor(
        base, TaskArithmetic(), tmp_path / "e", scale="1/t"
    )
    # Models "fine-tuned" to these values, whatever they started from.
    values = [4.0, 1.0, 9.0]
    for number, value in enumerate(values):
        editor.learn(f"d{number}", {"w": torch.tensor([value])})
    mean = (0.0 + sum(values)) / 4
    assert editor.state()["w"].item() == pytest.approx(mean)
    assert [e.scale for e in editor.log] == pytest.approx([1 / 2, 1 / 3, 1 / 4])


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ([0.5, 0.25], [0.5, 0.25]),
        (lambda number: 1 / number**2, [1.0, 0.25]),
        (0.3, [0.3, 0.3]),
        (None, [0.8, 0.8]),
        ({"encoder.*": 0.1}, [{"encoder.*": 0.1}] * 2),
    ],
)
def test_schedules(tmp_path, schedule, expected):
    editor = SequentialEditor(
        make_state(0), TaskArithmetic(scale=0.8), tmp_path / "e", scale=schedule
    )
    learn_all(editor, ["a", "b"])
    assert [e.scale for e in editor.log] == expected


def test_a_schedule_survives_resuming_or_is_asked_for(tmp_path):
    base = make_state(0)
    rule = TaskArithmetic()
    with SequentialEditor(base, rule, tmp_path / "l", scale=[0.5, 0.2]) as one:
        one.learn("a", tuned(base, 1))
    with SequentialEditor.resume(tmp_path / "l") as one:
        one.learn("b", tuned(one.state(), 2))
        assert one.log[-1].scale == 0.2
        with pytest.raises(ValueError, match="2 entries"):
            one.learn("c", tuned(one.state(), 3))
    with SequentialEditor(base, rule, tmp_path / "f", scale=lambda number: 0.5):
        pass
    with SequentialEditor.resume(tmp_path / "f") as one:
        with pytest.raises(ValueError, match="give it again"):
            one.learn("a", tuned(base, 1))
        one.learn("a", tuned(base, 1), scale=0.1, selected_on="valid")
        assert one.log[0].selected_on == "valid"


def test_tied_weights_stay_tied(tmp_path):
    table = torch.randn(3, 2)
    base = {"embedding": table, "output": table}
    step = torch.ones(3, 2)
    after = {"embedding": table + step, "output": table + step}
    editor = SequentialEditor(base, TaskArithmetic(scale=0.5), tmp_path / "e")
    state = editor.learn("german", after)
    assert state["embedding"].data_ptr() == state["output"].data_ptr()
    torch.testing.assert_close(state["output"], table + 0.5)
    editor.close()
    state = SequentialEditor.resume(tmp_path / "e", read_only=True).state()
    assert state["embedding"].data_ptr() == state["output"].data_ptr()


def test_what_state_returns_is_the_callers(tmp_path):
    editor = SequentialEditor(make_state(0), TaskArithmetic(), tmp_path / "e")
    first = editor.learn("a", tuned(editor.state(), 1))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in first.values():
        tensor.zero_()
    same_bytes(editor.state(), kept)


def flip_byte(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("victim", ["vector", "base", "log", "log edited"])
def test_damage_is_an_error_that_names_the_file(tmp_path, victim):
    folder = tmp_path / "e"
    with SequentialEditor(make_state(0), TaskArithmetic(), folder) as editor:
        learn_all(editor, ["a", "b"])
        vector = folder / editor.log[0].vector
    if victim == "vector":
        flip_byte(vector)
        name = vector.name
    elif victim == "base":
        flip_byte(folder / "base.safetensors")
        name = "base.safetensors"
    elif victim == "log":
        flip_byte(folder / "edits.jsonl", 300)
        name = "edits.jsonl: line 1 is damaged"
    else:
        log = (folder / "edits.jsonl").read_text()
        assert log.count('"scale": 1.0, "rule"') == 2
        log = log.replace('"scale": 1.0, "rule"', '"scale": 1.5, "rule"', 1)
        (folder / "edits.jsonl").write_text(log)
        name = "edits.jsonl: line 2 is damaged"
    with pytest.raises(ValueError, match=name):
        SequentialEditor.resume(folder, verify=True)
    # The failed attempt must not leave the folder locked.
    with pytest.raises(ValueError, match=name):
        SequentialEditor.resume(folder, verify=True)


def test_a_missing_vector_is_named(tmp_path):
    folder = tmp_path / "e"
    with SequentialEditor(make_state(0), TaskArithmetic(), folder) as editor:
        learn_all(editor, ["a"])
        vector = folder / editor.log[0].vector
    vector.unlink()
    with pytest.raises(FileNotFoundError, match=vector.name):
        SequentialEditor.resume(folder)


def test_what_is_excluded_may_hold_infinity(tmp_path):
    mask = {"mask": torch.full((2,), -float("inf"))}
    base = {**make_state(0), **mask}
    with pytest.raises(ValueError, match="'mask' holds NaN or infinity"):
        SequentialEditor(base, TaskArithmetic(), tmp_path / "a")
    # A pattern may also be for what the base lacks.
    how = {"exclude": ["mask", "more.*"]}
    folder = tmp_path / "e"
    with SequentialEditor(base, TaskArithmetic(), folder, **how) as editor:
        more = {**mask, "more.w": torch.ones(1)}
        after = editor.learn("a", {**tuned(make_state(0), 1), **more})
        assert torch.equal(after["mask"], base["mask"])


@pytest.mark.parametrize(
    "change, error, match",
    [
        (lambda s: s["encoder.bias"].fill_(float("nan")), ValueError, "bias"),
        (lambda s: s.pop("encoder.bias"), KeyError, "bias"),
        (lambda s: s.update(more=torch.ones(1)), KeyError, "more"),
        (
            lambda s: s.update({"encoder.bias": torch.ones(6)}),
            ValueError,
            "bias",
        ),
    ],
)
def test_bad_models_change_nothing(tmp_path, change, error, match):
    folder = tmp_path / "e"
    editor = SequentialEditor(make_state(0), TaskArithmetic(), folder)
    learn_all(editor, ["a"])
    before, files = editor.state(), listing(folder)
    bad = tuned(before, 2)
    change(bad)
    with pytest.raises(error, match=match):
        editor.learn("b", bad)
    assert listing(folder) == files
    same_bytes(editor.state(), before)
    editor.learn("b", tuned(before, 2))
    assert len(editor.log) == 2


def test_bad_arguments_change_nothing(tmp_path):
    folder = tmp_path / "e"
    editor = SequentialEditor(make_state(0), TaskArithmetic(), folder)
    learn_all(editor, ["a", "b"])
    files = listing(folder)
    good = tuned(editor.state(), 4)
    for act, error, match in (
        (lambda: editor.learn("a", good), ValueError, "learned already"),
        (lambda: editor.learn("", good), ValueError, "name"),
        (
            lambda: editor.learn("c", good, scale=float("inf")),
            ValueError,
            "inf",
        ),
        (lambda: editor.learn("c", good, scale={"x.*": 1}), ValueError, "x.*"),
        (lambda: editor.undo("c"), KeyError, "no edit 'c'"),
        (lambda: editor.reorder(["a"]), ValueError, "each of"),
        (lambda: editor.reorder(["a", "a"]), ValueError, "each of"),
    ):
        with pytest.raises(error, match=match.replace("*", r"\*")):
            act()
    assert listing(folder) == files
    with pytest.raises(FileExistsError, match="resume"):
        SequentialEditor(make_state(0), TaskArithmetic(), folder)
    with pytest.raises(FileNotFoundError, match="no edit log"):
        SequentialEditor.resume(tmp_path / "nothing")
    with pytest.raises(ValueError, match="zip.*lossless"):
        SequentialEditor(
            make_state(0), TaskArithmetic(), tmp_path / "n", encoding="zip"
        )
    with pytest.raises(ValueError, match="1/t"):
        SequentialEditor(
            make_state(0), TaskArithmetic(), tmp_path / "n", scale="1/k"
        )


@pytest.mark.parametrize(
    ("rule", "arguments", "match"),
    [
        (ModelStock(), {}, "at least 2 task vectors, got 1"),
        (TIES(weights=[1, 2]), {}, "weights: 2 entries for 1"),
        (LiNeS(TIES(), 0.5), {}, "no parameter name has a layer"),
        (TIES(), {"include": "zz*"}, "'zz[*]' matches no parameter"),
        (TIES(), {"scale": {"zz*": 1}}, "'zz[*]' matches no parameter"),
        (TIES(), {"scale": [1, {"zz*": 1}]}, "'zz[*]' matches no parameter"),
    ],
)
def test_what_no_edit_can_use_is_refused_at_the_start(
    tmp_path, rule, arguments, match
):
    with pytest.raises(ValueError, match=match):
        SequentialEditor(make_state(0), rule, tmp_path / "e", **arguments)
    assert not (tmp_path / "e").exists()
    # What fits the fine-tuned model alone may be left out of it.
    SequentialEditor(
        make_state(0), TIES(), tmp_path / "e", exclude="zz*"
    ).close()
    with pytest.raises(ValueError, match=match):
        SequentialEditor.resume(tmp_path / "e", rule, **arguments)
    SequentialEditor.resume(tmp_path / "e", TIES(), scale="1/t").close()


def test_an_exploding_scale_is_refused(tmp_path):
    editor = SequentialEditor(make_state(0), TaskArithmetic(), tmp_path / "e")
    files = listing(tmp_path / "e")
    finetuned = {
        name: tensor + 100 if tensor.is_floating_point() else tensor
        for name, tensor in editor.state().items()
    }
    with pytest.raises(ValueError, match="weight.*too large for float32"):
        editor.learn("a", finetuned, scale=3e38)
    with pytest.raises(ValueError, match="finite number"):
        editor.learn("a", finetuned, scale=3e39)
    assert listing(tmp_path / "e") == files


def test_two_editors_of_one_folder(tmp_path):
    folder = tmp_path / "e"
    editor = SequentialEditor(make_state(0), TaskArithmetic(), folder)
    learn_all(editor, ["a"])
    with pytest.raises(RuntimeError, match="another editor of this process"):
        SequentialEditor.resume(folder)
    reader = SequentialEditor.resume(folder, read_only=True)
    same_bytes(reader.state(), editor.state())
    with pytest.raises(RuntimeError, match="for reading"):
        reader.undo("a")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            torch.set_num_threads(1)
            try:
                SequentialEditor.resume(folder)
            except RuntimeError as error:
                code = 0 if f"process {os.getppid()}" in str(error) else 2
            try:
                # The lock is the parent's, also through the inherited object.
                editor.undo("a")
                code = 3
            except RuntimeError:
                pass
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    editor.close()
    SequentialEditor.resume(folder).close()


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    folder = tmp_path / "e"
    with SequentialEditor(make_state(0), TaskArithmetic(), folder) as editor:
        final = learn_all(editor, ["a"])[-1]
    files = listing(folder)
    (folder / ".partial-abc").write_bytes(b"half a log")
    (folder / "vectors" / ".partial-xyz.safetensors").write_bytes(b"half")
    (folder / "vectors" / "0002-b.safetensors").write_bytes(b"never logged")
    (folder / "notes.txt").write_text("the user's own")
    with SequentialEditor.resume(folder) as editor:
        same_bytes(editor.state(), final)
    assert listing(folder) == sorted([*files, "notes.txt"])


def test_open_starts_or_resumes(tmp_path):
    base, folder = make_state(0), tmp_path / "e"
    with SequentialEditor.open(base, TaskArithmetic(), folder) as editor:
        final = learn_all(editor, ["a"])[-1]
    with SequentialEditor.open(base, TaskArithmetic(), folder) as editor:
        same_bytes(editor.state(), final)
    with pytest.raises(ValueError, match="another folder"):
        SequentialEditor.open(make_state(1), TaskArithmetic(), folder)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_open_resumes_from_the_state_dict_of_a_wrapped_model(tmp_path, wrapper):
    base = {wrapper + name: v for name, v in make_state(0).items()}
    with SequentialEditor.open(base, TaskArithmetic(), tmp_path) as editor:
        final = learn_all(editor, ["a"])[-1]
    with SequentialEditor.open(base, TaskArithmetic(), tmp_path) as editor:
        same_bytes(editor.state(), final)


def test_open_with_a_base_that_is_gone_holds_no_lock(tmp_path):
    folder, gone = tmp_path / "e", tmp_path / "us.safetensors"
    base = make_state(0)
    SequentialEditor.open(base, TaskArithmetic(), folder).close()
    with pytest.raises(FileNotFoundError) as error:
        SequentialEditor.open(gone, TaskArithmetic(), folder)
    # The traceback still holds what was made until then.
    assert error.tb is not None
    SequentialEditor.open(base, TaskArithmetic(), folder).close()


def test_a_base_by_reference(tmp_path):
    base = save_state(make_state(0), tmp_path / "us.safetensors")
    folder = tmp_path / "e"
    with SequentialEditor(
        base, TaskArithmetic(), folder, keep_base="reference"
    ) as editor:
        final = learn_all(editor, ["a"])[-1]
    assert not (folder / "base.safetensors").exists()
    same_bytes(SequentialEditor.resume(folder, read_only=True).state(), final)
    save_state(make_state(1), base)
    # The state has a copy of its own; undoing the edit needs the base.
    with SequentialEditor.resume(folder) as editor:
        same_bytes(editor.state(), final)
        with pytest.raises(ValueError, match="us.safetensors"):
            editor.undo("a")
    with pytest.raises(ValueError, match="us.safetensors"):
        SequentialEditor.resume(folder, verify=True)
    with pytest.raises(ValueError, match="path"):
        SequentialEditor(
            make_state(0),
            TaskArithmetic(),
            tmp_path / "m",
            keep_base="reference",
        )


class Halving(Rule):
    """A rule that is not of this package."""

    def merge_tensor(self, name, deltas, base=None):
        return 0.5 * deltas[0]


def test_a_foreign_rule_works_and_is_asked_for_on_resume(tmp_path):
    folder = tmp_path / "e"
    base = {"w": torch.zeros(2)}
    with SequentialEditor(base, Halving(), folder) as editor:
        after = editor.learn("a", {"w": torch.ones(2)})
        assert after["w"].tolist() == [0.5, 0.5]
    with SequentialEditor.resume(folder) as editor:
        with pytest.raises(ValueError, match="rule="):
            editor.learn("b", {"w": torch.ones(2)})
    with SequentialEditor.resume(folder, rule=Halving()) as editor:
        editor.learn("b", {"w": torch.ones(2)})
        assert editor.state()["w"].tolist() == [0.75, 0.75]


def test_a_rule_with_numbers_of_numpy_is_made_again_on_resume(tmp_path):
    base = make_state(0)
    rule = DARE(np.float32(0.5), seed=np.int64(3))
    with SequentialEditor(base, rule, tmp_path / "e") as editor:
        editor.learn("a", tuned(base, 1))
    with SequentialEditor.resume(tmp_path / "e") as editor:
        editor.learn("b", tuned(editor.state(), 2))
        assert [edit.rule["seed"] for edit in editor.log] == [3, 3]


def test_the_choice_of_parameters_survives_resuming(tmp_path):
    base = make_state(0)
    with SequentialEditor(
        base, TaskArithmetic(), tmp_path / "e", exclude="encoder.bias"
    ) as editor:
        editor.learn("a", tuned(base, 1))
    with SequentialEditor.resume(tmp_path / "e") as editor:
        state = editor.learn("b", tuned(editor.state(), 2))
    assert torch.equal(state["encoder.bias"], base["encoder.bias"])
    assert not torch.equal(state["encoder.weight"], base["encoder.weight"])


def test_a_rule_whose_scale_grows_with_depth(tmp_path):
    base = {f"layers.{i}.weight": torch.zeros(2) for i in range(3)}
    finetuned = {name: torch.ones(2) for name in base}
    rule = LiNeS(TaskArithmetic(), slope=0.5)
    with SequentialEditor(base, rule, tmp_path / "e") as editor:
        state = editor.learn("a", finetuned)
        expected = rule(base, [TaskVector.between(base, finetuned)])
        same_bytes(state, expected)
        assert len({tensor[0].item() for tensor in state.values()}) == 3
    with SequentialEditor.resume(tmp_path / "e") as editor:
        same_bytes(editor.state(), expected)


def test_saving_writes_weights_and_card(tmp_path):
    editor = SequentialEditor(
        make_state(0), TIES(density=0.5, scale=0.6), tmp_path / "e"
    )
    final = learn_all(editor, ["german"])[-1]
    path = editor.save(tmp_path / "edited.safetensors", wer={"german": 4.5})
    assert open_state(path).fingerprint == as_state(final).fingerprint
    card = read_card(tmp_path / "edited.safetensors")
    assert card["fingerprint"] == editor.fingerprint
    assert card["wer"] == [{"name": "german", "wer": 4.5}]
    assert (
        "TIES(density=0.5" in (tmp_path / "edited.safetensors.md").read_text()
    )


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    acts=st.lists(
        st.tuples(
            st.sampled_from(["learn", "undo", "reorder", "resume"]),
            st.integers(0, 10**6),
        ),
        max_size=8,
    )
)
def test_any_life_equals_applying_the_log(tmp_path_factory, acts):
    folder = tmp_path_factory.mktemp("life") / "e"
    base = make_state(0)
    editor = SequentialEditor(
        base, TIES(density=0.5, scale=0.5), folder, encoding="sparse-bf16"
    )
    order, vectors = [], {}
    for number, (act, draw) in enumerate(acts):
        if act == "learn":
            name = f"d{number}"
            editor.learn(name, tuned(editor.state(), draw))
            order.append(name)
            vectors[name] = editor.vector(name)
        elif act == "undo" and order:
            editor.undo(order.pop(draw % len(order)))
        elif act == "reorder" and order:
            turn = draw % len(order)
            order = order[turn:] + order[:turn]
            editor.reorder(order)
        elif act == "resume":
            editor.close()
            editor = SequentialEditor.resume(folder)
    expected = base
    for name in order:
        expected = vectors[name].apply(expected, 0.5, any_base=True)
    same_bytes(editor.state(), expected)
    assert [edit.name for edit in editor.log] == order
    editor.close()


def test_vectors_remember_where_they_come_from(tmp_path):
    editor = SequentialEditor(make_state(0), TaskArithmetic(), tmp_path / "e")
    first = editor.fingerprint
    learn_all(editor, ["a", "b"])
    assert editor.vector("a").base_fingerprint == first
    assert editor.vector("b").base_fingerprint == editor.log[0].state
    assert isinstance(editor.vector("a"), TaskVector)
