"""Other names for the same weights: rename, prefix, and nested keys."""

import cli_support as cli
import pytest
import torch

from speechbrain_taskarith.utils.patterns import replace
from speechbrain_taskarith.vectors import TaskVector, as_state, open_state


def ours(value=0.0):
    return {
        f"enc.{i}.{name}": torch.full((2,), value + i)
        for i in range(2)
        for name in ("w", "b")
    }


def theirs(value=0.0):
    """The same under other names, in front of a head."""
    named = {
        f"net.encoder.{name.replace('.w', '.weight')[4:]}": tensor
        for name, tensor in ours(value).items()
    }
    return {**named, "net.step": torch.tensor(3), "head": torch.ones(1)}


TABLE = {"encoder.*.weight": "enc.*.w", "encoder.*": "enc.*"}
HOW = {"prefix": "net.", "rename": TABLE, "exclude": ["step"]}


@pytest.mark.parametrize(
    ("name", "table", "expected"),
    [
        ("a.g", {"*.g": "*.gain"}, "a.gain"),
        ("a.1.b.2.c", {"a.*.b.*.c": "x.*.y.*"}, "x.1.y.2"),
        ("a.1.b", {"a.*.b": "one"}, "one"),
        ("a.1", {"a.[12]": "first", "*": "no"}, "first"),
        ("a.3", {"a.[12]": "first", "*": "all.*"}, "all.a.3"),
        ("a+b", {"a+*": "*"}, "b"),
        ("a.b", {"a": "x"}, "a.b"),
        ("x[0]", {"x[[]0]": "y"}, "y"),
    ],
)
def test_replacement(name, table, expected):
    assert replace([name], table) == {name: expected}


def test_a_replacement_cannot_invent():
    with pytest.raises(ValueError, match=r"'b\.\*' has more"):
        replace(["a"], {"a": "b.*"})


def test_between_maps_names():
    tau = TaskVector.between(ours(), theirs(2.0), **HOW)
    assert set(tau) == set(ours())
    assert all(torch.equal(tau[name], torch.full((2,), 2.0)) for name in tau)
    edited = tau.apply(ours())
    assert all(torch.equal(edited[n], t) for n, t in ours(2.0).items())
    for how, named in (
        ({"prefix": "nothing."}, "nothing"),
        ({"prefix": "net.", "rename": {"missing.*": "*"}}, "missing"),
    ):
        with pytest.raises(ValueError, match=named):
            TaskVector.between(ours(), theirs(), **how)
    with pytest.raises(ValueError, match="of both 'enc.0.w' and 'enc.0.b'"):
        as_state(ours()).rename({"enc.0.*": "enc.0"})
    # The reverse needs no prefix: a pattern gives it.
    back = {"enc.*.w": "net.encoder.*.weight", "enc.*": "net.encoder.*"}
    tau = TaskVector.between(
        theirs(), ours(1.0), rename=back, exclude=["head", "net.step"]
    )
    assert len(tau) == 4 and tau.norm() == pytest.approx(8**0.5)


def test_extra_states_and_checksums_go_along(tmp_path):
    layers = {"m.w": torch.ones(1), "m._extra_state": {"a": 1}}
    torch.save(layers, tmp_path / "a.pt")
    state = open_state(tmp_path / "a.pt").rename(prefix="m.")
    assert (list(state), state.extra) == (["w"], {"_extra_state": {"a": 1}})
    content = bytearray((tmp_path / "a.pt").read_bytes())
    at = content.index(torch.ones(1).numpy().tobytes())
    content[at] ^= 1
    (tmp_path / "b.pt").write_bytes(content)
    with pytest.raises(ValueError, match="b.pt"):
        open_state(tmp_path / "b.pt").rename(prefix="m.").verify()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_old_and_new_needs_no_map():
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(2, 3, 3)
    old = torch.nn.utils.weight_norm(conv)
    new = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(2, 3, 3))
    new.load_state_dict(old.state_dict())
    for base, other in ((old, new), (new, old)):
        assert TaskVector.between(base, other).norm() == 0


def test_keys_of_nested_files(tmp_path):
    nested = {
        "model": {"state_dict": ours(1.0), "ema.dict": ours(2.0)},
        "params": ours(3.0),
        "epoch": 7,
    }
    path = tmp_path / "a.pt"
    torch.save(nested, path)
    for key, value in (
        ("model.state_dict", 1.0),
        ("model.ema.dict", 2.0),
        ("params", 3.0),
    ):
        assert open_state(path, key=key)["enc.0.w"][0] == value
    with pytest.raises(KeyError, match=r"a\.pt: holds no 'ema'.*params"):
        open_state(path, key="ema")
    with pytest.raises(ValueError, match="a int under 'epoch'"):
        open_state(path, key="epoch")
    with pytest.raises(ValueError, match=r"key='x' is for a file of torch"):
        open_state(tmp_path, key="x")


def test_the_command_line_maps_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(ours(), "base.pt")
    torch.save({"ema": theirs(2.0), "epoch": 3}, "tuned.pt")
    torch.save(ours(4.0), "plain.pt")
    table = ("encoder.*.weight=enc.*.w", "encoder.*=enc.*")
    how = ["--key", "ema", "--prefix", "net.", "--rename", *table]
    how += ["--exclude", "step"]
    cli.run("vector", "base.pt", "tuned.pt", "-o", "t.safetensors", *how)
    tau = TaskVector.load("t.safetensors")
    assert set(tau) == set(ours()) and tau.norm() == pytest.approx(4 * 2**0.5)
    # Files that need no map may stand beside one that does.
    words = "merge --base base.pt --finetuned tuned.pt plain.pt --rule "
    words += "LinearAverage -o merged.pt"
    cli.run(*words.split(), *how)
    (tmp_path / "merge.yaml").write_text(
        "base: base.pt\nfinetuned: [tuned.pt, plain.pt]\nkey: ema\n"
        "rule: LinearAverage\noutput: yaml.pt\nprefix: net.\n"
        "rename: {'encoder.*.weight': 'enc.*.w', 'encoder.*': 'enc.*'}\n"
        "exclude: [step]\n"
    )
    cli.run("merge", "merge.yaml")
    for output in ("merged.pt", "yaml.pt"):
        for name, tensor in open_state(output).items():
            assert torch.equal(tensor, ours(3.0)[name])
    words = ["vector", "base.pt", "plain.pt", "-o", "x.safetensors"]
    for more, named in (
        (["--key", "ema"], "ema"),
        (["--prefix", "net."], "net."),
        (["--rename", "dec.*=*"], "dec.*"),
        (["--rename", "dec.*"], "PATTERN=NEW"),
    ):
        assert named in cli.fails(capsys, *words, *more)


@pytest.mark.parametrize("encoding", ["lossless", "bf16", "int8", "sparse"])
@pytest.mark.parametrize("verb", ["apply", "merge"])
def test_stored_vectors_by_other_names(
    tmp_path, monkeypatch, capsys, encoding, verb
):
    """`apply` and `merge` bring vectors to the base's names as models."""
    monkeypatch.chdir(tmp_path)
    base = {f"enc.{name[4:]}": tensor for name, tensor in ours(3.0).items()}
    torch.save({"ema": base, "step": 3}, "base.pt")
    tau = TaskVector.between(theirs(), theirs(2.0))
    tau.save("tau.safetensors", encoding=encoding)
    words = {
        "apply": ["apply", "base.pt", "tau.safetensors", "--scale", "0.5"],
        "merge": ["merge", "--base", "base.pt", "--finetuned"]
        + ["tau.safetensors", "--rule", "TaskArithmetic", "--scale", "0.5"],
    }[verb]
    words += ["--key", "ema", "--any-base"]
    how = ["--prefix", "net.", "--rename"]
    how += [f"{pattern}={new}" for pattern, new in TABLE.items()]
    said = cli.fails(capsys, *words, "-o", "out.ckpt")
    assert "net.encoder" in said
    said = cli.fails(capsys, *words, *how, "no.*=*", "-o", "out.ckpt")
    assert "'no.*' fits no name of tau.safetensors" in said
    wrong = [w if w != "ema" else "nothing" for w in words]
    assert "nothing" in cli.fails(capsys, *wrong, *how, "-o", "out.ckpt")
    cli.run(*words, *how, "--dry-run", "-o", "out.ckpt")
    cli.run(*words, *how, "-o", "out.ckpt")
    edited = open_state("out.ckpt")
    assert set(edited) == set(base)
    for name, tensor in base.items():
        torch.testing.assert_close(edited[name], tensor + 1.0)


def test_a_renamed_vector_keeps_ties_and_what_it_was_parted_from():
    weight = torch.ones(2)
    base = {"m.in": weight, "m.out": weight, "m.other": torch.zeros(1)}
    tuned = {name: torch.full_like(t, 3.0) for name, t in base.items()}
    tuned["m.out"] = tuned["m.in"]
    tau = TaskVector.between(base, tuned).rename({"*.in": "*.table"})
    assert tau["m.table"] is tau["m.out"]
    tau = tau.rename(prefix="m.")
    assert list(tau) == ["table", "out", "other"]
    both = {"table": weight, "out": weight, "other": torch.zeros(1)}
    edited = tau.apply(both, any_base=True)
    assert edited["table"] is edited["out"] and edited["out"][0] == 3
    # One of two names was left out by choice: the other is not its edit.
    alone = {name: t.clone() for name, t in base.items()}
    parted = TaskVector.between(base, tuned).restrict(exclude=["m.out"])
    parted = (0.5 * parted).rename(prefix="m.")
    for plain, name in (("in", "m.in"), ("out", "m.out")):
        both[plain] = alone[name]
    edited = parted.apply(
        {n: both[n] for n in ("in", "out", "other")}, any_base=True
    )
    assert edited["in"][0] == 2 and edited["out"][0] == 1
    with pytest.raises(ValueError, match="missing"):
        tau.rename({"missing.*": "*"})
    with pytest.raises(ValueError, match="of both"):
        tau.rename({"table": "x", "out": "x"})
