"""Manifests of recipes against SpeechBrain's reader: `common.rows`."""

import pytest
from common.rows import SPEECH, load_rows
from speechbrain.dataio.dataio import load_data_csv

ROWS = [
    "a,1.5,$data_root/a.wav,it is late",
    'b,2, $data_root/b.wav,"well, yes"',
]


def write(folder, *rows, header="ID,duration,wav,text", mark=""):
    path = folder / "rows.csv"
    path.write_text(mark + "\n".join([header, *rows]) + "\n", "utf-8")
    return path


def test_reads_as_speechbrain_does(tmp_path):
    path = write(tmp_path, *ROWS)
    expected = load_data_csv(path, {"data_root": "/there"})
    assert load_rows(path, "/there") == expected
    assert load_rows(path, tmp_path)["a"]["wav"] == f"{tmp_path}/a.wav"


def test_a_dollar_in_a_text_is_text(tmp_path):
    path = write(tmp_path, *ROWS, "c,1,/c.wav,$100 for $data_root")
    with pytest.raises(KeyError):
        load_data_csv(path, {"data_root": "/there"})
    found = load_rows(path, "/there")
    assert found["c"]["text"] == "$100 for $data_root"


def test_what_a_spreadsheet_writes(tmp_path):
    plain = load_rows(write(tmp_path, *ROWS), "")
    assert load_rows(write(tmp_path, *ROWS, mark="\ufeff"), "") == plain


def test_text_alone_needs_neither_audio_nor_duration(tmp_path):
    path = write(tmp_path, "a,yes", header="ID,text")
    assert load_rows(path, "") == {"a": {"text": "yes"}}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROWS[0], ROWS[0]], "rows.csv: ID 'a' stands there twice"),
        (["a,long,a.wav,x"], "rows.csv: a: duration 'long'; expected a number"),
        (["a,-1,a.wav,x"], "rows.csv: a: duration '-1'; expected a number"),
        (["a,nan,a.wav,x"], "rows.csv: a: duration 'nan'; expected a number"),
        ([ROWS[0], "b,2,b.wav"], "rows.csv: line 3: expected 4 cells"),
        (["a,1,a.wav,well, yes"], "line 2: expected 4 cells, .*in quotes"),
    ],
)
def test_refusals_name_the_row(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path, *rows), "")


def test_a_column_of_ids_is_needed(tmp_path):
    path = write(tmp_path, "a,1", header="id,duration")
    with pytest.raises(ValueError, match="no column 'ID'; found id, duration"):
        load_rows(path, "")


def test_what_is_needed_must_be_there(tmp_path):
    path = write(tmp_path, "a,1", header="ID,duration")
    assert load_rows(path, "", ["duration"]) == {"a": {"duration": 1.0}}
    with pytest.raises(ValueError, match="no column 'wav'; found ID, duration"):
        load_rows(path, "", SPEECH)
    path = write(tmp_path)
    assert load_rows(path, "") == {}
    with pytest.raises(ValueError, match="rows.csv: no utterances"):
        load_rows(path, "", SPEECH)
