"""SYN2REAL with Whisper and its controls, with a tiny random model."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import Recipe
from recipe_modules import modules_of
from safetensors.torch import load_file
from test_recipe_whisper_sequential import errors, write_corpus
from tiny_whisper import save_tiny_whisper

from speechbrain_taskarith.metrics import Summary
from speechbrain_taskarith.vectors import TaskVector

pytest.importorskip("transformers")
pytest.importorskip("espeakng_loader")

RECIPE = Recipe("FilletsNG/ASR/whisper")
TABLE = "syn2real_languages"


@pytest.fixture(scope="module")
def recipe():
    """The recipe's own modules, which have everyday names."""
    with modules_of(RECIPE.folder) as module:
        yield module


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper_syn2real")
    write_corpus(folder / "data")
    return [
        *("--whisper_hub", str(save_tiny_whisper(folder / "whisper"))),
        *("--domain", f"nl={folder}/data/nl/{{}}.csv"),
        *("--domain", f"cs={folder}/data/cs/{{}}.csv"),
        *("--helper", f"en={folder}/data/english/{{}}.csv"),
        *("--output", str(folder / "study")),
        *("--longest", "2", "--lines", "4"),
        # Another model, so that its row is not that of the base.
        "--whole_window",
        str(save_tiny_whisper(folder / "whole", seed=1)),
    ]


@pytest.fixture(scope="module")
def finished(options, recipe):
    """The folder of a study of two seeds that has run."""
    recipe("syn2real").main([*options, "--seeds", "0", "1"])
    return Path(options[options.index("--output") + 1])


def measured(folder, seed, name, domain):
    """Return what one model said of a domain's test lines."""
    for path in (folder / str(seed) / "measured").glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["name"] == name and f"{domain}_test" in found["manifest"]:
            return found
    raise AssertionError(f"{name} on {domain}: not measured")


def counted(found):
    """Return WER in % by a plain count."""
    wrong = words = 0
    for key, text in found["references"].items():
        reference = text.split()
        wrong += errors(reference, found["hypotheses"][key].split())
        words += len(reference)
    return 100 * wrong / words


def test_the_table_is_that_of_a_naive_count(finished):
    summary, by_language = Summary.load(finished), {}
    for row, name in (
        ("baseline", {"synthetic/{}": 1.0}),
        ("joint", {"joint/{}": 1.0}),
        ("pretrained", {}),
    ):
        for target in ("nl", "cs"):
            model = {key.format(target): w for key, w in name.items()}
            each = [
                counted(measured(finished, seed, model, target))
                for seed in (0, 1)
            ]
            table = f"{TABLE}_{target}"
            by_language[target] = sum(each) / 2
            assert summary.value(table, row, "wer") == pytest.approx(
                by_language[target]
            )
        assert summary.value(TABLE, row, "wer") == pytest.approx(
            sum(by_language.values()) / 2
        )
    notes = (finished / "results.md").read_text(encoding="utf-8")
    for rival in ("baseline", "shrunk", "joint", "mean_of_baseline_and_real"):
        assert f"`edited_both` against `{rival}`" in notes
    assert (finished / "plots/surface_nl.png").stat().st_size > 5000


def test_own_words_are_those_that_no_source_text_holds(
    finished, recipe, monkeypatch
):
    report = recipe("studies.syn2real_report")
    syn2real = recipe("syn2real")
    monkeypatch.setattr(syn2real.Study, "__init__", lambda self: None)
    study = syn2real.Study()
    study.folder = finished / "0"
    whisper = SimpleNamespace(tokenizer=None)
    study.measure = SimpleNamespace(whisper=whisper)
    known = study.known_words(["cs", "en"])
    assert set(known.counts) == set("a fish the boat jedna ryba ano".split())
    found = {
        "references": {"1": "een vis ja", "2": "a fish"},
        "hypotheses": {"1": "een ja", "2": "fish fish"},
    }
    scores = report.scores(found, known)
    assert scores["wer"] == pytest.approx(100 * 2 / 5)
    assert scores["own_words"] == pytest.approx(100 / 3)  # of een, vis, ja


def test_an_edit_is_the_formula(finished, options, recipe):
    syn2real = recipe("syn2real")
    given = syn2real.parse_arguments(options)
    held_out = {("nl", "test"): finished / "data/nl_test.csv"}
    study = syn2real.Study(given, 0, held_out)
    state = study.state(syn2real.edit("nl", ["cs"], 0.5, 0.25))
    base = load_file(Path(given.whisper_hub, "model.safetensors"))

    def tuned(name):
        [path] = (finished / "0/models" / name).rglob("*.safetensors")
        return load_file(path)

    models = [tuned(n) for n in ("synthetic/nl", "real/cs", "synthetic/cs")]
    moved = 0
    parts = study.state(syn2real.edit_parts("nl", ["cs"], 0.5, 0.25, 0.75))
    three = study.state(syn2real.edit("nl", ["cs"], 0.5, 0.75, 0.25))
    for name, weight in base.items():
        weight = weight.double()
        d, r, s = (
            next(m[k] for k in m if k.endswith(name)).double() - weight
            for m in models
        )
        key = next(k for k in state if k.endswith(name))
        a = 0.25 if ".encoder." in key else 0.75
        for found, expected in (
            (state, 0.5 * d + 0.25 * (r - s)),
            (parts, 0.5 * d + a * (r - s)),
            (three, 0.5 * d + 0.75 * r - 0.25 * s),
        ):
            found = found[key].double()
            assert torch.allclose(found, weight + expected, atol=1e-6)
        moved += d.abs().max() > 0
    assert moved > 10


def test_a_rule_merges_the_differences(finished, options, recipe):
    syn2real, rows = recipe("syn2real"), recipe("studies.syn2real_rows")
    given = syn2real.parse_arguments(options)
    study = syn2real.Study(given, 0, {})
    sources, draw = ("cs", "en"), torch.Generator().manual_seed(0)
    key = next(key for key in study.base if key.endswith("0.fc1.weight"))
    # As far from the base as trainings of hours go.
    for source in sources:
        for side in ("real", "synthetic"):
            tuned = dict(study.base)
            noise = torch.randn(tuned[key].shape, generator=draw)
            tuned[key] = tuned[key] + 0.01 * noise
            vector = TaskVector.between(study.base, tuned)
            study.vectors[f"{side}/{source}"] = vector

    def added(weights):
        return (study.state(weights)[key] - study.base[key]).double()

    differences = torch.stack(
        [
            added(without_zeros(rows.edit("nl", [source], 0.0, 1.0)))
            for source in sources
        ]
    )
    weights = rows.by_rule("tsvm", "nl", sources, 0.0, 0.5)
    found, naive = added(without_zeros(weights)), tsv_m(differences) / 2 * 0.5
    assert torch.allclose(found, naive, atol=1e-5)
    assert naive.abs().max() > 1e-3
    # TIES: the mean of those that agree with the vote. The half of all
    # numbers that is trimmed is 0 already.
    weights = rows.by_rule("ties", "nl", sources, 0.0, 1.0)
    found = added(without_zeros(weights))
    agree = differences * (differences.sign() == differences.sum(0).sign())
    naive = agree.sum(0) / (agree != 0).sum(0)
    assert torch.allclose(found, naive, atol=1e-6)
    assert not torch.allclose(naive, differences.mean(0), atol=1e-3)


def without_zeros(weights):
    return {model: weight for model, weight in weights.items() if weight}


def tsv_m(differences):
    """Merge matrices as Gargiulo et al. 2025 write it."""
    rank = min(differences[0].shape) // len(differences)
    parts = [torch.linalg.svd(d, full_matrices=False) for d in differences]

    def white(matrix):
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return left @ right

    left = white(torch.cat([u[:, :rank] for u, _, _ in parts], 1))
    right = white(torch.cat([v[:rank].T for _, _, v in parts], 1))
    return left @ torch.cat([s[:rank] for _, s, _ in parts]).diag() @ right.T


def test_the_papers_start_is_mixed_data(finished, options, recipe):
    """All speech of the sources, then the target at a tenth of the rate."""
    rows = rows_of(finished / "0/data/mixed/nl.csv")
    real = rows_of(finished / "0/data/real/cs.csv")
    synthetic = rows_of(finished / "0/data/synthetic/cs.csv")
    wavs = [row["wav"] for row in (*real, *synthetic)]
    assert [row["wav"] for row in rows] == wavs
    assert len({row["ID"] for row in rows}) == len(rows) == 8
    models = finished / "0/models"
    mixed, then, target = (
        load_file(next((models / name).rglob("*.safetensors")))
        for name in ("mixed/nl", "mixed_then_synthetic/nl", "synthetic/nl")
    )
    whisper = value_of(options, "--whisper_hub")
    base = load_file(Path(whisper, "model.safetensors"))
    name = "model.decoder.layers.0.fc1.weight"

    def moved(state, start):
        [weight, before] = (
            next(s[key] for key in s if key.endswith(name))
            for s in (state, start)
        )
        return (weight - before).norm()

    whole = moved(target, base)
    assert 0.02 * whole < moved(then, mixed) < 0.3 * whole
    found = measured(
        finished,
        0,
        {
            "real/cs": 0.25,
            "synthetic/cs": -0.25,
            "mixed_then_synthetic/nl": 1.0,
        },
        "nl",
    )
    table = json.loads((finished / "summary.json").read_text("utf-8"))
    [value] = [
        row["value"]
        for row in table
        if (row["table"], row["row"]) == (f"{TABLE}_nl", "mixed_edited")
        and (row["metric"], row["seed"]) == ("wer", 0)
    ]
    assert value == pytest.approx(counted(found))


def test_the_whole_window_is_measured_beside(finished, options, recipe):
    hub = value_of(options, "--whole_window")
    summary = Summary.load(finished)
    for target in ("nl", "cs"):
        [found] = [
            result
            for path in (finished / "whole_window").glob("*.json")
            if (result := json.loads(path.read_text("utf-8")))["name"] == hub
            and f"{target}_test" in result["manifest"]
        ]
        value = summary.value(
            f"{TABLE}_{target}", "pretrained_whole_window", "wer"
        )
        assert value == pytest.approx(counted(found))


def test_each_row_chooses_from_its_own_points(recipe):
    """The simplest of equal ones; nothing is tried twice."""
    rows = recipe("studies.syn2real_rows")
    points = rows.points()
    assert len(set(points)) == len(points) == 4 * 5 + 4 * 6 + 1
    for choices in rows.CHOICES.values():
        assert set(choices) <= set(points)
    wers = dict.fromkeys(points, 50.0)
    least = {
        name: min(choices, key=wers.get)
        for name, choices in rows.CHOICES.items()
    }
    assert least["shrunk"] == (0.25, 0, 0) and least["edited"] == (1, 0, 0)
    wers[0.75, 0.5, 0.25] = 40.0
    assert min(rows.CHOICES["three"], key=wers.get) == (0.75, 0.5, 0.25)
    assert rows.edit("nl", ["cs", "en"], 0.75, 0.5, 0.25) == {
        "synthetic/nl": 0.75,
        "real/cs": 0.25,
        "synthetic/cs": -0.125,
        "real/en": 0.25,
        "synthetic/en": -0.125,
    }


def test_a_finished_study_trains_and_measures_nothing(
    finished, options, recipe, monkeypatch
):
    syn2real = recipe("syn2real")
    before = (finished / "summary.json").read_text()

    def fail(*_, **__):
        raise AssertionError("trained or measured again")

    monkeypatch.setattr(syn2real, "train", fail)
    monkeypatch.setattr(syn2real.Study, "state", fail)
    syn2real.main([*options, "--seeds", "0", "1"])
    assert (finished / "summary.json").read_text() == before


def test_other_settings_in_the_folder_are_refused(
    finished, options, recipe, tmp_path
):
    lines = finished / "data/nl_test.csv"
    before = lines.read_bytes()
    here = Path(value_of(options, "--domain").split("=")[1]).parent
    spoken = finished / "synthetic/nl/manifest.csv"
    other = save_tiny_whisper(tmp_path / "other", seed=1)
    shutil.copytree(here, tmp_path / "nl")
    test = tmp_path / "nl/test.csv"
    test.write_text(test.read_text().replace("een vis", "een boot"))
    for more, said in (
        (["--lines", "2"], "another lines (4, now 2)"),
        (["--test", "1"], "another test (160, now 1)"),
        (["--longest", "1"], "another longest"),
        (["--whisper_hub", str(other)], "another base"),
        (["--synthetic", f"nl={spoken}"], "another --synthetic for nl"),
    ):
        with pytest.raises(ValueError) as error:
            recipe("syn2real").main([*options, *more])
        assert said in str(error.value) and str(finished) in str(error.value)
    with pytest.raises(ValueError, match="another test lines of"):
        recipe("syn2real").main(with_dutch(options, tmp_path))
    assert lines.read_bytes() == before


def prepare(recipe, options, output, *more):
    """Draw the lines of a study; returns its manifests' rows."""
    syn2real = recipe("syn2real")
    given = syn2real.parse_arguments([*options, "--output", str(output), *more])
    domains = syn2real.read_domains(given)
    manifests, _ = syn2real.prepare_data(given, domains, output / "0", 0)
    return {name: rows_of(path) for name, path in manifests.items()}


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def spoken(options, finished, tmp_path):
    """Manifests of the study's synthetic speech, and their options."""
    shutil.copytree(finished / "synthetic", tmp_path / "out/synthetic")
    folders = {name: tmp_path / "voices" / name for name in ("nl", "cs", "en")}
    rows = {}
    for name, folder in folders.items():
        shutil.copytree(finished / "synthetic" / name, folder)
        rows[name] = rows_of(folder / "manifest.csv")
    return folders, rows


def test_takes_of_another_engine(recipe, options, spoken, tmp_path):
    """A folder, several takes of a line, and no column lang."""
    folders, rows = spoken
    takes = [
        {k: v for k, v in row.items() if k != "lang"}
        | {"ID": f"{row['ID']}-{n}", "duration": 1 + n / 10}
        for row in rows["cs"]
        for n in range(2)
    ]
    write_rows(folders["cs"] / "manifest.csv", takes)
    more = ["--synthetic", f"cs={folders['cs']}"]
    found = prepare(recipe, options, tmp_path / "out", *more)
    for name in ("nl", "cs", "en"):
        real, synthetic = found[f"real/{name}"], found[f"synthetic/{name}"]
        for column in ("ID", "lang", "text"):
            assert [r[column] for r in real] == [r[column] for r in synthetic]
        assert len(real) == 4 and {r["lang"] for r in synthetic} == {name}
    assert all("voices/cs" in row["wav"] for row in found["synthetic/cs"])
    # One of two takes is drawn for each line, not always the same.
    assert {row["duration"] for row in found["synthetic/cs"]} == {"1.0", "1.1"}


def test_joint_data_of_several_sources(recipe, options, spoken, tmp_path):
    """Corpora may give their lines the same IDs, as these do."""
    here = Path(value_of(options, "--domain").split("=")[1]).parents[1]
    more = ["--domain", f"digits={here}/digits/{{}}.csv"]
    found = prepare(recipe, options, tmp_path / "out", *more)
    rows = found["joint/nl"]
    assert len({row["ID"] for row in rows}) == len(rows) == 3 * 4
    assert [row["lang"] for row in rows] == ["cs"] * 4 + ["en"] * 4 + ["nl"] * 4


def test_mixed_data_can_be_left_out(recipe, options, spoken, tmp_path):
    found = prepare(recipe, options, tmp_path / "out", "--skip_mixed")
    assert "joint/nl" in found and not any("mixed" in name for name in found)
    plan = recipe("syn2real").plan_second_trainings
    assert plan(found, ["nl", "cs"], 0, 3e-5, tmp_path) == []


def test_fewer_synthetic_lines_are_told(
    recipe, options, spoken, tmp_path, capsys
):
    folders, rows = spoken
    path = write_rows(folders["nl"] / "manifest.csv", rows["nl"][:3])
    more = ["--synthetic", f"nl={path}"]
    found = prepare(recipe, options, tmp_path / "out", *more)
    assert len(found["real/nl"]) == len(found["synthetic/nl"]) == 3
    assert "nl: 3 lines, not 4 (--lines)" in capsys.readouterr().out
    write_rows(path, [row | {"ID": f"x{row['ID']}"} for row in rows["nl"]])
    with pytest.raises(ValueError, match="manifest.csv.*such as train0, tra"):
        prepare(recipe, options, tmp_path / "out", *more)
    write_rows(path, [{"ID": "train0", "wav": "a.wav"}])
    with pytest.raises(ValueError, match="no column .duration.; found ID, wav"):
        prepare(recipe, options, tmp_path / "out", *more)


def test_longer_lines_are_counted_by_split(
    recipe, options, spoken, tmp_path, capsys
):
    prepare(recipe, options, tmp_path / "out", "--longest", "0.72")
    said = capsys.readouterr().out
    # Of 8 lines of 0.5, 0.55, ... s the last three.
    assert "nl/train.csv: 3 of 8 lines are longer than 0.72 s" in said
    assert "test.csv" not in said  # of two


def test_domains_share_no_recording(recipe, options, capsys):
    syn2real = recipe("syn2real")
    nl = value_of(options, "--domain").split("=")[1]
    more = ["--helper", f"also={nl}"]
    with pytest.raises(ValueError, match="nl and also share the recording"):
        syn2real.read_domains(syn2real.parse_arguments([*options, *more]))


def test_seeds_of_a_line_are_drawn_together(recipe):
    """The same answers twice are no more certain."""
    texts = {f"l{n}": "a b c d" for n in range(20)}
    worse = {k: "a x" if n % 3 else t for n, (k, t) in enumerate(texts.items())}
    better = {
        k: "a x" if n % 5 else t for n, (k, t) in enumerate(texts.items())
    }
    rows = {
        "one": {"references": texts, "hypotheses": worse},
        "two": {"references": texts, "hypotheses": better},
    }
    compare = recipe("studies.syn2real_report").compare
    results = {(seed, "nl"): {"rows": rows} for seed in range(3)}
    once = compare({(0, "nl"): {"rows": rows}}, "two", "one")
    assert compare(results, "two", "one") == once


@pytest.mark.parametrize(
    "change, said",
    [
        ({"text": " "}, "no text, e.g. test0"),
        ({"wav": "none.flac"}, "none.flac: no such file"),
        ({"lang": "xx"}, "test0: language 'xx'"),
    ],
)
def test_bad_test_lines_are_refused_before_anything_is_trained(
    recipe, options, spoken, tmp_path, change, said
):
    here = Path(value_of(options, "--domain").split("=")[1]).parent
    shutil.copytree(here, tmp_path / "nl")
    rows = rows_of(here / "test.csv")
    rows[0] |= change
    test = write_rows(tmp_path / "nl/test.csv", rows)
    argv = with_dutch(options, tmp_path)
    argv += ["--output", str(tmp_path / "out")]
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        recipe("syn2real").main([*argv, "--only_train"])
    assert not list((tmp_path / "out").glob("0/models/*"))
    # Once they are right, the same folder may be used.
    shutil.copy(here / "test.csv", test)
    syn2real = recipe("syn2real")
    settings = syn2real.settings_of(syn2real.parse_arguments(argv))
    recipe("common.settings").check_settings(tmp_path / "out", settings)


def with_dutch(options, folder):
    """Return the options with the Dutch manifests of another folder."""
    place = options.index("--domain") + 1
    there = f"nl={folder}/nl/{{}}.csv"
    return [*options[:place], there, *options[place + 1 :]]


def value_of(options, name):
    return options[options.index(name) + 1]


@pytest.mark.parametrize(
    "more, said",
    [
        (
            ["--synthetic", "nl=a.csv", "--synthetic", "de=b.csv"],
            "de: no --dom",
        ),
        (["--helper", "en"], "expected NAME=PATH"),
        (["--helper", "en=no_split.csv"], "expected {} for the split"),
        ([], "give three domains, or two and a helper"),
        # It would stand among its own sources.
        (["--helper", "cs=b_{}.csv"], "are named 'cs'"),
        (["--domain", "cs+sk=b_{}.csv"], "domain 'cs+sk': expected letters"),
        (["--domain", "news/tv=b_{}.csv"], "domain 'news/tv': expected"),
        (["--domain", "fran\xe7ais=b_{}.csv"], "expected letters of a to z"),
        (["--helper", "cs@x=b_{}.csv"], "domain 'cs@x': expected letters"),
    ],
)
def test_wrong_options_are_named(recipe, capsys, more, said):
    argv = ["--whisper_hub", "x", "--domain", "nl=nl_{}.csv"]
    with pytest.raises(SystemExit):
        recipe("syn2real").parse_arguments(
            [*argv, "--domain", "cs=cs_{}.csv", *more]
        )
    assert said in " ".join(capsys.readouterr().err.split())


def test_one_target_is_not_enough(recipe, capsys):
    argv = ["--whisper_hub", "x", "--domain", "nl=nl_{}.csv"]
    argv += ["--helper", "en=en_{}.csv", "--helper", "fr=fr_{}.csv"]
    with pytest.raises(SystemExit):
        recipe("syn2real").parse_arguments(argv)
    assert "give three domains" in capsys.readouterr().err
