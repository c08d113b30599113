"""TaskVectorPretrainer: Hugging Face bases, adapters, upstream's calls."""

import contextlib
import logging
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hugging_face_toy import save_encoder, save_whisper, wrapper
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_taskarith.vectors import (
    TIES,
    TaskArithmetic,
    TaskVector,
    TaskVectorPretrainer,
    open_state,
    save_state,
)


def copied(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def tuned(module, seed=0):
    """Change all parameters as a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            step = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * step.to(parameter.device))
    return module


def equal(module, expected, **tolerance):
    own = module.state_dict()
    assert list(own) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            own[name], tensor, rtol=0, atol=0, **tolerance
        )


@pytest.fixture
def whisper(tmp_path):
    return save_whisper(tmp_path / "whisper")


def load(module, path, name="whisper", **arguments):
    """As train_with_whisper.py of CommonVoice does, device and all."""
    pretrainer = TaskVectorPretrainer(
        loadables={name: module}, paths={name: str(path)}, **arguments
    )
    brain = types.SimpleNamespace(device="cpu")
    hparams = {"pretrainer": pretrainer}
    if "pretrainer" in hparams.keys():
        hparams["pretrainer"].collect_files()
        hparams["pretrainer"].load_collected(brain.device)


def test_upstream_refuses_the_device_that_recipes_pass():
    # Why `load_collected` takes one: drop this when upstream does.
    with pytest.raises(TypeError):
        Pretrainer(loadables={}).load_collected("cpu")


@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize("kind", ["Whisper", "Wav2Vec2", "Hubert", "WavLM"])
def test_a_hugging_face_base(tmp_path, kind, collect):
    save = save_whisper if kind == "Whisper" else save_encoder
    kinds = () if kind == "Whisper" else (kind,)
    folder = save(tmp_path / "hf", *kinds)
    module = wrapper(kind, folder)
    expected = copied(module)
    tuned(module)
    more = {"collect_in": tmp_path / "collected"} if collect else {}
    load(module, folder, **more)
    equal(module, expected)
    # The file itself, and as a hub's cache links it: no suffix at the end.
    (tmp_path / "blob").write_bytes((folder / "model.safetensors").read_bytes())
    link = tmp_path / "linked" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to("../blob")
    for file in (folder / "model.safetensors", link):
        load(tuned(module), file, **more)
        equal(module, expected)


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_what_was_collected_before(tmp_path, whisper, file):
    # By run_on_main, the main process collects; others have the links only.
    module = wrapper("Whisper", whisper)
    expected = copied(module)
    paths = {"whisper": str(whisper / file)}
    collect = {"collect_in": tmp_path / "in", "loadables": {"whisper": module}}
    TaskVectorPretrainer(**collect, paths=paths).collect_files()
    tuned(module)
    TaskVectorPretrainer(**collect, paths=paths).load_collected()
    equal(module, expected)
    # Again, over what is there.
    TaskVectorPretrainer(**collect, paths=paths).collect_files()


def test_processes_collect_a_folder_side_by_side(tmp_path, monkeypatch):
    # As recipes do, which call collect_files in every process.
    folder = save_state({"weight": torch.ones(1, 1)}, tmp_path / "base")
    model = torch.nn.Linear(1, 1, bias=False)
    both, unlink = threading.Barrier(2), Path.unlink

    def slowly(path, missing_ok=False):
        unlink(path, missing_ok)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(5)

    def collect(_):
        paths = {"model": str(folder)}
        given = (tmp_path / "in", {"model": model}, paths)
        TaskVectorPretrainer(*given).collect_files()

    monkeypatch.setattr(Path, "unlink", slowly)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(collect, range(2)))
    [link] = (tmp_path / "in").iterdir()
    assert link.name == "model.ckpt" and link.resolve() == folder


def checkpoint(module, folder, name="whisper"):
    """Save as a recipe does; return the save folder."""
    Checkpointer(folder, {name: module}).save_checkpoint()
    return folder


@pytest.mark.parametrize("task", ["Model", "ForConditionalGeneration"])
def test_vectors_between_a_folder_and_the_wrappers_checkpoint(tmp_path, task):
    folder = save_whisper(tmp_path / "whisper", task)
    module = wrapper("Whisper", folder)
    base = copied(module)
    after = copied(tuned(module))
    run = checkpoint(module, tmp_path / "run")
    tau = TaskVector.between(folder, run)
    stored = open_state(folder)
    # The base's names, whatever the wrapper calls them.
    assert set(tau) == set(stored)
    assert tau.base_fingerprint == stored.fingerprint
    for name in tau:
        own = f"model.{name.removeprefix('model.')}"
        assert torch.equal(tau[name], after[own] - base[own]), name
    # It is one vector, in whichever order the two names are met.
    back = TaskVector.between(run, folder)
    assert "_mel_filters" in back and not back["_mel_filters"].any()
    assert tau.norm() == back.norm()
    # To a Hugging Face model, and to the wrapper.
    applied = tau.apply(folder, 0.5)
    assert list(applied) == list(stored)
    path = str(tau.save(tmp_path / "tau.safetensors"))
    load(module, folder, vectors={"whisper": path}, scale=0.5)
    for name, tensor in applied.items():
        own = f"model.{name.removeprefix('model.')}"
        assert torch.equal(module.state_dict()[own], tensor), name
    load(module, folder, vectors={"whisper": [path]})
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, after[name])
    # From the wrapper's names to the folder's: another base's fingerprint.
    start = save_state(base, tmp_path / "start.ckpt")
    own = TaskVector.between(start, run)
    assert set(own) == set(base)
    path = str(own.save(tmp_path / "own.safetensors"))
    load(module, folder, vectors={"whisper": path})
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, after[name])
    with pytest.raises(ValueError, match="is not the base"):
        own.apply(folder)
    again = own.apply(folder, 0.5, any_base=True)
    for name, tensor in applied.items():
        assert torch.equal(again[name], tensor), name


def test_edits_in_place_under_other_names(tmp_path, whisper):
    module = wrapper("Whisper", whisper)
    before = copied(module)
    tau = TaskVector.between(
        whisper, checkpoint(tuned(module), tmp_path / "run")
    )
    after = copied(module)
    module.load_state_dict(before)
    tau.apply_(module, 1.0)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, after[name])


@pytest.mark.parametrize(
    "rule", [TaskArithmetic(0.3), TIES(density=0.5, scale=0.3)]
)
def test_merging_mixed_names(tmp_path, whisper, rule):
    from speechbrain_taskarith.vectors import merge_checkpoints

    module = wrapper("Whisper", whisper)
    runs = [
        checkpoint(tuned(module, seed), tmp_path / f"run{seed}")
        for seed in (1, 2)
    ]
    merge_checkpoints(whisper, runs, rule, tmp_path / "m.safetensors")
    merged = open_state(tmp_path / "m.safetensors")
    # The same merge with everything in one kind of names.
    plain = []
    for run in runs:
        content = {
            name.removeprefix("model."): tensor
            for name, tensor in open_state(run, recoverable="whisper").items()
        }
        del content["_mel_filters"]
        plain.append(TaskVector.between(whisper, content))
    expected = rule(open_state(whisper), plain)
    assert list(merged) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name
    # By vectors of both kinds of names.
    start = save_state(wrapper("Whisper", whisper), tmp_path / "start.ckpt")
    mixed = [
        TaskVector.between(whisper, runs[0]),
        TaskVector.between(start, runs[1]),
    ]
    again = rule(open_state(whisper), mixed, any_base=True)
    if isinstance(rule, TaskArithmetic):  # trims by the whole vector else
        for name, tensor in expected.items():
            assert torch.equal(again[name], tensor), name
    # The report tells the runs' own fingerprints.
    report = merge_checkpoints(whisper, runs, rule, tmp_path / "n.safetensors")
    assert [p["fingerprint"] for p in report.parents] == [
        open_state(run).fingerprint for run in runs
    ]


def test_a_head_on_one_side_counts_as_untrained(tmp_path, caplog):
    folder = save_encoder(tmp_path / "ctc", "Wav2Vec2", "ForCTC")
    module = wrapper("Wav2Vec2", folder)
    run = checkpoint(tuned(module), tmp_path / "run", "wav2vec2")
    tau = TaskVector.between(folder, run)
    assert not tau["lm_head.weight"].any()
    ours = [r for r in caplog.records if "taskarith" in r.name]
    [warning] = [r.getMessage() for r in ours if r.levelname == "WARNING"]
    assert "untrained: 2 parameter(s) (lm_head." in warning
    assert tau["wav2vec2.masked_spec_embed"].any()
    edited = tau.apply(folder)
    assert torch.equal(
        edited["lm_head.weight"], open_state(folder)["lm_head.weight"]
    )
    # Without a wrapper in between it is an error as ever.
    bare = {n: t for n, t in open_state(folder).items() if "lm_head" not in n}
    with pytest.raises(KeyError, match="lm_head"):
        TaskVector.between(folder, bare)


def test_another_model_is_still_refused(tmp_path, whisper):
    deeper = save_whisper(tmp_path / "deep", encoder_layers=2)
    run = checkpoint(wrapper("Whisper", deeper), tmp_path / "run")
    with pytest.raises(KeyError, match="encoder.layers.1"):
        TaskVector.between(whisper, run)
    wav2vec2 = save_encoder(tmp_path / "w")
    with pytest.raises(KeyError):
        TaskVector.between(wav2vec2, run)


def test_a_base_without_adapters(tmp_path, whisper, caplog):
    from speechbrain_taskarith.adapters import insert_adapters

    caplog.set_level(logging.INFO)
    bare = wrapper("Whisper", whisper)
    base = copied(bare)
    run = checkpoint(tuned(bare), tmp_path / "run")
    tau = TaskVector.between(whisper, run)
    path = str(tau.save(tmp_path / "tau.safetensors"))
    module = wrapper("Whisper", whisper)
    insert_adapters(
        module, ["us"], layers="*encoder.layers.*", d_model=16, bottleneck=4
    )
    for source, vectors, expected in (
        (whisper, {}, base),
        (run, {}, copied(bare)),
        (whisper, {"vectors": {"whisper": path}}, None),
    ):
        before = copied(tuned(module))
        caplog.clear()
        load(module, source, **vectors)
        for name, tensor in module.state_dict().items():
            if "task_adapters" in name:
                assert torch.equal(tensor, before[name]), name
            elif expected is not None:
                assert torch.equal(tensor, expected[name]), name
            else:
                torch.testing.assert_close(tensor, bare.state_dict()[name])
        told = [line for line in caplog.messages if "no adapters" in line]
        assert len(told) == 1 and "they stay as they are" in told[0]


def test_nothing_changes_where_one_of_several_does_not_fit(tmp_path, whisper):
    one, two = wrapper("Whisper", whisper), torch.nn.Linear(2, 2)
    tuned(one)
    before = copied(one)
    pretrainer = TaskVectorPretrainer(
        loadables={"one": one, "two": two},
        paths={"one": str(whisper), "two": str(whisper)},
    )
    pretrainer.collect_files()
    with pytest.raises(ValueError, match="does not fit 'two'"):
        pretrainer.load_collected("cpu")
    equal(one, before)


def test_bad_paths(tmp_path, whisper):
    module = wrapper("Whisper", whisper)
    with pytest.raises(FileNotFoundError, match="results/none/save.*expected"):
        load(module, "results/none/save")
    run = checkpoint(module, tmp_path / "run", name="other")
    with pytest.raises(FileNotFoundError, match="no whisper.ckpt"):
        load(module, run)
    # No module with plain weights: a folder cannot be meant.
    normalizer = torch.nn.Module()
    pretrainer = TaskVectorPretrainer(
        loadables={"n": normalizer},
        paths={"n": str(whisper)},
        custom_hooks={"n": lambda obj, path: None},
    )
    pretrainer.collect_files()
    with pytest.raises(ValueError, match="'n' is no plain module"):
        pretrainer.load_collected()
    # What is not to be loaded need not be there.
    TaskVectorPretrainer(
        loadables={"m": module},
        paths={"m": "results/none/save"},
        conditions={"m": False},
    ).collect_files()


def test_sequential_editing_from_a_hugging_face_model(tmp_path, whisper):
    from speechbrain_taskarith.vectors import SequentialEditor

    module = wrapper("Whisper", whisper)
    editor = SequentialEditor(whisper, TaskArithmetic(0.5), tmp_path / "log")
    base = dict(open_state(whisper))
    run = checkpoint(tuned(module), tmp_path / "run")
    editor.learn("us", run)
    edited = editor.state()
    assert list(edited) == list(base)
    for name, tensor in edited.items():
        after = module.state_dict()[f"model.{name}"]
        torch.testing.assert_close(tensor, (base[name] + after) / 2)


def test_searching_the_scale_of_a_wrapper(tmp_path, whisper):
    from speechbrain_taskarith.vectors import search_scale

    module = wrapper("Whisper", whisper)
    run = checkpoint(tuned(module), tmp_path / "run")
    tau = TaskVector.between(whisper, run)
    target = module.state_dict()["model.encoder.conv1.weight"].clone()

    def distance(model):
        return (model.model.encoder.conv1.weight - target).abs().sum().item()

    search = search_scale(module, whisper, tau, distance, [0.0, 0.5, 1.0])
    assert search.best == 1.0
