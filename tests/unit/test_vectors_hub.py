"""Hub names: the hub's cache, its protocol from a server here, no network."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_support import run, run_json
from hub_server import Hub, serving
from hugging_face_toy import save_whisper

from speechbrain_taskarith.utils.hub.download import is_hub_name, local_path
from speechbrain_taskarith.vectors import (
    TaskArithmetic,
    TaskVector,
    merge_checkpoints,
    open_state,
    save_state,
)

NAME = "someone/tiny.en"
ROOT = Path(__file__).resolve().parents[2]
TEXTS = {
    "tokenizer.json": '{"version": "1.0"}',
    "generation_config.json": '{"max_length": 7}',
    "added_tokens.json": "{}",
}


@pytest.fixture
def whisper(tmp_path):
    """Make a Whisper's folder, with what is taken along and what is not."""
    folder = save_whisper(tmp_path / "whisper", "ForConditionalGeneration")
    for file, text in TEXTS.items():
        (folder / file).write_text(text)
    (folder / "README.md").write_text("a card of the old weights")
    (folder / "flax_model.msgpack").write_bytes(b"other weights")
    return folder


@pytest.fixture
def cache(tmp_path, whisper, monkeypatch):
    """Lay it out as the hub's client does: links to files without suffix."""
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc123"
    for folder in (repository / "blobs", snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    for number, file in enumerate(whisper.iterdir()):
        blob = repository / "blobs" / f"blob{number}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def equal(found, wanted):
    assert set(found) == set(wanted)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def test_a_name_and_the_caches_folder_give_the_weights(cache, whisper):
    wanted = open_state(whisper)
    by_name = open_state(NAME)
    equal(by_name, wanted)
    assert by_name.label == NAME and by_name.path.name == "abc123"
    assert by_name.fingerprint == wanted.fingerprint
    equal(open_state(Path(NAME)), wanted)
    equal(open_state(cache / "models--someone--tiny.en"), wanted)


def finetuned(whisper, name, seed):
    """Write the folder's model with a little added to it."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        n: t + 0.01 * torch.randn(t.shape, generator=generator)
        for n, t in open_state(whisper).items()
    }
    return save_state(state, whisper.parent / f"{name}.safetensors")


@pytest.mark.parametrize("way", ["merge", "apply", "python"])
def test_what_is_merged_from_a_name_is_a_whole_folder(cache, whisper, way):
    from transformers import WhisperForConditionalGeneration

    tuned = [finetuned(whisper, name, n) for n, name in enumerate("ab")]
    output = whisper.parent / "merged"
    if way == "python":
        merge_checkpoints(NAME, tuned, TaskArithmetic(scale=0.5), output)
    elif way == "merge":
        words = f"merge --base {NAME} --finetuned {tuned[0]} {tuned[1]}"
        words += f" --rule TaskArithmetic --scale 0.5 -o {output}"
        run(*words.split())
    else:
        words = [str(path.with_name(f"tau_{path.name}")) for path in tuned]
        for path, tau in zip(tuned, words):
            TaskVector.between(NAME, path).save(tau)
        words += ["--scale", "0.5", "-o", str(output)]
        run("apply", NAME, *words)
    base, *both = map(open_state, (whisper, *tuned))
    found = open_state(output)
    for name in base:
        wanted = base[name] + 0.5 * sum(b[name] - base[name] for b in both)
        torch.testing.assert_close(found[name], wanted)
    for file, text in TEXTS.items():
        assert (output / file).read_text() == text
    assert (output / "preprocessor_config.json").exists()
    assert not (output / "flax_model.msgpack").exists()
    if way != "python":
        # The card's front matter names the base as the hub does.
        assert f"base_model: {NAME}" in (output / "README.md").read_text()
    model = WhisperForConditionalGeneration.from_pretrained(output)
    assert torch.equal(
        model.state_dict()["model.encoder.conv1.weight"],
        found["model.encoder.conv1.weight"],
    )


def test_inspect_knows_a_name(cache, capsys):
    [entry] = run_json(capsys, "inspect", NAME)["files"]
    assert entry["form"] == "Hugging Face folder" and entry["path"] == NAME


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("openai/whisper-base", True),
        ("openai/whisper-tiny.en", True),
        ("whisper-base", False),
        ("a/b/c", False),
        ("openai/model.safetensors", False),
        ("openai/model.ckpt", False),
        ("../whisper", False),
        ("./whisper", False),
        ("~/whisper", False),
        ("/openai/whisper", False),
        ("results/misspelt", False),
    ],
)
def test_what_is_a_hub_name(tmp_path, monkeypatch, text, is_name):
    monkeypatch.chdir(tmp_path)
    # A path that is misspelt must not become a download.
    (tmp_path / "results").mkdir()
    assert is_hub_name(text) is is_name
    assert is_hub_name(Path(text)) is is_name or text.startswith("./")
    if not is_name:
        with pytest.raises(FileNotFoundError, match="hub name such as"):
            open_state(text)


def test_without_network_the_error_says_how_to_get_a_folder(cache):
    with pytest.raises(FileNotFoundError, match="someone/else") as error:
        open_state("someone/else")
    assert "hf download someone/else --local-dir" in str(error.value)


def ask(endpoint, home, name, cwd):
    """Ask in a process of its own: the hub's client reads its settings once."""
    code = (
        "import sys; from speechbrain_taskarith.utils.hub.download import "
        "local_path; print(local_path(sys.argv[1]))"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_download_takes_weights_once_and_what_describes_them(
    tmp_path, whisper, form
):
    if form == "bin":
        torch.save(dict(open_state(whisper)), whisper / "pytorch_model.bin")
        (whisper / "model.safetensors").unlink()
    hub = Hub({NAME: {p.name: p.read_bytes() for p in whisper.iterdir()}})
    with serving(hub) as endpoint:
        question = functools.partial(ask, endpoint, tmp_path / "home", NAME)
        first = question(tmp_path)
        assert first.returncode == 0, first.stderr
        folder = Path(first.stdout.strip())
        wanted = {p.name for p in whisper.iterdir()}
        wanted -= {"README.md", "flax_model.msgpack"}
        assert {p.name for p in folder.iterdir()} == wanted
        assert open_state(folder).fingerprint == open_state(whisper).fingerprint
        assert set(hub.downloaded) == wanted
        missing = ask(endpoint, tmp_path / "home", "someone/else", tmp_path)
        assert "someone/else: no such file" in missing.stderr
    # Nobody answers there any more: the cache does.
    again = question(tmp_path)
    assert again.stdout == first.stdout, again.stderr
    refused = ask(endpoint, tmp_path / "home", "someone/else", tmp_path)
    assert "hf download someone/else --local-dir" in refused.stderr


def test_cache_argument(cache, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "other")
    )
    assert local_path(NAME, cache).name == "abc123"
    with pytest.raises(FileNotFoundError):
        local_path(NAME)
