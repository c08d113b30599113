"""The recipe `FSDD/ASR/sequential_editing` at toy size, as users run it."""

import json
import re

import pytest
from digit_corpus import make_corpus
from processes import Recipe

from speechbrain_taskarith.metrics import LifelongMatrix
from speechbrain_taskarith.vectors import open_state

RECIPE = Recipe("FSDD/ASR/sequential_editing", "--noprogressbar")
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
    # Adam divides a gradient by its own size and so magnifies rounding; the
    # dither of the audio depends on the temporary folder's name, so that it
    # would do so differently in every run.
    "opt_class": "!name:torch.optim.SGD",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few takes of three words by one speaker of each accent."""
    return make_corpus(tmp_path_factory, speakers=None, accents=True)


def run(data, output, *, ranks=1, fails=False, **options):
    """Run the recipe to its end; return what it said."""
    options = {**TINY, **options, "data_folder": data}
    return RECIPE.run(output, options, ranks=ranks, fails=fails)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    run(corpus, output)
    return output


def weights(output, row, step):
    path = next((output / "save" / row).glob(f"{step:02d}_*/kept.*"))
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
    assert {r["table"] for r in rows} == {"sequential_editing"}
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
    text = (finished / "results.md").read_text()
    assert text.count("gives back the weights before it, bit for bit") == 4
    for name in (
        "wer_matrix_ties",
        "cosines_task_arithmetic",
        "wer_against_scale_chosen_scale_german",
    ):
        assert (finished / "plots" / f"{name}.png").stat().st_size > 1000
    assert len(list((finished / "cl_masr_logs").iterdir())) == len(names) + 1


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
def test_two_processes_give_the_table_of_one(corpus, finished, tmp_path):
    """Same global batches; equal up to the order of floating-point sums.

    Measured by how far training moved the weights: Adam divides a gradient
    by its own size, so that a single weight whose gradient is next to
    nothing may differ by a tenth of a step.
    """
    rows = "fine_tuning,ewc,task_arithmetic,chosen_scale"
    run(corpus, tmp_path, only=rows, ranks=2)
    path = "save/first_model/kept.safetensors"
    start = dict(open_state(finished / path))
    for row in rows.split(","):
        for step in (2, 4):
            one, two = (weights(o, row, step) for o in (finished, tmp_path))
            assert one.keys() == two.keys() == start.keys()
            apart = sum((one[n] - two[n]).square().sum() for n in one)
            moved = sum((one[n] - start[n]).square().sum() for n in one)
            assert apart.sqrt() <= 0.005 * moved.sqrt() + 1e-4, (row, step)
            for name, value in one.items():
                assert (value - two[name]).abs().max() < 1e-3, (row, name)


@pytest.mark.slow
def test_an_unknown_accent_or_row_is_named(corpus, tmp_path):
    said = run(corpus, tmp_path / "a", fails=True, only="nothing")
    assert "no rows nothing" in said
    said = run(corpus, tmp_path / "b", fails=True, domains="{us: Martian}")
    assert re.search("the data has .*GRC/Greek", said)
