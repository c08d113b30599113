"""The recipe `Mboshi/ST/joint` on a tiny corpus of the same layout."""

import csv
import importlib
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from pretrained_encoder import tiny_hubert, with_hubert
from processes import Recipe, texts_of
from recipe_modules import modules_of
from speechbrain.utils.checkpoints import Checkpointer
from tiny_whisper import save_tiny_whisper

from speechbrain_taskarith.translation import SpeechTranslator

RECIPE = Recipe("Mboshi/ST/joint", "--noprogressbar", script="study.py")
RATE = 16000
TINY = {
    "d_model": 16,
    "d_ffn": 16,
    "nhead": 2,
    "num_acoustic_layers": 1,
    "num_textual_layers": 1,
    "num_decoder_layers": 1,
    "source_type": "char",
    "source_pieces": 22,
    "target_pieces": 22,
    "number_of_epochs": 2,
    "max_batch_seconds": 8,
    "num_buckets": 2,
    "test_batch_size": 4,
    "task_interval": 2,
    "consistency_interval": 2,
    "greedy_tokens": 5,
    "beam_size": 2,
    "beam_steps": 5,
    "valid_one_in": 4,
    "entropy_windows": "[1, 2]",
    "entropy_utterances": 3,
}
# Options of the study alone.
STUDY = {
    "asr_epochs": 1,
    "mt_epochs": 1,
    "stage_batch_seconds": 8,
    "target_bleu": 0.0,
}
MBOSHI = "wa ámikoá mwána ngá oyúlu ndzóo kyéma sεngέ".split()
FRENCH = "il va voir un enfant chez lui ; le chat dort".split()


def noise(seconds, seed):
    """Return what stands for speech."""
    g = numpy.random.default_rng(seed)
    return (0.1 * g.standard_normal(round(seconds * RATE))).astype("float32")


def sentence(number):
    """Return a sentence in both languages, another for every number."""
    said = [MBOSHI[number % 8], MBOSHI[number // 8 % 8], MBOSHI[number % 3]]
    meant = [FRENCH[number % 11], FRENCH[(3 * number + 1) % 11], "l’eau"]
    return " ".join(said), " ".join(meant).capitalize()


def make_mboshi(folder):
    """Write 24 utterances of train and 5 of dev."""
    number = 0
    for split, count in (("train", 24), ("dev", 5)):
        place = folder / "full_corpus_newsplit" / split
        place.mkdir(parents=True)
        for _ in range(count):
            speaker = ("abiayi", "kouarata")[number % 2]
            ID = f"{speaker}_2015-09-08_Dico_{number}"
            said, meant = sentence(number)
            wave = noise(1.2 + number % 3 / 10, number)
            soundfile.write(place / f"{ID}.wav", wave, RATE)
            (place / f"{ID}.mb.cleaned").write_text(said + "\n", "utf-8")
            (place / f"{ID}.fr").write_text(meant + "\n", "utf-8")
            number += 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mboshi")
    make_mboshi(folder)
    return folder


def start(data, output, ranks=1, **options):
    """Start the study as a user would."""
    options = {"data_folder": data, **TINY, **STUDY, **options}
    return RECIPE.start(output, options, ranks=ranks)


def run(data, output, fails=False, **options):
    """Run the study to its end; return what it said."""
    return start(data, output, **options).finish(fails=fails)


def weights(output, row):
    """Read a row's last model by torch alone."""
    folder = output / "models" / row / "save"
    path = Checkpointer(folder).find_checkpoint().path
    return torch.load(path / "model.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("all") / "0"
    run(corpus, output)
    return output


ROWS = {"st", "st_from_mt", "st_mt", "st_asr", "st_mt_asr", "whole"}
ROWS |= {"st_from_mt_local", "st_mt_asr_local", "released_rule", "ctc_in_asr"}
ROWS |= {"no_shrink", "no_looking_back", "no_local_to_global", "no_noise"}
ROWS |= {"no_contrastive", "no_task_weights", "no_shrink_no_task_weights"}
ROWS |= {"no_tasks", "cascade", "cascade_tuned", "with_labels"}
CASCADES = {"cascade", "cascade_tuned"}
TRAINED = ROWS - {"cascade"}
STAGES = {"asr", "mt", "mt_local"}


@pytest.mark.slow
def test_leaves_the_whole_table(finished):
    rows = json.loads((finished / "summary.json").read_text())
    table = [row for row in rows if row["table"] == "joint"]
    assert {row["row"] for row in table} == ROWS | STAGES
    found = {(row["row"], row["metric"]) for row in table}
    for metric in ("bleu", "chrf", "length_ratio", "seconds"):
        assert {(name, metric) for name in ROWS} <= found
    # A target of 0 is reached after the first epoch.
    seconds = {(r["row"], r["metric"]): r["value"] for r in rows}
    assert seconds["cascade", "updates"] == 0
    assert ("cascade", "seconds_to_bleu") not in seconds
    for name in TRAINED:
        assert 0 < seconds[name, "seconds_to_bleu"]
        assert seconds[name, "seconds_to_bleu"] < seconds[name, "seconds"]
    joint = json.loads((finished / "rows/st_mt_asr_local.json").read_text())
    for name in TRAINED:
        share = 100 * seconds[name, "cpu_seconds"] / joint["cpu_seconds"]
        assert seconds[name, "cpu_share"] == pytest.approx(share)
    equal = [
        e for e in joint["epochs"] if e["BLEU"] >= joint["epochs"][-1]["BLEU"]
    ]
    assert seconds["st_mt_asr_local", "cpu_share_to_joint"] == pytest.approx(
        100 * equal[0]["cpu_seconds"] / joint["cpu_seconds"]
    )
    assert ("mt_local", "cpu_share") not in seconds
    # Words of the CTC head where it was trained, and only there.
    heard = {name for name, metric in found if metric == "ctc_wer"}
    silent = {"st", "st_from_mt", "st_from_mt_local", "st_mt", *CASCADES}
    assert heard == ROWS - silent | {"asr"}
    assert {name for name, metric in found if metric == "ctc_cer"} == heard
    # The whole method is tested against every row that translates speech, its
    # other forms against the rows without a part of it.
    tested = {r["row"] for r in rows if r["table"] == "joint_paired"}
    rivals = {"st", "st_from_mt_local", "st_mt_asr_local", *CASCADES}
    pairs = {("whole", name) for name in ROWS - {"whole"}}
    pairs |= {("released_rule", r) for r in (*rivals, "with_labels")}
    pairs |= {("with_labels", r) for r in rivals}
    assert tested == {" against ".join(pair) for pair in pairs}
    assert ("asr", "bleu") not in found and ("mt_local", "bleu") in found
    assert "nrefs:1" in (finished / "results.md").read_text()
    for plot in (
        "bleu",
        "bleu_against_time",
        "consistency_whole_st_asr",
        "consistency_st_mt_st_mt",
        "task_weights_whole",
        "entropy_whole",
    ):
        assert (finished / "plots" / f"{plot}.png").stat().st_size > 1000
    entropy = json.loads((finished / "rows/whole.json").read_text())["entropy"]
    assert set(entropy) == {"frames", "shrunk", "text"}
    # One vector tells nothing, two tell ln 2 at most.
    assert all(abs(curve["1"]) < 1e-6 for curve in entropy.values())
    assert all(0 <= curve.get("2", 0) <= 0.6932 for curve in entropy.values())
    lines = (finished / "rows" / "whole.txt").read_text().splitlines()
    assert len(lines) == 3 * 5
    assert any("l'eau" in line for line in lines[1::3])


@pytest.mark.slow
def test_each_row_is_what_its_name_says(finished):
    names = {row: set(weights(finished, row)) for row in TRAINED}

    def has(row, part):
        return any(name.startswith(part) for name in names[row])

    without_shrink = {row for row in ROWS if row.startswith("st")}
    without_shrink |= {"no_shrink", "no_shrink_no_task_weights"}
    plain = {row for row in TRAINED if row.startswith("st")} | CASCADES
    for row in TRAINED:
        looks = row not in without_shrink | {"no_looking_back", *CASCADES}
        assert has(row, "looking_back.") == looks, row
        assert has(row, "label_embedding.gate") == (row == "with_labels"), row
        local = row != "no_local_to_global" and row not in plain
        local |= row.endswith("_local") or row in CASCADES
        assert has(row, "textual.local.") == local, row
        noisy = row != "no_noise" and row not in plain
        assert has(row, "noise.calls") == noisy, row
        result = json.loads((finished / "rows" / f"{row}.json").read_text())
        measured = row not in plain and "task_weights" not in row
        measured &= row not in ("no_tasks", "with_labels")
        assert bool(result["task_weights"]) == measured, row


@pytest.mark.slow
def test_rows_start_from_their_stages(corpus, finished, tmp_path):
    # Nothing moves without a learning rate.
    started = {"st": None, "st_from_mt": "mt", "whole": "mt_local"}
    options = {"only": ",".join(started), "lr": 0.0, "stage_lr": 0.0}
    run(corpus, tmp_path, **options)
    for row, text in started.items():
        found = weights(tmp_path, row)
        for stage, parts in (
            ("asr", ("acoustic.", "ctc_lin.")),
            (text, ("source_embedding.", "textual.", "decoder.")),
        ):
            if stage is None:
                continue
            given = weights(tmp_path, stage)
            for name in found:
                if name.startswith(parts):
                    assert torch.equal(found[name], given[name]), (row, name)
    assert not (tmp_path / "models" / "st_mt_asr").exists()
    # A stage trains its own part, and no other.
    still, moved = weights(tmp_path, "asr"), weights(finished, "asr")
    for name in still:
        same = torch.equal(still[name], moved[name])
        if name.startswith(("textual.", "decoder.", "source_embedding.")):
            assert same, name
    assert not torch.equal(still["ctc_lin.weight"], moved["ctc_lin.weight"])


@pytest.mark.slow
def test_a_cascade_is_two_models_and_may_be_kept(corpus, tmp_path):
    run(corpus, tmp_path, only="cascade", kept="cascade")
    result = json.loads((tmp_path / "rows" / "cascade.json").read_text())
    assert result["updates"] == 0 and len(result["translations"]) == 5
    name, _, translation = result["translations"][0]
    folder = tmp_path / "models" / "cascade" / "translator"
    translator = SpeechTranslator.from_hparams(str(folder))
    # Each part is that of the model it is from.
    state = translator.mods.model.state_dict()
    for stage, parts in (
        ("asr", ("acoustic.", "ctc_lin.")),
        ("mt_local", ("source_embedding.", "textual.", "decoder.")),
    ):
        given = weights(tmp_path, stage)
        for key in state:
            if key.startswith(parts):
                assert torch.equal(state[key], given[key]), key
    (path,) = corpus.rglob(f"dev/{name}.wav")
    assert translator.translate_file(str(path)).text == translation


@pytest.mark.slow
def test_seeds_may_share_the_acoustic_stage(corpus, finished, tmp_path):
    options = {"only": "asr,st", "acoustic_of": finished, "lr": 0.0}
    run(corpus, tmp_path, **options)
    assert not (tmp_path / "models" / "asr").exists()
    assert {p.stem for p in (tmp_path / "rows").glob("*.json")} == {"st"}
    found, given = weights(tmp_path, "st"), weights(finished, "asr")
    for name in given:
        if name.startswith(("acoustic.", "ctc_lin.")):
            assert torch.equal(found[name], given[name]), name
    # Pieces of its own: as many, but others.
    (path,) = (tmp_path / "tokenizer" / "source").glob("*.vocab")
    path.write_text(path.read_text("utf-8").replace("a", "b"), "utf-8")
    (tmp_path / "rows" / "st.json").unlink()
    said = run(corpus, tmp_path, fails=True, **options)
    assert "has other source pieces than this run" in said
    options["acoustic_of"] = tmp_path / "none"
    said = run(corpus, tmp_path, fails=True, **options)
    assert "none" in said and "source pieces" in said


@pytest.mark.slow
def test_a_row_that_is_done_is_not_trained_again(corpus, finished):
    paths = sorted((finished / "rows").glob("*.json"))
    before = [path.read_bytes() for path in paths]
    summary = (finished / "summary.json").read_text()
    said = run(corpus, finished, only="st,whole")
    assert said.count("done before") == 4  # two stages, two rows
    assert [path.read_bytes() for path in paths] == before
    # The other rows stay in the table.
    assert (finished / "summary.json").read_text() == summary
    RECIPE.merge(finished.parent)
    merged = json.loads((finished.parent / "summary.json").read_text())
    # Of one seed the tests over all seeds are those of the seed.
    of_seed, pooled = (
        {
            (row["row"], row["metric"]): row["value"]
            for row in merged
            if row["table"] == table
        }
        for table in ("joint_paired", "joint_pooled")
    )
    assert pooled == of_seed and pooled
    # On other data it is tested only.
    weights_before = weights(finished, "asr")
    run(corpus, finished, only="asr", report_on="valid")
    assert (finished / "valid" / "rows" / "asr.json").is_file()
    assert (finished / "summary.json").read_text() == summary
    after = weights(finished, "asr")
    assert all(torch.equal(weights_before[n], after[n]) for n in after)


@pytest.mark.slow
def test_killed_in_the_middle_it_gives_the_same(corpus, tmp_path):
    # Many epochs: the moment to kill it comes again in each.
    options = {"only": "whole", "number_of_epochs": 8}
    # A checkpoint after every update.
    options["ckpt_interval_steps"] = 1
    run(corpus, tmp_path / "whole", **options)
    output = tmp_path / "killed"

    def within_an_epoch():
        # One validated checkpoint and two later ones.
        found = sorted((output / "models/whole/save").glob("CKPT+*/CKPT.yaml"))
        metas = texts_of(found)
        validated = [n for n, text in enumerate(metas) if "BLEU" in text]
        return validated and validated[-1] + 2 < len(metas)

    start(corpus, output, **options).kill_when(within_an_epoch)
    run(corpus, output, **options)
    one, other = (weights(tmp_path / n, "whole") for n in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    results = [
        json.loads((tmp_path / name / "rows/whole.json").read_text())
        for name in ("whole", "killed")
    ]
    for result in results:
        # All but how long it took.
        for epoch in (result, *result["epochs"]):
            assert epoch.pop("seconds") > 0 and epoch.pop("cpu_seconds") > 0
    assert results[0] == results[1]
    assert len(results[0]["epochs"]) == 8
    logs = [
        (tmp_path / name / "models/whole/train_log.txt").read_text()
        for name in ("whole", "killed")
    ]
    # Losses of each task, too; and how long it took.
    logs = [re.sub(r"seconds: [^,]*", "", log) for log in logs]
    assert logs[0] == logs[1] and "train asr" in logs[0]


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(corpus, tmp_path):
    """Two batches an update, by one process or by two.

    Without what is drawn by chance, and without the contrastive loss, whose
    negatives are those of all processes at once.
    """
    options = {
        "data_folder": corpus,
        **TINY,
        "row": "no_contrastive",
        "contrast": False,
        "contrastive": 0.0,
        "dropout": 0.0,
        "fea_augment": "null",
        "make_noise": "null",
        # Adam makes a whole step of what is rounding.
        "opt_class": "!name:torch.optim.SGD",
        "ckpt_interval_steps": 1000,
    }
    flags = ("--noprogressbar", "--find_unused_parameters")
    one = Recipe("Mboshi/ST/joint", flags[0])
    two = Recipe("Mboshi/ST/joint", *flags)
    for name, recipe, ranks, more in (
        ("start", one, 1, {"lr": 0.0}),
        ("one", one, 1, {"grad_accumulation_factor": 2}),
        ("two", two, 2, {}),
    ):
        output = tmp_path / name / "models" / "no_contrastive"
        output.parent.mkdir(parents=True)
        more["study_folder"] = tmp_path / name
        recipe.run(output, {**options, **more}, ranks=ranks)
    start, one, two = (
        weights(tmp_path / name, "no_contrastive")
        for name in ("start", "one", "two")
    )
    apart = sum((one[n] - two[n]).square().sum() for n in one).sqrt()
    moved = sum((one[n] - start[n]).square().sum() for n in one).sqrt()
    assert moved > 0.01
    assert apart <= 0.005 * moved
    results = [
        json.loads((tmp_path / n / "rows/no_contrastive.json").read_text())
        for n in ("one", "two")
    ]
    # Tasks were weighed by the gradients of both processes.
    for first, second in zip(*(result["task_weights"] for result in results)):
        assert first["weights"] == pytest.approx(second["weights"], rel=1e-3)
    assert results[0]["task_weights"]


@pytest.mark.slow
def test_hubert_of_a_local_folder_takes_the_conformers_place(corpus, tmp_path):
    pytest.importorskip("transformers")
    tiny_hubert(tmp_path / "hubert")
    recipe = Recipe("Mboshi/ST/joint", "--noprogressbar", script="study.py")
    path = "hparams/train.yaml"
    with_hubert(recipe, tmp_path / "recipe", path, tmp_path / "hubert", 12)
    options = {
        **TINY,
        **STUDY,
        "only": "whole",
        "text_from": "null",
        "data_folder": corpus,
    }
    said = recipe.run(tmp_path / "out", options)
    assert "how much padding" not in said
    names = set(weights(tmp_path / "out", "whole"))
    assert "acoustic.projection.weight" in names
    assert any(n.startswith("acoustic.encoder.model.") for n in names)
    result = json.loads((tmp_path / "out/rows/whole.json").read_text())
    assert set(result["entropy"]) == {"frames", "shrunk", "text"}


@pytest.mark.slow
def test_whisper_of_a_local_folder_is_encoded_once(corpus, tmp_path):
    save_tiny_whisper(tmp_path / "whisper")
    options = {
        **TINY,
        **STUDY,
        "only": "whole",
        "data_folder": corpus,
        "whisper_hub": tmp_path / "whisper",
        "cache_folder": tmp_path / "out/encoded",
    }
    RECIPE.run(tmp_path / "out", options, hparams="train_whisper")
    assert len(list((tmp_path / "out/encoded").iterdir())) == 29
    names = set(weights(tmp_path / "out", "whole"))
    assert any(n.startswith("acoustic.adaptor.") for n in names)
    assert (tmp_path / "out/models/whole/translator").is_dir()


@pytest.mark.slow
def test_a_tied_head_is_trained_and_comes_from_one_model(corpus, tmp_path):
    recipe = Recipe("Mboshi/ST/joint", "--noprogressbar")
    options = {**TINY, "data_folder": corpus, "tie_ctc": True}
    options |= {"number_of_epochs": 1, "study_folder": tmp_path}
    two = {"acoustic_from": "asr/save", "text_from": "mt/save"}
    said = recipe.run(tmp_path / "two", {**options, **two}, fails=True)
    assert "one matrix cannot be that of two models" in said
    recipe.run(tmp_path / "one", options)
    path = Checkpointer(tmp_path / "one/save").find_checkpoint().path
    model = torch.load(path / "model.ckpt", weights_only=True)
    head, text = model["ctc_lin.weight"], model["source_embedding.weight"]
    assert torch.equal(head, text)
    assert (tmp_path / "one/translator").is_dir()


@pytest.mark.slow
def test_another_training_does_not_go_on_in_its_folder(corpus, tmp_path):
    recipe = Recipe("Mboshi/ST/joint", "--noprogressbar")
    options = {**TINY, "data_folder": corpus, "number_of_epochs": 1}
    options["study_folder"] = tmp_path
    alone = tmp_path / "models/whole"
    alone.mkdir(parents=True)
    recipe.run(alone, options)
    # It began with random weights; the row of the study does not.
    said = run(corpus, tmp_path, fails=True, only="whole", number_of_epochs=1)
    assert "models/whole holds a run with another acoustic_from" in said
    assert not (tmp_path / "models/asr").exists()
    said = recipe.run(alone, {**options, "tasks": "[asr]"}, fails=True)
    assert "another tasks (['asr', 'mt'], now ['asr'])" in said
    recipe.run(alone, options)


def test_a_tokenizer_of_other_text_is_refused(tmp_path):
    path = tmp_path / "train.txt"
    with modules_of(RECIPE.folder) as load:
        write_text = load("train").write_text
        write_text(path, "één\n")
        # Nothing was learned from it.
        write_text(path, "één\r\ntwee\n")
        (tmp_path / "9_char.model").touch()
        write_text(path, "één\r\ntwee\n")
        with pytest.raises(ValueError, match="another --study_folder"):
            write_text(path, "één\n")
    assert path.read_bytes().decode() == "één\r\ntwee\n"


@pytest.mark.slow
def test_an_unknown_row_is_named(corpus, tmp_path):
    said = run(corpus, tmp_path, only="st,nothing", fails=True)
    assert "no rows nothing; there are asr, mt" in said


def test_too_few_pieces_are_named(corpus, tmp_path):
    few = {"source_type": "unigram", "source_pieces": 4}
    said = run(corpus, tmp_path, only="st", fails=True, **few)
    assert "--source_pieces 4: SentencePiece says" in said
    assert "Increase vocab_size" in said


def test_two_recordings_under_one_name_are_refused():
    def split(**wavs):
        rows = {
            f"{name}_{target}": {"utterance": name, "wav": wav}
            for name, wav in wavs.items()
            for target in ("de", "fr")
        }
        return Namespace(data=rows)

    with modules_of(RECIPE.folder) as load:
        recordings_of = load("train").recordings_of
        assert recordings_of([split(a="1.wav"), split(b="2.wav")]) == {
            "a": {"wav": "1.wav"},
            "b": {"wav": "2.wav"},
        }
        with pytest.raises(ValueError, match="'a' is 1.wav .* and 2.wav"):
            recordings_of([split(a="1.wav"), split(a="2.wav")])


@pytest.fixture
def prepare(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE.folder))
    yield importlib.import_module("mboshi_prepare").prepare_mboshi
    sys.modules.pop("mboshi_prepare", None)


def prepared(folder, split="train"):
    with open(folder / f"{split}.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_corpus_own_split_is_kept(corpus, tmp_path, prepare):
    prepare(str(corpus), str(tmp_path), valid_one_in=4)
    rows = {s: prepared(tmp_path, s) for s in ("train", "valid", "test")}
    place = corpus / "full_corpus_newsplit"
    for split, name in (
        ("train", "train"),
        ("valid", "train"),
        ("test", "dev"),
    ):
        assert rows[split]
        for row in rows[split]:
            assert Path(row["wav"]).parent == place / name
    assert len(rows["test"]) == 5
    assert len(rows["train"]) + len(rows["valid"]) == 24
    # No sentence is in two of them.
    for one, other in (("train", "valid"), ("train", "test")):
        said = {row["wrd"] for row in rows[one]}
        assert not said & {row["wrd"] for row in rows[other]}
    row = rows["test"][0]
    number = int(row["ID"].split("_")[-1])
    said, meant = sentence(number)
    assert row["wrd"] == said
    assert row["translation"] == meant.lower().replace("’", "'")
    # The folder itself will do, too, and nothing is drawn by chance.
    prepare(str(place), str(tmp_path / "again"), valid_one_in=4)
    assert prepared(tmp_path / "again", "valid") == rows["valid"]


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".wav", None, "no recording"),
        (".wav", b"no wav", "unreadable recording"),
        (".mb.cleaned", None, "no transcript"),
        (".mb.cleaned", b" \n", "empty transcript"),
        (".fr", None, "no translation"),
        (".fr", b"\n", "empty translation"),
        (".fr", b"\xff\xfe", "translation is not UTF-8"),
    ],
)
def test_bad_utterance_is_named_or_left_out(
    tmp_path, prepare, suffix, content, message
):
    make_mboshi(tmp_path)
    place = tmp_path / "full_corpus_newsplit/train"
    ID = "abiayi_2015-09-08_Dico_2"
    path = place / f"{ID}{suffix}"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"'{ID}': {message}"
    ):
        prepare(str(tmp_path), str(out))
    # Nothing says that the preparation is done.
    assert not (out / "mboshi_prepare.json").exists()
    prepare(str(tmp_path), str(out), valid_one_in=4, skip_bad=True)
    kept = prepared(out) + prepared(out, "valid")
    assert len(kept) == 23
    assert ID not in {row["ID"] for row in kept}


def test_another_folder_is_refused(tmp_path, prepare):
    with pytest.raises(FileNotFoundError, match="full_corpus_newsplit"):
        prepare(str(tmp_path), str(tmp_path / "out"))
