"""The recipe `FSDD/ASR/adapter_fusion` at toy size, as users run it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_taskarith.vectors import open_state

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/FSDD/ASR/adapter_fusion"
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
    pytest.importorskip("espeakng_loader")
    from speechbrain_taskarith.data import (
        SIMULATED_SPEAKERS,
        make_digits_corpus,
    )

    accents = {}
    for speaker in SIMULATED_SPEAKERS[:6]:
        accents.setdefault(speaker.accent, speaker)
    folder = tmp_path_factory.mktemp("corpus")
    make_digits_corpus(
        folder,
        speakers=list(accents.values()),
        takes=12,
        words=["ONE", "TWO", "SIX"],
        voices=["en-us+f1", "en-us+m1"],
        synthetic_takes=1,
        show_progress=False,
    )
    return folder / "recorded"


def start(data, output, stdout=subprocess.PIPE, **options):
    command = [sys.executable, "train.py", "hparams/train.yaml"]
    options = {"data_folder": data, "output_folder": output, **options}
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    return subprocess.Popen(
        [*command, "--device", "cpu"],
        cwd=RECIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(data, output, **options):
    process = start(data, output, **options)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def table(output):
    """Everything that the summary says, but how long it took."""
    rows = json.loads((output / "summary.json").read_text())
    return [row for row in rows if row["metric"] != "seconds"]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    code, said = run(corpus, output, **TINY)
    assert code == 0, said[-4000:]
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
        path: path.read_bytes() for path in finished.rglob("kept.safetensors")
    }
    assert len(before) == 1 + 1 + 7 + 1 + 9 + 9 + 8 + 1
    summary = (finished / "summary.json").read_text()
    code, said = run(corpus, finished, **TINY)
    assert code == 0, said[-4000:]
    assert (finished / "summary.json").read_text() == summary
    for path, content in before.items():
        assert path.read_bytes() == content, path


@pytest.mark.slow
def test_killed_and_started_again_it_ends_alike(corpus, finished, tmp_path):
    for wanted in (2, 9, 22):  # in LoRA, and in a composition
        # Nobody reads along, and a pipe that is full would stop it.
        process = start(corpus, tmp_path, subprocess.DEVNULL, **TINY)
        while len(list(tmp_path.rglob("kept.json"))) < wanted:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    code, said = run(corpus, tmp_path, **TINY)
    assert code == 0, said[-4000:]
    assert table(tmp_path) == table(finished)


@pytest.mark.slow
def test_an_adapters_file_works_in_another_copy_of_the_base(finished):
    with open(RECIPE / "hparams/train.yaml", encoding="utf-8") as stream:
        hparams = load_hyperpyyaml(
            stream,
            {
                **{k: v for k, v in TINY.items() if not isinstance(v, str)},
                "data_folder": "none",
                "output_folder": str(finished / "unused"),
            },
        )
    model, adapters = hparams["model"].eval(), hparams["adapters"]
    save = finished / "save"
    x, lens = torch.randn(2, 60, 40), torch.ones(2)
    outputs = []
    with torch.no_grad():
        model.load_state_dict(
            dict(open_state(save / "extraction_greek/kept.safetensors"))
        )
        adapters.use("greek")
        outputs.append(model(x, lens))
        model.load_state_dict(dict(open_state(save / "base/kept.safetensors")))
        adapters.load_adapter(save / "adapters/greek.safetensors", "guest")
        adapters.use("guest")
        outputs.append(model(x, lens))
        adapters.use(None)
        assert not torch.equal(outputs[0], model(x, lens))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.slow
def test_a_task_may_be_a_speaker(finished):
    spec = importlib.util.spec_from_file_location("tasks", RECIPE / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hparams = {"prepared_folder": str(finished / "prepared")}
    hparams |= {"takes_per_word": 2, "tasks": {"a": "GRC/Greek", "b": None}}
    tasks = module.Tasks(hparams, None)
    by_accent = tasks.of("a", "train")
    (hparams["tasks"]["b"],) = {r.spk_id for r in by_accent}
    assert tasks.of("b", "train") == by_accent
    assert len(by_accent) == 2 * 3  # takes of each word


def test_an_accent_that_nobody_speaks(corpus, tmp_path):
    code, said = run(
        corpus, tmp_path, **TINY, accents="{us: Mars}", base_data="pooled"
    )
    assert code != 0
    assert "'us': no train recording has the accent or speaker 'Mars'" in said
