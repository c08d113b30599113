"""SequentialEditor: precision, the log and its damage, copies, undo and redo."""

import json
import os

import pytest
import torch

from speechbrain_taskarith.utils.hub.cards import read_card
from speechbrain_taskarith.vectors import (
    TIES,
    LiNeS,
    SequentialEditor,
    TaskArithmetic,
    TaskVector,
    as_state,
    open_state,
    save_state,
)
from speechbrain_taskarith.vectors.editing import copies, folder, log

HALVES = (torch.float16, torch.bfloat16)


def make(seed, dtype=torch.float32, size=400):
    noise = torch.Generator().manual_seed(seed)
    return {
        "a.weight": (0.05 * torch.randn(size, generator=noise)).to(dtype),
        "a.norm": torch.randn(8, generator=noise),
        "steps": torch.tensor(seed),
    }


def moved(state, seed, size=1e-4):
    """Fine-tune: add a step to the floating point tensors, in float32."""
    step = make(seed, size=len(state["a.weight"]))
    return {
        name: tensor.float() + size * step.get(name, 0.0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def same_bytes(one, other):
    assert as_state(one).fingerprint == as_state(other).fingerprint


# -- precision -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_the_loss_of_half_precision_does_not_add_up(tmp_path, dtype):
    """A hundred small edits are as exact as float32; rounded, all are lost."""
    base = make(0, dtype)
    exact = {n: t.double() for n, t in base.items()}
    rounded = {n: t.clone() for n, t in base.items()}
    with SequentialEditor(
        base, TaskArithmetic(0.25), tmp_path / "e", copies=0
    ) as editor:
        for number in range(30):
            state = editor.state()
            tuned = moved(state, 5, size=1e-4)
            for name in ("a.weight", "a.norm"):
                step = tuned[name].double() - state[name].double()
                exact[name] += 0.25 * step
                new = rounded[name].double() + 0.25 * step
                rounded[name] = new.to(rounded[name].dtype)
            editor.learn(f"d{number}", tuned)
        state = editor.state()
    assert state["a.weight"].dtype == torch.float32
    torch.testing.assert_close(
        state["a.weight"].double(), exact["a.weight"], atol=5e-7, rtol=0
    )
    edit = (exact["a.weight"] - base["a.weight"].double()).norm()
    lost = (rounded["a.weight"].double() - exact["a.weight"]).norm()
    assert lost > 0.3 * edit


@pytest.mark.parametrize("dtype", HALVES)
def test_undo_is_exact_over_a_half_precision_base(tmp_path, dtype):
    editor = SequentialEditor(make(0, dtype), TIES(0.5), tmp_path / "e")
    states = [editor.state()]
    same_bytes(
        states[0],
        {
            n: t.float() if t.dtype == dtype else t
            for n, t in make(0, dtype).items()
        },
    )
    assert editor.fingerprint == as_state(states[0]).fingerprint
    for number in range(4):
        states.append(editor.learn(f"d{number}", moved(states[-1], number)))
        assert editor.fingerprint == as_state(states[-1]).fingerprint
    for number in reversed(range(4)):
        editor.undo(f"d{number}")
        same_bytes(editor.state(), states[number])


def test_states_come_in_any_type(tmp_path):
    base = make(0, torch.bfloat16)
    table = base["a.weight"]
    base["tied"] = table
    with SequentialEditor(base, TaskArithmetic(0.5), tmp_path / "e") as editor:
        tuned = moved(editor.state(), 1, size=1.0)
        tuned["tied"] = tuned["a.weight"]
        kept = editor.learn("a", tuned)
        for dtype in ("float16", torch.bfloat16, "float64", "float32"):
            given = editor.state(dtype)
            kind = getattr(torch, str(dtype).removeprefix("torch."))
            for name in ("a.weight", "a.norm", "tied"):
                assert torch.equal(given[name], kept[name].to(kind))
            assert given["tied"].data_ptr() == given["a.weight"].data_ptr()
            assert given["steps"].dtype == torch.int64
        as_base = editor.state("base")
        assert {n: t.dtype for n, t in as_base.items()} == {
            n: t.dtype for n, t in base.items()
        }
        path = editor.save(tmp_path / "x.safetensors", dtype="bfloat16")
        written = open_state(path)
        written.verify()
        same_bytes(written, editor.state("bfloat16"))
        card = read_card(tmp_path / "x.safetensors")
        assert card["fingerprint"] == written.fingerprint
        with pytest.raises(ValueError, match="dtype='int8'"):
            editor.state("int8")


def test_a_type_that_cannot_hold_the_state_is_refused(tmp_path):
    base = {"big": torch.tensor([1e5, 1.0])}
    editor = SequentialEditor(base, TaskArithmetic(), tmp_path / "e")
    files = sorted(p.name for p in (tmp_path / "e").rglob("*"))
    for act in (
        lambda: editor.state("float16"),
        lambda: editor.save(tmp_path / "x.ckpt", dtype="float16"),
    ):
        with pytest.raises(ValueError, match="'big' is too large for float16"):
            act()
    assert not (tmp_path / "x.ckpt").exists()
    assert sorted(p.name for p in (tmp_path / "e").rglob("*")) == files


def difference(one, other):
    return (one["a.weight"].double() - other["a.weight"].double()).norm().item()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "half"])
@pytest.mark.parametrize("resumed", [False, True])
def test_rounding_for_a_training_is_not_learned(
    tmp_path, dtype, stored, resumed
):
    """Fine-tuned from a rounded state: its step is learned, no rounding."""
    editor = SequentialEditor(make(0), TaskArithmetic(1.0), tmp_path / "e")
    before = editor.state()
    start = editor.state(dtype)
    # A step that half precision stores exactly, so that nothing else is lost.
    step = torch.zeros(400)
    step[::7] = 0.25
    tuned = {n: t.clone() for n, t in start.items()}
    tuned["a.weight"] = (tuned["a.weight"].float() * 0 + step).to(
        start["a.weight"].dtype
    )
    tuned["a.weight"] += torch.where(step == 0, start["a.weight"], 0)
    if stored == "float32":
        tuned = {
            n: t.float() if t.is_floating_point() else t
            for n, t in tuned.items()
        }
    if resumed:
        editor.close()
        editor = SequentialEditor.resume(tmp_path / "e")
    after = editor.learn("a", tuned)
    # What was not trained has not moved, to the bit.
    still = step == 0
    assert torch.equal(after["a.weight"][still], before["a.weight"][still])
    assert torch.equal(after["a.norm"], before["a.norm"])
    assert editor.log[0].started_from == dtype
    editor.close()


def test_of_two_starts_the_nearer_is_taken_or_the_one_that_is_named(tmp_path):
    editor = SequentialEditor(make(0), TaskArithmetic(1.0), tmp_path / "e")
    before = editor.state()
    rounded = editor.state("bfloat16")
    # Trained from the state as it is, though a rounded one was given away.
    after = editor.learn("a", moved(before, 3))
    assert editor.log[-1].started_from is None
    assert difference(after, moved(before, 3)) < 1e-6
    editor.undo("a")
    after = editor.learn("b", moved(before, 3), started_from="bfloat16")
    assert editor.log[-1].started_from == "bfloat16"
    step = moved(before, 3)["a.weight"] - rounded["a.weight"].float()
    torch.testing.assert_close(after["a.weight"], before["a.weight"] + step)
    editor.undo("b")
    editor.learn("c", moved(rounded, 3))
    assert editor.log[-1].started_from == "bfloat16"


def test_types_of_float32_sequences_log_nothing(tmp_path):
    editor = SequentialEditor(make(0), TaskArithmetic(), tmp_path / "e")
    for dtype in (None, "base", "float32", "float64"):
        editor.state(dtype)
    assert [act["action"] for act in editor.history] == ["start"]
    for _ in range(3):
        editor.state("float16")
    assert [act["action"] for act in editor.history] == ["start", "hand out"]
    editor.close()
    reader = SequentialEditor.resume(tmp_path / "e", read_only=True)
    reader.state("bfloat16")
    assert len(reader.history) == 2


def test_an_edit_that_overflows_elsewhere_is_refused_by_name(tmp_path):
    """Each was finite where it was learned; in another order one is not."""
    base = {"w": torch.tensor([3e38])}
    editor = SequentialEditor(base, TaskArithmetic(), tmp_path / "e")
    editor.learn("down", {"w": torch.tensor([0.0])})
    editor.learn("up", {"w": torch.tensor([3e38])})
    for act in (
        lambda: editor.undo("down"),
        lambda: editor.reorder(["up", "down"]),
    ):
        with pytest.raises(ValueError, match="'up'.*'w'.*too large"):
            act()
    assert [edit.name for edit in editor.log] == ["down", "up"]
    assert editor.state()["w"].item() == pytest.approx(3e38)
    editor.close()
    SequentialEditor.resume(tmp_path / "e", verify=True).close()


# -- the log -------------------------------------------------------------------


def sequence(path, count=3, **arguments):
    """Make a sequence; return the states before and after each edit."""
    with SequentialEditor(
        make(0), TaskArithmetic(0.5), path, **arguments
    ) as editor:
        states = [editor.state()]
        for number in range(count):
            states.append(editor.learn(f"d{number}", moved(states[-1], number)))
    return states


def test_a_last_line_cut_short_by_a_kill_never_happened(tmp_path):
    """At every length of it: the state before, and the folder goes on."""
    states = sequence(tmp_path / "e")
    path = tmp_path / "e" / log.LOG_NAME
    content = path.read_bytes()
    begin = content.rindex(b"\n", 0, -1) + 1
    # How many lines there are is noted after them.
    last = tmp_path / "e" / log.LAST_NAME
    check = json.loads(content[:begin].splitlines()[-1])["check"]
    vectors = {
        file: file.read_bytes() for file in (tmp_path / "e/vectors").iterdir()
    }
    cuts = {begin, begin + 1, begin + 20, begin + 40, len(content) - 1}
    cuts |= set(range(begin, len(content), 97))
    for cut in sorted(cuts):
        for tail in (b"", b"\0" * 50):
            path.write_bytes(content[:cut] + tail)
            last.write_text(f"{3:012d} {check}\n")
            for file, data in vectors.items():
                file.write_bytes(data)
            reader = SequentialEditor.resume(tmp_path / "e", read_only=True)
            same_bytes(reader.state(), states[2])
            # A reader changes nothing.
            assert path.read_bytes() == content[:cut] + tail
            with SequentialEditor.resume(tmp_path / "e") as editor:
                assert [edit.name for edit in editor.log] == ["d0", "d1"]
                after = editor.learn("d2", moved(states[2], 2))
                same_bytes(after, states[3])
            with SequentialEditor.resume(tmp_path / "e", verify=True) as again:
                same_bytes(again.state(), states[3])


def test_any_other_damage_of_the_log_is_refused(tmp_path):
    sequence(tmp_path / "e")
    path = tmp_path / "e" / log.LOG_NAME
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    damaged = [
        content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :]
        for i in range(0, len(content) - 1, 13)
        for bit in (1, 0x80)
    ]
    damaged += [
        b"".join(lines[:1] + lines[2:]),  # one is missing
        b"".join([lines[0], lines[2], lines[1], lines[3]]),
        b"".join([*lines, lines[3]]),  # one is there twice
        b"".join(lines[1:]),
        b"",
        b"\n",
        content + b"\n",
        # Whole lines are missing at the end: their vectors are there.
        b"".join(lines[:2]),
        b"".join(lines[:1]),
    ]
    for altered in damaged:
        path.write_bytes(altered)
        with pytest.raises(ValueError, match="edits.jsonl"):
            SequentialEditor.resume(tmp_path / "e")
        assert path.read_bytes() == altered
    path.unlink()
    with pytest.raises(FileNotFoundError, match="edits.jsonl"):
        SequentialEditor.resume(tmp_path / "e")


def test_whole_lines_that_are_gone_are_missed(tmp_path):
    """Also those of acts that leave no file behind."""
    sequence(tmp_path / "e")
    with SequentialEditor.resume(tmp_path / "e") as editor:
        editor.undo("d1")
        editor.undo("d0")
        editor.redo()
        editor.undo("d0")
        editor.state("bfloat16")
        editor.reorder(["d2"])
        state = editor.state()
    path, last = (tmp_path / "e" / n for n in (log.LOG_NAME, log.LAST_NAME))
    content, note = path.read_bytes(), last.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 10
    for count in range(len(lines)):
        for rest in (b"", lines[count][:-1]):
            path.write_bytes(b"".join(lines[:count]) + rest)
            for read_only in (True, False):
                with pytest.raises(ValueError, match=r"edits\.jsonl"):
                    SequentialEditor.resume(tmp_path / "e", read_only=read_only)
    path.write_bytes(content)
    # Killed between act and note; and written by an earlier version.
    check = json.loads(lines[-2])["check"]
    for before in (f"{9:012d} {check}\n".encode(), None):
        last.unlink()
        if before:
            last.write_bytes(before)
        reader = SequentialEditor.resume(tmp_path / "e", read_only=True)
        same_bytes(reader.state(), state)
        assert last.exists() == bool(before)
        SequentialEditor.resume(tmp_path / "e").close()
        assert last.read_bytes() == note
    for damaged in (b"", b"x", note[:9], note[:-3], b"\0" * 30, note * 2):
        last.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"edits\.(last|jsonl)"):
            SequentialEditor.resume(tmp_path / "e")


def test_a_log_of_another_version_is_refused(tmp_path):
    sequence(tmp_path / "e")
    path = tmp_path / "e" / log.LOG_NAME
    first = json.loads(path.read_text().splitlines()[0])
    del first["check"]
    first["version"] = 3
    path.write_bytes(log._line("", first)[0])
    with pytest.raises(ValueError, match="version 3"):
        SequentialEditor.resume(tmp_path / "e")


@pytest.mark.parametrize("act", ["learn", "undo", "note"])
def test_a_log_that_cannot_be_written_keeps_the_state(
    tmp_path, monkeypatch, act
):
    editor = SequentialEditor(make(0), TaskArithmetic(), tmp_path / "e")
    before = editor.learn("a", moved(make(0), 1))
    path = tmp_path / "e" / log.LOG_NAME
    content = path.read_bytes()
    vectors = sorted((tmp_path / "e/vectors").iterdir())

    def full(descriptor, data, offset):
        os.pwrite(descriptor, data[: len(data) // 2], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "write_at", full)
    if act == "note":
        with pytest.raises(TypeError):
            editor.learn("b", moved(before, 2), note=object())
    else:
        with pytest.raises(OSError, match="edits.jsonl"):
            if act == "learn":
                editor.learn("b", moved(before, 2))
            else:
                editor.undo("a")
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert sorted((tmp_path / "e/vectors").iterdir()) == vectors
    same_bytes(editor.state(), before)
    assert [edit.name for edit in editor.log] == ["a"]
    editor.learn("b", moved(before, 2))
    editor.close()
    SequentialEditor.resume(tmp_path / "e", verify=True).close()


def test_an_interrupt_right_after_the_line_leaves_the_edit(
    tmp_path, monkeypatch
):
    """Memory and disk must not disagree on what was done."""
    editor = SequentialEditor(make(0), TaskArithmetic(), tmp_path / "e")
    before = editor.learn("a", moved(make(0), 1))

    def interrupted(descriptor):
        raise KeyboardInterrupt

    write_at, calls = log.write_at, []

    def written(*arguments):
        calls.append(write_at(*arguments))
        monkeypatch.setattr(log.os, "fsync", interrupted)

    monkeypatch.setattr(log.os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(log, "write_at", written)
    with pytest.raises(KeyboardInterrupt):
        editor.learn("b", moved(before, 2))
    monkeypatch.undo()
    assert calls and [edit.name for edit in editor.log] == ["a", "b"]
    after = editor.state()
    editor.close()
    with SequentialEditor.resume(tmp_path / "e", verify=True) as again:
        same_bytes(again.state(), after)


def test_an_act_appends_one_line(tmp_path):
    """What is written for an act does not grow with the sequence."""
    path = tmp_path / "e" / log.LOG_NAME
    with SequentialEditor(make(0), TaskArithmetic(), tmp_path / "e") as editor:
        sizes = [path.stat().st_size]
        for number in range(12):
            begin = path.read_bytes()
            editor.learn(f"d{number:03d}", moved(editor.state(), number))
            content = path.read_bytes()
            assert content.startswith(begin)
            assert content[len(begin) :].count(b"\n") == 1
            sizes.append(len(content))
    grown = {b - a for a, b in zip(sizes[1:], sizes[2:])}
    assert max(grown) - min(grown) < 10


# -- old folders ---------------------------------------------------------------


def old_folder(path, dtype):
    """Write a sequence as format version 1 did; return its last state."""
    (path / "vectors").mkdir(parents=True)
    base = make(0, dtype)
    save_state(base, path / "base.safetensors")
    state, edits = as_state(base), []
    for number, name in enumerate(("de", "gr"), 1):
        tau = TaskVector.between(state, moved(dict(state), number, size=0.01))
        file = f"vectors/{number:04d}-{name}.safetensors"
        tau.save(path / file)
        after = as_state(tau.apply(state, 0.5))
        edits.append(
            {
                "name": name,
                "vector": file,
                "sha256": folder.sha256_of(path / file),
                "encoding": "lossless",
                "scale": 0.5,
                "rule": TaskArithmetic().describe(),
                "learned_on": state.fingerprint,
                "state": after.fingerprint,
                "exact": True,
                "when": "2026-01-01T00:00:00+00:00",
                "selected_on": None,
                "note": "",
            }
        )
        state = after
    content = {
        "format": "speechbrain_taskarith edit log",
        "version": 1,
        "base": {
            "file": "base.safetensors",
            "fingerprint": as_state(base).fingerprint,
            "from": "weights in memory",
        },
        "rule": TaskArithmetic().describe(),
        "schedule": 0.5,
        "encoding": "lossless",
        "include": ["*"],
        "exclude": [],
        "edits": edits,
        "history": [
            {"action": "start", "when": "x"},
            {"action": "learn", "name": "de", "when": "x"},
            {"action": "learn", "name": "gr", "when": "x"},
        ],
    }
    (path / log.OLD_LOG_NAME).write_text(json.dumps(content))
    return state


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_old_folders_still_open(tmp_path, dtype):
    final = old_folder(tmp_path / "e", dtype)
    before = (tmp_path / "e" / log.OLD_LOG_NAME).read_bytes()
    reader = SequentialEditor.resume(tmp_path / "e", read_only=True)
    same_bytes(reader.state(), final)
    assert (tmp_path / "e" / log.OLD_LOG_NAME).read_bytes() == before
    with pytest.raises(FileExistsError, match="resume"):
        SequentialEditor(make(0), TaskArithmetic(), tmp_path / "e")
    with SequentialEditor.resume(tmp_path / "e", verify=True) as editor:
        same_bytes(editor.state(), final)
        # In its own precision to the end: what is logged stays true.
        after = editor.learn("fr", moved(editor.state(), 3, size=0.01))
        assert after["a.weight"].dtype == dtype
        editor.undo("fr")
        same_bytes(editor.state(), final)
        editor.redo()
    assert not (tmp_path / "e" / log.OLD_LOG_NAME).exists()
    with SequentialEditor.resume(tmp_path / "e", verify=True) as editor:
        same_bytes(editor.state(), after)
        assert [edit.name for edit in editor.log] == ["de", "gr", "fr"]
        assert [a["action"] for a in editor.history] == [
            "start",
            *["learn"] * 3,
            "undo",
            "redo",
        ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.pop("history"),
        lambda c: c.pop("base"),
        lambda c: c["base"].pop("fingerprint"),
        lambda c: c.update(edits=[{"name": "x"}]),
        lambda c: c.update(edits=5),
        lambda c: c.update(version=7),
    ],
)
def test_damaged_old_logs_are_named(tmp_path, spoil):
    old_folder(tmp_path / "e", torch.float32)
    path = tmp_path / "e" / log.OLD_LOG_NAME
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=log.OLD_LOG_NAME):
        SequentialEditor.resume(tmp_path / "e")


# -- copies of states ----------------------------------------------------------


@pytest.fixture
def applied(monkeypatch):
    """Count the vectors that are applied."""
    found, apply = [], TaskVector.apply

    def counted(self, *arguments, **more):
        found.append(self)
        return apply(self, *arguments, **more)

    monkeypatch.setattr(TaskVector, "apply", counted)
    return found


def test_opening_and_undoing_the_last_edit_apply_nothing(tmp_path, applied):
    states = sequence(tmp_path / "e", 5)
    applied.clear()
    with SequentialEditor.resume(tmp_path / "e") as editor:
        same_bytes(editor.state(), states[5])
        editor.undo("d4")
        same_bytes(editor.state(), states[4])
        assert not applied
        # Of the next only the base is left, or it is built and kept.
        editor.undo("d3")
        same_bytes(editor.state(), states[3])
        assert len(applied) == 3
        editor.undo("d2")
        same_bytes(editor.state(), states[2])
        assert len(applied) == 3
        editor.redo()
        same_bytes(editor.state(), states[3])
        assert len(applied) == 4


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_number_of_copies_is_bounded(tmp_path, applied, number):
    states = sequence(tmp_path / "e", 6, copies=number)
    kept = list((tmp_path / "e").glob("states/*"))
    assert len(kept) == number
    applied.clear()
    with SequentialEditor.resume(tmp_path / "e") as editor:
        same_bytes(editor.state(), states[6])
        assert len(applied) == (0 if number else 6)
        for last in range(5, -1, -1):
            editor.undo(f"d{last}")
            same_bytes(editor.state(), states[last])
            assert len(list((tmp_path / "e").glob("states/*"))) <= number


@pytest.mark.parametrize(
    "harm", ["flipped", "truncated", "gone", "of another state", "a folder"]
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_is_checked_and_made_again(tmp_path, applied, harm, tied):
    base = make(0)
    if tied:
        base["tied"] = base["a.weight"]
    with SequentialEditor(base, TaskArithmetic(0.5), tmp_path / "e") as editor:
        for number in range(3):
            tuned = moved(editor.state(), number)
            if tied:
                tuned["tied"] = tuned["a.weight"]
            final = editor.learn(f"d{number}", tuned)
    found = sorted((tmp_path / "e" / "states").iterdir())
    assert len(found) == 2
    contents = [path.read_bytes() for path in found]
    for path, other in zip(found, reversed(contents)):
        content = bytearray(path.read_bytes())
        if harm == "flipped":
            content[-3 if path.suffix == ".safetensors" else 700] ^= 4
            path.write_bytes(content)
        elif harm == "truncated":
            path.write_bytes(content[:-20])
        elif harm == "of another state":
            path.write_bytes(other)
        else:
            path.unlink()
            if harm == "a folder":
                path.mkdir()
    with SequentialEditor.resume(tmp_path / "e") as editor:
        same_bytes(editor.state(), final)
        state = editor.state()
        assert (
            not tied or state["tied"].data_ptr() == state["a.weight"].data_ptr()
        )
    # Now it is good again, so that nothing has to be built.
    applied.clear()
    with SequentialEditor.resume(tmp_path / "e") as editor:
        same_bytes(editor.state(), final)
    assert bool(applied) == (harm == "a folder")


def test_a_full_disk_costs_a_copy_only(tmp_path, monkeypatch, caplog):
    def full(state, path):
        raise OSError(
            28, "could not write (No space left on device)", str(path)
        )

    monkeypatch.setattr(copies, "save_state", full)
    states = sequence(tmp_path / "e", 2)
    assert "No space left" in caplog.text
    monkeypatch.undo()
    with SequentialEditor.resume(tmp_path / "e") as editor:
        same_bytes(editor.state(), states[2])
    assert len(list((tmp_path / "e").glob("states/*"))) == 2


# -- undo, redo, encodings -----------------------------------------------------


def test_redo_brings_back_what_was_undone(tmp_path):
    states = sequence(tmp_path / "e", 4)
    with SequentialEditor.resume(tmp_path / "e") as editor:
        with pytest.raises(ValueError, match="nothing was undone"):
            editor.redo()
        editor.undo("d1")
        assert [e.exact for e in editor.log] == [True, False, False]
        middle = editor.state()
        editor.undo("d3")
    # In another process, last undone first.
    with SequentialEditor.resume(tmp_path / "e") as editor:
        assert editor.redo().name == "d3"
        same_bytes(editor.state(), middle)
        assert editor.redo().name == "d1"
        assert [e.name for e in editor.log] == ["d0", "d1", "d2", "d3"]
        assert all(e.exact for e in editor.log)
        same_bytes(editor.state(), states[4])
        editor.undo("d3")
        editor.learn("new", moved(editor.state(), 9))
        with pytest.raises(ValueError, match="nothing was undone"):
            editor.redo()
        files = sorted(p.name for p in (tmp_path / "e/vectors").iterdir())
        assert [f.partition("-")[2] for f in files] == [
            "d0.safetensors",
            "d1.safetensors",
            "d2.safetensors",
            "new.safetensors",
        ]
    SequentialEditor.resume(tmp_path / "e", verify=True).close()


def test_vectors_are_stored_exactly_and_as_small_as_can_be(tmp_path):
    base = make(0, size=40_000)
    files = {}
    for encoding in ("auto", "lossless", "sparse"):
        for density in (0.2, 1.0):
            path = tmp_path / f"{encoding}{density}"
            with SequentialEditor(
                base, TIES(density), path, encoding=encoding
            ) as editor:
                state = editor.learn("a", moved(base, 1))
                size = (path / editor.log[0].vector).stat().st_size
                files[encoding, density] = size, editor.log[0].encoding
                same_bytes(
                    state,
                    TIES(density)(
                        base, [TaskVector.between(base, moved(base, 1))]
                    ),
                )
    for density, best in ((0.2, "sparse"), (1.0, "lossless")):
        auto, other = files["auto", density], files[best, density]
        assert auto[1] == other[1] == best
        assert abs(auto[0] - other[0]) < 100
    assert files["auto", 0.2][0] < 0.4 * files["lossless", 0.2][0]


def test_a_rule_with_a_schedule_by_layer_in_half_precision(tmp_path):
    base = {f"layers.{i}.w": torch.ones(3).half() for i in range(3)}
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    rule = LiNeS(TaskArithmetic(), slope=0.5)
    with SequentialEditor(base, rule, tmp_path / "e") as editor:
        state = editor.learn("a", tuned)
    wide = {name: tensor.float() for name, tensor in base.items()}
    same_bytes(state, rule(wide, [TaskVector.between(wide, tuned)]))
