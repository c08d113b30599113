"""CommonVoice/ASR/transformer with Whisper: editing, merging, adapters."""

import pytest
import safetensors.torch
import sizes
import torch
from checks import changed, law, only, weights
from runner import Recipe

EDIT = "hparams/edit_whisper.yaml"
MERGED = "hparams/merged_whisper.yaml"
ADAPTER = "hparams/adapter_whisper.yaml"
FUSION = "hparams/fusion_whisper.yaml"


@pytest.fixture(scope="module")
def recipe(checkout, corpus, tmp_path_factory):
    return Recipe(
        checkout,
        "recipes/CommonVoice/ASR/transformer/train_with_whisper.py",
        tmp_path_factory.mktemp("whisper"),
        "hparams/train_hf_whisper.yaml",
        sizes.whisper(corpus, "us"),
    )


@pytest.fixture(scope="module")
def public(corpus):
    """The public model's weights, under the wrapper's names."""
    file = f"{corpus.whisper()}/model.safetensors"
    return {
        f"model.{name.removeprefix('model.')}": value
        for name, value in safetensors.torch.load_file(file).items()
    }


@pytest.fixture(scope="module")
def us(recipe):
    """The public model, edited on the first domain."""
    return recipe.run("us", diff=EDIT)


def test_a_public_model_is_edited(us, public):
    (folder,) = us.checkpoints
    law(folder, public, "whisper", 0.4)


def test_the_start_is_a_base(recipe, us):
    """The weights as built are those of the hub: all is the same."""
    run = recipe.run("start", diff=EDIT, checkpointer={"base": "start"})
    for file in ("whisper.ckpt", "whisper.finetuned.ckpt"):
        assert not changed(
            weights(us.checkpoints[-1] / file),
            weights(run.checkpoints[-1] / file),
        )


def test_the_next_domain_starts_from_the_last_edit(recipe, corpus, us, public):
    run = recipe.run(
        "de",
        diff=EDIT,
        checkpointer={"base": str(us.save)},
        sizes=sizes.whisper(corpus, "de"),
    )
    (base,) = us.checkpoints
    base = weights(base / "whisper.ckpt")
    assert changed(base, public)
    law(run.checkpoints[-1], base, "whisper", 0.4)


def test_a_merged_model_is_where_training_starts(
    recipe, corpus, us, public, tmp_path
):
    from speechbrain_taskarith.vectors import TaskVector

    (folder,) = us.checkpoints
    tuned = weights(folder / "whisper.finetuned.ckpt")
    path = str(tmp_path / "us.safetensors")
    vector = TaskVector.between(
        corpus.whisper(), folder / "whisper.finetuned.ckpt"
    )
    vector.save(path)
    run = recipe.run(
        "merged",
        diff=MERGED,
        pretrainer={"vectors": {"whisper": [path]}},
        lr_whisper=0.0,
        weight_decay=0.0,
        number_of_epochs=1,
    )
    kept = weights(run.checkpoints[-1] / "whisper.ckpt")
    for key, value in public.items():
        expected = value.double() + 0.2 * (tuned[key].double() - value.double())
        assert torch.allclose(kept[key].double(), expected, atol=1e-6), key


@pytest.fixture(scope="module")
def adapters(recipe, corpus):
    """Each adapter in a run of its own, on its own domain."""
    return {
        name: recipe.run(
            f"adapter_{name}",
            diff=ADAPTER,
            adapters={"names": [name], "train": name, "bottleneck": 8},
            sizes=sizes.whisper(corpus, name),
        )
        for name in ("us", "de")
    }


@pytest.fixture(scope="module")
def fusion(recipe, adapters):
    """Their combination, with both files loaded."""
    load = {name: str(run.save) for name, run in adapters.items()}
    return recipe.run(
        "fusion", diff=FUSION, adapters={"load": load, "bottleneck": 8}
    )


def test_adapters_leave_whisper_as_it_was(adapters, fusion, public):
    for run in (*adapters.values(), fusion):
        state = weights(run.checkpoints[-1] / "whisper.ckpt")
        assert not changed(public, {key: state[key] for key in public})


def test_the_combination_trains_over_the_loaded_adapters(adapters, fusion):
    state = weights(fusion.checkpoints[-1] / "whisper.ckpt")
    for name, run in adapters.items():
        alone = weights(run.checkpoints[-1] / "whisper.ckpt")
        own = only(alone, f"adapter_{name}.")
        assert any(alone[key].any() for key in only(own, ".up."))
        assert not changed(
            {key: alone[key] for key in own}, {key: state[key] for key in own}
        )
    rest = only(state, "task_adapters") - only(state, "adapter_us.")
    assert rest - only(rest, "adapter_de."), "no combination was saved"


def test_adapters_of_another_base_are_refused(recipe, corpus, adapters):
    """Each is held against the base at the first forward pass."""
    other = corpus.whisper(seed=1)
    load = {name: str(run.save) for name, run in adapters.items()}
    run = recipe.run(
        "other_base",
        diff=FUSION,
        adapters={"load": load, "bottleneck": 8},
        whisper_hub=other,
        expect=None,
    )
    assert "another base" in run.log
    assert not run.checkpoints
