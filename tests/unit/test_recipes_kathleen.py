"""ARCTIC by Kathleen, prepared from a made clone and a made folder."""

import csv
import hashlib
import importlib
import json
import logging
import sys
from pathlib import Path

import numpy
import pytest
import soundfile

from speechbrain_taskarith.data import read_manifest

RECIPE = Path(__file__).parents[2] / "recipes" / "KathleenArctic"
TEXTS = {
    f"{part}{number:04}": f"Sentence {part}, isn't it {number}?"
    for part in "ab"
    for number in (1, 5, 9, 10)
}


@pytest.fixture
def kathleen(monkeypatch):
    """The preparation script, imported as a recipe does."""
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module("kathleen_prepare")
    sys.modules.pop("kathleen_prepare", None)


def add_take(clone, key, time, text, level=0.1):
    """Write a take, in stereo at 48 kHz; its level tells takes apart."""
    wav = clone / "data" / f"arctic_{key}_{time}.wav"
    soundfile.write(wav, numpy.full((14400, 2), level), 48000)
    wav.with_suffix(".txt").write_text(text + "\n")
    return wav


@pytest.fixture
def clone(tmp_path):
    """What `git clone` gives."""
    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    for key, text in TEXTS.items():
        add_take(folder, key, 1592700000, text)
    (folder / "cmuarctic.data").write_text(
        "".join(f'( arctic_{k} "{text}" )\n' for k, text in TEXTS.items())
    )
    return folder


@pytest.fixture
def folder(tmp_path):
    """One take of each sentence, at 16 kHz, with a manifest."""
    made = tmp_path / "folder"
    (made / "audio").mkdir(parents=True)
    with open(made / "manifest.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow("ID duration wav spk_id wrd raw_text".split())
        for key, text in TEXTS.items():
            soundfile.write(
                made / f"audio/{key}.flac", numpy.full(4800, 0.1), 16000
            )
            wav = f"$data_root/audio/{key}.flac"
            writer.writerow([f"k_arctic_{key}", 0.3, wav, "kath", "X", text])
    return made


def table(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return {row["ID"]: row for row in csv.DictReader(stream)}


def test_clone(kathleen, clone, tmp_path):
    save = tmp_path / "save"
    kathleen.prepare_kathleen(clone, save)
    ids = {p.name: sorted(table(p)) for p in save.glob("*.csv")}
    assert ids == {
        "a_test.csv": ["kath_arctic_a0010"],
        "a_train.csv": ["kath_arctic_a0001", "kath_arctic_a0009"],
        "a_valid.csv": ["kath_arctic_a0005"],
        "b_test.csv": ["kath_arctic_b0010"],
        "b_train.csv": ["kath_arctic_b0001", "kath_arctic_b0009"],
        "b_valid.csv": ["kath_arctic_b0005"],
        "test.csv": ["kath_arctic_a0010", "kath_arctic_b0010"],
        "train.csv": [
            f"kath_arctic_{key}" for key in ("a0001", "a0009", "b0001", "b0009")
        ],
        "valid.csv": ["kath_arctic_a0005", "kath_arctic_b0005"],
    }
    assert table(save / "b_test.csv")["kath_arctic_b0010"] == {
        "ID": "kath_arctic_b0010",
        "duration": "0.3",
        "wav": "$data_root/audio/kath_arctic_b0010.flac",
        "spk_id": "kathleen",
        "lang": "en",
        "domain": "b",
        "wrd": "SENTENCE B ISN'T IT 10",
        "text": "Sentence b, isn't it 10?",
    }
    for row in read_manifest(save / "train.csv", sample_rate=16000):
        info = soundfile.info(row.wav)
        assert (info.frames, info.channels) == (4800, 1)


def test_folder_gives_what_the_clone_gives(kathleen, clone, folder, tmp_path):
    kathleen.prepare_kathleen(clone, tmp_path / "one")
    kathleen.prepare_kathleen(folder, tmp_path / "two")
    for path in (tmp_path / "one").glob("*.csv"):
        other = tmp_path / "two" / path.name
        assert path.read_bytes() == other.read_bytes()


def test_last_take_with_the_sentence_is_taken(kathleen, clone, tmp_path):
    add_take(clone, "a0001", 1592700900, TEXTS["a0001"], level=0.5)
    add_take(clone, "a0001", 1592700300, TEXTS["a0001"], level=0.3)
    # Recorded under the next sentence's name.
    add_take(clone, "a0009", 1592700900, TEXTS["a0005"], level=0.7)
    # What was said need not be what was to be said.
    add_take(clone, "a0005", 1592700900, "Not quite the sentence.", level=0.6)
    kathleen.prepare_kathleen(clone, tmp_path / "s")
    levels = {}
    for key in ("a0001", "a0005", "a0009"):
        wave, _ = soundfile.read(tmp_path / f"s/audio/kath_arctic_{key}.flac")
        levels[key] = round(float(wave[2400]), 2)
    assert levels == {"a0001": 0.5, "a0005": 0.6, "a0009": 0.1}
    valid = table(tmp_path / "s/valid.csv")
    assert valid["kath_arctic_a0005"]["wrd"] == "NOT QUITE THE SENTENCE"


def test_one_part(kathleen, clone, tmp_path):
    kathleen.prepare_kathleen(clone, tmp_path / "s")
    kathleen.prepare_kathleen(clone, tmp_path / "s", part="b")
    rows = table(tmp_path / "s/train.csv").values()
    assert {row["domain"] for row in rows} == {"b"}
    assert not list((tmp_path / "s").glob("a_*.csv"))
    with pytest.raises(ValueError, match="part='c': expected 'a', 'b'"):
        kathleen.prepare_kathleen(clone, tmp_path / "s", part="c")


def test_second_run_does_nothing(kathleen, clone, tmp_path):
    def ages():
        found = (tmp_path / "s").rglob("*.*")
        return {p: p.stat().st_mtime_ns for p in found}

    kathleen.prepare_kathleen(clone, tmp_path / "s")
    before = ages()
    kathleen.prepare_kathleen(clone, tmp_path / "s")
    assert ages() == before
    (clone / "data/arctic_a0001_1592700000.txt").write_text("Other words.")
    kathleen.prepare_kathleen(clone, tmp_path / "s")
    train = table(tmp_path / "s/train.csv")
    assert train["kath_arctic_a0001"]["wrd"] == "OTHER WORDS"


def test_counts(kathleen, clone, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        kathleen.prepare_kathleen(clone, tmp_path / "s")
    assert "8 sentences, expected 1132" in caplog.text
    record = json.loads((tmp_path / "s/prepared.json").read_text())
    whole = record["counts"][-1]
    assert (whole["domain"], whole["split"], whole["lines"]) == ("all",) * 2 + (
        8,
    )


def test_sums(kathleen, folder, tmp_path):
    files = sorted((folder / "audio").iterdir())
    sums = folder / "SHA256SUMS"
    sums.write_text(
        "".join(
            f"{hashlib.sha256(p.read_bytes()).hexdigest()}  ./audio/{p.name}\n"
            for p in files
        )
    )
    kathleen.prepare_kathleen(folder, tmp_path / "s")
    soundfile.write(files[3], numpy.full(4800, 0.2), 16000)
    with pytest.raises(ValueError, match=rf"{files[3].name}: another content"):
        kathleen.prepare_kathleen(folder, tmp_path / "s")
    files[3].unlink()
    with pytest.raises(FileNotFoundError, match=f"{files[3].name}: missing"):
        kathleen.prepare_kathleen(folder, tmp_path / "s")


def test_wrong_files(kathleen, clone, tmp_path):
    def error(match, kind=ValueError):
        with pytest.raises(kind, match=match):
            kathleen.prepare_kathleen(clone, tmp_path / "s")

    wav = clone / "data/arctic_a0001_1592700000.wav"
    text = wav.with_suffix(".txt")
    text.write_text(" ...\n")
    error(r"arctic_a0001_1592700000\.txt: no words")
    text.unlink()
    error("holds what is said in arctic_a0001", FileNotFoundError)
    text.write_text("Fine.")
    wav.write_bytes(b"RIFF nothing")
    error(r"arctic_a0001_1592700000\.wav: unreadable as audio")
    wav.rename(wav.with_name("take.wav"))
    error(r"take\.wav: expected a name as arctic_a0001")
    assert not list((tmp_path / "s").glob("*.csv"))
    for path in clone.glob("data/*"):
        path.unlink()
    error("no recordings. Expected a whole clone", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="github.com/rhasspy/dataset"):
        kathleen.prepare_kathleen(tmp_path / "absent", tmp_path / "s")


def test_manifest_without_sentences(kathleen, folder, tmp_path):
    path = folder / "manifest.csv"
    content = path.read_text()
    path.write_text(content.replace(TEXTS["a0005"], ""))
    with pytest.raises(ValueError, match="'k_arctic_a0005' has no raw_text"):
        kathleen.prepare_kathleen(folder, tmp_path / "s")
    path.write_text(content.replace("k_arctic_a0005", "k_arctic_a0001_2"))
    with pytest.raises(ValueError, match="one row for each sentence"):
        kathleen.prepare_kathleen(folder, tmp_path / "s")


@pytest.mark.real_data
def test_splits_are_those_of_the_real_folder(kathleen, shared_data):
    folder = shared_data / "kathleen_arctic"
    if not folder.is_dir():
        pytest.skip(f"REAL RECORDINGS ABSENT: no {folder}")
    rows = table(folder / "manifest.csv").values()
    assert len(rows) == kathleen.SENTENCES
    for row in rows:
        assert kathleen.split_of(int(row["ID"][-4:])) == row["split"]
