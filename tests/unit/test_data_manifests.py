"""Manifests: every fault is named, and what is written is read back."""

import csv
import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_taskarith.data import (
    ManifestError,
    Recording,
    read_manifest,
    write_audio,
    write_manifest,
)

HEADER = "ID,duration,wav,spk_id,accent_or_domain,wrd,split\n"


@pytest.fixture
def folder(tmp_path):
    """Two recordings of half a second, and a manifest of them."""
    for name in "ab":
        write_audio(tmp_path / f"{name}.wav", torch.zeros(8000), 16000)
    write(
        tmp_path,
        "a,0.5,$data_root/a.wav,theo,US,SEVEN,train\n",
        "b,0.5,$data_root/b.wav,lucas,DE,ONE TWO,test\n",
    )
    return tmp_path


def write(folder, *rows, header=HEADER):
    (folder / "manifest.csv").write_text(
        header + "".join(rows), encoding="utf-8"
    )


def faults(folder, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder / "manifest.csv", **options)
    assert str(folder / "manifest.csv") in str(caught.value)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def test_reads_what_is_there(folder):
    first, second = read_manifest(folder / "manifest.csv", sample_rate=16000)
    assert first == Recording(
        "a", 0.5, str(folder / "a.wav"), "theo", "SEVEN", "US", "train"
    )
    assert (second.accent, second.wrd) == ("DE", "ONE TWO")


def test_data_root_may_be_elsewhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in "ab":
        os.replace(folder / f"{name}.wav", elsewhere / f"{name}.wav")
    assert "missing file" in faults(folder)[0]
    rows = read_manifest(folder / "manifest.csv", elsewhere)
    assert rows[0].wav == str(elsewhere / "a.wav")


def test_relative_paths_and_other_columns(folder):
    write(
        folder,
        'a,0.5,a.wav,theo,SEVEN,"x, y"\n',
        header="ID,duration,wav,spk_id,wrd,note\n",
    )
    (row,) = read_manifest(folder / "manifest.csv")
    assert row.wav == str(folder / "a.wav")
    assert row.extra == {"note": "x, y"} and row.accent == row.split == ""


@pytest.mark.parametrize("wav", ["$data_root/a.wav", "{data_root}/a.wav"])
def test_a_relative_data_root(folder, monkeypatch, wav):
    monkeypatch.chdir(folder.parent)
    write(folder, f"a,0.5,{wav},theo,US,SEVEN,train\n")
    rows = read_manifest(f"{folder.name}/manifest.csv", data_root=folder.name)
    assert rows[0].wav == f"{folder.name}/a.wav"
    write_manifest(folder / "again.csv", rows, data_root=folder.name)
    assert read_manifest(folder / "again.csv")[0].wav == str(folder / "a.wav")


def test_spaces_after_commas(folder):
    write(
        folder,
        'a, 0.5, a.wav, theo, "SEVEN, EIGHT", train\n',
        header="ID, duration, wav , spk_id, wrd, split\n",
    )
    (row,) = read_manifest(folder / "manifest.csv", splits="train")
    assert (row.wav, row.wrd) == (str(folder / "a.wav"), "SEVEN, EIGHT")


def test_a_cell_without_its_closing_quote(folder):
    write(folder, 'a,0.5,a.wav,theo,US,"SEVEN,train\n' + "x\n" * 70000)
    assert "Is a quotation mark missing?" in faults(folder)[0]


def test_a_byte_order_mark_is_no_part_of_the_first_name(folder):
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text, encoding="utf-8-sig")
    assert len(read_manifest(folder / "manifest.csv")) == 2


@pytest.mark.parametrize("column", ["ID", "duration", "wav", "spk_id", "wrd"])
def test_missing_column(folder, column):
    write(folder, header=HEADER.replace(column, "other"))
    (fault,) = faults(folder)
    assert f"missing column {column}" in fault and "found" in fault


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,0.5,a.wav,theo,US,ONE,train\n", "row 4 (ID a): duplicate ID"),
        ("c,0.5,a.wav,theo,US,,train\n", "row 4 (ID c): wrd is empty"),
        ("c,0.5,a.wav,theo,US,  ,train\n", "row 4 (ID c): wrd is empty"),
        (",0.5,a.wav,theo,US,ONE,train\n", "(ID missing): ID is empty"),
        ("c,0.5,a.wav,,US,ONE,train\n", "spk_id is empty"),
        ("c,half,a.wav,theo,US,ONE,train\n", "duration is not a number"),
        ("c,nan,a.wav,theo,US,ONE,train\n", "duration is not a number"),
        ("c,inf,a.wav,theo,US,ONE,train\n", "duration is not a number"),
        ("c,0,a.wav,theo,US,ONE,train\n", "duration is not a number"),
        ("c,-1,a.wav,theo,US,ONE,train\n", "duration is not a number"),
        ("c,0.5,a.wav,theo,US,ONE,TWO,train\n", "another number of cells"),
        ("c,0.5,a.wav\n", "another number of cells"),
        ("c,0.5,c.wav,theo,US,ONE,train\n", "missing file"),
        ("c,0.6,a.wav,theo,US,ONE,train\n", "lasts 0.5000 s"),
    ],
)
def test_faulty_rows_are_named(folder, row, message):
    with open(folder / "manifest.csv", "a") as stream:
        stream.write(row)
    (fault,) = faults(folder)
    assert message in fault


def test_a_duration_may_be_rounded(folder):
    write(folder, "a,0.51,a.wav,theo,US,ONE,train\n")
    assert len(read_manifest(folder / "manifest.csv")) == 1


def test_wrong_rate_unreadable_empty_and_cut_short(folder):
    assert (
        "has 16000 Hz, expected 8000 Hz" in faults(folder, sample_rate=8000)[0]
    )
    (folder / "a.wav").write_bytes(b"nothing")
    soundfile.write(folder / "b.wav", np.zeros(0), 16000)
    unreadable, empty = faults(folder)
    assert "(ID a): unreadable audio" in unreadable
    assert "(ID b): no samples" in empty


def test_cut_short_is_found_by_decoding(folder):
    write_audio(folder / "a.flac", 0.1 * torch.randn(8000), 16000)
    content = (folder / "a.flac").read_bytes()
    (folder / "a.flac").write_bytes(content[: len(content) // 2])
    write(folder, "a,0.5,a.flac,theo,US,ONE,train\n")
    assert len(read_manifest(folder / "manifest.csv")) == 1
    (fault,) = faults(folder, check="decode")
    assert "a.flac" in fault


def test_all_faults_are_listed_but_few_are_shown(folder):
    write(folder, *(f"x{i},0.5,a.wav,theo,US,,train\n" for i in range(25)))
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder / "manifest.csv")
    assert len(caught.value.faults) == 25
    assert "25 faults" in str(caught.value)
    assert "... and 15 more" in str(caught.value)


def test_how_far_to_look(folder):
    (folder / "a.wav").write_bytes(b"nothing")
    assert len(read_manifest(folder / "manifest.csv", check="files")) == 2
    os.unlink(folder / "a.wav")
    assert len(read_manifest(folder / "manifest.csv", check="none")) == 2
    with pytest.raises(ValueError, match="check='all'"):
        read_manifest(folder / "manifest.csv", check="all")


def test_splits(folder):
    path = folder / "manifest.csv"
    assert [r.ID for r in read_manifest(path, splits="test")] == ["b"]
    assert len(read_manifest(path, splits=["train", "test"])) == 2
    (fault,) = faults(folder, splits=["valid"])
    assert "no row of split valid" in fault and "'test', 'train'" in fault


@pytest.mark.parametrize("content", [b"\xff\xfe\0a", b""])
def test_no_csv_at_all(folder, content):
    (folder / "manifest.csv").write_bytes(content)
    faults(folder)


def test_absent_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest.csv"):
        read_manifest(tmp_path / "manifest.csv")


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_written_is_read_back_by_us_and_by_speechbrain(folder, suffix):
    rows = read_manifest(folder / "manifest.csv")
    rows[1] = dataclasses.replace(rows[1], accent='a "quoted", one')
    path = folder / f"out.{suffix}"
    write_manifest(path, rows, data_root=folder)
    assert read_manifest(path) == rows
    assert str(folder) not in path.read_text()
    make = {
        "csv": DynamicItemDataset.from_csv,
        "json": DynamicItemDataset.from_json,
    }[suffix]
    data = make(str(path), {"data_root": str(folder)})
    data.set_output_keys(["id", "wav", "wrd", "duration", "accent"])
    assert [dict(item) for item in data] == [
        {
            "id": row.ID,
            "wav": row.wav,
            "wrd": row.wrd,
            "duration": row.duration,
            "accent": row.accent,
        }
        for row in rows
    ]


def test_folders_with_a_common_beginning_are_not_confused(tmp_path):
    row = Recording("a", 1.0, str(tmp_path / "data2" / "a.wav"), "s", "ONE")
    write_manifest(tmp_path / "m.csv", [row], data_root=tmp_path / "data")
    with open(tmp_path / "m.csv") as stream:
        assert next(csv.DictReader(stream))["wav"] == row.wav


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("kind", [str, Path])
def test_this_folder_as_data_root(folder, monkeypatch, suffix, kind):
    """`os.path.dirname("m.csv")` is "", which every text starts with."""
    monkeypatch.chdir(folder)
    rows = read_manifest("manifest.csv")
    given = [dataclasses.replace(row, wav=kind(row.wav)) for row in rows]
    write_manifest(f"m.{suffix}", given, data_root="")
    assert read_manifest(f"m.{suffix}") == rows
    text = Path(f"m.{suffix}").read_text()
    assert text.count("data_root") == len(rows) and str(folder) not in text


def test_null_is_not_known(folder):
    row = {"duration": 0.5, "wav": "x.wav", "spk_id": "s", "wrd": "ONE"}
    (folder / "n.json").write_text(json.dumps({"a": {**row, "accent": None}}))
    (found,) = read_manifest(folder / "n.json", check="none")
    assert found.accent == ""
    (folder / "n.json").write_text(json.dumps({"a": {**row, "wrd": None}}))
    with pytest.raises(ManifestError, match="wrd is empty"):
        read_manifest(folder / "n.json", check="none")


def test_lists_go_into_json_only(tmp_path):
    row = {"ID": "a", "duration": 1.0, "wavs": [str(tmp_path / "x.wav")]}
    write_manifest(tmp_path / "m.json", [row], data_root=tmp_path)
    data = DynamicItemDataset.from_json(
        str(tmp_path / "m.json"), {"data_root": "/somewhere"}
    )
    data.set_output_keys(["wavs"])
    assert data[0]["wavs"] == ["/somewhere/x.wav"]
    with pytest.raises(ManifestError, match="wavs is not a single value"):
        write_manifest(tmp_path / "m.csv", [row])
    assert sorted(os.listdir(tmp_path)) == ["m.json"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"ID": "a"}], "row 1: lacks duration"),
        ([{"duration": 1.0}], "row 1: lacks ID"),
        ([{"ID": "a", "duration": 1.0}] * 2, "row 2: duplicate ID 'a'"),
    ],
)
def test_bad_rows_are_not_written(tmp_path, rows, message):
    with pytest.raises(ManifestError, match=message):
        write_manifest(tmp_path / "m.csv", rows)
    with pytest.raises(ValueError, match="expected a name"):
        write_manifest(tmp_path / "m.txt", [])
    assert os.listdir(tmp_path) == []


def test_an_empty_manifest_has_its_columns(tmp_path):
    write_manifest(tmp_path / "m.csv", [])
    assert read_manifest(tmp_path / "m.csv") == []


def test_a_full_disk_leaves_the_old_manifest(folder, monkeypatch):
    before = (folder / "manifest.csv").read_bytes()
    rows = read_manifest(folder / "manifest.csv")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="manifest.csv"):
        write_manifest(folder / "manifest.csv", rows[:1])
    assert (folder / "manifest.csv").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["a.wav", "b.wav", "manifest.csv"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1}', '{"a": {"duration": 1}}']
)
def test_no_json_manifest(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ManifestError, match="m.json"):
        read_manifest(tmp_path / "m.json")


@pytest.mark.real_data
def test_the_real_manifests(shared_data):
    rows = read_manifest(
        shared_data / "fsdd" / "manifest.csv", sample_rate=16000
    )
    assert len(rows) == 3000
    assert sum(row.split == "test" for row in rows) == 300
    rows = read_manifest(
        shared_data / "kathleen_arctic" / "manifest.csv", check="files"
    )
    assert all(row.wrd and row.spk_id == "kathleen" for row in rows)
