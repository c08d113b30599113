"""Fish Fillets NG, prepared from made packages and trees."""

import csv
import hashlib
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy
import pytest
import soundfile
import speechbrain.dataio.dataset
from made_packages import make_deb

from speechbrain_taskarith.data import read_manifest

RECIPE = Path(__file__).parents[2] / "recipes" / "FilletsNG"
TREE = "usr/share/games/fillets-ng"
LEVELS = {"test_levels": ["harbour"], "valid_levels": ["cave"]}
# level, name, font, English, Czech, Dutch (as written in Lua).
DIALOGUE = [
    ("harbour", "h-m-boat", "font_small", "A boat!", "Loďka!", "Een boot!"),
    ("harbour", "h-v-no", "font_big", "No.", "Ne.", "Nee."),
    ("harbour", "h-x-bird", "font_gull", "Hi!", "Ahoj, ahoj!", "Dag!"),
    ("cave", "c-m-dark", "font_small", "Dark.", "Je tu tma.", "'t Is hier."),
    ("cave", "c-v-light", "font_big", "Light?", "Sv\\196\\155tlo?", "Licht?"),
    ("reef", "r-m-go", "font_small", "Go!", 'Plav \\"tam\\"!', "Zo’n vis!"),
    ("reef", "r-v-no", "font_big", "Nope.", "NE!", "Nooit."),
    ("reef", "r-v-wait", "font_big", "Wait.", "Počkej.", "Wacht even."),
    ("reef", "r-x-gull", "font_gull", "Bye!", "Nashle!", "Tot ziens!"),
]
SECONDS = 0.3


@pytest.fixture
def fillets(monkeypatch):
    """The preparation script, imported as a recipe does."""
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module("fillets_prepare")
    sys.modules.pop("fillets_prepare", None)


def add_line(tree, row, languages=("cs", "nl")):
    level, name, font, english, *spoken = row
    folder = tree / "script" / level
    folder.mkdir(parents=True, exist_ok=True)
    call = f'dialogId("{name}", "{font}", "{english}")\n'
    for lang, text in [("en", None), *zip(("cs", "nl"), spoken, strict=True)]:
        with open(folder / f"dialogs_{lang}.lua", "a", encoding="utf-8") as out:
            said = "" if text is None else f'dialogStr("{text}")\n'
            out.write(f"{call}{said}\n")
        if lang in languages and text is not None:
            add_tone(tree / "sound" / level / lang / f"{name}.ogg")


def add_tone(path, seconds=SECONDS, rate=22050):
    """Write a tone of its own, so that no two recordings are the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pitch = 200 + int(hashlib.sha256(str(path).encode()).hexdigest()[:2], 16)
    pitch += len(path.parents[1].name) * 37 + len(path.stem)
    wave = 0.3 * numpy.sin(
        2 * numpy.pi * pitch * numpy.arange(int(seconds * rate)) / rate
    )
    soundfile.write(path, wave, rate, format="OGG", subtype="VORBIS")


@pytest.fixture
def root(tmp_path):
    """A folder with the tree of three packages."""
    for row in DIALOGUE:
        add_line(tmp_path / "root" / TREE, row)
    return tmp_path / "root"


def table(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return {row["ID"]: row for row in csv.DictReader(stream)}


def rejected(save):
    return {k: row["reason"] for k, row in table(save / "rejected.csv").items()}


def ages(save):
    return {p: p.stat().st_mtime_ns for p in save.rglob("*.*")}


def manifests(save):
    return {p.name: p.read_bytes() for p in save.glob("*.csv")}


def test_manifests_hold_the_dialogue(fillets, root, tmp_path):
    save = tmp_path / "save"
    fillets.prepare_fillets(root, save, **LEVELS)
    train = table(save / "train.csv")
    assert train["nl_reef_r-m-go"] == {
        "ID": "nl_reef_r-m-go",
        "duration": "0.3",
        "wav": "$data_root/audio/nl/reef_r-m-go.flac",
        "spk_id": "nl_m",
        "lang": "nl",
        "level": "reef",
        "role": "m",
        "wrd": "ZO'N VIS",
        "text": "Zo’n vis!",
        "text_en": "Go!",
        "text_cs": 'Plav "tam"!',
        "text_nl": "Zo’n vis!",
    }
    valid = table(save / "valid.csv")
    assert valid["cs_cave_c-v-light"]["text"] == "Světlo?"
    assert valid["cs_cave_c-v-light"]["spk_id"] == "cs_v"
    # A small role is known by its level, not across levels.
    assert train["cs_reef_r-x-gull"]["spk_id"] == "cs_reef_gull"
    parts = {lang: table(save / f"{lang}_train.csv") for lang in ("cs", "nl")}
    assert parts["cs"] | parts["nl"] == train
    for split in ("train", "valid", "test"):
        rows = read_manifest(save / f"{split}.csv", sample_rate=16000)
        for row in rows:
            assert soundfile.info(row.wav).frames == round(SECONDS * 16000)
        assert all(row.extra["lang"] in row.wav for row in rows)


def test_speechbrain_reads_them(fillets, root, tmp_path):
    fillets.prepare_fillets(root, tmp_path / "s", **LEVELS)
    data = speechbrain.dataio.dataset.DynamicItemDataset.from_csv(
        tmp_path / "s" / "test.csv", {"data_root": str(tmp_path / "s")}
    )
    data.set_output_keys(["wav", "text_en"])
    assert all(os.path.isfile(item["wav"]) for item in data)


def test_record_counts_what_the_manifests_hold(fillets, root, tmp_path):
    save = tmp_path / "save"
    fillets.prepare_fillets(root, save, **LEVELS)
    record = json.loads((save / "prepared.json").read_text())
    counts = {(row["lang"], row["split"]): row for row in record["counts"]}
    for (lang, split), row in counts.items():
        splits = fillets.SPLITS if split == "all" else [split]
        rows = [
            found
            for name in splits
            for found in table(save / f"{name}.csv").values()
            if lang in ("all", found["lang"])
        ]
        assert row["lines"] == len(rows)
        assert row["speakers"] == len({r["spk_id"] for r in rows})
        assert row["levels"] == len({r["level"] for r in rows})
    for name, digest in record["files"].items():
        found = hashlib.sha256((save / name).read_bytes()).hexdigest()
        assert digest == found


def test_lua_strings(fillets, tmp_path):
    path = tmp_path / "dialogs_cs.lua"
    path.write_bytes(
        b'-- dialogId("a", "f", "gone") dialogStr("gone")\n'
        b'--[[ dialogId("b", "f", "gone")\n dialogStr("gone") ]]\n'
        b'dialogId("c", "font_big", "One \\"two\\" -- three")\r\n'
        b'dialogStr("P\\197\\153\\195\\173li\\197\\161 \\\\ a\\nb")\n'
        b"dialogId( 'd' , 'font_small','It\\'s' )\n"
        b'dialogId("e", "f", "E") dialogStr("")\n'
        b'other("x") dialogStr("late")\n'
    )
    assert fillets.read_dialogs(path) == {
        "c": ("font_big", 'One "two" -- three', "Příliš \\ a b"),
        "d": ("font_small", "It's", None),
        "e": ("f", "E", "late"),
    }


@pytest.mark.parametrize("bytes_", [b"\\255\\255", b"\\300", b"\xe9t\xe9"])
def test_lua_that_is_not_utf8(fillets, tmp_path, bytes_):
    path = tmp_path / "dialogs_cs.lua"
    path.write_bytes(b'dialogId("a", "f", "A") dialogStr("' + bytes_ + b'")')
    with pytest.raises(ValueError, match=r"dialogs_cs\.lua: .*not UTF-8"):
        fillets.read_dialogs(path)


def test_what_is_left_out_is_told(fillets, root, tmp_path):
    tree = root / TREE
    add_tone(tree / "sound/reef/cs/r-v-unwritten.ogg")
    add_line(tree, ("reef", "r-m-dots", "font_small", "...", "...", "..."))
    add_line(tree, ("reef", "r-m-bad", "font_small", "B", "Zlé", "Slecht"))
    (tree / "sound/reef/nl/r-m-bad.ogg").write_bytes(b"OggS nothing")
    add_line(tree, ("reef", "r-m-tick", "font_small", "T", "Tik", "Tikje"))
    add_tone(tree / "sound/reef/cs/r-m-tick.ogg", seconds=0.09)
    add_line(tree, ("reef", "r-m-song", "font_small", "S", "Píseň", "Lied"))
    add_tone(tree / "sound/reef/cs/r-m-song.ogg", seconds=1.2)
    # The same recording under another text, of a valid line.
    add_line(tree, ("reef", "r-m-twin", "font_small", "Tw", "Dvojče", "Twee"))
    shutil.copy(
        tree / "sound/cave/cs/c-m-dark.ogg", tree / "sound/reef/cs/r-m-twin.ogg"
    )
    save = tmp_path / "save"
    fillets.prepare_fillets(root, save, max_duration=1.0, **LEVELS)
    assert rejected(save) == {
        "cs_reef_r-v-unwritten": "no text",
        "cs_reef_r-m-dots": "no words",
        "nl_reef_r-m-dots": "no words",
        "nl_reef_r-m-bad": "broken audio",
        "cs_reef_r-m-tick": "shorter than 0.1 s",
        "cs_reef_r-m-song": "longer than max_duration",
        "cs_reef_r-m-twin": "same recording: cs_cave_c-m-dark",
        # "NE!" where a test line is "Ne."
        "cs_reef_r-v-no": "text of a test line",
    }
    written = {row for s in fillets.SPLITS for row in table(save / f"{s}.csv")}
    assert not written & set(rejected(save))
    assert "cs_harbour_h-v-no" in written
    assert not (save / "audio/cs/reef_r-m-song.flac").exists()
    record = json.loads((save / "prepared.json").read_text())
    assert sum(record["rejected"].values()) == len(rejected(save))


def test_no_words_of_test_elsewhere(fillets, root, tmp_path):
    fillets.prepare_fillets(root, tmp_path, **LEVELS)
    said = {
        split: {
            (row["lang"], row["wrd"])
            for row in table(tmp_path / f"{split}.csv").values()
        }
        for split in fillets.SPLITS
    }
    assert not said["test"] & (said["train"] | said["valid"])


def test_levels_are_those_of_the_rule(fillets):
    def place(level):
        return hashlib.sha256(level.encode()).hexdigest()

    chosen = [*fillets.TEST_LEVELS, *fillets.VALID_LEVELS]
    assert chosen == sorted(set(chosen), key=place)


@pytest.mark.parametrize("seed", range(3))
def test_rule_takes_as_few_levels_as_reach_the_share(fillets, seed):
    draw = numpy.random.default_rng(seed)
    counts = {f"level{n}": int(draw.integers(1, 60)) for n in range(80)}
    total = sum(counts.values())
    test, valid = fillets.choose_levels(counts)
    for levels, share in ((test, 0.15), (valid, 0.10)):
        held = [counts[level] for level in levels]
        assert sum(held) >= share * total > sum(held[:-1])
    assert not set(test) & set(valid)


def test_level_in_two_splits(fillets, root, tmp_path):
    with pytest.raises(ValueError, match="levels cave are in test_levels and"):
        fillets.prepare_fillets(
            root, tmp_path / "s", test_levels=["cave"], valid_levels=["cave"]
        )
    assert not (tmp_path / "s").exists()


def test_level_that_is_not_there(fillets, root, tmp_path):
    with pytest.raises(ValueError, match="no level hrabour; .*cave, harbour"):
        fillets.prepare_fillets(
            root, tmp_path, test_levels=["hrabour"], valid_levels=["cave"]
        )


def test_split_without_lines(fillets, root, tmp_path):
    with pytest.raises(ValueError, match=r"no recording for .*nl_test\.csv"):
        shutil.rmtree(root / TREE / "sound/harbour/nl")
        fillets.prepare_fillets(root, tmp_path, **LEVELS)
    assert not (tmp_path / "prepared.json").exists()
    assert not (tmp_path / "train.csv").exists()


@pytest.mark.parametrize("languages", [(), ("en",), "de"])
def test_language_that_is_not_spoken(fillets, root, tmp_path, languages):
    with pytest.raises(ValueError, match="expected some of .'cs', 'nl'"):
        fillets.prepare_fillets(root, tmp_path, languages=languages, **LEVELS)


def test_second_run_does_nothing(fillets, root, tmp_path):
    save = tmp_path / "save"
    fillets.prepare_fillets(root, save, **LEVELS)
    before = ages(save)
    fillets.prepare_fillets(root, save, **LEVELS)
    assert ages(save) == before


def test_goes_on_where_it_was(fillets, root, tmp_path):
    save = tmp_path / "save"
    fillets.prepare_fillets(root, save, **LEVELS)
    whole = manifests(save)
    (save / "prepared.json").unlink()
    gone = save / "audio/cs/reef_r-m-go.flac"
    cut = save / "audio/nl/reef_r-m-go.flac"
    content = cut.read_bytes()
    gone.unlink()
    cut.write_bytes(content[: len(content) // 2])
    before = ages(save)
    fillets.prepare_fillets(root, save, **LEVELS)
    assert manifests(save) == whole
    assert cut.read_bytes() == content and gone.is_file()
    left = {p for p in before if p.suffix == ".flac"} - {cut}
    assert {p: before[p] for p in left} == {p: ages(save)[p] for p in left}


def test_lost_recording_is_made_again(fillets, root, tmp_path):
    fillets.prepare_fillets(root, tmp_path / "s", **LEVELS)
    lost = tmp_path / "s/audio/cs/reef_r-m-go.flac"
    lost.unlink()
    fillets.prepare_fillets(root, tmp_path / "s", **LEVELS)
    assert lost.is_file()


def test_new_recording_replaces_the_old(fillets, root, tmp_path):
    fillets.prepare_fillets(root, tmp_path / "s", **LEVELS)
    made = tmp_path / "s/audio/cs/reef_r-m-go.flac"
    old = made.read_bytes()
    source = root / TREE / "sound/reef/cs/r-m-go.ogg"
    wave, rate = soundfile.read(source)
    soundfile.write(source, wave / 2, rate, format="OGG", subtype="VORBIS")
    fillets.prepare_fillets(root, tmp_path / "s", **LEVELS)
    assert made.read_bytes() != old


def test_changed_manifest_is_noticed(fillets, root, tmp_path):
    fillets.prepare_fillets(root, tmp_path, **LEVELS)
    path = tmp_path / "cs_train.csv"
    path.write_text(path.read_text().replace("PLAV", "PLUJ"))
    with pytest.raises(ValueError, match=r"cs_train\.csv: changed since .*Del"):
        fillets.prepare_fillets(root, tmp_path, **LEVELS)
    fillets.prepare_fillets(root, tmp_path, skip_prep=True)
    path.unlink()
    fillets.prepare_fillets(root, tmp_path, **LEVELS)
    assert "PLAV" in path.read_text()


def test_other_options_leave_no_old_manifest(fillets, root, tmp_path):
    fillets.prepare_fillets(root, tmp_path / "s", **LEVELS)
    fillets.prepare_fillets(root, tmp_path / "s", ["cs"], **LEVELS)
    assert not list((tmp_path / "s").glob("nl_*.csv"))
    assert {r["lang"] for r in table(tmp_path / "s/train.csv").values()} == {
        "cs"
    }


def test_no_room_on_the_disk(fillets, root, tmp_path, monkeypatch):
    full = types.SimpleNamespace(total=1, used=1, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="MB are needed, 0 MB are free"):
        fillets.prepare_fillets(root, tmp_path / "s", **LEVELS)
    assert not list((tmp_path / "s").rglob("*.*"))


def test_lua_without_text(fillets, root, tmp_path):
    for path in root.rglob("*.lua"):
        path.write_text("-- nothing\n")
    with pytest.raises(ValueError, match="none of 18 recordings .*no text"):
        fillets.prepare_fillets(root, tmp_path / "s", **LEVELS)


def test_other_counts_are_told(fillets, root, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        fillets.prepare_fillets(root, tmp_path, **LEVELS)
    assert "cs: 9 recorded lines with words; version 1.0.1 has 1714" in (
        caplog.text
    )


def packages_of(root):
    """Return the files of each package, by name."""
    found = {
        name: {} for name in ("fillets-ng-data", *map(spoken, ("cs", "nl")))
    }
    for path in root.rglob("*.*"):
        lang = path.parent.name
        name = spoken(lang) if path.suffix == ".ogg" else "fillets-ng-data"
        found[name][f"./{path.relative_to(root)}"] = path.read_bytes()
    return found


def spoken(lang):
    return f"fillets-ng-data-{lang}"


@pytest.fixture
def debs(root, tmp_path):
    """A folder with three packages."""
    for name, files in packages_of(root).items():
        make_deb(tmp_path / "debs" / f"{name}_1.0.1-1.1_all.deb", files)
    return tmp_path / "debs"


def test_packages_give_what_their_tree_gives(fillets, root, debs, tmp_path):
    fillets.prepare_fillets(root, tmp_path / "a", **LEVELS)
    fillets.prepare_fillets(debs, tmp_path / "b", **LEVELS)
    fillets.prepare_fillets(root / TREE, tmp_path / "c", **LEVELS)
    one, two, three = (manifests(tmp_path / name) for name in "abc")
    assert one == two == three and len(one) == 10
    for path in (tmp_path / "a").rglob("*.flac"):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()
    # What was unpacked is gone; the packages are as they were.
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        *one,
        "audio",
        "prepared.json",
    }
    before = ages(tmp_path / "b")
    fillets.prepare_fillets(debs, tmp_path / "b", **LEVELS)
    assert ages(tmp_path / "b") == before


def test_other_version_is_told(fillets, debs, root, tmp_path, caplog):
    files = packages_of(root)[spoken("nl")]
    path = debs / f"{spoken('nl')}_1.0.1-1.1_all.deb"
    make_deb(path, files, version="2.0-7")
    with caplog.at_level(logging.WARNING):
        fillets.prepare_fillets(debs, tmp_path / "s", **LEVELS)
    assert f"{path}: version 2.0-7 differs from 1.0.1-1.1" in caplog.text


def test_missing_package(fillets, debs, tmp_path):
    (debs / f"{spoken('nl')}_1.0.1-1.1_all.deb").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"apt-get download fillets-ng-data-nl$"
    ):
        fillets.prepare_fillets(debs, tmp_path / "s", **LEVELS)
    fillets.prepare_fillets(debs, tmp_path / "s", languages="cs", **LEVELS)


@pytest.mark.parametrize("part", ["script", "sound/*/cs"])
def test_missing_part_of_the_tree(fillets, root, tmp_path, part):
    for path in (root / TREE).glob(part):
        shutil.rmtree(path)
    name = "fillets-ng-data-cs" if "cs" in part else "fillets-ng-data"
    with pytest.raises(FileNotFoundError, match=f"apt-get download {name}$"):
        fillets.prepare_fillets(root, tmp_path / "s", **LEVELS)


def test_folder_with_nothing(fillets, tmp_path):
    names = "fillets-ng-data fillets-ng-data-cs fillets-ng-data-nl"
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=f"download {names}$"):
            fillets.prepare_fillets(folder, tmp_path / "s", **LEVELS)


def test_command_line(fillets, tmp_path, monkeypatch, capsys):
    arguments = ["", str(tmp_path / "none"), "s", "--languages", "nl"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(FileNotFoundError, match="fillets-ng-data-nl$"):
        fillets.main()
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit):
        fillets.main()
    assert "--max_duration" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_preparation_goes_on(fillets, debs, root, tmp_path):
    save = tmp_path / "save"
    code = (
        "import sys; from fillets_prepare import prepare_fillets as p\n"
        "while True:\n"
        f"    p({str(debs)!r}, {str(save)!r}, **{LEVELS!r})\n"
        # Again and again, until it is caught half-way.
        f"    for f in __import__('pathlib').Path({str(save)!r}).glob('*.*'):\n"
        "        f.unlink()\n"
        f"    __import__('shutil').rmtree({str(save / 'audio')!r})\n"
    )
    python_path = os.pathsep.join([str(RECIPE), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": python_path},
    ) as process:
        while not is_half_done(save, process):
            assert process.poll() is None
            process.send_signal(signal.SIGCONT)
            time.sleep(0.005)
        process.kill()
    assert not (save / "prepared.json").exists()
    fillets.prepare_fillets(debs, save, **LEVELS)
    fillets.prepare_fillets(root, tmp_path / "whole", **LEVELS)
    assert manifests(save) == manifests(tmp_path / "whole")
    assert not list(save.rglob(".partial-*"))


def is_half_done(save, process):
    """Stop a process and tell whether it is among its recordings."""
    process.send_signal(signal.SIGSTOP)
    made = len(list(save.rglob("*.flac")))
    unpacked = list(save.glob(".partial-*/sound"))
    return bool(3 < made < 12 and unpacked)
