"""The rows of `FSDD/ASR/syn2real`, against loops over the saved models."""

import importlib
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from speechbrain_taskarith.metrics import Summary, wer
from speechbrain_taskarith.vectors import open_state, save_state

RECIPE = Path(__file__).resolve().parents[2] / "recipes/FSDD/ASR/syn2real"
DOMAINS = {"a": ["ONE"], "b": ["TWO"], "c": ["SIX"]}
ROWS = (
    "pretrained baseline shrunk_target real_source real_source_mean "
    "mean_of_both support_language joint edited members "
    "paper_scale two_scales oracle real_target"
).split()
SCALES, TARGET_SCALES = [0.25, 0.5, 1.0], [0.0, 0.5, 1.0]


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's own modules, which have everyday names."""
    monkeypatch.syspath_prepend(str(RECIPE))
    names = ("train", "strings", "study", "report", "rows")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name: importlib.import_module(name)
    for name in names:
        sys.modules.pop(name, None)


def settings(**changes):
    return {
        "model": torch.nn.Linear(3, 2),
        "modules": None,
        "domains": DOMAINS,
        "mixed_steps": 0,
        "rows": ROWS,
        "scales": SCALES,
        "target_scales": TARGET_SCALES,
        "paper_scale": 0.25,
        "choose_on": "sources_as_targets",
        "report_on": "test",
        "seed": 0,
        "speaker": None,
        **changes,
    }


class Distances:
    """In place of a recogniser: its WER is a distance of the weights.

    Every set of strings has its own best weights, so that what is chosen
    depends on what is listened to.
    """

    def __init__(self, modules, hparams, run_opts):
        self.model = hparams["model"]
        self.references = self.hypotheses = ["ONE"]
        self.report = wer(["ONE"], ["ONE"])
        self.heard = []

    def wer_on(self, data):
        self.heard.append(data)
        weights = {n: t.double() for n, t in self.model.state_dict().items()}
        return distance(weights, data)


class Keys:
    """In place of strings: their names."""

    def held_out(self, side, split, domain, without=None, only=None):
        return side, split, domain, without, only


def distance(weights, data):
    text = " ".join(map(str, data))
    generator = torch.Generator().manual_seed(sum(map(ord, text)))
    return sum(
        float((t - torch.randn(t.shape, generator=generator)).square().sum())
        for _, t in sorted(weights.items())
    )


@pytest.fixture
def saved(tmp_path):
    """Models of three domains, in files; with two of them for `joint`."""
    torch.manual_seed(1)
    names = ["pretrained/all"]
    for start in ("", "unheard_ann/"):
        names += [f"{start}joint/{d}" for d in DOMAINS]
        names += [f"{start}real/{d}" for d in DOMAINS]
    names += [f"synthetic/{d}" for d in DOMAINS]
    for name in names:
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_state(torch.nn.Linear(3, 2), path)
    return tmp_path


def measured(recipe, monkeypatch, saved, target, speaker=None, **changes):
    """Leave a domain out; return the result and each row's weights."""
    study, hparams = recipe("study"), settings(**changes)
    monkeypatch.setattr(study, "ASR", Distances)
    monkeypatch.setattr(study, "evaluation_loader", lambda strings, _: strings)
    monkeypatch.setattr(study, "in_memory", lambda loader: loader)
    weights = {}

    class Recording(study.Measure):
        def errors(self, state, target):
            self.model.load_state_dict(dict(state))
            found = {n: t.clone() for n, t in dict(state).items()}
            weights.setdefault(len(weights), found)
            value = self.brain.wer_on(self.reported(target))
            shares = dict.fromkeys(("own_words", "shared_words"), 0.0)
            return {"wer": value, **shares}, self.brain.report

    measure = Recording(hparams, {}, Keys(), speaker)
    result = study.leave_out(
        target,
        lambda name: open_state(saved / f"{name}.safetensors"),
        measure,
        hparams,
    )
    return result, list(weights.values()), measure


def naive(saved, target, hears=""):
    """Return what each row's weights have to be, in float64, by loops."""

    def read(name):
        tensors = load_file(saved / f"{name}.safetensors")
        return {n: t.double() for n, t in tensors.items()}

    base = read("pretrained/all")
    real = {d: read(f"{hears}real/{d}") for d in DOMAINS}
    synthetic = {d: read(f"synthetic/{d}") for d in DOMAINS}
    sources = [d for d in DOMAINS if d != target]

    def mean(models):
        return {n: sum(m[n] for m in models) / len(models) for n in base}

    def edit(of, others, share, scale, support=False):
        made = {}
        for n in base:
            added = [
                real[o][n] - (base[n] if support else synthetic[o][n])
                for o in others
            ]
            own = synthetic[of][n] - base[n]
            made[n] = base[n] + share * own + scale * sum(added) / len(added)
        return made

    without = hears.removeprefix("unheard_").strip("/") or None

    def least(points, **how):
        """Choose with each source in the target's place."""
        found = {}
        for share, scale in points:
            found[share, scale] = fmean(
                distance(
                    edit(
                        s, [o for o in sources if o != s], share, scale, **how
                    ),
                    ("real", "valid", s, without, None),
                )
                for s in sources
            )
        return min(found, key=found.get)

    scales = [0.0, *SCALES]
    chosen = {
        "shrunk_target": least([(b, 0.0) for b in TARGET_SCALES]),
        "support_language": least([(1.0, a) for a in scales], support=True),
        "edited": least([(1.0, a) for a in scales]),
        "two_scales": least([(b, a) for b in TARGET_SCALES for a in scales]),
        "oracle": min(
            ((1.0, a) for a in scales),
            key=lambda at: distance(
                edit(target, sources, *at),
                ("real", "test", target, None, without),
            ),
        ),
    }
    both = mean([real[s] for s in sources])
    support = edit(target, sources, *chosen["support_language"], support=True)
    weights = {
        "pretrained": [base],
        "baseline": [synthetic[target]],
        "real_source": [real[s] for s in sources],
        "real_source_mean": [both],
        "mean_of_both": [mean([synthetic[target], both])],
        "support_language": [support],
        "joint": [read(f"{hears}joint/{target}")],
        "members": [edit(target, [s], *chosen["edited"]) for s in sources],
        "paper_scale": [edit(target, sources, 1.0, 0.25)],
        "real_target": [real[target]],
        **{
            row: [edit(target, sources, *chosen[row])]
            for row in ("shrunk_target", "edited", "two_scales", "oracle")
        },
    }
    return chosen, weights


@pytest.mark.parametrize("hears", ["", "unheard_ann/"])
@pytest.mark.parametrize("target", DOMAINS)
def test_rows_are_what_loops_over_the_models_give(
    recipe, monkeypatch, saved, target, hears
):
    speaker = "ann" if hears else None
    result, found, measure = measured(
        recipe, monkeypatch, saved, target, speaker
    )
    chosen, expected = naive(saved, target, hears)
    for row, at in chosen.items():
        scales = result["scales"][row]
        assert (scales["target_scale"], scales["scale"]) == at, row
    assert result["scales"]["members"] == result["scales"]["edited"]
    for row in ROWS:
        wers = []
        for weights in expected[row]:
            one = found.pop(0)
            for name, tensor in weights.items():
                torch.testing.assert_close(
                    one[name].double(), tensor, rtol=1e-5, atol=1e-6
                )
            wers.append(
                distance(weights, ("real", "test", target, None, speaker))
            )
        assert result["rows"][row]["wer"] == pytest.approx(
            fmean(wers), rel=1e-4
        )
    assert not found
    # Whoever chose has heard no recording of the target, nor the speaker.
    chose = [data for data in measure.brain.heard if data[1] == "valid"]
    assert chose and all(data[2] != target for data in chose)
    assert {data[3] for data in chose} == {speaker}
    assert {data[4] for data in measure.brain.heard if data[1] == "test"} == {
        speaker
    }


def test_a_control_that_is_ahead_is_named(recipe, monkeypatch, saved, tmp_path):
    """The tables are made of the rows, and the page says who won."""
    report, hparams = recipe("report"), settings(speaker="ann")
    results = {}
    for target in DOMAINS:
        results[target], *_ = measured(recipe, monkeypatch, saved, target)
        results[target]["unheard"] = [
            measured(recipe, monkeypatch, saved, target, "ann")[0]["rows"]
        ]
        for row, errors in results[target]["rows"].items():
            errors["wer"] = {"baseline": 40.0, "edited": 20.0}.get(row, 30.0)
        results[target]["rows"]["real_source_mean"]["wer"] = 10.0
        results[target]["rows"]["real_source_mean"]["own_words"] = 90.0
        reports, said = results[target]["reports"], ["ONE"] * 50
        reports.update(dict.fromkeys(reports, wer(said, said)))
        reports["baseline"] = wer(said, said[:25] + ["SIX"] * 25)
    summary = report.summarise(results, tmp_path, hparams)
    page = summary.markdown()
    assert "`real_source_mean` has a lower WER than every edit" in page
    assert "`real_source_mean` 10.0 % WER, 90.0 % of own words wrong" in page
    assert all(f"- `{row}`: " in page for row in ROWS)
    value = summary.value
    assert value("syn2real", "edited", "relative_reduction") == 50.0
    assert value("syn2real", "edited", "unheard_speaker") == pytest.approx(
        fmean(r["unheard"][0]["edited"]["wer"] for r in results.values())
    )
    assert value("syn2real_unheard_speaker", "edited", "wer") == value(
        "syn2real", "edited", "unheard_speaker"
    )
    pair = "edited against baseline"
    assert value("syn2real_paired", pair, "difference") == 50.0
    assert value("syn2real_paired", pair, "low") > 30.0
    order = [r["row"] for r in summary.rows("syn2real") if r["metric"] == "wer"]
    assert [row for row in order if row != "ensemble"] == ROWS
    assert isinstance(summary, Summary)


def test_rows_are_checked_before_anything_is_trained(recipe):
    check = recipe("rows").check_rows
    check(["baseline", "edited"])
    with pytest.raises(ValueError, match="no joints; there are baseline"):
        check(["baseline", "edited", "joints"])
    with pytest.raises(ValueError, match="edited left out"):
        check(["baseline"])
