"""Writing atomically: links, errors, what killed processes leave."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from speechbrain_taskarith.utils import files
from speechbrain_taskarith.utils.files import (
    TEMPORARY_PREFIX,
    atomic_folder,
    atomic_write,
    read_json,
    remove_leftovers,
    temporary_file,
    temporary_path,
    write_json,
)
from speechbrain_taskarith.vectors import (
    TaskVector,
    open_state,
    save_checkpoint,
    save_state,
)

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3)}
OLD = {"w": torch.zeros(2, 3)}


def write_text(path):
    with atomic_write(path, "w") as stream:
        stream.write("new")


def write_folder(path):
    with atomic_folder(path) as folder:
        (folder / "x").write_text("new")


WRITERS = {
    "text": (write_text, "note.txt"),
    "json": (lambda path: write_json(path, [1]), "note.json"),
    "folder": (write_folder, "folder"),
    "safetensors": (lambda path: save_state(WEIGHTS, path), "w.safetensors"),
    "torch": (lambda path: save_state(WEIGHTS, path), "w.ckpt"),
    "hugging face": (lambda path: save_state(WEIGHTS, path), "hf"),
    "speechbrain": (
        lambda path: save_checkpoint({"model": WEIGHTS}, path),
        "CKPT+x",
    ),
    "vector": (
        lambda path: TaskVector.between(OLD, WEIGHTS).save(path),
        "v.safetensors",
    ),
}


def content(path):
    """All bytes under a path, without what a date or a name changes."""
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.suffix != ".yaml")
        return {str(p.relative_to(path)): p.read_bytes() for p in names}
    return path.read_bytes()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("there", ["old", "nothing"])
def test_links_are_followed(tmp_path, writer, there):
    write, name = WRITERS[writer]
    (tmp_path / "links").mkdir()
    (tmp_path / "store").mkdir()
    direct = tmp_path / name
    write(direct)
    target, link = tmp_path / "store" / name, tmp_path / "links" / name
    if there == "old":
        write(target)
        victim = target
        if target.is_dir():
            victim = next(p for p in target.rglob("*") if p.is_file())
        victim.write_bytes(b"old")
    # Relative, and by a second link.
    (tmp_path / "links" / "second").symlink_to(f"../store/{name}")
    link.symlink_to("second")
    write(link)
    assert link.is_symlink() and not target.is_symlink()
    if writer != "torch":  # torch's zip holds the file's name
        assert content(target) == content(direct)
    else:
        assert torch.equal(open_state(target)["w"], WEIGHTS["w"])
    # Nothing is left beside either.
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == [name]
    assert len(list((tmp_path / "links").iterdir())) == 2


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_to_itself_is_an_error_that_names_it(tmp_path, writer):
    write, name = WRITERS[writer]
    (tmp_path / name).symlink_to(name)
    with pytest.raises(OSError, match="leads to itself") as caught:
        write(tmp_path / name)
    assert caught.value.filename == str(tmp_path / name)


def in_child(work):
    """Run in a forked child; return the text it gives back."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.parametrize("writer", WRITERS)
def test_write_errors_name_the_output(tmp_path, writer):
    write, name = WRITERS[writer]
    write(tmp_path / name)
    before = content(tmp_path / name)

    def full():
        # As a full disk: no file may grow.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
        try:
            write(tmp_path / name)
        except OSError as error:
            return f"{error.filename}|{error}"
        return "no error"

    file, _, text = in_child(full).partition("|")
    assert file == str(tmp_path / name), text
    assert TEMPORARY_PREFIX not in text
    assert text.lower().count("nothing under this name was changed") == 1
    assert content(tmp_path / name) == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_is_no_folder_is_named_with_the_output(tmp_path, writer):
    write, name = WRITERS[writer]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file") as caught:
        write(tmp_path / "file" / name)
    assert caught.value.filename == str(tmp_path / "file" / name)


def test_the_error_of_a_source_keeps_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        with atomic_folder(tmp_path / "out"):
            open(tmp_path / "source")
    assert caught.value.filename == str(tmp_path / "source")


@pytest.mark.parametrize(
    "text",
    [b"\xff{}", b"{", b"[" * 100_000, b'{"a": ' * 100_000, b"1" * 5000, b""],
)
def test_unreadable_json_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="x.json"):
        read_json(path)


# -- left-overs ----------------------------------------------------------------

# Starts writing a file and a folder, says so, and waits.
WAITING = """
import sys, time
from speechbrain_taskarith.utils.files import atomic_folder, atomic_write
with atomic_write(sys.argv[1] + "/a.txt", "w") as one:
    with atomic_folder(sys.argv[1] + "/folder") as folder:
        (folder / "x").write_text("half")
        print("ready", flush=True)
        time.sleep(600)
"""


def leftovers(folder):
    return sorted(p.name for p in folder.glob(TEMPORARY_PREFIX + "*"))


def test_left_overs_of_the_killed_go_those_of_the_living_stay(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        alive = leftovers(tmp_path)
        assert len(alive) == 2
        # A second process writes to the folder meanwhile.
        assert in_child(lambda: write_text(tmp_path / "b.txt") or "done")
        assert leftovers(tmp_path) == alive
    finally:
        child.kill()
        # Killed and not yet waited for: it has ended all the same.
        while remove := leftovers(tmp_path):
            time.sleep(0.01)
            in_child(lambda: write_text(tmp_path / "c.txt") or "done")
            assert len(remove) <= 2
        child.wait()
        child.stdout.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.txt", "c.txt"]


def renamed(path, **parts):
    """Give a temporary file another owner."""
    found = files._OWNER.match(path.name)
    system, process, started = found.groups()
    system = parts.get("system", system)
    process = parts.get("process", process)
    started = parts.get("started", started)
    name = f"{TEMPORARY_PREFIX}{system}-{process}-{started}-00000000.ckpt"
    return path.rename(path.with_name(name))


@pytest.mark.parametrize(
    "owner, age, stays",
    [
        ({}, 0, True),
        # Its number was given to another process.
        ({"started": "1"}, 0, False),
        ({"process": str(2**22 + 5)}, 0, False),
        ({"process": "9" * 30}, 0, True),
        # Of another machine of a shared file system.
        ({"system": "ffffffff"}, 0, True),
        ({"system": "ffffffff"}, 49 * 3600, False),
    ],
)
def test_whose_left_overs_go(tmp_path, owner, age, stays):
    descriptor, path = temporary_file(tmp_path / "x.ckpt")
    os.close(descriptor)
    path = renamed(path, **owner)
    os.utime(path, (time.time() - age,) * 2)
    remove_leftovers(tmp_path, shared=True)
    assert path.exists() == stays


def test_an_old_folder_in_use_on_another_machine_stays(tmp_path):
    folder = tmp_path / f"{TEMPORARY_PREFIX}abc"
    folder.mkdir()
    (folder / "growing").write_text("x")
    os.utime(folder, (0, 0))
    remove_leftovers(tmp_path, shared=True)
    assert folder.exists()
    os.utime(folder / "growing", (0, 0))
    os.utime(folder, (0, 0))
    assert remove_leftovers(tmp_path, shared=True) == [folder.name]
    assert not folder.exists()


def test_a_folder_is_swept_once_a_process(tmp_path, monkeypatch):
    """Thousands of files in one folder must not cost thousands of listings."""
    swept = []
    monkeypatch.setattr(
        files, "remove_leftovers", lambda folder, shared: swept.append(folder)
    )
    for number in range(3):
        temporary_path(tmp_path / f"{number}.wav")
    assert swept == [str(tmp_path)]


def test_what_a_link_among_left_overs_points_to_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("keep")
    (tmp_path / f"{TEMPORARY_PREFIX}link").symlink_to("real")
    remove_leftovers(tmp_path)
    assert not leftovers(tmp_path)
    assert json.dumps((tmp_path / "real" / "x").read_text()) == '"keep"'
