"""Outputs of a frozen encoder on disk: right, refused, taken up again."""

import pickle
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hugging_face_toy import save_encoder, save_whisper, wrapper
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_taskarith.brains import TranslationBrain, WordLabels
from speechbrain_taskarith.data.audio import read_audio, write_audio
from speechbrain_taskarith.translation import (
    AcousticEncoder,
    EncoderCache,
    SpeechTranslationModel,
    TaskNormWeights,
    TextEncoder,
    TranslationDecoder,
    TranslationObjective,
    WhisperAcousticEncoder,
)
from speechbrain_taskarith.translation.encoders.cache import _changed

pytest.importorskip("transformers")

NAMES = ("a", "talk/1 é", "..", "x" * 300)


@pytest.fixture
def rows(tmp_path):
    """A manifest of recordings of 0.3 to 0.9 s, and a part of the last."""
    torch.manual_seed(0)
    made = {}
    for place, name in enumerate(NAMES):
        path = tmp_path / "audio" / f"{place}.wav"
        write_audio(path, 0.1 * torch.randn(4801 + 3000 * place), 16000)
        made[name] = {"wav": str(path), "duration": "0.3", "start": ""}
    made["part"] = {**made["a"], "start": "0.1", "duration": "0.15"}
    return made


@pytest.fixture
def whisper(tmp_path):
    torch.manual_seed(1)
    return save_whisper(tmp_path / "whisper", encoder_layers=2)


def read(cache, name, row):
    start = float(row["start"]) if row["start"] else None
    return cache(name, row["wav"], start, float(row["duration"]))


@pytest.mark.parametrize("trained", [0, 1])
def test_it_gives_what_the_encoder_gives(rows, whisper, tmp_path, trained):
    torch.manual_seed(2)
    encoder = WhisperAcousticEncoder(whisper, 12, trained).train()
    cache = EncoderCache(encoder, tmp_path / "cache", batch_size=2)
    assert cache.fill(rows) == len(rows)
    assert encoder.training and cache.fill(rows) == 0
    exact = EncoderCache(encoder, tmp_path / "exact", "float32", batch_size=3)
    exact.fill(rows)
    encoder.eval()
    for name, row in rows.items():
        wave = read_audio(row["wav"], 16000)
        if name == "part":
            wave = wave[1600 : 1600 + 2400]
        expected, counts = encoder.frozen(wave[None], torch.ones(1))
        found = read(exact, name, row)
        torch.testing.assert_close(found, expected[0], atol=1e-3, rtol=1e-3)
        small = read(cache, name, row)
        assert small.dtype == torch.float16 and len(small) == counts
        # Batches of another size round otherwise.
        torch.testing.assert_close(small.float(), found, atol=1e-3, rtol=1e-3)
        # The rest of the encoder goes on from it, whatever its type.
        whole, _ = encoder(wave[None], torch.ones(1))
        goes_on, _ = encoder(found[None], torch.ones(1))
        torch.testing.assert_close(goes_on, whole, atol=1e-3, rtol=1e-3)
        goes_on, _ = encoder(small[None], torch.ones(1))
        torch.testing.assert_close(goes_on, whole, atol=0.05, rtol=0.05)


def test_what_is_refused_leaves_the_encoder_as_it_was(rows, whisper, tmp_path):
    encoder = WhisperAcousticEncoder(whisper, 12, trained_layers=1).train()
    modes = [module.training for module in encoder.modules()]
    write_audio(tmp_path / "long.wav", torch.rand(31 * 16000), 16000)
    cache = EncoderCache(encoder, tmp_path / "cache")
    bad = {"wav": str(tmp_path / "long.wav")}
    with pytest.raises(ValueError, match="'long' has 31.00 s"):
        cache.fill({**rows, "long": bad})
    assert [module.training for module in encoder.modules()] == modes
    with pytest.raises(ValueError, match="a start and no duration"):
        cache.fill({"a": {"wav": rows["a"]["wav"], "start": 0.1}})


def test_hubert_is_kept_as_well(rows, tmp_path):
    folder = save_encoder(tmp_path / "hubert", "Hubert", num_hidden_layers=2)
    encoder = AcousticEncoder(wrapper("Hubert", folder), 12, trained_layers=1)
    encoder.train()
    cache = EncoderCache(encoder, tmp_path / "cache")
    cache.fill(rows)
    x = cache("a")
    frames, counts = encoder(x[None], torch.ones(1))
    assert counts.tolist() == [len(x)] and frames.shape[2] == 12
    frames.sum().backward()
    layers = encoder.encoder.model.encoder.layers
    learnt = [p.grad is not None for p in layers[1].parameters()]
    assert all(learnt) and layers[0].attention.k_proj.weight.grad is None


def test_training_of_the_last_layers_changes_nothing(rows, whisper, tmp_path):
    encoder = WhisperAcousticEncoder(whisper, 12, 1)
    cache = EncoderCache(encoder, tmp_path / "cache")
    cache.fill(rows)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    encoder(cache("a")[None], torch.ones(1))[0].sum().backward()
    optimizer.step()
    assert cache.fill(rows) == 0
    # The trained model, saved and loaded, is the same encoder below.
    other = WhisperAcousticEncoder(whisper, 12, 1)
    other.load_state_dict(encoder.state_dict())
    assert EncoderCache(other, tmp_path / "cache").fill(rows) == 0


def test_another_encoder_is_refused(rows, whisper, tmp_path):
    encoder = WhisperAcousticEncoder(whisper, 12)
    EncoderCache(encoder, tmp_path / "cache").fill({"a": rows["a"]})
    last_layer = WhisperAcousticEncoder(whisper, 12, 1)
    changed = WhisperAcousticEncoder(whisper, 12)
    cache = EncoderCache(changed, tmp_path / "cache")
    assert cache("a").shape == (16, 16)
    with torch.no_grad():
        changed.encoder.layers[0].fc1.bias[0] += 1e-3
    for other in (cache, EncoderCache(last_layer, tmp_path / "cache")):
        with pytest.raises(ValueError, match="another .* folder of its own"):
            other.fill(rows)
        with pytest.raises(ValueError, match="another .* folder of its own"):
            other("a")
    with pytest.raises(ValueError, match="nothing of Whisper.* is frozen"):
        EncoderCache(WhisperAcousticEncoder(whisper, 12, None), "x").fill(rows)
    with pytest.raises(ValueError, match="nothing of Linear is frozen"):
        EncoderCache(torch.nn.Linear(1, 1), "x").fill(rows)
    with pytest.raises(ValueError, match="expected float16, bfloat16"):
        EncoderCache(encoder, "x", dtype="float8")


def test_another_recording_is_noticed(rows, whisper, tmp_path):
    cache = EncoderCache(WhisperAcousticEncoder(whisper, 12), tmp_path / "c")
    cache.fill(rows)
    row = rows["a"]
    before = read(cache, "a", row)
    # Copied: another time, the same content.
    shutil.copyfile(row["wav"], tmp_path / "copy.wav")
    copied = {**row, "wav": str(tmp_path / "copy.wav")}
    assert torch.equal(read(cache, "a", copied), before)
    assert cache.fill({"a": copied}) == 0
    # Written anew, of the same size.
    write_audio(row["wav"], 0.1 * torch.randn(4801), 16000)
    for name in ("a", "part"):
        with pytest.raises(ValueError, match=f"'{name}': .*has changed since"):
            read(cache, name, rows[name])
    assert cache("a") is not None, "without the recording nothing is checked"
    assert cache.fill(rows) == 2
    assert not torch.equal(read(cache, "a", row), before)
    # Another part of it.
    moved = {**rows["part"], "start": "0.05"}
    with pytest.raises(ValueError, match="has changed since"):
        read(cache, "part", moved)
    assert cache.fill({"part": moved}) == 1


def test_bad_files_and_rows(rows, whisper, tmp_path):
    cache = EncoderCache(WhisperAcousticEncoder(whisper, 12), tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="'a' is not in .* call fill"):
        cache("a")
    cache.fill(rows)
    path = tmp_path / "c" / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"a\.safetensors: damaged"):
        cache("a")
    assert cache.fill(rows) == 1 and cache("a").isfinite().all()
    # All of it is readable, none of it is under a half-written name.
    assert len(list((tmp_path / "c").iterdir())) == len(rows)
    wav = str(tmp_path / "x.wav")
    with pytest.raises(FileNotFoundError, match="x.wav: no such recording"):
        cache.fill({"x": {"wav": wav}})
    with pytest.raises(ValueError, match="has sig, expected wav"):
        cache.fill({"x": {"sig": wav}})
    write_audio(wav, torch.randn(8000), 8000)
    with pytest.raises(ValueError, match=r"x\.wav: .*8000 Hz, expected 16000"):
        cache.fill({"x": {"wav": wav}})
    other = EncoderCache(cache.encoder, tmp_path / "c", resample=True)
    with pytest.raises(ValueError, match="has 1.00 s, nothing is left"):
        other.fill({"x": {"wav": wav, "start": "2", "duration": "1"}})
    assert other.fill({"x": {"wav": wav}}) == 1 and len(other("x")) == 50
    write_audio(wav, torch.randn(16800), 16000)
    with pytest.raises(ValueError, match="utterance 'x' has 1.05 s.* window"):
        cache.fill({"x": {"wav": wav}})
    with torch.no_grad():
        cache.encoder.encoder.layer_norm.weight.fill_(1e6)
    huge = EncoderCache(cache.encoder, tmp_path / "huge")
    with pytest.raises(ValueError, match="'a': .* beyond torch.float16; give"):
        huge.fill({"a": rows["a"]})
    assert EncoderCache(cache.encoder, tmp_path / "huge", "bfloat16").fill(rows)


def test_workers_of_a_data_loader_read_it(rows, whisper, tmp_path):
    cache = EncoderCache(WhisperAcousticEncoder(whisper, 12), tmp_path / "c")
    cache.fill(rows)
    sent = pickle.dumps(cache)
    assert len(sent) < 3000, "without the encoder"
    assert torch.equal(pickle.loads(sent)("part"), cache("part"))
    pickle.loads(sent)._check_encoder("x", {"encoder": cache._known()[0]})


def test_moved_to_a_device_it_is_the_same_encoder():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    before = [(7, 0, torch.float32, cpu, 100)]
    for now, other in (
        (before, False),
        # A worker must not read there what was read here.
        ([(7, 0, torch.float32, cuda, 200)], False),
        ([(7, 1, torch.float32, cuda, 200)], True),
        ([(7, 0, torch.float16, cuda, 200)], True),
        ([(8, 0, torch.float32, cuda, 200)], True),
        ([(7, 0, torch.float32, cpu, 200)], True),
        ([], True),
    ):
        assert _changed(before, now) == other, now
    assert _changed(None, before)


def test_a_warm_up_does_not_move_where_cached_outputs_enter(
    rows, whisper, tmp_path
):
    encoder = WhisperAcousticEncoder(whisper, 8, 1)
    cache = EncoderCache(encoder, tmp_path / "cache")
    cache.fill(rows)
    identity = cache._known()
    model = SpeechTranslationModel(
        encoder,
        TextEncoder(8, 2, num_layers=1),
        TranslationDecoder(4, 8, 2, num_layers=1),
        source_vocab=3,
    )
    labels = WordLabels(["<s>", "</s>", "hi"])
    weights = TaskNormWeights(interval=9, warm_up=2)
    brain = TranslationBrain(
        {"model": model},
        opt_class=partial(torch.optim.SGD, lr=0.01),
        hparams={
            "main": "st",
            "objective": TranslationObjective(blank_index=0),
            "task_weights": weights,
            "warm_up_frozen": ["acoustic.encoder"],
            "source_labels": labels,
            "target_labels": labels,
            **{"bos_index": 1, "eos_index": 2, "greedy_tokens": 2, "seed": 0},
        },
        run_opts={"device": "cpu", "noprogressbar": True},
    )
    one = {
        "id": "a",
        "source": torch.tensor([1, 2]),
        "target_bos": torch.tensor([1, 3]),
        "target_eos": torch.tensor([3, 2]),
        **{"wrd": "x", "translation": "hi"},
    }
    seen = []
    trained = encoder.encoder.layers[-1]
    trained.register_forward_hook(lambda *_: seen.append(weights.updates))
    before = [p.clone() for p in trained.parameters()]

    class Cached(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, place):
            return one | {"sig": read(cache, "a", rows["a"]).float()}

    for epoch in (1, 2):
        brain.fit(
            [epoch],
            torch.utils.data.DataLoader(Cached(), collate_fn=PaddedBatch),
        )
        held = all(map(torch.equal, trained.parameters(), before))
        assert held == (epoch == 1)
    assert seen == [0, 1, 2, 3] and cache._known() == identity


KILLED = """
import sys, torch
from pathlib import Path
from speechbrain_taskarith.translation import *
folder, audio = map(Path, sys.argv[1:])
encoder = WhisperAcousticEncoder(folder / "whisper", 12)
rows = {f"u{i}": {"wav": str(audio)} for i in range(2000)}
print("begin", flush=True)
EncoderCache(encoder, folder / "cache", batch_size=1).fill(rows)
"""


def test_a_killed_run_goes_on(rows, whisper, tmp_path):
    audio = rows["a"]["wav"]
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), audio],
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    deadline = time.time() + 60
    while time.time() < deadline and len(list(folder.glob("u*"))) < 20:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    whole = {path.stem for path in folder.glob("u*.safetensors")}
    assert 20 <= len(whole) < 2000
    encoder = WhisperAcousticEncoder(whisper, 12)
    cache = EncoderCache(encoder, folder)
    count = len(whole) + 5
    names = [*whole, *(f"u{i}" for i in range(2000) if f"u{i}" not in whole)]
    assert cache.fill({name: {"wav": audio} for name in names[:count]}) == 5
    alone = encoder.frozen(read_audio(audio, 16000)[None], torch.ones(1))[0]
    for name in names[:count]:
        torch.testing.assert_close(
            cache(name, audio).float(), alone[0], atol=1e-2, rtol=1e-2
        )
    left = [
        p.name for p in folder.iterdir() if Path(p).suffix != ".safetensors"
    ]
    assert left == [], "what the killed run left is swept"
