"""States: every form read and written, and everything that can be wrong."""

import copy
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hugging_face_toy import save_whisper

from speechbrain_taskarith.vectors import as_state, open_state, save_state
from speechbrain_taskarith.vectors.states.safetensors import (
    SafetensorsWriter,
    TensorInfo,
    read_header,
)


def example():
    """Tensors of many dtypes and shapes, also empty and scalar ones."""
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.weight": torch.randn(7, 5, generator=generator),
        "encoder.bias": torch.randn(7, generator=generator).half(),
        "decoder.weight": torch.randn(3, 3, 2, generator=generator).bfloat16(),
        "double": torch.randn(4, generator=generator).double(),
        "steps": torch.tensor(12),
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def same(state, tensors):
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    "name", ["a.safetensors", "a.ckpt", "a.pt", "a.bin", "folder"]
)
def test_written_is_read(tmp_path, name):
    state = example()
    save_state(state, tmp_path / name)
    opened = open_state(tmp_path / name)
    same(opened, state)
    opened.verify()
    assert opened.fingerprint == as_state(state).fingerprint


def test_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    state = example()
    save_state(state, tmp_path / "ours.safetensors", metadata={"k": [1, 2]})
    same(safetensors.torch.load_file(tmp_path / "ours.safetensors"), state)
    safetensors.torch.save_file(state, tmp_path / "theirs.safetensors")
    same(open_state(tmp_path / "theirs.safetensors"), state)
    meta = open_state(tmp_path / "ours.safetensors").metadata
    assert meta["k"] == "[1, 2]"


def test_torch_reads_ours(tmp_path):
    save_state(example(), tmp_path / "ours.ckpt")
    same(torch.load(tmp_path / "ours.ckpt", weights_only=True), example())


def test_sharded_folder(tmp_path):
    state = example()
    save_state(state, tmp_path / "shards", shard_size=100)
    files = sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert len(files) > 3 and "model.safetensors.index.json" in files
    opened = open_state(tmp_path / "shards")
    same(opened, state)
    opened.verify()
    first = next(f for f in files if "-00001-" in f)
    os.remove(tmp_path / "shards" / first)
    with pytest.raises(FileNotFoundError, match=first):
        open_state(tmp_path / "shards")


def test_shards_keep_ties_and_metadata(tmp_path):
    weights = {f"w{i}": torch.arange(8.0) + i for i in range(4)}
    weights["out"] = weights["w0"]
    folder = tmp_path / "hf"
    save_state(weights, folder, shard_size=70, metadata={"k": [1, 2]})
    assert len(list(folder.glob("*.safetensors"))) == 3
    opened = open_state(folder)
    same(opened, weights)
    assert list(opened) == list(weights)
    assert opened.aliases == {"w0": "w0", "out": "w0"}
    assert opened.metadata["k"] == "[1, 2]"
    assert "fingerprint" not in opened.metadata
    opened.verify()


def test_a_whole_model_beside_an_older_index_is_read(tmp_path):
    """As transformers reads it, which removes shards but not their index."""
    state, folder = example(), tmp_path / "hf"
    save_state(state, folder, shard_size=100)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    state["scalar"] = torch.tensor(3.5)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    same(open_state(folder), state)


def test_transformers_reads_our_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = save_whisper(tmp_path / "theirs", "ForConditionalGeneration")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(theirs)
    state = open_state(tmp_path / "theirs")
    save_state(
        state, tmp_path / "ours", shard_size=2000, like=tmp_path / "theirs"
    )
    again = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "ours"
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    # In another type: it is loaded as it was written.
    half = {name: state[name].bfloat16() for name in state}
    save_state(half, tmp_path / "half", like=tmp_path / "theirs")
    again = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "half"
    )
    assert again.dtype == torch.bfloat16


def test_a_folder_takes_along_what_describes_the_model_alone(tmp_path):
    taken = (
        "config.json generation_config.json preprocessor_config.json "
        "tokenizer.json tokenizer_config.json vocab.json merges.txt "
        "special_tokens_map.json spiece.model chat_template.jinja LICENSE"
    ).split()
    others = (
        "README.md tf_model.h5 flax_model.msgpack model.onnx "
        "optimizer.pt scheduler.pt rng_state.pth trainer_state.json "
        "training_args.bin pytorch_model.bin model.safetensors.index.json "
        "pytorch_model-00001-of-00002.bin adapter_config.json model.ckpt "
        "quantization_config.json all_results.json"
    ).split()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in (*taken, *others):
        (theirs / name).write_text("{}")
    save_state({"w": torch.ones(1)}, tmp_path / "ours", like=theirs)
    found = {path.name for path in (tmp_path / "ours").iterdir()}
    assert found == {*taken, "model.safetensors"}


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "module"]
)
def test_nested_state(tmp_path, key):
    content = {key: {"w": torch.ones(2)}, "epoch": 3, "optimizer": {}}
    torch.save(content, tmp_path / "a.pt")
    same(open_state(tmp_path / "a.pt"), {"w": torch.ones(2)})


def test_legacy_torch_file(tmp_path):
    torch.save(
        {"w": torch.arange(3.0)},
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    same(open_state(tmp_path / "old.pt"), {"w": torch.arange(3.0)})


def test_checkpoint_folder_of_speechbrain(tmp_path):
    from speechbrain.utils.checkpoints import Checkpointer
    from speechbrain.utils.epoch_loop import EpochCounter

    model = torch.nn.Linear(3, 2)
    checkpointer = Checkpointer(
        tmp_path, {"model": model, "counter": EpochCounter(3)}
    )
    checkpointer.save_checkpoint(name="old", meta={"WER": 3.0})
    old = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1)
    checkpointer.save_checkpoint(name="new")
    # The save folder gives the newest, a CKPT folder itself.
    same(open_state(tmp_path), model.state_dict())
    same(open_state(tmp_path / "CKPT+old"), old)
    assert open_state(tmp_path / "CKPT+old").metadata["WER"] == "3.0"
    # An unfinished folder never counts.
    shutil.copytree(tmp_path / "CKPT+old", tmp_path / "CKPT+zz")
    os.remove(tmp_path / "CKPT+zz" / "CKPT.yaml")
    same(open_state(tmp_path), model.state_dict())
    with pytest.raises(FileNotFoundError, match="'asr'.*counter, model"):
        open_state(tmp_path, recoverable="asr")


def test_only_state_dict_of_a_checkpoint(tmp_path):
    from speechbrain.utils.checkpoints import Checkpointer

    one = {"asr": torch.nn.Linear(3, 2)}
    Checkpointer(tmp_path / "1", one).save_checkpoint()
    same(open_state(tmp_path / "1"), one["asr"].state_dict())
    two = {**one, "lm": torch.nn.Linear(2, 2)}
    Checkpointer(tmp_path / "2", two).save_checkpoint()
    with pytest.raises(ValueError, match=r"asr \(8 parameters\), lm \(6"):
        open_state(tmp_path / "2")
    same(open_state(tmp_path / "2", recoverable="lm"), two["lm"].state_dict())


class Evil:
    """Would make a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path, zipped):
    trap = str(tmp_path / "ran")
    torch.save(
        {"w": torch.ones(1), "x": Evil(trap)},
        tmp_path / "evil.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match="evil.pt.*refused.*code"):
        open_state(tmp_path / "evil.pt")
    assert not os.path.exists(trap)


def test_yaml_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "ran"
    folder = tmp_path / "CKPT+1"
    folder.mkdir()
    torch.save({"w": torch.ones(1)}, folder / "model.ckpt")
    (folder / "CKPT.yaml").write_text(
        f"!!python/object/apply:os.mkdir ['{trap}']"
    )
    with pytest.raises(ValueError, match="CKPT.yaml"):
        open_state(folder)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_truncated_at_any_length_is_refused(tmp_path, name):
    save_state(example(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for length in [0, 1, 7, 8, 9, 50, len(content) // 2, len(content) - 1]:
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=name):
            open_state(tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_altered_weights_are_found(tmp_path, name):
    tensor = torch.arange(50.0)
    save_state({"w": tensor}, tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    where = content.index(tensor.numpy().tobytes())
    content[where + 17] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        open_state(tmp_path / name).verify()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]},
        {"shape": [2]},
        7,
    ],
)
def test_wrong_header_is_refused(tmp_path, entry):
    import json

    header = json.dumps({"w": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors"):
        open_state(tmp_path / "x.safetensors")


def test_huge_header_length_allocates_nothing(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="header claims"):
        open_state(tmp_path / "x.safetensors")


def test_other_things_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.ckpt"):
        open_state(tmp_path / "gone.ckpt")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="suffix '.txt'"):
        open_state(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="holds no weights"):
        open_state(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        open_state(tmp_path / "list.pt")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    torch.save(optimizer.state_dict(), tmp_path / "optim.pt")
    with pytest.raises(ValueError, match="optimizer"):
        open_state(tmp_path / "optim.pt")
    with pytest.raises(TypeError, match="int"):
        as_state(3)
    with pytest.raises(ValueError, match="no tensors"):
        as_state({})


def test_shard_outside_its_folder_is_refused(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "../secret.safetensors"}}'
    )
    with pytest.raises(ValueError, match="outside"):
        open_state(folder)


def test_reading_is_read_only(tmp_path):
    save_state({"w": torch.ones(4)}, tmp_path / "a.safetensors")
    state = open_state(tmp_path / "a.safetensors")
    state["w"].add_(1)
    assert torch.equal(state["w"], torch.ones(4))
    with pytest.raises(TypeError):
        state["w"] = torch.zeros(4)


def test_ties_are_seen_and_kept(tmp_path):
    model = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False)] * 2)
    state = as_state(model)
    assert state.aliases == {"0.weight": "0.weight", "1.weight": "0.weight"}
    save_state(model, tmp_path / "tied.ckpt")
    assert open_state(tmp_path / "tied.ckpt").aliases == state.aliases
    size = os.path.getsize(tmp_path / "tied.ckpt")
    save_state({"a": torch.ones(1000)}, tmp_path / "one.ckpt")
    view = torch.ones(100_000)[:1000]
    save_state({"a": view}, tmp_path / "view.ckpt")
    assert os.path.getsize(tmp_path / "view.ckpt") == os.path.getsize(
        tmp_path / "one.ckpt"
    )
    assert size < 3000


def test_fingerprint_depends_on_everything_and_nothing_else():
    state = example()
    print_ = as_state(state).fingerprint
    assert as_state(dict(reversed(list(state.items())))).fingerprint == print_
    changed = dict(state, scalar=torch.tensor(2.5000002))
    renamed = {("x" if k == "scalar" else k): v for k, v in state.items()}
    cast = dict(state, scalar=state["scalar"].double())
    shaped = dict(state, scalar=state["scalar"].reshape(1))
    for other in (changed, renamed, cast, shaped):
        assert as_state(other).fingerprint != print_
    strided = dict(state, **{"encoder.weight": state["encoder.weight"].T})
    strided["encoder.weight"] = strided["encoder.weight"].contiguous().T
    assert as_state(strided).fingerprint == print_


def test_ranges_are_read(tmp_path):
    state = example()
    for name in ("a.safetensors", "a.ckpt"):
        save_state(state, tmp_path / name)
        opened = open_state(tmp_path / name)
        buffer = np.empty(3 * 4, np.uint8)
        opened.read_into("encoder.weight", 4, 7, buffer)
        expected = state["encoder.weight"].reshape(-1)[4:7]
        assert np.array_equal(buffer.view(np.float32), expected.numpy())
        with pytest.raises(IndexError):
            opened.read_into("encoder.weight", 4, 36, np.empty(128, np.uint8))
        with pytest.raises(ValueError):
            opened.read_into("encoder.weight", 0, 1, np.empty(3, np.uint8))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_keeps_its_file_open(tmp_path, how):
    for number in (1, 2):
        tensor = torch.full((4,), float(number))
        save_state({"w": tensor}, tmp_path / f"{number}.safetensors")
    state = open_state(tmp_path / "1.safetensors")
    copied = how(state)
    descriptor = state.entries["w"].file.descriptor
    del state
    # Would take the number of a file that was closed.
    other = open_state(tmp_path / "2.safetensors")
    assert copied["w"].tolist() == [1] * 4
    copied.verify()
    del copied
    with pytest.raises(OSError):
        os.fstat(descriptor)
    assert other["w"].tolist() == [2] * 4


def test_an_open_file_is_not_pickled(tmp_path):
    save_state({"w": torch.ones(4)}, tmp_path / "a.safetensors")
    entries = open_state(tmp_path / "a.safetensors").entries
    with pytest.raises(TypeError, match="a.safetensors: is open here.*path"):
        pickle.dumps(entries)


def test_data_parallel_wrapper_is_taken_off(tmp_path):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = torch.nn.Linear(2, 2)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert list(as_state(wrapped)) == ["weight", "bias"]
    finally:
        dist.destroy_process_group()


def test_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_state({"w": torch.ones(2)}, path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        with SafetensorsWriter(path, {"w": TensorInfo("F32", (2,))}):
            raise RuntimeError
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


FORMS = ("a.safetensors", "a.ckpt", "hf", "CKPT+a")
OWN_NAMES = ("format", "fingerprint", "checked_by", "tied_tensors")
OWN_NAMES += ("task_vector", "task_vector_checksum")


@pytest.mark.parametrize(
    ("name", "metadata", "match"),
    [
        *((name, {"a": object()}, "metadata.a: a object") for name in FORMS),
        *(
            (name, {key: "x"}, f"metadata.*'{key}'.*choose another")
            for name in FORMS[:3]
            for key in OWN_NAMES
        ),
        ("CKPT+a", {"files": ["x"]}, "metadata.*'files'.*choose another"),
        ("a.ckpt", {"loss": float("nan")}, "a.ckpt.md: .* finite numbers"),
    ],
)
def test_metadata_that_cannot_be_kept_change_nothing(
    tmp_path, name, metadata, match
):
    path = tmp_path / name
    save_state({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=match):
        save_state({"w": torch.zeros(2)}, path, metadata=metadata)
    assert open_state(path)["w"].tolist() == [1, 1]
    assert [inside.name for inside in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["thesis.tex", "save/CKPT.yaml", "README.md"])
def test_a_folder_that_holds_more_than_a_model_stays(tmp_path, name):
    path = tmp_path / "results"
    save_state({"w": torch.ones(2)}, path)
    save_state({"w": torch.zeros(2)}, path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("mine")
    named = f"results.*{name.partition('/')[0]}"
    with pytest.raises(FileExistsError, match=named):
        save_state({"w": torch.ones(2)}, path)
    assert (path / name).read_text() == "mine"
    assert open_state(path)["w"].tolist() == [0, 0]


@pytest.mark.parametrize("name", FORMS)
def test_metadata_become_plain_in_every_form(tmp_path, name):
    path = tmp_path / name
    metadata = {"from": Path("a"), "wer": np.float32(0.5), "n": torch.tensor(3)}
    save_state({"w": torch.ones(2)}, path, metadata=metadata)
    file = {"a.ckpt": "a.ckpt.md", "CKPT+a": "CKPT+a/CKPT.yaml"}.get(name)
    if file is not None:
        text = (tmp_path / file).read_text()
        assert all(t in text for t in ("from: a", "wer: 0.5", "n: 3"))
        return
    found = open_state(path).metadata
    assert [found[key] for key in metadata] == ["a", "0.5", "3"]


def test_a_file_in_the_place_of_the_card_is_found_before_writing(tmp_path):
    save_state({"w": torch.ones(2)}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt.md").write_text("mine")
    with pytest.raises(FileExistsError, match="no card of this plugin"):
        save_state(
            {"w": torch.zeros(2)}, tmp_path / "a.ckpt", metadata={"n": 3}
        )
    assert open_state(tmp_path / "a.ckpt")["w"].tolist() == [1, 1]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small disk")
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "folder"])
def test_full_disk(tmp_path, name):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting is not allowed here")
    try:
        save_state({"w": torch.ones(100)}, disk / name)
        old = open_state(disk / name).fingerprint
        with pytest.raises((OSError, RuntimeError)) as error:
            save_state({"w": torch.ones(100_000)}, disk / name)
        assert name in str(error.value)
        assert open_state(disk / name).fingerprint == old
        assert [p.name for p in disk.iterdir()] == [name]
    finally:
        os.system(f"umount {disk}")


def test_header_order_keeps_alignment(tmp_path):
    save_state(example(), tmp_path / "a.safetensors")
    tensors, _ = read_header(tmp_path / "a.safetensors")
    for info, offset in tensors.values():
        assert offset % (info.nbytes // max(info.numel, 1) or 1) == 0


def test_no_warning_about_read_only_memory(tmp_path):
    save_state({"w": torch.ones(4)}, tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_state(tmp_path / "a.safetensors")["w"]


def test_each_shard_of_a_hugging_face_folder_carries_its_checksum(tmp_path):
    weights = {f"w{i}": torch.arange(8.0) + i for i in range(5)}
    save_state(weights, tmp_path / "hf", shard_size=70)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) == 3
    whole = open_state(tmp_path / "hf")
    whole.verify()
    assert whole.fingerprint == as_state(weights).fingerprint
    for shard in shards:
        state = open_state(shard)
        assert state.metadata["fingerprint"] == state.fingerprint
        content = shard.read_bytes()
        shard.write_bytes(content[:-2] + b"\0\0")
        with pytest.raises(ValueError, match=shard.name):
            open_state(tmp_path / "hf").verify()
        shard.write_bytes(content)


@pytest.mark.parametrize("key", ["fingerprint", "checked_by"])
def test_a_header_whose_checksum_lost_its_name_is_damaged(tmp_path, key):
    path = save_state({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    content = path.read_bytes()
    begin = content.index(f'"{key}"'.encode())
    path.write_bytes(
        content.replace(f'"{key}"'.encode(), b'"' + b"x" * len(key) + b'"')
    )
    if key == "checked_by":
        open_state(path).verify()  # the fingerprint itself is there
    else:
        with pytest.raises(ValueError, match="w.safetensors.*fingerprint"):
            open_state(path).verify()
    assert begin > 0
    # Of other tools' files nothing is asked.
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    open_state(path).verify()
