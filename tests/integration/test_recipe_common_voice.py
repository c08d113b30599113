"""The recipe `CommonVoice/ASR/sequential_editing` on a made tree."""

import csv
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from processes import ROOT
from recipe_modules import modules_of
from tiny_whisper import save_tiny_whisper

from speechbrain_taskarith.data import EspeakVoice
from speechbrain_taskarith.metrics import LifelongMatrix
from speechbrain_taskarith.vectors import open_state

pytest.importorskip("espeakng_loader")
soundfile = pytest.importorskip("soundfile")

FOLDER = ROOT / "recipes" / "CommonVoice" / "ASR" / "sequential_editing"
# As the corpus writes them, and voices for each.
ACCENTS = {
    "us": ("United States English", "en-us"),
    "england": ("England English", "en-gb"),
    "india": ("India and South Asia (India, Pakistan, Sri Lanka)", "en-029"),
}
SENTENCES = ['He said "no" twice.', "A red kite.", "It’s late!"]
TINY = [
    *("--d_model=16", "--d_ffn=16", "--nhead=2", "--num_encoder_layers=1"),
    *("--n_mels=20", "--dynamic_batching=False", "--num_workers=0"),
]


def speaker(split, accent, split_of):
    """Return a name that the recipe puts into a split."""
    names = (f"{accent}{n:04d}" for n in range(1000))
    return next(name for name in names if split_of(name) == split)


def make_tree(folder, split_of):
    """Write the folder of one language, with MP3 where it can be written."""
    mp3 = "MP3" in soundfile.available_formats()
    (folder / "clips").mkdir(parents=True)
    lines = []
    for accent, (written, voice) in ACCENTS.items():
        for split, texts in (
            ("train", SENTENCES),
            ("valid", SENTENCES[:1]),
            ("test", SENTENCES[1:]),
        ):
            for text in texts:
                name = f"common_voice_en_{len(lines)}.{'mp3' if mp3 else 'wav'}"
                wave = EspeakVoice(voice, rate=240)(text).numpy()
                soundfile.write(folder / "clips" / name, wave, 16000)
                who = speaker(split, accent, split_of)
                lines.append((who, name, text, "2", written))
    who, name, *_ = lines[0]
    both, two = (f"common_voice_en_{n}{name[-4:]}" for n in ("both", "two"))
    for other in (both, two):
        shutil.copy(folder / "clips" / name, folder / "clips" / other)
    lines += [
        ("nobody", name, "No accent.", "2", ""),
        (
            "somebody",
            two,
            "Two.",
            "2",
            "United States English|England English",
        ),
        ("else", name, "Another.", "2", "Scottish English"),
        # One that is asked for, and one that is not: it has the one.
        (who, both, "Both.", "2", "United States English,Midwestern"),
    ]
    write_table(folder / "validated.tsv", lines)
    return folder


def write_table(path, lines, column="accents"):
    header = ("client_id", "path", "sentence", "up_votes", column)
    text = "".join("\t".join(line) + "\n" for line in [header, *lines])
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def recipe():
    with modules_of(FOLDER) as find:
        yield find


@pytest.fixture(scope="module")
def corpus(recipe, tmp_path_factory):
    split_of = recipe("common_voice_prepare").split_of
    return make_tree(tmp_path_factory.mktemp("cv") / "en", split_of)


def options(corpus, output, *more, epochs=1):
    return [
        f"--data_folder={corpus}",
        f"--output={output}",
        "--train_precision=fp32",
        "--batch_size=3",
        f"--number_of_epochs={epochs}",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(recipe, corpus, tmp_path_factory):
    """The study with a tiny Conformer, three accents."""
    output = tmp_path_factory.mktemp("study")
    recipe("study").main(
        [
            *options(corpus, output, epochs=3),
            *TINY,
            "--accents",
            *ACCENTS,
        ]
    )
    return output


def kept(output, row, place):
    return open_state(output / "0/save" / row / place / "kept.safetensors")


def tuned(output, accent, base):
    """Read the training of an accent that started from some weights."""
    digest = base.fingerprint.split(":")[-1][:12]
    [path] = (output / f"0/models/plain/{accent}-{digest}/save").glob(
        "CKPT+*/model.ckpt"
    )
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("row", "scales"),
    [
        ("fine_tuning", (1.0, 1.0)),
        ("task_arithmetic", (0.4, 0.4)),
        ("averaging_half", (0.5, 0.5)),
        ("averaging_one_over_t", (1 / 2, 1 / 3)),
    ],
)
def test_each_row_keeps_its_share(finished, row, scales):
    before = kept(finished, "first_model", "")
    for scale, place in zip(scales, ("02_england", "03_india")):
        after = tuned(finished, place.split("_")[1], before)
        found, moved = kept(finished, row, place), 0
        for name, old in before.items():
            if not old.is_floating_point():
                continue
            new = after[name].double()
            torch.testing.assert_close(
                found[name].double(),
                old.double() + scale * (new - old.double()),
                rtol=1e-5,
                atol=1e-7,
            )
            moved += not torch.equal(found[name], old)
        assert moved > 10
        before = found


def test_ties_keeps_the_larger_half(finished):
    before = kept(finished, "first_model", "")
    after = tuned(finished, "england", before)
    found = kept(finished, "ties", "02_england")
    # Constants of the positions are entries, too, as the rule counts them.
    names = [n for n, t in before.items() if t.is_floating_point()]
    delta = torch.cat([(after[n] - before[n]).flatten() for n in names])
    got = torch.cat([(found[n] - before[n]).flatten() for n in names])
    count = round(0.5 * len(delta))
    limit = delta.abs().sort(descending=True).values[count - 1]
    large, small = delta.abs() > limit, delta.abs() < limit
    torch.testing.assert_close(
        got[large], 0.6 * delta[large], rtol=1e-3, atol=1e-6
    )
    assert large.sum() > 1000 and not got[small].any()


def test_the_table_has_rivals_and_bounds(finished):
    found = json.loads((finished / "summary.json").read_text())
    table = {}
    for row in found:
        table.setdefault(row["row"], set()).add(row["metric"])
    assert set(table) == {
        *("fine_tuning", "task_arithmetic", "ties", "averaging_half"),
        *("averaging_one_over_t", "joint"),
    }
    for metrics in table.values():
        assert metrics == {"average_wer", "bwt", "fwt", "im", "werr"}
    with open(finished / "0/save/joint/us+england+india.csv") as stream:
        accents = [row["accent"] for row in csv.DictReader(stream)]
    # One more of `us`: the clip with a second accent that nobody asked for.
    assert sorted(accents) == ["england"] * 3 + ["india"] * 3 + ["us"] * 4


def analyze(folder):
    """Compute what CL-MASR's script computes, written anew from its format.

    Groups are what stands before the first underscore of a file's name. The
    values of `test WER` come in the order base; base, new 1; base, new 1,
    new 2; ... References of the two last measures are given on the command
    line.
    """
    command = shlex.split((folder / "analyze.sh").read_text(), comments=True)
    refs = dict(zip(command, command[1:]))
    im_refs, fwt_refs = (json.loads(refs[f"--{m}_refs"]) for m in ("im", "fwt"))
    measures = {}
    for path in sorted(folder.iterdir()):
        if not re.match(r".*_base=.*_new=.*.txt", path.name):
            continue
        group = path.name.split("_")[0]
        base, new = (
            path.name.removesuffix(".txt").split("_base=")[1].split("_new=")
        )
        base, new = base.split(","), new.split(",")
        wers = []
        for line in path.read_text(encoding="utf-8").splitlines():
            pairs = line.strip().replace(" - ", ", ").split(", ")
            values = dict(pair.split(": ") for pair in pairs)
            wers.append(float(values["test WER"]))
        tasks, at = 1 + len(new), 0
        matrix = np.full((tasks, tasks), np.nan)
        for k in range(tasks):
            matrix[k, 0] = np.mean(wers[at : at + len(base)])
            at += len(base)
            for j in range(1, k + 1):
                matrix[k, j] = wers[at]
                at += 1
        assert at == len(wers), "as many tests as the script reads"
        diagonal = np.diag(matrix)
        measures[group] = {
            "average_wer": np.nanmean(matrix[-1]),
            "bwt": np.mean(diagonal[:-1] - matrix[-1, :-1]),
            "im": np.mean(diagonal[1:] - [im_refs[n] for n in new]),
            "fwt": np.mean([fwt_refs[n] for n in new] - diagonal[1:]),
        }
    return measures


def test_cl_masr_reads_the_logs_and_finds_our_figures(finished):
    found = json.loads((finished / "summary.json").read_text())
    ours = {}
    for row in found:
        ours.setdefault(row["row"].replace("_", "-"), {})[row["metric"]] = row[
            "value"
        ]
    theirs = analyze(finished / "cl_masr_logs")
    assert set(theirs) == set(ours) and len(theirs) == 6
    for row, metrics in theirs.items():
        for metric, value in metrics.items():
            assert value == pytest.approx(ours[row][metric], abs=1e-3), (
                row,
                metric,
            )
    matrix = LifelongMatrix.load(finished / "0/matrices/ties.csv")
    assert matrix.domains == tuple(ACCENTS)


def test_other_settings_in_the_folder_are_refused(recipe, corpus, finished):
    us, england, india = ACCENTS
    for accents, more, said in (
        (ACCENTS, "--test=1", "another test"),
        (ACCENTS, "--lr=0.5", "another lr"),
        (ACCENTS, "--weight_decay=0.5", "another option of train.py"),
        ((us, india, england), "--seeds=0", "another order of accents"),
        ((us, england), "--seeds=1", "another order of accents"),
    ):
        argv = [*options(corpus, finished, epochs=3), *TINY, more]
        with pytest.raises(ValueError, match=said):
            recipe("study").main([*argv, "--accents", *accents])


def test_whisper_learns_a_sequence(recipe, corpus, tmp_path):
    pytest.importorskip("transformers")
    hub = save_tiny_whisper(tmp_path / "whisper", seconds=3)
    output = tmp_path / "out"
    recipe("study").main(
        options(
            corpus,
            output,
            *("--model=whisper", f"--hub={hub}", "--longest=3", "--test=1"),
            *("--accents", "us", "india"),
        )
    )
    before = kept(output, "first_model", "")
    after = kept(output, "fine_tuning", "02_india")
    edited = kept(output, "task_arithmetic", "02_india")
    for name, old in before.items():
        torch.testing.assert_close(
            edited[name], old + 0.4 * (after[name] - old), rtol=1e-5, atol=1e-6
        )


def test_one_step_by_hand_is_edited_by_the_checkpointer(
    recipe, corpus, finished, tmp_path
):
    by_hand = tmp_path / "by_hand"
    recipe("train").train(
        [
            str(FOLDER / "hparams/train.yaml"),
            f"--data_folder={corpus}",
            f"--prepared_folder={finished / 'prepared'}",
            "--skip_prep=True",
            f"--output_folder={by_hand}",
            *("--accent=england", "--row=task_arithmetic", "--lr=0.0001"),
            f"--base={finished / '0/save/first_model/kept.safetensors'}",
            *("--valid_csv=null", "--test_csv=null", "--save_env_desc=False"),
            *("--train_precision=fp32", "--batch_size=3"),
            *("--number_of_epochs=1", "--noprogressbar", *TINY),
        ]
    )
    [folder] = (by_hand / "save").glob("CKPT+*")
    state, full = (
        torch.load(folder / name, weights_only=True)
        for name in ("model.ckpt", "model.finetuned.ckpt")
    )
    base = kept(finished, "first_model", "")
    for name, old in base.items():
        torch.testing.assert_close(
            state[name], old + 0.4 * (full[name] - old), rtol=1e-5, atol=1e-6
        )
    assert any(not torch.equal(full[name], base[name]) for name in base)


def prepare(recipe, corpus, output, **more):
    accents = {name: written for name, (written, _) in ACCENTS.items()}
    recipe("common_voice_prepare").prepare_common_voice(
        corpus, output, **{"accents": accents, **more}
    )


def test_prepare_keeps_quotes_and_one_accent_a_clip(recipe, corpus, tmp_path):
    prepare(recipe, corpus, tmp_path)
    texts = []
    for accent in ACCENTS:
        for split in ("train", "valid", "test"):
            with open(tmp_path / f"{accent}_{split}.csv") as stream:
                for row in csv.DictReader(stream):
                    assert row["accent"] == accent and row["lang"] == "en"
                    assert float(row["duration"]) > 0.3
                    texts.append(row["text"])
    assert texts.count(SENTENCES[0]) == 6
    assert "Both." in texts
    assert not {"No accent.", "Two.", "Another."} & set(texts)


def test_the_corpus_own_splits_and_the_old_column(recipe, corpus, tmp_path):
    tree = tmp_path / "en"
    tree.mkdir()
    (tree / "clips").symlink_to(corpus / "clips")
    name = next((corpus / "clips").iterdir()).name
    for number, split in enumerate(("train", "dev", "test")):
        line = (f"speaker{number}", name, f"Number {number}", "2", "us")
        write_table(tree / f"{split}.tsv", [line], column="accent")
    accents = {"american": ["United States English", "us"]}
    prepare(recipe, tree, tmp_path / "out", accents=accents, source="splits")
    with open(tmp_path / "out" / "american_valid.csv") as stream:
        assert [row["text"] for row in csv.DictReader(stream)] == ["Number 1"]
    line = ("speaker0", name, "Again", "2", "us")
    write_table(tree / "test.tsv", [line], column="accent")
    with pytest.raises(ValueError, match="speaker speaker0.* in train and in"):
        prepare(recipe, tree, tmp_path / "o", accents=accents, source="splits")
    write_table(tree / "test.tsv", [line], column="age")
    with pytest.raises(ValueError, match="test.tsv: no column 'accent'"):
        prepare(recipe, tree, tmp_path / "o", accents=accents, source="splits")


def test_faults_are_named(recipe, corpus, tmp_path):
    with pytest.raises(ValueError, match="'wales'.*frequent accents are 'Uni"):
        prepare(recipe, corpus, tmp_path, accents={"wales": "Welsh English"})
    with pytest.raises(ValueError, match="'us' stands under 'a' and 'b'"):
        prepare(recipe, corpus, tmp_path, accents={"a": "us", "b": ["us"]})
    with pytest.raises(FileNotFoundError, match="train.tsv: missing"):
        prepare(recipe, corpus, tmp_path, source="splits")
    main = recipe("study").main
    with pytest.raises(ValueError, match="--accents wales: no such name"):
        main(options(corpus, tmp_path, "--accents", "us", "wales"))
    with pytest.raises(ValueError, match="two or more make a sequence"):
        main(options(corpus, tmp_path, "--accents", "us"))
    with pytest.raises(ValueError, match="needs --hub"):
        main(options(corpus, tmp_path, "--model=whisper"))


def test_clips_to_test_on_are_of_all_speakers(recipe, tmp_path):
    """The corpus has them one speaker after another."""
    clips = [{"ID": f"{n:03d}", "spk_id": str(n // 25)} for n in range(100)]
    path = tmp_path / "us_test.csv"
    recipe("common_voice_prepare").write_rows(path, clips)
    draw = recipe("study").draw_clips
    drawn = draw(path, 20)
    assert drawn == draw(path, 20)
    assert len({row["ID"] for row in drawn}) == 20
    assert len({row["spk_id"] for row in drawn}) == 4
    assert [row["ID"] for row in draw(path, None)] == [c["ID"] for c in clips]
    assert len(draw(path, 1000)) == 100


def test_batches_and_precision_are_those_asked_for(
    recipe, corpus, tmp_path, monkeypatch
):
    prepare(recipe, corpus, tmp_path)
    train, drawn = recipe("train"), []

    def fit(brain, counter, loader, *_, **__):
        assert (brain.precision, brain.eval_precision) == ("bf16", "bf16")
        for epoch in (1, 2):
            brain.train_sampler.set_epoch(epoch)
            drawn.append(list(loader.batch_sampler))
        raise InterruptedError

    monkeypatch.setattr(train.ASR, "fit", fit)
    for seed in (1, 5):
        with pytest.raises(InterruptedError):
            train.train(
                [
                    str(FOLDER / "hparams/train.yaml"),
                    *(f"--data_folder={corpus}", "--skip_prep=True"),
                    f"--prepared_folder={tmp_path}",
                    f"--output_folder={tmp_path / 'run'}",
                    *("--valid_csv=null", "--test_csv=null", f"--seed={seed}"),
                    *(w for w in TINY if "dynamic" not in w),
                    "--dynamic_batch_sampler={max_batch_length: 0.1}",
                    *("--train_precision=bf16", "--save_env_desc=False"),
                    *("--device=cpu", "--noprogressbar"),
                ]
            )
    assert len(set(map(str, drawn))) > 2


def test_longer_clips_are_counted(recipe, tmp_path, caplog):
    path = tmp_path / "manifest.csv"
    path.write_text("ID,duration,wav,text\na,1,a.wav,a\nb,3.5,b.wav,b\n")
    read = recipe("characters").read_manifest
    with caplog.at_level("INFO"):
        assert list(read(path, ".", "ab", longest=3)) == ["a"]
    [said] = [m for m in caplog.messages if "left out" in m]
    assert f"{path}: 1 of 2 utterances are longer than 3 s" in said
    with pytest.raises(ValueError, match="no utterances of at most 0.5 s"):
        read(path, ".", "ab", longest=0.5)


@pytest.mark.parametrize(
    ("text", "accents"),
    [
        ("", []),
        ("us", ["us"]),
        ("India and South Asia (India, Pakistan, Sri Lanka)",) * 2,
        ("England English|Midlands", ["England English", "Midlands"]),
    ],
)
def test_accents_of_a_clip(recipe, text, accents):
    accents = [accents] if isinstance(accents, str) else accents
    assert recipe("common_voice_prepare").accents_of(text) == accents
