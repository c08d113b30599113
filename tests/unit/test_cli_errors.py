"""Bad input to the command line: one line that helps, and nothing changed."""

import io
from pathlib import Path

import pytest
import torch
from cli_support import fails, make_models, make_vectors, weights

from speechbrain_taskarith.commands.output import Result, show
from speechbrain_taskarith.vectors import save_state


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a base and two fine-tuned models, as the present one."""
    monkeypatch.chdir(tmp_path)
    make_models()
    return tmp_path


BAD = {
    "missing file": (
        ("vector", "none.ckpt", "us.ckpt", "-o", "x.safetensors"),
        ["none.ckpt", "no such file or folder"],
    ),
    "other suffix": (
        ("vector", "base.ckpt", "us.ckpt", "-o", "x.ckpt"),
        ["x.ckpt", ".safetensors"],
    ),
    "pattern that matches nothing": (
        ("vector", "base.ckpt", "us.ckpt", "-o", "x.safetensors")
        + ("--include", "decoder.*"),
        ["decoder.*", "matches no"],
    ),
    "other names": (
        ("vector", "base.ckpt", "other.ckpt", "-o", "x.safetensors"),
        ["other.ckpt", "head.weight", "--not-strict"],
    ),
    "NaN": (
        ("vector", "base.ckpt", "nan.ckpt", "-o", "x.safetensors"),
        ["nan.ckpt", "ctc.bias", "NaN"],
    ),
    "truncated": (
        ("vector", "base.ckpt", "cut.ckpt", "-o", "x.safetensors"),
        ["cut.ckpt", "truncated"],
    ),
    "code in a pickle": (
        ("vector", "base.ckpt", "code.ckpt", "-o", "x.safetensors"),
        ["code.ckpt", "refused"],
    ),
    "weights for a vector": (
        ("apply", "base.ckpt", "plain.safetensors", "-o", "x.ckpt"),
        ["plain.safetensors", "no task vector"],
    ),
    "altered vector": (
        ("apply", "base.ckpt", "altered.safetensors", "-o", "x.ckpt"),
        ["altered.safetensors", "altered"],
    ),
    "another base": (
        ("apply", "us.ckpt", "us.safetensors", "-o", "x.ckpt"),
        ["us.ckpt", "not the base", "--any-base"],
    ),
    "scale out of the numbers": (
        ("apply", "base.ckpt", "us.safetensors", "-o", "x.ckpt")
        + ("--scale", "nan"),
        ["scale", "finite"],
    ),
    "scale that is no number": (
        ("apply", "base.ckpt", "us.safetensors", "-o", "x.ckpt")
        + ("--scale", "much"),
        ["'much'", "expected a number"],
    ),
    "scale of a pattern that matches nothing": (
        ("apply", "base.ckpt", "us.safetensors", "-o", "x.ckpt")
        + ("--scale", "decoder.*=0.1"),
        ["decoder.*", "matches no"],
    ),
    "unknown rule": (
        ("apply", "base.ckpt", "us.safetensors", "-o", "x.ckpt")
        + ("--rule", "TEIS"),
        ["'TEIS'", "Did you mean TIES?"],
    ),
    "unknown argument of a rule": (
        ("apply", "base.ckpt", "us.safetensors", "-o", "x.ckpt")
        + ("--rule", "TIES", "dense=0.2"),
        ["TIES", "'dense'", "density"],
    ),
    "density out of range": (
        ("apply", "base.ckpt", "us.safetensors", "-o", "x.ckpt")
        + ("--rule", "TIES", "density=20"),
        ["density=20", "[0, 1]"],
    ),
    "unknown form": (
        ("apply", "base.ckpt", "us.safetensors", "-o", "x.onnx"),
        ["x.onnx", "suffix"],
    ),
    "names of plots": (
        ("plot", "cosine", "us.safetensors", "-o", "x.jpg"),
        ["x.jpg", ".png"],
    ),
    "unequal number of names": (
        ("plot", "cosine", "us.safetensors", "-o", "x.png")
        + ("--names", "a", "b"),
        ["2 names for 1"],
    ),
    "nothing to look at": (("inspect", "none"), ["none", "no such"]),
}


@pytest.mark.parametrize("words, said", BAD.values(), ids=BAD)
def test_bad_input_names_file_and_remedy(folder, capsys, words, said):
    make_vectors()
    torch.save({**weights(), "head.weight": torch.ones(1)}, "other.ckpt")
    bad = weights()
    bad["ctc.bias"][2] = float("nan")
    torch.save(bad, "nan.ckpt")
    Path("cut.ckpt").write_bytes(Path("us.ckpt").read_bytes()[:900])
    torch.save({"w": torch.ones(1), "f": print}, "code.ckpt")
    save_state(weights(), "plain.safetensors")
    content = bytearray(Path("us.safetensors").read_bytes())
    content[-1] ^= 1
    Path("altered.safetensors").write_bytes(content)
    line = fails(capsys, *words)
    for piece in said:
        assert piece in line, line


def test_a_stream_of_another_encoding_takes_every_line(monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="cp1252")
    monkeypatch.setattr("sys.stdout", stream)
    show(Result(lines=["dobrý den", "děkuji"]), as_json=False)
    assert raw.getvalue().decode("cp1252").split() == [
        *("dobrý", "den"),
        "d\\u011bkuji",
    ]
