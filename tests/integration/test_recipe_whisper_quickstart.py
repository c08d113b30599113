"""The quickstart with a given Whisper: its speech, its rows, its refusals."""

import csv
import json

import pytest
import torch
from processes import Recipe
from recipe_modules import modules_of
from tiny_whisper import save_tiny_whisper

from speechbrain_taskarith.data import write_audio
from speechbrain_taskarith.vectors import open_state, save_state

transformers = pytest.importorskip("transformers")
pytest.importorskip("espeakng_loader")

FOLDER = Recipe("FilletsNG/ASR/whisper").folder
TEXTS = {"en": ["One", "No boat", "Two"], "nl": ["Ja", "Een vis", "Dag"]}


@pytest.fixture
def recipe():
    """The recipe's own modules, which have everyday names."""
    with modules_of(FOLDER) as module:
        yield module


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A folder of a model with a window of three seconds."""
    folder = tmp_path_factory.mktemp("model") / "whisper"
    return save_tiny_whisper(folder, seconds=3)


def write_manifest(folder, rows):
    """Write rows as one manifest of all splits."""
    path = folder / "manifest.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def manifest(tmp_path):
    """Noise in two languages, one line longer than the window."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for lang, texts in TEXTS.items():
        for split in ("train", "test"):
            for number, text in enumerate(
                texts[: 3 if split == "train" else 2]
            ):
                seconds = 1.5 + 0.1 * number
                key = f"{lang}/{split}/{number}"
                name = key.replace("/", "_") + ".flac"
                wave = torch.rand(int(16000 * seconds), generator=generator)
                write_audio(folder / name, wave - 0.5, 16000)
                rows.append(
                    {
                        "ID": key,
                        "duration": seconds,
                        "wav": f"$data_root/{name}",
                        "lang": lang,
                        "split": split,
                        "text": text,
                    }
                )
    rows.append(rows[0] | {"ID": "long", "duration": 4.0})
    return write_manifest(folder, rows)


def read(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def start(recipe, whisper, data, output, *more):
    words = ["--model", str(whisper), "--data", str(data), "--workers", "1"]
    words += ["--output", str(output), "--lines", "2", "--test", "2"]
    words += ["--epochs", "1", "--window_steps", "2", *more]
    recipe("quickstart").main(words)


def refused(recipe, whisper, data, output, *more):
    """Start it where it must refuse; nothing may be trained."""
    with pytest.raises(SystemExit) as error:
        start(recipe, whisper, data, output, *more)
    assert not list(output.glob("*/models"))
    return " ".join(str(error.value).split())


@pytest.mark.slow
def test_both_tables_from_one_manifest(recipe, whisper, manifest, tmp_path):
    output = tmp_path / "out"
    start(recipe, whisper, manifest, output)
    page = (output / "results.md").read_text(encoding="utf-8")
    assert "Nothing is chosen" in page and "Target nl" in page
    assert "2 lines of en and 2 lines of nl to learn from" in page
    rows = {}
    for entry in json.loads((output / "summary.json").read_text()):
        rows.setdefault(entry["table"], set()).add(entry["row"])
    assert len(rows["syn2real"]) == 8 and len(rows["sequential_editing"]) == 6
    folder, base = output / "1234", output / "whisper-2s"

    # What the rows are, by hand.
    theta = open_state(base)

    def kept(name):
        return open_state(folder / "models" / name / "kept.safetensors")

    def same(found, wanted):
        for name in theta:
            torch.testing.assert_close(
                found[name].double(), wanted(name), rtol=1e-5, atol=1e-6
            )

    def added(state, name, before=theta):
        return state[name].double() - before[name].double()

    given = recipe("studies.quickstart_rows")
    tests = {
        (lang, "test"): folder / "data" / f"{lang}_test.csv" for lang in TEXTS
    }
    study = given.open_study(base, folder, tests)
    d, r, s = map(kept, ("synthetic/nl", "real/en", "synthetic/en"))
    plan = given.syn2real_rows("nl", "en")
    same(
        study.state(plan["edited"]),
        lambda n: d[n].double() + 0.25 * (added(r, n) - added(s, n)),
    )
    same(
        study.state(plan["shrunk"]),
        lambda n: theta[n].double() + 0.5 * added(d, n),
    )
    sequence = given.Sequence(base, folder, tests, ["en", "nl"])
    start_of = open_state(folder / "starts" / "task_arithmetic.safetensors")
    same(start_of, lambda n: theta[n].double() + 0.4 * added(r, n))
    second = kept("sequence/task_arithmetic")
    same(
        sequence.edited("task_arithmetic", 1),
        lambda n: start_of[n].double() + 0.4 * added(second, n, start_of),
    )
    moved = added(kept("sequence/fine_tuning"), "model.encoder.conv1.weight", r)
    assert moved.abs().max() > 0  # it went on from the first domain

    # Started again, nothing is trained or measured again.
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("kept.safetensors")}
    start(recipe, whisper, manifest, output)
    assert times == {p: p.stat().st_mtime_ns for p in times}
    # Another model or data in the same folder is refused.
    with pytest.raises(SystemExit, match="another lines"):
        recipe("quickstart").main(
            ["--model", str(whisper), "--data", str(manifest)]
            + ["--output", str(output), "--lines", "1"]
        )


def test_lines_of_both_sides_say_the_same(recipe, manifest, tmp_path):
    data = recipe("studies.quickstart_data")
    splits = data.read_corpus(manifest, tmp_path / "prepared")
    domains = data.domains_of(splits, manifest)
    assert list(domains) == ["en", "nl"]  # the largest first
    manifests, held_out, left_out = data.draw_lines(
        domains, 2.5, tmp_path / "out", lines=2, test=1, seed=0
    )
    assert left_out == {"en": 1, "nl": 0}
    for name in domains:
        real, spoken = (
            read(manifests[f"{side}/{name}"]) for side in ("real", "synthetic")
        )
        assert [r["text"] for r in real] == [r["text"] for r in spoken]
        assert len(real) == 2 and len(read(held_out[name, "test"])) == 1
        assert not {r["wav"] for r in real} & {r["wav"] for r in spoken}
    joint = read(manifests["joint/nl"])
    assert [r["lang"] for r in joint] == ["en"] * 2 + ["nl"] * 2
    assert [r["ID"].split("_")[0] for r in joint] == (
        ["real"] * 2 + ["synthetic"] * 2
    )


@pytest.mark.parametrize(
    "lengths, whole, seconds",
    [
        ([2.0, 3.2], 30, 4),  # the longest
        ([2.0] * 9 + [20.0], 30, 2),  # most are short
        ([2.0] * 5 + [20.5] * 5, 30, 21),  # they are not
        ([2.0] * 5 + [45.0] * 5, 30, 2),  # what fits
        ([2.0, 5.0], 3, 2),  # a model that was cut before
        ([6.0], 30, 6),
        ([2.0] * 7 + [6.5] * 3, 30, 2),  # just most of them
        ([2.0] * 6 + [6.5] * 4, 30, 7),
    ],
)
def test_the_window_follows_from_the_lines(recipe, lengths, whole, seconds):
    rows = [{"duration": length} for length in lengths]
    choose = recipe("studies.quickstart_data").choose_window
    assert choose({"a": {"train": rows}}, whole, 6) == seconds


@pytest.mark.parametrize(
    "precision, lines, longest", [("bf16", 160, 6), ("fp32", 40, 4)]
)
def test_a_processor_without_bfloat16_gets_fewer_lines(
    recipe, monkeypatch, precision, lines, longest
):
    quickstart = recipe("quickstart")
    monkeypatch.setattr(quickstart, "fast_precision", lambda: precision)
    words = ["--model", "whisper", "--data", "corpus"]
    given = quickstart.parse_arguments(words)
    assert (given.lines, given.longest) == (lines, longest)
    given = quickstart.parse_arguments([*words, "--lines", "500"])
    assert (given.lines, given.longest) == (500, longest)


def test_no_line_that_fits(recipe):
    rows = [{"duration": 40.0}]
    with pytest.raises(ValueError, match="longer than 30 s"):
        recipe("studies.quickstart_data").choose_window(
            {"a": {"train": rows}}, 30, 6
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lang": "en"}, "1 domain(s) with lines in train and in test (en)"),
        ({"text": " "}, "utterances have no text, e.g. en_train_0"),
        ({"text": None}, "no column text (or wrd)"),
        ({"split": None}, "no column split"),
        ({"lang": None}, "has no language"),
        ({"duration": "short"}, "duration 'short'; expected a number"),
        ({"lang": "xx", "domain": None}, "1 domain(s)"),
        ({"ID": "same"}, "ID 'same' stands there twice"),
        (
            {"wav": "{ID}.mp3"},
            "0.mp3: no such file; the recording of en_train_0",
        ),
        ({"duration": "50"}, "longer than 3 s"),
    ],
)
def test_bad_manifests(recipe, whisper, manifest, tmp_path, change, message):
    rows = read(manifest)
    for row in rows:
        for key, value in change.items():
            if value is None:
                row.pop(key, None)
            else:
                row[key] = value.format(ID=row["ID"])
    path = write_manifest(manifest.parent, rows)
    said = refused(recipe, whisper, path, tmp_path / "out")
    assert message in said


def test_a_recording_of_both_domains(recipe, whisper, manifest, tmp_path):
    rows = read(manifest)
    assert (rows[-2]["lang"], rows[-2]["split"]) == ("nl", "test")
    rows[-2]["wav"] = rows[0]["wav"]
    path = write_manifest(manifest.parent, rows)
    said = refused(recipe, whisper, path, tmp_path / "out")
    assert "domains en and nl share the recording" in said


def test_two_domains_that_would_have_one_name(recipe, manifest, tmp_path):
    data = recipe("studies.quickstart_data")
    rows = read(manifest)
    for number, row in enumerate(rows):
        row["domain"] = ("C+", "C#")[number % 2]
    path = write_manifest(manifest.parent, rows)
    with pytest.raises(ValueError, match="'C.' and 'C.' would both be"):
        data.domains_of(data.read_corpus(path, tmp_path), path)


def test_what_a_spreadsheet_writes(recipe, manifest, tmp_path):
    read_rows = recipe("studies.quickstart_data").read_rows
    rows = read_rows(manifest)
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text("\ufeff" + text.replace(",", ", "), "utf-8")
    assert read_rows(manifest) == rows
    assert recipe("studies.lines").read_csv(manifest)[0]["ID"] == "en/train/0"
    assert "en/train/0" in recipe("common.rows").load_rows(manifest, ".")
    manifest.write_text(text + "cut,1.0\n", "utf-8")
    for refuse in (read_rows, recipe("studies.lines").read_csv):
        with pytest.raises(ValueError, match="line 13: expected .* cells"):
            refuse(manifest)


def test_other_weights_are_another_model(recipe, whisper, manifest, tmp_path):
    settings_of = recipe("quickstart").settings_of
    words = ["--model", str(whisper), "--data", str(manifest)]
    given = recipe("quickstart").parse_arguments(words)
    state = dict(open_state(whisper))
    path = tmp_path / "w.safetensors"
    found = []
    for _ in range(2):
        save_state(state, path)
        found.append(settings_of(given, open_state(path), {}))
        state["model.encoder.layer_norm.bias"] = (
            state["model.encoder.layer_norm.bias"] + 1
        )
    assert found[0]["model"] != found[1]["model"]


def test_bad_models_and_folders(recipe, whisper, manifest, tmp_path):
    out = tmp_path / "out"
    said = refused(recipe, "someone/tiny", manifest, out)
    assert "hf download someone/tiny" in said
    (tmp_path / "empty").mkdir()
    said = refused(recipe, tmp_path / "empty", manifest, out)
    assert "expected a folder with a Whisper" in said
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "wav2vec2"}')
    said = refused(recipe, other, manifest, out)
    assert "a wav2vec2 model; expected a Whisper" in said
    said = refused(recipe, whisper, tmp_path / "empty", out)
    assert "expected a folder that a prepare script" in said
    said = refused(recipe, whisper, tmp_path / "none", out)
    assert "no such file or folder" in said
    said = refused(recipe, whisper, manifest, out, "--domains", "en", "cs")
    assert "no cs in" in said and "there are en, nl" in said


def test_an_english_model_refuses_other_languages(recipe, manifest, tmp_path):
    english = save_tiny_whisper(tmp_path / "english", vocab_size=51864)
    said = refused(recipe, english, manifest, tmp_path / "out")
    assert "an English-only Whisper, but domain nl has lines in 'nl'" in said


def test_capitals_and_domains(recipe, manifest, tmp_path):
    data = recipe("studies.quickstart_data")
    rows = read(manifest)
    for row in rows:
        row["wrd"] = row.pop("text").upper()
        row["domain"] = row["lang"] + "/home"
        row["lang"] = "en"
    path = write_manifest(manifest.parent, rows)
    domains = data.domains_of(data.read_corpus(path, tmp_path), path)
    assert list(domains) == ["en_home", "nl_home"]
    assert domains["en_home"]["train"][0]["text"] == "one"
