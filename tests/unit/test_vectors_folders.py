"""SpeechBrain folders: which recoverable is meant, and odd files in them."""

import random
import warnings

import pytest
import torch
from cli_support import fails, run
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.nnet.schedulers import NoamScheduler
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_taskarith.vectors import (
    find_checkpoint_folder,
    open_state,
    save_checkpoint,
    save_state,
)


def save(folder, **networks):
    """A checkpoint as a recipe's Checkpointer writes it."""
    counter = EpochCounter(limit=3)
    for _ in zip(range(2), counter):
        pass
    network = torch.nn.Linear(2, 2)
    recoverables = {
        "counter": counter,  # a file with the text "2"
        "scheduler": NoamScheduler(1e-3, 10),
        "optimizer": torch.optim.Adam(network.parameters()),
        "tokenizer": CTCTextEncoder(),
        "normalizer": InputNormalization(),
        **networks,
    }
    Checkpointer(folder, recoverables).save_checkpoint()
    return folder


def test_the_only_network_is_found_among_files_of_every_kind(tmp_path):
    network = torch.nn.Linear(3, 2)
    save(tmp_path, whisper=network)
    assert torch.equal(open_state(tmp_path)["weight"], network.weight)


def test_a_kept_fine_tuned_copy_is_not_another_network(tmp_path):
    network = torch.nn.Linear(3, 2)
    save(tmp_path, whisper=network)
    [folder] = tmp_path.glob("CKPT+*")
    torch.save(network.state_dict(), folder / "whisper.finetuned.ckpt")
    assert len(open_state(tmp_path)) == 2


def test_several_networks_have_to_be_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run_ in ("a", "b"):
        save(
            tmp_path / run_,
            ctc=torch.nn.Linear(3, 2),
            enc=torch.nn.Linear(9, 9),
        )
    text = fails(capsys, "vector", "a", "b", "-o", "tau.safetensors")
    for part in ("ctc (8 parameters)", "enc (90 parameters)", "--recoverable"):
        assert part in text
    assert not (tmp_path / "tau.safetensors").exists()
    run("vector", "a", "b", "-o", "tau.safetensors", "--recoverable", "enc")
    assert (tmp_path / "tau.safetensors").exists()


def test_a_folder_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a")
    text = fails(capsys, "vector", "a", "b", "-o", "t.safetensors")
    assert "there are: none" in text


def test_model_beside_other_networks_says_what_it_leaves_out(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    head = torch.nn.Linear(3, 2)
    for run_ in ("a", "b"):
        save(tmp_path / run_, model=head, wav2vec2=torch.nn.Linear(30, 30))
    with pytest.warns(UserWarning, match=r"left out: wav2vec2 \(930 param"):
        assert torch.equal(open_state("a")["weight"], head.weight)
    run("vector", "a", "b", "-o", "tau.safetensors")
    out = capsys.readouterr()
    assert "left out: wav2vec2 (930 parameters)" in out.err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_state("a", recoverable="model")
        open_state("a", recoverable="wav2vec2")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"2",
        b"2\n",
        b"a",
        b".",
        b"0",
        b"PK\x03\x04",
        b"\x80\x02.",
        b"\xff" * 9,
    ]
    + [b"l.", b"]q.", b"(", b"e", b"u", b"\x94h\x00.", b"I1\n.", "ä".encode()],
)
def test_any_bytes_are_refused_in_one_way(tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.ckpt"):
        open_state(path)


def damage(data, seed):
    """Cut, change or take out bytes: where headers and names are."""
    generator = random.Random(seed)
    data = bytearray(data)
    place = generator.randrange(min(len(data), 400))
    kind = seed % 4
    if kind == 0:
        return data[:place]
    if kind == 1:
        data[place] = generator.randrange(256)
    elif kind == 2:
        data[-place - 1] = generator.randrange(256)
    else:
        del data[place : place + generator.randrange(1, 9)]
    return data


@pytest.mark.parametrize("form", ["zip.ckpt", "legacy.ckpt", "a.safetensors"])
def test_damaged_files_are_refused_or_whole(tmp_path, form):
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    path = tmp_path / form
    if path.suffix == ".ckpt":
        new = form.startswith("zip")
        weights = network.state_dict()
        torch.save(weights, path, _use_new_zipfile_serialization=new)
    else:
        save_state(network, path)
    data = path.read_bytes()
    refused = 0
    for seed in range(120):
        path.write_bytes(damage(data, seed))
        try:
            state = open_state(path)
            state.verify()
            assert state.fingerprint
        except ValueError as error:
            refused += 1
            assert form in str(error)
    assert refused > 40


@pytest.mark.parametrize("new", [True, False])
def test_a_view_that_claims_to_be_endless(tmp_path, new):
    path = tmp_path / "views.pt"
    content = {"a": torch.ones(1).expand(5), "b": torch.ones(1).expand(1 << 32)}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match="b claims the shape"):
        open_state(path)
    torch.save({"a": content["a"]}, path, _use_new_zipfile_serialization=new)
    assert open_state(path)["a"].tolist() == [1.0] * 5


@pytest.mark.parametrize(
    "index",
    ["[]", "3", "null", "{", '{"weight_map": []}']
    + [
        f'{{"weight_map": {{"a": {file}}}}}'
        for file in ("3", "null", '["b"]', '""', '"."', '"../x"', '"/etc/x"')
    ],
)
def test_a_bad_index_of_shards(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        open_state(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["unixtime: abc", "unixtime: [1]", "unixtime: 2020-01-01", "WER: low"]
    + ["taskarith: {files: 3}", "taskarith: {files: [3]}", "[1]", "3", ": :"]
    + ["a: !!python/object:os.system x"],
)
def test_a_bad_ckpt_yaml(tmp_path, content):
    for name, text in (("1", content), ("2", "unixtime: 1.0\nWER: 2.0")):
        folder = tmp_path / f"CKPT+{name}"
        folder.mkdir()
        (folder / "CKPT.yaml").write_text(text)
        torch.save({"w": torch.ones(1)}, folder / "model.ckpt")
    with pytest.raises(ValueError, match=r"CKPT\+1/CKPT.yaml"):
        find_checkpoint_folder(tmp_path, min_key="WER")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_score_that_is_no_number_is_no_score(tmp_path, at):
    scores = [5.0, 4.0]
    scores.insert(at, float("nan"))
    for number, score in enumerate(scores):
        save_checkpoint(
            {"model": {"w": torch.ones(1)}},
            tmp_path / f"CKPT+{number}",
            meta={"WER": score, "loss": float("nan")},
        )
    for key, best in (("min_key", 4.0), ("max_key", 5.0)):
        found = find_checkpoint_folder(tmp_path, **{key: "WER"})
        assert found.name == f"CKPT+{scores.index(best)}"
    with pytest.raises(FileNotFoundError, match="'loss'"):
        find_checkpoint_folder(tmp_path, min_key="loss")
