"""Folders of adapters, and what of them the hub gives back."""

import copy
import json

import huggingface_hub
import pytest
import safetensors
import torch
from adapters_toy import ToyEncoder, scramble
from hub_server import TOKEN
from safetensors.torch import save_file

from speechbrain_taskarith.adapters import (
    AdapterHandle,
    AudioAdapterFusion,
    insert_adapters,
    load_adapters,
)

NAMES = ["us", "en/de. x"]


def bare():
    torch.manual_seed(0)  # one base
    return ToyEncoder().eval()


def make(seed=1, **others):
    encoder = bare()
    arguments = {"bottleneck": 4, "combination": "fusion", **others}
    handle = insert_adapters(encoder, NAMES, **arguments)
    handle.add_adapter("wide", bottleneck=9)
    scramble(handle, seed=seed)
    return encoder, handle


def output(encoder, handle, choice):
    handle.use(choice)
    with torch.no_grad():
        return encoder(torch.randn(2, 5, 4, generator=torch.manual_seed(7)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"combination": None},
        {"combination": "weighted_mean"},
        {"combination": AudioAdapterFusion(attention_dim=3, scaled=True)},
        {"activation": torch.nn.ReLU, "layer_norm": False, "d_model": 8},
    ],
)
def test_a_folder_gives_a_bare_encoder_all_it_had(tmp_path, settings):
    encoder, handle = make(**settings)
    assert handle.save(tmp_path / "shared") == tmp_path / "shared"
    other_encoder = bare()
    other = AdapterHandle.from_pretrained(other_encoder, tmp_path / "shared")
    assert other.names == handle.names == [*NAMES, "wide"]
    assert other.in_use is None
    choices = [None, *handle.names]
    if handle.combined_names:
        assert other.combined_names == handle.combined_names == NAMES
        choices.append("combined")
    for choice in choices:
        wanted = output(encoder, handle, choice)
        assert torch.equal(output(other_encoder, other, choice), wanted)
    # It goes on as one that was inserted: it trains, and is saved again.
    parameters = other.train_extraction("wide")
    other_encoder(torch.randn(2, 5, 4)).sum().backward()
    assert all(p.grad is not None for p in parameters)
    other.save(tmp_path / "again")


def test_the_hub_gives_back_what_was_pushed_and_only_that(hub):
    encoder, handle = make()
    address = handle.push_to_hub(
        "me/adapters", base_model="openai/whisper-tiny", license="mit",
        language=["en", "de"], token=TOKEN,
    )  # fmt: skip
    assert address == f"{hub.endpoint}/me/adapters"
    files = hub.repositories["me/adapters"]
    files["modeling.py"] = files["adapter_model.bin"] = b"raise SystemExit"
    other_encoder = bare()
    other = AdapterHandle.from_pretrained(other_encoder, "me/adapters")
    for choice in (*handle.names, "combined"):
        wanted = output(encoder, handle, choice)
        assert torch.equal(output(other_encoder, other, choice), wanted)
    assert all(name.endswith(".safetensors") for name in hub.downloaded)
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.base_model == "openai/whisper-tiny"
    assert card.data.base_model_relation == "adapter"
    assert card.data.language == ["en", "de"] and card.data.license == "mit"
    assert "| us | 4 |" in card.text


def test_an_adapter_that_was_removed_is_gone_from_the_folder(tmp_path):
    encoder, handle = make()
    handle.save(tmp_path / "shared")
    handle.remove_adapter("wide")
    handle.save(tmp_path / "shared")
    other = AdapterHandle.from_pretrained(bare(), tmp_path / "shared")
    assert set(other.names) == set(NAMES)


def test_what_else_lies_in_a_folder_is_kept(tmp_path):
    _, handle = make()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        handle.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_save_leaves_the_earlier_folder(tmp_path):
    encoder, handle = make()
    handle.save(tmp_path / "shared")
    before = {p.name: p.read_bytes() for p in (tmp_path / "shared").iterdir()}
    with torch.no_grad():
        next(handle.layers[1].bank["wide"].parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        handle.save(tmp_path / "shared")
    after = {p.name: p.read_bytes() for p in (tmp_path / "shared").iterdir()}
    assert after == before
    assert [p.name for p in tmp_path.iterdir()] == ["shared"]


def untouched(encoder):
    """Tell whether an encoder is as `bare` gives it."""
    wanted = bare().state_dict()
    found = encoder.state_dict()
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], wanted[name]) for name in wanted
    )


def test_another_base_is_refused_and_the_encoder_stays_bare(tmp_path):
    _, handle = make()
    handle.save(tmp_path / "shared")
    other = bare()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="trained on another base"):
        AdapterHandle.from_pretrained(other, tmp_path / "shared")
    assert other.state_dict().keys() == before.keys()
    again = AdapterHandle.from_pretrained(
        other, tmp_path / "shared", any_base=True
    )
    assert set(again.names) == set(handle.names)


def test_an_encoder_with_other_layers_or_adapters_is_refused(tmp_path):
    encoder, handle = make()
    handle.save(tmp_path / "shared")
    with pytest.raises(ValueError, match="has adapters already"):
        AdapterHandle.from_pretrained(encoder, tmp_path / "shared")
    with pytest.raises(ValueError, match="shared: made for another encoder"):
        AdapterHandle.from_pretrained(
            torch.nn.Sequential(torch.nn.Linear(4, 8)), tmp_path / "shared"
        )


def test_frozen_modules_beside_the_encoder_are_held_against_the_files(tmp_path):
    front = torch.nn.Linear(4, 4)
    encoder = bare()
    handle = insert_adapters(encoder, ["us"], freeze={"front": front})
    handle.save(tmp_path / "shared")
    with pytest.raises(ValueError, match="beside another front"):
        AdapterHandle.from_pretrained(
            bare(), tmp_path / "shared", freeze={"front": torch.nn.Linear(4, 4)}
        )
    found = AdapterHandle.from_pretrained(
        bare(), tmp_path / "shared", freeze={"front": front}
    )
    assert found.frozen_fingerprints() == handle.frozen_fingerprints()


@pytest.mark.parametrize("what", ["empty", "cut", "foreign", "activation"])
def test_a_folder_that_cannot_be_used_is_refused_by_name(tmp_path, what):
    folder, encoder = tmp_path / "shared", bare()
    _, handle = make(activation=torch.nn.SiLU)
    handle.save(folder)
    file = folder / "us.safetensors"
    if what == "empty":
        for path in folder.iterdir():
            path.unlink()
        error, match = FileNotFoundError, "shared: holds no adapters"
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-3])
        error, match = ValueError, r"us\.safetensors: not a whole"
    elif what == "foreign":
        save_file({"down.weight": torch.ones(2, 2)}, folder / "x.safetensors")
        error, match = ValueError, r"x\.safetensors: holds no adapter"
    else:
        _, handle = make(activation=lambda: torch.nn.LeakyReLU(0.3))
        handle.save(folder)
        error, match = ValueError, r"LeakyReLU\(negative_slope=0.3\)"
    with pytest.raises(error, match=match):
        AdapterHandle.from_pretrained(encoder, folder)
    assert untouched(encoder)


def test_the_files_say_all_that_is_needed(tmp_path):
    """The card is for readers: without it the folder loads as well."""
    _, handle = make()
    handle.save(tmp_path / "shared")
    (tmp_path / "shared" / "README.md").unlink()
    AdapterHandle.from_pretrained(bare(), tmp_path / "shared")
    # And each file is one that load_adapter takes.
    path = tmp_path / "shared" / "us.safetensors"
    with safetensors.safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["speechbrain_taskarith"])
    assert header["name"] == "us"


@pytest.mark.parametrize("kind", [torch.nn.GELU, torch.nn.LeakyReLU])
def test_activations_with_default_arguments_are_found(tmp_path, kind):
    _, handle = make(activation=kind)
    handle.save(tmp_path / "shared")
    other = load_adapters(bare(), tmp_path / "shared")
    assert repr(other.layers[0].bank.activation) == repr(kind())
    _, handle = make(activation=lambda: torch.nn.LeakyReLU(0.3))
    handle.save(tmp_path / "shared")
    with pytest.raises(ValueError, match="negative_slope=0.3.*none of"):
        load_adapters(bare(), tmp_path / "shared")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_adapters_in_half_precision_fit_the_half_base(tmp_path, half):
    encoder, handle = make()
    encoder.to(half)
    handle.save(tmp_path / "shared")
    other = load_adapters(bare().to(half), tmp_path / "shared")
    for (name, mine), theirs in zip(
        handle.named_parameters(), other.parameters()
    ):
        assert theirs.dtype == torch.float32, name
        assert torch.equal(mine.float(), theirs), name


def test_one_file_is_loaded_into_a_bare_encoder(tmp_path):
    encoder, handle = make()
    handle.save_adapter("wide", tmp_path / "w.safetensors")
    other = bare()
    loaded = load_adapters(other, tmp_path / "w.safetensors")
    assert tuple(loaded.names) == ("wide",)
    assert torch.equal(
        output(other, loaded, "wide"), output(encoder, handle, "wide")
    )


def test_load_adapters_takes_a_folder_and_refuses_the_rest(tmp_path):
    encoder, handle = make()
    handle.save(tmp_path / "all")
    other = bare()
    loaded = load_adapters(other, tmp_path / "all")
    assert torch.equal(
        output(other, loaded, "combined"), output(encoder, handle, "combined")
    )
    with pytest.raises(ValueError, match="adapters"):
        load_adapters(other, tmp_path / "all")  # has some
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_adapters(bare(), tmp_path / "none")
    handle.save_combination(tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError, match="no adapters"):
        load_adapters(bare(), tmp_path / "c.safetensors")
    with torch.no_grad():
        another = bare()
        next(another.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="base"):
        load_adapters(another, tmp_path / "all")
    assert load_adapters(another, tmp_path / "all", any_base=True).names
