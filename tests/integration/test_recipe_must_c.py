"""The recipe `MuST-C/ST/joint` on a tiny corpus of the same layout."""

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from pretrained_encoder import tiny_hubert, with_hubert
from processes import Recipe, texts_of
from recipe_modules import modules_of

RECIPE = Recipe("MuST-C/ST/joint", "--noprogressbar")
RATE = 16000
TINY = {
    "pieces": 40,
    "d_model": 16,
    "d_ffn": 16,
    "nhead": 2,
    "num_acoustic_layers": 1,
    "num_textual_layers": 1,
    "num_decoder_layers": 1,
    "number_of_epochs": 2,
    "max_batch_seconds": 4,
    "max_batch_words": 12,
    "num_buckets": 2,
    "num_workers": 0,
    "test_batch_size": 2,
    "warmup_steps": 4,
    "consistency_interval": 3,
    "greedy_tokens": 5,
    "beam_size": 2,
    "beam_steps": 5,
}
WORDS = {
    "cat": "Katze",
    "dog": "Hund",
    "house": "Haus",
    "river": "Fluss",
    "tree": "Baum",
    "winter": "Winter",
    "morning": "Morgen",
    "seven": "sieben",
}
COUNTS = {"train": 12, "dev": 3, "tst-COMMON": 3}


def sentence(number):
    """Return a sentence in both languages."""
    words = list(WORDS)
    picked = [words[(number * 3 + i * i) % len(words)] for i in range(3)]
    said = " ".join(picked).capitalize() + "."
    meant = " ".join(WORDS[word] for word in picked) + "."
    return said, meant


def noise(seconds, seed):
    """Return what stands for speech."""
    g = numpy.random.default_rng(seed)
    return (0.1 * g.standard_normal(round(seconds * RATE))).astype("float32")


def make_must_c(folder, language="de"):
    """Write two talks for each split, cut into segments."""
    number = 0
    for split, count in COUNTS.items():
        place = folder / f"en-{language}" / "data" / split
        (place / "wav").mkdir(parents=True)
        (place / "txt").mkdir()
        listed, lines = [], {"en": [], language: []}
        for talk in range(2):
            name = f"ted_{split}_{talk}.wav"
            here = count // 2 + (count % 2 if talk else 0)
            soundfile.write(
                place / "wav" / name, noise(here + 0.5, number), RATE
            )
            for segment in range(here):
                listed.append(
                    f"- {{duration: 0.9, offset: {segment + 0.25}, rW: 3, "
                    f"speaker_id: spk.{talk}, wav: {name}}}\n"
                )
                said, meant = sentence(number)
                lines["en"].append(f"{said}\n")
                lines[language].append(f"{meant}\n")
                number += 1
        (place / "txt" / f"{split}.yaml").write_text("".join(listed))
        for side, text in lines.items():
            (place / "txt" / f"{split}.{side}").write_text("".join(text))


def make_more(folder):
    """Write WMT text and two chapters of LibriSpeech."""
    (folder / "wmt").mkdir()
    pairs = [sentence(number) for number in range(20, 34)]
    for side, index in (("en", 0), ("de", 1)):
        text = "".join(f"{pair[index]}\n" for pair in pairs)
        (folder / "wmt" / f"train.{side}").write_text(text)
    for speaker in (11, 12):
        place = folder / "LibriSpeech/train-clean-100" / str(speaker) / "5"
        place.mkdir(parents=True)
        lines = []
        for number in range(3):
            ID = f"{speaker}-5-{number:04d}"
            soundfile.write(
                place / f"{ID}.flac", noise(1.0, speaker + number), RATE
            )
            lines.append(f"{ID} {sentence(number)[0][:-1].upper()}\n")
        (place / f"{speaker}-5.trans.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("MuST-C")
    make_must_c(folder)
    make_more(folder)
    return folder


def options_of(corpus, **options):
    """Return what a run gets on its command line."""
    labels = corpus / "labels"
    return {**TINY, "data_folder": corpus, "labels_folder": labels, **options}


def start(stage, corpus, output, **options):
    """Start a stage as a user would."""
    options = options_of(corpus, **options)
    return RECIPE.start(output, options, hparams=stage)


def run(stage, corpus, output, **options):
    """Run a stage to its end; return what it said."""
    return start(stage, corpus, output, **options).finish()


def weights(output):
    """Read a stage's last model by torch alone."""
    from speechbrain.utils.checkpoints import Checkpointer

    path = Checkpointer(output / "save").find_checkpoint().path
    return torch.load(path / "model.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def text_stage(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("text")
    run("text", corpus, output, wmt_folder=corpus / "wmt")
    return output


def check_translator(output, corpus):
    """Compare what the folder translates with what the recipe did."""
    from speechbrain_taskarith.data import read_audio
    from speechbrain_taskarith.translation import SpeechTranslator

    lines = (output / "translations.txt").read_text().splitlines()
    expected = dict(zip(lines[::3], lines[2::3]))
    with open(output / "prepared/test.csv") as stream:
        rows = {row["ID"]: row for row in csv.DictReader(stream)}
    translator = SpeechTranslator.from_hparams(
        output / "translator", run_opts={"device": "cpu"}
    )
    for name, text in expected.items():
        row = rows[name]
        start = round(float(row["start"]) * RATE)
        wave = read_audio(row["wav"], RATE)[start:]
        wave = wave[: round(float(row["duration"]) * RATE)]
        (found,) = translator.translate_batch(wave[None], target="de")
        assert found.text == " ".join(text.split())
    with pytest.raises(ValueError, match="this model has de"):
        translator.check_target("fr")


@pytest.mark.slow
def test_joint_training_starts_from_text(corpus, text_stage, tmp_path):
    more = {
        "start_from": text_stage,
        "wmt_folder": corpus / "wmt",
        "librispeech_folder": corpus / "LibriSpeech",
        "librispeech_sets": "[train-clean-100]",
    }
    # Nothing moves without a learning rate: what it starts from stays.
    run("train", corpus, tmp_path / "still", lr=0.0, **more)
    text, still = weights(text_stage), weights(tmp_path / "still")
    taken = ("textual.", "decoder.", "source_embedding.")
    assert text.keys() == still.keys()
    for name, tensor in still.items():
        if name.startswith(taken):
            assert torch.equal(tensor, text[name]), name
    rows = json.loads((tmp_path / "still" / "summary.json").read_text())
    metrics = {row["metric"] for row in rows}
    ctc = {"ctc_wer", "ctc_cer"}
    assert metrics == {"bleu", "chrf", "length_ratio", *ctc}
    assert {r["row"] for r in rows} == {"whole, de"}
    plot = tmp_path / "still/plots/consistency_st_asr.png"
    # Before the test, which loads the measurements of the best checkpoint.
    tested = (tmp_path / "still/translations.txt").stat().st_mtime
    assert plot.stat().st_mtime < tested

    check_translator(tmp_path / "still", corpus)

    # All kinds of data take part, until a task stops.
    said = run("train", corpus, tmp_path / "stops", task_interval=3, **more)
    assert "'asr': 6, 'mt': 14, 'st': 12" in said
    assert "weight_asr" in (tmp_path / "stops/train_log.txt").read_text()
    moved = weights(tmp_path / "stops")
    assert any(not torch.equal(moved[n], still[n]) for n in moved)


@pytest.mark.slow
def test_started_again_it_changes_nothing(corpus, text_stage):
    before = weights(text_stage)
    summary = (text_stage / "summary.json").read_text()
    run("text", corpus, text_stage, wmt_folder=corpus / "wmt")
    after = weights(text_stage)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (text_stage / "summary.json").read_text() == summary
    options = {"wmt_folder": corpus / "wmt", "start_from": text_stage}
    said = start("text", corpus, text_stage, **options).finish(fails=True)
    assert "holds a run with another start_from (None, now" in said


@pytest.mark.slow
def test_killed_in_the_middle_it_gives_the_same(corpus, tmp_path):
    options = {
        "number_of_epochs": 4,
        "wmt_folder": corpus / "wmt",
        "librispeech_folder": corpus / "LibriSpeech",
        "librispeech_sets": "[train-clean-100]",
        # Within the run, tasks are weighed.
        "task_interval": 2,
        # A checkpoint after every update.
        "ckpt_interval_steps": 1,
    }
    run("train", corpus, tmp_path / "whole", **options)
    output = tmp_path / "killed"

    def within_the_second_epoch():
        # One validated checkpoint and a later one.
        found = sorted((output / "save").glob("CKPT+*/CKPT.yaml"))
        metas = texts_of(found)
        validated = [n for n, text in enumerate(metas) if "BLEU" in text]
        return validated and validated[-1] + 1 < len(metas)

    start("train", corpus, output, **options).kill_when(within_the_second_epoch)
    run("train", corpus, output, **options)
    one, other = weights(tmp_path / "whole"), weights(output)
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [
        (tmp_path / name / "train_log.txt").read_text().splitlines()
        for name in ("whole", "killed")
    ]
    assert logs[0][-2:] == logs[1][-2:]


@pytest.mark.slow
def test_hubert_of_a_local_folder_takes_the_conformers_place(corpus, tmp_path):
    pytest.importorskip("transformers")
    tiny_hubert(tmp_path / "hubert")
    recipe = Recipe("MuST-C/ST/joint", "--noprogressbar")
    path = "hparams/models/translation.yaml"
    with_hubert(recipe, tmp_path / "recipe", path, tmp_path / "hubert", 12)
    options = options_of(corpus, fea_augment="null", number_of_epochs=1)
    said = recipe.run(tmp_path / "out", options)
    assert "how much padding" not in said
    names = set(weights(tmp_path / "out"))
    assert "acoustic.projection.weight" in names
    assert any(n.startswith("acoustic.encoder.model.") for n in names)


@pytest.fixture
def prepare(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE.folder))
    yield importlib.import_module("must_c_prepare").prepare_must_c
    sys.modules.pop("must_c_prepare", None)


def prepared(folder, split="train"):
    with open(folder / f"{split}.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_prepared_as_listed(corpus, tmp_path, prepare):
    prepare(
        str(corpus),
        str(tmp_path),
        wmt_folder=str(corpus / "wmt"),
        wmt_lines=5,
        librispeech_folder=str(corpus / "LibriSpeech"),
        librispeech_sets=["train-clean-100"],
    )
    for split, name in (
        ("train", "train"),
        ("valid", "dev"),
        ("test", "tst-COMMON"),
    ):
        rows = prepared(tmp_path, split)
        assert len(rows) == COUNTS[name]
        assert all(name in Path(row["wav"]).name for row in rows)
    first = prepared(tmp_path)[0]
    assert first["ID"] == "ted_train_0_0000"
    assert (first["start"], first["duration"]) == ("0.25", "0.9")
    assert (first["wrd"], first["translation"]) == sentence(0)
    assert len(prepared(tmp_path, "text")) == 5
    spoken = prepared(tmp_path, "asr")
    assert len(spoken) == 6 and spoken[0]["wrd"].islower()
    labels = (tmp_path / "text_for_labels.txt").read_text().splitlines()
    assert len(labels) == 2 * COUNTS["train"]


def test_another_text_is_prepared_anew(tmp_path, prepare):
    make_must_c(tmp_path / "corpus")
    prepare(str(tmp_path / "corpus"), str(tmp_path / "out"))
    path = tmp_path / "corpus/en-de/data/train/txt/train.de"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["Ganz anders.", *lines[1:]]) + "\n")
    prepare(str(tmp_path / "corpus"), str(tmp_path / "out"))
    assert prepared(tmp_path / "out")[0]["translation"] == "Ganz anders."


def spoil(folder, what):
    """Spoil the second segment of the training set."""
    place = folder / "en-de/data/train"
    listed = place / "txt/train.yaml"
    if what == "end":
        text = listed.read_text().replace("offset: 1.25", "offset: 99.0", 1)
        listed.write_text(text)
    elif what == "wav":
        (place / "wav/ted_train_0.wav").unlink()
    else:
        path = place / f"txt/train.{what}"
        lines = path.read_text().split("\n")
        lines[1] = " "
        path.write_text("\n".join(lines))


@pytest.mark.parametrize("language", ["zh", "ja", "ar", "cs", "fa", "tr", "vi"])
def test_any_language_that_is_there_is_prepared(tmp_path, prepare, language):
    make_must_c(tmp_path, language)
    prepare(str(tmp_path), str(tmp_path / "out"), language)
    assert len(prepared(tmp_path / "out", "test")) == COUNTS["tst-COMMON"]


def test_the_test_set_may_be_another(tmp_path, prepare):
    make_must_c(tmp_path)
    place = tmp_path / "en-de/data"
    shutil.copytree(place / "dev", place / "tst-HE")
    for path in (place / "tst-HE/txt").iterdir():
        path.rename(path.with_stem("tst-HE"))
    prepare(str(tmp_path), str(tmp_path / "out"), test_set="tst-HE")
    test, valid = (prepared(tmp_path / "out", s) for s in ("test", "valid"))
    assert [row["wrd"] for row in test] == [row["wrd"] for row in valid]


@pytest.mark.parametrize(
    ("what", "message", "gone"),
    [
        ("end", "'ted_train_0_0001': the segment points past", 1),
        ("wav", "'ted_train_0_0000': no recording", 6),
        ("en", "'ted_train_0_0001': empty transcript", 1),
        ("de", "'ted_train_0_0001': empty translation", 1),
    ],
)
def test_bad_segment_is_named_or_left_out(
    tmp_path, prepare, what, message, gone, caplog
):
    make_must_c(tmp_path)
    spoil(tmp_path, what)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "must_c_prepare.json").exists()
    prepare(str(tmp_path), str(tmp_path / "out"), skip_bad=True)
    rows = prepared(tmp_path / "out")
    assert len(rows) == COUNTS["train"] - gone
    # Who is left keeps the name, and its own text.
    last = rows[-1]
    assert last["ID"] == "ted_train_1_0005"
    assert (last["wrd"], last["translation"]) == sentence(11)


def test_faults_of_the_corpus_are_named(tmp_path, prepare):
    make_must_c(tmp_path)
    out = str(tmp_path / "out")
    match = "no target language 'fr'; there are: en-de[.]"
    with pytest.raises(FileNotFoundError, match=match):
        prepare(str(tmp_path), out, "fr")
    match = "tst-HE: missing; there are: dev, train, tst-COMMON[.]"
    with pytest.raises(FileNotFoundError, match=match):
        prepare(str(tmp_path), out, test_set="tst-HE")
    with pytest.raises(FileNotFoundError, match="train.en: missing"):
        prepare(str(tmp_path), out, wmt_folder=str(tmp_path))
    path = tmp_path / "en-de/data/dev/txt/dev.de"
    path.write_text(path.read_text() + "Noch eine Zeile.\n")
    with pytest.raises(ValueError, match="lists 3 segments, dev.de has 4"):
        prepare(str(tmp_path), out)


def test_a_dollar_sign_is_text(tmp_path, prepare):
    make_must_c(tmp_path)
    said = 'It cost $100 million, "she" said.'
    path = tmp_path / "en-de/data/dev/txt/dev.en"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([said, *lines[1:]]) + "\n")
    prepare(tmp_path, tmp_path / "out")
    with modules_of(RECIPE.folder) as find:
        hparams = {"prepared_folder": tmp_path / "out"}
        rows = find("train").read_rows(hparams, "valid", "st")
    first = next(iter(rows.values()))
    assert (first["wrd"], first["kind"]) == (said, "st")
    assert first["duration"] == 0.9 and len(rows) == COUNTS["dev"]


def test_every_update_has_a_batch_of_each_kind(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE.folder))
    KindSampler = importlib.import_module("sampling").KindSampler
    text, speech = [[0], [1], [2]], [[0], [1], [2], [3], [4]]
    sampler = KindSampler([(10, text), (0, speech)], processes=2)
    found = list(sampler)
    assert len(found) == len(sampler) == 8
    # Two processes take every other batch: the same kind at the same time.
    one, other = found[::2], found[1::2]
    assert [b[0] >= 10 for b in one] == [b[0] >= 10 for b in other]
    assert sorted(b[0] for b in found if b[0] < 10) == [0, 1, 2, 3]
    assert [b[0] for b in found if b[0] >= 10] == [10, 11, 12, 10]
    sys.modules.pop("sampling", None)
