"""The merge engine and bad input: a clear error, and nothing written."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechbrain_taskarith.vectors import (
    TIES,
    ModelStock,
    TaskArithmetic,
    TaskVector,
    merge_checkpoints,
    open_state,
    save_state,
)
from speechbrain_taskarith.vectors.engine import streaming
from speechbrain_taskarith.vectors.engine.workspace import Place
from speechbrain_taskarith.vectors.states import safetensors as safetensors_file


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {
        "enc.w": torch.randn(30, 20, generator=generator),
        "dec.w": torch.randn(20, generator=generator),
        "steps": torch.tensor(3),
    }
    save_file(base, tmp_path / "base.safetensors")
    for index in range(2):
        tuned = {
            n: v + torch.randn(v.shape, generator=generator)
            if v.is_floating_point()
            else v
            for n, v in base.items()
        }
        save_file(tuned, tmp_path / f"t{index}.safetensors")
    return tmp_path


def change(path, **tensors):
    content = load_file(path)
    content.update(tensors)
    save_file({n: v for n, v in content.items() if v is not None}, path)


@pytest.fixture(params=[TaskArithmetic(0.5), TIES()], ids=["sum", "ties"])
def fails(request, folder):
    """Merging must fail with this error and leave things as they were."""

    def check(error, match, **arguments):
        out = folder / "out.safetensors"
        out.write_bytes(b"what stood here before")
        before = sorted(os.listdir(folder))
        arguments = {
            "base": folder / "base.safetensors",
            "finetuned": [folder / f"t{i}.safetensors" for i in range(2)],
            "rule": request.param,
            "output": out,
            **arguments,
        }
        with pytest.raises(error, match=match) as caught:
            merge_checkpoints(**arguments)
        assert out.read_bytes() == b"what stood here before"
        assert sorted(os.listdir(folder)) == before
        return str(caught.value)

    return check


def test_keys_that_differ(fails, folder):
    change(folder / "t1.safetensors", **{"dec.w": None})
    text = fails(KeyError, "dec.w")
    assert "base.safetensors" in text
    change(folder / "t1.safetensors", **{"dec.w": torch.zeros(20)})
    change(folder / "t1.safetensors", extra=torch.zeros(2))
    text = fails(KeyError, "extra")
    assert "t1.safetensors" in text


def test_shapes_that_differ(fails, folder):
    change(folder / "t0.safetensors", **{"dec.w": torch.zeros(21)})
    text = fails(ValueError, r"\(21,\).*\(20,\)")
    assert "t0.safetensors" in text and "align_vocabulary" in text


def test_integers_against_floating_point(fails, folder):
    change(folder / "t0.safetensors", **{"dec.w": torch.zeros(20).int()})
    text = fails(ValueError, "'dec.w' is of type I32")
    assert "t0.safetensors" in text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("file", ["t1.safetensors", "base.safetensors"])
def test_nan_and_infinity(fails, folder, bad, file):
    tensor = load_file(folder / file)["enc.w"]
    tensor[4, 5] = bad
    change(folder / file, **{"enc.w": tensor})
    text = fails(ValueError, "'enc.w' holds NaN or infinity.*element 85")
    assert file in text


def test_nan_for_rules_that_look_at_angles(folder, fails):
    change(folder / "t1.safetensors", **{"dec.w": torch.full((20,), 2e38)})
    change(folder / "base.safetensors", **{"dec.w": torch.full((20,), -2e38)})
    fails(ValueError, "'dec.w' differs.*float32", rule=ModelStock())


def test_truncated_file(fails, folder):
    path = folder / "t1.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert "t1.safetensors" in fails(ValueError, "truncated")


def test_altered_file_of_ours(fails, folder):
    path = folder / "t1.safetensors"
    save_state(load_file(path), path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "t1.safetensors" in fails(ValueError, "altered")


def test_altered_task_vector(fails, folder):
    tau = TaskVector.between(
        folder / "base.safetensors", folder / "t0.safetensors"
    )
    for encoding in ("lossless", "sparse"):
        path = folder / "tau.safetensors"
        tau.save(path, encoding=encoding)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        fails(ValueError, "tau.safetensors", finetuned=[path])


def test_pickle_that_runs_code(fails, folder):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'exploded'}",)

    torch.save({"enc.w": Bomb()}, folder / "t0.ckpt")
    fails(ValueError, "t0.ckpt", finetuned=[folder / "t0.ckpt"])
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"finetuned": []}, ValueError, "nothing to merge"),
        ({"include": ["encoder.*"]}, ValueError, "encoder"),
        ({"exclude": ["enc.w", "dec.w"]}, ValueError, "no floating point"),
        ({"buffers": "both"}, ValueError, "buffers='both'"),
        ({"threads": 0}, ValueError, "threads=0"),
        ({"chunk": 0}, ValueError, "chunk=0"),
        ({"chunk": "1k"}, ValueError, "chunk='1k'"),
        ({"memory_limit": "lots"}, ValueError, "memory_limit: 'lots'.*300MB"),
        ({"memory_limit": [1]}, ValueError, r"memory_limit=\[1\]"),
        ({"metadata": {"n": object()}}, ValueError, "metadata.n: a object"),
        ({"metadata": {"merge": "x"}}, ValueError, "'merge'.*choose another"),
        ({"metadata": {"format": "x"}}, ValueError, "'format'.*choose another"),
        ({"rule": ModelStock(), "finetuned": None}, ValueError, "at least 2"),
        ({"rule": TIES(scale={"x.*": 1.0})}, ValueError, r"x\.\*"),
        ({"output": "model.onnx"}, ValueError, "unknown suffix"),
        ({"base": "nowhere.safetensors"}, FileNotFoundError, "nowhere"),
    ],
)
def test_wrong_arguments(fails, folder, arguments, error, match):
    if arguments.get("finetuned", 0) is None:
        arguments = {**arguments, "finetuned": [folder / "t0.safetensors"]}
    fails(error, match, **arguments)


def test_an_output_that_is_an_input(fails, folder):
    base, first = folder / "base.safetensors", folder / "t0.safetensors"
    tau = TaskVector.between(base, first).save(
        folder / "tau.safetensors", encoding="int8"
    )
    link = folder / "link.safetensors"
    link.symlink_to(base)
    for output in (base, first, tau, link):
        before = output.read_bytes()
        fails(ValueError, "an input", finetuned=[first, tau], output=output)
        assert output.read_bytes() == before


@pytest.mark.parametrize("fingerprint", [True, False])
def test_metadata_that_are_no_texts_are_kept(folder, fingerprint):
    out = folder / "out.safetensors"
    merge_checkpoints(
        folder / "base.safetensors",
        folder / "t0.safetensors",
        TIES(),
        out,
        metadata={"n": 3, "from": "a"},
        memory_limit="10MB",
        fingerprint=fingerprint,
    )
    found = open_state(out).metadata
    assert (found["n"], found["from"]) == ("3", "a")


def test_full_disk_at_the_start(fails, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_file, "_allocate", full)
    text = fails(OSError, "No space left")
    assert "out.safetensors" in text and "nothing" in text


def test_full_disk_on_the_way(fails, monkeypatch):
    def full(descriptor, data, offset):
        if offset > 500:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.pwrite(descriptor, data, offset)

    monkeypatch.setattr(safetensors_file, "write_at", full)
    assert "out.safetensors" in fails(OSError, "No space left")


def test_real_full_disk(fails, folder):
    """A real limit of the system: files may not grow past some size."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        fails(OSError, "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_an_error_in_a_thread_stops_all(folder, monkeypatch):
    """The first failure ends the pass: no thread works on in vain."""
    rule, seen = TaskArithmetic(), []
    original = TaskArithmetic.merge

    def failing(self, vectors, place, work, weights):
        seen.append(place)
        if len(seen) == 3:
            raise RuntimeError("a fault")
        return original(self, vectors, place, work, weights)

    monkeypatch.setattr(TaskArithmetic, "merge", failing)
    with pytest.raises(RuntimeError, match="a fault"):
        merge_checkpoints(
            folder / "base.safetensors",
            [folder / "t0.safetensors"],
            rule,
            folder / "out.safetensors",
            chunk=1,
            threads=3,
        )
    assert len(seen) < 10
    assert not [p for p in os.listdir(folder) if p.startswith(".partial")]


def test_an_interrupt_stops_all_threads(monkeypatch):
    """Ctrl-C ends the pass: the threads do not go on to its last item."""

    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "wait", interrupted)
    places, seen = [Place(i, "w", (1,), 0, 1) for i in range(300)], []

    def slow(place, work):
        seen.append(place)
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        streaming.Passes(threads=2).run(slow, places)
    assert len(seen) < len(places)


def test_killed_merges_leave_the_old_output(folder):
    """kill -9 at any moment: the old file or the new one, whole."""
    out = folder / "out.safetensors"
    arguments = [str(folder / f) for f in
                 ("base.safetensors", "t0.safetensors", "t1.safetensors")]  # fmt: skip
    script = (
        "import sys\n"
        "from speechbrain_taskarith.vectors import merge_checkpoints, TIES\n"
        "base, one, two, out = sys.argv[1:]\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    merge_checkpoints(base, [one, two], TIES(), out, chunk=50)\n"
    )
    merge_checkpoints(arguments[0], arguments[1:], TIES(), out)
    whole = out.read_bytes()
    for delay in (0.0, 0.003, 0.01, 0.017, 0.03):
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments, str(out)],
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        assert out.read_bytes() == whole


@pytest.mark.parametrize("threads", [0, -1, 1025, 99_999_999_999, 1.5, "2"])
def test_a_senseless_number_of_threads(fails, threads):
    fails(ValueError, "threads", threads=threads)
