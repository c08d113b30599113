"""The recipe `FSDD/ASR/syn2real` at toy size, as users run it."""

import csv
import importlib
import json
import statistics
import sys

import pytest
import torch
from digit_corpus import make_corpus
from processes import Recipe
from safetensors.torch import load_file

RECIPE = Recipe("FSDD/ASR/syn2real", script="study.py")
TRAINING = Recipe("FSDD/ASR/syn2real")
# The names of the recipe: an override adds to a mapping, it replaces none.
DOMAINS = {"one_four": ["ONE"], "two_five": ["TWO"], "three_six": ["SIX"]}
TINY = {
    "d_model": 16,
    "d_ffn": 16,
    "nhead": 2,
    "num_encoder_layers": 1,
    "domains": "{one_four: [ONE], two_five: [TWO], three_six: [SIX]}",
    "shared_words": "[NINE]",
    "vocabulary": "[ONE, TWO, SIX, NINE]",
    "output_neurons": 5,
    "voices": "[en-us+f1, en-us+m1]",
    "pretraining_steps": 4,
    "mixed_steps": 2,
    "domain_steps": 2,
    "batch_size": 4,
    "valid_strings": 3,
    "test_strings": 4,
    "train_precision": "fp32",
    "scales": "[0.5, 1.0]",
    "target_scales": "[0.5]",
    "left_out_speaker": "null",
}
# Options of the study alone.
STUDY = {"choose_on": "edited_target"}
# Of each left-out domain: mixed, joint, and three pairs.
MODELS = 1 + 3 * (1 + 1 + 2 * 3)
# Every domain's pair once, and the joint models; what hears recordings twice.
UNHEARD = 1 + 3 * (1 + 2) + 3 * (1 + 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few takes of four words by two speakers."""
    return make_corpus(tmp_path_factory, words=["ONE", "TWO", "SIX", "NINE"])


def start(data, output, **options):
    """Start the recipe as a user would."""
    options = {**TINY, **STUDY, **options, "data_folder": data}
    return RECIPE.start(output, options)


def run(data, output, **options):
    """Run the recipe to its end; return what it said."""
    return start(data, output, **options).finish()


def weights(output, name):
    """Read a model of the study by torch alone."""
    [path] = (output / "models" / name / "save").glob("CKPT+*/model.ckpt")
    return torch.load(path, weights_only=True)


def first_speaker(output):
    """Return the speaker that seed 0 leaves out: the first by name."""
    with open(output / "prepared/test.csv", newline="") as stream:
        return min(row["spk_id"] for row in csv.DictReader(stream))


def finished_models(output):
    return len(list((output / "models").rglob("finished.json")))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    run(corpus, output)
    return output


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's own modules, which have everyday names."""
    monkeypatch.syspath_prepend(str(RECIPE.folder))
    names = ("train", "strings", "study", "report", "rows")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name: importlib.import_module(name)
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_leaves_the_whole_table(finished):
    rows = json.loads((finished / "summary.json").read_text())
    main = {
        (row["row"], row["metric"]): row
        for row in rows
        if row["table"] == "syn2real"
    }
    names = {"pretrained", "baseline", "joint", "edited", "ensemble", "members"}
    names |= {"paper_scale", "oracle", "shrunk_target", "real_source"}
    names |= {"real_source_mean", "mean_of_both", "two_scales"}
    names |= {"support_language", "real_target"}
    assert {(name, "wer") for name in names} <= set(main)
    assert main["edited", "relative_reduction"]["unit"] == "%"
    for name, chosen in (
        ("baseline", None),
        ("edited", "real_source+synthetic_target"),
        ("members", "real_source+synthetic_target"),
        ("oracle", "real_target"),
    ):
        assert main[name, "wer"]["selected_on"] == chosen
        assert main[name, "wer"]["split"] == "test"
        # Means over the left-out domains, recalculated.
        by_domain = [
            row["value"]
            for row in rows
            if row["row"] in {f"{domain}: {name}" for domain in DOMAINS}
            and row["metric"] == "wer"
        ]
        assert len(by_domain) == 3
        assert main[name, "wer"]["value"] == pytest.approx(
            statistics.fmean(by_domain)
        )
    assert main["oracle", "wer"]["value"] <= main["edited", "wer"]["value"]
    assert "gives its real model back" in (finished / "results.md").read_text()
    for domain in DOMAINS:
        plots = ("scale", "two_scales", "cosines_without")
        for plot in (f"{name}_{domain}" for name in plots):
            path = finished / "plots" / f"{plot}.png"
            assert path.stat().st_size > 1000
    assert finished_models(finished) == MODELS


@pytest.mark.slow
def test_edited_model_is_the_papers_formula(finished):
    rows = json.loads((finished / "summary.json").read_text())
    for target in DOMAINS:
        scale = next(
            row["value"]
            for row in rows
            if row["row"] == f"{target}: edited" and row["metric"] == "scale"
        )
        edited = load_file(
            finished / "save" / "edited" / target / "model.safetensors"
        )
        base = weights(finished, f"without_{target}/synthetic/{target}")
        sources = [name for name in DOMAINS if name != target]
        for name, tensor in base.items():
            if not tensor.is_floating_point():
                continue
            vectors = [
                weights(finished, f"without_{target}/real/{s}")[name].double()
                - weights(finished, f"without_{target}/synthetic/{s}")[
                    name
                ].double()
                for s in sources
            ]
            expected = tensor.double() + scale * sum(vectors) / len(vectors)
            torch.testing.assert_close(
                edited[name].double(), expected, rtol=1e-5, atol=1e-6
            )


@pytest.mark.slow
def test_sources_in_the_targets_place_choose_the_scale(corpus, tmp_path):
    run(
        corpus,
        tmp_path,
        mixed_steps=0,
        choose_on="sources_as_targets",
        left_out_speaker="by_seed",
    )
    assert finished_models(tmp_path) == UNHEARD
    rows = json.loads((tmp_path / "summary.json").read_text())
    edited = [row for row in rows if row["row"] == "edited"]
    assert edited and {row["selected_on"] for row in edited} == {"real_source"}
    unheard = {
        metric: {r["row"]: r["value"] for r in rows if r["metric"] == metric
                 and r["table"] == table}
        for table, metric in (
            ("syn2real", "unheard_speaker"), ("syn2real_unheard_speaker", "wer")
        )
    }  # fmt: skip
    assert unheard["unheard_speaker"] == unheard["wer"]
    assert len(unheard["wer"]) == 15
    # What has not heard the speaker is another model.
    one, other = (
        weights(tmp_path, f"{start}real/two_five")
        for start in ("", "unheard_" + first_speaker(tmp_path) + "/")
    )
    assert not all(torch.equal(one[key], other[key]) for key in one)
    edited = load_file(tmp_path / "save/edited/one_four/model.safetensors")
    scale = next(
        row["value"]
        for row in rows
        if row["row"] == "one_four: edited" and row["metric"] == "scale"
    )
    for name, tensor in weights(tmp_path, "synthetic/one_four").items():
        if tensor.is_floating_point():
            mean = sum(
                weights(tmp_path, f"real/{s}")[name].double()
                - weights(tmp_path, f"synthetic/{s}")[name].double()
                for s in ("two_five", "three_six")
            )
            torch.testing.assert_close(
                edited[name].double(),
                tensor.double() + scale * mean / 2,
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same(corpus, finished, tmp_path):
    # Two processes share the models; both die without warning.
    start(corpus, tmp_path, workers=2).kill_when(
        lambda: finished_models(tmp_path) >= 4
    )
    assert 4 <= finished_models(tmp_path) < MODELS
    run(corpus, tmp_path, workers=2)
    assert finished_models(tmp_path) == MODELS
    old = json.loads((finished / "summary.json").read_text())
    assert json.loads((tmp_path / "summary.json").read_text()) == old
    for name in (
        "pretrained/all",
        "without_one_four/synthetic/one_four",
        "without_two_five/real/three_six",
    ):
        one, other = weights(finished, name), weights(tmp_path, name)
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_local_dask_cluster_gives_the_same(corpus, finished, tmp_path):
    pytest.importorskip("distributed")
    run(corpus, tmp_path, backend="dask", workers=2)
    assert finished_models(tmp_path) == MODELS
    old = json.loads((finished / "summary.json").read_text())
    assert json.loads((tmp_path / "summary.json").read_text()) == old
    one, other = (
        weights(folder, "without_two_five/real/three_six")
        for folder in (finished, tmp_path)
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_training_by_hand_is_the_studys(corpus, finished, tmp_path):
    """Also where it was killed in the middle and started again."""
    options = {
        **TINY,
        "data_folder": corpus,
        "training_of": "real",
        "domain": "two_five",
        "base": finished / "models/mixed/one_four/save",
        "study_folder": tmp_path / "study",
        # A checkpoint after every batch.
        "ckpt_interval_minutes": 0,
        "ckpt_interval_steps": 1,
    }
    output = tmp_path / "by_hand"
    TRAINING.start(output, options).kill_when(
        lambda: list(output.glob("save/CKPT+*"))
    )
    said = TRAINING.run(output, options)
    assert "test WER" in said
    [one] = output.glob("save/CKPT+*/model.ckpt")
    one = torch.load(one, weights_only=True)
    other = weights(finished, "without_one_four/real/two_five")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_seeds_make_one_table(corpus, finished, tmp_path):
    for seed in (0, 1):
        rows = json.loads((finished / "summary.json").read_text())
        for row in rows:
            row["seed"] = seed
            row["value"] += seed
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "summary.json").write_text(json.dumps(rows))
    RECIPE.merge(tmp_path)
    merged = json.loads((tmp_path / "summary.json").read_text())
    edited = {
        row["seed"]: row["value"]
        for row in merged
        if (row["table"], row["row"], row["metric"])
        == ("syn2real", "edited", "wer")
    }
    assert edited["mean"] == pytest.approx(edited[0] + 0.5)


def takes(split, side, words=("ONE", "TWO", "SIX", "NINE")):
    from speechbrain_taskarith.data import Recording

    return [
        Recording(f"{side}-{split}-{w}-{s}-{n}", 0.5, f"{split}{w}{s}{n}.wav",
                  s, w, split=split)
        for w in words
        for s in ("anna", "ben")
        for n in range(3)
    ]  # fmt: skip


def hparams_of_strings(**changes):
    return {
        "seed": 0,
        "batch_size": 5,
        "n_words": [2, 4],
        "valid_strings": 10,
        "test_strings": 200,
        "shared_words": ["NINE"],
        "own_share": 0.25,
        "domains": DOMAINS,
        "pretraining_steps": 2,
        "mixed_steps": 2,
        "domain_steps": 2,
        "left_out_speaker": None,
        **changes,
    }


def all_takes():
    splits = {"real": ("train", "valid", "test")}
    splits["synthetic"] = ("train", "valid")
    return {
        side: {split: takes(split, side) for split in names}
        for side, names in splits.items()
    }


def test_real_and_synthetic_strings_say_the_same(recipe):
    strings = recipe("strings").Strings(
        all_takes(), hparams_of_strings(domain_steps=20)
    )
    real = strings.of_training("real", "one_four")
    synthetic = strings.of_training("synthetic", "one_four")
    assert len(real) == 100
    for one, other in zip(real, synthetic):
        assert one["wrd"] == other["wrd"] and one["gaps"] == other["gaps"]
        assert len(one["wavs"]) == len(one["gaps"]) - 1
        assert 2 <= len(one["wavs"]) <= 4
        assert len({wav[-8:-5] for wav in one["wavs"]}) == 1, "one speaker"
    assert {w for s in real for w in s["wrd"].split()} == {"ONE", "NINE"}
    # A later seed says something else.
    later = recipe("strings").Strings(
        all_takes(), hparams_of_strings(seed=1, domain_steps=20)
    )
    assert [s["wrd"] for s in real] != [
        s["wrd"] for s in later.of_training("real", "one_four")
    ]


def test_share_of_own_words(recipe):
    strings = recipe("strings").Strings(all_takes(), hparams_of_strings())
    words = " ".join(
        s["wrd"] for s in strings.held_out("real", "test", "three_six")
    ).split()
    # 600 words or so: four standard deviations are 0.07.
    assert words.count("SIX") / len(words) == pytest.approx(0.25, abs=0.07)
    alone = recipe("strings").Strings(
        all_takes(), hparams_of_strings(shared_words=[])
    )
    assert {s["wrd"] for s in alone.of_training("real", "three_six")} <= {
        " ".join(["SIX"] * n) for n in (2, 3, 4)
    }


@pytest.mark.parametrize("speaker", [None, "anna"])
@pytest.mark.parametrize("mixed_steps", [2, 0])
def test_no_model_hears_the_target_for_real_before_its_test(
    recipe, mixed_steps, speaker
):
    """Nor the left-out speaker, where the row is about an unheard one."""
    hparams = hparams_of_strings(mixed_steps=mixed_steps)
    strings = recipe("strings").Strings(all_takes(), hparams)
    module = recipe("study")
    planned = module.plan_trainings(hparams, "models", speaker)
    models = {training.name: training for training in planned}
    assert len(planned) == len(models)
    if speaker is None:
        assert len(models) == (MODELS if mixed_steps else 1 + 3 * 3)
    elif not mixed_steps:
        assert len(models) == UNHEARD
    real, voices = {}, {}
    for number, training in enumerate(planned):
        options = training.options
        for parent in training.parents:
            assert parent in list(models)[:number]
            assert options["base"] == f"models/{parent}/save"
        heard = [
            item
            for item in strings.of_training(
                options["training_of"],
                options.get("domain", "all"),
                options.get("without_speaker"),
            )
            if "-real-" in item["ID"]
        ]
        assert all(w.startswith("train") for i in heard for w in i["wavs"])
        real[training.name] = {w for i in heard for w in i["wrd"].split()}
        voices[training.name] = {item["spk_id"] for item in heard}
    assert not real[module.PRETRAINED]
    for target, own in DOMAINS.items():
        name = module.model_name(hparams, target, "synthetic", target, speaker)
        assert not real[name]
        used = [name, f"{module.unheard(speaker)}joint/{target}"]
        for source in set(DOMAINS) - {target}:
            for side in ("real", "synthetic"):
                name = module.model_name(hparams, target, side, source, speaker)
                assert bool(real[name]) == (side == "real")
                used.append(name)
        bound = module.model_name(hparams, target, "real", target, speaker)
        assert set(own) <= real[bound] and speaker not in voices[bound]
        while used:
            training = models[used.pop()]
            assert not real[training.name] & set(own), (target, training.name)
            assert speaker not in voices[training.name]
            used += training.parents


def test_speakers_are_left_out_in_turn(recipe):
    def leave_out(speaker, seed=0):
        return recipe("strings").Strings(
            all_takes(), hparams_of_strings(seed=seed, left_out_speaker=speaker)
        )

    for seed, name in enumerate(["anna", "ben", "anna"]):
        strings = leave_out("by_seed", seed)
        assert strings.left_out_speaker == name
        only = strings.held_out("real", "test", "one_four", only=name)
        assert {string["spk_id"] for string in only} == {name}
        rest = strings.held_out("real", "valid", "one_four", without=name)
        assert {string["spk_id"] for string in rest} == {"anna", "ben"} - {name}
    assert leave_out(None).left_out_speaker is None
    with pytest.raises(ValueError, match="'eve' cannot be left out; .*anna"):
        leave_out("eve")
    with pytest.raises(ValueError, match="no training recording is of 'eve'"):
        strings.of_training("real", "one_four", "eve")


def test_a_word_that_nobody_says_is_named(recipe):
    with pytest.raises(ValueError, match="no recording of SEVEN"):
        recipe("strings").Strings(
            all_takes(), hparams_of_strings(shared_words=["SEVEN"])
        )


def test_errors_of_own_words_are_counted_apart(recipe):
    errors = recipe("study").count_errors(
        ["ONE NINE NINE ONE", "NINE"], ["NINE NINE TWO", "NINE NINE"], {"ONE"}
    )
    # ONE deleted, ONE > TWO; and an insertion, which belongs to no word.
    assert errors == {"wer": 60.0, "own_words": 100.0, "shared_words": 0.0}
