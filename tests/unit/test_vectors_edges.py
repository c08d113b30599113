"""Where arithmetic on weights goes wrong quietly: edges, one by one.

Every case is held against numbers worked out by hand or in float64.
"""

import json

import pytest
import torch

from speechbrain_taskarith.vectors import (
    DARE,
    SLERP,
    TIES,
    Fisher,
    LinearAverage,
    LiNeS,
    TaskArithmetic,
    TaskVector,
    align_vocabulary,
    merge_checkpoints,
    open_state,
    read_vocabulary,
    save_state,
    search_scale,
)
from speechbrain_taskarith.vectors.rules import from_description
from speechbrain_taskarith.vectors.states.safetensors import (
    SafetensorsWriter,
    TensorInfo,
    read_header,
)
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    read_checkpoint_meta,
)

# -- tied tensors --------------------------------------------------------------


class Tied(torch.nn.Module):
    """Two names of one tensor."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Linear(2, 2, bias=False)
        self.out = torch.nn.Linear(2, 2, bias=False)
        self.out.weight = self.table.weight


def vector_of(**tensors):
    names = {"table": "table.weight", "out": "out.weight"}
    return TaskVector({names[k]: v for k, v in tensors.items()})


SHARED = torch.ones(2, 2)
UNFIT = [
    pytest.param(
        vector_of(table=SHARED, out=SHARED).restrict(["table*"]),
        1.0,
        id="one of two by choice",
    ),
    pytest.param(
        vector_of(table=torch.ones(2, 2), out=torch.zeros(2, 2)),
        1.0,
        id="two deltas",
    ),
    pytest.param(
        vector_of(table=torch.ones(2, 2), out=torch.ones(2, 2)),
        {"table*": 1.0, "out*": 0.5},
        id="two scales",
    ),
]


@pytest.mark.parametrize("tau, scale", UNFIT)
def test_tied_tensors_get_one_edit_or_none(tau, scale):
    model = Tied()
    before = model.table.weight.detach().clone()
    with pytest.raises(ValueError, match="are one tensor"):
        tau.apply(model, scale, any_base=True)
    with pytest.raises(ValueError, match="are one tensor"):
        tau.apply_(model, scale)
    assert torch.equal(model.table.weight, before), "nothing is changed"


def test_tied_tensors_in_a_scale_search_get_one_edit():
    model = Tied()
    base = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for case in UNFIT[:2]:
        with pytest.raises(ValueError, match="are one tensor"):
            search_scale(model, base, case.values[0], lambda m: 1.0, [0.5])


def test_an_edit_of_one_name_is_an_edit_of_the_tensor():
    model = Tied()
    before = model.table.weight.detach().clone()
    tau = vector_of(out=torch.ones(2, 2))
    edited = tau.apply(model, 0.5, any_base=True)
    assert edited["table.weight"] is edited["out.weight"]
    tau.apply_(model, 0.5)
    for found in (edited["out.weight"], model.table.weight.detach()):
        torch.testing.assert_close(found, before + 0.5)


def test_equal_edits_of_tied_tensors_count_once():
    model = Tied()
    before = model.table.weight.detach().clone()
    tau = vector_of(table=torch.ones(2, 2), out=torch.ones(2, 2))
    tau.apply_(model, 0.5)
    torch.testing.assert_close(model.table.weight.detach(), before + 0.5)


# -- numbers out of range ------------------------------------------------------


@pytest.mark.parametrize("scale", [1e39, -1e300])
def test_a_scale_that_float32_cannot_hold_is_refused(scale):
    """In float32 it is infinite, and infinity times zero is NaN."""
    base = {"w": torch.zeros(2)}
    tau = TaskVector.between(base, {"w": torch.tensor([0.0, 1.0])})
    for act in (
        lambda: tau.apply(base, scale),
        lambda: tau.apply(base, {"w": scale}),
        lambda: scale * tau,
        lambda: TaskArithmetic(scale=scale),
        lambda: LinearAverage(weights=[scale]),
        lambda: search_scale(
            torch.nn.Linear(1, 1), base, tau, lambda m: 1.0, [scale]
        ),
    ):
        with pytest.raises(ValueError, match="finite"):
            act()


def test_dividing_by_zero_is_an_error():
    with pytest.raises(ZeroDivisionError, match="task vector"):
        TaskVector({"w": torch.ones(2)}) / 0


@pytest.mark.parametrize("encoding", ["bf16", "sparse-bf16", "lossless"])
def test_a_vector_that_could_not_be_loaded_is_not_stored(tmp_path, encoding):
    # The largest float32 numbers round to infinity in bfloat16.
    largest = torch.finfo(torch.float32).max
    bad = float("nan") if encoding == "lossless" else largest
    tau = TaskVector({"w": torch.tensor([bad, 1.0])})
    with pytest.raises(ValueError, match="'w.*NaN or infinity"):
        tau.save(tmp_path / "tau.safetensors", encoding=encoding)
    assert not list(tmp_path.iterdir())


def test_a_difference_that_overflows_blames_nobody():
    base = {"w": torch.tensor([3e38])}
    with pytest.raises(ValueError, match="more than float32"):
        TaskVector.between(base, {"w": torch.tensor([-3e38])})


def test_rules_take_numpy_numbers():
    numpy = pytest.importorskip("numpy")
    rule = TIES(density=numpy.float32(0.5), scale=numpy.float32(0.25))
    assert rule.scale == 0.25 and type(rule.scale) is float
    json.dumps(rule.describe())


# -- types and layouts ---------------------------------------------------------


def test_integers_are_not_edited_by_a_floating_point_vector():
    """Rounding 0.5 * 1.0 to an integer would lose the edit silently."""
    tau = TaskVector({"w": torch.ones(2)})
    base = {"w": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="I64"):
        tau.apply(base, 0.5, any_base=True)


def test_integers_and_floating_point_weights_are_not_subtracted():
    """A quantised model minus its base would be a vector of scales."""
    floats, integers = {"w": torch.ones(2)}, {"w": torch.ones(2).int()}
    for base, tuned in ((floats, integers), (integers, floats)):
        with pytest.raises(ValueError, match="type.*I32|I32.*type"):
            TaskVector.between(base, tuned)


@pytest.mark.parametrize("factor", [True, "2", None])
def test_what_is_no_number_is_no_factor(factor):
    with pytest.raises(ValueError, match="finite number"):
        TaskVector({"w": torch.ones(2)}) * factor


def test_tensors_of_one_number_are_factors():
    tau = TaskVector({"w": torch.ones(2)}) * torch.tensor(0.5)
    assert tau["w"].tolist() == [0.5, 0.5]
    assert tau.metadata["factor"] == 0.5


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_type_does_not_matter(default):
    base = {"w": torch.rand(1000, generator=torch.Generator().manual_seed(0))}
    tuned = {"w": base["w"] + torch.linspace(-1, 1, 1000)}
    tau = TaskVector.between(base, tuned)
    module = torch.nn.ParameterDict({"w": torch.nn.Parameter(base["w"])})
    expected = tau.apply(base, 0.3)["w"]
    trimmed = TIES(0.5).combine([tau, 0.5 * tau])["w"]
    torch.set_default_dtype(default)
    try:
        tau.apply_(module, 0.3)
        again = TIES(0.5).combine([tau, 0.5 * tau])["w"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(module["w"].detach(), expected)
    assert again.dtype == torch.float32 and torch.equal(again, trimmed)


@pytest.mark.parametrize("encoding", ["int8", "sparse", "sparse-int8"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_encodings_do_not_depend_on_the_default_type(
    tmp_path, encoding, default
):
    tau = TaskVector({"w": torch.linspace(-1, 1, 77), "zero": torch.zeros(3)})
    tau.save(tmp_path / "one.safetensors", encoding=encoding)
    torch.set_default_dtype(default)
    try:
        tau.save(tmp_path / "two.safetensors", encoding=encoding)
        two = TaskVector.load(tmp_path / "two.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
    one = TaskVector.load(tmp_path / "one.safetensors")
    for name in one:
        assert torch.equal(one[name], two[name])


def test_vectors_that_are_read_as_needed_are_not_taken_for_tied(tmp_path):
    """Each look at a stored half-precision tensor maps it anew, often at the
    address of the one before; that does not make them one tensor."""
    shape = (64, 64)
    stored = {f"w{i}": torch.full(shape, i + 1.0).bfloat16() for i in range(8)}
    for number in range(2):
        save_state(stored, tmp_path / f"{number}.safetensors")
    lazy = [open_state(tmp_path / f"{n}.safetensors") for n in range(2)]
    merged = TaskArithmetic().combine(lazy)
    for i in range(8):
        assert torch.equal(merged[f"w{i}"], torch.full(shape, 2.0 * (i + 1)))


def test_a_vector_of_a_lazy_mapping_keeps_its_numbers(tmp_path):
    stored = {f"w{i}": torch.full((4,), float(i)) for i in range(5)}
    save_state(stored, tmp_path / "v.safetensors")
    tau = TaskVector(open_state(tmp_path / "v.safetensors"))
    for name, tensor in stored.items():
        assert torch.equal(tau[name], tensor)


LAYOUTS = {
    "transposed": lambda t: t.t(),
    "strided": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(6, -1),
    "scalar": lambda t: t[0, 0],
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_type_against_float64(layout, dtype, tmp_path):
    generator = torch.Generator().manual_seed(3)
    view = LAYOUTS[layout]
    base = view(torch.randn(6, 8, generator=generator).to(dtype))
    tuned = view(torch.randn(6, 8, generator=generator).to(dtype))
    others = {"x": torch.ones(3)}
    first, second = {"w": base, **others}, {"w": tuned, "x": torch.zeros(3)}
    wide = base.double() + 0.3 * (tuned.double() - base.double())
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    if dtype == torch.float64:
        tolerance["rtol"] = 1e-6  # computed in float32, as documented
    tau = TaskVector.between(first, second)
    edited = tau.apply(first, 0.3)["w"]
    assert edited.dtype == dtype
    torch.testing.assert_close(edited.double(), wide, **tolerance)
    output = tmp_path / "merged.safetensors"
    merge_checkpoints(
        first, [second], TaskArithmetic(0.3), output, show_progress=False
    )
    merged = open_state(output)["w"]
    assert torch.equal(merged, edited), "the engine gives the same bytes"
    if layout in ("transposed", "scalar", "empty"):
        module = torch.nn.ParameterDict(
            {"w": torch.nn.Parameter(base.clone()), "x": torch.ones(3)}
        )
        tau.apply_(module, 0.3)
        assert torch.equal(module["w"].detach(), edited)


# -- rules inside rules --------------------------------------------------------


def test_a_scale_by_layer_inside_another_rule_is_refused():
    """It would be left out silently: the outer rule's scale counts."""
    inner = LiNeS(TaskArithmetic(), slope=0.5)
    with pytest.raises(ValueError, match="LiNeS"):
        DARE(drop=0.5, then=inner)
    with pytest.raises(ValueError, match="LiNeS"):
        LiNeS(inner, slope=0.1)


def test_weights_in_memory_cannot_be_read_from_a_description():
    rule = Fisher([{"w": torch.ones(1)}])
    with pytest.raises(ValueError, match="make the object yourself"):
        from_description(rule.describe())


def test_slerp_of_one_vector_with_itself_is_it():
    a = {"w": torch.tensor([1e-30, 2e-30])}
    torch.testing.assert_close(SLERP(0.3).combine([a, a])["w"], a["w"])


# -- the scale search ----------------------------------------------------------


def test_groups_are_searched_outwards_from_where_they_start():
    """A hopeless scale on the near side rules out nothing on the far side."""
    model = torch.nn.ParameterDict(
        {"a": torch.nn.Parameter(torch.zeros(1)), "b": torch.zeros(1)}
    )
    base = {n: t.detach().clone() for n, t in model.state_dict().items()}
    tau = TaskVector({"a": torch.ones(1), "b": torch.ones(1)})

    def wer(m):
        # The best is a = 0.8, b = 0.6; the best common scale 0.7.
        return (
            1
            + 100 * (m["a"] - 0.8).abs().item()
            + 1000 * (m["b"] - 0.6).square().item()
        )

    scales = [round(0.1 * n, 1) for n in range(11)]
    search = search_scale(
        model, base, tau, wer, scales, groups=["a", "b"], show_progress=False
    )
    assert search.best_by_group == {"a": 0.8, "b": 0.6}
    assert any(row["state"] == "skipped" for row in search.table)


# -- files ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        [],
        7,
    ],
)
def test_a_header_of_other_types_is_damaged(tmp_path, entry):
    path = tmp_path / "bad.safetensors"
    text = json.dumps({"w": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match="bad.safetensors"):
        read_header(path)


@pytest.mark.parametrize("metadata", [[], {"a": 1}, "text"])
def test_a_header_whose_metadata_is_no_text_is_damaged(tmp_path, metadata):
    path = tmp_path / "bad.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"__metadata__": metadata, "w": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match="bad.safetensors"):
        read_header(path)


def test_a_writer_that_cannot_rename_leaves_nothing(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(OSError, match="x.safetensors"):
        with SafetensorsWriter(
            tmp_path / "x.safetensors", {"w": TensorInfo("F32", (1,))}
        ):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_written_file_obeys_the_umask(tmp_path):
    import os

    before = os.umask(0o077)
    try:
        save_state({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "3\n"])
def test_a_description_of_a_checkpoint_that_is_no_mapping(tmp_path, text):
    (tmp_path / "CKPT.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"CKPT\.yaml"):
        read_checkpoint_meta(tmp_path)


def test_a_half_deleted_checkpoint_is_not_the_newest(tmp_path):
    from speechbrain_taskarith.vectors import save_checkpoint

    for number, name in enumerate(["CKPT+a", "CKPT+b"]):
        save_checkpoint(
            {"model": {"w": torch.full((1,), float(number))}},
            tmp_path / name,
            meta={"unixtime": float(number)},
        )
    (tmp_path / "CKPT+b" / "model.ckpt").unlink()
    assert open_state(tmp_path)["w"].item() == 0.0
    (tmp_path / "CKPT+a" / "model.ckpt").unlink()
    with pytest.raises(ValueError, match=r"CKPT\+a lacks model\.ckpt"):
        open_state(tmp_path)


# -- vocabularies --------------------------------------------------------------


def test_speechbrains_label_encoder_is_read_as_it_writes(tmp_path):
    from speechbrain.dataio.encoder import CTCTextEncoder

    tokens = ["a", "'", '"', "\\", "\n", "\xa0", "ß", " => ", "\u2028", "=="]
    encoder = CTCTextEncoder()
    encoder.insert_blank(index=0)
    encoder.update_from_iterable(tokens, sequence_input=False)
    encoder.save(str(tmp_path / "encoder.txt"))
    assert read_vocabulary(tmp_path / "encoder.txt") == ["<blank>", *tokens]


def test_a_sentencepiece_vocabulary_may_hold_odd_separators(tmp_path):
    tokens = ["<unk>", "\u2028", "\x0b", "\x85", "\u2581a"]
    text = "".join(f"{token}\t-{n}\n" for n, token in enumerate(tokens))
    path = tmp_path / "m.vocab"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_vocabulary(path) == tokens


def test_a_vocabulary_of_one_token_and_tables_of_one_row():
    base = {"out": torch.tensor([[1.0]])}
    (a, b), union = align_vocabulary(
        [base, {"out": torch.tensor([[2.0]])}], [["x"], ["y"]], "out"
    )
    assert union == ["x", "y"]
    assert a["out"].flatten().tolist() == [1.0, 2.0]
    assert b["out"].flatten().tolist() == [1.0, 2.0]
