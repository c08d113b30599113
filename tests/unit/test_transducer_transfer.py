"""Encoder-only transfer: what is taken over, and what is refused."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from speechbrain_taskarith.transducer import (
    Emformer,
    LSTMPredictor,
    RNNTJoint,
    transfer_encoder,
)


def parts(seed, vocab=9):
    torch.manual_seed(seed)
    return torch.nn.ModuleDict(
        {
            "encoder": Emformer(8, 2, 16, 11, 4, 1, 8),
            "predictor": LSTMPredictor(vocab, 4, 5),
            "joint": RNNTJoint(8, 5, 8, vocab),
        }
    )


def same(one, other):
    return {
        name
        for name, tensor in one.state_dict().items()
        if torch.equal(tensor, other.state_dict()[name])
    }


FORMS = ["file", "folder", "save", "safetensors", "dict", "nested"]


@pytest.mark.parametrize("form", FORMS)
def test_encoder_alone_is_taken_over(form, tmp_path):
    there, here = parts(0, vocab=30), parts(1)
    state = there.state_dict()
    before = {k: v.clone() for k, v in here["joint"].state_dict().items()}
    if form == "dict":
        source = state
    elif form == "safetensors":
        source = tmp_path / "model.safetensors"
        save_file(state, source)
    elif form == "nested":
        source = tmp_path / "model.pt"
        torch.save({"state_dict": state, "epoch": 3}, source)
    elif form == "file":
        source = tmp_path / "model.ckpt"
        torch.save(state, source)
    else:
        from speechbrain.utils.checkpoints import Checkpointer

        saver = Checkpointer(tmp_path / "save", {"model": parts(5, vocab=30)})
        saver.save_checkpoint(meta={"WER": 9.0})
        saver = Checkpointer(tmp_path / "save", {"model": there})
        saver.save_checkpoint(meta={"WER": 5.0})
        # One that a killed process has left: newer, and not whole.
        (tmp_path / "save" / "CKPT+9999-01-01+00-00-00+00").mkdir()
        source = tmp_path / "save"
        if form == "folder":
            source = saver.find_checkpoint().path
    report = transfer_encoder(source, here["encoder"], prefix="encoder.")
    assert len(report.loaded) == len(here["encoder"].state_dict())
    assert same(there["encoder"], here["encoder"]) == set(report.loaded)
    for name, tensor in here["joint"].state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("layers", [[1], range(2, 5), [0, 10]])
def test_layer_ranges(layers):
    there, here = parts(0), parts(1)
    report = transfer_encoder(
        there.state_dict(), here["encoder"], prefix="encoder.", layers=layers
    )
    numbers = {int(name.split(".")[1]) for name in report.loaded}
    assert numbers == set(layers)
    left = set(here["encoder"].state_dict()) - set(report.loaded)
    assert set(report.left) == left
    changed = {
        name
        for name in same(there["encoder"], here["encoder"])
        # Biases of 0 and norms of 1 are equal from the beginning.
        if name.endswith("query.weight")
    }
    assert {int(name.split(".")[1]) for name in changed} == set(layers)


def test_patterns():
    there, here = parts(0), parts(1)
    report = transfer_encoder(
        there.state_dict(),
        here["encoder"],
        prefix="encoder.",
        include="layers.*.query.*",
        exclude="layers.1.*",
    )
    assert "layers.10.query.weight" in report.loaded
    assert "layers.1.query.weight" in report.left
    with pytest.raises(ValueError, match="matches no"):
        transfer_encoder(
            there.state_dict(), here["encoder"], prefix="encoder.", include="x*"
        )


def broken(change):
    state = parts(0).state_dict()
    if change == "missing":
        del state["encoder.layers.3.query.weight"]
    elif change == "unexpected":
        state["encoder.layers.11.query.weight"] = torch.zeros(8, 8)
    else:
        state["encoder.layers.3.query.weight"] = torch.zeros(8, 9)
    return state


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_strict_faults_load_nothing(change):
    here = parts(1)["encoder"]
    before = {k: v.clone() for k, v in here.state_dict().items()}
    with pytest.raises(ValueError, match=r"query.weight.*Nothing was loaded"):
        transfer_encoder(broken(change), here, prefix="encoder.")
    for name, tensor in here.state_dict().items():
        assert torch.equal(tensor, before[name])
    report = transfer_encoder(
        broken(change), here, prefix="encoder.", strict=False
    )
    assert len(getattr(report, change)) == 1
    assert "1 " in str(report)


class Code:
    def __reduce__(self):
        return print, ("executed",)


def test_bad_files(tmp_path, capsys):
    here = parts(1)["encoder"]
    code, cut, other = (tmp_path / n for n in ("a.ckpt", "b.ckpt", "c.pt"))
    code.write_bytes(pickle.dumps({"w": Code()}, protocol=2))
    torch.save(parts(0).state_dict(), cut)
    cut.write_bytes(cut.read_bytes()[:5000])
    torch.save([1, 2], other)
    wrong = tmp_path / "d.safetensors"
    wrong.write_bytes(b"nothing of the kind")
    for path in (code, cut, other, wrong):
        with pytest.raises(ValueError, match=path.name):
            transfer_encoder(path, here)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        transfer_encoder(tmp_path / "none", here)
    with pytest.raises(FileNotFoundError, match="no model.ckpt"):
        transfer_encoder(tmp_path, here)
    with pytest.raises(ValueError, match="no name begins with 'enc.'"):
        transfer_encoder(parts(0).state_dict(), here, prefix="enc.")
    with pytest.raises(ValueError, match=r"layers \[11, 12\]"):
        transfer_encoder(
            parts(0).state_dict(), here, prefix="encoder.", layers=range(10, 13)
        )
