"""The merge files in examples/ merge models of the names they give."""

from pathlib import Path

import pytest
import torch
import yaml

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.vectors import open_state, save_state

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "merge"
FILES = sorted(FOLDER.glob("*.yaml"))


def make_models(plan, folder):
    """Save a base and fine-tuned models where a merge file looks for them."""
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(8, 8, generator=generator)
        for name in ("encoder.conv1.weight", "encoder.0.weight", "out.weight")
    }
    models = {plan["base"]: base}
    for path in plan["finetuned"]:
        models[path] = {
            name: weight + 0.1 * torch.randn(8, 8, generator=generator)
            for name, weight in base.items()
        }
    for path, weights in models.items():
        if not Path(path).suffix:  # a Hugging Face folder
            (folder / path).mkdir()
            (folder / path / "config.json").write_text("{}")
            path += "/model.safetensors"
        save_state(weights, folder / path)
    return models


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_example_merges(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = yaml.safe_load(path.read_text("utf-8"))
    base = make_models(plan, tmp_path)[plan["base"]]
    assert main(["merge", str(path)]) == 0
    merged = open_state(plan["output"])
    moved = {
        name
        for name, weight in base.items()
        if not torch.equal(torch.as_tensor(merged[name]), weight)
    }
    expected = set(base)
    if path.stem == "ties":
        expected = {"encoder.conv1.weight", "encoder.0.weight"}
    if path.stem == "whisper":
        expected = {"encoder.0.weight", "out.weight"}
    assert moved == expected


def test_every_example_is_in_the_list():
    page = (FOLDER.parent / "README.md").read_text("utf-8")
    assert FILES
    assert [p.name for p in FILES if f"merge/{p.name}" not in page] == []
