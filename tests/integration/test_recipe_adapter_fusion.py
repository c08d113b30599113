"""The recipe `FSDD/ASR/adapter_fusion` at toy size, as users run it."""

import importlib
import json

import pytest
import torch
from digit_corpus import make_corpus
from hyperpyyaml import load_hyperpyyaml
from processes import Recipe

from speechbrain_taskarith.vectors import open_state

RECIPE = Recipe("FSDD/ASR/adapter_fusion", script="study.py")
TASKS = ["us", "german", "greek", "belgian"]
COMPOSED = [
    f"{kind}_{mode}"
    for kind in ("mean", "weighted_mean", "per_frame_fusion", "fusion")
    for mode in ("st", "mt")
]
COMPOSED += ["mean_from_shared_st"]
COMPOSED += ["fusion_from_shared_st", "fusion_from_shared_mt"]
TRAINED = ["full_fine_tuning", "lora", "shared_adapter", "extraction"]
TRAINED += ["full_fine_tuning_each", "extraction_together", "from_shared"]
UNTRAINED = {"mean_st", "mean_from_shared_st"}
STEPS = {
    name: {"steps": 2}
    for name in [*TRAINED, *COMPOSED]
    if name not in UNTRAINED
}
TINY = {
    "d_model": 16,
    "d_ffn": 16,
    "nhead": 2,
    "num_encoder_layers": 2,
    "bottleneck": 3,
    "shared_bottleneck": 5,
    "base_steps": 3,
    "batch_size": 4,
    "strings_per_task": 3,
    "takes_per_voice": 1,
    "voices": "[en-us+f1, de+m1]",
    "train_precision": "fp32",
    "training": json.dumps(STEPS),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few takes of all words by one speaker of each accent."""
    return make_corpus(tmp_path_factory, speakers=6, accents=True)


def start(data, output, **options):
    """Start the study as a user would."""
    return RECIPE.start(output, {**TINY, **options, "data_folder": data})


def run(data, output, fails=False, **options):
    """Run the study to its end; return what it said."""
    return start(data, output, **options).finish(fails=fails)


def table(output):
    """Everything that the summary says, but how long it took."""
    rows = json.loads((output / "summary.json").read_text())
    return [row for row in rows if row["metric"] != "seconds"]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    run(corpus, output)
    return output


def values(output, name, metric):
    return {
        row["row"]: row["value"]
        for row in table(output)
        if (row["table"], row["metric"]) == (name, metric)
    }


@pytest.mark.slow
def test_leaves_the_whole_table(finished):
    names = {"base", "routing", "routing_from_shared", *COMPOSED}
    names |= {"full_fine_tuning_in_turn", *TRAINED[:3], TRAINED[4]}
    means = values(finished, "adapter_fusion", "wer")
    assert set(means) == names
    by_task = [
        values(finished, "adapter_fusion_by_task", f"wer_{t}") for t in TASKS
    ]
    for name, mean in means.items():
        assert mean == pytest.approx(sum(wer[name] for wer in by_task) / 4)
    reduction = values(finished, "adapter_fusion", "relative_reduction")
    full = means["full_fine_tuning"]
    assert reduction["routing"] == pytest.approx(
        100 * (1 - means["routing"] / full)
    )
    share = values(finished, "adapter_fusion", "share")
    trained = values(finished, "adapter_fusion", "trained_parameters")
    assert share["base"] == 0 and share["full_fine_tuning"] == 100
    # Two layers, four adapters: 2db + b + d and an LN's 2d, each.
    assert trained["routing"] == 2 * 4 * (2 * 16 * 3 + 3 + 16 + 2 * 16)
    assert trained["fusion_st"] == trained["routing"] + 2 * (3 * 256 + 16)
    zero_shot = values(finished, "adapter_fusion_zero_shot", "wer_greek")
    assert set(zero_shot) == {"base", "fusion_mt", "full_fine_tuning"}
    text = (finished / "results.md").read_text()
    assert "the first four are the same bytes as before" in text
    for name in ("by_layer_fusion_st", "by_task_per_frame_fusion_mt"):
        plot = finished / "plots" / f"attention_{name}.png"
        assert plot.stat().st_size > 1000


@pytest.mark.slow
def test_started_again_it_changes_nothing(corpus, finished):
    before = {
        path: path.read_bytes()
        for path in finished.glob("models/*/save/CKPT+*/model.ckpt")
    }
    assert len(before) == 1 + 1 + 7 + 1 + 9 + 9 + 8 + 1
    summary = (finished / "summary.json").read_text()
    run(corpus, finished)
    assert (finished / "summary.json").read_text() == summary
    for path, content in before.items():
        assert path.read_bytes() == content, path


@pytest.mark.slow
def test_killed_and_started_again_it_ends_alike(corpus, finished, tmp_path):
    for wanted in (2, 9, 22):  # in LoRA, and in a composition
        start(corpus, tmp_path).kill_when(
            lambda count=wanted: (
                len(list(tmp_path.rglob("finished.json"))) >= count
            )
        )
    run(corpus, tmp_path)
    assert table(tmp_path) == table(finished)


@pytest.mark.slow
def test_an_adapters_file_works_in_another_copy_of_the_base(finished):
    with open(RECIPE.folder / "hparams/train.yaml", encoding="utf-8") as stream:
        hparams = load_hyperpyyaml(
            stream,
            {
                **{k: v for k, v in TINY.items() if not isinstance(v, str)},
                "data_folder": "none",
                "output_folder": str(finished / "unused"),
            },
        )
    model, adapters = hparams["model"].eval(), hparams["adapters"]
    models = finished / "models"
    x, lens = torch.randn(2, 60, 40), torch.ones(2)
    outputs = []
    with torch.no_grad():
        model.load_state_dict(
            dict(open_state(models / "extraction_greek/save"))
        )
        adapters.use("greek")
        outputs.append(model(x, lens))
        model.load_state_dict(dict(open_state(models / "base/save")))
        path = models / "extraction_greek/adapter.safetensors"
        adapters.load_adapter(path, "guest")
        adapters.use("guest")
        outputs.append(model(x, lens))
        adapters.use(None)
        assert not torch.equal(outputs[0], model(x, lens))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.slow
def test_a_task_may_be_a_speaker(finished, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE.folder))
    module = importlib.import_module("tasks")
    hparams = {"prepared_folder": str(finished / "prepared")}
    hparams |= {
        "sample_rate": 16000,
        "takes_per_word": 2,
        "tasks": {"a": "GRC/Greek", "b": None},
    }
    tasks = module.Tasks(hparams)
    by_accent = tasks.of("a", "train")
    (hparams["tasks"]["b"],) = {r.spk_id for r in by_accent}
    assert tasks.of("b", "train") == by_accent
    assert len(by_accent) == 2 * 3  # takes of each word


def test_an_accent_that_nobody_speaks(corpus, tmp_path):
    said = run(
        corpus,
        tmp_path,
        fails=True,
        task_sets="{accents: {us: Mars}}",
        base_data="pooled",
    )
    assert "'us': no train recording has the accent or speaker 'Mars'" in said
