"""The adapters room on a GPU that is not there: devices and waits."""

import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import EACH, check, public_names, run

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from adapters_toy import ToyEncoder, scramble  # noqa: E402

from speechbrain_taskarith.adapters import (  # noqa: E402
    AdapterBank,
    AdapterHandle,
    AdapterMean,
    AdapterWeightedMean,
    AudioAdapterFusion,
    BottleneckAdapter,
    attention_stats,
    insert_adapters,
)

NAMES = ["us", "german"]


def adapter(put):
    made = BottleneckAdapter(8, 4)
    scramble(made)
    return put(made)(put(torch.randn(2, 5, 8)))


def bank(put):
    made = AdapterBank(NAMES, 8, 4)
    scramble(made)
    made = put(made)
    x = put(torch.randn(2, 5, 8)).requires_grad_()
    one, all_of_them = made["us"](x), made.each(x)
    return one, all_of_them, torch.autograd.grad(all_of_them.sum(), x)


def combination(kind, form):
    def case(put):
        made = AdapterBank(NAMES, 8, 4)
        combined = kind(made)
        scramble(made)
        scramble(combined)
        made, combined = put(made), put(combined)
        x = put(torch.randn(2, 5, 8))
        if form == "folded":
            with torch.no_grad():
                combined.eval().fold()
                return combined(x)
        x.requires_grad_()
        out = combined(x, form)
        return out, torch.autograd.grad(out.square().mean(), x)

    return case


def encoder(choice):
    def case(put):
        model = ToyEncoder()
        handle = insert_adapters(
            model, NAMES, bottleneck=4, combination="fusion"
        )
        assert isinstance(handle, AdapterHandle)
        scramble(handle)
        model = put(model).eval()
        handle.train_composition("MT-A")
        handle.use(["us", None, "german"] if choice == "mixed" else choice)
        return model(put(torch.randn(3, 7, 4)))

    return case


def matching(put):
    model = ToyEncoder()
    for layer in model.layers:
        layer.dropout.p = 0.0
    fusion = AudioAdapterFusion(ln_init="match", attention_dim=2)
    handle = insert_adapters(model, NAMES, bottleneck=4, combination=fusion)
    scramble(torch.nn.ModuleList(layer.bank for layer in handle.layers))
    model = put(model).train()
    handle.train_composition("ST-A")
    x = put(torch.randn(3, 7, 4))
    # The second pass waits for nothing.
    return model(x), model(x), list(handle.parameters())


def guidance(put):
    model = ToyEncoder()
    handle = insert_adapters(
        model, NAMES, bottleneck=4, combination="fusion", guide=0.1
    )
    scramble(handle)
    model = put(model)
    handle.use("combined")
    out = model(put(torch.randn(2, 7, 4)))
    lens = put(torch.tensor([1.0, 0.5]))
    loss = handle.attention_loss(NAMES, lens)
    attention = handle.attention(lens)
    attention_stats(attention, NAMES)
    return out, loss, handle.penalty()


CASES = {
    "BottleneckAdapter": adapter,
    "AdapterBank": bank,
    **{
        f"{kind.__name__}, {form}": combination(kind, form)
        for kind in (AdapterMean, AdapterWeightedMean, AudioAdapterFusion)
        for form in ("loop", "stacked", "collapsed", "folded")
    },
    "insert_adapters, one": encoder("us"),
    "insert_adapters, combined": encoder("combined"),
    "insert_adapters, mixed": encoder("mixed"),
    "insert_adapters, guided": guidance,
    "insert_adapters, matched": matching,
}
REASONS = {
    "plot_attention": "draws numbers of Python",
    "load_adapters": "insert_adapters, and files that are read on the CPU",
}
# Once an adapter, when its composition begins to train.
UNTRAINED = {"adapters.bank.is_untrained": EACH}
WAITS = {
    **dict.fromkeys(CASES, {}),
    "insert_adapters, one": UNTRAINED,
    "insert_adapters, combined": UNTRAINED,
    "insert_adapters, mixed": UNTRAINED,
    "insert_adapters, matched": {
        **UNTRAINED,
        # Once a layer.
        "adapters.combination.base.match": 3,
    },
    # For the log.
    "insert_adapters, guided": {
        "adapters.combination.attention.mean_weights": EACH,
        "adapters.combination.attention.attention_stats": 1,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_devices_and_waits(name):
    check(run(CASES[name]), WAITS[name])


def test_everything_public_is_here():
    public = public_names("adapters")
    assert public == {n for n in public if n in globals()} | set(REASONS)
    assert not set(REASONS) & set(globals())
