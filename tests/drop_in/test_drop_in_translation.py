"""Speech translation: IWSLT22 without registered optimizers, Fisher-Callhome.

IWSLT22 makes optimizers that it tells no checkpointer of; Fisher-Callhome
averages checkpoints when it tests, on three sets.
"""

import pytest
import sizes
from checks import changed, law, only, weights
from runner import Recipe

IWSLT = "hparams/edit_translation.yaml"
FISHER = "hparams/edit_fisher.yaml"
SHRINK = "hparams/shrink_fisher.yaml"
BOTH = ("wav2vec2", "model")


@pytest.fixture(scope="module")
def iwslt(checkout, corpus, tmp_path_factory):
    return Recipe(
        checkout,
        "recipes/IWSLT22_lowresource/AST/transformer/train.py",
        tmp_path_factory.mktemp("iwslt"),
        "hparams/train_w2v2_st.yaml",
        sizes.iwslt(corpus, "de"),
    )


@pytest.fixture(scope="module")
def fisher(checkout, corpus, tmp_path_factory):
    return Recipe(
        checkout,
        "recipes/Fisher-Callhome-Spanish/ST/transformer/train.py",
        tmp_path_factory.mktemp("fisher"),
        "hparams/transformer.yaml",
        sizes.fisher(corpus, "de"),
    )


@pytest.fixture(scope="module")
def first(iwslt):
    """The base of IWSLT22: the stock recipe."""
    return iwslt.run("first", number_of_epochs=1)


@pytest.fixture(scope="module")
def edited(iwslt, first):
    """An edit of it, from another seed: its weights start elsewhere."""
    return iwslt.run(
        "edited", diff=IWSLT, checkpointer={"base": str(first.save)}, seed=1
    )


def test_without_registered_optimizers_it_starts_from_the_base(first, edited):
    (folder,) = first.checkpoints
    assert len(edited.checkpoints) == 2
    for name in BOTH:
        base = weights(folder / f"{name}.ckpt")
        sizes_ = {}
        for checkpoint in edited.checkpoints:
            vector = law(checkpoint, base, name, 0.4)
            sizes_[checkpoint] = max(v.abs().max() for v in vector.values())
        # A few steps of Adam away, not a random start.
        rate = 0.001 if name == "model" else 0.00001
        assert max(sizes_.values()) <= 6 * 3 * rate


def test_it_resumes_from_the_fine_tuned_weights(iwslt, first, edited):
    (folder,) = first.checkpoints
    before = edited.checkpoints[-1]
    again = iwslt.run(
        "edited",
        diff=IWSLT,
        checkpointer={"base": str(first.save)},
        seed=1,
        number_of_epochs=3,
        lr=1e-12,
        lr_wav2vec=1e-12,
        adam_opt_class={"lr": 0.0},
        wav2vec_opt_class={"lr": 0.0},
    )
    for name in BOTH:
        law(again.checkpoints[-1], weights(folder / f"{name}.ckpt"), name, 0.4)
        file = f"{name}.finetuned.ckpt"
        moved = changed(
            weights(before / file), weights(again.checkpoints[-1] / file)
        )
        assert not moved, sorted(moved)


def test_a_public_encoder_with_more_layers_is_refused(iwslt, corpus):
    """train.py cuts layers off; nothing may be trained before that is said."""
    public = {"edited": "wav2vec2", "base": corpus.wav2vec2(layers=2)}
    run = iwslt.run("more_layers", diff=IWSLT, checkpointer=public, expect=None)
    assert "encoder.layers.1" in run.log
    assert "epoch: 1" not in run.log and not run.checkpoints


def test_the_start_is_a_base_with_the_layers_that_are_left(iwslt):
    run = iwslt.run("start", diff=IWSLT, checkpointer={"base": "start"})
    for name in BOTH:
        base = weights(run.save / "start" / f"{name}.ckpt")
        law(run.checkpoints[-1], base, name, 0.4)


@pytest.fixture(scope="module")
def base(fisher):
    """The base of Fisher-Callhome: the stock recipe."""
    (folder,) = fisher.run("first", number_of_epochs=1).checkpoints
    return folder


def test_a_mean_tested_on_three_sets_is_edited_once(fisher, base):
    editing = {"diff": FISHER, "checkpointer": {"base": str(base.parent)}}
    (folder,) = fisher.run("edited", **editing).checkpoints
    law(folder, weights(base / "model.ckpt"), "model", 0.4)
    # Three more tests: an edit of what is edited would shrink it each time.
    tuned = weights(folder / "model.finetuned.ckpt")
    again = fisher.run("edited", "--test_only", **editing).checkpoints[-1]
    law(again, weights(base / "model.ckpt"), "model", 0.4)
    assert not changed(tuned, weights(again / "model.finetuned.ckpt"))


def test_shrinking_trains_every_part(fisher):
    small = {"transformer": fisher.sizes["Transformer"]}
    whole = fisher.sizes
    fisher.sizes = {k: v for k, v in whole.items() if k != "Transformer"}
    still, after = (
        weights(
            fisher.run(
                name,
                diff=SHRINK,
                lr_adam=rate,
                number_of_epochs=1,
                **small,
            ).checkpoints[-1]
            / "model.ckpt"
        )
        for name, rate in (("shrink_still", 0.0), ("shrink", 2.5))
    )
    fisher.sizes = whole
    moved = changed(still, after)
    stuck = after.keys() - moved
    # The auxiliary decoder of transcripts has no loss here.
    stuck -= only(stuck, "asr_")
    assert stuck == only(stuck, "positional_encoding"), sorted(stuck)
    for part in ("encoder", "looking_back", "decoder"):
        assert only(moved, part), part
