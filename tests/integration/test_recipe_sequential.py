"""The recipe `FSDD/ASR/sequential_editing` at toy size, as users run it."""

import json
import re
import shutil

import pytest
import torch
from digit_corpus import make_corpus
from processes import Recipe

from speechbrain_taskarith.metrics import LifelongMatrix
from speechbrain_taskarith.vectors import (
    SequentialEditor,
    open_state,
)

# A checkpoint after every batch.
EACH_STEP = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
STUDY = Recipe("FSDD/ASR/sequential_editing", script="study.py")
TRAINING = Recipe("FSDD/ASR/sequential_editing", "--noprogressbar")
TINY = {
    # The recipe's own is stiff on steps this few: rounding grows.
    "ewc_strength": 1000.0,
    "d_model": 16,
    "d_ffn": 16,
    "nhead": 2,
    "num_encoder_layers": 1,
    "first_steps": 4,
    "steps": 2,
    "batch_size": 4,
    "valid_strings_per_speaker": 3,
    "test_strings_per_speaker": 3,
    # Random numbers differ between processes; without them the results of
    # one and two processes can be compared.
    "dropout": 0.0,
    "augment_prob": 0.0,
    # Adam divides a gradient by its own size and so magnifies rounding.
    "opt_class": "!name:torch.optim.SGD",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few takes of three words by one speaker of each accent."""
    return make_corpus(tmp_path_factory, speakers=None, accents=True)


def run(data, output, *, fails=False, **options):
    """Run the study to its end; return what it said."""
    options = {**TINY, **options, "data_folder": data}
    return STUDY.run(output, options, fails=fails)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    run(corpus, output, workers=2)
    return output


def kept(output, row, step):
    """Return what a row of the study kept after a domain."""
    path = next((output / "save" / row).glob(f"{step:02d}_*/kept.*"))
    return dict(open_state(path))


def first_model(output):
    return dict(open_state(output / "save/first_model/kept.safetensors"))


def fine_tuned(output, lr, domain):
    """Return the plain fine-tuning of a domain that rows share."""
    [folder] = (output / "models" / f"plain_{lr}").glob(f"{domain}-*")
    return dict(open_state(folder / "save"))


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def step(data, finished, output, **options):
    """Return options of train.py for German after the study's US model."""
    return {
        **TINY,
        "data_folder": data,
        "study_folder": output.parent / "study",
        "domain": "german",
        "seen": "[us]",
        "base": finished / "save/first_model/kept.safetensors",
        **options,
    }


def newest(output, name="model.ckpt"):
    [path] = output.glob(f"save/CKPT+*/{name}")
    return dict(open_state(path))


@pytest.mark.slow
def test_leaves_the_whole_table(finished):
    rows = json.loads((finished / "summary.json").read_text())
    found = {(r["row"], r["metric"]) for r in rows}
    names = {"fine_tuning", "averaging_half", "averaging_one_over_t"}
    names |= {"encoder_only", "ewc", "lwf", "replay", "joint"}
    names |= {"task_arithmetic", "ties", "chosen_scale", "chosen_scale_new"}
    assert {(n, "average_wer") for n in names} <= found
    assert {(n, "bwt") for n in names} <= found
    assert {(n, "werr") for n in names} <= found
    paired = [r for r in rows if r["table"] == "sequential_editing_paired"]
    rows = [r for r in rows if r["table"] == "sequential_editing"]
    chosen = [r for r in rows if r["row"] == "chosen_scale"]
    assert {r["selected_on"] for r in chosen} == {"valid_seen"}
    assert {r["split"] for r in rows} == {"test"}
    # The table is what the matrices say.
    for row in rows:
        matrix = LifelongMatrix.load(
            finished / "save" / row["row"] / "matrix_test.json"
        )
        if row["metric"] == "average_wer":
            last = matrix.domains[-1]
            naive = sum(matrix[last, d] for d in matrix.domains) / 4
            assert row["value"] == pytest.approx(naive)
    # The rival stands right before the edits.
    order = list(dict.fromkeys(r["row"] for r in rows))
    first_edit = order.index("task_arithmetic")
    assert order[first_edit - 2 : first_edit] == [
        "averaging_half",
        "averaging_one_over_t",
    ]
    check_paired(finished, paired)
    text = (finished / "results.md").read_text()
    assert "the strongest rival that keeps no old data is" in text
    assert text.count("gives back the weights before it, bit for bit") == 4
    for name in (
        "wer_matrix_ties",
        "cosines_task_arithmetic",
        "wer_against_scale_chosen_scale_german",
    ):
        assert (finished / "plots" / f"{name}.png").stat().st_size > 1000
    assert len(list((finished / "cl_masr_logs").iterdir())) == len(names) + 1


def check_paired(finished, paired):
    """Its differences are those of the matrices, domains weighed by words."""
    found = {(r["row"], r["metric"]): r["value"] for r in paired}
    for rival in ("fine_tuning", "ewc", "averaging_half"):
        values = [
            found[f"ties against {rival}", m]
            for m in ("low", "difference", "high")
        ]
        assert values == sorted(values)
        apart = []
        for row in (rival, "ties"):
            matrix = LifelongMatrix.load(
                finished / "save" / row / "matrix_test.json"
            )
            apart.append([matrix["belgian", d] for d in matrix.domains])
        gains = [a - b for a, b in zip(*apart)]
        assert min(gains) - 1e-9 <= values[1] <= max(gains) + 1e-9
        assert 0 < found[f"ties against {rival}", "p_value"] <= 1


@pytest.mark.slow
def test_started_again_it_changes_nothing(corpus, finished):
    before = {
        path: path.read_bytes() for path in finished.rglob("*.safetensors")
    }
    summary = (finished / "summary.json").read_text()
    run(corpus, finished)
    assert (finished / "summary.json").read_text() == summary
    # Some rows only: the others stay in the table.
    run(corpus, finished, only="ties")
    assert (finished / "summary.json").read_text() == summary
    assert all(path.read_bytes() == old for path, old in before.items())


@pytest.mark.slow
def test_rows_are_what_they_say(finished):
    first = first_model(finished)
    tuned = fine_tuned(finished, 0.001, "german")
    assert same(kept(finished, "fine_tuning_same_lr", 2), tuned)
    for row, share in (("task_arithmetic", 0.4), ("averaging_half", 0.5)):
        found = kept(finished, row, 2)
        for name, old in first.items():
            expected = old + share * (tuned[name] - old)
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)
    partial = kept(finished, "encoder_only", 4)
    moved = {n for n in first if not torch.equal(partial[n], first[n])}
    encoder = {n for n in first if n.startswith("encoder.")}
    # Positional encodings are buffers.
    assert moved == {n for n in encoder if not n.endswith(".pe")}
    for row in ("ewc", "lwf", "replay", "joint", "ties"):
        last = kept(finished, row, 4)
        assert {n for n in first if not torch.equal(last[n], first[n])}


@pytest.mark.slow
def test_edits_can_be_taken_back(finished, tmp_path):
    shutil.copytree(finished / "save/ties/editor", tmp_path / "editor")
    with SequentialEditor.resume(tmp_path / "editor") as editor:
        assert same(editor.state(), kept(finished, "ties", 4))
        editor.undo("belgian")
        assert same(editor.state(), kept(finished, "ties", 3))
        editor.undo("greek")
        editor.undo("german")
        assert same(editor.state(), first_model(finished))


@pytest.mark.slow
def test_scales_are_chosen_for_each_domain(finished):
    editor = SequentialEditor.resume(
        finished / "save/chosen_scale_new/editor", read_only=True
    )
    assert [edit.name for edit in editor.log] == ["german", "greek", "belgian"]
    assert {edit.selected_on for edit in editor.log} == {"valid_new"}
    names = {f"chosen_scale_new_{edit.name}.csv" for edit in editor.log}
    assert names <= {path.name for path in (finished / "scales").iterdir()}


@pytest.mark.slow
def test_rows_that_begin_alike_train_once(finished):
    trained = [p.name for p in (finished / "models/plain_0.001").iterdir()]
    assert sum(name.startswith("german-") for name in trained) == 1
    assert sum(name.startswith("greek-") for name in trained) > 1


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_table(corpus, finished, tmp_path):
    rows = ("fine_tuning", "ewc", "ties")
    options = {"only": ",".join(rows), "workers": 2}

    def trained():
        return list((tmp_path / "models").rglob("finished.json"))

    STUDY.start(tmp_path, {**TINY, **options, "data_folder": corpus}).kill_when(
        lambda: len(trained()) >= 4
    )
    run(corpus, tmp_path, **options)
    assert len(trained()) == 1 + 3 * len(rows)
    for row in rows:
        for number in (2, 3, 4):
            one, two = (kept(o, row, number) for o in (finished, tmp_path))
            assert same(one, two), (row, number)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["plain", "ewc", "ties"])
def test_one_training_resumes_and_is_the_studys(
    corpus, finished, tmp_path, row
):
    output = tmp_path / "one"
    options = step(corpus, finished, output, row=row, **EACH_STEP)
    if row != "ewc":  # as the study calls what rows share
        [folder] = (finished / "models/plain_0.001").glob("german-*")
        options["noise_name"] = folder.name
    TRAINING.start(output, options).kill_when(
        lambda: list(output.glob("save/CKPT+*"))
    )
    TRAINING.run(output, options)
    if row == "ties":
        found = newest(output, "model.finetuned.ckpt")
        assert same(found, fine_tuned(finished, 0.001, "german"))
        edited, expected = newest(output), kept(finished, "ties", 2)
        for name, value in expected.items():
            torch.testing.assert_close(edited[name], value)
    elif row == "ewc":
        assert same(newest(output), kept(finished, "ewc", 2))
    else:
        assert same(newest(output), fine_tuned(finished, 0.001, "german"))


@pytest.mark.slow
def test_two_processes_give_the_model_of_one(corpus, finished, tmp_path):
    """Same global batches; equal up to the order of floating-point sums.

    Measured by how far training moved the weights: Adam divides a gradient
    by its own size, so that a single weight whose gradient is next to
    nothing may differ by a tenth of a step.
    """
    first = first_model(finished)
    for row in ("plain", "ewc", "ties"):
        one, two = (tmp_path / f"{row}-{ranks}" for ranks in (1, 2))
        for ranks, output in ((1, one), (2, two)):
            options = step(corpus, finished, output, row=row)
            TRAINING.run(output, options, ranks=ranks)
        one, two = newest(one), newest(two)
        assert one.keys() == two.keys() == first.keys()
        apart = sum((one[n] - two[n]).square().sum() for n in one)
        moved = sum((one[n] - first[n]).square().sum() for n in one)
        assert apart.sqrt() <= 0.005 * moved.sqrt() + 1e-4, row
        for name, value in one.items():
            assert (value - two[name]).abs().max() < 1e-3, (row, name)


@pytest.mark.slow
def test_an_unknown_accent_or_row_is_named(corpus, tmp_path):
    said = run(corpus, tmp_path / "a", fails=True, only="nothing")
    assert "no rows nothing" in said
    said = run(corpus, tmp_path / "b", fails=True, domains="{us: Martian}")
    assert re.search("the data has .*GRC/Greek", said)


@pytest.mark.slow
def test_method_and_rule_together_are_refused(corpus, finished, tmp_path):
    method = "speechbrain_taskarith.vectors.lifelong.methods.FineTuning"
    options = step(
        corpus,
        finished,
        tmp_path / "one",
        row="ties",
        rows=f"{{ties: {{method: !new:{method} }} }}",
    )
    said = TRAINING.run(tmp_path / "one", options, fails=True)
    assert "not both" in said
