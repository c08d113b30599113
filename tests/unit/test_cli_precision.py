"""The type that weights are written in, and what rounding loses, in words."""

import json
import re

import cli_support as cli
import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.vectors import TaskVector, open_state

STEP = 2.0**-13


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """A bfloat16 base, fine-tuned by steps of half a unit in the last place."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = {
        "encoder.w": (1 + torch.rand(50, 4)).bfloat16(),
        "encoder.b": (1 + torch.rand(4)).bfloat16(),
        "n": torch.tensor(3),
    }
    for number, name in enumerate(("base", "us", "de")):
        state = dict(base)
        if number:
            for key in ("encoder.w", "encoder.b"):
                state[key] = base[key].float() + number * STEP
        torch.save(state, f"{name}.ckpt")
    TaskVector.between("base.ckpt", "us.ckpt").save("us.safetensors")


APPLY = "apply base.ckpt us.safetensors -o {}"
MERGE = "merge --base base.ckpt --finetuned us.ckpt de.ckpt --rule TIES "
MERGE += "density=1 --scale 1 -o {}"


@pytest.mark.parametrize("command", [APPLY, MERGE])
def test_a_lost_edit_is_said(capsys, command):
    words = command.format("out.ckpt").split()
    for more in (["--dry-run"], []):
        cli.run(*words, *more)
        line = capsys.readouterr().out
        found = re.search(r"loses (about )?(\S+) % of the edit; --dtype", line)
        assert bool(found[1]) == (bool(more) and words[0] == "merge")
        assert float(found[2]) == pytest.approx(100, abs=0.1)
    loss = cli.run_json(capsys, *words, "--overwrite")["rounding_loss"]
    assert loss == pytest.approx(1, abs=1e-3)
    loss = cli.run_json(capsys, *words, "--overwrite", "--dry-run")[
        "rounding_loss"
    ]
    assert loss == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("output", ["o.ckpt", "o.safetensors", "CKPT+o"])
@pytest.mark.parametrize("command", [APPLY, MERGE])
def test_float32_keeps_it(capsys, command, output):
    words = command.format(output).split() + ["--dtype", "float32"]
    cli.run(*words, "--dry-run")
    cli.run(*words)
    assert "rounding" not in capsys.readouterr().out
    merged, base = open_state(output), open_state("base.ckpt")
    moved = STEP if command == APPLY else 1.5 * STEP
    for name in ("encoder.w", "encoder.b"):
        assert merged[name].dtype == torch.float32
        torch.testing.assert_close(
            merged[name], base[name].float() + moved, rtol=0, atol=3e-7
        )
    assert merged["n"].dtype == torch.int64


def test_another_type_beside_other_recoverables(capsys):
    net = torch.nn.Linear(2, 2).half()
    for name in ("base", "us"):
        Checkpointer(
            name, {"model": net, "other": torch.nn.Linear(1, 1)}
        ).save_checkpoint(name="x")
    words = "merge --base base --finetuned us --rule TIES -o CKPT+o"
    cli.run(*words.split(), "--dtype", "float32")
    with pytest.warns(UserWarning, match="other"):
        assert open_state("CKPT+o")["weight"].dtype == torch.float32


def test_a_merge_file_says_the_type(tmp_path, capsys):
    (tmp_path / "merge.yaml").write_text(
        "base: base.ckpt\nfinetuned: [us.ckpt]\nrule: TaskArithmetic\n"
        "scale: 5e-1\ndtype: float16\noutput: o.ckpt\n"
    )
    cli.run("merge", "merge.yaml")
    assert open_state("o.ckpt")["encoder.w"].dtype == torch.float16
    cli.run("merge", "merge.yaml", "--dtype", "float64", "--overwrite")
    found = open_state("o.ckpt")["encoder.w"]
    torch.testing.assert_close(
        found, open_state("base.ckpt")["encoder.w"].double() + 0.5 * STEP
    )
    assert "'float31'" in cli.fails(
        capsys, "merge", "merge.yaml", "--dtype", "float31", "--overwrite"
    )


@pytest.mark.parametrize("value", ["5e-1", ".5e0", "5.0e-1", "0.5", "+5E-1"])
def test_numbers_as_people_write_them(tmp_path, capsys, value):
    words = f"--rule TIES density={value} --dry-run --json"
    (tmp_path / "merge.yaml").write_text(
        "base: base.ckpt\nfinetuned: [us.ckpt]\noutput: o.ckpt\n"
        f"rule: TIES\nscale: {value}\n"
    )
    assert main(["merge", "merge.yaml", *words.split()]) == 0
    rule = json.loads(capsys.readouterr().out)["rule"]
    assert (rule["scale"], rule["density"]) == (0.5, 0.5)


def test_a_name_with_brackets_matches_itself():
    state = {"layers.[3].w": torch.zeros(1), "layers.3.w": torch.zeros(1)}
    tuned = {name: tensor + 1 for name, tensor in state.items()}
    for name in state:
        tau = TaskVector.between(state, tuned, include=[name])
        assert name in tau
    tau = TaskVector.between(state, tuned)
    assert tau.scales({"layers.[3].w": 0.5})["layers.[3].w"] == 0.5
