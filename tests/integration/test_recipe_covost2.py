"""The recipe `CoVoST2/ST/joint` on a tiny corpus of the same layout."""

import csv
import json

import numpy
import pytest
import soundfile
from processes import Recipe
from recipe_modules import modules_of
from tiny_whisper import save_tiny_whisper

RECIPE = Recipe("CoVoST2/ST/joint", "--noprogressbar")
RATE = 32000
SAID = "the cat sits on a red mat and sleeps".split()
MEANT = {
    "de": "die Katze sitzt auf einer roten Matte und".split(),
    "zh-CN": list("猫坐在红垫子上睡"),
}
# As in the corpus; "train_covost" are clips that CoVoST adds.
SPLITS = ["train"] * 8 + ["train_covost"] * 4 + ["dev"] * 3 + ["test"] * 3
SPLITS += ["other"]
TINY = {
    "source": "en",
    "targets": "[de, zh-CN]",
    "d_model": 16,
    "d_ffn": 16,
    "nhead": 2,
    "num_acoustic_layers": 1,
    "num_textual_layers": 1,
    "num_decoder_layers": 1,
    "source_type": "char",
    "source_pieces": 16,
    "target_type": "char",
    "target_pieces": 28,
    "number_of_epochs": 1,
    "max_batch_seconds": 6,
    "num_buckets": 2,
    "num_workers": 1,
    "test_batch_size": 4,
    "task_interval": 2,
    "task_average": 1,
    "consistency_interval": 4,
    "greedy_tokens": 5,
    "beam_size": 2,
    "beam_steps": 5,
    "entropy_windows": "[1, 2]",
    "entropy_utterances": 2,
}


def text(number, language=None):
    """Return a sentence, or its translation."""
    words = MEANT.get(language, SAID)
    picked = [words[(number * 5 + i * i) % len(words)] for i in range(3)]
    return ("" if language == "zh-CN" else " ").join(picked)


def write_table(path, columns, rows):
    lines = ["\t".join(columns), *("\t".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_covost2(folder, targets=("de", "zh-CN")):
    """Write a folder of Common Voice with translations in it."""
    (folder / "clips").mkdir(parents=True)
    clips = [f"common_voice_en_{n}.mp3" for n in range(len(SPLITS))]
    for number, clip in enumerate(clips):
        g = numpy.random.default_rng(number)
        wave = 0.1 * g.standard_normal(round((0.8 + number % 3 / 10) * RATE))
        soundfile.write(folder / "clips" / clip, wave, RATE, format="MP3")
    write_table(
        folder / "validated.tsv",
        ("client_id", "path", "sentence", "up_votes"),
        [(f"s{n % 4}", clip, text(n), "2") for n, clip in enumerate(clips)],
    )
    for target in targets:
        write_table(
            folder / f"covost_v2.en_{target}.tsv",
            ("path", "translation", "split"),
            [
                (clip, text(n, target), SPLITS[n])
                for n, clip in enumerate(clips)
            ],
        )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("covost2")
    make_covost2(folder)
    save_tiny_whisper(folder / "whisper")
    return folder


@pytest.mark.slow
def test_many_targets_are_trained_and_scored(corpus, tmp_path):
    options = {
        **TINY,
        "data_folder": corpus,
        "study_folder": tmp_path,
        "whisper_hub": corpus / "whisper",
    }
    RECIPE.run(tmp_path / "out", options)
    result = json.loads((tmp_path / "rows/whole.json").read_text("utf-8"))
    # Words of one language, characters of the other: characters of both.
    assert "tok:char" in result["bleu_signature"]
    names = [line[0] for line in result["translations"]]
    assert len(names) == 6
    assert sum(name.endswith("-zh-CN") for name in names) == 3
    said = (tmp_path / "out/translator/hyperparams.yaml").read_text("utf-8")
    assert "zh-CN: " in said


@pytest.fixture
def prepare():
    with modules_of(RECIPE.folder) as module:
        yield module("covost2_prepare").prepare_covost2


def prepared(folder, split="train"):
    with open(folder / f"{split}.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_splits_are_those_of_the_corpus(corpus, tmp_path, prepare):
    prepare(str(corpus), str(tmp_path), "en", ["de", "zh-CN"])
    rows = {s: prepared(tmp_path, s) for s in ("train", "valid", "test")}
    assert {s: len(r) for s, r in rows.items()} == {
        "train": 12,
        "valid": 3,
        "test": 3,
    }
    first = rows["valid"][0]
    assert first["ID"] == "common_voice_en_12"
    assert (first["text"], first["lang"]) == (text(12), "en")
    assert first["text_zh-CN"] == text(12, "zh-CN")
    assert float(first["duration"]) == pytest.approx(0.8, abs=0.1)
    # Done already: a manifest is not written again.
    (tmp_path / "train.csv").write_text("mine")
    prepare(str(corpus), str(tmp_path), "en", ["de", "zh-CN"])
    assert (tmp_path / "train.csv").read_text() == "mine"
    # Other targets are another preparation.
    prepare(str(corpus), str(tmp_path), "en", "de")
    assert "text_zh-CN" not in prepared(tmp_path)[0]


def test_the_files_of_the_corpus_own_script_are_taken_as_well(
    corpus, tmp_path, prepare
):
    prepare(str(corpus), str(tmp_path / "one"), "en", ["de"])
    texts = tmp_path / "texts"
    texts.mkdir()
    with open(corpus / "covost_v2.en_de.tsv", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream, delimiter="\t"))
    for split, names in (
        ("train", ("train", "train_covost")),
        ("dev", ("dev",)),
        ("test", ("test",)),
    ):
        write_table(
            texts / f"covost_v2.en_de.{split}.tsv",
            ("path", "sentence", "translation", "client_id"),
            [
                (line["path"], "-", line["translation"], "-")
                for line in lines
                if line["split"] in names
            ],
        )
    prepare(str(corpus), str(tmp_path / "two"), "en", ["de"], str(texts))
    for split in ("train", "valid", "test"):
        one, two = (prepared(tmp_path / n, split) for n in ("one", "two"))
        assert one == two


def spoil(folder, what):
    """Spoil the clip with number 2."""
    clip = folder / "clips/common_voice_en_2.mp3"
    if what == "missing":
        clip.unlink()
    elif what == "damaged":
        clip.write_bytes(b"no audio")
    else:
        name = "validated" if what == "transcript" else "covost_v2.en_de"
        path = folder / f"{name}.tsv"
        gone = text(2) if what == "transcript" else text(2, "de")
        lines = path.read_text("utf-8").split("\n")
        lines[3] = lines[3].replace(gone, " ")
        path.write_text("\n".join(lines), "utf-8")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no recording"),
        ("damaged", "unreadable recording"),
        ("transcript", "empty transcript"),
        ("translation", "empty translation"),
    ],
)
def test_bad_utterance_is_named_or_left_out(
    tmp_path, prepare, what, message, caplog
):
    folder, out = tmp_path / "cv", tmp_path / "out"
    make_covost2(folder, ["de"])
    spoil(folder, what)
    with pytest.raises(
        (ValueError, FileNotFoundError),
        match=f"'common_voice_en_2': {message}",
    ):
        prepare(str(folder), str(out), "en", ["de"])
    assert not (out / "covost2_prepare.json").exists()
    prepare(str(folder), str(out), "en", ["de"], skip_bad=True)
    assert len(prepared(out)) == 11
    assert f"1 utterance(s) left out: {message}" in caplog.text


def test_faults_of_the_corpus_are_named(tmp_path, prepare):
    folder, out = tmp_path / "cv", str(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="validated.tsv: missing"):
        prepare(str(folder), out, "en", ["de"])
    make_covost2(folder, ["de"])
    match = "from 'en' into 'fr'; there are: covost_v2.en_de.tsv"
    with pytest.raises(FileNotFoundError, match=match):
        prepare(str(folder), out, "en", ["de", "fr"])
    table = folder / "covost_v2.en_de.tsv"
    whole = table.read_text("utf-8")
    table.write_text(whole + whole.split("\n")[1] + "\n", "utf-8")
    with pytest.raises(ValueError, match="en_0.mp3 stands there twice"):
        prepare(str(folder), out, "en", ["de"])
    table.write_text(whole.replace("split", "part"), "utf-8")
    with pytest.raises(ValueError, match="no column split; found path"):
        prepare(str(folder), out, "en", ["de"])
    # Another version of Common Voice has other clips.
    table.write_text(whole.replace("common_voice_en", "cv"), "utf-8")
    with pytest.raises(ValueError, match="version 4 of Common Voice"):
        prepare(str(folder), out, "en", ["de"])


def test_long_clips_are_left_out_of_training_alone(corpus, tmp_path, prepare):
    prepare(str(corpus), str(tmp_path), "en", ["de"], max_seconds=0.85)
    assert 0 < len(prepared(tmp_path)) < 12
    assert len(prepared(tmp_path, "test")) == 3
