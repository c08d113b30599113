"""LibriSpeech/ASR/transducer: the loss, HAT and the searches, on a CPU."""

import pytest
import sizes
from checks import changed, law, only, weights
from runner import Recipe

HAT = "hparams/hat_transducer.yaml"
EDIT = "hparams/edit_transducer.yaml"


@pytest.fixture(scope="module")
def recipe(checkout, corpus, tmp_path_factory):
    return Recipe(
        checkout,
        "recipes/LibriSpeech/ASR/transducer/train.py",
        tmp_path_factory.mktemp("transducer"),
        "hparams/conformer_transducer.yaml",
        sizes.transducer(corpus, "us"),
    )


@pytest.fixture(scope="module")
def hat(recipe):
    return recipe.run("hat", diff=HAT)


def test_the_stock_loss_needs_a_gpu(recipe):
    """Or else this page's first reason to swap it is gone."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "Numba" in recipe.run("stock", expect=None).log


def test_every_part_trains(recipe, hat):
    still = recipe.run(
        "still", diff=HAT, lr=0.0, weight_decay=0.0, number_of_epochs=1
    )
    before, after = (
        weights(run.checkpoints[-1] / "model.ckpt") for run in (still, hat)
    )
    stuck = after.keys() - changed(before, after)
    # The embedding is one-hot, and positions are constants.
    constant = only(after, "rotary") | only(after, "positional_encoding")
    assert stuck - only(after, "2.Embedding") <= constant, sorted(stuck)


def test_searches_wrote_their_hypotheses(hat):
    for name in ("test-clean", "test-other"):
        text = (hat.folder / f"wer_{name}.txt").read_text()
        assert "us-" + name in text


def test_the_mean_is_edited_once(recipe, corpus, hat):
    """This recipe keeps its mean by the lowest word error rate, of -0.1."""
    (base,) = hat.checkpoints
    base = weights(base / "model.ckpt")
    editing = {
        "diff": (HAT, EDIT),
        "checkpointer": {"base": str(hat.save)},
        "sizes": sizes.transducer(corpus, "de"),
    }
    (folder,) = recipe.run("edited", **editing).checkpoints
    law(folder, base, "model", 0.4)
    tuned = weights(folder / "model.finetuned.ckpt")
    (folder,) = recipe.run("edited", "--test_only", **editing).checkpoints
    law(folder, base, "model", 0.4)
    assert not changed(tuned, weights(folder / "model.finetuned.ckpt"))


def test_it_resumes(recipe, hat):
    before = weights(hat.checkpoints[-1] / "model.ckpt")
    run = recipe.run("hat", diff=HAT, number_of_epochs=3)
    assert "epoch: 3" in (run.folder / "train_log.txt").read_text()
    assert changed(before, weights(run.checkpoints[-1] / "model.ckpt"))


def test_weights_of_the_language_models_change_the_search_alone(recipe, hat):
    # SpeechBrain does not resume after a test that kept the mean alone: that
    # checkpoint has no optimizer. So this is the last one.
    before = weights(hat.checkpoints[-1] / "model.ckpt")
    found = []
    for ilm, lm in ((0.0, 0.0), (1.5, 0.0), (1.5, 1.0)):
        run = recipe.run(
            "hat",
            "--test_only",
            diff=HAT,
            lm_weight=lm,
            Beamsearcher={"ilm_weight": ilm},
        )
        files = sorted(run.folder.glob("wer_*.txt"))
        found.append([path.read_text() for path in files])
    assert found[0] != found[1] != found[2]
    assert not changed(before, weights(run.checkpoints[-1] / "model.ckpt"))
