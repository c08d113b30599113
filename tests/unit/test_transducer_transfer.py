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
    found = other.state_dict()
    return {
        name
        for name, tensor in one.state_dict().items()
        if name in found
        and isinstance(tensor, torch.Tensor)
        and torch.equal(tensor, found[name])
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


class _Counting(torch.nn.Linear):
    """A layer with a state that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        raise AssertionError(state)


@pytest.mark.parametrize("form", ["dict", "file"])
def test_an_extra_state_stays_as_it_is(form, tmp_path):
    there, here = _Counting(3, 2), _Counting(3, 2)
    source = there.state_dict(prefix="encoder.")
    if form == "file":
        torch.save(source, tmp_path / "model.ckpt")
        source = tmp_path / "model.ckpt"
    report = transfer_encoder(source, here, prefix="encoder.")
    assert set(report.loaded) == same(there, here) == {"weight", "bias"}
    assert report.left == ("_extra_state",) and not report.missing


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


class Deep(torch.nn.Module):
    """A front end and a projection with numbers of their own."""

    def __init__(self, layers):
        super().__init__()
        self.conv_layers = torch.nn.ModuleList(
            torch.nn.Linear(2, 2) for _ in range(4)
        )
        self.encoder = Emformer(8, 2, 16, layers, 4, 1, 8)
        self.projection = torch.nn.Sequential(torch.nn.Linear(8, 8))


def test_layers_are_those_of_the_encoder_alone():
    there, here = Deep(3), Deep(3)
    report = transfer_encoder(there.state_dict(), here, layers=[0, 2])
    assert {tuple(name.split(".")[:3]) for name in report.loaded} == {
        ("encoder", "layers", "0"),
        ("encoder", "layers", "2"),
    }
    assert {"conv_layers.0.weight", "projection.0.weight"} <= set(report.left)
    with pytest.raises(ValueError, match=r"layers \[3\]: the encoder has"):
        transfer_encoder(there.state_dict(), here, layers=[3])


def test_one_layer_is_not_mistaken_for_what_is_in_it():
    there, here = (Emformer(8, 2, 16, 1, 4, 1, 8) for _ in range(2))
    report = transfer_encoder(there.state_dict(), here, layers=[0])
    assert set(report.loaded) == set(here.state_dict())


def test_lower_layers_of_a_deeper_model():
    there, here = Emformer(8, 2, 16, 4, 4, 1, 8), Emformer(8, 2, 16, 2, 4, 1, 8)
    state = there.state_dict()
    with pytest.raises(ValueError, match="only there"):
        transfer_encoder(state, here)
    assert transfer_encoder(state, here, layers=[0, 1]).unexpected == ()
    assert same(there, here) == set(here.state_dict())
    report = transfer_encoder(state, here, include="layers.0.*")
    assert len(report.loaded) == len(report.left) and not report.unexpected


def test_weights_of_torchaudio_recognise_alike():
    models = pytest.importorskip("torchaudio.models")
    torch.manual_seed(0)
    options = {"right_context_length": 1, "left_context_length": 8}
    there = models.Emformer(8, 2, 16, 3, 4, activation="gelu", **options).eval()
    state = {f"transformer.{k}": v for k, v in there.state_dict().items()}
    here = Emformer(8, 2, 16, 3, 4, 1, 8).eval()
    report = transfer_encoder(
        state, here, prefix="transformer.", rename="torchaudio-emformer"
    )
    assert len(report.loaded) == len(state)
    x = torch.randn(2, 13, 8)
    # Torchaudio's input ends with a right context that gives no output.
    expected, _ = there(x, torch.tensor([12, 12]))
    with torch.no_grad():
        found = here(x)
    torch.testing.assert_close(found[:, :8], expected[:, :8])


def test_renaming_by_patterns_and_its_faults():
    there, here = Emformer(8, 2, 16, 1, 4, 1, 8), Emformer(8, 2, 16, 1, 4, 1, 8)
    state = {
        k.replace("layers", "blocks"): v for k, v in there.state_dict().items()
    }
    transfer_encoder(state, here, rename={"blocks.*": "layers.*"})
    assert same(there, here) == set(here.state_dict())
    with pytest.raises(ValueError, match="'torchaudio-emformer'"):
        transfer_encoder(state, here, rename="kaldi")
    with pytest.raises(ValueError, match="matches no"):
        transfer_encoder(state, here, rename={"layer.*": "layers.*"})
