"""The recipe `FilletsNG/ST/joint` on made manifests and a tiny Whisper."""

import csv
import json
from pathlib import Path

import numpy
import pytest
import soundfile
from processes import Recipe
from recipe_modules import modules_of
from tiny_whisper import save_tiny_whisper, tell_languages
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from speechbrain_taskarith.translation import SpeechTranslator

RECIPE = Recipe("FilletsNG/ST/joint", "--noprogressbar", script="study.py")
RATE = 16000
COUNTS = {"train": 14, "valid": 3, "test": 4}
SAID = "ryby plavou vodou; kde je ten ostrov?".split()
MEANT = {
    "en": "the fish swim here; where is it?".split(),
    "de": "die Fische schwimmen; wo sind wir?".split(),
}
TINY = {
    "d_model": 16,
    "d_ffn": 16,
    "nhead": 2,
    "stacked_frames": 2,
    "num_textual_layers": 1,
    "num_decoder_layers": 1,
    "source_type": "char",
    "source_pieces": 20,
    "target_type": "char",
    "target_pieces": 22,
    "number_of_epochs": 1,
    "max_batch_seconds": 6,
    "num_buckets": 2,
    "test_batch_size": 4,
    "task_interval": 2,
    "task_average": 1,
    "consistency_interval": 2,
    "greedy_tokens": 5,
    "beam_size": 2,
    "beam_steps": 5,
    "entropy_windows": "[1, 2]",
    "entropy_utterances": 3,
    "asr_epochs": 1,
    "mt_epochs": 1,
    "stage_batch_seconds": 6,
    "prepare": "null",
    "targets": "[en, de]",
    "languages": "[cs]",
}


def words(all_words, number, count):
    return " ".join(
        all_words[(number * step + step) % len(all_words)]
        for step in range(1, 1 + count)
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write manifests as the prepare script does, and a tiny Whisper."""
    folder = tmp_path_factory.mktemp("fillets")
    number = 0
    for split, count in COUNTS.items():
        rows = []
        for _ in range(count):
            g = numpy.random.default_rng(number)
            seconds = 0.8 + number % 3 / 10
            wave = 0.1 * g.standard_normal(round(seconds * RATE))
            path = folder / f"{split}_{number}.flac"
            soundfile.write(path, wave, RATE)
            row = {
                "ID": f"cs_{number}",
                "duration": seconds,
                "wav": f"$data_root/{path.name}",
                "spk_id": "cs_m",
                "lang": "cs",
                "text": words(SAID, number, 3),
                "text_en": words(MEANT["en"], number, 4),
                "text_de": words(MEANT["de"], number, 3),
            }
            rows.append(row)
            number += 1
        # One line has no German.
        rows[1]["text_de"] = ""
        # Utterances of a language that is not asked for.
        rows.append({**rows[0], "ID": "nl_0", "lang": "nl"})
        with open(folder / f"{split}.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    save_tiny_whisper(folder / "whisper")
    return folder


def options_of(corpus, **options):
    return {
        **TINY,
        "data_folder": corpus,
        "prepared_folder": corpus,
        "cache_folder": corpus / "encoded",
        "whisper_hub": corpus / "whisper",
        **options,
    }


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("study") / "0"
    RECIPE.run(output, options_of(corpus, only="whole,released_rule"))
    return output


@pytest.mark.slow
def test_leaves_scores_by_target_and_a_test(finished):
    rows = json.loads((finished / "summary.json").read_text())
    found = {(row["row"], row["metric"]) for row in rows}
    for row in ("whole", "released_rule", "mt_local"):
        assert (row, "bleu") in found
        assert {(row, "bleu_en"), (row, "chrf_de")} <= found
    assert ("asr", "ctc_cer") in found
    pair = "whole against released_rule"
    assert {(pair, "bleu_difference"), (pair, "chrf_p_value")} <= found
    result = json.loads((finished / "rows/whole.json").read_text())
    # Each utterance comes once for each language that it has.
    names = {line[0] for line in result["translations"]}
    assert len(names) == 2 * COUNTS["test"] - 1
    assert {name[-3:] for name in names} == {"-en", "-de"}
    assert not any(name.startswith("nl") for name in names)


@pytest.mark.slow
def test_the_released_rule_is_that_of_the_row(finished):
    histories = {
        row: json.loads((finished / f"rows/{row}.json").read_text())[
            "task_weights"
        ]
        for row in ("whole", "released_rule")
    }
    assert {entry["rule"] for entry in histories["whole"]} == {"isolated"}
    released = histories["released_rule"]
    assert {entry["rule"] for entry in released} == {"joint"}
    assert [entry["exponent"] for entry in released][:2] == [1, 2]
    assert (finished / "plots/task_weights_released_rule.csv").is_file()


@pytest.mark.slow
def test_whisper_encodes_each_utterance_once(corpus, finished):
    kept = sorted((corpus / "encoded").iterdir())
    assert len(kept) == sum(COUNTS.values())
    times = [path.stat().st_mtime_ns for path in kept]
    said = RECIPE.run(finished, options_of(corpus, only="whole,released_rule"))
    assert said.count("done before") == 4
    assert [path.stat().st_mtime_ns for path in kept] == times


@pytest.mark.slow
def test_whisper_itself_is_a_row(corpus, tmp_path):
    output = tmp_path / "0"
    english = options_of(
        corpus, targets="[en]", target_pieces=15, only="cascade"
    )
    RECIPE.run(output, english)
    # Room for as many tokens as a pipeline asks for, and none but those known.
    whisper = save_tiny_whisper(
        tmp_path / "whisper", seed=4, max_target_positions=448, vocab_size=364
    )
    tell_languages(whisper)
    command = [output, "--prepared_folder", corpus, "--whisper_hub", whisper]
    with modules_of(RECIPE.folder) as module:
        module("whisper_translates").main([*map(str, command)])
    rows = json.loads((output / "rows/whisper.json").read_text())
    model = WhisperForConditionalGeneration.from_pretrained(whisper)
    process = WhisperProcessor.from_pretrained(whisper)
    with open(corpus / "test.csv", newline="") as stream:
        given = {r["ID"]: r for r in csv.DictReader(stream)}
    told = {"task": "translate", "max_new_tokens": 256, "num_beams": 5}
    expected = []
    for name, row in given.items():
        path = row["wav"].replace("$data_root", str(corpus))
        speech, rate = soundfile.read(path)
        features = process(speech, sampling_rate=rate, return_tensors="pt")
        tokens = model.generate(
            features.input_features, language=row["lang"], **told
        )
        said = process.batch_decode(tokens, skip_special_tokens=True)[0]
        expected.append([name, row["text_en"], said.strip()])
    assert rows["translations"] == sorted(expected)
    assert any(line[2] for line in expected)
    RECIPE.run(output, english)
    table = json.loads((output / "summary.json").read_text())
    scores = {r["row"]: r["value"] for r in table if r["metric"] == "bleu"}
    assert scores["whisper"] == pytest.approx(rows["scores"]["BLEU"])


def test_whisper_translates_into_english_only(corpus, tmp_path):
    with modules_of(RECIPE.folder) as module:
        read_rows = module("whisper_translates").read_rows
        with pytest.raises(ValueError, match="no translated utterance of .*pl"):
            read_rows(corpus / "test.csv", corpus, ["pl"])
        path = tmp_path / "test.csv"
        path.write_text("ID,duration,wav,lang\na,1.0,a.wav,cs\n")
        with pytest.raises(ValueError, match="no column text_en; Whisper"):
            read_rows(path, tmp_path, ["cs"])


@pytest.mark.slow
def test_the_translator_writes_both_languages(corpus, finished):
    folder = finished / "models/whole/translator"
    translator = SpeechTranslator.from_hparams(source=folder)
    assert set(translator.languages) == set(MEANT)
    assert translator.mods.model.acoustic.stacked_frames == 2
    for language in MEANT:
        found = translator.translate_file(corpus / "test_17.flac", language)
        assert found.segments and found.seconds == pytest.approx(1.0)
    with pytest.raises(ValueError, match="'fr'"):
        translator.translate_file(corpus / "test_17.flac", "fr")
    assert not (finished / "models/released_rule/translator").exists()


def settings(corpus, **changed):
    return {
        "prepared_folder": str(corpus),
        "targets": ["en"],
        "languages": ["cs"],
        "transcript": "text",
        "translation": "text_{}",
        **changed,
    }


def test_rows_are_an_utterance_and_a_translation(corpus):
    with modules_of(RECIPE.folder) as module:
        read_rows = module("train").read_rows
        rows = read_rows("test", settings(corpus))
        assert len(rows) == COUNTS["test"]
        assert all(Path(row["wav"]).is_file() for row in rows.values())
        both = read_rows("test", settings(corpus, targets=["de", "en"]))
        assert len(both) == 2 * COUNTS["test"] - 1
        assert {row["target"] for row in both.values()} == {"de", "en"}
        every = read_rows("test", settings(corpus, languages=None))
        assert len(every) == COUNTS["test"] + 1


def test_an_utterance_without_recording_is_named_or_left_out(corpus, caplog):
    with modules_of(RECIPE.folder) as module:
        train = module("train")
        rows = train.read_rows("test", settings(corpus, targets=["de", "en"]))
        assert train.with_recordings(rows, "test", skip_bad=False) == rows
        gone = next(iter(rows.values()))["utterance"]
        lost = {
            ID: {**row, "wav": row["wav"] + ".gone"}
            if row["utterance"] == gone
            else row
            for ID, row in rows.items()
        }
        with pytest.raises(FileNotFoundError, match=f"utterance '{gone}': .*"):
            train.with_recordings(lost, "test", skip_bad=False)
        left = train.with_recordings(lost, "test", skip_bad=True)
    assert left == {i: r for i, r in rows.items() if r["utterance"] != gone}
    assert (
        f"test.csv: 1 utterances without recording are left out, '{gone}'"
        in (caplog.text)
    )


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"targets": ["xx"]}, "no column text_xx; there are .*text_de"),
        ({"transcript": "words"}, "no column words"),
        ({"targets": "de"}, "targets: 'de'.* expected lists"),
        ({"languages": ["cs", "pl"]}, "no utterance of language 'pl'"),
    ],
)
def test_what_is_not_in_a_manifest_is_named(corpus, changed, match):
    with modules_of(RECIPE.folder) as module:
        with pytest.raises(ValueError, match=match):
            module("train").read_rows("train", settings(corpus, **changed))


@pytest.fixture(scope="module")
def texts(corpus):
    """Write text without speech: the words of the speech in other orders."""
    path = corpus / "texts.csv"
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["ID", "duration", "lang", "text", "text_en", "text_de"]
        )
        for n in range(100, 120):
            said = [words(w, n, 5) for w in (SAID, *MEANT.values())]
            writer.writerow([n, 1.0, "cs", *said])
    return path


@pytest.mark.slow
def test_text_models_learn_text_without_speech(
    corpus, finished, texts, tmp_path
):
    given = options_of(corpus, only="mt_local", more_text=texts)
    RECIPE.run(tmp_path / "more", given)
    without, found = (
        json.loads((folder / "rows/mt_local.json").read_text())["updates"]
        for folder in (finished, tmp_path / "more")
    )
    # 40 translations of a second in batches of 6 s.
    assert found >= without + 40 // 6
    said = (tmp_path / "more/tokenizer/target/train.txt").read_text("utf-8")
    assert words(MEANT["de"], 119, 5) in said.split("\n")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"targets": ["xx"]}, "texts.csv: no column text_xx"),
        ({"languages": ["cs", "pl"]}, "texts.csv: no utterance of .* 'pl'"),
    ],
)
def test_what_is_not_in_the_text_is_named(corpus, texts, changed, match):
    with modules_of(RECIPE.folder) as module:
        with pytest.raises(ValueError, match=match):
            module("train").read_texts(
                settings(corpus, more_text=str(texts), **changed)
            )


def parallel(folder, name="text.tsv", count=60):
    """Write sentences of three languages, a line each."""
    path = folder / name
    path.write_text(
        "".join(
            f"dog {n} runs\tHund {n} läuft\tchien {n} court\n"
            for n in range(count)
        ),
        "utf-8",
    )
    return path


def manifest(folder, split):
    with open(folder / f"{split}.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def speak(*words):
    with modules_of(RECIPE.folder) as module:
        module("speak_text").main([str(word) for word in words])


def options_to_speak(text):
    return ("--train", text, "--source", "en", "--targets", "de", "fr")


def test_parallel_text_is_spoken(tmp_path):
    pytest.importorskip("espeakng_loader")
    text, out = parallel(tmp_path, count=30), tmp_path / "spoken"
    words = (out, *options_to_speak(text), "--voice", "en-us", "--takes", 2)
    speak(*words)
    rows = {split: manifest(out, split) for split in COUNTS}
    said = {s: {row["text"] for row in found} for s, found in rows.items()}
    # No sentence is in two splits; training sentences are spoken twice.
    assert sum(map(len, said.values())) == len(set().union(*said.values()))
    assert sum(map(len, said.values())) == 30
    assert len(rows["train"]) == 2 * len(said["train"])
    assert len(rows["test"]) == len(said["test"])
    row = rows["train"][1]
    number = row["text"].split()[1]
    assert row["text_de"] == f"Hund {number} läuft"
    assert row["text_fr"] == f"chien {number} court"
    path = out / row["wav"].removeprefix("$data_root/")
    assert soundfile.info(path).duration == pytest.approx(
        float(row["duration"]), abs=1e-4
    )
    # Another voice for the other take.
    assert len({row["spk_id"] for row in rows["train"]}) > 5
    # What a killed run has spoken is kept; what it has not, is spoken alike.
    times = {p: p.stat().st_mtime_ns for p in (out / "audio").iterdir()}
    before = path.read_bytes()
    path.unlink()
    (out / "train.csv").unlink()
    speak(*words)
    assert path.read_bytes() == before
    assert manifest(out, "train") == rows["train"]
    del times[path]
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())


def test_what_is_not_spoken_is_text(tmp_path):
    pytest.importorskip("espeakng_loader")
    text, out = parallel(tmp_path, count=30), tmp_path / "spoken"
    words = (*options_to_speak(text), "--voice", "en-us", "--spoken")
    speak(out, *words, 5)
    spoken, rest = manifest(out, "train"), manifest(out, "text")
    assert len(spoken) == 5
    everything = [row for s in (*COUNTS, "text") for row in manifest(out, s)]
    assert len({row["text"] for row in everything}) == len(everything) == 30
    assert set(rest[0]) == {
        "ID",
        "duration",
        "lang",
        "text",
        "text_de",
        "text_fr",
    }
    number = rest[0]["text"].split()[1]
    assert rest[0]["text_fr"] == f"chien {number} court"
    for count in (0, 30):
        with pytest.raises(SystemExit, match="--spoken .* expected fewer"):
            speak(out, *words, count)
    speak(out, *words[:-1])
    assert len(manifest(out, "train")) > 5
    assert not (out / "text.csv").exists(), "all of it is spoken now"


def test_a_sentence_of_the_test_is_not_trained_on(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    text, out = parallel(tmp_path, count=6), tmp_path / "spoken"
    few = tmp_path / "few.tsv"
    few.write_text(
        "".join(text.open(encoding="utf-8").readlines()[:2]), "utf-8"
    )
    splits = ("--valid", few, "--test", few)
    speak(out, *options_to_speak(text), *splits, "--voice", "en-us")
    assert len(manifest(out, "train")) == 4
    assert (
        "2 line(s) left out: also in valid or test" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="give --valid and --test"):
        speak(out, *options_to_speak(text), *splits[:2], "--voice", "en-us")


@pytest.mark.parametrize("bad", ["only one text", "two\ttexts", "a\t\tc"])
def test_a_line_with_other_texts_is_named_or_counted(tmp_path, capsys, bad):
    pytest.importorskip("espeakng_loader")
    text, out = parallel(tmp_path), tmp_path / "spoken"
    lines = text.read_text("utf-8").split("\n")
    lines[2] = bad
    text.write_text("\n".join(lines), "utf-8")
    words = (out, *options_to_speak(text), "--voice", "en-us")
    with pytest.raises(SystemExit, match="text.tsv, line 3: .* expected 3"):
        speak(*words)
    assert not list(out.glob("*.csv"))
    with modules_of(RECIPE.folder) as module:
        read_lines = module("speak_text").read_lines
        left_out = {"not 3 texts": 0}
        rows = list(read_lines(text, 3, skip_bad=True, left_out=left_out))
    assert len(rows) == 59 and left_out == {"not 3 texts": 1}
