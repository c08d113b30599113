"""Choosing the scales of several vectors at once, over a grid."""

import itertools
import math
from collections.abc import Mapping

from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.utils.training import keep_modes
from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.scales.search import (
    Evaluations,
    InPlaceEdits,
    check_choice,
    vector_of,
)
from speechbrain_taskarith.vectors.scales.table import ScaleGrid


def search_scales(
    model,
    base,
    vectors,
    wer,
    scales,
    *,
    baseline=None,
    outside=None,
    split="valid",
    select_on=None,
    hopeless=2.0,
    max_degradation=None,
    domains=None,
    leave="initial",
    show_progress=True,
) -> "ScaleGrid":
    """Find the scales of several task vectors with the least word error rate.

    `base + scale_1 * tau_1 + scale_2 * tau_2 + ...` is written into the model
    in place, for all of a grid, with the bytes that the sum of the scaled
    vectors gives by `TaskVector.apply`.

    The grid is searched outwards from the baseline, one axis inside the
    other. Its scales are added to every axis: so the table also holds what
    each vector does alone, as the controls of SYN2REAL want it.

    Arguments
    ---------
    model, base, wer
        See `search_scale`.
    vectors : dict of str: TaskVector
        The vectors by name, over the same parameters or over others. A
        vector of another base is allowed: SYN2REAL adds one.
    scales : dict of str: sequence of float
        What to try for each vector, or one sequence for all.
    baseline : dict of str: float, or None
        The point to compare with: evaluated first, and the reference of
        `max_degradation`; names that are not in it get 0. None is the base.
        Of SYN2REAL, `{"target_scale": 1}`.
    outside : path, torch.nn.Module, mapping of tensors, or None
        What gives the weights and buffers that no vector holds; None takes
        the base. For models with BatchNorm, give the target of SYN2REAL, of
        which `syn2real` keeps the running statistics.
    split, select_on, hopeless, max_degradation, domains
        See `search_scale`. Where all settings of a line are hopeless, the
        lines beyond it are skipped.
    leave, show_progress
        See `search_scale`.

    Returns
    -------
    ScaleGrid
        `.best` is `{name: scale}`.

    Raises
    ------
    ValueError
        A test split, no vectors, scales for other names, scales that are
        not finite, shapes that do not fit.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.vectors import TaskVector
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> base = {"weight": torch.zeros(1, 2)}
    >>> right, up = (
    ...     TaskVector({"weight": torch.tensor([step])})
    ...     for step in ([1.0, 0.0], [0.0, 1.0])
    ... )
    >>> def error(model):
    ...     x, y = model.weight[0].tolist()
    ...     return (x - 0.5) ** 2 + (y - 0.2) ** 2 + 1
    >>> search = search_scales(
    ...     model, base, {"x": right, "y": up}, error,
    ...     {"x": [0, 0.5, 1], "y": [0, 0.2, 0.4]}, baseline={"x": 1},
    ... )
    >>> search.best, search.best_wer, len(search.table)
    ({'x': 0.5, 'y': 0.2}, 1.0, 9)
    """
    how = {"split": split, "select_on": select_on, "hopeless": hopeless}
    how |= {"max_degradation": max_degradation, "domains": domains}
    oracle = check_choice(wer, leave, **how)
    if not isinstance(vectors, Mapping) or hasattr(vectors, "apply"):
        got = type(vectors).__name__
        raise TypeError(f"vectors: expected {{name: TaskVector}}, got {got}")
    vectors = {name: vector_of(tau) for name, tau in vectors.items()}
    baseline = _baseline(vectors, baseline)
    axes = _axes(scales, baseline)
    search = ScaleGrid(split, select_on or split, oracle, baseline)
    total = math.prod(len(values) for values in axes.values())
    with (
        keep_modes(model),
        InPlaceEdits(
            model, base, vectors, lambda key, _: key, outside
        ) as edits,
        progress(
            total=total, desc="scales", show_progress=show_progress
        ) as bar,
    ):
        evaluations = Evaluations(search, wer, edits, bar, **how)
        _outwards(evaluations, axes, baseline, {})
        evaluations.choose(_least(search))
        if leave == "best":
            edits.write(search.best, stay=True)
    return search


def _outwards(evaluations, axes, origin, setting):
    """Evaluate a grid outwards; return the least WER, and if there is hope.

    What is hopeless, and no better than its neighbour nearer to the origin,
    has only worse behind it. A hopeless origin alone says nothing: the valley
    may lie askew.
    """
    names = list(axes)
    if len(setting) == len(names):
        row = evaluations(setting)
        wer = math.inf if row["wer"] is None else row["wer"]
        return wer, row["state"] != "hopeless"
    name, *inner = names[len(setting) :]
    centre, found, stopped, nearest = origin[name], [], set(), {}
    for scale in sorted(axes[name], key=lambda s: (abs(s - centre), s)):
        here, side = {**setting, name: scale}, scale > centre
        if scale != centre and side in stopped:
            for rest in itertools.product(*(axes[key] for key in inner)):
                evaluations.skip({**here, **dict(zip(inner, rest))})
            continue
        wer, hope = _outwards(evaluations, axes, origin, here)
        found.append((wer, hope))
        if scale == centre:
            nearest = {True: wer, False: wer}
        elif not hope and wer >= nearest[side]:
            stopped.add(side)
        nearest[side] = wer
    return min(wer for wer, _ in found), any(hope for _, hope in found)


def _least(search):
    """Return the allowed setting of least WER, or None; of equals the first."""
    rows = [row for row in search.table if row["state"] == "ok"]
    row = min(rows, key=lambda row: row["wer"], default=None)
    return row and {name: row[f"scale {name}"] for name in search.baseline}


def _baseline(vectors, baseline):
    """Return the baseline's scale of every vector."""
    if not vectors:
        raise ValueError("vectors: expected at least one")
    given = {} if baseline is None else dict(baseline)
    _require_known("baseline", given, vectors)
    return {
        str(name): float(
            checks.finite(f"baseline[{name!r}]", given.get(name, 0))
        )
        for name in vectors
    }


def _axes(scales, baseline):
    """Return `{name: sorted scales}`, the baseline's among them."""
    if not isinstance(scales, Mapping):
        scales = dict.fromkeys(baseline, list(scales))
    _require_known("scales", scales, baseline)
    if missing := [name for name in baseline if name not in scales]:
        raise ValueError(f"scales: none for {missing}")
    axes = {}
    for name, values in scales.items():
        given = {float(checks.finite("scales", value)) for value in values}
        if not given:
            raise ValueError(f"scales[{name!r}]: expected at least one")
        axes[name] = sorted(given | {baseline[name]})
    return {name: axes[name] for name in baseline}


def _require_known(what, given, names):
    if unknown := [name for name in given if name not in names]:
        raise ValueError(
            f"{what}: no vectors {unknown}; there are {list(names)}"
        )
