"""ln_init="match": LN starts where none is, by least squares over a batch."""

import copy

import numpy as np
import pytest
import torch
from adapters_toy import ToyEncoder, make_bank, numbers, scramble
from hugging_face_toy import save_encoder
from torch.utils.checkpoint import checkpoint

from speechbrain_taskarith.adapters import (
    AdapterMean,
    AdapterWeightedMean,
    AudioAdapterFusion,
    insert_adapters,
    load_adapters,
)
from speechbrain_taskarith.transducer import Emformer

KINDS = {
    "mean": AdapterMean,
    "weighted": AdapterWeightedMean,
    "fusion": AudioAdapterFusion,
    "narrow": lambda bank=None, **o: AudioAdapterFusion(
        bank, attention_dim=2, running=True, **o
    ),
}
NAMES = ["us", "german"]


def regression(o, eps=1e-5):
    """Return gain and bias [d] of frames o [F, d], channel by channel."""
    variance = o.var(1, keepdims=True)
    z = (o - o.mean(1, keepdims=True)) / np.sqrt(variance + eps)
    one = np.ones(len(o))
    found = [
        np.linalg.lstsq(np.stack([a, one], 1), b, rcond=None)[0]
        for a, b in zip(z.T, o.T)
    ]
    return np.array(found).T


def check(combination, o, **tolerance):
    gain, bias = regression(o, combination.norm.eps)
    tolerance = {"rtol": 1e-6, "atol": 1e-7, **tolerance}
    norm = combination.norm
    np.testing.assert_allclose(numbers(norm.weight), gain, **tolerance)
    np.testing.assert_allclose(numbers(norm.bias), bias, **tolerance)
    assert not combination.is_unmatched and combination.matched == 1


def alone(kind="fusion", number=3, **others):
    combination = KINDS[kind](make_bank(number), ln_init="match", **others)
    for name, parameter in combination.double().named_parameters():
        if not name.startswith("norm."):
            torch.nn.init.normal_(
                parameter, std=0.5, generator=torch.manual_seed(len(name))
            )
    return combination


def frames(*shape, seed=1):
    generator = torch.manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def inserted(kind="fusion", encoder=None, ln_init="match", **others):
    torch.manual_seed(0)
    encoder = ToyEncoder() if encoder is None else encoder
    handle = insert_adapters(
        encoder,
        NAMES,
        bottleneck=4,
        combination=KINDS[kind](ln_init=ln_init),
        **others,
    )
    scramble(torch.nn.ModuleList(layer.bank for layer in handle.layers))
    handle.train_composition("ST-A")
    return encoder, handle


def outputs(handle, run):
    """Return what each layer's combination gave in a pass: o, without LN."""
    seen, hooks = [], []
    for layer in handle.layers:
        hook = layer.combination.register_forward_pre_hook(
            lambda made, x: seen.append(made.combine(x[0]).detach())
        )
        hooks.append(hook)
    run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gain_and_bias_are_those_of_least_squares(kind, number, recompute):
    combination = alone(kind, number, recompute=recompute)
    twin = KINDS[kind](combination.bank, ln_init=None).double()
    state = combination.state_dict()
    twin.load_state_dict({k: state[k] for k in twin.state_dict()})
    x = frames(4, 9, 8)
    for mode in (True, False):
        combination.train(mode)
        with torch.no_grad():
            assert torch.equal(combination(x), twin(x))
    assert torch.equal(combination.eval()(x), twin(x))
    held = list(map(id, combination.parameters()))
    out = combination.train()(x)
    o = combination.combine(x).detach()
    check(combination, numbers(o).reshape(-1, 8))
    torch.testing.assert_close(out, x + combination.norm(o))
    assert list(map(id, combination.parameters())) == held
    out.square().sum().backward()
    for parameter in combination.norm.parameters():
        assert parameter.grad.abs().min() > 0
    # Once, and not by the next batch.
    before = copy.deepcopy(combination.norm.state_dict())
    combination(frames(4, 9, 8, seed=2))
    for name, tensor in combination.norm.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_norm_that_does_not_train_is_not_matched():
    encoder, handle = inserted()
    handle.train_nothing()
    encoder.train()(frames(2, 5, 4).float())
    assert all(layer.combination.is_unmatched for layer in handle.layers)


@pytest.mark.parametrize("kind", ["batch first", "frames first", "emformer"])
def test_padding_does_not_count(kind):
    lengths = torch.tensor([8, 3, 5, 8])
    padding = torch.arange(8) >= lengths[:, None]
    x = frames(4, 8, 8).float()
    if kind == "emformer":
        encoder = Emformer(8, 2, 16, 2, 4, 1, 2, memory_size=1)
    else:
        first = kind == "batch first"
        layer = torch.nn.TransformerEncoderLayer(
            8, 2, 16, 0.0, batch_first=first
        )
        encoder = torch.nn.TransformerEncoder(
            layer, 2, enable_nested_tensor=False
        )
        x = x if first else x.transpose(0, 1)
    _, handle = inserted(encoder=encoder)

    def run():
        encoder.train()
        if kind == "emformer":
            encoder(x, lengths / 8)
        else:
            encoder(x, src_key_padding_mask=padding)

    for layer, o in zip(handle.layers, outputs(handle, run)):
        if kind == "emformer":  # two blocks of 4 frames, and one copied frame
            o = o.unflatten(0, (4, 2))[:, :, :4].flatten(1, 2)
        o = o.transpose(0, 1) if kind == "frames first" else o
        check(layer.combination, numbers(o[~padding]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert"])
def test_padding_of_transformers_does_not_count(kind, attention, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save_encoder(tmp_path / kind, kind, num_hidden_layers=2)
    model = transformers.AutoModel.from_pretrained(
        folder, attn_implementation=attention
    )
    model.config.apply_spec_augment = False
    encoder = model.encoder
    lengths = torch.tensor([8, 3, 5, 8])
    inside = torch.arange(8) < lengths[:, None]
    x = frames(4, 8, 16).float()
    _, handle = inserted(encoder=encoder, layers="layers.*")

    def run():
        encoder.train()
        encoder(x, attention_mask=inside)

    for layer, o in zip(handle.layers, outputs(handle, run)):
        check(layer.combination, numbers(o[inside]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["mean", "fusion"])
def test_training_starts_where_no_norm_does(kind):
    target = {}

    def loss(ln_init):
        encoder, handle = inserted(kind, ln_init=ln_init)
        encoder.eval()  # no dropout
        for layer in handle.layers:
            layer.combination.train()
        x = frames(6, 20, 4).float()
        if not target:
            for name in NAMES:
                handle.use(name)
                target[name] = encoder(x).detach()
        handle.use("combined")
        out = encoder(x)
        return sum((out - t).square().mean() for t in target.values()).item()

    none, match, one = map(loss, (None, "match", "one"))
    assert abs(match - none) < 0.1 * (one - none)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["one frame", "constant", "zero", "tiny"])
def test_batches_that_tell_little_give_finite_values(case, dtype):
    combination = alone("mean").to(dtype)
    combination.bank.to(dtype)
    x = frames(1, 1 if case == "one frame" else 6, 8).to(dtype)
    with torch.no_grad():
        for name in combination.bank.names:
            up = combination.bank[name].up
            if case in ("constant", "zero"):
                up.weight.zero_()
            if case == "zero":
                up.bias.zero_()
            if case == "tiny":
                up.weight.mul_(1e-12), up.bias.mul_(1e-12)
    out = combination.train()(x)
    assert not combination.is_unmatched
    norm = combination.norm
    assert torch.isfinite(norm.weight).all() and norm.weight.abs().max() < 1
    # Exact here: each frame is one that LN gives back as it is.
    o = combination.combine(x)
    exact = dtype == torch.float32
    tolerance = {"atol": 1e-5 if exact else 0.05, "rtol": 0.0}
    torch.testing.assert_close(out, x + o, **tolerance)
    # And no explosion: of zeros LN with gain one has a gradient of 316.
    if case == "zero":
        assert torch.equal(out, x)
        value = torch.zeros(1, 8, dtype=dtype, requires_grad=True)
        norm(value)[0, 0].backward()
        assert value.grad.abs().max() < 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, None])
def test_a_batch_that_cannot_be_used_is_passed_over(value):
    combination = alone().train()
    x = frames(2, 5, 8)
    if value is None:
        combination(x[:0])
    else:
        bad = x.clone()
        bad[0, 0] = value
        combination(bad)
    assert combination.is_unmatched
    combination(x)
    check(combination, numbers(combination.combine(x)).reshape(-1, 8))


def test_statistics_are_exact_in_half_precision():
    combination = alone()
    combination.float(), combination.bank.float()
    x = frames(8, 50, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        combination.train()(x)
        rough = combination.combine(x)
    assert rough.dtype == torch.bfloat16
    check(combination, numbers(rough).reshape(-1, 8), rtol=1e-5, atol=1e-6)


def test_folding_is_that_of_no_norm_until_it_is_matched():
    encoder, handle = inserted()
    plain, other = inserted(ln_init=None)
    x = frames(2, 5, 4).float()
    encoder.eval(), plain.eval()
    with torch.no_grad():
        handle.fold()
        torch.testing.assert_close(encoder(x), plain(x))
        encoder.train()
    encoder(x)
    encoder.eval()
    with torch.no_grad():
        wanted = encoder(x)
        handle.fold()
        torch.testing.assert_close(encoder(x), wanted)
        assert not torch.equal(wanted, plain(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    encoder, handle = inserted()
    encoder.train()
    hidden = encoder.front(frames(2, 5, 4).float()).requires_grad_()
    for _ in range(2):
        handle.zero_grad()
        out = hidden
        for layer in encoder.layers:
            out = checkpoint(layer, out, use_reentrant=reentrant)[0]
        out.square().sum().backward()
        for layer in handle.layers:
            assert not layer.combination.is_unmatched
            assert layer.combination.norm.weight.grad is not None


def test_compiled_graphs():
    torch._dynamo.reset()
    x = frames(2, 5, 4).float()
    results = []
    for compiled in (False, True):
        encoder, handle = inserted()
        for layer in encoder.layers:
            layer.dropout.p = 0.0
        run = torch.compile(encoder, backend="eager") if compiled else encoder
        encoder.train()
        optimizer = torch.optim.SGD(handle.trained_parameters(), 0.01)
        for _ in range(2):
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(handle.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, msg=name)
    # From then on nothing breaks the graph.
    torch._dynamo.reset()
    run = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x), encoder(x))


# ------------------------------------------------------------------- resume


def trained(steps=1):
    encoder, handle = inserted()
    encoder.train()
    for _ in range(steps):
        encoder(frames(2, 5, 4).float())
    return encoder, handle


@pytest.mark.parametrize("steps", [0, 1])
def test_a_resumed_run_goes_on(steps, tmp_path):
    encoder, handle = trained(steps)
    scramble(handle, seed=4)
    torch.save(encoder.state_dict(), tmp_path / "model.ckpt")
    other, again = inserted()
    other.load_state_dict(torch.load(tmp_path / "model.ckpt"))
    handle.save(tmp_path / "folder")
    bare = ToyEncoder()
    base = encoder.state_dict()
    bare.load_state_dict({k: base[k] for k in bare.state_dict()})
    loaded = load_adapters(bare, tmp_path / "folder")
    loaded.train_composition("ST-A")
    x = frames(2, 5, 4, seed=3).float()
    encoder.eval()
    for model, adapters in ((other, again), (bare, loaded)):
        model.eval()
        torch.testing.assert_close(model(x), encoder(x))
        model.train()(x)
        for one, two in zip(handle.layers, adapters.layers):
            norms = one.combination.norm, two.combination.norm
            kept = torch.equal(norms[0].weight, norms[1].weight)
            assert kept == bool(steps)
            assert not two.combination.is_unmatched


def test_checkpoints_of_other_starts():
    matched, unmatched = trained(1)[0], trained(0)[0]
    earlier = inserted(ln_init="small")[0]
    # From before: as it was trained, and not matched.
    fresh, handle = inserted()
    fresh.load_state_dict(earlier.state_dict())
    assert not handle.layers[0].combination.is_unmatched
    weight = handle.layers[0].combination.norm.weight
    assert weight[0].item() == pytest.approx(0.1)
    # What is matched is an LN like others; what is not is none.
    earlier.load_state_dict(matched.state_dict())
    with pytest.raises(RuntimeError, match="combination.matched"):
        earlier.load_state_dict(unmatched.state_dict())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_a_mean_of_checkpoints(share):
    one, two = trained(1)[0].state_dict(), trained(0)[0].state_dict()
    mean = {k: one[k] * share + two[k] * (1 - share) for k in one}
    names = [k for k in one if k.endswith("combined_names")]
    mean.update({k: one[k] for k in names})
    encoder, handle = inserted()
    encoder.load_state_dict(mean)
    for layer in handle.layers:
        assert layer.combination.is_unmatched == (share < 0.5)


def test_copies_moves_and_bad_starts():
    encoder, handle = trained(0)
    twin = copy.deepcopy(encoder)
    encoder.train()(frames(2, 5, 4).float())
    assert twin.task_adapters.layers[0].combination.is_unmatched
    assert not copy.deepcopy(handle.layers[0].combination).is_unmatched
    # Another combination starts anew.
    handle.set_combination(handle.layers[0].combination)
    assert handle.layers[0].combination.is_unmatched
    with pytest.raises(ValueError, match="one, small, zero, match or None"):
        AdapterMean(ln_init="matched")
