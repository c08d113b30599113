"""Hub names: the hub's cache, its protocol from a server here, no network."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cli_support import run, run_json
from hugging_face_toy import save_whisper

from speechbrain_taskarith.utils.optional import is_hub_name, local_path
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


def serve(folder):
    """Serve a folder as the hub does: its API, and files by commit."""
    commit = "0" * 40
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def reply(self, status, body, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            files = sorted(p.name for p in folder.iterdir())
            if path.startswith(f"/api/models/{NAME}"):
                siblings = [{"rfilename": name} for name in files]
                body = {"id": NAME, "sha": commit, "siblings": siblings}
                tree = [
                    {"type": "file", "path": n, "size": 1, "oid": "0" * 40}
                    for n in files
                ]
                content = tree if "/tree/" in path else body
                content = json.dumps(content).encode()
                return self.reply(200, content, Content_Type="application/json")
            file = folder / Path(path).name
            if path.startswith(f"/{NAME}/resolve/") and file.exists():
                asked.append(file.name)
                body = file.read_bytes()
                etag = hashlib.sha256(body).hexdigest()
                return self.reply(
                    200, body, ETag=f'"{etag}"', X_Repo_Commit=commit
                )
            return self.reply(404, b"", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, asked


@contextlib.contextmanager
def served(folder):
    server, asked = serve(folder)
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def ask(endpoint, home, name, cwd):
    """Ask in a process of its own: the hub's client reads its settings once."""
    code = (
        "import sys; from speechbrain_taskarith.utils.optional import "
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
    with served(whisper) as (endpoint, asked):
        question = functools.partial(ask, endpoint, tmp_path / "home", NAME)
        first = question(tmp_path)
        assert first.returncode == 0, first.stderr
        folder = Path(first.stdout.strip())
        wanted = {p.name for p in whisper.iterdir()}
        wanted -= {"README.md", "flax_model.msgpack"}
        assert {p.name for p in folder.iterdir()} == wanted
        assert open_state(folder).fingerprint == open_state(whisper).fingerprint
        assert set(asked) == wanted
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
