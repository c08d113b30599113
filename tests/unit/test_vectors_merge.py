"""The merge engine: its results, whatever form, threads, chunks, device."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from speechbrain_taskarith.vectors import (
    TaskVector,
    merge_checkpoints,
    open_state,
    save_checkpoint,
)
from speechbrain_taskarith.vectors.engine.inputs import MergeInputs
from speechbrain_taskarith.vectors.engine.streaming import Stream
from speechbrain_taskarith.vectors.merge import watch_memory
from speechbrain_taskarith.vectors.rules import (
    DARE,
    DELLA,
    SLERP,
    TIES,
    TSVM,
    Breadcrumbs,
    Fisher,
    IsoC,
    Karcher,
    LinearAverage,
    LiNeS,
    ModelStock,
    MultiSLERP,
    TaskArithmetic,
)

SHAPES = {
    "emb.weight": (200, 30),
    "encoder.layers.0.w": (40, 50),
    "encoder.layers.1.w": (12, 5, 7),
    "encoder.layers.1.bias": (12,),
    "gain": (),
    "empty": (0, 4),
}


def make_models(number, seed=0, dtype=torch.float32, step=0.1):
    generator = torch.Generator().manual_seed(seed)
    base = {
        n: torch.randn(s, generator=generator).to(dtype)
        for n, s in SHAPES.items()
    }
    base["bn.running_var"] = torch.rand(12, generator=generator)
    base["bn.num_batches_tracked"] = torch.tensor(7)
    base["mask"] = torch.tensor([True, False, True])
    tuned = []
    for index in range(number):
        model = {
            n: (
                v.float() + step * torch.randn(v.shape, generator=generator)
            ).to(v.dtype)
            if v.is_floating_point()
            else v.clone()
            for n, v in base.items()
        }
        model["bn.num_batches_tracked"] += index + 1
        tuned.append(model)
    return base, tuned


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of four models in safetensors."""
    base, tuned = make_models(3)
    save_file(base, tmp_path / "base.safetensors")
    for index, model in enumerate(tuned):
        save_file(model, tmp_path / f"tuned{index}.safetensors")
    return tmp_path


def parents(folder, number=3):
    return [folder / f"tuned{index}.safetensors" for index in range(number)]


RULES = [
    TaskArithmetic(0.4),
    TaskArithmetic({"encoder.*": 0.4, "gain": -1.5}, weights=[1, 0.5, 2]),
    LinearAverage([3, 2, 1]),
    TIES(),
    TIES(0.5, 0.7, trim="tensor", elect="count"),
    DARE(0.6, 0.5),
    DARE(0.3, then=TIES(0.5)),
    Breadcrumbs(0.5, 0.05),
    DELLA(0.5, 0.2),
    SLERP(0.3),
    SLERP(0.3, of="weights"),
    Karcher(),
    MultiSLERP([1, 2, 3], scope="global", of="weights"),
    ModelStock(),
    LiNeS(TIES(scale=0.2), 0.5),
    TSVM(),
    IsoC(0.5),
    TaskArithmetic(0.0),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule)[:60])
def test_engine_equals_the_rule_in_memory_bit_for_bit(rule, folder):
    number = 2 if isinstance(rule, SLERP) else 3
    base, files = folder / "base.safetensors", parents(folder, number)
    taus = [TaskVector.between(base, file) for file in files]
    expected = rule(base, taus)
    report = merge_checkpoints(base, files, rule, folder / "out.safetensors")
    merged = load_file(folder / "out.safetensors")
    assert list(sorted(merged)) == sorted(expected)
    for name, value in expected.items():
        assert merged[name].dtype == value.dtype
        assert torch.equal(merged[name], value), name
    state = open_state(folder / "out.safetensors")
    assert report.fingerprint == state.fingerprint
    state.verify()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule)[:60])
def test_same_bytes_whatever_threads_and_chunks(rule, folder):
    number = 2 if isinstance(rule, SLERP) else 3
    written = set()
    # Sums over elements are taken in runs: those chunks are multiples.
    for threads, chunk in ((1, None), (2, 128), (3, 1000), (2, 7)):
        if chunk == 7 and not isinstance(rule, (TIES, TaskArithmetic)):
            continue
        merge_checkpoints(
            folder / "base.safetensors",
            parents(folder, number),
            rule,
            folder / "out.safetensors",
            threads=threads,
            chunk=chunk,
        )
        data = (folder / "out.safetensors").read_bytes()
        written.add(hashlib.sha256(data).hexdigest())
    assert len(written) == 1


def test_the_same_with_the_sample_of_large_vectors(tmp_path, monkeypatch):
    """Threads and chunks once more, where thresholds come from a sample."""
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(400, 1000, generator=generator)}
    tuned = [
        {"w": base["w"] + 0.01 * torch.randn(400, 1000, generator=generator)}
        for _ in range(3)
    ]
    written = set()
    for threads, chunk in ((1, None), (3, 1 << 14), (2, 3000)):
        for rule in (TIES(), TIES(trim="tensor")):
            path = tmp_path / "out.safetensors"
            merge_checkpoints(
                base, tuned, rule, path, threads=threads, chunk=chunk
            )
            written.add(hashlib.sha256(open_state(path)["w"].numpy()).digest())
    # One tensor: its threshold is the whole vector's.
    assert len(written) == 1


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64]
)
def test_other_types_are_edited_in_float32_and_cast_back(dtype, tmp_path):
    base, tuned = make_models(2, dtype=dtype)
    for rule in (TaskArithmetic(0.7), TIES(0.3), ModelStock()):
        taus = [TaskVector.between(base, model) for model in tuned]
        expected = rule(base, taus)
        path = tmp_path / "out.safetensors"
        merge_checkpoints(base, tuned, rule, path)
        for name, value in load_file(path).items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name])


def test_buffers_are_copied_from_the_base(folder):
    base = load_file(folder / "base.safetensors")
    out = folder / "out.safetensors"
    merge_checkpoints(
        folder / "base.safetensors", parents(folder), TaskArithmetic(), out
    )
    merged = load_file(out)
    for name in ("bn.running_var", "bn.num_batches_tracked", "mask"):
        assert torch.equal(merged[name], base[name])
    merge_checkpoints(
        folder / "base.safetensors",
        parents(folder),
        LinearAverage(),
        out,
        buffers="edit",
    )
    assert not torch.equal(
        load_file(out)["bn.running_var"], base["bn.running_var"]
    )


def test_include_and_exclude(folder):
    base = load_file(folder / "base.safetensors")
    out = folder / "out.safetensors"
    report = merge_checkpoints(
        folder / "base.safetensors",
        parents(folder),
        TaskArithmetic(),
        out,
        include=["encoder.*"],
        exclude=["*.bias"],
    )
    assert report.edited == 2
    for name, value in load_file(out).items():
        same = name not in ("encoder.layers.0.w", "encoder.layers.1.w")
        assert torch.equal(value, base[name]) == same


def test_patterns_come_before_names_are_compared(folder):
    """Models with different heads are one model without them."""
    base, tuned = make_models(2)
    base["head.w"] = torch.ones(5, 3)
    tuned[0]["head.w"] = torch.ones(7, 3)
    tuned[1]["other_head.w"] = torch.ones(2)
    out = folder / "out.safetensors"
    with pytest.raises(ValueError, match="head.w"):
        merge_checkpoints(base, tuned, TaskArithmetic(), out)
    chosen = {"exclude": ["*head.w", "*num_batches*"]}
    merge_checkpoints(base, tuned, TaskArithmetic(), out, **chosen)
    taus = [TaskVector.between(base, model, **chosen) for model in tuned]
    expected = TaskArithmetic()(base, taus)
    merged = load_file(out)
    assert torch.equal(merged["head.w"], base["head.w"])
    for name, value in expected.items():
        assert torch.equal(merged[name], value), name
    # ... and vectors over different parameters are alike where they overlap.
    taus[0] = taus[0].restrict(exclude=["gain"])
    with pytest.raises(KeyError, match="gain"):
        merge_checkpoints(base, taus, TaskArithmetic(), out)
    report = merge_checkpoints(
        base, taus, TaskArithmetic(), out, include=["encoder.*"]
    )
    assert report.edited == 3


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_torch_files_in_and_out_keep_ties(suffix, tmp_path):
    weight = torch.randn(6, 4)
    base = {"emb": weight, "out": weight, "b": torch.randn(3)}
    torch.save(base, tmp_path / f"base{suffix}")
    for index in range(2):
        moved = weight + torch.randn(6, 4)
        model = {"emb": moved, "out": moved, "b": base["b"] + 1}
        torch.save({"state_dict": model}, tmp_path / f"t{index}{suffix}")
    out = tmp_path / f"out{suffix}"
    files = [tmp_path / f"t{index}{suffix}" for index in range(2)]
    rule = TIES(0.5, 0.3)
    report = merge_checkpoints(tmp_path / f"base{suffix}", files, rule, out)
    merged = open_state(out)
    assert merged["emb"].data_ptr() == merged["out"].data_ptr()
    assert report.fingerprint == merged.fingerprint
    taus = [
        TaskVector.between(tmp_path / f"base{suffix}", file) for file in files
    ]
    expected = rule(tmp_path / f"base{suffix}", taus)
    for name in base:
        assert torch.equal(merged[name], expected[name])
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert not left


def test_hugging_face_folder_in_and_out(folder):
    source = folder / "hf"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (folder / "base.safetensors").rename(source / "model.safetensors")
    report = merge_checkpoints(source, parents(folder), TIES(), folder / "new")
    assert (folder / "new" / "config.json").exists()
    merged = open_state(folder / "new")
    assert merged.fingerprint == report.fingerprint
    assert merged["emb.weight"].shape == (200, 30)


def test_speechbrain_folders_in_and_out(tmp_path):
    from speechbrain.utils.checkpoints import Checkpointer

    generator = torch.Generator().manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    saver = Checkpointer(tmp_path / "save", {"model": model})
    folders = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        folders.append(saver.save_checkpoint().path)
    merged = tmp_path / "merged" / "CKPT+merged"
    report = merge_checkpoints(folders[0], folders[1:], TIES(0.5), merged)
    again = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    loader = Checkpointer(tmp_path / "merged", {"model": again})
    assert loader.recover_if_possible() is not None
    assert open_state(merged).fingerprint == report.fingerprint
    taus = [TaskVector.between(folders[0], path) for path in folders[1:]]
    expected = TIES(0.5)(folders[0], taus)
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name])


def test_recoverable_names_the_weights(tmp_path):
    folders = [tmp_path / f"CKPT+{i}" for i in range(2)]
    for number, path in enumerate(folders):
        weights = {"w": torch.full((2,), float(number))}
        save_checkpoint({"asr": weights, "lm": weights}, path)
    with pytest.raises(ValueError, match=r"asr \(2 parameters\), lm \(2"):
        merge_checkpoints(folders[0], folders[1:], TIES(), tmp_path / "x.pt")
    merged = tmp_path / "CKPT+merged.0"
    merge_checkpoints(
        *(folders[0], folders[1:], TaskArithmetic(0.5), merged),
        recoverable="asr",
    )
    assert open_state(merged, recoverable="asr")["w"].tolist() == [0.5, 0.5]
    assert open_state(merged, recoverable="lm")["w"].tolist() == [0.0, 0.0]


def test_a_folder_of_weights_from_checkpoints_holds_the_new_ones_only(tmp_path):
    folders = [tmp_path / f"CKPT+{i}" for i in range(2)]
    for number, path in enumerate(folders):
        weights = {"w": torch.full((2,), float(number))}
        save_checkpoint({"model": weights}, path)
    merged = tmp_path / "merged"
    merge_checkpoints(folders[0], folders[1:], TaskArithmetic(0.5), merged)
    assert open_state(merged)["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("encoding", ["lossless", "bf16", "sparse", "int8"])
def test_stored_vectors_are_parents_too(encoding, folder):
    base = folder / "base.safetensors"
    taus, files = [], []
    for index, file in enumerate(parents(folder)):
        files.append(folder / f"tau{index}.safetensors")
        TaskVector.between(base, file).save(files[-1], encoding=encoding)
        taus.append(TaskVector.load(files[-1]))
    expected = TIES()(base, taus)
    report = merge_checkpoints(base, files, TIES(), folder / "o.safetensors")
    for name, value in load_file(folder / "o.safetensors").items():
        assert torch.equal(value, expected[name])
    assert {p["kind"] for p in report.parents} == {"task vector"}
    # ... and so are vectors in memory, beside checkpoints.
    mixed = [taus[0], parents(folder)[1], files[2]]
    report = merge_checkpoints(
        base, mixed, TaskArithmetic(), folder / "o.safetensors"
    )
    kinds = [parent["kind"] for parent in report.parents]
    assert kinds == ["task vector", "checkpoint", "task vector"]


def test_vector_of_another_base_is_refused(folder):
    tau = folder / "tau.safetensors"
    TaskVector.between(parents(folder)[1], parents(folder)[0]).save(tau)
    arguments = (folder / "base.safetensors", [tau], TaskArithmetic())
    out = folder / "out.safetensors"
    with pytest.raises(ValueError, match="is not the base"):
        merge_checkpoints(*arguments, out)
    assert not out.exists()
    with pytest.raises(ValueError, match="any_base=True"):
        merge_checkpoints(*arguments, out, fingerprint=False)
    merge_checkpoints(*arguments, out, any_base=True)


def test_fisher_weights_stream_along(folder):
    base = load_file(folder / "base.safetensors")
    fishers = []
    for index in range(3):
        values = {
            n: torch.rand(v.shape, generator=torch.Generator().manual_seed(i))
            for i, (n, v) in enumerate(base.items(), index)
        }
        fishers.append(folder / f"fisher{index}.safetensors")
        save_file(values, fishers[-1])
    rule = Fisher(fishers)
    out = folder / "out.safetensors"
    merge_checkpoints(
        folder / "base.safetensors", parents(folder), rule, out, chunk=100
    )
    taus = [
        TaskVector.between(folder / "base.safetensors", file)
        for file in parents(folder)
    ]
    expected = rule(base, taus)
    for name, value in load_file(out).items():
        assert torch.equal(value, expected[name])


def test_report_and_provenance(folder):
    out = folder / "out.safetensors"
    report = merge_checkpoints(
        folder / "base.safetensors",
        parents(folder),
        TIES(0.5, 0.3),
        out,
        metadata={"note": "best of three"},
    )
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.rule == TIES(0.5, 0.3).describe()
    base = open_state(folder / "base.safetensors")
    assert report.base["fingerprint"] == base.fingerprint
    assert report.bytes_written == sum(base.info(name).nbytes for name in base)
    stored = open_state(out).metadata
    provenance = json.loads(stored["merge"])
    assert provenance["parents"] == report.parents
    assert stored["note"] == "best of three"
    if sys.platform == "linux":
        assert report.peak_anonymous > 0
    plain = merge_checkpoints(
        folder / "base.safetensors",
        parents(folder),
        TIES(0.5, 0.3),
        folder / "plain.safetensors",
        fingerprint=False,
    )
    assert plain.fingerprint is None
    again = open_state(folder / "plain.safetensors")
    assert again.fingerprint == report.fingerprint


def test_safetensors_to_safetensors_imports_no_torch(folder):
    """`import torch` alone would cost more memory than all of the merge."""
    script = (
        "import sys\n"
        "from speechbrain_taskarith.vectors import *\n"
        "from speechbrain_taskarith.vectors import merge_checkpoints, TIES\n"
        f"base = {str(folder / 'base.safetensors')!r}\n"
        f"tuned = {[str(p) for p in parents(folder)]!r}\n"
        f"out = {str(folder / 'out.safetensors')!r}\n"
        "merge_checkpoints(base, tuned, TIES(), out)\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'speechbrain' not in sys.modules\n"
    ).replace("from speechbrain_taskarith.vectors import *\n", "")
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "rule", [*RULES, TSVM(precision="float64")], ids=lambda rule: str(rule)[:60]
)
def test_torch_kernels_give_the_numbers_of_numpy(rule, folder):
    """What runs on a GPU, run on the CPU: the same formulas by torch."""
    number = 2 if isinstance(rule, SLERP) else 3
    found = []
    for module, device in ((None, None), (torch, torch.device("cpu"))):
        inputs = MergeInputs(
            folder / "base.safetensors", parents(folder, number)
        )
        if module is not None:
            inputs.xp, inputs.device = module, device
        merged = {}

        def emit(place, values, work, merged=merged):
            merged[place.name, place.start] = torch.as_tensor(values).clone()

        stream = Stream(inputs, rule.stages, 1 << 16)
        stream.merge(rule, emit)
        found.append(merged)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        shape = inputs.shapes[key[0]]
        if isinstance(rule, TSVM) and rule.precision == "float32" and shape:
            # Each library's float32 SVD is the exact one of a matrix that is
            # off by up to max(rows, columns) * eps of its norm. That turns
            # singular vectors by as much over the gap between neighbouring
            # singular values, here a few times more. In float64, the last of
            # the rules above, the same formula has to agree strictly.
            longest = max(shape[0], value.numel() // shape[0] or 1)
            rounding = longest * torch.finfo(torch.float32).eps
            error = (found[1][key] - value).norm()
            assert error <= 10 * rounding * value.norm(), key
        elif rule.whole_tensors or hasattr(rule, "scope"):
            torch.testing.assert_close(found[1][key], value)
        else:
            assert torch.equal(found[1][key], value), key


def test_device_argument(folder, device):
    out, again = folder / "out.safetensors", folder / "again.safetensors"
    arguments = (folder / "base.safetensors", parents(folder), TIES())
    merge_checkpoints(*arguments, out)
    merge_checkpoints(*arguments, again, device=device)
    assert out.read_bytes() == again.read_bytes()


def test_a_memory_limit_counts_the_rows_that_a_stage_needs(tmp_path):
    rule, output = DELLA(0.5), tmp_path / "merged.safetensors"
    base, tuned = ({"w": torch.randn(2, 300_000)} for _ in range(2))
    row = 300_000 * rule.bytes_per_element(1)
    with pytest.raises(ValueError, match=f"memory_limit=.*{row} bytes"):
        merge_checkpoints(base, [tuned], rule, output, memory_limit=row - 1)
    report = merge_checkpoints(
        base, [tuned], rule, output, threads=4, memory_limit=3 * row
    )
    assert report.threads == 3


def test_a_memory_limit_where_all_tensors_are_empty(tmp_path):
    empty = {"w": torch.ones(0, 3)}
    output = tmp_path / "out.safetensors"
    merge_checkpoints(empty, [empty], TIES(), output, memory_limit=1000)
    assert open_state(output).info("w").shape == (0, 3)


def test_memory_limit(folder):
    arguments = (folder / "base.safetensors", parents(folder), TIES())
    out, small = folder / "out.safetensors", folder / "small.safetensors"
    merge_checkpoints(*arguments, out)
    report = merge_checkpoints(*arguments, small, memory_limit=1 << 19)
    assert report.threads == 1
    assert report.chunk * 96 <= 1 << 19
    assert out.read_bytes() == small.read_bytes()
    with pytest.raises(ValueError, match="memory_limit=1000.*at least"):
        merge_checkpoints(*arguments, small, memory_limit=1000)
    with pytest.raises(ValueError, match="memory_limit"):
        merge_checkpoints(*arguments[:2], TSVM(), small, memory_limit=1 << 17)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_properties(tmp_path_factory, data):
    """Order of the vectors, scale 0, density 1, one vector."""
    number = data.draw(st.integers(1, 4))
    levels = data.draw(st.booleans())
    values = st.integers(-3, 3) if levels else st.floats(-2, 2, width=32)
    numbers = st.lists(values, min_size=6, max_size=6)
    base = {"w": torch.tensor(data.draw(numbers), dtype=torch.float32)}
    tuned = [
        {"w": torch.tensor(data.draw(numbers), dtype=torch.float32)}
        for _ in range(number)
    ]
    density = data.draw(st.floats(0, 1))
    folder = tmp_path_factory.mktemp("merge")

    def merged(rule, models):
        path = folder / "out.safetensors"
        merge_checkpoints(base, models, rule, path, threads=1)
        return load_file(path)["w"]

    order = data.draw(st.permutations(range(number)))
    shuffled = [tuned[index] for index in order]
    for rule in (TIES(density), TaskArithmetic(), LinearAverage()):
        torch.testing.assert_close(
            merged(rule, tuned), merged(rule, shuffled), rtol=1e-5, atol=1e-5
        )
    zero = merged(TIES(density, scale=0.0), tuned)
    assert torch.equal(zero.view(torch.int32), base["w"].view(torch.int32))
    # All kept: one vector gives back the fine-tuned model, up to rounding.
    torch.testing.assert_close(merged(TIES(1), tuned[:1]), tuned[0]["w"])
    one = merged(TIES(density), tuned[:1])
    changed = int((one != base["w"]).sum())
    assert changed <= round(density * 6)


def test_the_watch_sees_memory(tmp_path):
    with watch_memory(0.001) as watch:
        held = bytearray(64 << 20)
        held[::4096] = b"x" * len(held[::4096])
        import time

        time.sleep(0.05)
    if watch.peak is not None:
        assert watch.peak > 64 << 20
