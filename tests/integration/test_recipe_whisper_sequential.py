"""Sequential editing and merging of Whisper, with a tiny random model."""

import csv
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from processes import Recipe
from recipe_modules import modules_of
from safetensors.torch import load_file
from speechbrain.dataio.batch import PaddedBatch
from tiny_whisper import save_tiny_whisper

from speechbrain_taskarith.data import read_audio, write_audio
from speechbrain_taskarith.metrics import LifelongMatrix, Summary
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning

transformers = pytest.importorskip("transformers")

RECIPE = Recipe("FilletsNG/ASR/whisper")
TEXTS = {
    "english": ["a fish", "the boat"],
    "digits": ["one two", "three"],
    "cs": ["jedna ryba", "ano"],
    "nl": ["een vis", "ja"],
}
ROWS = (
    "fine_tuning task_arithmetic_paper averaging_half averaging_one_over_t "
    "chosen_share ewc replay merge_ties joint"
).split()


@pytest.fixture(scope="module")
def recipe():
    """The recipe's own modules, which have everyday names."""
    with modules_of(RECIPE.folder) as module:
        yield module


def write_corpus(folder):
    """Write noise as four domains; returns their options."""
    generator = torch.Generator().manual_seed(0)
    for domain, texts in TEXTS.items():
        (folder / domain).mkdir(parents=True)
        for split, count in (("train", 8), ("valid", 2), ("test", 2)):
            rows = []
            for n in range(count):
                name = f"{split}{n}.flac"
                wave = torch.rand(8000 + 800 * n, generator=generator) - 0.5
                write_audio(folder / domain / name, wave, 16000)
                rows.append(
                    {
                        "ID": f"{split}{n}",
                        "duration": len(wave) / 16000,
                        "wav": f"$data_root/{name}",
                        "lang": domain if domain in ("cs", "nl") else "en",
                        "text": texts[n % 2],
                    }
                )
            path = folder / domain / f"{split}.csv"
            with open(path, "w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return [
        "--original",
        f"english={folder}/english/{{}}.csv",
        "--domains",
        *(f"{d}={folder}/{d}/{{}}.csv" for d in ("digits", "cs", "nl")),
    ]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper_sequential")
    whisper = save_tiny_whisper(folder / "whisper")
    return [
        *("--whisper_hub", str(whisper)),
        *write_corpus(folder / "data"),
        *("--output", str(folder / "study")),
        *("--longest", "2", "--batch_size", "4", "--epochs", "1"),
    ]


@pytest.fixture(scope="module")
def finished(options, recipe):
    """The arguments and the folder of a study that has run."""
    argv = [*options, "--orders", "cs,nl,digits", "--only", *ROWS]
    recipe("sequential").main(argv)
    return argv, Path(value(options, "--output"))


def values(folder, table):
    with open(folder / f"{table}.csv", encoding="utf-8") as stream:
        return {
            (row["row"], row["metric"]): float(row["value"])
            for row in csv.DictReader(stream)
        }


def errors(reference, hypothesis):
    """Levenshtein's distance of two lists of words."""
    line = list(range(len(hypothesis) + 1))
    for i, a in enumerate(reference, 1):
        new = [i]
        for j, b in enumerate(hypothesis, 1):
            new.append(min(new[-1] + 1, line[j] + 1, line[j - 1] + (a != b)))
        line = new
    return line[-1]


def wer_of(path):
    """Count a measured file anew, digits one by one."""
    found = json.loads(path.read_text(encoding="utf-8"))
    wrong = words = 0
    numerals = dict(zip(("one", "two", "three"), "123"))
    for key, text in found["references"].items():
        pair = [text, found["hypotheses"][key]]
        if key.startswith("digits/"):
            pair = [
                " ".join(
                    numerals.get(w, w) for w in re.findall(r"\d|[^\d\s]+", said)
                )
                for said in pair
            ]
        wrong += errors(*(text.split() for text in pair))
        words += len(pair[0].split())
    return 100 * wrong / words


def test_table_is_that_of_a_naive_count(finished):
    _, folder = finished
    table = values(folder, "sequential_editing")
    with open(
        folder / "matrices/cs_nl_digits/0/fine_tuning.csv", encoding="utf-8"
    ) as stream:
        lines = list(csv.DictReader(stream))
    last = lines[-1]
    assert last.pop("after") == "digits"
    assert list(last) == ["english", "cs", "nl", "digits"]
    average = sum(map(float, last.values())) / 4
    assert table["fine_tuning", "average_wer"] == pytest.approx(average)
    assert table["fine_tuning", "werr"] == 0.0
    forgot = [
        float(lines[n][name]) - float(last[name])
        for n, name in enumerate(("english", "cs", "nl"))
    ]
    assert table["fine_tuning", "bwt"] == pytest.approx(sum(forgot) / 3)
    # Each cell is in what was measured, counted by another program.
    measured = [wer_of(path) for path in folder.glob("measured/*.json")]
    for row in ("fine_tuning", "replay", "joint"):
        path = folder / f"matrices/cs_nl_digits/0/{row}.csv"
        with open(path, encoding="utf-8") as stream:
            for line in csv.DictReader(stream):
                del line["after"]
                for cell in filter(None, line.values()):
                    assert any(
                        math.isclose(float(cell), wer) for wer in measured
                    )
    assert ("joint", "bwt") not in table
    assert (folder / "plots/sequential_editing.png").stat().st_size > 5000
    [log] = folder.glob("cl_masr_logs/*/merge-ties_*.txt")
    assert log.read_text().count("test WER") == 1 + 2 + 3 + 4


def test_every_knob_was_tried_equally_often_and_chosen_on_valid(finished):
    _, folder = finished
    tuning = json.loads((folder / "tuning.json").read_text())
    assert {len(notes["valid_wer"]) for notes in tuning.values()} == {3}
    for notes in tuning.values():
        tried = notes["valid_wer"]
        assert tried[str(notes["chosen"])] == min(tried.values())
        assert notes["on"] == ["cs", "english"]
    assert "task_arithmetic_paper" not in tuning


def test_a_finished_study_trains_and_measures_nothing(
    finished, recipe, monkeypatch
):
    argv, folder = finished
    before = (folder / "results.md").read_text()

    def refuse(*_):
        raise AssertionError("trained or measured again")

    monkeypatch.setattr(recipe("studies.lineage"), "train", refuse)
    whisper = recipe("whisper_window").WindowedWhisper
    monkeypatch.setattr(whisper, "load_weights", refuse)
    recipe("sequential").main(argv)
    assert (folder / "results.md").read_text() == before


def test_trainings_that_are_alike_are_one(finished, recipe):
    argv, folder = finished
    sequential = recipe("sequential")
    study = sequential.Study(sequential.parse_arguments(argv), {0})
    rows = recipe("studies.sequential_rows").ROWS
    order = ["cs", "nl", "digits"]
    half = study.sequence(rows["averaging_half"], 0, order)
    by_number = study.sequence(rows["averaging_one_over_t"], 0, order)
    paper = study.sequence(rows["task_arithmetic_paper"], 0, order)
    merged = study.sequence(rows["merge_ties"], 0, order)
    # 1/2 after the first domain: one model, one further training from it.
    assert half[0].name == by_number[0].name
    assert half[1].trainings[0].name == by_number[1].trainings[0].name
    assert half[2].trainings[0].name != by_number[2].trainings[0].name
    assert half[0].trainings[0].name == paper[0].trainings[0].name
    assert half[0].trainings[0].name == merged[2].trainings[0].name
    # One vector has no angle to another: the model of the first step itself.
    stock = study.sequence(rows["merge_model_stock"], 0, order)
    assert stock[0].name == merged[0].trainings[0].name
    assert [len(model.trainings) for model in stock[1:]] == [2, 3]
    # What no row needs any more is gone, the shared ones are there.
    for training in study.plain(0):
        assert study.models.has_weights(training)
    assert not study.models.has_weights(half[2].trainings[0])
    assert not list(folder.glob("models/*/save"))
    assert not list((folder / "models" / "edits").glob("*"))


def test_deleted_weights_come_back_the_same(finished, recipe):
    argv, folder = finished
    sequential = recipe("sequential")
    study = sequential.Study(sequential.parse_arguments(argv), {0})
    [training, *_] = study.plain(0)
    first = {k: v.clone() for k, v in study.models.state(training).items()}
    study.models.keep_only(())
    assert not study.models.has_weights(training)
    again = sequential.Study(sequential.parse_arguments(argv), {0})
    for name, value in again.models.state(training).items():
        assert torch.equal(first[name], value), name
    for other in again.plain(0):
        again.models.train(other)  # as the other tests expect it


def test_an_edit_is_the_formula(finished, recipe):
    argv, folder = finished
    sequential = recipe("sequential")
    study = sequential.Study(sequential.parse_arguments(argv), {0})
    rows = recipe("studies.sequential_rows").ROWS
    models = study.sequence(rows["task_arithmetic_paper"], 0, ["cs", "nl"])
    before = load_file(study.base.path / "model.safetensors")
    expected = before
    for model in models:
        [training] = model.trainings
        study.models.train(training)
        tuned = load_file(
            folder / "models" / training.name / "kept.safetensors"
        )
        expected = {
            name: (0.6 * old.double() + 0.4 * tuned[name].double()).float()
            for name, old in expected.items()
        }
    found = study.models.state(models[-1])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        assert name.endswith("embed_positions.weight") or not torch.equal(
            value, before[name]
        ), name


def test_replay_takes_places_of_new_lines(finished, recipe):
    _, folder = finished
    paths = sorted(folder.glob("data/0/replay/digits_after_cs_nl_*.csv"))
    assert paths
    for path in paths:
        share = float(path.stem.rsplit("_", 1)[1])
        with open(path, encoding="utf-8") as stream:
            ids = [row["ID"] for row in csv.DictReader(stream)]
        old = [key for key in ids if not key.startswith("digits/")]
        assert len(ids) == len(set(ids)) == 8  # as many steps as others
        assert len(old) == 2 * round(4 * share)


def test_merging_tables(options, finished, recipe):
    _, folder = finished
    rules = ["LinearAverage", "TIES"]
    # Recordings of its own, with the same words.
    data = data_of(options)
    shutil.copytree(data / "cs", data / "fr")
    outside = f"fr={data}/fr/valid.csv"
    argv = [*options, "--rules", *rules, "--outside", outside]
    recipe("merging").main(argv)
    table = values(folder / "merging", "merging")
    for row in ("base", "only_cs", "LinearAverage", "TIES", "TIES_chosen"):
        inside = [table[row, f"on_{name}"] for name in ("digits", "cs", "nl")]
        assert table[row, "in_domain"] == pytest.approx(sum(inside) / 3)
        assert table[row, "outside"] == table[row, "on_fr"]
        assert (row, "original") in table
    for metric in ("in_domain", "outside", "original"):
        own = [
            table[f"only_{n}", f"on_{n}" if metric == "in_domain" else metric]
            for n in ("digits", "cs", "nl")
        ]
        assert table["each_on_its_own_domain", metric] == pytest.approx(
            sum(own) / 3
        )
    plot = folder / "merging/plots/merging.png"
    assert plot.stat().st_size > 5000
    chosen = json.loads((folder / "merging/chosen.json").read_text())
    assert set(chosen["0"]) == {"TIES"}
    # Against the mean: on all test lines together.
    words = {n: len(" ".join(said).split()) for n, said in TEXTS.items()}
    words["fr"] = words["cs"]  # the same two lines

    def pooled(row):
        wers = {n: table[row, f"on_{n}"] for n in words if n != "english"}
        wers["english"] = table[row, "original"]
        return sum(wers[n] * words[n] for n in words) / sum(words.values())

    paired = values(folder / "merging", "against_LinearAverage")
    assert len({row for row, _ in paired}) == 6
    for row, metric in paired:
        low, high = paired[row, "low"], paired[row, "high"]
        assert low <= paired[row, "difference"] <= high
        if metric == "difference":
            assert paired[row, metric] == pytest.approx(
                pooled("LinearAverage") - pooled(row)
            )


@pytest.mark.parametrize("name", ["sequential", "merging"])
def test_bad_lines_are_refused_before_anything_is_trained(
    options, recipe, tmp_path, name, capsys
):
    shutil.copytree(data_of(options), tmp_path / "data")
    test = tmp_path / "data/nl/test.csv"
    good = test.read_text(encoding="utf-8")
    argv = [
        w.replace(str(data_of(options)), f"{tmp_path}/data") for w in options
    ]
    argv += ["--output", str(tmp_path / "out"), "--longest", "0.72"]
    for row, said in (
        ("train1,0.5,$data_root/test0.flac,nl,ja", "train1' is in the splits"),
        ("x,0.5,$data_root/test0.flac,xx,ja", "nl/x: language 'xx'"),
        ("x,0.5,$data_root/none.flac,nl,ja", "none.flac: no such file"),
        ("x,0.5,$data_root/test0.flac,nl, ", "no text, e.g. nl/x"),
        ("x,short,$data_root/test0.flac,nl,ja", "x: duration 'short'"),
        ("x,0.5,$data_root/train0.flac,nl,ja", "wav .*train0.* is in the spl"),
        (
            f"x,0.5,{tmp_path}/data/cs/train0.flac,nl,ja",
            "cs and nl share the recording .*train0.flac, in the splits",
        ),
    ):
        test.write_text(f"{good}{row}\n", encoding="utf-8")
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            recipe(name).main(argv)
    test.write_text(good, encoding="utf-8")
    if name == "merging":
        heard = ["--outside", f"fr={tmp_path}/data/nl/train.csv"]
        with pytest.raises(ValueError, match="nl and fr share the recording"):
            recipe(name).main([*argv, *heard])
    assert not (tmp_path / "out/models").exists()
    # Of 8 lines of 0.5, 0.55, ... s the last three.
    said = capsys.readouterr().out
    assert "cs/train.csv: 3 of 8 lines are longer than 0.72 s" in said


def test_the_base_may_be_a_hub_name(options, recipe, tmp_path, monkeypatch):
    """Laid out as the hub's client leaves it; nothing is downloaded."""
    import huggingface_hub

    whisper = Path(value(options, "--whisper_hub"))
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(whisper, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc123")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    lineage = recipe("studies.lineage")
    by_name = lineage.Base("someone/tiny", ["--lr=1"])
    assert by_name.path == repository / "snapshots/abc123"
    # The same models, whatever they are called.
    assert by_name.name == lineage.Base(whisper, ["--lr=1"]).name
    with pytest.raises(FileNotFoundError, match="hf download someone/else"):
        lineage.Base("someone/else")


def test_merging_lines_to_test_on_have_a_name_and_a_file(
    options, recipe, capsys
):
    parse = recipe("merging").parse_arguments
    for outside, said in (
        ("stamps.csv", "expected NAME=MANIFEST"),
        ("cs=stamps.csv", "two domains are named 'cs'"),
    ):
        with pytest.raises(SystemExit):
            parse([*options, "--outside", outside])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--only", "magic"], "magic"),
        (["--orders", "cs,nl"], "each of"),
        (["--tune_on", "fr"], "--tune_on fr"),
        (["--original", "english"], "expected NAME=PATTERN"),
        (["--original", "cs=x/{}.csv"], "two domains"),
        (["--original", "news/tv=x/{}.csv"], "domain 'news/tv': expected"),
        # Orders are written as a_b_c.
        (["--original", "cs_nl=x/{}.csv"], "domain 'cs_nl': expected"),
    ],
)
def test_wrong_options_are_named(options, recipe, capsys, more, said):
    with pytest.raises(SystemExit):
        recipe("sequential").parse_arguments([*options, *more])
    assert said in capsys.readouterr().err


def test_a_baseline_without_an_error_leaves_the_reduction_out(recipe):
    report = recipe("studies.sequential_report")
    quickstart = recipe("studies.quickstart_report")
    matrix = LifelongMatrix(["cs", "nl"])
    for after, on in (("cs", "cs"), ("nl", "cs"), ("nl", "nl")):
        matrix.record(after, on, 0.0)
    matrices = {(0, ("cs", "nl"), "fine_tuning"): matrix}
    study, quick = Summary(".", title="x"), Summary(".", title="x")
    report.add_row(study, matrices, 0, [("cs", "nl")], "fine_tuning")
    quickstart.add_sequence(quick, {"fine_tuning": matrix}, 0)
    for summary in (study, quick):
        metrics = {row["metric"] for row in summary.rows()}
        assert {"average_wer", "bwt"} < metrics and "werr" not in metrics


def test_digits_are_counted_one_by_one(recipe):
    domains = recipe("studies.domains")
    # What the normaliser makes of "seven three one" in words and numerals.
    report = domains.word_errors({"a": "731"}, {"a": "7 3 one"})
    assert (report.words, report.errors) == (3, 0)
    report = domains.word_errors({"a": "731"}, {"a": "72 one"})
    assert (report.words, report.errors) == (3, 1)
    # Other text stays as it is.
    report = domains.word_errors({"a": "731 boats"}, {"a": "7 3 one boats"})
    assert report.words == 2


def value(options, name):
    return options[options.index(name) + 1]


def data_of(options):
    return Path(value(options, "--output")).parent / "data"


def start(recipe, options, output, **more):
    """Run train.py on the digits, from the base."""
    data = data_of(options) / "digits"
    settings = {
        "whisper_hub": value(options, "--whisper_hub"),
        "train_csv": data / "train.csv",
        "data_folder": data,
        "data_root": data,
        "prepare": "null",
        "valid_csv": "null",
        "test_csv": "null",
        "output_folder": output,
        "train_precision": "fp32",
        "batch_size": 2,
        "number_of_epochs": 1,
        **more,
    }
    argv = [f"--{key}={value}" for key, value in settings.items()]
    yaml = str(RECIPE.folder / "hparams" / "train.yaml")
    return recipe("train").train([yaml, *argv, "--noprogressbar"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_measured_has_the_precision_asked_for(
    options, recipe, tmp_path, precision
):
    found = recipe("studies.measure").Measure(
        RECIPE.folder / "hparams" / "train.yaml",
        {
            "whisper_hub": value(options, "--whisper_hub"),
            "train_precision": precision,
            "output_folder": str(tmp_path),
        },
        tmp_path,
    )
    assert found.brain.eval_precision == precision


def test_ewc_measures_the_fisher_of_each_line(options, recipe, tmp_path):
    lines = data_of(options) / "digits" / "train.csv"
    start(recipe, options, tmp_path, method="ewc", remember=lines, ewc_lines=8)
    stored = load_file(tmp_path / "memory.safetensors")
    whisper = value(options, "--whisper_hub")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(
        whisper
    ).eval()
    tokenizer = transformers.WhisperTokenizer.from_pretrained(whisper)
    window = recipe("whisper_window").WindowedWhisper(
        whisper, str(tmp_path / "hub"), language="en"
    )
    prompt = [
        tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("startoftranscript", "en", "transcribe", "notimestamps")
    ]
    expected = {}
    with open(lines, encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            wave = read_audio(
                row["wav"].replace("$data_root", str(lines.parent)), 16000
            )
            said = tokenizer.encode(" " + row["text"], add_special_tokens=False)
            tokens = torch.tensor([[*prompt, *said, tokenizer.eos_token_id]])
            model.zero_grad()
            logits = model(
                window._get_mel(wave[None]), decoder_input_ids=tokens[:, :-1]
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits[0, 3:], tokens[0, 4:], reduction="sum"
            )
            loss.backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    square = p.grad.square() / 8
                    expected[name] = expected.get(name, 0) + square
    assert len(expected) > 20
    for name, fisher in expected.items():
        torch.testing.assert_close(
            stored[f"fisher.{name}"], fisher, rtol=1e-3, atol=1e-7
        )
        assert torch.equal(
            stored[f"anchor.{name}"],
            load_file(Path(whisper) / "model.safetensors")[name],
        )


def test_what_the_yaml_froze_stays_frozen(recipe):
    model, brain = torch.nn.Linear(2, 2), SimpleNamespace()
    model.bias.requires_grad_(False)
    recipe("train").start_method(
        FineTuning(), brain, {"whisper": model, "remember": None}
    )
    assert model.weight.requires_grad and not model.bias.requires_grad
    assert isinstance(brain.method, FineTuning)


def test_encoder_only_trains_the_encoder(options, recipe, tmp_path):
    brain = start(recipe, options, tmp_path, method="encoder_only")
    whisper = Path(value(options, "--whisper_hub"))
    before = load_file(whisper / "model.safetensors")
    after = brain.hparams.whisper.state_dict()
    changed = {n for n, old in before.items() if not torch.equal(old, after[n])}
    assert changed == {n for n in before if n.startswith("model.encoder.")}


def test_lwf_is_the_distance_from_the_old_model(options, recipe, tmp_path):
    brain = start(
        recipe, options, tmp_path, method="lwf", lwf_strength=3.0, lr=0.01
    )
    train = recipe("train")
    hparams = vars(brain.hparams) | {
        "data_folder": str(data_of(options) / "nl")
    }
    rows = train.read_rows(str(data_of(options) / "nl" / "train.csv"), hparams)
    data = train.make_dataset(rows, hparams)
    batch = PaddedBatch([data[n] for n in range(4)])
    with torch.no_grad():
        log_probs = brain.compute_forward(batch, sb.Stage.TRAIN)
        found = brain.penalty(log_probs, batch).item()
        # Without padding, token by token.
        total = 0.0
        for n in range(4):
            one = PaddedBatch([data[n]])
            old, new = (
                (whisper(one.sig.data, one.tokens_bos.data)[1][0, 3:] / 2)
                .double()
                .softmax(-1)
                for whisper in (brain.method.teacher, brain.hparams.whisper)
            )
            each = (old * (old / new).log()).sum(-1)
            total += each.mean().item() / 4
    assert found == pytest.approx(3.0 * 2**2 * total, rel=1e-3)
    assert found > 1e-4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method": "magic"}, "expected one of encoder_only, ewc, lwf"),
        ({"method": "ewc"}, "give --remember"),
        ({"remember": "x.csv"}, "give --method"),
    ],
)
def test_wrong_methods_are_errors_before_training(
    options, recipe, tmp_path, more, said
):
    with pytest.raises(ValueError, match=said):
        start(recipe, options, tmp_path, **more)
    assert not list((tmp_path / "save").glob("CKPT*"))
