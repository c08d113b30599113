"""The search over several vectors' scales, against brute force and algebra."""

import csv
import itertools
import math

import pytest
import torch

from speechbrain_taskarith.vectors import (
    TaskVector,
    search_scales,
    syn2real,
)
from speechbrain_taskarith.vectors.scales import table as scale_table

GRID = {"own": [0.0, 0.5, 1.0], "other": [0.0, 0.3, 0.6]}


class Model(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = torch.nn.Linear(7, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.decoder = torch.nn.Linear(5, 3)
        with torch.no_grad():
            for tensor in self.norm.state_dict().values():
                tensor += 1 + seed


def state(seed, dtype=torch.float32):
    model = Model(seed).to(dtype)
    return {name: t.clone() for name, t in model.state_dict().items()}


def make(dtype=torch.float32):
    """Return a model and two vectors, the second of another base."""
    base = state(0, dtype)
    vectors = {
        "own": TaskVector.between(base, state(1, dtype)),
        "other": TaskVector.between(state(2, dtype), state(3, dtype)),
    }
    return Model(0).to(dtype), base, vectors


def position(model, base, vectors):
    """Return where a model is in the plane of the vectors: least squares."""
    names = list(next(iter(vectors.values())))
    now = model.state_dict()
    moved = torch.cat([(now[n] - base[n]).double().flatten() for n in names])
    columns = [
        torch.cat([tau[n].double().flatten() for n in names])
        for tau in vectors.values()
    ]
    matrix = torch.stack(columns, dim=1)
    return torch.linalg.lstsq(matrix, moved[:, None]).solution[:, 0].tolist()


def searched(error, grid=GRID, **options):
    """Search with an error that is a function of the scales."""
    model, base, vectors = make()

    def wer(model):
        return error(*(round(s, 3) for s in position(model, base, vectors)))

    return search_scales(model, base, vectors, wer, grid, **options)


def bowl(own, other):
    return 10 + (own - 0.5) ** 2 + 2 * (other - 0.3) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_evaluated_has_the_bytes_of_the_algebra(dtype):
    model, base, vectors = make(dtype)
    seen = []

    def wer(model):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return 1.0

    search = search_scales(model, base, vectors, wer, GRID, hopeless=None)
    assert len(seen) == len(search.table) == 9
    for row, found in zip(search.table, seen):
        summed = row["scale own"] * vectors["own"]
        summed += row["scale other"] * vectors["other"]
        expected = summed.apply(base, any_base=True)
        for name in base:
            assert torch.equal(found[name], expected[name]), (row, name)
    # And the model is what it was.
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, base[name])


def test_vectors_over_other_parameters():
    model, base, vectors = make()
    vectors["own"] = vectors["own"].restrict("encoder.*")
    vectors["other"] = vectors["other"].restrict("*.weight")
    expected = {name: tensor.double() for name, tensor in base.items()}
    for scale, tau in zip((0.5, 0.3), vectors.values()):
        for name, delta in tau.items():
            expected[name] = expected[name] + scale * delta.double()

    def wer(model):
        return sum(
            (tensor.double() - expected[name]).abs().sum().item()
            for name, tensor in model.state_dict().items()
        )

    search = search_scales(model, base, vectors, wer, GRID, hopeless=None)
    assert search.best == {"own": 0.5, "other": 0.3}
    assert search.best_wer == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("target_scale, scale", [(0.5, 0.3), (1.0, 0.6)])
def test_the_best_goes_into_syn2real(target_scale, scale):
    base, target, real, synthetic = (state(seed) for seed in range(4))
    vectors = {
        "target_scale": TaskVector.between(base, target),
        "scale": TaskVector.between(synthetic, real),
    }
    seen = {}

    def wer(model):
        at = (len(seen), {k: v.clone() for k, v in model.state_dict().items()})
        here = position(model, base, vectors)
        seen[tuple(round(s, 3) for s in here)] = at[1]
        return 1 + abs(here[0] - target_scale) + abs(here[1] - scale)

    search = search_scales(
        *(Model(0), base, vectors, wer, [0.0, 0.3, 0.5, 0.6]),
        baseline={"target_scale": 1.0},
        outside=target,
    )
    assert search.best == {"target_scale": target_scale, "scale": scale}
    edited = syn2real(target, (real, synthetic), base=base, **search.best)
    found = seen[target_scale, scale]
    for name, tensor in edited.items():
        torch.testing.assert_close(tensor, found[name], atol=1e-6, rtol=1e-6)
        if name.startswith("norm.running") or name.endswith("tracked"):
            assert torch.equal(tensor, target[name])
            assert torch.equal(found[name], target[name])
    assert torch.equal(target["norm.running_mean"], torch.full((5,), 2.0))


def test_the_table_holds_the_grid_and_the_controls():
    search = searched(bowl, {"own": [0.5], "other": [0.3]}, baseline={"own": 1})
    rows = [(row["scale own"], row["scale other"]) for row in search.table]
    # The baseline first, then outwards; each vector also alone.
    assert rows == [(1.0, 0.0), (1.0, 0.3), (0.5, 0.0), (0.5, 0.3)]
    for row, (own, other) in zip(search.table, rows):
        assert row["wer"] == pytest.approx(bowl(own, other))
    assert search.best == {"own": 0.5, "other": 0.3}
    assert [row["best"] for row in search.table] == [False] * 3 + [True]
    assert search.wer_at({"own": 0.5}) == pytest.approx(bowl(0.5, 0))
    assert search.wer_at({}) == pytest.approx(bowl(1, 0))
    assert search.wer_at({"own": 0.7}) is None
    assert search.to_dict()["baseline"] == {"own": 1.0, "other": 0.0}


def test_of_equals_the_nearest_to_the_baseline_is_taken():
    search = searched(lambda *_: 7.0, baseline={"own": 1.0})
    assert search.best == {"own": 1.0, "other": 0.0}


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_missed_where_the_error_has_one_minimum(seed):
    """Levels of a convex error are convex: beyond a hopeless line is worse."""
    draw = torch.Generator().manual_seed(seed)
    x, y, a, b, c = torch.rand(5, generator=draw, dtype=torch.float64).tolist()
    steps, sign = [i / 4 for i in range(-2, 7)], (-1) ** seed

    def error(own, other):
        u, v = own - x, other - y
        return 1 + 30 * (a * u * u + b * v * v + c * (u + sign * v) ** 2)

    search = searched(error, dict.fromkeys(GRID, steps), baseline={"own": 1.0})
    best = min(itertools.product(steps, steps), key=lambda at: error(*at))
    assert (search.best["own"], search.best["other"]) == best
    assert len(search.table) == len(steps) ** 2
    least = math.inf
    for row in search.table:
        value = error(row["scale own"], row["scale other"])
        if row["state"] == "skipped":
            assert row["wer"] is None and value > 2 * search.best_wer
        else:
            hopeless = value > 2 * least + 1e-9
            assert row["state"] == ("hopeless" if hopeless else "ok")
            least = min(least, value)
    skipped = [row for row in search.table if row["state"] == "skipped"]
    assert len(skipped) > 10


def test_lines_beyond_a_hopeless_line_are_skipped():
    calls = []

    def error(own, other):
        calls.append((own, other))
        return 10.0 if own >= 0.75 else 25.0

    grid = {"own": [0.0, 0.25, 0.5, 1.0, 1.25], "other": [0.0, 0.3]}
    search = searched(error, grid, baseline={"own": 1.0})
    assert (0.5, 0.0) in calls and (1.25, 0.3) in calls
    assert not [own for own, _ in calls if own < 0.5]
    states = {
        (r["scale own"], r["scale other"]): r["state"] for r in search.table
    }
    assert states[0.25, 0.0] == states[0.0, 0.3] == "skipped"
    assert len(states) == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_never_best(bad):
    search = searched(
        lambda own, other: bad if other > 0.5 else bowl(own, other),
        hopeless=None,
    )
    assert search.best == {"own": 0.5, "other": 0.3}
    with pytest.raises(ValueError, match="no scale gave a usable"):
        searched(lambda *_: bad)


def test_protected_domains_are_compared_with_the_baseline():
    def error(own, other):
        return {"kept": 10 + 10 * other, "new": 30 - 20 * other - 5 * (own < 1)}

    search = searched(
        error, baseline={"own": 1.0}, max_degradation=0.4, domains=["kept"]
    )
    assert search.best["other"] == 0.3
    free = searched(error, baseline={"own": 1.0})
    assert free.best["other"] == 0.6
    states = {row["scale other"]: row["state"] for row in search.table}
    assert states[0.6] == "forbidden"


def test_an_exception_restores_the_model_and_best_can_stay():
    model, base, vectors = make()
    calls = []

    def wer(model):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the decoder broke")
        model.norm.running_mean.add_(5)
        return 1 / len(calls)

    with pytest.raises(RuntimeError, match="the decoder broke"):
        search_scales(model, base, vectors, wer, GRID, leave="best")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, base[name]), name
    search = search_scales(model, base, vectors, wer, GRID, leave="best")
    summed = sum(scale * vectors[n] for n, scale in search.best.items())
    for name, tensor in summed.apply(base, any_base=True).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_test_split_is_refused_and_an_oracle_says_so():
    def never(*_):
        raise AssertionError("must not be evaluated")

    for options in ({"split": "test-clean"}, {"select_on": "tst"}):
        with pytest.raises(ValueError, match="looks like test data"):
            searched(never, **options)
    search = searched(bowl, split="test", select_on="real_target")
    assert search.oracle and all(row["oracle"] for row in search.table)


def test_csv_surface_and_plots(tmp_path):
    def error(own, other):
        value = math.nan if other == 0.6 and own == 0 else bowl(own, other)
        return {"nl": value, "cs": value + 2}

    search = searched(error, baseline={"own": 1.0}, hopeless=None)
    search.to_csv(tmp_path / "scales.csv")
    with open(tmp_path / "scales.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 9
    for row in rows:
        at = float(row["scale own"]), float(row["scale other"])
        if at == (0.0, 0.6):
            assert row["wer"] == "" and row["state"] == "hopeless"
        else:
            assert float(row["wer nl"]) == pytest.approx(bowl(*at))
    surface = search.surface()
    assert surface[0.5, 0.3] == pytest.approx(11.0)
    assert math.isnan(surface[0.0, 0.6]) and len(surface) == 9
    turned = search.surface(y="other")
    assert turned[0.3, 0.5] == surface[0.5, 0.3]
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        path = tmp_path / f"surface{suffix}"
        search.plot(path, chosen={"own": 0.5, "other": 0.0})
        assert path.read_bytes().startswith(magic)
    with pytest.raises(ValueError, match="expected two of"):
        search.plot(tmp_path / "x.png", y="nobody")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "options, chosen, framed",
    [
        ({}, None, {"chosen": (0.5, 0.3)}),
        ({}, {"own": 0.0}, {"chosen": (0.0, 0.0)}),
        ({"select_on": "real_target"}, None, {"oracle": (0.5, 0.3)}),
        (
            {"select_on": "real_target"},
            {"own": 1.0, "other": 0.3},
            {"oracle": (0.5, 0.3), "chosen": (1.0, 0.3)},
        ),
    ],
)
def test_what_the_plot_frames(tmp_path, monkeypatch, options, chosen, framed):
    seen = []
    plot = scale_table.plot_scale_surface
    monkeypatch.setattr(
        scale_table,
        "plot_scale_surface",
        lambda *given, **more: seen.append(more) or plot(*given, **more),
    )
    search = searched(bowl, baseline={"own": 1.0}, **options)
    search.plot(tmp_path / "s.png", chosen=chosen)
    framed = {"baseline": (1.0, 0.0), **framed}
    marks = ("baseline", "chosen", "oracle")
    assert {k: v for k, v in seen[0].items() if k in marks} == framed
    with pytest.raises(ValueError, match="chosen=.*no value"):
        search.plot(tmp_path / "t.png", chosen={"own": 0.7})


def test_three_vectors_and_one(tmp_path):
    model, base, vectors = make()
    vectors["third"] = TaskVector.between(state(4), state(5))

    def wer(model):
        own, other, third = position(model, base, vectors)
        return bowl(own, other) + (third + 0.5) ** 2

    grid = {**GRID, "third": [-0.5, 0.5]}
    search = search_scales(model, base, vectors, wer, grid)
    assert search.best == {"own": 0.5, "other": 0.3, "third": -0.5}
    assert len(search.table) == 27
    # Through the best of the third.
    surface = search.surface()
    assert surface[1.0, 0.6] == pytest.approx(bowl(1.0, 0.6))
    assert len(search.surface("own", "third")) == 9
    one = {"own": vectors["own"]}
    line = search_scales(model, base, one, lambda m: 2.0, [0.5])
    assert [row["scale own"] for row in line.table] == [0.0, 0.5]
    line.plot(tmp_path / "line.png")
    assert (tmp_path / "line.png").stat().st_size
    with pytest.raises(ValueError, match="a curve, not a surface"):
        line.surface()


@pytest.mark.parametrize(
    "vectors, scales, baseline, match",
    [
        ({}, [0.1], None, "at least one"),
        (None, {"own": [0.1]}, None, r"none for \['other'\]"),
        (None, {**GRID, "x": [1]}, None, r"no vectors \['x'\]"),
        (None, {**GRID, "own": []}, None, "at least one"),
        (None, [math.nan], None, "finite"),
        (None, GRID, {"target": 1}, r"no vectors \['target'\]"),
        (None, GRID, {"own": math.inf}, "finite"),
    ],
)
def test_bad_arguments(vectors, scales, baseline, match):
    model, base, given = make()
    given = given if vectors is None else vectors
    with pytest.raises(ValueError, match=match):
        search_scales(
            model, base, given, lambda m: 1.0, scales, baseline=baseline
        )


def test_other_models_and_things_are_refused():
    model, base, vectors = make()
    with pytest.raises(TypeError, match="name: TaskVector"):
        search_scales(model, base, vectors["own"], lambda m: 1.0, GRID)
    outside = {n: t for n, t in base.items() if n != "norm.running_mean"}
    with pytest.raises(KeyError, match="norm.running_mean"):
        search_scales(
            model, base, vectors, lambda m: 1.0, GRID, outside=outside
        )
    # One number would be spread over all five.
    base["norm.running_mean"] = torch.zeros(1)
    with pytest.raises(ValueError, match="norm.running_mean"):
        search_scales(model, base, vectors, lambda m: 1.0, GRID)
