"""The recipe `FilletsNG/ASR/whisper` with a tiny random Whisper."""

import csv
import re
import shlex
import shutil
import sys
import types
import unittest.mock

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from processes import Recipe
from recipe_modules import modules_of
from safetensors.torch import load_file
from speechbrain.decoders.seq2seq import S2SWhisperGreedySearcher
from tiny_whisper import save_tiny_whisper, tell_languages

from speechbrain_taskarith.__main__ import main as taskarith
from speechbrain_taskarith.data import read_audio, write_audio
from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.vectors import TaskVector, open_state, save_state

transformers = pytest.importorskip("transformers")
from speechbrain.integrations.huggingface.whisper import Whisper  # noqa: E402

RECIPE = Recipe("FilletsNG/ASR/whisper")
TEXTS = ["Hallo.", "Dag, boot!", "Een vis", "Twee vissen", "Drie", "Ja"]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A folder of a model with a window of two seconds."""
    return save_tiny_whisper(tmp_path_factory.mktemp("model") / "whisper")


@pytest.fixture
def recipe():
    """The recipe's own modules, which have everyday names."""
    with modules_of(RECIPE.folder) as module:
        yield module


def make_manifest(folder, langs=("nl", "cs"), seconds=None, texts=TEXTS):
    """Write a manifest of noise; `seconds` of the longest utterance."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, text in enumerate(texts):
        length = 0.5 + 0.1 * number
        if seconds and number == 2:
            length = seconds
        wave = torch.rand(int(16000 * length), generator=generator) - 0.5
        write_audio(folder / f"{number}.flac", wave, 16000)
        rows.append(
            {
                "ID": f"line{number}",
                "duration": f"{length:.2f}",
                "wav": f"$data_root/{number}.flac",
                "lang": langs[number % len(langs)],
                "text": text,
            }
        )
    path = folder / "manifest.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def options(whisper, manifest, **more):
    return {
        "whisper_hub": whisper,
        "data_folder": manifest.parent,
        "data_root": manifest.parent,
        "prepare": "null",
        "train_csv": manifest,
        "valid_csv": "null",
        "test_csv": "null",
        "train_precision": "fp32",
        "batch_size": 2,
        "number_of_epochs": 1,
        "save_env_desc": False,
        **more,
    }


def test_trains_and_its_vector_makes_a_folder_that_transformers_reads(
    whisper, tmp_path
):
    manifest = make_manifest(tmp_path / "data")
    output = tmp_path / "run"
    RECIPE.start(
        output,
        options(whisper, manifest, valid_csv=manifest, test_csv=manifest),
    ).finish()
    log = (output / "train_log.txt").read_text()
    assert "valid loss" in log and "test WER" in log
    with open(output / "hypotheses_test.csv", encoding="utf-8") as stream:
        heard = {row["ID"]: row for row in csv.DictReader(stream)}
    assert heard["line1"]["reference"] == "dag boot"
    assert len(heard) == len(TEXTS)

    before = load_file(whisper / "model.safetensors")
    [saved] = (output / "save").glob("CKPT+*/whisper.ckpt")
    after = torch.load(saved, weights_only=True)
    vector, edited = tmp_path / "tau.safetensors", tmp_path / "edited"
    base, tuned = str(whisper), str(output / "save")
    assert taskarith(["vector", base, tuned, "-o", str(vector)]) in (0, None)
    assert taskarith(
        ["apply", base, str(vector), "--scale", "0.5", "-o", str(edited)]
    ) in (0, None)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(edited)
    state, changed = model.state_dict(), 0
    for name, old in before.items():
        halfway = old + 0.5 * (after[name] - old)
        torch.testing.assert_close(state[name], halfway)
        changed += not torch.equal(old, after[name])
    assert changed > 20
    processor = transformers.AutoProcessor.from_pretrained(edited)
    features = processor(
        torch.rand(8000).numpy(), sampling_rate=16000, return_tensors="pt"
    ).input_features
    assert features.shape[-1] == 200  # two seconds
    model.generate(features, max_new_tokens=3)


def test_a_further_training_starts_from_edited_weights(whisper, tmp_path):
    manifest = make_manifest(tmp_path / "data")
    state = {k: v + 0.01 for k, v in open_state(whisper).items()}
    torch.save(state, tmp_path / "edited.pt")
    output = tmp_path / "run"
    RECIPE.start(
        output, options(whisper, manifest, base=tmp_path / "edited.pt", lr=0.0)
    ).finish()
    [saved] = (output / "save").glob("CKPT+*/whisper.ckpt")
    after = torch.load(saved, weights_only=True)
    for name, value in state.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


def test_another_training_does_not_go_on_in_its_folder(
    whisper, recipe, tmp_path
):
    """Of the page: half of a vector, and on from there by the same command."""
    manifest = make_manifest(tmp_path / "data")
    half = tmp_path / "half"
    shutil.copytree(whisper, half)
    given = options(whisper, manifest, number_of_epochs=1)
    given["output_folder"] = tmp_path / "run"

    def train(**changed):
        words = [f"--{key}={value}" for key, value in (given | changed).items()]
        hparams = RECIPE.folder / "hparams/train.yaml"
        recipe("train").train([str(hparams), "--device", "cpu", *words])

    train()
    train(number_of_epochs=2, whisper_hub=half)  # the same weights
    state = {k: v + 0.01 for k, v in open_state(whisper).items()}
    save_state(state, half / "model.safetensors")
    more = make_manifest(tmp_path / "more", texts=TEXTS[:4])
    edited = half / "model.safetensors"
    said = (tmp_path / "run/hyperparams.yaml").read_text()
    for changed, name in (
        ({"whisper_hub": half}, "whisper_hub"),
        ({"base": edited}, "base"),
        ({"train_csv": more, "data_root": more.parent}, "train_csv"),
        ({"language": "cs"}, "language"),
    ):
        match = f"run holds a run with another {name} .*--output_folder"
        with pytest.raises(ValueError, match=match):
            train(**changed)
    assert (tmp_path / "run/hyperparams.yaml").read_text() == said


@pytest.mark.parametrize(
    ("ranks", "factor", "dynamic"),
    [(1, 2, False), (2, 1, False), (2, 2, True)],
)
def test_the_rate_falls_to_zero_whatever_makes_a_step(
    whisper, tmp_path, ranks, factor, dynamic
):
    """Two processes, or batches that are added up, make fewer steps."""
    manifest = make_manifest(tmp_path / "data", texts=TEXTS * 2)
    output = tmp_path / "run"
    RECIPE.start(
        output,
        options(
            whisper,
            manifest,
            test_csv=manifest,
            batch_size=1,
            number_of_epochs=2,
            grad_accumulation_factor=factor,
            dynamic_batching=dynamic,
            **{"dynamic_batch_sampler": "{max_batch_length: 2.0}"},
        ),
        ranks=ranks,
    ).finish()
    log = (output / "train_log.txt").read_text()
    rates = [float(lr) for lr in re.findall(r"lr: ([\d.e+-]+)", log)]
    assert len(rates) == 2 and rates[0] > 0
    assert rates[1] == pytest.approx(0, abs=1e-9)
    # Every utterance is tested once, however many processes there are.
    with open(output / "hypotheses_test.csv", encoding="utf-8") as stream:
        tested = [row["ID"] for row in csv.DictReader(stream)]
    assert sorted(tested) == sorted(f"line{n}" for n in range(2 * len(TEXTS)))
    assert log.count("test WER") == 1


def test_a_batch_too_few_for_a_step_is_named(whisper, tmp_path, recipe):
    manifest = make_manifest(tmp_path / "data")
    given = options(whisper, manifest, grad_accumulation_factor=4)
    given["output_folder"] = tmp_path / "run"
    words = [f"--{key}={value}" for key, value in given.items()]
    hparams = RECIPE.folder / "hparams/train.yaml"
    with pytest.raises(ValueError, match="factor: 4, but an epoch has 3"):
        recipe("train").train([str(hparams), "--device", "cpu", *words])


class Stopped(Exception):
    """A training that was only begun."""


def begin(recipe, monkeypatch, given):
    """Start a training; return its Brain and its loader, before a step."""
    train, found = recipe("train"), []

    def fit(brain, counter, loader, *_, **__):
        found.extend([brain, loader])
        raise Stopped

    monkeypatch.setattr(train.ASR, "fit", fit)
    words = [f"--{key}={value}" for key, value in given.items()]
    hparams = RECIPE.folder / "hparams/train.yaml"
    with pytest.raises(Stopped):
        train.train([str(hparams), "--device", "cpu", *words])
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_that_is_asked_for(
    whisper, recipe, tmp_path, monkeypatch, precision
):
    manifest = make_manifest(tmp_path / "data")
    given = options(
        whisper,
        manifest,
        train_precision=precision,
        output_folder=tmp_path / "run",
    )
    brain, _ = begin(recipe, monkeypatch, given)
    assert (brain.precision, brain.eval_precision) == (precision, precision)


def test_batches_by_seconds_are_drawn_anew(
    whisper, recipe, tmp_path, monkeypatch
):
    """In every epoch, and by the seed."""
    manifest = make_manifest(tmp_path / "data", texts=TEXTS * 2)
    drawn = []
    for seed in (1, 5):
        given = options(
            whisper,
            manifest,
            dynamic_batching=True,
            dynamic_batch_sampler="{max_batch_length: 2.0}",
            num_workers=1,
            seed=seed,
            output_folder=tmp_path / "run",
        )
        brain, loader = begin(recipe, monkeypatch, given)
        assert loader.num_workers == 1
        for epoch in (1, 2):
            brain.train_sampler.set_epoch(epoch)
            drawn.append(list(loader.batch_sampler))
    assert len(set(map(str, drawn))) == 4
    assert len({len(batches) for batches in drawn}) == 1


def test_batches_by_seconds(whisper, tmp_path):
    manifest = make_manifest(tmp_path / "data")
    RECIPE.start(
        tmp_path / "run", options(whisper, manifest, dynamic_batching=True)
    ).finish()
    assert list((tmp_path / "run" / "save").glob("CKPT+*"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seconds": 2.5}, ["1 utterances", "2 s", "line2", "--seconds"]),
        ({"langs": ["xx"]}, ["line0", "'xx'", "--language"]),
        ({"texts": ["Ja", " "]}, ["1 utterances", "no text", "line1"]),
        ({"duration": None}, ["no column 'duration'", "found ID, wav, lang"]),
        ({"text": None}, ["no column 'text'"]),
        ({"duration": "long"}, ["line0", "duration 'long'", "seconds"]),
        ({"wav": "none.flac"}, ["line0: none.flac", "one of 6", "data_root"]),
        ({"ID": "same"}, ["ID 'same' stands there twice"]),
    ],
)
def test_what_a_manifest_cannot_be(whisper, recipe, tmp_path, change, words):
    columns = {"ID", "duration", "wav", "text"} & change.keys()
    made = {k: v for k, v in change.items() if k not in columns}
    manifest = make_manifest(tmp_path / "data", **made)
    for column in columns:
        rewrite(manifest, column, change[column])
    # What is left out must not hide what is wrong.
    longest = None if "seconds" in change else 2
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(recipe, whisper, manifest, tmp_path, avoid_if_longer_than=longest)
    assert str(manifest) in str(error.value)
    for word in words:
        assert word in str(error.value)


def rewrite(manifest, column, value, of=None):
    """Set a column of a manifest; None: remove it. `of`: value of a row."""
    with open(manifest, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row[column] = of(row) if of else value
        if row[column] is None:
            del row[column]
    with open(manifest, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_longer_lines_can_be_left_out(whisper, recipe, tmp_path, caplog):
    manifest = make_manifest(tmp_path / "data", seconds=2.5)
    with caplog.at_level("INFO"):
        rows = read(recipe, whisper, manifest, tmp_path, avoid_if_longer_than=2)
        read(recipe, whisper, manifest, tmp_path, avoid_if_longer_than=0.95)
    assert sorted(rows) == ["line0", "line1", "line3", "line4", "line5"]
    counts = [m for m in caplog.messages if "left out" in m]
    assert f"{manifest}: 1 of 6 utterances are longer than 2 s" in counts[0]
    assert f"{manifest}: 2 of 6 utterances are longer than 0.95" in counts[1]
    with pytest.raises(ValueError, match="no utterances of at most 0.1 s"):
        read(recipe, whisper, manifest, tmp_path, avoid_if_longer_than=0.1)


def test_an_english_only_model_learns_english_only(recipe, tmp_path):
    english = save_tiny_whisper(tmp_path / "tiny", vocab_size=51864)
    manifest = make_manifest(tmp_path / "data", langs=["nl"])
    with pytest.raises(ValueError, match="line0: .* English-only Whisper"):
        read(recipe, english, manifest, tmp_path)
    rewrite(manifest, "lang", None)  # and so the default, nl
    with pytest.raises(ValueError, match="--language, to 'en'"):
        read(recipe, english, manifest, tmp_path)
    rewrite(manifest, "lang", "en")
    assert len(read(recipe, english, manifest, tmp_path)) == len(TEXTS)


def test_a_language_that_the_tokenizer_lacks(recipe, tmp_path):
    """Later models know more: its token would be that of the text's end."""
    older = save_tiny_whisper(tmp_path / "older", without=["yue"])
    manifest = make_manifest(tmp_path / "data", langs=["nl", "yue"])
    with pytest.raises(ValueError, match="line1: language 'yue' is not one"):
        read(recipe, older, manifest, tmp_path)
    newer = save_tiny_whisper(tmp_path / "newer")
    assert len(read(recipe, newer, manifest, tmp_path)) == len(TEXTS)
    describe = recipe("studies.quickstart_data").describe
    (old, _), (new, _) = describe(older), describe(newer)
    assert new - old == {"yue"} and {"nl", "cs", "en"} < old


def test_a_line_in_two_splits_is_told(whisper, recipe, tmp_path, caplog):
    manifest = make_manifest(tmp_path / "data")
    train = recipe("train")
    hparams = {
        "whisper": recipe("whisper_window").WindowedWhisper(
            str(whisper), str(tmp_path), language="nl"
        ),
        "data_root": str(manifest.parent),
        "language": "nl",
        "avoid_if_longer_than": None,
        "train_loader_kwargs": {},
        "dynamic_batching": False,
        "train_csv": str(manifest),
        "valid_csv": None,
        "test_csv": str(manifest),
    }
    train.dataio_prepare(hparams)
    [said] = [m for m in caplog.messages if "is in" in m]
    assert (
        said.startswith("line0: wav ") and "train_csv and in test_csv" in said
    )
    caplog.clear()
    apart = make_manifest(tmp_path / "data" / "apart")
    rewrite(apart, "wav", str(tmp_path / "data/apart/1.flac"))
    train.dataio_prepare(hparams | {"test_csv": str(apart)})
    assert not [m for m in caplog.messages if "is in" in m]
    rewrite(apart, "level", "cellar")
    rewrite(manifest, "level", "cellar")
    train.dataio_prepare(hparams | {"test_csv": str(apart)})
    [said] = [m for m in caplog.messages if "is in" in m]
    assert said.startswith("line0: level 'cellar' is in train_csv and in test")


def test_a_missing_package_is_named_with_its_extra(recipe, monkeypatch):
    for name in ("scoring", "whisper_window"):
        for module in list(sys.modules):
            if module.split(".")[0] == "transformers":
                monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"taskarith\[huggingface\]"):
            recipe(name)
        monkeypatch.undo()


def read(recipe, whisper, manifest, tmp_path, **more):
    """Read a manifest as train.py does."""
    loaded = recipe("whisper_window").WindowedWhisper(
        str(whisper), str(tmp_path), language="nl"
    )
    hparams = {
        "whisper": loaded,
        "data_root": str(manifest.parent),
        "language": "nl",
        "avoid_if_longer_than": None,
        **more,
    }
    return recipe("train").read_rows(str(manifest), hparams)


def test_a_name_that_cannot_be_downloaded(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    window = recipe("whisper_window")
    with pytest.raises(OSError, match="hf download nobody/none --local-dir"):
        window.WindowedWhisper("nobody/none", str(tmp_path / "hub"))
    with pytest.raises(OSError, match="hf download nobody/none --local-dir"):
        window.cut_window("nobody/none", tmp_path / "cut", 1)


def test_a_folder_of_another_model(recipe, tmp_path):
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        conv_dim=(8,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "other")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "other")
    window, other = recipe("whisper_window"), str(tmp_path / "other")
    with pytest.raises(ValueError, match="a wav2vec2 model; expected a W"):
        window.WindowedWhisper(other, str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="a wav2vec2 model; expected a W"):
        window.cut_window(other, tmp_path / "cut", 1)


def test_features_are_those_of_transformers_each_by_itself(
    whisper, recipe, tmp_path
):
    model = recipe("whisper_window").WindowedWhisper(
        str(whisper), str(tmp_path), language="nl"
    )
    waves = torch.rand(3, 12000, generator=torch.Generator().manual_seed(1))
    # A loud one must not raise the floor of the others.
    waves = (waves - 0.5) * torch.tensor([[0.001], [0.1], [1.9]])
    extract = transformers.WhisperFeatureExtractor.from_pretrained(whisper)
    wanted = torch.cat(
        [
            extract(w.numpy(), sampling_rate=16000, return_tensors="pt")[
                "input_features"
            ]
            for w in waves
        ]
    )
    torch.testing.assert_close(
        model._get_mel(waves), wanted, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("lang_tokens", "options", "longest"),
    [
        (None, {}, 25),
        ([50259, 50270, 50283, 50259], {}, 25),
        (None, {"use_kv_cache": False}, 25),
        (None, {"min_decode_ratio": 0.1}, 15),
    ],
)
def test_the_search_finds_what_the_parents_finds(
    whisper, recipe, tmp_path, lang_tokens, options, longest
):
    """Utterances end at different steps, one at once, one never."""
    window = recipe("whisper_window")
    model = window.WindowedWhisper(str(whisper), str(tmp_path), language="nl")
    waves = torch.randn(4, 16000, generator=torch.Generator().manual_seed(3))
    ends = torch.tensor([7, 1, 100, 4])

    class Ends:
        """Ends utterances at steps of their own, by the encoder's states."""

        def forward_step(self, tokens, memory, states, *others):
            logits, memory, attention = super().forward_step(
                tokens, memory, states, *others
            )
            rows = (states[:, None] - encoded).abs().sum((2, 3)).argmin(1)
            step = memory.shape[1] - self.sample_begin + 1
            now = step >= ends[rows]
            logits[:, self.eos_index] = torch.where(now, 1e4, -1e4)
            return logits, memory, attention

    encoded = model.forward_encoder(model._get_mel(waves))
    found = []
    for searcher in (S2SWhisperGreedySearcher, window.WordsSearcher):
        given = {"min_decode_ratio": 0.0, "max_decode_ratio": 0.25} | options
        search = type("Search", (Ends, searcher), {})(model=model, **given)
        search.set_lang_tokens(lang_tokens and torch.tensor(lang_tokens))
        hyps, *_ = search(encoded, torch.ones(4))
        found.append([[int(token) for token in hyp] for hyp in hyps])
    assert found[0] == found[1]
    assert [len(hyp) for hyp in found[1]] == [6, 0, longest, 3]


def test_the_search_refuses_to_sample(whisper, recipe, tmp_path):
    window = recipe("whisper_window")
    model = window.WindowedWhisper(str(whisper), str(tmp_path), language="nl")
    with pytest.raises(ValueError, match="temperature 0.5: expected 0"):
        window.WordsSearcher(
            model=model,
            min_decode_ratio=0.0,
            max_decode_ratio=0.25,
            temperature=0.5,
        )


def test_the_logits_are_the_parents(whisper, recipe, tmp_path):
    window = recipe("whisper_window")
    model = window.WindowedWhisper(str(whisper), str(tmp_path), language="nl")
    waves, tokens = torch.randn(2, 9000), torch.randint(100, (2, 5))
    with torch.no_grad():
        states = model.forward_encoder(model._get_mel(waves))
        wanted, _, cache = Whisper.forward_decoder(model, states, tokens)
        found, _, ours = model.forward_decoder(states, tokens)
        torch.testing.assert_close(found, wanted)
        more = torch.cat([tokens, tokens[:, :1]], 1)
        wanted, *_ = Whisper.forward_decoder(
            model, states, more, past_key_values=cache
        )
        found, *_ = model.forward_decoder(states, more, past_key_values=ours)
    torch.testing.assert_close(found, wanted)
    assert found.shape[1] == 1


def test_the_loss_is_that_of_transformers(whisper, recipe, tmp_path):
    manifest = make_manifest(tmp_path / "data", langs=["nl"])
    measure = recipe("studies.measure").Measure(
        RECIPE.folder / "hparams" / "train.yaml",
        {
            "whisper_hub": str(whisper),
            "output_folder": str(tmp_path / "out"),
            "language": "nl",
        },
        tmp_path / "measured",
        data_root=manifest.parent,
    )
    data = measure.dataset(manifest)
    from speechbrain import Stage
    from speechbrain.dataio.batch import PaddedBatch

    batch = PaddedBatch([data[n] for n in range(len(data))])
    with torch.no_grad():
        found = measure.brain.compute_objectives(
            measure.brain.compute_forward(batch, Stage.TRAIN),
            batch,
            Stage.TRAIN,
        )
        model = transformers.WhisperForConditionalGeneration.from_pretrained(
            whisper
        ).eval()
        total = count = 0
        for n in range(len(data)):
            row = data[n]
            labels = row["tokens_eos"].clone()
            labels[:3] = -100  # the prompt is given
            mel = measure.whisper._get_mel(row["sig"].unsqueeze(0))
            loss = model(
                mel,
                decoder_input_ids=row["tokens_bos"].unsqueeze(0),
                labels=labels.unsqueeze(0),
            ).loss
            total += loss * (len(labels) - 3)
            count += len(labels) - 3
    torch.testing.assert_close(found, total / count, rtol=1e-4, atol=1e-4)


def test_a_cut_window_keeps_the_weights(whisper, recipe, tmp_path):
    window = recipe("whisper_window")
    window.cut_window(whisper, tmp_path / "cut", 1)
    before = load_file(whisper / "model.safetensors")
    after = load_file(tmp_path / "cut" / "model.safetensors")
    positions = "model.encoder.embed_positions.weight"
    assert torch.equal(after.pop(positions), before.pop(positions)[:50])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    loaded = window.WindowedWhisper(
        str(tmp_path / "cut"), str(tmp_path), language="nl"
    )
    assert loaded.window == 1.0
    assert loaded._get_mel(torch.rand(2, 4000)).shape == (2, 80, 100)
    with pytest.raises(ValueError, match="at most 2"):
        window.cut_window(whisper, tmp_path / "more", 3)
    with pytest.raises(FileExistsError, match="another name"):
        window.cut_window(whisper, tmp_path / "cut", 1)
    with pytest.raises(ValueError, match="models of one input window"):
        TaskVector.between(whisper, tmp_path / "cut")


def test_a_cut_window_is_tuned_towards_the_whole_one(whisper, recipe, tmp_path):
    manifest = make_manifest(tmp_path / "data", texts=TEXTS[:4])
    recipe("whisper_window").cut_window(whisper, tmp_path / "cut", 1)
    losses = recipe("tune_window").tune_window(
        str(whisper),
        str(tmp_path / "cut"),
        str(tmp_path / "tuned"),
        [str(manifest)],
        steps=30,
        batch_size=2,
        lr=1e-2,
    )
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    before = open_state(tmp_path / "cut")
    assert TaskVector.between(before, open_state(tmp_path / "tuned")).norm() > 0


def test_speech_is_made_again_alike(recipe, tmp_path):
    pytest.importorskip("espeakng_loader")
    manifest = make_manifest(tmp_path / "data", langs=["nl"], texts=TEXTS[:2])
    speak = recipe("synthesize").synthesize
    paths = [
        speak(manifest, tmp_path / name, "nl", takes=2, show_progress=False)
        for name in ("one", "two")
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with open(paths[0], encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["ID"] for row in rows] == [
        "line0-0",
        "line0-1",
        "line1-0",
        "line1-1",
    ]
    assert len({row["spk_id"] for row in rows}) > 1
    for row in rows:
        name = row["wav"].removeprefix("$data_root/")
        files = [path.parent / name for path in paths]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_speech_of_another_seed_or_text_is_spoken_anew(recipe, tmp_path):
    pytest.importorskip("espeakng_loader")
    speak = recipe("synthesize").synthesize
    manifest = make_manifest(tmp_path / "data", langs=["nl"], texts=TEXTS[:2])

    def spoken(folder, seed):
        path = speak(manifest, folder, "nl", seed=seed, show_progress=False)
        with open(path, encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        names = [row["wav"].removeprefix("$data_root/") for row in rows]
        return [(folder / name).read_bytes() for name in names]

    before = spoken(tmp_path / "one", 0)
    assert spoken(tmp_path / "one", 1) == spoken(tmp_path / "two", 1)
    rewrite(manifest, "text", "Een ander")
    assert spoken(tmp_path / "one", 0) == spoken(tmp_path / "new", 0) != before


def commands_of(page):
    """Yield the commands of a page's bash blocks as lists of words."""

    def repeated(loop):
        names, body = loop.groups()
        return "".join(body.replace("$lang", name) for name in names.split())

    for block in re.findall(r"```bash\n(.*?)```", page, re.S):
        block = re.sub(r"\\\n\s*", "", block)
        block = re.sub(
            r"for lang in ([\w ]+); do\n(.*?\n)done\n",
            repeated,
            block,
            flags=re.S,
        )
        for line in block.splitlines():
            yield shlex.split(line, comments=True)


@pytest.mark.slow
def test_the_commands_of_the_page_follow_one_another(
    recipe, tmp_path, monkeypatch
):
    """In the page's order, on noise: each finds what those before have made."""
    pytest.importorskip("espeakng_loader")
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tiny.en"):
        save_tiny_whisper(tmp_path / f"openai/whisper-{name}", seconds=6)
    prepared = {
        "fillets_prepare.py": ("corpus", ["nl", "cs"]),
        "kathleen_prepare.py": ("arctic", ["", "a", "b"]),
        "fsdd_strings.py": ("digits", [""]),
        "stamps_prepare.py": ("stamps", ["fr"]),
    }
    tests = ["--skip_prep=True", "--train_precision=fp32", "--batch_size=4"]
    tests += ["--number_of_epochs=1", "--save_env_desc=False"]
    seen, output = set(), set()
    page = (RECIPE.folder / "README.md").read_text(encoding="utf-8")
    for program, *words in filter(None, commands_of(page)):
        if program == "python":
            script = words.pop(0)
            name = script.rsplit("/", 1)[-1]
            seen.add(name)
            if name in prepared:
                assert (RECIPE.folder / script).is_file()
                folder, domains = prepared[name]
                assert words[-1] == folder
                write_domains(tmp_path / folder, domains)
            elif name in ("syn2real.py", "sequential.py", "merging.py"):
                recipe(name.removesuffix(".py")).parse_arguments(words)
                for word in words:
                    found = word.split("=")[-1]
                    if "/" in found and not found.startswith("results/"):
                        found = found.format("test")
                        assert (tmp_path / found).exists(), found
            elif name == "train.py" and words[-1] != "...":
                hparams = str(RECIPE.folder / words.pop(0))
                recipe("train").train([hparams, *words, *tests])
            elif name == "tune_window.py":
                recipe("tune_window").main([*words, "--steps=2"])
            elif name != "train.py":
                recipe(name.removesuffix(".py")).main(words)
        elif program == "taskarith":
            assert taskarith(words) in (0, None)
            output.add(words[-1])
    assert {"train.py", "merging.py", "sequential.py", *prepared} < seen
    assert output == {"nl.safetensors", "half", "both"}
    for name in ("half", "both"):
        model = transformers.WhisperForConditionalGeneration.from_pretrained(
            tmp_path / name
        )
        # Of the window of 5 s.
        assert model.config.max_source_positions == 250


def write_domains(folder, domains):
    """Write noise as the manifests of a prepared corpus."""
    for domain in domains:
        lang = domain if domain in ("nl", "cs", "fr") else "en"
        for split in ("train", "valid", "test"):
            name = f"{domain}_{split}".strip("_")
            manifest = make_manifest(folder / name, [lang])
            rewrite(
                manifest,
                "ID",
                None,
                lambda row, name=name: f"{name}_{row['ID']}",
            )
            rewrite(
                manifest,
                "wav",
                None,
                lambda row, name=name: row["wav"].replace(
                    "$data_root", f"$data_root/{name}"
                ),
            )
            manifest.rename(folder / f"{name}.csv")


def test_two_fine_tuned_models_become_one_that_transcribes(
    tmp_path, monkeypatch, capsys
):
    """The example that stands first in README.md, on tiny models."""
    page = (RECIPE.folder.parents[3] / "README.md").read_text(encoding="utf-8")
    example = page.split("```python\n")[1].split("```")[0]
    assert "merge_checkpoints(" in example
    # docs/index.md begins with the lines of it that merge.
    index = RECIPE.folder.parents[3] / "docs" / "index.md"
    shown = index.read_text(encoding="utf-8").split("```python\n")[1]
    lines = shown.split("```")[0].splitlines()
    assert lines and set(lines) <= set(example.splitlines())
    monkeypatch.chdir(tmp_path)
    # Room for as many tokens as a pipeline asks for.
    whisper = save_tiny_whisper(
        tmp_path / "openai" / "whisper-base", max_target_positions=448
    )
    tell_languages(whisper)
    generator = torch.Generator().manual_seed(3)
    base = open_state(whisper)
    for name in ("whisper-dutch", "whisper-czech"):
        state = {
            key: value + 0.05 * torch.randn(value.shape, generator=generator)
            for key, value in base.items()
        }
        save_state(state, tmp_path / name, like=whisper)
    wave = torch.rand(8000, generator=generator) - 0.5
    write_audio(tmp_path / "speech.wav", wave, 16000)
    exec(compile(example, "README.md", "exec"), {})
    merged = open_state(tmp_path / "whisper-both")
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    heard = capsys.readouterr().out.splitlines()[-1]
    # As the model itself hears it, without the pipeline.
    model = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "whisper-both"
    )
    processor = transformers.AutoProcessor.from_pretrained(
        tmp_path / "whisper-both"
    )
    features = processor(
        read_audio(tmp_path / "speech.wav", 16000).numpy(),
        sampling_rate=16000,
        return_tensors="pt",
    ).input_features
    [text] = processor.batch_decode(
        model.generate(features, language="dutch", max_new_tokens=256),
        skip_special_tokens=True,
    )
    assert heard.strip() == text.strip()


def commented_logger(name):
    """Return the text of the YAML, and a logger that it holds as a comment."""
    text = (RECIPE.folder / "hparams/train.yaml").read_text(encoding="utf-8")
    [block] = re.findall(rf"^# {name}[^\n]*\n((?:#[^\n]*\n)+)", text, re.M)
    return text, re.sub(r"^# ?", "", block, flags=re.M)


def test_the_yamls_tensorboard_block_logs_a_training(whisper, recipe, tmp_path):
    pytest.importorskip(
        "tensorboard",
        reason="tensorboard is not installed: the YAML's logger is not tried",
    )
    from tensorboard.backend.event_processing import event_accumulator

    text, block = commented_logger("TensorBoard")
    [usual] = re.findall(r"^train_logger:[^#]+?\n\n", text, re.M)
    # hparams/ lies in the recipe: its prepare script is found beside it.
    (tmp_path / "recipe" / "hparams").mkdir(parents=True)
    path = tmp_path / "recipe" / "hparams" / "train.yaml"
    path.write_text(text.replace(usual, block), encoding="utf-8")
    manifest, output = make_manifest(tmp_path / "data"), tmp_path / "run"
    given = options(whisper, manifest, valid_csv=manifest, test_csv=manifest)
    argv = [f"--{k}={v}" for k, v in {**given, "output_folder": output}.items()]
    recipe("train").train([str(path), *argv])
    events = event_accumulator.EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert {"loss/train", "WER/valid", "WER/test", "lr"} <= set(
        events.Tags()["scalars"]
    )
    [valid], [test] = (events.Scalars(f"WER/{s}") for s in ("valid", "test"))
    assert valid.step == 1
    with open(output / "hypotheses_test.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    heard = wer(*([r[k] for r in rows] for k in ("reference", "hypothesis")))
    # One manifest, one epoch: both are the WER of what was heard.
    assert valid.value == test.value == pytest.approx(heard.wer)
    assert not (output / "train_log.txt").exists()


def log_as_the_recipe_does(recipe, logger):
    brain = types.SimpleNamespace(
        hparams=types.SimpleNamespace(
            train_logger=logger, keep_last=False, valid_csv="a.csv"
        ),
        optimizer=types.SimpleNamespace(param_groups=[{"lr": 0.5}]),
        checkpointer=unittest.mock.Mock(),
        train_stats={"loss": 2.0},
    )
    for epoch, errors in ((1, 60.0), (2, 40.0)):
        recipe("train").ASR.keep(brain, epoch, {"loss": 1.0, "WER": errors})


def test_weights_and_biases_may_log_it(recipe, tmp_path, monkeypatch):
    run = unittest.mock.Mock()
    wandb = types.ModuleType("wandb")
    wandb.init = unittest.mock.Mock(return_value=run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    _, block = commented_logger("Weights & Biases")
    loaded = load_hyperpyyaml(f"output_folder: {tmp_path}\n{block}")
    wandb.init.assert_called_once_with(
        project="whisper_task_vectors", dir=str(tmp_path)
    )
    log_as_the_recipe_does(recipe, loaded["train_logger"])
    [_, call] = run.log.call_args_list
    assert call.args[0]["valid"]["WER"] == 40.0
    assert call.args[0]["train"]["loss"] == 2.0
    assert call.args[0]["lr"] == 0.5 and call.kwargs == {"step": 2}
