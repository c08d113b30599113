"""Sharing on the hub: what goes up comes down, from a server here."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from cli_support import run, run_json
from hub_server import TOKEN
from hugging_face_toy import save_whisper
from huggingface_hub import constants

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.vectors import (
    ModelCard,
    TaskArithmetic,
    TaskVector,
    merge_checkpoints,
    open_state,
    push_folder,
    save_checkpoint,
    save_state,
)

NAME = "me/shared"
BASE = {"w": torch.zeros(3, 2), "b": torch.ones(2)}


def vector(value=0.5):
    tuned = {"w": torch.full((3, 2), value), "b": torch.ones(2)}
    return TaskVector.between(BASE, tuned)


def same(one, other):
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("large", [1, 1 << 20])
def test_a_vector_comes_back_as_it_went_up(hub, tmp_path, large):
    hub.large = large
    tau = vector()
    card = tau.card(license="mit", language="en", wer={"us": 4.0})
    address = tau.push_to_hub(NAME, card=card, token=TOKEN)
    assert address == f"{hub.endpoint}/{NAME}"
    files = set(hub.repositories[NAME]) - {".gitattributes"}
    assert files == {"README.md", "task_vector.safetensors"}
    found = TaskVector.from_pretrained(NAME)
    same(found, tau)
    assert found.base_fingerprint == tau.base_fingerprint
    same(found.apply(BASE), tau.apply(BASE))
    text = hub.repositories[NAME]["README.md"].decode()
    shown = huggingface_hub.ModelCard(text)
    assert shown.data.license == "mit" and shown.data.language == ["en"]
    content = shown.data.to_dict()["speechbrain_taskarith"]
    path = tmp_path / "stored.safetensors"
    path.write_bytes(hub.repositories[NAME]["task_vector.safetensors"])
    assert content["fingerprint"] == open_state(path).fingerprint


def test_nothing_but_the_vector_is_downloaded_and_pipes_stay_quiet(hub, capfd):
    vector().push_to_hub(NAME, token=TOKEN)
    hub.repositories[NAME]["modeling.py"] = b"raise SystemExit"
    hub.repositories[NAME]["pytorch_model.bin"] = b"a pickle"
    TaskVector.from_pretrained(NAME)
    assert set(hub.downloaded) == {"task_vector.safetensors"}
    assert "%|" not in capfd.readouterr().err


def test_a_folder_here_needs_no_hub(tmp_path):
    tau = vector()
    tau.save(tmp_path / "task_vector.safetensors")
    same(TaskVector.from_pretrained(tmp_path), tau)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TaskVector.from_pretrained(tmp_path / "misspelt")


def test_a_damaged_download_is_refused(hub):
    vector().push_to_hub(NAME, token=TOKEN)
    files = hub.repositories[NAME]
    damaged = bytearray(files["task_vector.safetensors"])
    damaged[-1] ^= 1
    files["task_vector.safetensors"] = bytes(damaged)
    with pytest.raises(ValueError, match="task_vector.safetensors"):
        TaskVector.from_pretrained(NAME)


def test_a_repository_without_a_vector_says_what_to_do(hub):
    hub.repositories[NAME] = {"model.safetensors": b""}
    with pytest.raises(FileNotFoundError, match="open_state"):
        TaskVector.from_pretrained(NAME)
    with pytest.raises(FileNotFoundError, match="me/unknown: no such folder"):
        TaskVector.from_pretrained("me/unknown")


def test_a_filled_repository_is_kept_unless_told(hub):
    first, second = vector(0.5), vector(2.0)
    first.push_to_hub(NAME, token=TOKEN)
    before = dict(hub.repositories[NAME])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        second.push_to_hub(NAME, token=TOKEN)
    assert hub.repositories[NAME] == before
    hub.repositories[NAME]["model-00001-of-00002.safetensors"] = b"old"
    hub.repositories[NAME]["LICENSE"] = b"kept"
    second.push_to_hub(NAME, token=TOKEN, overwrite=True)
    files = set(hub.repositories[NAME]) - {".gitattributes"}
    assert files == {"README.md", "task_vector.safetensors", "LICENSE"}
    same(TaskVector.from_pretrained(NAME), second)


def test_an_empty_repository_may_be_filled(hub):
    # Made on the hub's page, or left by an upload that failed.
    hub.repositories[NAME] = {".gitattributes": b""}
    vector().push_to_hub(NAME, token=TOKEN)
    same(TaskVector.from_pretrained(NAME), vector())


@pytest.mark.parametrize("status", [401, 403])
def test_without_leave_the_error_says_how_to_log_in(hub, status):
    hub.answer_with = status
    with pytest.raises(PermissionError, match=f"{status}.*hf auth login"):
        vector().push_to_hub(NAME, token=TOKEN)
    hub.answer_with = None
    with pytest.raises(PermissionError, match="hf auth login"):
        vector().push_to_hub(NAME, token="hf_of_somebody_else")
    assert hub.repositories == {}


def test_other_answers_of_the_hub_are_told(hub):
    hub.answer_with = 413
    with pytest.raises(OSError, match="refused the upload: .*413"):
        vector().push_to_hub(NAME, token=TOKEN)
    with pytest.raises(ValueError, match="a/b/c"):
        vector().push_to_hub("a/b/c", token=TOKEN)


def test_without_network_nothing_goes_up_and_the_cache_is_read(
    hub, monkeypatch
):
    tau = vector()
    tau.push_to_hub(NAME, token=TOKEN)
    same(TaskVector.from_pretrained(NAME), tau)
    # Nobody listens at this address.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        tau.push_to_hub(NAME, token=TOKEN)
    same(TaskVector.from_pretrained(NAME), tau)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        tau.push_to_hub(NAME, token=TOKEN)
    same(TaskVector.from_pretrained(NAME), tau)
    with pytest.raises(FileNotFoundError, match="without network"):
        TaskVector.from_pretrained("me/never_asked_for")


def test_a_merged_whisper_goes_up_whole_and_loads(hub, tmp_path):
    from transformers import WhisperForConditionalGeneration

    base = save_whisper(tmp_path / "base", "ForConditionalGeneration")
    tuned = {n: t + 0.25 for n, t in open_state(base).items()}
    tuned = save_state(tuned, tmp_path / "tuned.safetensors")
    merged = tmp_path / "merged"
    report = merge_checkpoints(base, [tuned], TaskArithmetic(0.5), merged)
    with pytest.raises(FileNotFoundError, match="README.md: no such card"):
        push_folder(merged, NAME, token=TOKEN)
    ModelCard(
        "Merged", parents=[{"role": "base", "path": "openai/whisper-tiny"}],
        rule=report.rule, fingerprint=report.fingerprint,
    ).save(merged)  # fmt: skip
    (merged / "checkpoint-5").mkdir()
    for name in (
        "optimizer.log", "optimizer.pt", "checkpoint-5/model.safetensors",
    ):  # fmt: skip
        (merged / name).write_text("not to be shared")
    push_folder(merged, NAME, token=TOKEN)
    assert set(hub.repositories[NAME]) - {".gitattributes"} == {
        path.name for path in merged.iterdir()
    } - {"optimizer.log", "optimizer.pt", "checkpoint-5"}
    # By the plugin's reader, and by transformers.
    assert open_state(NAME).fingerprint == report.fingerprint
    model = WhisperForConditionalGeneration.from_pretrained(NAME)
    wanted = open_state(merged)["model.encoder.conv1.weight"]
    assert torch.equal(model.state_dict()["model.encoder.conv1.weight"], wanted)


def test_a_speechbrain_folder_goes_up_with_its_card(hub, tmp_path):
    folder = tmp_path / "CKPT+merged"
    save_checkpoint({"model": BASE}, folder, card=ModelCard("Merged"))
    push_folder(folder, NAME, token=TOKEN)
    files = set(hub.repositories[NAME]) - {".gitattributes"}
    assert files == {"README.md", "CKPT.yaml", "model.ckpt"}


def test_what_is_no_model_is_not_uploaded(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        push_folder(tmp_path / "missing", NAME, token=TOKEN)
    ModelCard().save(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        push_folder(tmp_path, NAME, token=TOKEN)
    assert hub.repositories == {}


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_what_lacks_for_an_upload_is_said_before(tmp_path, capsys, more):
    words = ["push", str(tmp_path / "model"), NAME, *more]
    for said in ("no such folder", "no such card", "no weights to upload"):
        assert main(words) == 1
        assert said in capsys.readouterr().err
        (tmp_path / "model").mkdir(exist_ok=True)
        if "card" in said:
            ModelCard().save(tmp_path / "model")


@pytest.mark.parametrize("name", ["badname", "a/b/c d", "me/"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_name_that_no_repository_has(tmp_path, capsys, name, more):
    assert main(["push", str(tmp_path), name, *more]) == 1
    said = capsys.readouterr().err
    assert f"{name!r}: expected OWNER/NAME on the hub" in said


def test_a_shared_pickle_runs_nothing(hub, tmp_path):
    """A vector's file that is a pickle is refused, its code not called."""
    mark = tmp_path / "called"
    code = (
        "import pickle, sys\n"
        "class Call:\n"
        "    def __reduce__(self):\n"
        "        return open, (sys.argv[1], 'w')\n"
        "sys.stdout.buffer.write(pickle.dumps(Call()))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, str(mark)],
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    hub.repositories[NAME] = {"task_vector.safetensors": made.stdout}
    with pytest.raises(ValueError, match="task_vector.safetensors"):
        TaskVector.from_pretrained(NAME)
    assert not mark.exists()


def test_the_command_uploads_what_it_says(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    base = save_whisper(tmp_path / "base", "ForConditionalGeneration")
    run("vector", base, base, "-o", tmp_path / "tau.safetensors")
    run("apply", base, tmp_path / "tau.safetensors", "-o", tmp_path / "edited")
    (tmp_path / "edited" / "notes.py").write_text("mine")
    (tmp_path / "edited" / "save").mkdir()
    (tmp_path / "edited" / "save" / "model.ckpt").write_text("of a training")
    capsys.readouterr()
    words = ("push", str(tmp_path / "edited"), NAME)
    planned = run_json(capsys, *words, "--dry-run")
    assert hub.repositories == {}
    done = run_json(capsys, *words)
    assert done["address"] == f"{hub.endpoint}/{NAME}"
    files = set(hub.repositories[NAME]) - {".gitattributes"}
    assert files == set(planned["files"]) == set(done["files"])
    assert "notes.py" not in files and "model.safetensors" in files
    assert main(list(words)) == 1
    assert "; --overwrite replaces its weights" in capsys.readouterr().err


def page_blocks():
    """Return the blocks of docs/sharing.md that need an account."""
    page = Path(__file__).parents[2] / "docs" / "sharing.md"
    text = page.read_text(encoding="utf-8")
    return re.findall(r"<!-- not run: [^\n]*-->\n```\w+\n(.*?)```", text, re.S)


@pytest.fixture
def whisper(tmp_path, monkeypatch):
    """A base and what was tuned from it, under the page's names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    base = tmp_path / "openai" / "whisper-tiny"
    save_whisper(base, "ForConditionalGeneration")
    tuned = {name: t + 0.25 for name, t in open_state(base).items()}
    save_checkpoint({"model": tuned}, "results/us/save/CKPT+us")
    return base


def test_the_pages_vector_goes_up_and_comes_back(hub, whisper):
    python, _ = page_blocks()
    names = {"TaskVector": TaskVector}
    exec(compile(python, "docs/sharing.md", "exec"), names)
    assert "me/whisper-tiny-us" in hub.repositories
    for name, before in open_state(whisper).items():
        # bf16 holds 0.25, and float32 rounds the sum.
        torch.testing.assert_close(names["edited"][name], before + 0.1)


def test_the_pages_model_goes_up(hub, whisper, capsys):
    _, shell = page_blocks()
    Path("merge.yaml").write_text(
        "base: openai/whisper-tiny\nfinetuned: [results/us/save]\n"
        "rule: {name: TaskArithmetic}\nscale: 0.5\n"
    )
    merge, plan, push = shell.splitlines()
    run(*shlex.split(merge)[1:])
    run(*shlex.split(plan)[1:])
    assert hub.repositories == {}
    run(*shlex.split(push)[1:])
    there = open_state("me/whisper-merged")
    for name, before in open_state(whisper).items():
        torch.testing.assert_close(there[name], before + 0.125)
