"""Bases: every form, against what SpeechBrain's own wrappers load."""

import json
import logging
import shutil

import pytest
import safetensors.torch
import torch
from hugging_face_toy import save_encoder, save_whisper, wrapper

from speechbrain_taskarith.vectors import (
    open_state,
    save_checkpoint,
    save_state,
)
from speechbrain_taskarith.vectors.recipe_hooks.bases import (
    load_base,
    open_base,
)
from speechbrain_taskarith.vectors.states.names import pair_names
from speechbrain_taskarith.vectors.states.state import StoredTensor


def same(state, module):
    """Assert that a state is the module's own, name by name, to the bit."""
    own = module.state_dict()
    assert list(state) == list(own)
    for name, tensor in own.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def spoil(module):
    """Change all of a module's parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    return module


def to_bin(folder, rename=lambda name: name):
    """Turn a folder's weights into the older `pytorch_model.bin`."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    torch.save(renamed, folder / "pytorch_model.bin")


def to_shards(folder):
    whole = open_state(folder)
    target = folder.with_name("shards")
    save_state(whole, target, shard_size=5000, like=folder)
    assert len(list(target.glob("model-*.safetensors"))) > 2
    return target


@pytest.fixture
def whisper(tmp_path):
    return save_whisper(tmp_path / "whisper")


@pytest.fixture
def wav2vec2(tmp_path):
    return save_encoder(tmp_path / "wav2vec2")


KINDS = [
    ("Wav2Vec2", "Model", {}),
    ("Wav2Vec2", "Model", {"do_stable_layer_norm": True}),
    ("Wav2Vec2", "ForCTC", {}),
    ("Wav2Vec2", "ForPreTraining", {}),
    ("Hubert", "Model", {}),
    ("Hubert", "ForCTC", {}),
    ("WavLM", "Model", {}),
    ("WavLM", "ForCTC", {}),
    ("Whisper", "Model", {}),
    ("Whisper", "ForConditionalGeneration", {}),
]


@pytest.mark.parametrize(("kind", "task", "settings"), KINDS)
def test_as_the_wrapper_loads_it(tmp_path, kind, task, settings):
    if kind == "Whisper":
        folder = save_whisper(tmp_path / "hf", task)
    else:
        folder = save_encoder(tmp_path / "hf", kind, task, **settings)
    module = wrapper(kind, folder)
    state = open_base(folder, module, name="encoder")
    same(state, module)
    assert state.left_out == ()
    # Another one of the same shapes becomes the base.
    other = spoil(wrapper(kind, folder))
    load_base(other, open_base(folder, other, name="encoder"))
    same(state, other)


def test_bytes_are_read_where_they_lie(whisper):
    module = wrapper("Whisper", whisper)
    state = open_base(whisper, module, name="whisper")
    stored = [n for n, e in state.entries.items() if type(e) is StoredTensor]
    assert len(stored) == len(state) - 1  # all but _mel_filters


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Whisper"])
def test_shards_and_the_older_file(tmp_path, kind):
    save = save_whisper if kind == "Whisper" else save_encoder
    folder = save(tmp_path / "hf")
    module = wrapper(kind, folder)
    same(open_base(to_shards(folder), module, name="encoder"), module)
    to_bin(folder)
    same(open_base(folder, module, name="encoder"), module)
    same(open_base(folder, wrapper(kind, folder), name="encoder"), module)


def test_weight_norm_by_its_old_names(wav2vec2):
    module = wrapper("Wav2Vec2", wav2vec2)
    new = "parametrizations.weight.original"
    to_bin(
        wav2vec2,
        lambda n: n.replace(f"{new}0", "weight_g").replace(
            f"{new}1", "weight_v"
        ),
    )
    assert any(name.endswith("weight_g") for name in open_state(wav2vec2))
    # SpeechBrain's wrapper reads them; so the oracle is not ours.
    same(open_base(wav2vec2, module, name="w"), wrapper("Wav2Vec2", wav2vec2))
    # And the other way round: a module of old, a file of today.
    conv = torch.nn.utils.weight_norm(torch.nn.Conv1d(2, 2, 3))
    today = torch.nn.utils.parametrizations.weight_norm(
        torch.nn.Conv1d(2, 2, 3)
    )
    state = open_base(
        save_state(today, wav2vec2 / "today.ckpt"), conv, name="conv"
    )
    load_base(conv, state)
    x = torch.randn(1, 2, 9)
    assert torch.equal(conv(x), today(x))


def test_encoder_only_whisper_drops_the_decoder(whisper, caplog):
    caplog.set_level(logging.INFO)
    module = wrapper("Whisper", whisper, encoder_only=True)
    state = open_base(whisper, module, name="whisper")
    same(state, module)
    assert "left out, the module goes without" in caplog.text
    assert "decoder." in caplog.text


def test_tied_tensors_stay_tied(tmp_path):
    import transformers

    config = transformers.MBartConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=10,
    )
    model = transformers.MBartForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "mbart")
    stored = open_state(tmp_path / "mbart")
    assert len(stored) < len(model.state_dict())  # the tied ones once
    state = open_base(tmp_path / "mbart", model, name="mbart")
    same(state, model)
    tied = {
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    assert set(state.aliases) == tied


def test_hub_names_come_from_the_cache(tmp_path, whisper, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    module = wrapper("Whisper", whisper)
    cache = tmp_path / "cache"
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / "abc123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    # As the hub's client lays it out: links to files without a suffix.
    for number, file in enumerate(whisper.iterdir()):
        blob = repository / "blobs" / f"blob{number}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    by_name = open_base("someone/tiny", module, name="w", savedir=cache)
    same(by_name, module)
    # The save_path of a wrapper, and the repository's folder in it.
    same(open_base(cache, module, name="w"), module)
    same(open_base(repository, module, name="w"), module)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    same(open_base("someone/tiny", module, name="w"), module)
    with pytest.raises(FileNotFoundError, match="someone/else.*no such file"):
        open_base("someone/else", module, name="w", savedir=cache)


def test_stored_in_another_precision(wav2vec2):
    module = wrapper("Wav2Vec2", wav2vec2)
    half = {n: t.half() for n, t in open_state(wav2vec2).items()}
    save_state(half, wav2vec2 / "model.safetensors")
    state = open_base(wav2vec2, module, name="encoder")
    for name, tensor in module.state_dict().items():
        assert torch.equal(state[name], tensor.half().float()), name
        assert state.info(name).dtype == "F32"
    bytes_ = torch.empty(state.info(name).nbytes, dtype=torch.uint8).numpy()
    state.read_into(name, 0, state.info(name).numel, bytes_)
    assert bytes(bytes_) == state[name].numpy().tobytes()


def test_own_checkpoint_is_left_as_it_is(tmp_path):
    model = torch.nn.Linear(3, 2)
    save_checkpoint(
        {"asr": model}, tmp_path / "save" / "CKPT+1", meta={"WER": 2}
    )
    save_checkpoint(
        {"asr": spoil(torch.nn.Linear(3, 2))},
        tmp_path / "save" / "CKPT+2",
        meta={"WER": 9},
    )
    state = open_base(tmp_path / "save", model, name="asr", min_key="WER")
    same(state, model)
    plain = open_state(tmp_path / "save" / "CKPT+1")
    assert state.fingerprint == plain.fingerprint
    assert state.source is None


def test_names_that_speechbrain_has_changed(tmp_path):
    class Old(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.layer = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2)})

    old, new = Old("mutihead_attn"), Old("multihead_attn")
    save_state(old, tmp_path / "old.ckpt")
    load_base(new, open_base(tmp_path / "old.ckpt", new, name="model"))
    old, new = old.state_dict(), new.state_dict()
    assert [*map(torch.Tensor.tolist, old.values())] == [
        *map(torch.Tensor.tolist, new.values())
    ]


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Whisper"])
def test_inserted_adapters_stay(tmp_path, kind, caplog):
    from speechbrain_taskarith.adapters import insert_adapters

    caplog.set_level(logging.INFO)
    save = save_whisper if kind == "Whisper" else save_encoder
    folder = save(tmp_path / "hf")
    bare = wrapper(kind, folder)
    module = wrapper(kind, folder)
    insert_adapters(
        module,
        ["us", "de"],
        layers="*encoder.layers.*",
        d_model=16,
        bottleneck=4,
    )
    spoil(module)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    state = open_base(folder, module, name="encoder")
    same(state, bare)
    adapters = [name for name in before if "task_adapters" in name]
    assert list(state.left_out) == adapters and adapters
    caplog.clear()
    load_base(module, state)
    assert len(caplog.messages) == 1 and "no adapters in" in caplog.text
    after = module.state_dict()
    for name, tensor in after.items():
        expected = before if name in adapters else bare.state_dict()
        assert torch.equal(tensor, expected[name]), name
    # A base that holds them is loaded with them.
    save_state(before, tmp_path / "with.ckpt")
    state = open_base(tmp_path / "with.ckpt", module, name="encoder")
    assert state.left_out == () and list(state) == list(after)


def test_wrapped_modules(wav2vec2):
    plain = wrapper("Wav2Vec2", wav2vec2)
    compiled = torch.compile(wrapper("Wav2Vec2", wav2vec2))
    state = open_base(wav2vec2, compiled, name="encoder")
    assert all(name.startswith("_orig_mod.model.") for name in state)
    same(state, compiled)
    spoil(compiled)
    load_base(compiled, state)
    same(open_base(wav2vec2, plain, name="encoder"), compiled._orig_mod)


def test_what_pre_training_left_untrained_is_zero(wav2vec2, caplog):
    # As in facebook/wav2vec2-base-960h; the wrapper would draw it anew in
    # each run, and a base that changes is no base.
    caplog.set_level(logging.INFO)
    tensors = dict(open_state(wav2vec2))
    del tensors["masked_spec_embed"]
    save_state(tensors, wav2vec2 / "model.safetensors")
    module = wrapper("Wav2Vec2", wav2vec2)
    state = open_base(wav2vec2, module, name="encoder")
    assert not state["model.masked_spec_embed"].any()
    assert "set to zero" in caplog.text
    again = open_base(wav2vec2, wrapper("Wav2Vec2", wav2vec2), name="encoder")
    assert state.fingerprint == again.fingerprint


# -- refused -------------------------------------------------------------------


def refused(folder, module, match, name="encoder"):
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=match) as caught:
        load_base(module, open_base(folder, module, name=name))
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key])
    return str(caught.value)


def test_another_architecture(tmp_path, wav2vec2, whisper):
    module = wrapper("Wav2Vec2", wav2vec2)
    deeper = save_encoder(tmp_path / "deep", num_hidden_layers=2)
    text = refused(deeper, module, "layers.1.*not in encoder")
    assert str(deeper) in text and "nothing was loaded" in text
    wider = save_encoder(tmp_path / "wide", hidden_size=24)
    refused(wider, module, r"\(24.*\) in the file, \(16.*\) in encoder")
    refused(whisper, module, "model_type is whisper")
    hubert = save_encoder(tmp_path / "hubert", "Hubert")
    refused(hubert, module, "model_type is hubert in config.json, wav2vec2")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_attention_heads", 4),
        ("hidden_act", "relu"),
        ("conv_stride", (4, 5)),
        ("do_stable_layer_norm", True),
    ],
)
def test_equal_shapes_that_compute_something_else(
    tmp_path, wav2vec2, setting, value
):
    module = wrapper("Wav2Vec2", wav2vec2)
    other = save_encoder(tmp_path / "other", **{setting: value})
    refused(other, module, f"{setting} is")


@pytest.mark.parametrize(
    ("setting", "value"), [("sampling_rate", 8000), ("do_normalize", False)]
)
def test_other_audio(wav2vec2, setting, value):
    module = wrapper("Wav2Vec2", wav2vec2)
    file = wav2vec2 / "preprocessor_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {setting: value}))
    refused(wav2vec2, module, f"{setting} is {value} in preprocessor_config")


def test_other_features(tmp_path, whisper):
    module = wrapper("Whisper", whisper)
    other = save_whisper(tmp_path / "other", num_mel_bins=128)
    refused(other, module, "num_mel_bins is 128 in config.json, 80 in")


def test_another_vocabulary(tmp_path, whisper):
    module = wrapper("Whisper", whisper)
    other = save_whisper(tmp_path / "other", vocab_size=44)
    text = refused(other, module, r"embed_tokens.weight: \(44, 16\)")
    assert "align_vocabulary" in text


def test_a_head_is_a_head_in_hugging_face_models_only(tmp_path):
    model = torch.nn.Linear(2, 2)
    tensors = {**model.state_dict(), "classifier.weight": torch.ones(1)}
    save_state(tensors, tmp_path / "base.ckpt")
    refused(tmp_path / "base.ckpt", model, "classifier.weight: not in encoder")


def test_missing_paths(tmp_path):
    model = torch.nn.Linear(2, 2)
    for path in (tmp_path / "no", "a/b/c", "no.ckpt"):
        with pytest.raises(FileNotFoundError, match="expected a base"):
            open_base(path, model, name="model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no weights"):
        open_base(tmp_path / "empty", model, name="model")


def test_only_wrappers_are_paired():
    # One layer fewer, another layer's name: not the same model.
    for names, others in (
        (["encoder.w", "encoder.b"], ["decoder.w", "decoder.b"]),
        (["w", "b"], ["encoder.w", "encoder.b"]),
        (["0.w"], ["1.w"]),
    ):
        pairs = pair_names(names, others)
        assert not pairs.names and pairs.missing == names
        assert pairs.unknown == others
    # Two holders: the one with more names is the model.
    others = ["wav2vec2.a", "wav2vec2.b", "model.a", "lm_head.a"]
    pairs = pair_names(["model.a", "model.b"], others)
    assert pairs.names == {"model.a": "wav2vec2.a", "model.b": "wav2vec2.b"}
    assert pairs.heads == ["lm_head.a"] and pairs.unknown == ["model.a"]
    pairs = pair_names(["module.a.module.w"], ["a.w"])
    assert pairs.names == {"module.a.module.w": "a.w"}
    # `module` as a layer's own name, beside one that it would be taken for.
    pairs = pair_names(["module.w", "w"], ["module.w", "w"])
    assert pairs.names == {"module.w": "module.w", "w": "w"}
