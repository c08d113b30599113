"""LibriSpeech/ASR/CTC with wav2vec2: editing, and an adapter."""

import shutil

import pytest
import sizes
from checks import changed, law, only, weights
from runner import Recipe

EDIT = "hparams/edit_wav2vec2.yaml"
ADAPTER = "hparams/adapter_wav2vec2.yaml"
PUBLIC = "hparams/edit_public_wav2vec2.yaml"
BOTH = ("wav2vec2", "model")


@pytest.fixture(scope="module")
def recipe(checkout, corpus, tmp_path_factory):
    return Recipe(
        checkout,
        "recipes/LibriSpeech/ASR/CTC/train_with_wav2vec.py",
        tmp_path_factory.mktemp("ctc"),
        "hparams/train_hf_wav2vec.yaml",
        sizes.ctc(corpus, "de"),
    )


@pytest.fixture(scope="module")
def us(recipe, corpus):
    """The stock recipe on the first domain."""
    return recipe.run("us", sizes=sizes.ctc(corpus, "us"))


@pytest.fixture(scope="module")
def de(recipe, us):
    """The second domain, as an edit of the first, with its labels."""
    save = recipe.results / "de" / "save"
    save.mkdir(parents=True)
    shutil.copy(us.save / "label_encoder.txt", save)
    return recipe.run("de", diff=EDIT, checkpointer={"base": str(us.save)})


def test_the_law_holds(us, de):
    (base,) = us.checkpoints
    for folder in de.checkpoints:
        for name in BOTH:
            law(folder, weights(base / f"{name}.ckpt"), name, 0.4)


def test_the_law_holds_after_one_more_epoch(recipe, us, de):
    (base,) = us.checkpoints
    before = weights(de.checkpoints[-1] / "model.finetuned.ckpt")
    again = recipe.run(
        "de",
        diff=EDIT,
        checkpointer={"base": str(us.save)},
        number_of_epochs=3,
    )
    folder = again.checkpoints[-1]
    for name in BOTH:
        law(folder, weights(base / f"{name}.ckpt"), name, 0.4)
    assert changed(before, weights(folder / "model.finetuned.ckpt"))


def test_the_scale_may_change_in_evaluation(recipe, us, de):
    files = {p: p.read_bytes() for p in de.save.rglob("*.ckpt")}
    base = recipe.run("us", "--test_only")
    zero = recipe.run(
        "de",
        "--test_only",
        diff=EDIT,
        checkpointer={"base": str(us.save), "rule": {"scale": 0.0}},
    )
    # At scale 0 the edited model is the base.
    assert zero.scores == base.scores
    assert {p: p.read_bytes() for p in de.save.rglob("*.ckpt")} == files


def test_another_alphabet_is_refused(recipe, us):
    run = recipe.run(
        "labels", diff=EDIT, checkpointer={"base": str(us.save)}, expect=None
    )
    assert "label_encoder.txt" in run.error
    assert not run.checkpoints


def test_a_public_model_is_a_base(recipe, corpus):
    import safetensors.torch

    run = recipe.run("public", diff=PUBLIC)
    (folder,) = run.checkpoints
    file = f"{corpus.wav2vec2()}/model.safetensors"
    public = safetensors.torch.load_file(file)
    base = {f"model.{key}": value for key, value in public.items()}
    law(folder, base, "wav2vec2", 0.4)
    # What has no base is kept as trained, and has no second file.
    assert not (folder / "model.finetuned.ckpt").exists()
    assert changed(weights(folder / "model.ckpt"), {})


def test_an_adapter_leaves_the_rest_as_it_was(recipe, us):
    (base,) = us.checkpoints
    save = recipe.results / "adapter" / "save"
    save.mkdir(parents=True)
    shutil.copy(us.save / "label_encoder.txt", save)
    run = recipe.run(
        "adapter",
        diff=ADAPTER,
        adapters={"bottleneck": 8},
        start_from=str(base),
    )
    for name in BOTH:
        before, after = (
            weights(folder / f"{name}.ckpt")
            for folder in (base, run.checkpoints[-1])
        )
        moved = changed(before, after)
        assert moved == only(after, "task_adapters"), sorted(moved)
    wav2vec2 = weights(run.checkpoints[-1] / "wav2vec2.ckpt")
    up = only(wav2vec2, "adapter_de.up")
    assert up and all(wav2vec2[key].any() for key in up)
