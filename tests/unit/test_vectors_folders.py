"""SpeechBrain folders: which recoverable is meant, and odd files in them."""

import warnings

import pytest
import torch
from cli_support import fails, run
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.nnet.schedulers import NoamScheduler
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_taskarith.vectors import open_state


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


def test_a_folder_without_a_network(tmp_path, capsys):
    save(tmp_path / "a")
    text = fails(
        capsys, "vector", str(tmp_path / "a"), "b", "-o", "t.safetensors"
    )
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
