"""LibriSpeech/ASR/transformer: editing, adapters, shrink and looking back.

The recipe averages its checkpoints when it tests, keeps the mean alone, and
tests on two sets.
"""

import pytest
import sizes
from checks import changed, close, law, only, share_kept, weights
from runner import STILL, Recipe

EDIT = "hparams/edit_conformer.yaml"
ADAPTERS = "hparams/adapters_conformer.yaml"
MERGED = "hparams/merged_conformer.yaml"
SHRINK = "hparams/shrink_conformer.yaml"


@pytest.fixture(scope="module")
def recipe(checkout, corpus, tmp_path_factory):
    return Recipe(
        checkout,
        "recipes/LibriSpeech/ASR/transformer/train.py",
        tmp_path_factory.mktemp("transformer"),
        "hparams/conformer_small.yaml",
        sizes.transformer(corpus, "de"),
    )


@pytest.fixture(scope="module")
def us(recipe, corpus):
    """The stock recipe on the first domain; the last checkpoint's folder."""
    run = recipe.run("us", sizes=sizes.transformer(corpus, "us"))
    (folder,) = run.checkpoints
    return folder


@pytest.fixture(scope="module")
def edit(recipe, us):
    """Run an edit of the first domain on the second; the last checkpoint."""

    def run(output, *flags, rule=None, **overrides):
        found = recipe.run(
            output,
            *flags,
            diff=EDIT,
            checkpointer={"base": str(us.parent), "rule": rule or {}},
            **overrides,
        )
        return found.checkpoints[-1]

    return run


@pytest.fixture(scope="module")
def trained(edit):
    return edit("de").parent


@pytest.fixture
def de(trained):
    """The checkpoint that the last run left."""
    (folder,) = trained.glob("CKPT+*")
    return folder


def test_the_mean_of_checkpoints_is_edited_once(us, de):
    base = weights(us / "model.ckpt")
    law(de, base, "model", 0.6, density=0.5)
    assert 0.3 < share_kept(de, base, "model") < 0.6
    # The front end is the base's, too.
    assert not changed(
        weights(us / "normalizer.ckpt"), weights(de / "normalizer.ckpt")
    )


def test_what_was_fine_tuned_an_optimizer_made_from_the_base(recipe, us, edit):
    stock = recipe.run_from(us, "stock")
    ours = edit("same", **STILL)
    close(
        weights(stock.checkpoints[-1] / "model.ckpt"),
        weights(ours / "model.finetuned.ckpt"),
    )


def test_training_goes_on_after_a_test(us, de, edit):
    # Not after --test_only, which keeps no optimizer to go on with.
    tuned = weights(de / "model.finetuned.ckpt")
    again = edit("de", number_of_epochs=3)
    law(again, weights(us / "model.ckpt"), "model", 0.6, density=0.5)
    assert changed(tuned, weights(again / "model.finetuned.ckpt"))


def test_testing_again_changes_nothing(us, de, edit):
    files = ("model.ckpt", "model.finetuned.ckpt")
    before = [weights(de / name) for name in files]
    again = edit("de", "--test_only")
    law(again, weights(us / "model.ckpt"), "model", 0.6, density=0.5)
    for state, name in zip(before, files):
        assert not changed(state, weights(again / name)), name


def test_testing_with_another_scale_keeps_the_law(recipe, us, de, edit):
    tuned = weights(de / "model.finetuned.ckpt")
    again = edit("de", "--test_only", rule={"scale": 0.2})
    law(again, weights(us / "model.ckpt"), "model", 0.2, density=0.5)
    assert not changed(tuned, weights(again / "model.finetuned.ckpt"))
    # Training goes on with the scale it began with, or not at all.
    files = {p: p.read_bytes() for p in again.iterdir()}
    refused = recipe.run(
        "de",
        diff=EDIT,
        checkpointer={"base": str(us.parent)},
        number_of_epochs=4,
        expect=None,
    )
    assert "scale" in refused.error, refused.error
    assert {p: p.read_bytes() for p in again.iterdir()} == files


def test_a_merged_model_is_where_training_starts(
    recipe, us, trained, de, tmp_path
):
    """Beside the language model and the tokenizer, which load as before."""
    from speechbrain_taskarith.vectors import TaskVector

    path = str(tmp_path / "de.safetensors")
    tuned = de / "model.finetuned.ckpt"
    TaskVector.between(us / "model.ckpt", tuned).save(path)
    run = recipe.run(
        "merged",
        diff=MERGED,
        pretrainer={
            "paths": {"model": str(us.parent)},
            "vectors": {"model": [path]},
        },
        lr_adam=0.0,
        number_of_epochs=1,
    )
    base, tuned = weights(us / "model.ckpt"), weights(tuned)
    for key, value in weights(run.checkpoints[-1] / "model.ckpt").items():
        start = base[key].double()
        expected = start + 0.2 * (tuned[key].double() - start)
        assert (value.double() - expected).abs().max() < 1e-6, key


@pytest.fixture(scope="module")
def chain(recipe, us):
    """Train adapters one after the other, then their combination."""
    folders = {"base": us}
    for before, train in (("base", "us"), ("us", "de"), ("de", "ST-A")):
        run = recipe.run(
            f"adapter_{train}",
            diff=ADAPTERS,
            adapters={"train": train, "bottleneck": 8},
            start_from=str(folders[before]),
        )
        folders[train] = run.checkpoints[-1]
    return folders


def test_adapters_leave_the_base_as_it_was(chain):
    base = weights(chain["base"] / "model.ckpt")
    for train in ("us", "de", "ST-A"):
        after = weights(chain[train] / "model.ckpt")
        assert not changed(base, {key: after[key] for key in base}), train
        assert not changed(
            weights(chain["base"] / "normalizer.ckpt"),
            weights(chain[train] / "normalizer.ckpt"),
        )


def test_only_what_is_said_to_train_moves(chain):
    us, de, both = (
        weights(chain[name] / "model.ckpt") for name in ("us", "de", "ST-A")
    )
    fresh = {k for k, v in us.items() if "adapter_de.up" in k and v.any()}
    assert only(us, "adapter_de.up") and not fresh, "us trained de"
    assert all(us[k].any() for k in only(us, "adapter_us.up"))
    moved = changed(us, de)
    assert moved and moved == only(us, "adapter_de"), sorted(moved)
    moved = changed(de, both)
    assert moved and not only(moved, "adapter_"), sorted(moved)
    assert all("task_adapters" in key for key in moved)


def test_adapters_resume(recipe, chain):
    before = weights(chain["ST-A"] / "model.ckpt")
    run = recipe.run(
        "adapter_ST-A",
        diff=ADAPTERS,
        adapters={"train": "ST-A", "bottleneck": 8},
        start_from=str(chain["de"]),
        number_of_epochs=3,
    )
    moved = changed(before, weights(run.checkpoints[-1] / "model.ckpt"))
    assert moved and not only(moved, "adapter_"), sorted(moved)
    assert all("task_adapters" in key for key in moved)


@pytest.fixture(scope="module")
def shrunk(recipe):
    """Return a function that trains with shrinking; the checkpoint's weights."""

    def run(output, **overrides):
        small = dict(recipe.sizes)
        small["transformer"] = small["Transformer"]
        whole, recipe.sizes = recipe.sizes, small
        del small["Transformer"]
        try:
            found = recipe.run(output, diff=SHRINK, **overrides)
        finally:
            recipe.sizes = whole
        return weights(found.checkpoints[-1] / "model.ckpt")

    return run


def test_shrinking_trains_every_part(shrunk):
    still = shrunk("shrink_still", lr_adam=0.0, number_of_epochs=1)
    after = shrunk("shrink", number_of_epochs=1)
    moved = changed(still, after)
    assert moved
    stuck = after.keys() - moved
    assert stuck == only(after, "positional_encoding"), sorted(stuck)
    assert only(moved, "looking_back") and only(moved, "decoder")
    # And it resumes.
    assert changed(after, shrunk("shrink", number_of_epochs=2))
