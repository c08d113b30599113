"""Adapter files: what is saved comes back, what is damaged does not."""

import copy
import json
import os

import pytest
import safetensors
import torch
from adapters_toy import ToyEncoder, scramble
from safetensors.torch import save_file
from speechbrain.processing.features import InputNormalization

from speechbrain_taskarith.adapters import (
    AdapterMean,
    AudioAdapterFusion,
    checks,
    insert_adapters,
)

NAMES = ["us", "german"]
SETTINGS = AudioAdapterFusion().settings()


def make(seed=0, names=NAMES, combination="fusion", **others):
    torch.manual_seed(0)  # one base
    encoder = ToyEncoder().eval()
    handle = insert_adapters(
        encoder, names, bottleneck=4, combination=combination, **others
    )
    scramble(handle, seed=seed)
    return encoder, handle


def output(encoder, handle, choice):
    handle.use(choice)
    with torch.no_grad():
        return encoder(torch.randn(2, 5, 4, generator=torch.manual_seed(7)))


def state_of(handle):
    return {name: t.clone() for name, t in handle.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("name", [None, "german", "new", "en.us"])
def test_an_adapter_goes_into_another_copy_of_the_base(tmp_path, name):
    encoder, handle = make(1)
    path = tmp_path / "us.safetensors"
    handle.save_adapter("us", path)
    other_encoder, other = make(2)
    before = state_of(other)
    other.load_adapter(path, name)
    into = name or "us"
    expected = output(encoder, handle, "us")
    assert torch.equal(output(other_encoder, other, into), expected)
    key = "adapter_" + into.replace(".", "%2E") + "."
    for old, tensor in before.items():
        if key not in old:
            assert torch.equal(other.state_dict()[old], tensor), old
    new = [p for n, p in other.named_parameters() if key in n]
    assert new and not any(p.requires_grad for p in new)


def test_an_adapter_of_another_width_of_bottleneck(tmp_path):
    encoder, handle = make(1)
    handle.add_adapter("wide", bottleneck=9)
    scramble(handle, seed=3)
    handle.save_adapter("wide", tmp_path / "a.safetensors")
    for name in ("wide", "us"):
        other_encoder, other = make(2)
        output(other_encoder, other, "combined")
        other.load_adapter(tmp_path / "a.safetensors", name)
        expected = output(encoder, handle, "wide")
        assert torch.equal(output(other_encoder, other, name), expected)
    # The folded weights of the one that was replaced are no longer used.
    other.layers[0].combination.form = "loop"
    loop = output(other_encoder, other, "combined")
    other.layers[0].combination.form = "auto"
    torch.testing.assert_close(output(other_encoder, other, "combined"), loop)


def test_a_file_says_where_it_belongs(tmp_path):
    _, handle = make()
    handle.save_adapter("us", tmp_path / "us.safetensors")
    with safetensors.safe_open(tmp_path / "us.safetensors", "pt") as file:
        about = json.loads(file.metadata()["speechbrain_taskarith"])
    assert about["base"] == handle.base_fingerprint()
    assert about["layers"] == handle.layer_names
    assert (about["name"], about["bottleneck"]) == ("us", 4)
    assert [p.name for p in tmp_path.iterdir()] == ["us.safetensors"]


def test_the_fingerprint_is_the_bases(tmp_path):
    encoder, handle = make(1)
    first = handle.base_fingerprint()
    assert make(2, ["x"], None)[1].base_fingerprint() == first
    scramble(handle, seed=9)
    encoder.train()
    assert handle.base_fingerprint() == first
    with torch.no_grad():
        encoder.front.bias[0] += 1e-6
    assert handle.base_fingerprint() != first


def test_statistics_inside_the_base_count(tmp_path):
    """InputNormalization has them as attributes, not in its state dict."""

    def normalised(mean, kind="global"):
        encoder, handle = make(1)
        encoder.normalize = InputNormalization(norm_type=kind)
        encoder.normalize(torch.randn(2, 30, 4) + mean, torch.ones(2))
        return encoder, handle

    _, handle = normalised(0.0)
    path = tmp_path / "us.safetensors"
    handle.save_adapter("us", path)
    handle.load_adapter(path)
    with pytest.raises(ValueError, match="trained on another base"):
        normalised(5.0)[1].load_adapter(path)
    # Without any, files of earlier versions stay valid.
    encoder, handle = normalised(0.0, "sentence")
    state = encoder.state_dict().items()
    plain = {n: t for n, t in state if "task_adapters" not in n}
    assert handle.base_fingerprint() == checks.fingerprint(plain)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
def test_quantised_weights_of_the_base_count():
    def quantised(seed):
        torch.manual_seed(seed)
        layer = torch.nn.Sequential(
            torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
        )
        layer = torch.ao.quantization.quantize_dynamic(
            layer, {torch.nn.Linear}, torch.qint8
        )
        encoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
        return insert_adapters(encoder, NAMES, bottleneck=4)

    first, again, other = (
        quantised(seed).base_fingerprint() for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("combination", ["mean", "weighted_mean", "fusion"])
def test_a_combination_is_saved_with_its_names(tmp_path, combination):
    encoder, handle = make(1, ["us", "german", "indian"], None)
    handle.set_combination(combination, names=["indian", "us"])
    scramble(handle, seed=5)
    path = tmp_path / "c.safetensors"
    handle.save_combination(path)
    for name in handle.names:
        handle.save_adapter(name, tmp_path / f"{name}.safetensors")
    # Another order, another combination, one adapter more.
    other_encoder, other = make(2, ["us", "x", "indian"], "mean")
    for name in ("us", "indian"):
        other.load_adapter(tmp_path / f"{name}.safetensors")
    other.load_combination(path)
    assert other.combined_names == ["indian", "us"]
    torch.testing.assert_close(
        output(other_encoder, other, "combined"),
        output(encoder, handle, "combined"),
    )
    # Without the adapters it is refused, and the old one stays.
    _, lone = make(3, ["us", "x"], "weighted_mean")
    before = state_of(lone)
    with pytest.raises(ValueError, match="combines 'indian', which are not"):
        lone.load_combination(path)
    assert same(state_of(lone), before)


def test_files_from_before_queries_had_a_width(tmp_path, monkeypatch):
    _, handle = make(1)
    path = tmp_path / "c.safetensors"
    with monkeypatch.context() as earlier:
        then = {k: v for k, v in SETTINGS.items() if k != "attention_dim"}
        earlier.setattr(AudioAdapterFusion, "settings", lambda self: then)
        handle.save_combination(path)
    _, other = make(2, combination="mean")
    other.load_combination(path)
    for one, two in zip(handle.layers, other.layers):
        assert two.combination.settings() == SETTINGS
        assert same(one.combination.state_dict(), two.combination.state_dict())


OTHERS = {
    "down.weight": "encoder.{layer}.down_proj.weight",
    "down.bias": "encoder.{layer}.down_proj.bias",
    "up.weight": "encoder.{layer}.up_proj.weight",
    "up.bias": None,
    "norm.weight": None,
    "norm.bias": None,
}


def foreign(path, layers=3, width=8, bottleneck=6):
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for i in range(layers):
        start = f"encoder.{i}."
        for name, shape in (
            ("down_proj.weight", (bottleneck, width)),
            ("down_proj.bias", (bottleneck,)),
            ("up_proj.weight", (width, bottleneck)),
        ):
            tensors[start + name] = torch.randn(shape, generator=generator)
    save_file(tensors, path)
    return tensors


def test_adapters_of_others(tmp_path, caplog):
    path = tmp_path / "theirs.safetensors"
    tensors = foreign(path)
    encoder, handle = make()
    handle.load_adapter(path, "theirs", name_map=OTHERS)
    assert "cannot be checked" in caplog.text
    x = torch.randn(2, 3, 8)
    down = tensors["encoder.1.down_proj.weight"]
    normed = torch.nn.functional.layer_norm(x, (8,))
    z = normed @ down.T + tensors["encoder.1.down_proj.bias"]
    expected = (z * z.sigmoid()) @ tensors["encoder.1.up_proj.weight"].T
    torch.testing.assert_close(
        handle.layers[1].bank["theirs"](x), expected, atol=1e-4, rtol=1e-4
    )
    handle.set_combination("fusion")
    assert output(encoder, handle, "combined").shape == (2, 5, 8)


def test_adapters_of_others_without_layer_norm(tmp_path):
    path = tmp_path / "theirs.safetensors"
    foreign(path)
    _, handle = make(layer_norm=False)
    plain = {n: t for n, t in OTHERS.items() if not n.startswith("norm")}
    handle.load_adapter(path, "theirs", name_map=plain)
    assert "theirs" in handle.names


@pytest.mark.parametrize(
    "change, message",
    [
        ({"down.weight": "nothing"}, "no tensor 'nothing' for 'down.weight'"),
        ({"down.weight": None}, "no tensor 'None'"),
        ({"other": "x"}, "name_map has"),
        ({"up.weight": "encoder.{layer}.down_proj.weight"}, "has the shape"),
    ],
)
def test_bad_name_maps(tmp_path, change, message):
    path = tmp_path / "theirs.safetensors"
    foreign(path)
    refused(path, message, "new", name_map={**OTHERS, **change})


def refused(path, message, name=None, error=ValueError, **others):
    encoder, handle = make(6)
    before, out = state_of(handle), output(encoder, handle, "us")
    with pytest.raises(error, match=message):
        handle.load_adapter(path, name, **others)
    assert same(state_of(handle), before) and handle.names == NAMES
    assert torch.equal(output(encoder, handle, "us"), out)


def test_bad_files_are_refused_and_nothing_changes(tmp_path):
    encoder, handle = make(1)
    good = tmp_path / "good.safetensors"
    handle.save_adapter("us", good)
    content = good.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:size])
        refused(bad, "bad.safetensors: not a whole safetensors file")
    flipped = bytearray(content)
    flipped[-1] ^= 1
    bad.write_bytes(flipped)
    refused(bad, "checksum does not match")
    refused(tmp_path / "none.safetensors", "none", error=FileNotFoundError)
    foreign(bad)
    refused(bad, "found another library's file; give a name_map")
    refused(bad, "give the adapter a name", name_map=OTHERS)
    refused(bad, "cannot be the name", "combined", name_map=OTHERS)
    foreign(bad, layers=2)
    refused(bad, "no tensor 'encoder.2.down", "new", name_map=OTHERS)
    foreign(bad, width=9)
    refused(bad, "expected .* for a width of 8", "new", name_map=OTHERS)
    handle.save_combination(bad)
    refused(bad, "expected adapter, found combination")
    with pytest.raises(ValueError, match="expected combination, found adapter"):
        handle.load_combination(good)


def test_other_bases_and_settings(tmp_path):
    path = tmp_path / "a.safetensors"
    encoder, handle = make()
    handle.save_adapter("us", path)
    handle.save_combination(tmp_path / "c.safetensors")
    with torch.no_grad():
        encoder.front.weight.mul_(1.01)
    before = state_of(handle)
    with pytest.raises(ValueError, match="trained on another base"):
        handle.load_adapter(path)
    with pytest.raises(ValueError, match="trained on another base"):
        handle.load_combination(tmp_path / "c.safetensors")
    assert same(state_of(handle), before)
    handle.load_adapter(path, any_base=True)
    handle.load_combination(tmp_path / "c.safetensors", any_base=True)
    for others, message in (
        ({"activation": torch.nn.ReLU}, r"its activation is SiLU\(\)"),
        ({"layer_norm": False}, "its layer_norm is True"),
        ({"layers": "layers.1"}, "3 layers of width 8, but .* behind 1 of"),
    ):
        _, other = make(**others)
        with pytest.raises(ValueError, match=message):
            other.load_adapter(path, any_base=True)


def test_nan_is_neither_saved_nor_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    _, handle = make()
    handle.save_adapter("us", path)
    before = path.read_bytes()
    with torch.no_grad():
        handle.layers[2].bank["us"].up.weight[1, 1] = torch.nan
    with pytest.raises(ValueError, match="'layers.2.up.weight' holds NaN"):
        handle.save_adapter("us", path)
    assert path.read_bytes() == before
    tensors = foreign(path)
    tensors["encoder.0.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, path)
    refused(path, "holds NaN or infinity", "new", name_map=OTHERS)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    _, handle = make()
    handle.save_adapter("us", path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="nothing under this name was changed"):
        handle.save_adapter("german", path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_only_safetensors_and_known_names(tmp_path):
    _, handle = make()
    with pytest.raises(ValueError, match="ends in .safetensors"):
        handle.save_adapter("us", tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no adapter 'x'"):
        handle.save_adapter("x", tmp_path / "a.safetensors")
    _, alone = make(combination=None)
    with pytest.raises(ValueError, match="there is no combination"):
        alone.save_combination(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_combinations_of_ones_own_class(tmp_path):
    class Mine(AdapterMean):
        pass

    _, handle = make(combination=Mine)
    handle.save_combination(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="of the class Mine, which is not"):
        handle.load_combination(tmp_path / "c.safetensors")


def test_bytes_depend_on_the_content_alone(tmp_path):
    for i in range(2):
        _, handle = make(1)
        handle.save_adapter("us", tmp_path / f"{i}.safetensors")
    first, second = (p.read_bytes() for p in tmp_path.iterdir())
    assert first == second


def write_through_numpy(encoder):
    encoder.front.weight.detach().numpy()[0, 0] += 1


def replace_data(encoder):
    encoder.front.weight.data = encoder.front.weight.data + 1


def one_entry_of_data(encoder):
    encoder.layers[1].mix.weight.data[3, 2, 1] += 1e-3


def train_one_step(encoder):
    encoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(encoder.front.parameters(), lr=0.1)
    encoder(torch.randn(2, 5, 4)).sum().backward()
    optimizer.step()


CHANGES = {
    "numpy": write_through_numpy,
    "data": replace_data,
    "one entry": one_entry_of_data,
    "step": train_one_step,
    "load": lambda e: e.load_state_dict(ToyEncoder().state_dict()),
    "statistics": lambda e: e.layers[0].statistics.running_mean.add_(1),
    "count": lambda e: e.layers[0].statistics.num_batches_tracked.add_(1),
    "type": lambda e: e.half(),
    "buffer": lambda e: e.register_buffer("odd", torch.ones(3).char()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_base_is_hashed_once_until_it_changes(change, monkeypatch):
    encoder, handle = make()
    front = torch.nn.BatchNorm1d(4)
    handle.freeze({"front": front})
    hashed, stock = [], checks.fingerprint
    monkeypatch.setattr(
        checks, "fingerprint", lambda state: hashed.append(1) or stock(state)
    )

    def exact():
        state = encoder.state_dict().items()
        return stock({n: t for n, t in state if "task_adapters" not in n})

    for _ in range(2):
        for _ in range(3):
            assert handle.base_fingerprint() == exact()
            handle.frozen_fingerprints()
        scramble(handle, seed=3)  # is no part of it
        before = exact()
        assert len(hashed) == 2
        twin = copy.deepcopy(handle)
        assert not twin._fingerprints
    change(encoder)
    assert handle.base_fingerprint() == exact() != before
    front.weight.data.mul_(2)
    (entry,) = handle.frozen_fingerprints()
    assert entry["fingerprint"] == stock(checks.frozen_state(front))
    assert len(hashed) == 4
