"""What wraps a module leaves no trace in the names, live or stored."""

import copy
import os

import pytest
import safetensors.torch
import torch
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

from speechbrain_taskarith.vectors import (
    SequentialEditor,
    TaskArithmetic,
    TaskVector,
    as_state,
    merge_checkpoints,
    open_state,
    save_state,
    search_scale,
)


class Net(torch.nn.Module):
    """A layer, and a layer whose own name is that of a wrapper's."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(2, 2))
        self.module = torch.nn.Linear(2, 2)


class OwnDistributed(torch.nn.parallel.DistributedDataParallel):
    """Someone's subclass."""


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def inner_compiled(net):
    net.encoder = torch.compile(net.encoder)
    return net


def inner_distributed(net):
    net.encoder[0] = OwnDistributed(net.encoder[0])
    net.module = torch.nn.DataParallel(net.module)
    return net


def inner_checkpointed(net):
    net.encoder = checkpoint_wrapper.checkpoint_wrapper(net.encoder)
    return net


WRAPPERS = {
    "distributed": torch.nn.parallel.DistributedDataParallel,
    "subclass": OwnDistributed,
    "data parallel": torch.nn.DataParallel,
    "compiled": torch.compile,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "nested": lambda net: torch.compile(OwnDistributed(torch.compile(net))),
    "averaged ddp": lambda net: torch.optim.swa_utils.AveragedModel(
        torch.nn.DataParallel(net)
    ),
    "inner compiled": inner_compiled,
    "inner distributed": inner_distributed,
    "inner checkpointed": inner_checkpointed,
}
# `module` in the middle of a stored name may be a layer's own.
STORED = [name for name in WRAPPERS if name != "inner distributed"]


def shifted(net, by):
    net = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += by
    return net


@pytest.mark.parametrize("kind", WRAPPERS)
def test_live_modules(kind):
    net = Net()
    wrapped = WRAPPERS[kind](copy.deepcopy(net))
    state = as_state(wrapped)
    assert list(state) == list(net.state_dict())
    assert state.fingerprint == as_state(net).fingerprint
    tau = TaskVector.between(wrapped, shifted(net, 1))
    assert list(tau) == list(net.state_dict())
    tau.apply_(wrapped, 0.5)
    for one, other in zip(wrapped.parameters(), net.parameters()):
        torch.testing.assert_close(one, other + 0.5)
    net.load_state_dict(tau.apply(net, 0.5), strict=True)


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("form", ["a.pt", "a.safetensors", "mapping"])
def test_stored_and_in_mappings(tmp_path, kind, form):
    net = Net()
    content = WRAPPERS[kind](copy.deepcopy(net)).state_dict()
    path = tmp_path / form
    if form == "mapping":
        path = content
    elif form == "a.pt":
        torch.save({"state_dict": content}, path)
    else:
        safetensors.torch.save_file(dict(content), path)
    for base, tuned in ((net, path), (path, shifted(net, 1))):
        tau = TaskVector.between(base, tuned)
        assert set(tau) == set(net.state_dict()) or kind not in STORED
        tau.save(tmp_path / "t.safetensors")
        tau = TaskVector.load(tmp_path / "t.safetensors")
        tau.apply(base)
        tau.apply(net, any_base=True)
        tau.apply(path, any_base=True)
    if kind in STORED and form != "mapping":
        assert set(open_state(path)) == set(net.state_dict())
        open_state(path).verify()
        merge_checkpoints(
            net,
            [path],
            TaskArithmetic(1.0),
            tmp_path / "o.pt",
            show_progress=False,
        )
        net.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))


def test_the_file_s_own_checksum_holds(tmp_path):
    net = Net()
    content = {f"module._orig_mod.{n}": t for n, t in net.state_dict().items()}
    path = tmp_path / "a.safetensors"
    save_state(content, path)
    state = open_state(path)
    assert list(sorted(state)) == sorted(net.state_dict())
    state.verify()
    # A vector that was taken under the stored names still knows its base.
    old = TaskVector(content, as_state(content).fingerprint)
    old.apply(path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="a.safetensors"):
        open_state(path).verify()


def test_extra_states_and_clashes(tmp_path):
    torch.save(
        {"module.w": torch.ones(1), "module._extra_state": {"a": 1}},
        tmp_path / "a.pt",
    )
    assert open_state(tmp_path / "a.pt").extra == {"_extra_state": {"a": 1}}
    clash = {"a._orig_mod.w": torch.ones(1), "a.w": torch.zeros(1)}
    torch.save(clash, tmp_path / "b.pt")
    assert list(open_state(tmp_path / "b.pt")) == list(clash)
    # Not all names have it: it is a layer's.
    own = {"module.w": torch.ones(1), "w": torch.zeros(1)}
    torch.save(own, tmp_path / "c.pt")
    assert list(open_state(tmp_path / "c.pt")) == list(own)


class Holder(torch.nn.Module):
    """Someone's own wrapper, whose only child is called `module`."""

    def __init__(self):
        super().__init__()
        self.module = torch.nn.Linear(2, 2)
        self.module.twin = self.module.weight


def test_a_module_s_own_name_stays(tmp_path):
    net, rule = Holder(), TaskArithmetic(scale=1.0)
    names = list(net.state_dict())
    tuned = shifted(net, 1)
    with SequentialEditor(net, rule, tmp_path / "edits") as editor:
        editor.learn("x", tuned)
        editor.undo("x")
        editor.learn("y", tuned)
        Holder().load_state_dict(editor.state("base"))
    with SequentialEditor.resume(tmp_path / "edits", verify=True) as editor:
        Holder().load_state_dict(editor.state())
    for output in ("o.pt", "o.safetensors"):
        path = tmp_path / output
        merge_checkpoints(net, [tuned], rule, path, show_progress=False)
        assert list(open_state(path, as_stored=True)) == names
        open_state(path).verify()
        # Four weights, which count once, and two biases.
        assert TaskVector.between(net, path).norm() == pytest.approx(6**0.5)
        assert TaskVector.between(path, tuned).norm() == 0
        TaskVector.between(path, tuned).apply_(net)


def test_sharded_files(tmp_path):
    net = Net()
    content = {f"module.{name}": t for name, t in net.state_dict().items()}
    save_state(content, tmp_path / "shards", shard_size=20)
    assert len(os.listdir(tmp_path / "shards")) > 2
    assert set(open_state(tmp_path / "shards")) == set(net.state_dict())
    assert TaskVector.between(net, tmp_path / "shards").norm() == 0


def test_a_sequence_and_a_search_on_wrapped_modules(tmp_path):
    net = Net()
    wrapped = torch.compile(torch.nn.DataParallel(copy.deepcopy(net)))
    tuned = shifted(net, 1)
    with SequentialEditor(
        wrapped, TaskArithmetic(scale=1.0), tmp_path / "edits"
    ) as editor:
        editor.learn("x", torch.nn.DataParallel(tuned))
        net.load_state_dict(editor.state())
    tau = TaskVector.between(wrapped, tuned)
    goal = next(tuned.parameters())

    def distance(model):
        return float((next(model.parameters()) - goal).detach().norm())

    assert search_scale(wrapped, wrapped, tau, distance, [0, 1]).best == 1
    assert os.listdir(tmp_path) == ["edits"]
