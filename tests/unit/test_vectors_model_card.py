"""Model cards: complete, readable, and safe to print."""

import json

import huggingface_hub
import pytest
import torch
from cli_support import run_json

from speechbrain_taskarith.utils.hub.cards import read_card, read_front
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


def test_people_and_programs_read_the_same_file(tmp_path):
    made, base, tau = card()
    path = made.save(tmp_path / "merged.safetensors")
    assert path.name == "merged.safetensors.md"
    assert list(tmp_path.iterdir()) == [path]
    content = read_card(tmp_path / "merged.safetensors")
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
    text = path.read_text().split("---\n", 2)[2]
    for piece in (
        "# Merged", "12.35", "TIES(density=0.5", "`encoder.*`: 0.2",
        "synthetic_target", "f" * 64, base.fingerprint, "Made for a test.",
    ):  # fmt: skip
        assert piece in text
    loaded = ModelCard.load(tmp_path / "merged.safetensors")
    assert loaded.to_dict() == content == made.to_dict()


def test_the_hubs_own_reader_finds_base_metrics_and_licence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    made = ModelCard(
        "Whisper, merged",
        parents=[
            {"role": "base", "path": "openai/whisper-tiny.en"},
            {"role": "fine-tuned", "path": "some/other"},
            {"role": "fine-tuned", "path": "results/a/save"},
            {"role": "fine-tuned", "path": "no/path.ckpt"},
        ],
        wer=[
            {"row": "baseline", "wer": 9.0},
            {"row": "merged", "wer": 4.2, "dataset": "My Corpus",
             "split": "test"},
            {"row": "lost", "wer": float("nan"), "dataset": "My Corpus"},
        ],
        license="apache-2.0",
        language=["en", "nl"],
        tags=["whisper"],
    )  # fmt: skip
    path = made.save(tmp_path)
    assert path == tmp_path / "README.md"
    found = huggingface_hub.ModelCard.load(path)
    wanted = huggingface_hub.metadata_eval_result(
        model_pretty_name="Whisper, merged",
        task_pretty_name="-",
        task_id="automatic-speech-recognition",
        metrics_pretty_name="WER (%)",
        metrics_id="wer",
        metrics_value=4.2,
        dataset_pretty_name="My Corpus",
        dataset_id="my_corpus",
        dataset_split="test",
    )["model-index"]
    # What the hub writes of its own accord says no more.
    [[result]] = [entry["results"] for entry in wanted]
    del result["task"]["name"], result["metrics"][0]["verified"]
    data = found.data.to_dict()
    assert data.pop("speechbrain_taskarith")["title"] == "Whisper, merged"
    [index] = data.pop("model-index")
    [shown] = index["results"]
    assert index["name"] == "Whisper, merged" and shown == result
    assert data == {
        "license": "apache-2.0",
        "language": ["en", "nl"],
        "library_name": "transformers",
        "base_model": ["openai/whisper-tiny.en", "some/other"],
        "base_model_relation": "merge",
        "tags": ["speechbrain_taskarith", "merge", "whisper"],
    }
    assert found.text.strip() == made.to_markdown().strip()


def test_a_vectors_card_links_the_base_that_it_needs(tmp_path):
    tau = TaskVector(
        {"w": torch.ones(2)},
        "f" * 64,
        {"base": "openai/whisper-tiny", "finetuned": "some/finetuned",
         "finetuned_fingerprint": "e" * 64},
    )  # fmt: skip
    path = tau.card(language="en").save(tmp_path)
    data = huggingface_hub.ModelCard.load(path).data
    assert data.base_model == "openai/whisper-tiny"
    assert data.base_model_relation == "adapter"
    assert data.language == ["en"] and "task-vector" in data.tags
    roles = [p["role"] for p in ModelCard.load(tmp_path).parents]
    assert roles == ["base", "fine-tuned"]


def test_a_local_base_is_no_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    parents = [{"role": "base", "path": "results/base"}]
    front = read_front(ModelCard(parents=parents).save(tmp_path / "m.pt"))
    assert "base_model" not in front and "base_model_relation" not in front


def test_a_speechbrain_folder_gets_its_card_inside(tmp_path):
    made, _, _ = card()
    made.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert read_front(tmp_path / "README.md")["library_name"] == "speechbrain"


def test_anothers_readme_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("# My notes\n")
    with pytest.raises(FileExistsError, match="README.md: stands there"):
        ModelCard().save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My notes\n"
    with pytest.raises(FileNotFoundError, match="README.md: no card"):
        ModelCard.load(tmp_path)


@pytest.mark.parametrize(
    "front", ["a: [1", "- 1", "!!python/object/apply:os.getcwd []", "\x00: 1"]
)
def test_a_damaged_card_is_refused_by_name_and_runs_nothing(tmp_path, front):
    path = tmp_path / "m.ckpt.md"
    path.write_text(f"---\n{front}\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"m\.ckpt\.md: its front matter"):
        ModelCard.load(tmp_path / "m.ckpt")


def test_dashes_inside_a_text_do_not_end_the_front_matter(tmp_path):
    made = ModelCard(notes=["a\n---\nb: 1", "---"], title="Ünï: 'x'")
    made.save(tmp_path / "m.ckpt")
    assert ModelCard.load(tmp_path / "m.ckpt").to_dict() == made.to_dict()


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
    assert read_card(path) == {"step": 3, **made.to_dict()}
    assert ModelCard.load(path).to_dict() == made.to_dict()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["m.ckpt", "m.ckpt.md"]
    # Other weights under this name: the card told of those before.
    save_state({"w": torch.zeros(2)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.ckpt"]


def test_inspect_reads_cards_old_metadata_and_sees_a_card_of_others(
    tmp_path, capsys
):
    old, new = tmp_path / "old.ckpt", tmp_path / "new.safetensors"
    save_state({"w": torch.ones(2)}, old)
    (tmp_path / "old.ckpt.json").write_text('{"step": 3}')
    save_state({"w": torch.ones(2)}, new)
    ModelCard(fingerprint="0" * 64).save(new)
    first, second = run_json(capsys, "inspect", str(old), str(new))["files"]
    assert first["metadata"] == {"step": 3}
    assert second["card_of_other_weights"] == "0" * 64
    ModelCard(fingerprint=second["fingerprint"]).save(new)
    [entry] = run_json(capsys, "inspect", str(new))["files"]
    assert "card_of_other_weights" not in entry


def test_what_is_no_rule_or_relation_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected a Rule"):
        ModelCard(rule=lambda base, vectors: None)
    with pytest.raises(ValueError, match="relation is 'child'"):
        ModelCard(relation="child").save(tmp_path)
