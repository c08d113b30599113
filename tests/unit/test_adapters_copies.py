"""Copies and pickles of a model with adapters, whatever the activation is."""

import copy
import io
import pickle

import pytest
import torch
from adapters_toy import ToyEncoder, scramble
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_taskarith.adapters import (
    AudioAdapterFusion,
    BottleneckAdapter,
    insert_adapters,
)


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_activation_made_by_a_lambda_is_copied(way):
    torch.manual_seed(0)
    encoder = ToyEncoder().eval()
    handle = insert_adapters(
        encoder,
        ["a", "b"],
        bottleneck=4,
        combination="fusion",
        activation=lambda: torch.nn.LeakyReLU(0.3),
    )
    scramble(handle)
    handle.use("combined")
    twin, x = way(encoder), torch.randn(2, 5, 4)
    added = twin.task_adapters
    with torch.no_grad():
        assert torch.equal(twin(x), encoder(x))
        # The copy is its own, and can still grow.
        added.add_adapter("c")
        scramble(added, seed=1)
        added.use("c")
        assert added.layers[0].bank["c"].activation.negative_slope == 0.3
        assert not torch.allclose(twin(x), encoder(x))
    assert handle.names == ["a", "b"] and handle.in_use == "combined"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_copy_of_a_streaming_model_streams_through_its_own(way):
    torch.manual_seed(0)
    model = TransformerASR(
        5,
        8,
        16,
        nhead=2,
        num_encoder_layers=2,
        num_decoder_layers=0,
        d_ffn=16,
        attention_type="RelPosMHAXL",
        positional_encoding=None,
        encoder_module="conformer",
        normalize_before=True,
        causal=False,
        kernel_size=3,
    ).eval()
    handle = insert_adapters(
        model,
        ["a", "b"],
        bottleneck=4,
        combination=AudioAdapterFusion(running=True),
    )
    scramble(handle)
    handle.use("combined")
    twin, x = way(model), torch.randn(1, 12, 8)
    config = DynChunkTrainConfig(chunk_size=4, left_context_size=2)

    def stream(model):
        context = model.make_streaming_context(config)
        return torch.cat(
            [model.encode_streaming(c, context) for c in x.split(4, 1)], 1
        )

    with torch.no_grad():
        expected = stream(model)
        assert torch.equal(stream(twin), expected)
        scramble(twin.task_adapters, seed=1)
        assert not torch.allclose(stream(twin), expected)
        assert torch.equal(stream(model), expected)


@pytest.mark.parametrize(
    "activation", [torch.nn.SiLU(), torch.relu, lambda: torch.relu, "silu"]
)
def test_what_makes_no_activation_is_refused(activation):
    with pytest.raises(ValueError, match="makes no module.*torch.nn.SiLU"):
        BottleneckAdapter(8, 2, activation)
    encoder = ToyEncoder()
    with pytest.raises(ValueError, match="makes no module"):
        insert_adapters(encoder, ["a"], activation=activation)
    assert not hasattr(encoder, "task_adapters")
