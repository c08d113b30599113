"""Adapters and their combinations against the formulas, frame by frame."""

import copy
import itertools

import numpy as np
import pytest
import torch
from adapters_toy import (
    make_bank,
    naive_adapter,
    naive_fusion,
    naive_norm,
    numbers,
    scramble,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_taskarith.adapters import (
    AdapterBank,
    AdapterMean,
    AdapterWeightedMean,
    AudioAdapterFusion,
    BottleneckAdapter,
)

FORMS = ("loop", "stacked", "collapsed", "folded")
KINDS = {
    "mean": AdapterMean,
    "weighted": AdapterWeightedMean,
    "free": lambda bank, **o: AdapterWeightedMean(bank, False, **o),
    "fusion": AudioAdapterFusion,
    "scaled": lambda bank, **o: AudioAdapterFusion(bank, scaled=True, **o),
    # Two thin products, and one that is wider than d.
    "narrow": lambda bank, **o: AudioAdapterFusion(bank, attention_dim=2, **o),
    "broad": lambda bank, **o: AudioAdapterFusion(
        bank, scaled=True, attention_dim=11, **o
    ),
}
FUSIONS = ("fusion", "scaled", "narrow", "broad")


def made(kind, bank, **others):
    combination = KINDS[kind](bank, **others).to(torch.float64)
    scramble(combination, seed=9)
    return combination


def naive(kind, combination, frame):
    if kind in FUSIONS:
        return naive_fusion(combination, frame)[0]
    weights = np.full(len(combination.names), 1 / len(combination.names))
    if kind == "weighted":
        weights = np.exp(numbers(combination.logits))
        weights = weights / weights.sum()
    elif kind == "free":
        weights = numbers(combination.logits)
    outputs = [
        naive_adapter(combination.bank[name], frame)
        for name in combination.names
    ]
    return sum(w * a for w, a in zip(weights, outputs))


@pytest.mark.parametrize("layer_norm", [True, False])
def test_adapters_follow_the_formula(layer_norm):
    bank = make_bank(layer_norm=layer_norm)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    each = bank.each(x)
    assert each.shape == (2, 3, 3, 8)
    assert torch.equal(bank(x), each)
    for b, t, n in itertools.product(range(2), range(3), range(3)):
        expected = naive_adapter(bank[f"task {n}"], x[b, t].numpy())
        np.testing.assert_allclose(numbers(each[b, t, n]), expected, atol=1e-12)
        alone = bank[f"task {n}"](x)[b, t]
        np.testing.assert_allclose(numbers(alone), expected, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    number=st.integers(1, 5),
    width=st.integers(2, 9),
    bottleneck=st.integers(1, 5),
    ln_init=st.sampled_from([None, "one", "small", "zero"]),
    layer_norm=st.booleans(),
)
def test_every_form_follows_the_formula(
    kind, number, width, bottleneck, ln_init, layer_norm
):
    bank = make_bank(number, width, bottleneck, layer_norm=layer_norm)
    combination = made(kind, bank, ln_init=ln_init)
    x = torch.randn(2, 3, width, dtype=torch.float64)
    expected = np.stack(
        [naive(kind, combination, f) for f in x.flatten(0, 1).numpy()]
    ).reshape(x.shape)
    for form in FORMS:
        got = numbers(combination.combine(x, form))
        np.testing.assert_allclose(got, expected, atol=1e-10, err_msg=form)
    if ln_init is not None:
        expected = np.stack(
            [naive_norm(combination.norm, o) for o in expected.reshape(6, -1)]
        ).reshape(x.shape)
    got = numbers(combination(x))
    # LN divides by the spread of o, which two entries can make tiny.
    np.testing.assert_allclose(got, numbers(x) + expected, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_float32_forms_agree_within_the_documented_tolerance(kind):
    bank = make_bank(8, 64, 16, dtype=torch.float32)
    combination = made(kind, bank).to(torch.float32)
    x = torch.randn(2, 50, 64)
    exact = copy.deepcopy((bank, combination))
    exact[0].double()
    exact[1].double()
    reference = exact[1].combine(x.double(), "loop")
    for form in FORMS:
        with torch.no_grad():
            error = combination.combine(x, form) - reference
        assert error.norm() <= 1e-5 * reference.norm(), form


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_loop(kind, form, dtype):
    bank = make_bank(dtype=dtype)
    combination = made(kind, bank, ln_init="one").to(dtype)
    gradients = {}
    for which in ("loop", form):
        x = torch.randn(
            2, 3, 8, dtype=dtype, generator=torch.manual_seed(1)
        ).requires_grad_()
        combination(x, which).square().sum().backward()
        found = [x.grad]
        for parameter in [*bank.parameters(), *combination.parameters()]:
            found.append(parameter.grad)
            parameter.grad = None
        gradients[which] = found
    exact = dtype == torch.float64
    for expected, got in zip(gradients["loop"], gradients[form]):
        torch.testing.assert_close(
            got,
            expected,
            atol=1e-9 if exact else 1e-3,
            rtol=1e-7 if exact else 1e-3,
        )


@pytest.mark.parametrize("kind", ["weighted", "fusion", "narrow"])
def test_gradcheck(kind):
    bank = make_bank(2, 4, 3)
    combination = made(kind, bank, ln_init="one", form="collapsed")
    parameters = dict(combination.named_parameters())
    adapters = dict(bank.named_parameters())
    names = list(adapters)
    x = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)

    def function(x, *values):
        split = len(names)
        with _swapped(bank, dict(zip(names, values[:split]))):
            return torch.func.functional_call(
                combination, dict(zip(parameters, values[split:])), (x,)
            )

    values = [*adapters.values(), *parameters.values()]
    assert torch.autograd.gradcheck(function, (x, *values))


class _swapped:
    """Other tensors in place of a module's parameters, for a while."""

    def __init__(self, module, values):
        self.module, self.values = module, values

    def __enter__(self):
        self.before = {}
        for name, value in self.values.items():
            owner, _, attribute = name.rpartition(".")
            owner = self.module.get_submodule(owner)
            self.before[name] = (owner, attribute, owner._parameters[attribute])
            owner._parameters[attribute] = value

    def __exit__(self, *exception):
        for owner, attribute, value in self.before.values():
            owner._parameters[attribute] = value


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_adapters_does_not_matter(kind, form):
    bank = make_bank(4)
    one = made(kind, bank)
    order = [2, 0, 3, 1]
    other = one.for_bank(bank, [f"task {i}" for i in order]).double()
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(one(x, form), other(x, form))


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize("form", FORMS)
def test_one_adapter_alone_is_v_a(form, kind):
    bank = make_bank(1)
    fusion = made(kind, bank)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = bank["task 0"](x) @ fusion.value.weight.T
    torch.testing.assert_close(fusion.combine(x, form), expected)
    assert torch.equal(fusion.last_weights, torch.ones(2, 3, 1).double())


def test_the_mean_is_divided_by_n_once():
    bank = make_bank(4)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(
        AdapterMean(bank).combine(x), bank.each(x).mean(-2)
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_adapters_of_different_widths(kind):
    bank = make_bank(2)
    scramble(bank.add("wide", 7), seed=5)
    scramble(bank.add("narrow", 1), seed=6)
    combination = made(kind, bank)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    reference = combination(x, "loop")
    for form in FORMS[1:]:
        torch.testing.assert_close(combination(x, form), reference)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("activation", ["GELU", "Tanh", "Sigmoid"])
def test_other_activations(kind, activation):
    # Of a narrow adapter's padding sigmoid gives 1/2, not 0.
    bank = make_bank(2, activation=getattr(torch.nn, activation))
    scramble(bank.add("wide", 7), seed=5)
    combination = made(kind, bank)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    for form in FORMS[1:]:
        torch.testing.assert_close(combination(x, form), combination(x, "loop"))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("form", FORMS)
def test_ragged_batch_equals_singles(kind, form):
    # Frame-wise: padding, even of NaN, must reach nothing else.
    bank = make_bank()
    combination = made(kind, bank)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    lengths = [6, 1, 4]
    for row, length in zip(x, lengths):
        row[length:] = torch.nan
    whole = combination(x, form)
    for row, length, got in zip(x, lengths, whole):
        alone = combination(row[None, :length], form)[0]
        torch.testing.assert_close(got[:length], alone)


@pytest.mark.parametrize("form", FORMS)
def test_no_frames(form):
    fusion = made("fusion", make_bank())
    for shape in ((0, 5, 8), (2, 0, 8)):
        x = torch.zeros(shape, dtype=torch.float64)
        assert fusion(x, form).shape == shape


def test_routing_by_utterance():
    bank = make_bank(4)
    x = torch.randn(5, 6, 8, dtype=torch.float64)
    index = torch.tensor([3, 0, 0, 2, 3])
    got = bank.routed(x, index)
    for row, i, found in zip(x, index, got):
        torch.testing.assert_close(found, bank[f"task {i}"](row))


def test_auto_is_collapsed_where_trained_and_folded_elsewhere(monkeypatch):
    fusion = made("fusion", make_bank())
    asked = []
    for form in FORMS:
        monkeypatch.setattr(
            fusion, f"_as_{form}", lambda x, f=form: asked.append(f) or x
        )
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    fusion.combine(x)
    with torch.no_grad():
        fusion.combine(x)
    fusion.requires_grad_(False)
    fusion.combine(x)
    fusion.bank.requires_grad_(False)
    fusion.combine(x)
    fusion.combine(x, "loop")
    expected = ["collapsed", "folded", "collapsed", "folded", "loop"]
    assert asked == expected


# With w = N b = 12 and d = 8 both forms cost as much at w frames where the
# adapters train, at 2 w d / (3 d - w) = 16 where they do not; 1.5 times that.
# With queries of width a = 2 at w (2 d + 5 a) / (3 (d + 2 a) - 2 w) = 26.
@pytest.mark.parametrize(
    "kind, mode, last",
    [
        ("fusion", "MT-A", 18),
        ("fusion", "ST-A", 24),
        ("narrow", "MT-A", 18),
        ("narrow", "ST-A", 39),
        ("broad", "ST-A", 24),
    ],
)
@pytest.mark.parametrize("more", [0, 1])
def test_training_folds_where_a_batch_has_more_frames(
    kind, mode, last, more, monkeypatch
):
    fusion = made(kind, make_bank(3, 8, 4)).train()
    fusion.bank.requires_grad_(mode == "MT-A")
    shape = (last + more,) if more else (last // 6, 6)
    x = torch.randn(*shape, 8, dtype=torch.float64)
    asked, folded = [], fusion._as_folded
    monkeypatch.setattr(
        fusion, "_as_folded", lambda x: asked.append("folded") or folded(x)
    )
    fusion(x).square().sum().backward()
    assert bool(asked) == bool(more)
    parameters = [*fusion.bank.parameters(), *fusion.parameters()]
    parameters = [p for p in parameters if p.requires_grad]
    found = [p.grad.clone() for p in parameters]
    fusion.zero_grad(), fusion.bank.zero_grad()
    fusion(x, "loop").square().sum().backward()
    for gradient, parameter in zip(found, parameters):
        torch.testing.assert_close(gradient, parameter.grad)


def test_wide_adapters_that_do_not_train_are_never_folded_in_training():
    fusion = made("fusion", make_bank(3, 8, 8)).train()
    fusion.bank.requires_grad_(False)
    x = torch.randn(1000, 8, dtype=torch.float64)
    fusion._as_folded = None  # not called
    fusion(x).square().sum().backward()


def test_folded_weights_follow_the_parameters():
    fusion = made("fusion", make_bank())
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    moved = copy.deepcopy(fusion.state_dict())
    with torch.no_grad():
        first = fusion(x)
        fusion.bank["task 0"].up.weight.mul_(2)
        second = fusion(x)
        torch.testing.assert_close(second, fusion(x, "loop"))
        assert not torch.allclose(first, second)
        fusion.query.weight.add_(1)
        torch.testing.assert_close(fusion(x), fusion(x, "loop"))
        fusion.fold()
        fusion.load_state_dict(moved)
        torch.testing.assert_close(fusion(x), second)
        # An optimizer's step, as well.
        fusion(x)
    optimizer = torch.optim.SGD(fusion.parameters(), 0.1)
    fusion(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(fusion(x), fusion(x, "loop"))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("write", ["data", "numpy", "swap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_that_move_no_version_counter_are_seen(kind, write, dtype):
    bank = make_bank(3, 16, 4, dtype=dtype)
    combination = made(kind, bank).to(dtype)
    x = torch.randn(2, 9, 16, dtype=dtype)
    with torch.no_grad():
        first = combination(x)
        combination(x, "collapsed")
        for parameter in (p for n in bank.names for p in bank[n].parameters()):
            if write == "data":
                parameter.data.mul_(0.5)
            elif write == "numpy":
                parameter.detach().view(torch.int16).numpy()[...] = 0
            else:
                parameter.data = torch.zeros_like(parameter)
        expected = combination(x, "loop")
        assert not torch.allclose(first, expected, atol=0.1)
        for form in ("folded", "collapsed", "stacked"):
            torch.testing.assert_close(
                combination(x, form), expected, atol=0.03, rtol=0.03
            )


@pytest.mark.parametrize("mode", [True, False])
def test_single_entries_are_seen_after_train_and_eval(mode):
    bank = make_bank(2, 64, 64, dtype=torch.float32)
    fusion = made("fusion", bank).float()
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        fusion(x)
        for row in range(64):
            bank["task 1"].up.weight.data[row, 1::9] += 3
        bank.train(mode), fusion.train(mode)
        torch.testing.assert_close(
            fusion(x), fusion(x, "loop"), atol=1e-3, rtol=1e-3
        )


def test_what_was_folded_under_inference_mode_trains_later():
    bank = make_bank().requires_grad_(False)
    fusion = made("fusion", bank)
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    with torch.inference_mode():
        fusion(x)
        fusion(x, "collapsed")
    fusion(x.clone().requires_grad_()).sum().backward()
    assert fusion.key.weight.grad is not None


def test_what_was_made_under_inference_mode_computes():
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    with torch.inference_mode():
        bank = make_bank()
        fusion = made("fusion", bank)
        before = fusion(x)
        torch.testing.assert_close(before, fusion(x, "loop"))
        # Nothing counts such a change.
        bank["task 1"].up.weight.mul_(3.0)
        torch.testing.assert_close(fusion(x), fusion(x, "loop"))
        assert not torch.allclose(fusion(x), before)


def test_folded_form_passes_gradients_to_its_input():
    bank = make_bank().requires_grad_(False)
    fusion = made("fusion", bank).requires_grad_(False)
    x = torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fusion(x, "folded"), (x,))


@pytest.mark.parametrize("kind", ["weighted", "fusion"])
def test_recomputing_gives_the_same_gradients_and_holds_less(kind):
    bank = make_bank(6, 16, 4)
    gradients, held = [], []
    state = made(kind, bank).state_dict()
    for recompute in (False, True):
        combination = made(kind, bank, recompute=recompute)
        combination.load_state_dict(state)
        x = torch.randn(
            2, 9, 16, dtype=torch.float64, generator=torch.manual_seed(1)
        ).requires_grad_()
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = combination.combine(x)
        held.append(sum(sizes.values()))
        out.square().sum().backward()
        parameters = [*bank.parameters(), *combination.parameters()]
        gradients.append([x.grad, *(p.grad for p in parameters)])
        bank.zero_grad()
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)
    assert held[1] < held[0] / 4


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_packed_weights_give_way_where_they_cannot_be_used(kind):
    bank = make_bank(3, 16, 4, dtype=torch.float32).requires_grad_(False)
    combination = made(kind, bank).float().requires_grad_(False)
    x = torch.randn(2, 9, 16)
    expected = combination(x, "loop")
    combination.fold()
    torch.testing.assert_close(combination(x), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = combination(x)
    assert (rough - expected).norm() < 0.05 * expected.norm()
    x.requires_grad_()
    combination(x).sum().backward()
    packed_gradient, x.grad = x.grad, None
    combination(x, "loop").sum().backward()
    torch.testing.assert_close(packed_gradient, x.grad, atol=1e-4, rtol=1e-4)
    twin = copy.deepcopy(combination)
    torch.testing.assert_close(twin(x), expected, atol=1e-4, rtol=1e-4)
    combination.double(), bank.double()
    torch.testing.assert_close(
        combination(x.double()), expected.double(), atol=1e-4, rtol=1e-4
    )


def test_penalty():
    bank = make_bank()
    fusion = AudioAdapterFusion(bank)
    assert fusion.penalty() == 0  # V starts at the identity
    with torch.no_grad():
        fusion.value.weight[0, 1] = 3.0
        fusion.value.weight[2, 2] = 0.0
    assert fusion.penalty().item() == pytest.approx(0.01 * (9 + 1))
    assert AdapterMean(bank).penalty() == 0


def test_starts_of_the_norm():
    bank = make_bank(dtype=torch.float32)
    x = torch.randn(2, 3, 8)
    gains = {
        start: AudioAdapterFusion(bank, ln_init=start).norm.weight[0].item()
        for start in ("one", "small", "zero")
    }
    assert gains == pytest.approx({"one": 1.0, "small": 0.1, "zero": 0.0})
    assert torch.equal(AudioAdapterFusion(bank, ln_init="zero")(x), x)
    assert AudioAdapterFusion(bank, ln_init=None).norm is None


def test_no_tensor_of_all_outputs_is_held():
    """What training keeps for the backward pass has no N d entries."""
    number, width, frames = 6, 32, 40
    bank = make_bank(number, width, 4, dtype=torch.float32)
    bank.requires_grad_(False)
    fusion = made("fusion", bank).float()
    x = torch.randn(1, frames, width, requires_grad=True)
    saved = {}

    def total(form):
        saved.clear()

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fusion(x, form)
        sizes = [n for n in saved.values() if n >= frames]
        return max(sizes), sum(sizes)

    largest, everything = total("collapsed")
    assert largest < frames * number * width
    assert everything < total("stacked")[1] / 2


def test_names_of_a_bank():
    bank = AdapterBank("only", 4)
    assert bank.names == ["only"] and "only" in bank and len(bank) == 1
    for name in ("en.us", "a%2Eb", "keys", "train", "bank", "português"):
        bank.add(name)
        assert bank[name].d_model == 4
    other = AdapterBank(bank.names, 4)
    other.load_state_dict(bank.state_dict())


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "at least one"),
        (["a", "b", "a"], "'a' already"),
        ([""], "cannot be the name"),
        (["combined"], "all of them together"),
        ([None], "cannot be the name"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(ValueError, match=message):
        AdapterBank(names, 4)


def test_bad_input_is_an_error_that_says_so():
    bank = make_bank(2)
    with pytest.raises(ValueError, match="'x'; there are 'task 0', 'task 1'"):
        bank["x"]
    with pytest.raises(ValueError, match="d_model is 0"):
        BottleneckAdapter(0)
    with pytest.raises(ValueError, match="bottleneck is 1.5"):
        BottleneckAdapter(4, 1.5)
    with pytest.raises(ValueError, match="PReLU has parameters"):
        BottleneckAdapter(4, 2, torch.nn.PReLU)
    with pytest.raises(ValueError, match="ln_init is 'two'"):
        AudioAdapterFusion(bank, ln_init="two")
    for value in (0, -3, 2.0, True, "8"):
        with pytest.raises(ValueError, match=f"attention_dim is {value!r}"):
            AudioAdapterFusion(attention_dim=value)
    with pytest.raises(ValueError, match="form is 'fast'"):
        AdapterMean(bank, form="fast")
    with pytest.raises(ValueError, match="form is 'fast'"):
        AdapterMean(bank)(torch.zeros(1, 1, 8).double(), form="fast")
    with pytest.raises(ValueError, match="no adapter 'x'"):
        AdapterMean(bank, names=["x"])
    with pytest.raises(ValueError, match="one or more different"):
        AdapterMean(bank, names=["task 0", "task 0"])
    with pytest.raises(ValueError, match="one or more different"):
        AdapterMean(bank, names=[])
    bank.remove("task 0")
    with pytest.raises(ValueError, match="the last adapter"):
        bank.remove("task 1")


def naive_running_fusion(combination, frames):
    """Scores of all frames so far, averaged by a loop; then the formula."""
    query = torch.nn.functional.linear(
        frames, combination.query.weight, combination.query.bias
    )
    outputs = [combination.bank[name](frames) for name in combination.names]
    results = []
    for t in range(len(frames)):
        scores = []
        for output in outputs:
            so_far = [
                float(query[u] @ (combination.key.weight @ output[u]))
                for u in range(t + 1)
            ]
            scores.append(sum(so_far) / len(so_far))
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
        results.append(
            sum(
                w * (combination.value.weight @ output[t])
                for w, output in zip(weights, outputs)
            )
        )
    return torch.stack(results)


@pytest.mark.parametrize("dim", [None, 3])
@pytest.mark.parametrize("form", FORMS)
def test_running_scores_follow_a_naive_loop(form, dim):
    options = {"running": True, "attention_dim": dim}
    combination = made("fusion", make_bank(4, 8, 3), **options)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack(
            [naive_running_fusion(combination, frames) for frames in x]
        )
        got = combination.combine(x, form)
        assert torch.allclose(got, expected, atol=1e-10)
        # Longer batches change no valid frame; one frame is the paper's.
        padded = torch.cat([x, torch.full((3, 4, 8), torch.nan)], 1)
        padded = torch.nan_to_num(padded, nan=1e3)
        assert torch.allclose(
            combination.combine(padded, form)[:, :6], got, atol=1e-10
        )
        plain = AudioAdapterFusion(combination.bank, attention_dim=dim)
        plain.double()
        plain.load_state_dict(combination.state_dict())
        assert torch.allclose(
            combination.combine(x[:, :1], form),
            plain.combine(x[:, :1], form),
            atol=1e-12,
        )


@pytest.mark.parametrize("dim", [None, 3])
def test_running_scores_train_alike_in_every_form(dim):
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    gradients = {}
    for form in ("loop", "stacked", "collapsed"):
        torch.manual_seed(3)
        options = {"running": True, "attention_dim": dim}
        combination = made("fusion", make_bank(3, 8, 4), **options)
        combination.combine(x, form).square().sum().backward()
        gradients[form] = [p.grad for p in combination.parameters()]
    for form in ("stacked", "collapsed"):
        for one, other in zip(gradients["loop"], gradients[form]):
            assert (one is None) == (other is None)
            if one is not None:
                assert torch.allclose(one, other, atol=1e-9), form
