"""What the tests of the command line share: models, and ways to run it."""

import json
from pathlib import Path

import torch

from speechbrain_taskarith.__main__ import main


def weights(shift=0.0, seed=None):
    """Weights with an integer buffer, running statistics and two layers."""
    made = torch.Generator().manual_seed(7)
    state = {
        "encoder.layers.0.weight": torch.randn(4, 3, generator=made),
        "encoder.layers.1.weight": torch.randn(4, 4, generator=made),
        "encoder.norm.running_var": torch.rand(4, generator=made) + 0.5,
        "ctc.bias": torch.randn(5, generator=made),
        "ctc.steps": torch.tensor(3),
    }
    if seed is not None:
        noise = torch.Generator().manual_seed(seed)
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor += torch.randn(tensor.shape, generator=noise).abs() / 9
    return {n: t + shift if t.ndim == 2 else t for n, t in state.items()}


def make_models():
    """Save a base and two fine-tuned models in the present folder."""
    torch.save(weights(), "base.ckpt")
    torch.save(weights(seed=1), "us.ckpt")
    torch.save(weights(seed=2), "de.ckpt")


def there(folder):
    """Return every file of a folder with its bytes."""
    checkout = Path(folder, "setup.cfg").exists()
    assert not checkout, "change into a folder of the test's own first"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def run(*words):
    """Run a command that has to succeed."""
    assert main([str(word) for word in words]) == 0


def run_json(capsys, *words):
    """Run a command with --json; stdout must be that and nothing else."""
    capsys.readouterr()
    run(*words, "--json")
    return json.loads(capsys.readouterr().out)


def fails(capsys, *words):
    """Run a command that has to fail; return its one line."""
    capsys.readouterr()
    before = there(".")
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("taskarith: error: ")
    assert there(".") == before, "something was written or changed"
    return lines[0]


def make_vectors():
    run("vector", "base.ckpt", "us.ckpt", "-o", "us.safetensors")
    run("vector", "base.ckpt", "de.ckpt", "-o", "de.safetensors")
