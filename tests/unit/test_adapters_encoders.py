"""Adapters in the encoders of SpeechBrain and of transformers."""

import pytest
import speechbrain as sb
import torch
from adapters_toy import scramble
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.transformer.Branchformer import (
    BranchformerEncoder,
)
from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder
from speechbrain.lobes.models.transformer.Transformer import TransformerEncoder
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.nnet.attention import RelPosEncXL
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_taskarith.adapters import AudioAdapterFusion, insert_adapters

NAMES = ["us", "german"]


def speechbrain_encoder(kind):
    if kind == "conformer":
        encoder = ConformerEncoder(2, 16, 32, 4, kernel_size=3)
    elif kind == "branchformer":
        encoder = BranchformerEncoder(
            2, 16, 4, kernel_size=3, csgu_linear_units=24
        )
    else:
        return TransformerEncoder(2, 4, 32, d_model=16), {}
    return encoder, {"pos_embs": RelPosEncXL(16)}


@pytest.mark.parametrize("kind", ["conformer", "branchformer", "transformer"])
def test_speechbrain_encoders(kind):
    torch.manual_seed(0)
    encoder, needs = speechbrain_encoder(kind)
    encoder.eval()
    x = torch.randn(2, 6, 16)
    others = {n: make(x) for n, make in needs.items()}
    check(encoder, lambda: encoder(x, **others)[0], 2, 16)


def check(encoder, run, layers, width, **arguments):
    """The base is left alone, one adapter and their combination train."""

    # torch takes other kernels for weights that may get gradients, even
    # under no_grad: a base is compared with itself when frozen alike.
    @torch.no_grad()
    def look():
        return run()

    first = look()
    encoder.requires_grad_(False)
    base = look()
    encoder.requires_grad_(True)
    handle = insert_adapters(
        encoder, NAMES, bottleneck=4, combination="fusion", **arguments
    )
    assert len(handle.layer_names) == layers
    assert handle.layers[0].bank.d_model == width
    assert torch.equal(look(), base)
    for choice in ("us", "combined"):
        if choice == "us":
            parameters = handle.train_extraction("us")
        else:
            scramble(handle)
            parameters = handle.train_composition("ST-A")
        run().square().sum().backward()
        assert all(p.grad is not None for p in parameters)
        assert torch.isfinite(parameters[-1].grad).all()
    assert not torch.allclose(look(), base, atol=1e-3)
    assert handle.attention().shape == (layers, 2)
    handle.use(["german", None])
    mixed = look()
    torch.testing.assert_close(mixed[1], base[1], atol=1e-5, rtol=1e-5)
    handle.remove()
    assert torch.equal(look(), first)


def huggingface_encoder(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "whisper":
        config = transformers.WhisperConfig(
            vocab_size=60,
            num_mel_bins=8,
            d_model=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=24,
            max_source_positions=10,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
        return transformers.WhisperModel(config).eval()
    classes = {
        "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model"),
        "hubert": ("HubertConfig", "HubertModel"),
        "conformer": ("Wav2Vec2ConformerConfig", "Wav2Vec2ConformerModel"),
        "wavlm": ("WavLMConfig", "WavLMModel"),
    }
    config, model = (getattr(transformers, name) for name in classes[kind])
    config = config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        # What most large models have: a LayerNorm in every convolution.
        feat_extract_norm="layer",
        mask_time_prob=0.0,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
    )
    return model(config).eval()


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "conformer", "wavlm"])
def test_self_supervised_encoders(kind):
    torch.manual_seed(0)
    model = huggingface_encoder(kind)
    x = torch.randn(2, 400)
    check(model, lambda: model(x).last_hidden_state, 2, 16)


def test_whisper():
    torch.manual_seed(0)
    model = huggingface_encoder("whisper")
    x = torch.randn(2, 8, 20)
    encoder = model.encoder
    check(encoder, lambda: encoder(x).last_hidden_state, 2, 16)
    # The whole model: the decoder's layers are left out.
    check(model, lambda: model.encoder(x).last_hidden_state, 2, 16)


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("kind", ["wav2vec2", "wavlm"])
def test_hidden_states_have_the_adapters(kind, asked_before):
    torch.manual_seed(0)
    model, x = huggingface_encoder(kind), torch.randn(2, 400)
    if asked_before:  # what collects them is there for good
        model(x, output_hidden_states=True)
    handle = insert_adapters(model, NAMES, bottleneck=4)
    scramble(handle)
    handle.use("us")
    outputs = []

    def look(layer, inputs, out):
        outputs.append(out[0] if isinstance(out, tuple) else out)

    for layer in model.encoder.layers:  # behind the adapters
        layer.register_forward_hook(look)
    with torch.no_grad():
        found = model(x, output_hidden_states=True).hidden_states
    for one, other in zip(found[1:], outputs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
def test_padding_has_no_attention(kind):
    torch.manual_seed(0)
    model, x = huggingface_encoder(kind), torch.randn(2, 400)
    handle = insert_adapters(model, NAMES, bottleneck=4, combination="fusion")
    scramble(handle)
    handle.use("combined")
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 150:] = 0
    with torch.no_grad():
        model(x, attention_mask=mask)
    weights = handle.layers[0].combination.last_weights
    lens = model._get_feat_extract_output_lengths(mask.sum(1))
    lens = lens / weights.shape[1]
    assert lens[1] < 0.6
    torch.testing.assert_close(handle.attention(), handle.attention(lens))


def test_batch_norm_of_wav2vec2_conformer_stays():
    model = huggingface_encoder("conformer")
    handle = insert_adapters(model, NAMES, bottleneck=4)
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert any("running_mean" in name for name in before)
    handle.train_extraction("us")
    model.train()
    model(torch.randn(2, 400)).last_hidden_state.sum().backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_huggingface_gradient_checkpointing():
    model = huggingface_encoder("wav2vec2")
    handle = insert_adapters(model, NAMES, bottleneck=4, combination="fusion")
    scramble(handle)
    handle.train_composition("MT-A")
    model.train()
    x, gradients = torch.randn(2, 400), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        handle.zero_grad()
        model(x).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in handle.trained_parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_speechbrains_wrapper(tmp_path):
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
    from transformers import Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    folder = str(tmp_path / "model")
    huggingface_encoder("wav2vec2").save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    wrapper = Wav2Vec2(folder, str(tmp_path), freeze=False).eval()
    x = torch.randn(2, 400)
    check(wrapper, lambda: wrapper(x), 2, 16)


def transformer_asr(**others):
    return TransformerASR(
        tgt_vocab=10,
        input_size=12,
        d_model=16,
        nhead=4,
        num_encoder_layers=2,
        num_decoder_layers=1,
        d_ffn=32,
        encoder_module="conformer",
        kernel_size=3,
        attention_type="RelPosMHAXL",
        normalize_before=True,
        **others,
    ).eval()


def test_a_whole_transformer_asr():
    torch.manual_seed(0)
    model = transformer_asr()
    x = torch.randn(2, 7, 12)
    check(model, lambda: model.encode(x), 2, 16)


@pytest.mark.parametrize("running", [False, True])
def test_streaming_goes_through_the_adapters(running):
    torch.manual_seed(0)
    model = transformer_asr(causal=False, positional_encoding=None)
    model.requires_grad_(False)
    handle = insert_adapters(
        model,
        NAMES,
        bottleneck=4,
        combination=AudioAdapterFusion(running=running),
    )
    scramble(handle)
    config = DynChunkTrainConfig(chunk_size=4, left_context_size=2)
    x = torch.randn(2, 12, 12)

    def stream():
        context = model.make_streaming_context(config)
        chunks = [
            model.encode_streaming(chunk, context) for chunk in x.split(4, 1)
        ]
        return torch.cat(chunks, 1)

    with torch.no_grad():
        base = stream()
        for choice in ("us", "combined", ["german", "us"]):
            handle.use(choice)
            whole = model.encode(x, dynchunktrain_config=config)
            got = stream()
            torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(got, base, atol=1e-2)
        handle.remove()
        assert torch.equal(stream(), base)


def test_two_streams_keep_their_running_scores_apart():
    torch.manual_seed(0)
    model = transformer_asr(causal=False, positional_encoding=None)
    fusion = AudioAdapterFusion(running=True)
    handle = insert_adapters(model, NAMES, bottleneck=4, combination=fusion)
    scramble(handle)
    handle.use("combined")
    config = DynChunkTrainConfig(chunk_size=4, left_context_size=2)
    x = torch.randn(2, 12, 12)
    with torch.no_grad():
        together = model.encode(x, dynchunktrain_config=config)
        contexts = [model.make_streaming_context(config) for _ in x]
        chunks = [
            torch.cat(
                [
                    model.encode_streaming(chunk[i : i + 1], contexts[i])
                    for i in range(len(x))
                ]
            )
            for chunk in x.split(4, 1)
        ]
        got = torch.cat(chunks, 1)
    torch.testing.assert_close(got, together, atol=1e-4, rtol=1e-4)


def whisper_for_generation():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = huggingface_encoder("whisper").config
    model = transformers.WhisperForConditionalGeneration(config).eval()
    # Without it, the tiny model says the same token for ever.
    torch.nn.init.normal_(model.model.decoder.embed_tokens.weight)
    return model


def generate(model, features, **options):
    model.generation_config.forced_decoder_ids = None
    model.generation_config.suppress_tokens = None
    model.generation_config.begin_suppress_tokens = None
    return model.generate(
        features,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
)
def test_generation_with_an_adapter_for_each_utterance(options):
    model = whisper_for_generation()
    handle = insert_adapters(
        model, NAMES, bottleneck=4, layers="*layers.*", exclude=()
    )
    scramble(handle, scale=2.0)
    assert len(handle.layer_names) == 3  # of the decoder as well
    features, choice = torch.randn(3, 8, 20), ["us", "german", None]
    with torch.no_grad():
        handle.use(choice)
        mixed = generate(model, features, **options)
        alone = []
        for i, name in enumerate(choice):
            handle.use(name)
            alone.append(generate(model, features[i : i + 1], **options))
    assert torch.equal(mixed, torch.cat(alone))
    assert len({tuple(row) for row in mixed.tolist()}) > 1


def test_running_scores_refuse_a_key_value_cache():
    model = whisper_for_generation()
    fusion = AudioAdapterFusion(running=True)
    handle = insert_adapters(
        model, NAMES, bottleneck=4, combination=fusion, exclude=()
    )
    scramble(handle)
    handle.use("combined")
    features = torch.randn(1, 8, 20)
    with torch.no_grad():
        generate(model, features, use_cache=False)
        with pytest.raises(ValueError, match="use_cache=False"):
            generate(model, features)


def test_checkpointer_and_pretrainer(tmp_path):
    torch.manual_seed(0)
    encoder = speechbrain_encoder("transformer")[0].eval()
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        base = encoder.requires_grad_(False)(x)[0]
    torch.save(encoder.state_dict(), tmp_path / "base.ckpt")

    def fresh(seed):
        torch.manual_seed(seed)
        encoder = speechbrain_encoder("transformer")[0].eval()
        handle = insert_adapters(encoder, NAMES, combination="fusion")
        return encoder, handle

    # The base's weights go into an encoder that has adapters already.
    encoder, handle = fresh(1)
    pretrainer = Pretrainer(
        tmp_path / "collected",
        loadables={"encoder": encoder},
        paths={"encoder": str(tmp_path / "base.ckpt")},
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    with torch.no_grad():
        assert torch.equal(encoder(x)[0], base)
    scramble(handle)
    handle.use("combined")
    expected = encoder(x)[0]
    for what in ("adapters", "encoder"):
        folder = tmp_path / what
        recoverable = handle if what == "adapters" else encoder
        Checkpointer(folder, {what: recoverable}).save_checkpoint()
        other, twin = fresh(2)
        if what == "adapters":  # these alone: the base comes from elsewhere
            size = sum(p.numel() for p in handle.parameters())
            saved = next(folder.glob("CKPT*/adapters.ckpt"))
            state = torch.load(saved, weights_only=True)
            own = {n: t for n, t in state.items() if "combined_names" not in n}
            assert sum(t.numel() for t in own.values()) == size
            other.load_state_dict(
                torch.load(tmp_path / "base.ckpt", weights_only=True)
            )
        recoverable = twin if what == "adapters" else other
        Checkpointer(folder, {what: recoverable}).recover_if_possible()
        twin.use("combined")
        assert torch.equal(other(x)[0], expected)


class TinyBrain(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.encoder(batch)[0]

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()


def test_a_brain_trains_the_adapters_alone(tmp_path):
    torch.manual_seed(0)
    encoder = speechbrain_encoder("transformer")[0]
    handle = insert_adapters(encoder, NAMES, bottleneck=4)
    handle.train_extraction("german")
    before = {n: p.clone() for n, p in encoder.named_parameters()}
    brain = TinyBrain(
        {"encoder": encoder, "adapters": handle},
        opt_class=lambda parameters: torch.optim.AdamW(parameters, 0.1),
        run_opts={"device": "cpu"},
    )
    data = torch.utils.data.DataLoader(torch.randn(6, 6, 16), batch_size=2)
    brain.fit(range(2), data, progressbar=False)
    for name, parameter in encoder.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == ("adapter_german" in name), name


def test_from_yaml():
    text = """
    encoder: !new:speechbrain.lobes.models.transformer.Transformer.TransformerEncoder
        num_layers: 2
        nhead: 4
        d_ffn: 32
        d_model: 16
    adapters: !apply:speechbrain_taskarith.adapters.insert_adapters
        encoder: !ref <encoder>
        names: [us, german]
        bottleneck: 4
        combination: !name:speechbrain_taskarith.adapters.AudioAdapterFusion
            ln_init: small
    """
    loaded = load_hyperpyyaml(text)
    assert loaded["encoder"].task_adapters is loaded["adapters"]
    made = loaded["adapters"].layers[0].combination
    assert made.norm.weight[0].item() == pytest.approx(0.1)


def test_frozen_wrappers_are_named(caplog):
    encoder = speechbrain_encoder("transformer")[0]
    handle = insert_adapters(encoder, NAMES)
    handle.train_extraction("us")
    encoder.train()
    with torch.no_grad():
        encoder(torch.randn(1, 3, 16))
        encoder(torch.randn(1, 3, 16))
    assert caplog.text.count("no_grad") == 1
