"""The recipe `FSDD/ASR/transducer` at toy size, as users run it."""

import json

import pytest
import torch
from digit_corpus import make_corpus
from processes import Recipe, taskarith

RECIPE = Recipe("FSDD/ASR/transducer", script="study.py")
TINY = {
    "d_model": 16,
    "d_ffn": 16,
    "nhead": 2,
    "num_layers": 1,
    "kernel_size": 3,
    "predictor_dim": 8,
    "joint_dim": 8,
    "vocabulary": "[ONE, TWO, SIX]",
    "labels": "[<blank>, ONE, TWO, SIX]",
    "output_neurons": 4,
    "rare_words": "[SIX]",
    "pretraining_domains": "[in_domain, out_of_domain]",
    "languages": "[de, it]",
    "variants": "[f1, m1]",
    "takes_per_voice": 1,
    "pretraining_strings": 12,
    "pretraining_steps": 3,
    "rnnt_steps": 3,
    "min_wer_steps": 3,
    "train_minutes": 0.2,
    "batch_size": 4,
    "valid_strings": 3,
    "test_strings": 8,
    "streamed_strings": 3,
    # A killed run goes on in the middle of a training.
    "ckpt_interval_steps": 1,
}
ENGLISH = ("scratch", "transfer", "transfer_out_of_domain")
STAGES = [f"{n}_{e}" for n in ENGLISH for e in ("min_wer", "more_rnnt")]
ROWS = [*ENGLISH, *STAGES, "transfer_at_min_wer", "full_context"]
MODELS = len(ROWS) + 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few takes of three words by two speakers."""
    return make_corpus(tmp_path_factory, voices=["en-us+f1"])


def start(data, output, **options):
    """Start the study as a user would."""
    return RECIPE.start(output, {**TINY, **options, "data_folder": data})


def run(data, output, fails=False, **options):
    """Run the study to its end; return what it said."""
    return start(data, output, **options).finish(fails=fails)


def weights(output, name):
    """Read a model of the study by torch alone."""
    (path,) = (output / "models" / name / "save").glob("CKPT+*/model.ckpt")
    return torch.load(path, weights_only=True)


def finished_models(output):
    return len(list((output / "models").glob("*/finished.json")))


def part_of(state, *names):
    """Return the weights below some names."""
    return {k: v for k, v in state.items() if k.split(".")[0] in names}


def equal(one, other):
    """Are two sets of weights the same, bit for bit?"""
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one
    )


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    run(corpus, output)
    return output


@pytest.mark.slow
def test_leaves_the_whole_table(finished):
    rows = json.loads((finished / "summary.json").read_text())
    table = {
        (row["row"], row["metric"]): row["value"]
        for row in rows
        if row["table"] == "transducer"
    }
    assert {row for row, _ in table} == set(ROWS)
    for name in ROWS:
        for metric in ("wer", "rare_wer", "non_rare_wer", "insertions"):
            assert (name, metric) in table
        scratch = table["scratch", "wer"]
        assert table[name, "relative_reduction"] == pytest.approx(
            100 * (scratch - table[name, "wer"]) / scratch
        )
    for name in ENGLISH:
        control = table[f"{name}_more_rnnt", "wer"]
        assert table[f"{name}_min_wer", "reduction_over_rnnt"] == pytest.approx(
            100 * (control - table[f"{name}_min_wer", "wer"]) / control
        )
    statistics = {
        (row["row"], row["metric"]): row["value"]
        for row in rows
        if row["table"] == "min_wer_statistics"
    }
    # The best of a list is never worse than what is expected of it.
    for name in (*(f"{n}_min_wer" for n in ENGLISH), "transfer_at_min_wer"):
        oracle = statistics[name, "oracle_wer"]
        assert 0 <= oracle <= statistics[name, "expected_wer"] + 1e-6
        assert 1 <= statistics[name, "hypotheses"] <= 4
    assert {row["split"] for row in rows} == {"test", "train"}
    text = (finished / "results.md").read_text()
    assert "3 of 3 strings come out of `transfer_min_wer`" in text
    assert "Rare words, by the training transcripts: SIX" in text
    assert (finished / "plots" / "wer.png").stat().st_size > 1000
    assert finished_models(finished) == MODELS


@pytest.mark.slow
def test_command_streams_the_recipes_own_recogniser(finished):
    folder = finished / "transcriber"
    found = json.loads(
        taskarith(
            *("transcribe", "--stream", "--chunk", "0.1", "--json"),
            *("--model", folder, folder / "example.wav"),
        )
    )
    from speechbrain_taskarith.data import read_audio
    from speechbrain_taskarith.transducer.streaming.folder import (
        load_transcriber,
    )

    model = load_transcriber(folder)
    wave = read_audio(folder / "example.wav", 16000)
    assert found["files"][0]["text"] == model.transcribe(wave)
    # 8 frames of 40 ms, and half a window of 25 ms.
    assert found["latency"]["algorithmic"] == pytest.approx(0.3325)
    # It is the last model of the study, with the sizes of this run.
    last = weights(finished, "transfer_min_wer")
    for name in ("frontend", "encoder"):
        state = getattr(model, name).state_dict()
        assert equal(
            state,
            {
                k.removeprefix(f"{name}."): v
                for k, v in part_of(last, name).items()
            },
        )


@pytest.mark.slow
def test_encoder_is_taken_over_and_nothing_else(corpus, tmp_path):
    # A rate of 0 leaves every model at its start.
    run(corpus, tmp_path, rnnt_lr=0.0, min_wer_lr=0.0, workers=2)
    start, source = (
        weights(tmp_path, name) for name in ("scratch", "pretrained_in_domain")
    )
    other = weights(tmp_path, "pretrained_out_of_domain")
    for name, encoder in (
        ("transfer", source),
        ("transfer_min_wer", source),
        ("transfer_at_min_wer", source),
        ("full_context", source),
        ("transfer_out_of_domain", other),
        ("scratch_min_wer", start),
    ):
        found = weights(tmp_path, name)
        taken, fresh = ("frontend", "encoder"), ("predictor", "joint")
        assert equal(part_of(found, *taken), part_of(encoder, *taken)), name
        if name != "full_context":  # it draws its own
            assert equal(part_of(found, *fresh), part_of(start, *fresh)), name
    assert not equal(part_of(source, "encoder"), part_of(start, "encoder"))
    assert source["joint.output.weight"].shape != (4, 8)


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same(corpus, finished, tmp_path):
    # Two processes share the models; both die without warning.
    start(corpus, tmp_path, workers=2).kill_when(
        lambda: finished_models(tmp_path) >= 4
    )
    assert 4 <= finished_models(tmp_path) < MODELS
    run(corpus, tmp_path, workers=2)
    assert finished_models(tmp_path) == MODELS
    for name in ("pretrained_in_domain", *ROWS):
        assert equal(weights(finished, name), weights(tmp_path, name)), name
    # What depends on a stop-watch is not in the table.
    old = json.loads((finished / "summary.json").read_text())
    assert json.loads((tmp_path / "summary.json").read_text()) == old


@pytest.mark.slow
def test_missing_words_are_named(corpus, tmp_path):
    said = run(
        corpus,
        tmp_path,
        fails=True,
        vocabulary="[ONE, TEN]",
        labels="[<blank>, ONE, TEN]",
        output_neurons=3,
    )
    assert "no train recording of TEN by" in said
