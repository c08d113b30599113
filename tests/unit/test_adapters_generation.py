"""Adapters of single recordings in searches, and in long-form decoding."""

import pytest
import torch
from adapters_toy import scramble
from speechbrain.decoders.seq2seq import S2STransformerBeamSearcher
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.nnet.linear import Linear

from speechbrain_taskarith.adapters import insert_adapters

transformers = pytest.importorskip("transformers")

NAMES = ["us", "german", "indian"]
WINDOW, START_OF_TIMES = 20, 40
# Of the tokens of a window.
LENGTH = {"max_new_tokens": 4, "min_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    """Return a tiny Whisper with adapters behind all layers."""
    torch.manual_seed(0)
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
        max_source_positions=WINDOW // 2,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.decoder.embed_tokens.weight)
    settings = model.generation_config
    settings.no_timestamps_token_id = START_OF_TIMES - 1
    settings.forced_decoder_ids = settings.suppress_tokens = None
    settings.begin_suppress_tokens = settings.max_length = None
    model.handle = insert_adapters(model, NAMES, bottleneck=4, exclude=())
    scramble(model.handle, scale=2.0)
    return model


def transcribe(model, features, lengths, **options):
    """Return the segments' tokens of each recording."""
    frames = torch.arange(features.shape[2])
    found = model.generate(
        features,
        attention_mask=(frames < torch.tensor(lengths)[:, None]).long(),
        return_timestamps=True,
        return_segments=True,
        **LENGTH,
        **options,
    )
    return [
        [segment["tokens"].tolist() for segment in row]
        for row in found["segments"]
    ]


# Recordings leave the batch one after the other, from its middle as well.
LENGTHS = [40, 20, 60, 41]
CHOICE = ["us", "german", None, "indian"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        # All of it again for those whose text is too unlikely.
        {"temperature": (0.0, 0.0), "logprob_threshold": -0.6},
        {"cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "sequences", "fallback", "static"],
)
def test_long_recordings_keep_their_own_adapter(model, options):
    torch.manual_seed(1)
    features, handle = torch.randn(4, 8, 60), model.handle
    rows = []
    watched = model.model.encoder.register_forward_pre_hook(
        lambda module, args, named: rows.append(
            len(named.get("input_features", args[0] if args else ()))
        ),
        with_kwargs=True,
    )
    with torch.no_grad(), handle.use(CHOICE):
        mixed = transcribe(model, features, LENGTHS, **options)
    watched.remove()
    if "cache_implementation" not in options:  # that fills it up
        assert len(set(rows)) > 1, "the batch has not shrunk"
    if "temperature" in options:
        assert rows != sorted(rows, reverse=True), "none was decoded again"
    alone = []
    with torch.no_grad():
        for i, name in enumerate(CHOICE):
            one = features[i : i + 1, :, : LENGTHS[i]]
            with handle.use(name):
                here = transcribe(model, one, LENGTHS[i : i + 1], **options)
            with handle.use(None):
                base = transcribe(model, one, LENGTHS[i : i + 1], **options)
            assert (here == base) == (name is None)
            alone += here
    assert mixed == alone


@pytest.mark.parametrize("named", [["us", "german"], ["us"] * 5])
def test_not_one_name_a_recording_is_refused(model, named):
    features = torch.randn(4, 8, 60)
    with torch.no_grad(), model.handle.use(named):
        with pytest.raises(ValueError, match="one adapter for each"):
            transcribe(model, features, [60, 20, 20, 20])


def test_speechbrains_beams_go_through_their_utterances_adapter():
    torch.manual_seed(0)
    network = TransformerASR(
        12,
        8,
        16,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        d_ffn=16,
        causal=False,
    ).eval()
    head = Linear(input_size=16, n_neurons=12)
    torch.nn.init.normal_(head.w.weight)
    handle = insert_adapters(network, NAMES, bottleneck=4, exclude="custom_*")
    scramble(handle, scale=2.0)
    assert any("decoder" in name for name in handle.layer_names)
    search = S2STransformerBeamSearcher(
        modules=[network, head],
        bos_index=1,
        eos_index=2,
        min_decode_ratio=0.0,
        max_decode_ratio=0.5,
        beam_size=3,
        using_eos_threshold=False,
    )
    src, full = torch.randn(3, 10, 8), torch.ones(3)

    def decode(rows):
        return search(network.encode(src[rows], full[rows]), full[rows])[0]

    choice, alone = ["us", "german", None], []
    with torch.no_grad():
        with handle.use(choice):
            mixed = decode(slice(None))
        for i, name in enumerate(choice):
            with handle.use(name):
                alone += decode(slice(i, i + 1))
    assert mixed == alone
    assert len({tuple(row) for row in alone}) > 1


@pytest.mark.parametrize("rows, named", [(4, 2), (3, 2), (1, 2), (2, 4)])
def test_a_batch_of_another_size_is_refused(model, rows, named):
    encoder = model.model.encoder
    with torch.no_grad(), model.handle.use(["us", "german"] * (named // 2)):
        with pytest.raises(ValueError, match=f"has {rows} rows"):
            encoder(torch.randn(rows, 8, WINDOW))
