"""Model cards: complete, readable, and safe to print."""

import json

import pytest
import torch
import yaml

from speechbrain_taskarith.vectors import (
    TIES,
    ModelCard,
    TaskVector,
    as_state,
    save_state,
)


def card(**fields):
    base = as_state({"w": torch.zeros(2)})
    tau = TaskVector.between(base, {"w": torch.ones(2)})
    given = {
        "title": "Merged",
        "parents": [
            ModelCard.parent("base", base),
            ModelCard.parent("vector", tau),
        ],
        "rule": TIES(density=0.5, scale=0.6),
        "scale": {"encoder.*": 0.2, "*": 0.1},
        "wer": [
            {"row": "baseline", "wer": 12.3456, "split": "test"},
            {"row": "edited", "wer": 10.0, "split": "test", "oracle": False},
        ],
        "selected_on": "synthetic_target",
        "fingerprint": "f" * 64,
        "notes": ["Made for a test."],
    }
    return ModelCard(**{**given, **fields}), base, tau


def test_everything_is_in_both_forms(tmp_path):
    made, base, tau = card()
    paths = made.save(tmp_path / "merged.safetensors")
    assert [p.name for p in paths] == [
        "merged.safetensors.card.md",
        "merged.safetensors.json",
    ]
    content = json.loads(paths[1].read_text())
    assert content["parents"][0]["fingerprint"] == base.fingerprint
    assert content["parents"][1]["base_fingerprint"] == base.fingerprint
    assert (
        content["parents"][1]["fingerprint"]
        == as_state({"w": torch.ones(2)}).fingerprint
    )
    assert content["rule"]["density"] == 0.5
    assert content["scale"] == {"encoder.*": 0.2, "*": 0.1}
    assert content["wer"][0]["wer"] == 12.3456
    assert content["selected_on"] == "synthetic_target"
    for package in ("python", "torch", "speechbrain", "speechbrain_taskarith"):
        assert content["versions"][package]
    text = paths[0].read_text()
    for piece in (
        "# Merged", "12.35", "TIES(density=0.5", "`encoder.*`: 0.2",
        "synthetic_target", "f" * 64, base.fingerprint, "Made for a test.",
    ):  # fmt: skip
        assert piece in text
    assert ModelCard(**content).to_dict() == content


def test_a_folder_gets_its_card_inside(tmp_path):
    made, _, _ = card()
    made.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model_card.json",
        "model_card.md",
    ]


def test_a_hugging_face_folder_gets_its_card_where_the_hub_shows_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    parents = [
        {"role": "base", "path": "openai/whisper-tiny.en"},
        {"role": "fine-tuned", "path": "some/other"},
    ]
    ModelCard(parents=parents).save(tmp_path)
    head, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert head == "" and "# Edited model" in text
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "base_model": "openai/whisper-tiny.en",
        "tags": ["merge", "speechbrain_taskarith"],
    }
    assert not (tmp_path / "model_card.md").exists()


def test_tables_survive_pipes_and_line_breaks():
    text = ModelCard(wer=[{"row": "a|b\nc", "wer": 1.0}]).to_markdown()
    [row] = [line for line in text.splitlines() if "a\\|b" in line]
    assert row == "| a\\|b c | 1.00 |"


def test_numbers_of_all_kinds_become_plain():
    made = ModelCard(
        wer={"us": torch.tensor(3.5), "german": float("nan")},
        scale=torch.tensor(0.25),
    )
    content = made.to_dict()
    assert content["wer"] == [
        {"name": "us", "wer": 3.5},
        {"name": "german", "wer": None},
    ]
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize("fields", [{}, {"rule": None, "scale": 0.0}])
def test_a_bare_card_is_a_card(fields):
    assert "## Versions" in ModelCard(**fields).to_markdown()


def test_provenance_fits_a_files_header():
    made, _, _ = card()
    provenance = made.provenance()
    assert "wer" not in provenance and provenance["rule"]["rule"] == "TIES"
    json.dumps(provenance)


def test_a_torch_files_metadata_and_card_share_one_file(tmp_path):
    made, _, _ = card()
    path = save_state(
        {"w": torch.ones(2)}, tmp_path / "m.ckpt", metadata={"step": 3}
    )
    made.save(path)
    content = json.loads((tmp_path / "m.ckpt.json").read_text())
    assert content == {"step": 3, **made.to_dict()}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "m.ckpt",
        "m.ckpt.card.md",
        "m.ckpt.json",
    ]
