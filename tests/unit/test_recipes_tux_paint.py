"""Tux Paint's stamps, prepared from a made package and a made tree."""

import csv
import importlib
import io
import sys
from pathlib import Path

import numpy
import pytest
import soundfile
from made_packages import make_deb

from speechbrain_taskarith.data import read_manifest

RECIPE = Path(__file__).parents[2] / "recipes" / "TuxPaint"
TREE = "usr/share/tuxpaint/stamps"
SECONDS = 0.5


@pytest.fixture
def stamps(monkeypatch):
    """The preparation script, imported as a recipe does."""
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module("stamps_prepare")
    sys.modules.pop("stamps_prepare", None)


def recording(rate=22050):
    stream = io.BytesIO()
    wave = numpy.full(int(SECONDS * rate), 0.1)
    soundfile.write(stream, wave, rate, format="OGG", subtype="VORBIS")
    return stream.getvalue()


def files():
    """Return what a package holds: `{name: bytes}`."""
    made = {}
    for n in range(20):
        text = f"A cat {n}.\nes.utf8=Un gato  azul {n}.\nfr.utf8=Le chat {n}.\n"
        made[f"./{TREE}/animals/cat-{n}.txt"] = text.encode()
        made[f"./{TREE}/animals/cat-{n}_desc_fr.ogg"] = recording()
        if n < 10:
            made[f"./{TREE}/animals/cat-{n}_desc_es.ogg"] = recording()
    # What is left out: a text that was there, two words, no text, no recording.
    made[f"./{TREE}/toys/again.txt"] = b"A cat.\nfr.utf8=Le chat, 0!"
    made[f"./{TREE}/toys/again_desc_fr.ogg"] = recording()
    made[f"./{TREE}/toys/short.txt"] = b"A bus.\nfr.utf8=Un bus.\n"
    made[f"./{TREE}/toys/short_desc_fr.ogg"] = recording()
    made[f"./{TREE}/toys/other.txt"] = b"\xff\xfe\nde.utf8=Ein Ball hier.\n"
    made[f"./{TREE}/toys/other_desc_fr.ogg"] = recording()
    made[f"./{TREE}/toys/mute.txt"] = b"A car.\nfr.utf8=Une auto jaune.\n"
    return made


@pytest.fixture
def package(tmp_path):
    path = tmp_path / "debs" / "tuxpaint-stamps-default_1_all.deb"
    make_deb(path, files())
    return path.parent


def unpack(package, folder):
    for name, content in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def rows(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_package_and_tree_are_alike(stamps, package, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    stamps.prepare_stamps(package, one, languages=["fr", "es"])
    tree = unpack(package, tmp_path / "tree")
    stamps.prepare_stamps(tree, two, languages=["fr", "es"])
    names = sorted(path.name for path in one.glob("*.csv"))
    assert len(names) == 9
    for name in names:
        assert (one / name).read_text() == (two / name).read_text()
    every = [row for s in ("train", "valid", "test") for row in rows(one / f"fr_{s}.csv")]  # fmt: skip
    assert sorted(row["text"] for row in every) == sorted(
        f"Le chat {n}." for n in range(20)
    )
    spanish = rows(one / "es_test.csv")[0]
    assert spanish["wrd"].startswith("UN GATO AZUL")
    assert (spanish["lang"], spanish["spk_id"]) == ("es", "stamps_es")
    for row in read_manifest(one / "fr_test.csv"):
        assert soundfile.info(row.wav).samplerate == 16000
        assert row.duration == pytest.approx(SECONDS, abs=1e-3)
    # A stamp is in one split, whatever the language.
    for split in ("train", "valid", "test"):
        assert {row["ID"][3:] for row in rows(one / f"es_{split}.csv")} <= {
            row["ID"][3:] for row in rows(one / f"fr_{split}.csv")
        }


def test_a_second_run_does_nothing(stamps, package, tmp_path, monkeypatch):
    stamps.prepare_stamps(package, tmp_path / "save")

    def refuse(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr(stamps, "convert_recording", refuse)
    stamps.prepare_stamps(package, tmp_path / "save")
    (tmp_path / "save/fr_test.csv").write_text("changed")
    with pytest.raises(ValueError, match="fr_test.csv: changed since"):
        stamps.prepare_stamps(package, tmp_path / "save")


def test_what_is_wrong_is_named(stamps, package, tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get download tuxpaint"):
        stamps.prepare_stamps(tmp_path, tmp_path / "save")
    with pytest.raises(ValueError, match="languages=.'tlh'.: expected some"):
        stamps.prepare_stamps(package, tmp_path / "save", languages="tlh")
    with pytest.raises(FileNotFoundError, match="of 3 words or more in ru"):
        stamps.prepare_stamps(package, tmp_path / "save", languages=["ru"])
    [deb] = package.glob("*.deb")
    deb.write_bytes(deb.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        stamps.prepare_stamps(package, tmp_path / "save")
