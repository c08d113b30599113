"""The vectors room on a GPU that is not there: devices and waits."""

import pytest
import torch
from fake_cuda import EACH, check, public_names, run

from speechbrain_taskarith.vectors import (
    DARE,
    DELLA,
    PCB,
    SCE,
    SLERP,
    TIES,
    TSVM,
    BoostedTSVM,
    Breadcrumbs,
    ByLayer,
    Fisher,
    IsoC,
    IsoCTS,
    Karcher,
    LinearAverage,
    LiNeS,
    Merge,
    ModelStock,
    MultiSLERP,
    Rule,
    SelectiveAttention,
    TaskArithmetic,
    TaskVector,
    cosine_matrix,
    layer_norms,
    reestimate_statistics,
    search_scale,
    search_scales,
    sign_agreement,
)


class Net(torch.nn.Module):
    """Matrices of layers, BatchNorm, and a tie."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.Linear(6, 6) for _ in range(2)]
        )
        self.norm = torch.nn.BatchNorm1d(6)
        self.table = torch.nn.Embedding(5, 6)
        self.out = torch.nn.Linear(6, 5, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(self.norm(x.mT).mT)


def nets(put, number=2):
    """Return a base and models near it."""
    base, *tuned = (Net() for _ in range(number + 1))
    with torch.no_grad():
        for model in tuned:
            model.load_state_dict(base.state_dict())
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return put(base), [put(model) for model in tuned]


def fishers(put):
    return [
        {
            name: put(torch.rand(tensor.shape))
            for name, tensor in Net().state_dict().items()
            if tensor.is_floating_point()
        }
        for _ in range(2)
    ]


RULES = {
    "LinearAverage": lambda put: LinearAverage(weights=[1, 3]),
    "TaskArithmetic": lambda put: TaskArithmetic(0.4),
    "TIES": lambda put: TIES(0.3),
    "Merge": lambda put: Merge(),
    "DARE": lambda put: DARE(0.5, seed=1),
    "DELLA": lambda put: DELLA(),
    "PCB": lambda put: PCB(),
    "SCE": lambda put: SCE(),
    "SLERP": lambda put: SLERP(0.3),
    "SLERP of weights": lambda put: SLERP(0.3, of="weights"),
    "MultiSLERP": lambda put: MultiSLERP(),
    "Karcher": lambda put: Karcher(),
    "ModelStock": lambda put: ModelStock(),
    "Breadcrumbs": lambda put: Breadcrumbs(0.4, 0.1),
    "Fisher": lambda put: Fisher(fishers(put)),
    "LiNeS": lambda put: LiNeS(TaskArithmetic(0.2), slope=0.4),
    "ByLayer": lambda put: ByLayer({"layers.*": TIES(0.5)}, TaskArithmetic()),
    "SelectiveAttention": lambda put: SelectiveAttention(
        0.25, attention=["layers.*"]
    ),
    "TSVM": lambda put: TSVM(precision="float64"),
    "BoostedTSVM": lambda put: BoostedTSVM(precision="float64"),
    "IsoC": lambda put: IsoC(precision="float64"),
    "IsoCTS": lambda put: IsoCTS(precision="float64"),
}


def combine(name):
    def case(put):
        base, models = nets(put)
        vectors = [TaskVector.between(base, model) for model in models]
        return dict(RULES[name](put).combine(vectors, base=base))

    return case


def vector(put):
    base, (tuned, other) = nets(put)
    one = TaskVector.between(base, tuned)
    two = TaskVector.between(base, other)
    both = [one, two]
    figures = one.norm(), one.cosine(two), cosine_matrix(both).tolist()
    layer_norms(one)
    return (
        dict(one + 0.5 * two),
        sign_agreement(both).tolist(),
        [round(f, 5) for f in figures[:2]],
    )


def edit_in_place(put):
    base, (tuned,) = nets(put, 1)
    TaskVector.between(base, tuned).apply_(base, 0.5)
    assert base.out.weight is base.table.weight
    return dict(base.state_dict())


def scales(put):
    base, (tuned,) = nets(put, 1)
    tau = TaskVector.between(base, tuned)
    edited, _ = nets(put, 0)

    def score(model):
        return abs(model.norm.weight.sum().item() - 6.0)

    search = search_scale(base, base, tau, score, [0.5], show_progress=False)
    del edited
    return search.best, dict(base.state_dict())


def two_scales(put):
    base, tuned = nets(put)
    taus = {str(n): TaskVector.between(base, t) for n, t in enumerate(tuned)}

    def score(model):
        return abs(model.norm.weight.sum().item() - 6.0)

    search = search_scales(
        base, base, taus, score, [0.0, 0.5], show_progress=False
    )
    return search.best, dict(base.state_dict())


def statistics(put):
    model, _ = nets(put, 0)
    assert reestimate_statistics(model, [put(torch.randn(2, 9, 6))]) == 1
    return model.norm.running_var


CASES = {
    **{f"rule {name}": combine(name) for name in RULES},
    "TaskVector": vector,
    "TaskVector.apply_": edit_in_place,
    "search_scale": scales,
    "search_scales": two_scales,
    "reestimate_statistics": statistics,
}
FILES = "works on files; tests/gpu runs it"
REASONS = {
    **dict.fromkeys(["merge_checkpoints", "SequentialEditor"], FILES),
    **dict.fromkeys(["EditingCheckpointer", "AtomicCheckpointer"], FILES),
    **dict.fromkeys(["TaskVectorPretrainer", "MergeReport"], FILES),
    **dict.fromkeys(["ModelCard", "Edit", "ScaleGrid", "ScaleSearch"], FILES),
    **dict.fromkeys(["save_checkpoint", "save_state", "open_state"], FILES),
    **dict.fromkeys(["find_checkpoint_folder", "read_vocabulary"], FILES),
    **dict.fromkeys(["as_state", "State", "align_vocabulary"], FILES),
    "lora_deltas": "TaskVector.from_lora, on the CPU of a file",
    "pool_normalizers": "in float64 on the CPU, whatever is given",
    "refuse_test_split": "names of files",
    "push_folder": "sends files",
    "syn2real": "TaskVector.mean of vectors, which is TaskVector's case",
    "plot_cosine_matrix": "draws numbers of Python",
    "plot_layer_norms": "draws numbers of Python",
}
# By place; each tensor, or each part of one, waits anew.
READING = {"vectors.states.state._bytes", "vectors.checks.all_finite"}
PLACES = {
    "rule LinearAverage": READING,
    "rule TaskArithmetic": READING,
    "rule TIES": READING
    | {
        "vectors.engine.thresholds.collect",
        "vectors.engine.thresholds.visit",
        "vectors.engine.workspace.to_numpy",
        "vectors.rules.sparsifying.ties._elect_undecided",
        "vectors.rules.sparsifying.ties.elect",
    },
    "rule Merge": READING,
    "rule DARE": READING
    | {
        "vectors.engine.workspace.from_numpy",
        "vectors.engine.workspace.to_numpy",
    },
    "rule DELLA": READING
    | {
        "vectors.engine.workspace.from_numpy",
        "vectors.engine.workspace.to_numpy",
        "vectors.rules.sparsifying.ties._elect_undecided",
        "vectors.rules.sparsifying.ties.elect",
    },
    "rule PCB": READING
    | {
        "vectors.engine.thresholds.collect",
        "vectors.engine.thresholds.visit",
        "vectors.engine.workspace.to_numpy",
        "vectors.rules.sparsifying.pcb.highest",
        "vectors.rules.sparsifying.pcb.smallest",
    },
    "rule SCE": READING | {"vectors.engine.workspace.from_numpy"},
    "rule SLERP": READING | {"vectors.rules.geometric.angular._dot_tables"},
    "rule SLERP of weights": READING
    | {
        "vectors.engine.workspace.from_numpy",
        "vectors.rules.geometric.angular._dot_tables",
    },
    "rule MultiSLERP": READING
    | {"vectors.rules.geometric.angular._dot_tables"},
    "rule Karcher": READING | {"vectors.rules.geometric.angular._dot_tables"},
    "rule ModelStock": READING
    | {"vectors.rules.geometric.angular._dot_tables"},
    "rule Breadcrumbs": READING
    | {
        "vectors.engine.thresholds.collect",
        "vectors.engine.thresholds.visit",
        "vectors.engine.workspace.to_numpy",
    },
    "rule Fisher": READING
    | {
        "vectors.engine.workspace.from_numpy",
        "vectors.rules.averaging.fisher.merge",
    },
    "rule LiNeS": READING,
    "rule ByLayer": READING
    | {
        "vectors.engine.thresholds.collect",
        "vectors.engine.thresholds.visit",
        "vectors.engine.workspace.to_numpy",
        "vectors.rules.sparsifying.ties._elect_undecided",
        "vectors.rules.sparsifying.ties.elect",
    },
    "rule SelectiveAttention": READING,
    "rule TSVM": READING
    | {
        "vectors.engine.workspace.from_numpy",
        "vectors.rules.spectral.matrices.merge",
        "vectors.rules.spectral.matrices.nearest_orthonormal",
        "vectors.rules.spectral.matrices.svd",
    },
    "rule BoostedTSVM": READING
    | {
        "vectors.engine.workspace.from_numpy",
        "vectors.rules.spectral.matrices.merge",
        "vectors.rules.spectral.matrices.nearest_orthonormal",
        "vectors.rules.spectral.matrices.svd",
        "vectors.rules.spectral.tsv_m._boost",
    },
    "rule IsoC": READING
    | {
        "vectors.engine.workspace.from_numpy",
        "vectors.rules.spectral.matrices.merge",
        "vectors.rules.spectral.matrices.svd",
    },
    "rule IsoCTS": READING
    | {
        "vectors.engine.workspace.from_numpy",
        "vectors.rules.spectral.matrices.merge",
        "vectors.rules.spectral.matrices.nearest_orthonormal",
        "vectors.rules.spectral.matrices.svd",
    },
    "TaskVector": READING
    | {
        "vectors.analysis._flat",
        "vectors.analysis._square",
        "vectors.products.counted",
        "vectors.products.dot",
    },
    "TaskVector.apply_": READING
    | {"vectors.application._largest", "vectors.application.edit_into"},
    "search_scale": READING
    | {
        "vectors.application.edit_into",
        "vectors.scales.search.__call__",
        "vectors.scales.search.__init__",
    },
    "search_scales": READING
    | {
        "vectors.application.edit_into",
        "vectors.scales.search.__call__",
        "vectors.scales.search.__init__",
    },
    "reestimate_statistics": {"vectors.checks.all_finite"},
}
WAITS = {name: dict.fromkeys(places, EACH) for name, places in PLACES.items()}


@pytest.mark.parametrize("name", CASES)
def test_devices_and_waits(name):
    check(run(CASES[name]), WAITS[name])


def test_everything_public_is_here():
    public = public_names("vectors")
    assert public == {n for n in public if n in globals()} | set(REASONS)
    assert not set(REASONS) & set(globals())
    assert {type(make(torch.clone)) for make in RULES.values()} >= {
        kind
        for name, kind in globals().items()
        if name in public - {"Rule"}
        and isinstance(kind, type)
        and issubclass(kind, Rule)
    }
