"""Steering adapters in an encoder: what moves, and what must not."""

import copy
import logging

import pytest
import torch
from adapters_toy import ToyEncoder, scramble
from speechbrain.processing.features import InputNormalization

from speechbrain_taskarith.adapters import (
    AdapterMean,
    AdapterWeightedMean,
    AudioAdapterFusion,
    attention_stats,
    insert_adapters,
    plot_attention,
)

NAMES = ["us", "german", "indian"]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = ToyEncoder()
    encoder(torch.randn(4, 9, 4))  # statistics that are not the start's
    return encoder.eval()


@pytest.fixture
def x():
    return torch.randn(3, 7, 4, generator=torch.manual_seed(1))


def inserted(encoder, combination="fusion", **others):
    handle = insert_adapters(
        encoder, NAMES, bottleneck=4, combination=combination, **others
    )
    scramble(handle, seed=3)
    return handle


def state_of(module, without=None):
    return {
        name: tensor.clone()
        for name, tensor in module.state_dict().items()
        if without is None or without not in name
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one
    )


def train(encoder, handle, x, steps=3, **optimizer):
    encoder.train()
    optimizer = torch.optim.AdamW(handle.trained_parameters(), 0.05)
    for _ in range(steps):
        (encoder(x).square().mean() + 0.1 * handle.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    encoder.eval()


def test_insertion_changes_nothing(encoder, x):
    base, state = encoder(x), state_of(encoder)
    handle = insert_adapters(encoder, NAMES, bottleneck=4)
    assert torch.equal(encoder(x), base)
    assert same(state_of(encoder, "task_adapters"), state)
    # Fresh adapters add nothing, either.
    handle.use("german")
    assert torch.equal(encoder(x), base)


@pytest.mark.parametrize("combination", ["mean", "weighted_mean", "fusion"])
def test_off_is_the_base_bit_for_bit_after_training(encoder, x, combination):
    base, state = encoder(x), state_of(encoder)
    handle = inserted(encoder, combination)
    handle.train_extraction("us")
    train(encoder, handle, x)
    handle.train_composition("MT-A")
    train(encoder, handle, x)
    changed = encoder(x)
    assert not torch.allclose(changed, base, atol=1e-3)
    assert same(state_of(encoder, "task_adapters"), state)
    with handle.use(None):
        assert torch.equal(encoder(x), base)
    assert torch.equal(encoder(x), changed)
    handle.use([None] * len(x))
    assert torch.equal(encoder(x), base)
    handle.remove()
    assert torch.equal(encoder(x), base)
    assert same(state_of(encoder), state)


def test_off_returns_the_very_object(encoder, x):
    handle = inserted(encoder)
    layer, seen = encoder.layers[0], []
    layer.register_forward_hook(lambda m, i, output: seen.append(output))
    handle.use(None)
    output = layer(torch.randn(1, 2, 8))
    assert output is seen[0]


def test_statistics_in_front_of_the_encoder_stay(x):
    normalize = InputNormalization(update_until_epoch=100)
    lens = torch.ones(3)
    normalize.train()
    normalize(x, lens)
    held = copy.deepcopy(normalize._statistics_dict())
    encoder = ToyEncoder()
    handle = inserted(encoder)
    handle.freeze(normalize)
    for _ in range(2):
        normalize.train()
        normalize(10 * x + 5, lens)
    for name, value in normalize._statistics_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(held[name]))
    handle.remove()
    normalize.train()
    assert normalize.training and not list(normalize.children())


def test_dropout_of_the_base_follows_the_mode(encoder):
    inserted(encoder)
    encoder.train()
    layer = encoder.layers[0]
    assert layer.dropout.training and not layer.statistics.training


def test_extraction_trains_one_adapter(encoder, x):
    handle = inserted(encoder)
    before = state_of(handle)
    parameters = handle.train_extraction("german")
    assert handle.in_use == "german"
    expected = sum(p.numel() for p in handle.layers[0].bank["us"].parameters())
    assert sum(p.numel() for p in parameters) == 3 * expected
    train(encoder, handle, x)
    for name, tensor in state_of(handle).items():
        moved = not torch.equal(tensor, before[name])
        assert moved == ("adapter_german" in name), name


@pytest.mark.parametrize("mode", ["ST-A", "MT-A"])
def test_composition(encoder, x, mode):
    handle = inserted(encoder)
    handle.add_adapter("later")
    handle.requires_grad_(False)
    before = state_of(handle)
    handle.train_composition(mode)
    assert handle.in_use == "combined"
    train(encoder, handle, x)
    for name, tensor in state_of(handle).items():
        moves = "combination" in name and "combined_names" not in name
        moves |= mode == "MT-A" and "bank" in name and "later" not in name
        assert torch.equal(tensor, before[name]) != moves, name


def test_every_trained_parameter_gets_a_gradient(encoder, x):
    # What DDP asks for: no unused parameters.
    for combination in ("mean", "weighted_mean", "fusion"):
        handle = inserted(encoder, combination)
        handle.train_composition("MT-A")
        encoder.train()
        encoder(x).square().sum().backward()
        assert all(p.grad is not None for p in handle.trained_parameters())
        handle.train_extraction("us")
        encoder(x).square().sum().backward()
        assert all(p.grad is not None for p in handle.trained_parameters())
        handle.remove()


def test_a_fifth_adapter_leaves_the_first_ones_alone(encoder, x):
    handle = inserted(encoder, "fusion")
    outputs = {}
    choices = [*NAMES, "combined", ["us", "indian", None]]
    for choice in choices:
        handle.use(choice)
        outputs[str(choice)] = encoder(x)
    before = state_of(handle)
    handle.add_adapter("scottish")
    handle.add_adapter("wide one", bottleneck=9)
    for name in ("scottish", "wide one"):
        handle.train_extraction(name)
        train(encoder, handle, x)
    after = state_of(handle)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for choice in choices[:-1]:
        handle.use(choice)
        assert torch.equal(encoder(x), outputs[str(choice)]), choice
    assert handle.combined_names == NAMES
    handle.remove_adapter("wide one")
    handle.use(choices[-1])
    assert torch.equal(encoder(x), outputs[str(choices[-1])])
    handle.remove_adapter("scottish")
    assert same(state_of(handle), before)


@pytest.mark.parametrize("tensor", [False, True])
def test_mixed_batch_equals_singles(encoder, x, tensor):
    handle = inserted(encoder)
    choice = ["indian", None, "us"]
    if tensor:
        handle.use(torch.tensor([2, -1, 0]))
    else:
        handle.use(choice)
    mixed = encoder(x)
    for row, name, got in zip(x, choice, mixed):
        handle.use(name)
        torch.testing.assert_close(got, encoder(row[None])[0])


def test_positions_are_those_of_the_time_of_the_choice(encoder, x):
    handle = inserted(encoder)
    buffer = torch.zeros(3, dtype=torch.long)
    for position in (0, 2):  # the next batch's, in the same tensor
        handle.use(buffer.fill_(position))
        buffer.fill_(1)
        got = encoder(x)
        handle.use([NAMES[position]] * 3)
        assert torch.equal(got, encoder(x))


def test_mixed_batch_trains_like_singles(encoder, x):
    handle = inserted(encoder)
    choice = ["indian", "us", "indian"]
    handle.train_extraction(["us", "indian"])
    encoder.eval()  # no dropout
    handle.use(choice)
    encoder(x).square().sum().backward()
    mixed = [p.grad.clone() for p in handle.trained_parameters()]
    handle.zero_grad()
    for row, name in zip(x, choice):
        handle.use(name)
        encoder(row[None]).square().sum().backward()
    for got, parameter in zip(mixed, handle.trained_parameters()):
        torch.testing.assert_close(got, parameter.grad, atol=1e-4, rtol=1e-4)
    assert all(
        p.grad is None for p in handle.layers[0].bank["german"].parameters()
    )


def test_ragged_batch_equals_singles(encoder):
    handle = inserted(encoder)
    handle.use("combined")
    layer = encoder.layers[1]
    x = torch.randn(2, 6, 8)
    frozen = layer.mix
    layer.mix = torch.nn.Identity()  # only the adapters are looked at
    whole = layer(x)[0]
    torch.testing.assert_close(whole[1, :4], layer(x[1:, :4])[0][0])
    layer.mix = frozen


@pytest.mark.parametrize("combination", ["mean", "weighted_mean", "fusion"])
def test_fold_equals_unfold(encoder, x, combination):
    handle = inserted(encoder, combination)
    handle.use("combined")
    handle.requires_grad_(True)
    plain = encoder(x)
    handle.fold()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), plain, atol=1e-5, rtol=1e-5)
        for layer in handle.layers:
            scramble(layer.bank, seed=8)
        folded = encoder(x)
        torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-5)
        handle.unfold()
        assert not torch.allclose(encoder(x), folded, atol=1e-3)
    for unfold in (
        lambda: handle.train_composition("MT-A"),
        encoder.train,  # after a validation with folded weights
    ):
        handle.zero_grad()
        handle.fold()
        encoder.eval()(x)
        unfold()
        encoder(x).sum().backward()
        assert all(p.grad is not None for p in handle.trained_parameters())


def test_attention_over_valid_frames(encoder, x):
    handle = inserted(encoder)
    with pytest.raises(ValueError, match="combined no batch yet"):
        handle.attention()
    handle.use("combined")
    encoder(x)
    lens = torch.tensor([1.0, 3 / 7, 5 / 7])
    got = handle.attention(lens)
    assert got.shape == (3, 3)
    torch.testing.assert_close(got.sum(1), torch.ones(3))
    for row, layer in zip(got, handle.layers):
        weights = layer.combination.last_weights
        frames = [weights[0, :7], weights[1, :3], weights[2, :5]]
        torch.testing.assert_close(row, torch.cat(frames).mean(0))
    whole = handle.attention()
    assert not torch.allclose(whole, got)
    with pytest.raises(ValueError, match="2 lengths for a batch of"):
        handle.attention(torch.ones(2))
    stats = attention_stats(got, handle.combined_names)
    assert list(stats) == [f"attention {name}" for name in NAMES]
    assert sum(stats.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("nested", [False, True])
def test_attention_leaves_out_what_the_mask_does(nested):
    """Without lengths, too; also where torch takes its path of ragged rows."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = torch.nn.TransformerEncoder(
        layer, 2, enable_nested_tensor=nested
    ).eval()
    made = AudioAdapterFusion(guided=True)
    handle = insert_adapters(encoder, NAMES, bottleneck=4, combination=made)
    scramble(handle, scale=3.0)
    handle.use("combined")
    x, frames = torch.randn(3, 10, 8), (10, 2, 5)
    tasks = ["us", "german", "us"]
    padding = torch.arange(10) >= torch.tensor(frames)[:, None]
    single, costs = [], []
    for number, (row, count) in enumerate(zip(x, frames)):
        # Alone, and as often as it has frames.
        with torch.no_grad():
            encoder(row[None, :count])
        single.append(count * handle.attention())
        costs.append(count * handle.attention_loss([tasks[number]]))
    grad = torch.no_grad() if nested else torch.enable_grad()
    with grad:
        encoder(x, src_key_padding_mask=padding)
    expected = sum(single) / sum(frames)
    assert handle.attention().allclose(expected, atol=1e-5)
    lens = torch.tensor(frames) / 10
    assert handle.attention(lens).allclose(expected, atol=1e-5)
    loss = handle.attention_loss(tasks)
    assert loss.item() == pytest.approx(float(sum(costs) / sum(frames)), 1e-4)
    # A batch without a mask is not read by that of the last one.
    x = torch.randn(3, 10, 8)
    encoder(x)
    for row, layer in zip(handle.attention(), handle.layers):
        weights = layer.combination.last_weights.flatten(0, 1)
        torch.testing.assert_close(row, weights.mean(0))
    copy.deepcopy(encoder)


def test_attention_of_averages_is_their_weights(encoder):
    assert (
        inserted(encoder, "mean").attention().tolist()
        == [[pytest.approx(1 / 3)] * 3] * 3
    )


def test_plot(tmp_path):
    path = plot_attention(torch.eye(2), ["a", "b"], tmp_path / "a.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"\[layers, 3\] for a, b, c"):
        plot_attention(torch.eye(2), ["a", "b", "c"], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_leaving_a_task_out(encoder, x):
    handle = inserted(encoder)
    handle.set_combination("fusion", names=["us", "indian"])
    handle.train_composition("ST-A")
    assert encoder(x).shape == (3, 7, 8)
    assert handle.attention().shape == (3, 2)
    handle.remove_adapter("german")
    with pytest.raises(ValueError, match="combines 'us'; set_combination"):
        handle.remove_adapter("us")
    handle.set_combination(None)
    assert handle.in_use is None and handle.combined_names is None
    handle.remove_adapter("us")
    assert handle.names == ["indian"]


@pytest.mark.parametrize(
    "combination, kind",
    [
        ("mean", AdapterMean),
        (AdapterWeightedMean(normalize=False), AdapterWeightedMean),
        (AudioAdapterFusion, AudioAdapterFusion),
        (
            lambda bank, **o: AudioAdapterFusion(bank, True, "small", **o),
            AudioAdapterFusion,
        ),
    ],
)
def test_ways_to_say_which_combination(encoder, combination, kind):
    handle = insert_adapters(encoder, NAMES, combination=combination)
    made = [layer.combination for layer in handle.layers]
    assert all(type(m) is kind for m in made)
    assert len({id(p) for m in made for p in m.parameters()}) == sum(
        1 for m in made for _ in m.parameters()
    )
    for layer, own in zip(handle.layers, made):
        assert own.bank is layer.bank
    if isinstance(combination, AdapterWeightedMean):
        assert not made[0].normalize
    handle.set_combination(combination, names=["us"])
    assert handle.combined_names == ["us"]


def test_untrained_adapters_are_named(encoder, caplog):
    handle = insert_adapters(encoder, NAMES, combination="fusion")
    scramble(handle.layers[2].bank["us"])
    with caplog.at_level(logging.WARNING):
        handle.train_composition("ST-A")
    assert "never trained: german, indian" in caplog.text


def test_parameter_counts(encoder):
    base = sum(p.numel() for p in encoder.parameters())
    handle = inserted(encoder)
    one = 3 * (2 * 8 * 4 + 4 + 8 + 2 * 8)
    fusion = 3 * (3 * 8 * 8 + 8 + 2 * 8)
    handle.train_extraction("us")
    counts = handle.count_parameters()
    assert counts == {
        "base": base,
        "adapters": 3 * one,
        "combination": fusion,
        "trained": one,
        "share": pytest.approx(100 * one / base),
    }
    handle.train_composition("MT-A")
    assert handle.count_parameters()["trained"] == 3 * one + fusion
    handle.train_nothing()
    assert handle.count_parameters()["trained"] == 0


@pytest.mark.parametrize("refused", [False, True])
def test_modes_come_back(encoder, refused):
    front = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    both = torch.nn.ModuleList([encoder, front])
    both.train()
    for module in (encoder.layers[0].statistics, encoder.layers[1], front[1]):
        module.eval()
    modes = [module.training for module in both.modules()]
    if refused:
        with pytest.raises(FileNotFoundError):
            insert_adapters(encoder, NAMES, freeze=front, load="none")
    else:
        insert_adapters(encoder, NAMES, freeze=front).remove()
    assert [module.training for module in both.modules()] == modes
    for mode in (False, True):
        handle = insert_adapters(encoder, NAMES, freeze=front)
        both.train(mode)
        handle.remove()
        assert all(module.training == mode for module in both.modules())


def test_requires_grad_comes_back(encoder):
    encoder.front.weight.requires_grad_(False)
    handle = inserted(encoder)
    head = torch.nn.Linear(2, 2)
    handle.freeze(head)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not head.weight.requires_grad
    handle.remove()
    assert encoder.front.bias.requires_grad and head.weight.requires_grad
    assert not encoder.front.weight.requires_grad
    assert not hasattr(encoder, "task_adapters")
    assert insert_adapters(encoder, ["again"]).names == ["again"]


def test_copies_are_apart(encoder, x):
    handle = inserted(encoder)
    handle.use("us")
    before = encoder(x)
    other = copy.deepcopy(encoder)
    twin = other.task_adapters
    assert torch.equal(other(x), before)
    scramble(twin, seed=5)
    twin.use("combined")
    assert handle.in_use == "us" and torch.equal(encoder(x), before)
    assert not torch.allclose(other(x), before)
    twin.remove()
    handle.use(None)
    assert torch.equal(other(x), encoder(x))


def test_state_dicts(encoder, x):
    plain = state_of(encoder)
    handle = inserted(encoder)
    handle.use("combined")
    before, own = encoder(x), state_of(handle)
    # A checkpoint of the base alone leaves the adapters as they are, ...
    encoder.load_state_dict(plain)
    torch.nn.ModuleList([encoder]).load_state_dict(
        {f"0.{name}": tensor for name, tensor in plain.items()}
    )
    assert torch.equal(encoder(x), before)
    # ... one with them brings them, and half of them is an error.
    both = state_of(encoder)
    scramble(handle, seed=6)
    encoder.load_state_dict(both)
    assert torch.equal(encoder(x), before) and same(state_of(handle), own)
    del both["task_adapters.layers.1.bank.adapter_us.up.bias"]
    with pytest.raises(RuntimeError, match="adapter_us.up.bias"):
        encoder.load_state_dict(both)
    with pytest.raises(RuntimeError, match="Missing"):
        handle.load_state_dict({})


def test_sequential_encoder_calls_its_children(x):
    torch.manual_seed(0)
    layers = [
        torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
        for _ in range(2)
    ]
    encoder = torch.nn.Sequential(*layers)
    base = encoder(x)
    handle = insert_adapters(encoder, ["a"], layers="?", bottleneck=2)
    scramble(handle)
    assert torch.equal(encoder(x), base)
    handle.use("a")
    assert not torch.allclose(encoder(x), base)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_layers(encoder, x, half):
    encoder.to(half)
    handle = inserted(encoder)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    encoder.eval()
    for choice in (None, "us", "combined", ["us", None, "german"]):
        handle.use(choice)
        out = encoder(x.to(half))
        assert out.dtype == half
        # float32 inside: the same as from a layer that computes so.
        if choice == "us":
            layer = handle.layers[0]
            y = out.detach()
            wanted = y.float() + layer.bank["us"](y.float())
            assert torch.equal(layer(y), wanted.to(half))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_bases_train(encoder, x, half, late):
    if not late:
        encoder.to(half)
    handle = inserted(encoder)
    if late:  # adapters in half as well, until they are trained
        encoder.to(half)
        handle.use("combined")
        assert encoder(x.to(half)).dtype == half
    for train in (handle.train_extraction, handle.train_composition):
        parameters = train("us" if "ext" in train.__name__ else "MT-A")
        before = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        encoder.train()
        for _ in range(3):
            optimizer.zero_grad()
            loss = encoder(x.to(half)).float().square().mean()
            assert torch.isfinite(loss)
            loss.backward()
            optimizer.step()
        for old, new in zip(before, parameters):
            assert new.dtype == torch.float32 and torch.isfinite(new).all()
            assert (new != old).float().mean() > 0.5
    handle.half().float()
    assert torch.isfinite(encoder(x.to(half))).all()


@pytest.mark.parametrize("kind", ["fusion", "weighted_mean"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_whatever_is_trained_after_half(encoder, x, half, kind):
    handle = insert_adapters(
        encoder, ["us", "german"], bottleneck=4, combination=kind
    )
    for train, what in (
        (handle.train_extraction, "german"),
        (handle.train_composition, "ST-A"),
        (handle.train_composition, "MT-A"),
    ):
        encoder.to(half)
        parameters = train(what)
        encoder(x.to(half)).float().square().mean().backward()
        assert {p.dtype for p in parameters} == {torch.float32}
        assert any(p.grad is not None for p in parameters)


@pytest.mark.parametrize("dim", [None, 2])
@pytest.mark.parametrize("choice", ["us", "combined", "mixed"])
def test_autocast(encoder, x, choice, dim):
    handle = inserted(encoder, AudioAdapterFusion(attention_dim=dim))
    handle.train_composition("MT-A")
    handle.use(["us", None, "german"] if choice == "mixed" else choice)
    exact = encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(x)
        rough.float().square().mean().backward()
        with torch.no_grad():
            folded = encoder(x)
    assert (rough - exact).norm() < 0.05 * exact.norm()
    assert (folded - exact).norm() < 0.05 * exact.norm()
    # What is kept for later is of the parameters' own precision.
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), exact, atol=1e-4, rtol=1e-4)
    got = [p.grad for p in handle.parameters() if p.grad is not None]
    assert got and all(torch.isfinite(g).all() for g in got)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(encoder, x, reentrant):
    from torch.utils.checkpoint import checkpoint

    handle = inserted(encoder)
    handle.train_composition("ST-A")
    gradients = []
    for wrap in (False, True):
        handle.zero_grad()
        hidden = encoder.front(x).requires_grad_()
        for layer in encoder.layers:
            if wrap:
                hidden = checkpoint(layer, hidden, use_reentrant=reentrant)[0]
            else:
                hidden = layer(hidden)[0]
        hidden.square().sum().backward()
        gradients.append([p.grad.clone() for p in handle.trained_parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("teacher", ["none", "first", "last"])
def test_a_backward_pass_after_the_with(encoder, x, reentrant, teacher):
    from torch.utils.checkpoint import checkpoint

    handle = inserted(encoder)
    handle.train_extraction("us")
    handle.use(None)
    plain, gradients = encoder.forward, []

    def checkpointed(x):
        x = encoder.front(x).requires_grad_()
        for layer in encoder.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)[0]
        return x

    def base():
        with torch.no_grad(), handle.use(None):
            return plain(x)

    for forward in (plain, checkpointed):
        handle.zero_grad()
        wanted = base() if teacher == "first" else 0.0
        encoder.forward = forward
        with handle.use("us"):
            found = encoder(x)
        if teacher == "last":
            wanted = base()
        (found - wanted).square().sum().backward()
        gradients.append([p.grad.clone() for p in handle.trained_parameters()])
    assert handle.in_use is None
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("frozen, warnings", [(False, 0), (True, 1)])
def test_a_wrapper_without_gradients_is_told_from_checkpointing(
    encoder, x, frozen, warnings, caplog
):
    from torch.utils.checkpoint import checkpoint

    def forward(x):
        x = encoder.front(x).requires_grad_()
        for layer in encoder.layers:
            x = checkpoint(layer, x, use_reentrant=True)[0]
        return x

    inserted(encoder).train_composition("ST-A")
    encoder.forward = forward  # runs its layers without gradients first
    with torch.set_grad_enabled(not frozen):
        encoder.train()(x)
    said = [r for r in caplog.records if "learn nothing" in r.getMessage()]
    assert len(said) == warnings


def exported(encoder, x):
    return torch.export.export(encoder, (x,)).module()


def traced(encoder, x):
    return torch.jit.trace(encoder, (x,))


def compiled(encoder, x):
    torch._dynamo.reset()
    return torch.compile(encoder, backend="eager", fullgraph=True)


@pytest.mark.parametrize("how", [compiled, exported, traced])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("combination", ["mean", "fusion"])
def test_graphs_of_the_combination(encoder, x, how, folded, combination):
    handle = inserted(encoder, combination=combination)
    encoder.eval()
    handle.use("combined")
    with torch.no_grad():
        wanted = encoder(x)
        if folded:
            handle.fold()
        run = how(encoder, x)
        torch.testing.assert_close(run(x), wanted, atol=1e-4, rtol=1e-4)
        # And eager again, by the packed weights.
        torch.testing.assert_close(encoder(x), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("combination", ["mean", "weighted_mean", "fusion"])
def test_quantised_encoders_and_adapters(encoder, x, combination):
    handle = inserted(encoder, combination=combination)
    encoder.eval()
    handle.use("combined")
    with torch.no_grad():
        exact = encoder(x)
        small = torch.ao.quantization.quantize_dynamic(
            encoder, {torch.nn.Linear}, torch.qint8
        )
        small.task_adapters.use("combined")
        for _ in range(2):
            rough = small(x)
            assert (rough - exact).norm() < 0.1 * exact.norm()
            small.task_adapters.fold()
        small.task_adapters.use(["us", None, "german"])
        mixed = small(x)
        handle.use(["us", None, "german"])
        assert (mixed - encoder(x)).norm() < 0.1 * exact.norm()


@pytest.mark.slow
def test_compile(encoder, x):
    handle = inserted(encoder)
    results = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        run = encoder
        if compiled:
            run = torch.compile(encoder, backend="aot_eager")
        for choice in ("us", "combined"):
            handle.train_composition("MT-A")
            handle.use(choice)
            handle.zero_grad()
            out = run(x)
            out.square().sum().backward()
            bank = handle.layers[0].bank
            with torch.no_grad():
                results[compiled, choice] = (
                    out.detach(),
                    bank["us"].up.weight.grad.clone(),
                    run(x),
                )
    for choice in ("us", "combined"):
        for one, other in zip(results[False, choice], results[True, choice]):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"names": []}, "at least one"),
        ({"names": ["a", "a"]}, "'a' already"),
        ({"layers": "*blocks.*"}, "matches no module name"),
        ({"layers": ["*layers.*", "x"]}, "'x' matches no module"),
        ({"d_model": 9}, "d_model is 9, but layer 'layers.0' has the width 8"),
        ({"layers": "front"}, "no LayerNorm to read its width off"),
        ({"combination": "median"}, "combination is 'median'"),
        ({"combination": 3}, "combination is 3"),
        ({"bottleneck": 0}, "bottleneck is 0"),
    ],
)
def test_bad_insertion_leaves_the_model_alone(encoder, x, arguments, message):
    base, before = encoder(x), state_of(encoder)
    flags = [p.requires_grad for p in encoder.parameters()]
    given = {"names": NAMES, **arguments}
    with pytest.raises(ValueError, match=message):
        insert_adapters(encoder, **given)
    assert same(state_of(encoder), before)
    assert [p.requires_grad for p in encoder.parameters()] == flags
    assert not any(m._forward_hooks for m in encoder.modules())
    assert torch.equal(encoder(x), base)


def test_bad_choices_leave_the_choice_alone(encoder, x):
    handle = inserted(encoder, None)
    handle.use("us")
    for choice, message in [
        ("french", "no adapter 'french'; there are 'us'"),
        (["us", "x", "us"], "no adapter 'x'"),
        ("combined", "no combination"),
        (torch.tensor([0, 3, 0]), "go from 0 to 3; expected -1"),
        (torch.tensor([-2]), "go from -2 to -2"),
        (torch.tensor([0.0]), "expected whole numbers"),
        (torch.tensor([[0]]), "expected whole numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            handle.use(choice)
        assert handle.in_use == "us"
    for call in (
        lambda: handle.train_composition("ST-A"),
        handle.fold,
        handle.attention,
        lambda: handle.train_extraction("x"),
        lambda: handle.add_adapter("us"),
        lambda: handle.remove_adapter("x"),
        lambda: handle.set_combination("fusion", names=["x"]),
        lambda: insert_adapters(encoder, ["new"]),
    ):
        with pytest.raises(ValueError):
            call()
        assert handle.in_use == "us" and handle.names == NAMES
    handle.use(["us", "german"])
    with pytest.raises(ValueError, match="layer 'layers.0': 2 utterance"):
        encoder(x)
    handle.set_combination("mean")
    with pytest.raises(ValueError, match="expected 'ST-A' or 'MT-A'"):
        handle.train_composition("all")


def test_layers_that_return_something_else(x):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 5)])
            self.answer = None

        def forward(self, x):
            return self.layers[0](x)

    encoder = Odd()
    handle = insert_adapters(encoder, ["a"], d_model=4)
    encoder(x)
    handle.use("a")
    with pytest.raises(ValueError, match=r"'layers.0' returns \(3, 7, 5\)"):
        encoder(x)


def test_attention_loss_is_the_mean_log_weight_of_the_own_adapter(encoder, x):
    handle = inserted(encoder, AudioAdapterFusion(guided=True))
    handle.train_composition("ST-A")
    tasks, lens = ["us", "indian", "us"], torch.tensor([1.0, 3 / 7, 5 / 7])
    encoder(x)
    costs = []
    for layer in handle.layers:
        weights = layer.combination.last_weights
        of_layer = [
            -float(weights[b, t, NAMES.index(task)].log())
            for b, task in enumerate(tasks)
            for t in range(round(float(lens[b]) * 7))
        ]
        costs.append(sum(of_layer) / len(of_layer))
    loss = handle.attention_loss(tasks, lens).item()
    assert loss == pytest.approx(sum(costs) / len(costs), rel=1e-5)
    optimizer = torch.optim.SGD(handle.trained_parameters(), 0.5)
    for _ in range(20):
        optimizer.zero_grad()
        encoder(x)
        handle.attention_loss(tasks, lens).backward()
        optimizer.step()
    encoder(x)
    assert handle.attention_loss(tasks, lens).item() < loss
    copy.deepcopy(encoder)  # what is kept has a graph, copies leave it


def test_attention_loss_says_what_is_wrong(encoder, x):
    handle = inserted(encoder)
    handle.use("combined")
    encoder(x)
    with pytest.raises(ValueError, match="guided=True"):
        handle.attention_loss(["us"] * 3)
    handle.set_combination(AudioAdapterFusion(guided=True))
    with pytest.raises(ValueError, match="kept no attention"):
        handle.attention_loss(["us"] * 3)
    encoder(x)
    with pytest.raises(ValueError, match="2 tasks for a batch"):
        handle.attention_loss(["us"] * 2)
    with pytest.raises(ValueError, match="greek"):
        handle.attention_loss(["us", "us", "greek"])
