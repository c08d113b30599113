"""LoRA as a vector: against PEFT's own merge and SpeechBrain's own forward."""

import json

import pytest
import torch
from speechbrain.nnet.adapters import AdaptedModel, HoulsbyAdapterLinear, LoRA

from speechbrain_taskarith.vectors import TaskVector, as_state
from speechbrain_taskarith.vectors.lora import lora_deltas


def copy(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def randomise(module, seed=1):
    """Give adapters weights: LoRA starts at zero, which proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * 0.3
                )


# -- SpeechBrain ---------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv1d(
            3, 5, kernel_size=4, stride=2, padding=1, dilation=2
        )
        self.norm = torch.nn.BatchNorm1d(5)
        self.layers = torch.nn.ModuleList(
            [torch.nn.Linear(5, 6), torch.nn.Linear(6, 4, bias=False)]
        )

    def forward(self, x):
        x = self.norm(self.conv(x)).transpose(1, 2)
        return self.layers[1](torch.relu(self.layers[0](x)))


def adapt(**arguments):
    model = Net().eval()
    base = copy(model)
    given = {"all_linear": True, "all_conv": True,
             "adapter_kwargs": {"rank": 3, "alpha": 2.5}}  # fmt: skip
    adapted = AdaptedModel(model, LoRA, **{**given, **arguments}).eval()
    randomise(adapted)
    return base, adapted


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"all_conv": False},
        {"all_linear": False},
        {"all_linear": False, "all_conv": False, "target_layers": ["layers.1"]},
        {"all_conv": False, "unfrozen_layers": ["conv", "norm"]},
    ],
)
def test_applying_the_vector_gives_the_adapted_models_output(arguments):
    base, adapted = adapt(**arguments)
    tau = TaskVector.from_lora(base, adapted)
    merged = Net().eval()
    merged.load_state_dict(tau.apply(base))
    x = torch.randn(2, 3, 40)
    with torch.no_grad():
        expected = adapted(x)
        assert not torch.allclose(Net().eval()(x), expected, atol=1e-3)
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)


def test_only_what_changes_is_in_the_vector():
    base, adapted = adapt(all_conv=False, target_layers=["layers.0"],
                          all_linear=False)  # fmt: skip
    assert set(lora_deltas(base, adapted)) == {"layers.0.weight"}


def test_conv_delta_kernel_position_by_kernel_position():
    base, adapted = adapt(all_linear=False)
    lora = adapted.adapted_model.conv
    down = lora.adapter_down_proj.weight.double()
    up = lora.adapter_up_proj.weight.double()
    expected = torch.zeros(5, 3, 4).double()
    for o in range(5):
        for i in range(3):
            for k in range(4):
                for r in range(3):
                    expected[o, i, k] += up[o, r, 0] * down[r, i, k]
    torch.testing.assert_close(
        lora_deltas(base, adapted)["conv.weight"].double(),
        (expected * 2.5 / 3).detach(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_what_speechbrain_saves_needs_its_alpha(tmp_path):
    base, adapted = adapt(unfrozen_layers=["norm"])
    adapted.saver(tmp_path / "adapter.ckpt")
    expected = lora_deltas(base, adapted)
    found = lora_deltas(base, tmp_path / "adapter.ckpt", alpha=2.5)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    with pytest.raises(ValueError, match="alpha"):
        lora_deltas(base, tmp_path / "adapter.ckpt")


class Holder(torch.nn.Module):
    """As SpeechBrain's wrappers of Hugging Face models hold them."""

    def __init__(self):
        super().__init__()
        self.model = Net()
        self.model.masked_spec_embed = torch.nn.Parameter(torch.rand(5))
        self.register_buffer("_mel_filters", torch.rand(2, 2))

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,
        lambda module: torch.nn.ModuleList([module])[0],
        lambda module: torch.compile(module, backend="eager"),
    ],
    ids=["data parallel", "bare", "compiled"],
)
@pytest.mark.parametrize("stored", [False, True])
def test_the_base_may_be_what_a_wrapper_was_built_from(tmp_path, stored, wrap):
    kwargs = {"rank": 3, "alpha": 2.5}
    adapted = AdaptedModel(
        Holder().eval(), LoRA, all_linear=True, adapter_kwargs=kwargs
    ).eval()
    randomise(adapted)
    path, module = tmp_path / "adapter.ckpt", wrap(adapted)
    adapted.saver(path)
    base = copy(Net())
    given = (path, 2.5) if stored else (module, None)
    tau = TaskVector.from_lora(base, given[0], alpha=given[1])
    assert set(tau) == {"layers.0.weight", "layers.1.weight"}
    merged = Net().eval()
    merged.load_state_dict(tau.apply(base))
    x = torch.randn(2, 3, 40)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), adapted(x), rtol=1e-4, atol=1e-5)
    other = {**base, "norm.weight": base["norm.weight"] + 1}
    if not stored:
        with pytest.raises(ValueError, match="norm.weight.*not the base's"):
            TaskVector.from_lora(other, module)


def test_an_adapted_model_may_lie_within_another_module():
    base, adapted = adapt()
    outer = torch.nn.ModuleList([adapted])
    tau = lora_deltas({f"0.{name}": t for name, t in base.items()}, outer)
    expected = lora_deltas(base, adapted)
    assert set(tau) == {f"0.{name}" for name in expected}
    for name, delta in expected.items():
        assert torch.equal(tau[f"0.{name}"], delta)


def test_another_base_and_other_adapters_are_refused():
    base, adapted = adapt()
    other = {**base, "layers.0.weight": base["layers.0.weight"] + 1}
    with pytest.raises(ValueError, match="layers.0.weight.*not the base's"):
        lora_deltas(other, adapted)
    del other["layers.0.weight"]
    with pytest.raises(KeyError, match="layers.0.weight"):
        lora_deltas(other, adapted)
    houlsby = AdaptedModel(
        Net(), HoulsbyAdapterLinear, target_layers=["layers.0"],
        adapter_kwargs={"projection_size": 2},
    )  # fmt: skip
    with pytest.raises(ValueError, match="Houlsby"):
        lora_deltas(base, houlsby)
    with pytest.raises(ValueError, match="no LoRA"):
        lora_deltas(base, Net())
    with pytest.raises(TypeError, match="PEFT"):
        lora_deltas(base, 3)


def test_the_vector_remembers_its_base():
    base, adapted = adapt()
    tau = TaskVector.from_lora(base, adapted)
    assert tau.base_fingerprint == as_state(base).fingerprint


# -- PEFT ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def whisper():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8,
            max_source_positions=20, max_target_positions=12,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
    ).eval()  # fmt: skip


ATTENTION = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ATTENTION},
        {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 5},
        {
            "target_modules": [*ATTENTION, "fc1"],
            "rank_pattern": {"fc1": 2},
            "alpha_pattern": {"fc1": 11, "v_proj": 3},
        },
        {"target_modules": ["conv1", "conv2", "k_proj"]},
        {"target_modules": ["embed_positions"]},
        {"target_modules": ATTENTION, "bias": "all"},
        {"target_modules": ATTENTION, "bias": "lora_only"},
        {"target_modules": ATTENTION, "modules_to_save": ["fc2"]},
    ],
    ids=lambda s: ",".join(s),
)
def test_peft_folder_equals_peft_merge(tmp_path, settings):
    peft = pytest.importorskip("peft")
    model = whisper()
    base = copy(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, **{"lora_alpha": 8, **settings})
    )
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "lora")
    tau = TaskVector.from_lora(base, tmp_path / "lora")
    merged = copy(adapted.merge_and_unload())
    edited = tau.apply(base)
    assert set(edited) == set(merged)
    changed = 0
    for name in merged:
        torch.testing.assert_close(edited[name], merged[name])
        changed += not torch.equal(merged[name], base[name])
    assert changed


def test_fan_in_fan_out(tmp_path):
    """A GPT-2 `Conv1D` keeps its weight transposed."""
    peft = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"proj": Conv1D(6, 4)})
    base = copy(model)
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=2, target_modules=["proj"], fan_in_fan_out=True, lora_alpha=3
        ),
        model,
    )
    lora = adapted["proj"]
    randomise(adapted)
    expected = copy(lora.base_layer)["weight"] + lora.get_delta_weight(
        "default"
    )
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "fan_in_fan_out": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(
        {
            f"base_model.model.proj.lora_{part}.weight": getattr(
                lora, f"lora_{part}"
            )["default"].weight.detach()
            for part in "AB"
        },
        folder / "adapter_model.bin",
    )
    edited = TaskVector.from_lora(base, folder).apply(base)
    torch.testing.assert_close(edited["proj.weight"], expected.detach())


def test_dora_is_refused_and_others_too(tmp_path):
    peft = pytest.importorskip("peft")
    model = whisper()
    base = copy(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=ATTENTION, use_dora=True)
    )
    adapted.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="use_dora"):
        TaskVector.from_lora(base, tmp_path / "dora")
    config = tmp_path / "dora" / "adapter_config.json"
    for method in ("pissa", "pissa_niter_4", "olora"):
        config.write_text(
            json.dumps({"peft_type": "LORA", "init_lora_weights": method})
        )
        with pytest.raises(ValueError, match="init_lora_weights"):
            TaskVector.from_lora(base, tmp_path / "dora")
    config.write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="IA3"):
        TaskVector.from_lora(base, tmp_path / "dora")
    config.write_text('{"peft_type"')
    with pytest.raises(ValueError, match="adapter_config.json"):
        TaskVector.from_lora(base, tmp_path / "dora")


def test_a_peft_adapter_of_another_model_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        whisper(), peft.LoraConfig(r=2, target_modules=ATTENTION)
    )
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "lora")
    with pytest.raises(KeyError, match="q_proj|v_proj"):
        TaskVector.from_lora(copy(Net()), tmp_path / "lora")
    small = {
        name: tensor[:4] if "proj.weight" in name else tensor
        for name, tensor in copy(whisper()).items()
    }
    with pytest.raises(ValueError, match="proj"):
        TaskVector.from_lora(small, tmp_path / "lora")


# -- what training or PEFT may leave behind ------------------------------------


def peft_folder(path, tensors, **config):
    """Write a PEFT adapter by hand; the package is not needed to read one."""
    path.mkdir()
    torch.save(tensors, path / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_adapter_is_refused_by_file_and_factor(
    tmp_path, factor, value
):
    base = {"l.weight": torch.zeros(3, 4)}
    tensors = {
        "base_model.model.l.lora_A.weight": torch.ones(2, 4),
        "base_model.model.l.lora_B.weight": torch.ones(3, 2),
    }
    tensors[f"base_model.model.l.lora_{factor}.weight"][1, 1] = value
    folder = peft_folder(tmp_path / "lora", tensors)
    with pytest.raises(
        ValueError, match=f"adapter_model.bin.*factor {factor} of l.weight"
    ):
        TaskVector.from_lora(base, folder)
    base, adapted = adapt()
    lora = adapted.adapted_model.layers[0]
    side = {"A": lora.adapter_down_proj, "B": lora.adapter_up_proj}[factor]
    with torch.no_grad():
        side.weight[0, 0] = value
    with pytest.raises(
        ValueError, match=f"factor {factor} of layers.0.weight.*NaN"
    ):
        TaskVector.from_lora(base, adapted)
    stored = {k: v for k, v in adapted.state_dict().items() if "adapter_" in k}
    torch.save(stored, tmp_path / "stored.ckpt")
    with pytest.raises(ValueError, match=f"stored.ckpt.*factor {factor}"):
        TaskVector.from_lora(base, tmp_path / "stored.ckpt", alpha=1.0)


def test_a_product_or_a_weight_that_is_not_finite_is_refused(tmp_path):
    base = {"l.weight": torch.zeros(3, 4), "l.bias": torch.zeros(3)}
    key = "base_model.model.l.lora_{}.weight"
    huge = {
        key.format("A"): torch.full((2, 4), 3e38),
        key.format("B"): torch.full((3, 2), 3e38),
    }
    with pytest.raises(ValueError, match="product for l.weight"):
        TaskVector.from_lora(base, peft_folder(tmp_path / "one", huge))
    beside = {
        key.format("A"): torch.ones(2, 4),
        key.format("B"): torch.ones(3, 2),
        "base_model.model.l.bias": torch.full((3,), float("nan")),
    }
    with pytest.raises(ValueError, match="adapter_model.bin: l.bias"):
        TaskVector.from_lora(base, peft_folder(tmp_path / "two", beside))


def test_factors_that_do_not_multiply_are_explained(tmp_path):
    """A grouped convolution: its factors share no inner dimension."""
    base = {"conv.weight": torch.zeros(4, 2, 3)}
    tensors = {
        "base_model.model.conv.lora_A.weight": torch.ones(2, 4, 3),
        "base_model.model.conv.lora_B.weight": torch.ones(4, 1, 1),
    }
    folder = peft_folder(tmp_path / "lora", tensors)
    with pytest.raises(ValueError, match="'conv.weight'.*grouped convolution"):
        TaskVector.from_lora(base, folder)


@pytest.mark.parametrize("name", ["default", "us", "my_adapter-2"])
def test_keys_with_the_adapters_name_are_read(tmp_path, name):
    """As `model.state_dict()` has them, which people store too."""
    base = {"l.weight": torch.zeros(3, 4), "e.weight": torch.zeros(5, 3)}
    noise = torch.Generator().manual_seed(0)
    a, b, c, d = (
        torch.randn(*shape, generator=noise)
        for shape in ((2, 4), (3, 2), (2, 5), (3, 2))
    )
    tensors = {
        f"base_model.model.l.lora_A.{name}.weight": a,
        f"base_model.model.l.lora_B.{name}.weight": b,
        f"base_model.model.e.lora_embedding_A.{name}": c,
        f"base_model.model.e.lora_embedding_B.{name}": d,
    }
    tau = TaskVector.from_lora(base, peft_folder(tmp_path / "lora", tensors))
    torch.testing.assert_close(tau["l.weight"], 2.0 * b @ a)
    torch.testing.assert_close(tau["e.weight"], 2.0 * (d @ c).T)
    tensors |= {
        "base_model.model.l.lora_A.other.weight": a,
        "base_model.model.l.lora_B.other.weight": b,
    }
    with pytest.raises(ValueError, match=f"several adapters.*{name}"):
        TaskVector.from_lora(base, peft_folder(tmp_path / "two", tensors))
