"""Preparation of FSDD from a clone and from a manifest."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from speechbrain_taskarith.data import read_manifest, write_audio

SCRIPT = Path(__file__).parents[2] / "recipes" / "FSDD" / "fsdd_prepare.py"
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def fsdd():
    spec = importlib.util.spec_from_file_location("fsdd_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path):
    """A clone with two speakers, two digits and twelve takes, at 8 kHz."""
    folder = tmp_path / "free spoken digits"
    for speaker in ("theo", "lucas"):
        for digit in (0, 7):
            for take in range(12):
                write_audio(
                    folder / "recordings" / f"{digit}_{speaker}_{take}.wav",
                    torch.zeros(2000 + take),
                    8000,
                )
    (folder / "metadata.py").write_text(
        '"""About the speakers."""\n\nmetadata = {\n'
        "    'theo': {'gender': 'male', 'accent': 'USA/neutral'},\n"
        "\t'lucas': {'gender': 'male', 'accent': 'DEU/German'},\n}\n"
    )
    return folder


def splits(folder):
    return {s: read_manifest(folder / f"{s}.csv") for s in SPLITS}


def test_clone(fsdd, clone, tmp_path):
    fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"))
    made = splits(tmp_path / "out")
    takes = {
        split: {int(Path(r.wav).stem.split("_")[-1]) for r in rows}
        for split, rows in made.items()
    }
    assert takes == {
        "test": {0, 1, 2, 3, 4},
        "valid": {5, 6, 7, 8, 9},
        "train": {10, 11},
    }
    assert {s: len(rows) for s, rows in made.items()} == {
        "test": 20,
        "valid": 20,
        "train": 8,
    }
    row = next(r for r in made["test"] if r.ID == "fsdd_7_lucas_3")
    assert (row.wrd, row.spk_id, row.accent) == ("SEVEN", "lucas", "DEU/German")
    assert row.duration == pytest.approx(2003 / 8000, abs=1e-4)
    header = (tmp_path / "out" / "train.csv").read_text().splitlines()[0]
    assert header == "ID,duration,wav,spk_id,wrd,accent,split"


def test_no_development_set(fsdd, clone, tmp_path):
    fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"), valid_indices=[])
    made = splits(tmp_path / "out")
    assert (len(made["train"]), made["valid"]) == (28, [])


def manifest(clone, *, split=None):
    """Give the same recordings the form with a manifest."""
    lines = ["ID,duration,wav,spk_id,accent_or_domain,wrd,split,orig_sr"]
    for path in sorted((clone / "recordings").iterdir()):
        _, speaker, take = path.stem.split("_")
        part = split or ("test" if int(take) < 5 else "train")
        seconds = (2000 + int(take)) / 8000
        lines.append(
            f"{path.stem},{seconds:.4f},$data_root/recordings/{path.name},"
            f"{speaker},X,ZERO,{part},8000"
        )
    (clone / "manifest.csv").write_text("\n".join(lines) + "\n")


def test_manifest(fsdd, clone, tmp_path):
    manifest(clone)
    fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"), valid_indices=[7])
    made = splits(tmp_path / "out")
    assert {s: len(rows) for s, rows in made.items()} == {
        "test": 20,
        "valid": 4,
        "train": 24,
    }
    assert all(r.accent == "X" for r in made["train"])
    assert all(r.wav.endswith("_7.wav") for r in made["valid"])


def test_a_development_set_of_the_manifest_is_kept(fsdd, clone, tmp_path):
    manifest(clone)
    text = (clone / "manifest.csv").read_text()
    text = text.replace(
        "_11.wav,theo,X,ZERO,train", "_11.wav,theo,X,ZERO,valid"
    )
    (clone / "manifest.csv").write_text(text)
    fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"))
    made = splits(tmp_path / "out")
    assert {r.wav[-7:] for r in made["valid"]} == {"_11.wav"}
    assert len(made["valid"]) == 2


def test_a_self_made_corpus(fsdd, tmp_path):
    pytest.importorskip("espeakng_loader")
    from common.corpora import SIMULATED_SPEAKERS, make_digits_corpus

    make_digits_corpus(
        tmp_path / "corpus",
        speakers=SIMULATED_SPEAKERS[:1],
        takes=11,
        voices=["en-us"],
        synthetic_takes=1,
        words=["ONE"],
        show_progress=False,
    )
    fsdd.prepare_fsdd(str(tmp_path / "corpus"), str(tmp_path / "out"))
    made = splits(tmp_path / "out")
    assert {s: len(rows) for s, rows in made.items()} == {
        "test": 5,
        "valid": 5,
        "train": 1,
    }


def test_done_once(fsdd, clone, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    fsdd.prepare_fsdd(str(clone), out)
    calls = []
    monkeypatch.setattr(fsdd, "write_manifest", lambda *a: calls.append(a))
    fsdd.prepare_fsdd(str(clone), out)
    assert calls == []
    fsdd.prepare_fsdd(str(clone), out, valid_indices=[6], skip_prep=True)
    assert calls == []
    fsdd.prepare_fsdd(str(clone), out, valid_indices=[6])
    assert len(calls) == 3


def test_done_again_when_something_changed(fsdd, clone, tmp_path):
    out = tmp_path / "out"
    fsdd.prepare_fsdd(str(clone), str(out))
    os.unlink(out / "valid.csv")
    fsdd.prepare_fsdd(str(clone), str(out))
    assert len(splits(out)["valid"]) == 20
    write_audio(clone / "recordings" / "7_theo_12.wav", torch.zeros(9), 8000)
    fsdd.prepare_fsdd(str(clone), str(out))
    assert len(splits(out)["train"]) == 9


def test_killed_in_the_middle(fsdd, clone, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fsdd.prepare_fsdd(str(clone), str(out))
    write, calls = fsdd.write_manifest, []

    def killed(path, rows):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, rows)

    monkeypatch.setattr(fsdd, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        fsdd.prepare_fsdd(str(clone), str(out), valid_indices=[6])
    monkeypatch.undo()
    # train.csv is of the new kind, valid.csv of the old: neither counts.
    fsdd.prepare_fsdd(str(clone), str(out))
    assert len(splits(out)["train"]) == 8


def test_metadata_is_read_and_never_run(fsdd, clone, tmp_path):
    trap = tmp_path / "sprung"
    (clone / "metadata.py").write_text(
        f"open({str(trap)!r}, 'w').close()\n"
        "metadata = {'theo': {'accent': 'US'}, 'lucas': {'accent': 'DE'}}\n"
    )
    fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"))
    (clone / "metadata.py").write_text(
        f"metadata = {{'theo': {{'accent': open({str(trap)!r}, 'w')}}}}\n"
    )
    with pytest.raises(ValueError, match="metadata.py: expected one statement"):
        fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"))
    assert not trap.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "metadata = ",
        "metadata = ['theo']",
        "metadata = {'theo': {'gender': 'male'}}",
        "metadata = {'theo': 'US'}",
        "other = {}",
    ],
)
def test_other_metadata(fsdd, clone, tmp_path, text):
    (clone / "metadata.py").write_text(text)
    with pytest.raises(ValueError, match="metadata.py: expected one statement"):
        fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_faults_of_a_clone(fsdd, clone, tmp_path):
    def prepare(**options):
        fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"), **options)

    recordings = clone / "recordings"
    with pytest.raises(ValueError, match=r"takes \[3\] are the official test"):
        prepare(valid_indices=[3, 6])
    (recordings / "seven_theo_1.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="seven_theo_1.wav: expected a name"):
        prepare()
    os.unlink(recordings / "seven_theo_1.wav")
    (recordings / "7_anna_1.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="speaker 'anna' is not in metadata"):
        prepare()
    os.replace(recordings / "7_anna_1.wav", recordings / "7_theo_1.wav")
    with pytest.raises(ValueError, match="7_theo_1.wav: unreadable audio"):
        prepare()
    os.unlink(clone / "metadata.py")
    with pytest.raises(FileNotFoundError, match="metadata.py: missing"):
        prepare()
    assert not (tmp_path / "out").exists()


def test_no_fsdd_at_all(fsdd, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a clone"):
        fsdd.prepare_fsdd(str(tmp_path), str(tmp_path / "out"))


def test_a_split_that_would_be_empty(fsdd, clone, tmp_path):
    manifest(clone, split="train")
    with pytest.raises(ValueError, match="no recording for the split 'test'"):
        fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"))
    manifest(clone, split="dev")
    with pytest.raises(ValueError, match="split 'dev' in manifest.csv"):
        fsdd.prepare_fsdd(str(clone), str(tmp_path / "out"))


@pytest.mark.real_data
def test_the_real_recordings(fsdd, shared_data, tmp_path):
    fsdd.prepare_fsdd(str(shared_data / "fsdd"), str(tmp_path / "out"))
    made = splits(tmp_path / "out")
    assert {s: len(rows) for s, rows in made.items()} == {
        "train": 2400,
        "valid": 300,
        "test": 300,
    }
    accents = {(r.spk_id, r.accent) for r in made["test"]}
    described = fsdd.read_metadata(
        str(shared_data / "fsdd" / "SOURCE_metadata.py")
    )
    assert accents == {(s, about["accent"]) for s, about in described.items()}
