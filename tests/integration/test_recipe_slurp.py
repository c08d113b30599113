"""The recipe `SLURP/ASR/syn2real` on a made tree in the corpus's layout."""

import csv
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT
from recipe_modules import modules_of
from tiny_whisper import save_tiny_whisper

from speechbrain_taskarith.brains import CharacterLabels
from speechbrain_taskarith.data import EspeakVoice, write_audio
from speechbrain_taskarith.vectors import open_state

pytest.importorskip("transformers")
pytest.importorskip("espeakng_loader")

FOLDER = ROOT / "recipes" / "SLURP" / "ASR" / "syn2real"
# Own sentences; a scenario's last two are for validation and test.
SENTENCES = {
    "alarm": ["wake me at six", "stop the bell", "ring again", "wake us"],
    "music": ["play a song", "stop this tune", "louder", "play a waltz"],
    "weather": ["will it rain", "is it cold", "any snow", "will it thaw"],
}
# Speakers whom nobody holds out, and one of the test alone.
VOICES = {"U-1": "en-gb+m3", "U-2": "en-029+f2", "U-9": "en-gb-scotland+m1"}


def make_tree(folder):
    """Write the corpus; returns its folder."""
    texts = folder / "dataset" / "slurp"
    texts.mkdir(parents=True)
    metadata, number = {}, 0
    lines = {"train": [], "devel": [], "test": []}
    for scenario, sentences in SENTENCES.items():
        for place, sentence in enumerate(sentences):
            split = ("train", "train", "devel", "test")[place]
            speakers = ["U-1", "U-2"] + ["U-9"] * (split == "test")
            recordings = {}
            for speaker in speakers:
                number += 1
                file = f"audio-{number:05d}.flac"
                voice, variant = VOICES[speaker].split("+")
                wave = EspeakVoice(voice, variant, rate=260)(sentence)
                path = folder / "slurp_real" / file
                path.parent.mkdir(exist_ok=True)
                write_audio(path, wave, 16000)
                recordings[file] = {"usrid": speaker, "status": "correct"}
            slurp_id = 100 + len(metadata)
            metadata[str(slurp_id)] = {"recordings": recordings}
            lines[split].append(
                {
                    "slurp_id": slurp_id,
                    "sentence": sentence,
                    "scenario": scenario,
                    "recordings": [
                        {"file": file, "wer": 0.0, "status": "correct"}
                        for file in recordings
                    ],
                }
            )
    for split, entries in lines.items():
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (texts / f"{split}.jsonl").write_text(text)
    (texts / "metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("slurp") / "tree")


@pytest.fixture(scope="module")
def recipe():
    with modules_of(FOLDER) as find:
        yield find


def options(corpus, output, *more):
    return [
        f"--data_folder={corpus}",
        f"--output={output}",
        "--held_out=0",
        "--takes=1",
        "--longest=3",
        "--targets=alarm",
        "--draws=1",
        "--train_precision=fp32",
        "--batch_size=2",
        "--number_of_epochs=1",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(recipe, corpus, tmp_path_factory):
    """The study with a tiny random Whisper."""
    folder = tmp_path_factory.mktemp("study")
    hub = save_tiny_whisper(folder / "whisper", seconds=3)
    recipe("study").main(
        options(corpus, folder / "out", "--model=whisper", f"--hub={hub}")
    )
    return folder / "out"


def rows(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_row_has_every_column(finished):
    found = json.loads((finished / "summary.json").read_text())
    table = {}
    for row in found:
        if row["table"] == "syn2real":
            table.setdefault(row["row"], {})[row["metric"]] = row
    assert set(table) == {
        *("pretrained", "mixed", "mixed_then_synthetic", "baseline"),
        *("real_source", "mean_of_real_sources", "mean_of_baseline_and_real"),
        *("joint", "support", "shrunk", "single", "paper_scale", "edited"),
        *("edited_both", "oracle", "real_target"),
    }
    # The target's test text has words that no source's text holds.
    columns = {"wer", "cer", "own_words", "relative_reduction"}
    columns |= {f"new_speaker_{m}" for m in ("wer", "cer", "own_words")}
    for row, metrics in table.items():
        assert set(metrics) == columns, row
    assert table["edited"]["wer"]["selected_on"] == "real_source"
    assert table["oracle"]["wer"]["selected_on"] == "real_target"
    assert table["paper_scale"]["wer"]["selected_on"] is None
    assert table["oracle"]["wer"]["value"] <= table["edited"]["wer"]["value"]
    counts = {r["row"] for r in found if r["table"] == "syn2real_sources"}
    assert counts == {"1 sources", "2 sources"}
    assert (finished / "plots" / "scale_alarm.png").is_file()
    assert (finished / "plots" / "surface_alarm.png").is_file()


def weights(finished, name):
    """Read a model of the study by torch alone."""
    [path] = (finished / "0/models" / name / "save").glob("CKPT+*/whisper.ckpt")
    return torch.load(path, weights_only=True)


def test_a_row_is_the_papers_formula(recipe, finished):
    study = recipe("study").Study(None, finished / "0", {})
    own = recipe("rows").Names(False).of("alarm")
    sources = ["music", "weather"]
    chosen = dict.fromkeys(("edited", "shrunk", "support"), 0.5)
    made, sweep = recipe("rows").rows_of(
        own, sources, {**chosen, "both": (0.75, 0.5)}, 1, random.Random(0)
    )
    base = open_state(finished / "0" / "base.safetensors")
    [paper], [both] = made["paper_scale"], made["edited_both"]
    paper, both = study.state(paper), study.state(both)
    target = weights(finished, "synthetic/alarm")
    moved = 0
    for name, tensor in target.items():
        if not tensor.is_floating_point():
            continue
        difference = sum(
            weights(finished, f"real/{s}")[name].double()
            - weights(finished, f"synthetic/{s}")[name].double()
            for s in sources
        )
        moved += float(difference.abs().max()) > 0
        torch.testing.assert_close(
            paper[name].double(),
            tensor.double() + 0.25 * difference / 2,
            rtol=1e-5,
            atol=1e-6,
        )
        old = base[name].double()
        torch.testing.assert_close(
            both[name].double(),
            old + 0.75 * (tensor.double() - old) + 0.5 * difference / 2,
            rtol=1e-5,
            atol=1e-6,
        )
    assert moved > 20
    assert set(sweep) == {1, 2} and len(sweep[1]) == 1


def test_nobody_hears_the_target_before_its_test(finished):
    data = finished / "0" / "data"
    alarm = {r["ID"] for r in rows(finished / "prepared" / "alarm_train.csv")}
    assert len(alarm) == 4
    for path in data.glob("*/*.csv"):
        name = path.relative_to(data).with_suffix("").as_posix()
        ids = {row["ID"] for row in rows(path)}
        assert bool(ids & alarm) == (name == "real/alarm"), name
    joint = {r["wav"].split("/")[-2] for r in rows(data / "joint/alarm.csv")}
    assert joint == {"slurp_real", "audio"}
    texts = {row["text"] for row in rows(data / "mixed/alarm.csv")}
    assert texts == {*SENTENCES["music"][:2], *SENTENCES["weather"][:2]}


def test_mixed_data_first_with_wav2vec2_conformer(
    recipe, corpus, tmp_path, monkeypatch
):
    """As the paper: everything starts from the mixed model."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "unit"))
    from hugging_face_toy import save_encoder

    hub = save_encoder(tmp_path / "w2v", "Wav2Vec2Conformer")
    output = tmp_path / "out"
    recipe("study").main(
        options(
            corpus,
            output,
            "--model=wav2vec2",
            f"--hub={hub}",
            "--mixed_first=True",
            "--hidden_size=16",
            "--valid=1",
        )
    )
    folder = output / "0" / "models"
    names = {
        path.parent.relative_to(folder).as_posix()
        for path in folder.rglob("finished.json")
    }
    heard = {f"{s}/{d}" for s in ("real", "synthetic") for d in SENTENCES}
    heard |= {"joint/alarm"}
    assert names == {"mixed/alarm", *(f"without_alarm/{n}" for n in heard)}
    found = json.loads((output / "summary.json").read_text())
    names = {r["row"] for r in found if r["table"] == "syn2real"}
    assert "mixed" in names and "mixed_then_synthetic" not in names
    for name in ("mixed/alarm", "without_alarm/synthetic/alarm"):
        log = (folder / name / "train_log.txt").read_text()
        assert "train loss" in log


def test_with_a_mixed_start_scale_zero_is_the_start(recipe):
    rows_module = recipe("rows")
    own = rows_module.Names(True).of("qa")
    place = own.start, own.vector("qa"), own.difference(["a", "b"])
    model = "without_qa/synthetic/qa"
    assert rows_module.combine(own.edited(*place, 1.0, 0.0)) == {model: 1.0}
    assert rows_module.combine(own.edited(*place, 0.0, 0.0)) == own.start
    half = rows_module.combine(own.edited(*place, 0.5, 0.2))
    assert half == {
        "mixed/qa": 0.5,
        model: 0.5,
        "without_qa/real/a": 0.1,
        "without_qa/real/b": 0.1,
        "without_qa/synthetic/a": -0.1,
        "without_qa/synthetic/b": -0.1,
    }


@pytest.mark.parametrize(
    ("sources", "counts"),
    [(2, [1, 2]), (3, [1, 2, 3]), (17, [1, 2, 4, 8, 16, 17])],
)
def test_numbers_of_sources(recipe, sources, counts):
    assert recipe("rows").counts_of(sources) == counts


def test_prepare_holds_speakers_out(recipe, corpus, tmp_path):
    prepare = recipe("slurp_prepare")
    share = next(
        n / 100
        for n in range(100)
        if prepare.is_held_out("U-1", n / 100)
        != prepare.is_held_out("U-2", n / 100)
    )
    gone = next(s for s in ("U-1", "U-2") if prepare.is_held_out(s, share))
    prepare.prepare_slurp(corpus, tmp_path, held_out=share)
    for split in ("train", "valid"):
        found = {r["spk_id"] for r in rows(tmp_path / f"music_{split}.csv")}
        assert found == {"U-1", "U-2"} - {gone}
    found = rows(tmp_path / "music_test.csv")
    assert {row["spk_id"] for row in found} == {"U-1", "U-2", "U-9"}
    assert {row["text"] for row in found} == {"play a waltz"}
    assert prepare.scenarios_of(tmp_path) == sorted(SENTENCES)
    texts = [row["text"] for row in rows(tmp_path / "music_texts.csv")]
    assert texts == ["play a song", "stop this tune"]
    # The whole text is there, though one speaker is not.
    assert float(found[0]["duration"]) > 0.3


def test_faults_of_the_corpus_are_named(recipe, corpus, tmp_path):
    prepare = recipe("slurp_prepare").prepare_slurp
    tree = tmp_path / "tree"
    shutil.copytree(corpus, tree)
    (tree / "dataset/slurp/metadata.json").unlink()
    prepare(tree, tmp_path / "out")
    assert {r["spk_id"] for r in rows(tmp_path / "out/alarm_test.csv")} == {""}
    lines = tree / "dataset/slurp/devel.jsonl"
    whole = lines.read_text()
    lines.write_text(whole + '{"slurp_id": 1, "sentence": "no scenario"}\n')
    with pytest.raises(ValueError, match="devel.jsonl, line 4.*scenario"):
        prepare(tree, tmp_path / "other")
    lines.write_text(whole)
    gone = next((tree / "slurp_real").iterdir())
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        prepare(tree, tmp_path / "other")
    assert not (tmp_path / "other" / "slurp_prepare.json").exists()
    with pytest.raises(FileNotFoundError, match="no folder slurp_real"):
        prepare(tmp_path, tmp_path / "other")


def test_synthetic_speech_is_beside_its_manifest(recipe, tmp_path):
    folder = tmp_path / "qa"
    manifest = folder / "manifest.csv"
    (folder / "audio").mkdir(parents=True)
    text = "what are $20 in euros"
    manifest.write_text(
        "ID,duration,wav,lang,text\n"
        f"u1,0.5,$data_root/audio/u1.flac,en,{text}\n"
    )
    write_audio(folder / "audio" / "u1.flac", torch.zeros(8000), 16000)
    module = recipe("train")
    hparams = {
        "data_folder": "elsewhere",
        "data_root": folder,
        "characters": " abcdefghijklmnopqrstuvwxyz0123456789",
        "avoid_if_longer_than": None,
        "tokenizer": CharacterLabels(" abcdefghijklmnopqrstuvwxyz0123456789"),
        "sample_rate": 16000,
    }
    found = module.read_rows(str(manifest), hparams)
    assert found["u1"]["text"] == text
    assert found["u1"]["letters"] == "what are 20 in euros"
    assert module.make_dataset(found, hparams)[0]["sig"].shape == (8000,)


def test_longer_recordings_are_counted(recipe, tmp_path, capsys):
    prepare = recipe("slurp_prepare")
    seconds = {"train": [1, 2], "valid": [1, 1], "test": [1, 2, 2]}
    for domain in "ab":
        for split, lengths in seconds.items():
            lines = [
                {
                    "ID": f"{split}{n}",
                    "duration": s,
                    "wav": "a.wav",
                    "text": "a",
                }
                for n, s in enumerate(lengths)
            ]
            prepare.write_rows(tmp_path / f"{domain}_{split}.csv", lines)
    given = SimpleNamespace(lines=None, valid=None, test=None, longest=1.5)
    synthetic = {d: tmp_path / f"{d}_valid.csv" for d in "ab"}
    recipe("manifests").prepare_manifests(
        given, tmp_path, synthetic, "a", "ab", tmp_path / "0", 0
    )
    said = capsys.readouterr().out
    assert "a_train.csv: 1 of 2 lines are longer than 1.5 s and left" in said
    assert "b_test.csv: 2 of 3 lines are longer than 1.5 s and left" in said
    assert "valid" not in said


@pytest.mark.parametrize(
    "more, precision",
    [
        (["--train_precision=fp32"], "fp32"),
        (["--train_precision=bf16"], "bf16"),
        (["--train_precision=bf16", "--eval_precision=fp32"], "fp32"),
    ],
)
def test_what_is_measured_has_the_precision_asked_for(
    recipe, tmp_path, more, precision
):
    hub = save_tiny_whisper(tmp_path / "whisper")
    measure = recipe("measure")
    kind = measure.WHISPER_KIND
    own = {kind.hub: str(hub), "output_folder": str(tmp_path / "out")}
    own["train_csv"] = None
    found = measure.Measure(kind, own, more, tmp_path / "measured")
    assert found.brain.eval_precision == precision


def test_a_source_given_twice_is_one(recipe, corpus, tmp_path, monkeypatch):
    study, seen = recipe("study"), []

    def settings_of(given, more, sources):
        seen.append(sources)
        raise InterruptedError

    monkeypatch.setattr(study, "settings_of", settings_of)
    start = options(corpus, tmp_path / "out", "--hub=nowhere")
    twice = ["--sources", "music", "weather", "music"]
    with pytest.raises(InterruptedError):
        study.main([*start, *twice, "--targets", "alarm"])
    assert seen == [["music", "weather"]]


def test_faults_of_the_study_are_named(recipe, corpus, tmp_path):
    main = recipe("study").main
    start = options(corpus, tmp_path / "out", "--hub=nowhere")
    with pytest.raises(ValueError, match="no scenario qa; there are alarm"):
        main([*start, "--sources", "qa", "music"])
    with pytest.raises(ValueError, match="alarm has fewer than two"):
        main([*start, "--sources", "alarm", "music"])
    with pytest.raises(FileNotFoundError, match="alarm/manifest.csv"):
        main([*start, f"--synthetic={tmp_path}"])


def test_other_settings_in_the_folder_are_refused(
    recipe, corpus, finished, tmp_path
):
    own = finished.parent / "whisper"
    other = save_tiny_whisper(tmp_path / "other", seconds=3, seed=1)
    for hub, more, said in (
        (own, "--lines=1", "another lines"),
        (own, "--test=1", "another test"),
        (own, "--takes=2", "another takes"),
        (own, "--weight_decay=0.5", "another option of train.py"),
        (own, f"--synthetic={finished / 'synthetic'}", None),
        (other, "--draws=1", "another base"),
    ):
        argv = options(corpus, finished, f"--hub={hub}", more)
        if said is None:  # the same speech, named
            recipe("study").main(argv)
            continue
        with pytest.raises(ValueError, match=said):
            recipe("study").main(argv)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Wake me, at 6!", "wake me at 6"),
        ("Don’t", "don't"),
        ("Café zoë", "cafe zoe"),
        ("日本", ""),
        ("a-b  c", "a b c"),
    ],
)
def test_letters_that_have_a_label(recipe, text, kept):
    characters = " 'abcdefghijklmnopqrstuvwxyz0123456789"
    assert recipe("characters").letters(text, characters) == kept
