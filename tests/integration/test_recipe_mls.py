"""The recipe `MLS/ASR/transducer` on a tiny corpus of the same layout."""

import csv
import importlib
import json
import sys

import pytest
import torch
from processes import Recipe, taskarith
from recipe_modules import modules_of

RECIPE = Recipe("MLS/ASR/transducer", "--noprogressbar")
TINY = {
    "n_mels": 20,
    "d_model": 16,
    "num_heads": 2,
    "ffn_dim": 16,
    "num_layers": 2,
    "predictor_dim": 8,
    "predictor_layers": 2,
    "joint_dim": 8,
    "output_neurons": 31,
    "number_of_epochs": 2,
    "max_batch_seconds": 6,
    "num_buckets": 2,
    "num_workers": 0,
    "test_batch_size": 2,
    "warmup_steps": 4,
}
SENTENCES = {
    "italian": (
        "it",
        "nel mezzo del cammin di nostra vita mi ritrovai per una selva "
        "oscura che la diritta via era smarrita",
    ),
    "spanish": (
        "es",
        "en un lugar de la mancha de cuyo nombre no quiero acordarme no ha "
        "mucho tiempo que vivia un hidalgo",
    ),
}
COUNTS = {"train": 14, "dev": 3, "test": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two languages in MLS's layout, in Opus where it can be written."""
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("MLS")
    for language in SENTENCES:
        make_language(folder / f"mls_{language}_opus", language)
    return folder


def make_language(folder, language):
    """Write one language: audio, transcripts, segments, the short lists."""
    import soundfile

    from speechbrain_taskarith.data import EspeakVoice

    code, text = SENTENCES[language]
    words, speaker = text.split(), 0
    for split, count in COUNTS.items():
        transcripts, segments = [], []
        for number in range(count):
            speaker += 1
            said = " ".join(words[number : number + 3])
            wave = EspeakVoice(code, ("f1", "m1")[number % 2])(said)
            ID = f"{speaker}_7_{number:06d}"
            path = folder / split / "audio" / str(speaker) / "7" / f"{ID}.opus"
            path.parent.mkdir(parents=True)
            soundfile.write(
                path, wave.numpy(), 16000, format="OGG", subtype="OPUS"
            )
            transcripts.append(f"{ID}\t{said}\n")
            end = 5 + len(wave) / 16000
            segments.append(f"{ID}\thttp://a/{number}.mp3\t5.0\t{end:.2f}\n")
        (folder / split / "transcripts.txt").write_text("".join(transcripts))
        (folder / split / "segments.txt").write_text("".join(segments))
        if split == "train":
            limited = folder / split / "limited_supervision"
            ids = [line.split("\t")[0] for line in transcripts]
            for name, part in (
                ("9hr", ids[:6]),
                *((f"1hr/{n}", [ids[6 + n]]) for n in range(6)),
            ):
                (limited / name).mkdir(parents=True)
                (limited / name / "handles.txt").write_text(
                    "\n".join(part) + "\n"
                )


def start(stage, data, output, **options):
    """Start a stage as a user would."""
    options = {**TINY, **options, "data_folder": data}
    return RECIPE.start(output, options, hparams=stage)


def run(stage, data, output, **options):
    """Run a stage to its end; return what it said."""
    return start(stage, data, output, **options).finish()


def weights(output, min_key=None):
    """Read a stage's last, or best, model by torch alone."""
    from speechbrain.utils.checkpoints import Checkpointer

    path = Checkpointer(output / "save").find_checkpoint(min_key=min_key).path
    return torch.load(path / "model.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def stages(corpus, tmp_path_factory):
    """The three stages, one after another."""
    folder = tmp_path_factory.mktemp("stages")
    run(
        "pretrain",
        corpus,
        folder / "pretrain",
        languages="[italian, spanish]",
    )
    run(
        "transfer",
        corpus,
        folder / "transfer",
        encoder_from=folder / "pretrain" / "save",
        subset="10h",
        lr=0.0,  # what it starts from is what it ends with
    )
    run("min_wer", corpus, folder / "min_wer", start_from=folder / "transfer")
    return folder


@pytest.mark.slow
def test_the_encoder_alone_is_taken_over(stages):
    folder = stages
    before = weights(folder / "pretrain", min_key="WER")
    after = weights(folder / "transfer")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        taken = name.split(".")[0] in ("frontend", "encoder")
        moves = tensor.shape != after[name].shape or not torch.equal(
            tensor, after[name]
        )
        # A LayerNorm of the fresh part begins with ones and zeros.
        if taken:
            assert not moves, name
        elif name.endswith("weight"):
            assert moves, name


@pytest.mark.slow
def test_another_training_does_not_go_on_in_its_folder(stages, corpus):
    output = stages / "min_wer"
    options = {"start_from": stages / "transfer", "row": "other"}
    said = start("min_wer", corpus, output, **options).finish(fails=True)
    assert "min_wer holds a run with another row ('min_wer', now 'oth" in said


def test_the_best_checkpoint_is_taken_over(tmp_path):
    from speechbrain.utils.checkpoints import Checkpointer

    save, layer = tmp_path / "save", torch.nn.Linear(1, 1)
    checkpointer = Checkpointer(save, {"model": layer})
    with modules_of(RECIPE.folder) as find:
        best_in = find("train").best_in
        # As another corpus may have it, without a WER.
        other = checkpointer.save_checkpoint(name="other")
        assert best_in(str(save)) == str(save)
        best = checkpointer.save_checkpoint(name="best", meta={"WER": 5.0})
        checkpointer.save_checkpoint(name="last", meta={"WER": 9.0})
        assert best_in(str(save)) == best.path
        for path in (other.path, other.path / "model.ckpt"):
            assert best_in(path) == path


@pytest.mark.slow
def test_every_stage_leaves_its_row_and_recogniser(stages):
    folder = stages
    for stage, languages in (
        ("pretrain", ("italian", "spanish")),
        ("transfer", ("italian",)),
        ("min_wer", ("italian",)),
    ):
        rows = json.loads((folder / stage / "summary.json").read_text())
        names = {row["row"].split(", ")[1] for row in rows}
        assert names == set(languages)
        assert {"wer", "rare_wer", "non_rare_wer", "insertions"} == {
            row["metric"] for row in rows
        }
        assert (folder / stage / "transcriber" / "tokenizer.model").is_file()
    log = (folder / "min_wer" / "train_log.txt").read_text()
    for name in ("with_gradient", "oracle_wer", "expected_wer"):
        assert name in log, "statistics of the n-best lists"
    assert (
        "with_gradient"
        not in (folder / "transfer" / "train_log.txt").read_text()
    )
    # Stage 3 keeps the labels of stage 2.
    assert (folder / "transfer/transcriber/tokenizer.model").read_bytes() == (
        folder / "min_wer/transcriber/tokenizer.model"
    ).read_bytes()


@pytest.mark.slow
def test_command_streams_an_opus_file(stages, corpus):
    folder = stages
    audio = next((corpus / "mls_italian_opus/test/audio").rglob("*.opus"))
    texts = []
    for more in ([], ["--stream", "--chunk", "0.05"]):
        said = taskarith(
            *("transcribe", "--json", *more, "--resample"),
            *("--model", folder / "min_wer/transcriber", audio),
        )
        texts.append(json.loads(said)["files"][0]["text"])
    assert texts[0] == texts[1]


def in_second_epoch(output):
    """Is there a checkpoint after the one that ended the first epoch?"""
    metas = []
    for path in sorted((output / "save").glob("CKPT+*/CKPT.yaml")):
        try:
            metas.append(path.read_text())
        except FileNotFoundError:  # deleted just now
            pass
    return any("WER" in meta for meta in metas) and "WER" not in metas[-1]


@pytest.mark.slow
def test_killed_in_the_middle_it_gives_the_same(stages, corpus, tmp_path):
    options = {
        "start_from": stages / "transfer",
        # A checkpoint after every batch.
        "ckpt_interval_steps": 1,
        "number_of_epochs": 4,
    }
    run("min_wer", corpus, tmp_path / "whole", **options)
    output = tmp_path / "killed"
    start("min_wer", corpus, output, **options).kill_when(
        lambda: in_second_epoch(output)
    )
    run("min_wer", corpus, output, **options)
    one, other = weights(tmp_path / "whole"), weights(output)
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [
        (tmp_path / name / "train_log.txt").read_text().splitlines()
        for name in ("whole", "killed")
    ]
    # From the second epoch on, with what was counted before the kill.
    assert "expected_wer" in logs[0][-4]
    assert logs[0][-4:] == logs[1][-4:]


@pytest.fixture
def prepare(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE.folder))
    yield importlib.import_module("mls_prepare").prepare_mls
    sys.modules.pop("mls_prepare", None)


def prepared(folder, split="train"):
    with open(folder / f"{split}.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("subset", "numbers"),
    [
        ("full", range(14)),
        ("9h", range(6)),
        ("1h", range(6, 12)),
        ("10h", range(12)),
        ("10min", [6]),
        ("10min/4", [10]),
    ],
)
def test_limited_supervision(corpus, tmp_path, prepare, subset, numbers):
    prepare(str(corpus), str(tmp_path), ["italian"], subset)
    rows = prepared(tmp_path)
    found = sorted(int(row["ID"].split("_")[-1]) for row in rows)
    assert found == sorted(numbers)
    assert {row["accent"] for row in rows} == {"italian"}
    # Test data are never cut.
    assert len(prepared(tmp_path, "test")) == COUNTS["test"]
    assert len(prepared(tmp_path, "valid")) == COUNTS["dev"]


def test_longer_utterances_are_counted(corpus, tmp_path, prepare, caplog):
    with caplog.at_level("INFO"):
        prepare(str(corpus), str(tmp_path / "all"), ["italian"])
        lengths = sorted(
            float(r["duration"]) for r in prepared(tmp_path / "all")
        )
        limit = (lengths[-3] + lengths[-2]) / 2
        prepare(
            str(corpus), str(tmp_path / "out"), ["italian"], max_seconds=limit
        )
    said = [m for m in caplog.messages if "left out" in m]
    assert "italian: 0 of 14 utterances left out" in said[0]
    count = sum(length > limit for length in lengths)
    assert f"italian: {count} of 14 utterances left out: longer" in said[1]
    assert len(prepared(tmp_path / "out")) == 14 - count


def test_durations_without_segments_are_those_of_the_files(
    corpus, tmp_path, prepare
):
    make_language(tmp_path / "mls_italian", "italian")
    (tmp_path / "mls_italian/dev/segments.txt").unlink()
    prepare(str(tmp_path), str(tmp_path / "there"), ["italian"])
    prepare(str(corpus), str(tmp_path / "other"), ["italian"])
    for one, other in zip(
        prepared(tmp_path / "there", "valid"),
        prepared(tmp_path / "other", "valid"),
    ):
        assert float(one["duration"]) == pytest.approx(
            float(other["duration"]), abs=0.05
        )


def test_faults_are_named(corpus, tmp_path, prepare):
    with pytest.raises(ValueError, match="subset '2h': expected one of full"):
        prepare(str(corpus), str(tmp_path), ["italian"], "2h")
    with pytest.raises(FileNotFoundError, match="there are: mls_italian_opus"):
        prepare(str(corpus), str(tmp_path), ["dutch"])
    make_language(tmp_path / "mls_italian_opus", "italian")
    folder = tmp_path / "mls_italian_opus"
    gone = next((folder / "test/audio").rglob("*.opus"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.stem):
        prepare(str(tmp_path), str(tmp_path / "out"), ["italian"])
    with open(folder / "train/transcripts.txt", "a") as stream:
        stream.write("9_9_000001 no tab here\n")
    with pytest.raises(ValueError, match="transcripts.txt, line 15"):
        prepare(str(tmp_path), str(tmp_path / "out"), ["italian"])
    # Nothing says that the preparation is done.
    assert not (tmp_path / "out" / "mls_prepare.json").exists()
