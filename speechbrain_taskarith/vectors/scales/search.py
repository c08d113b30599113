"""Choosing the scale of an edit by its word error rate.

The model is loaded once, edited in place on its own device, evaluated, and
edited again: only the evaluation takes time.
"""

import itertools
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from speechbrain_taskarith.metrics.word_errors import rate_of
from speechbrain_taskarith.utils.patterns import (
    as_tuple,
    matches,
    require_match,
)
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.utils.training import keep_modes
from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.application import (
    check_tied_edits,
    check_writable,
    edit_into,
)
from speechbrain_taskarith.vectors.scales.table import REST, ScaleSearch
from speechbrain_taskarith.vectors.states.names import match_names
from speechbrain_taskarith.vectors.states.pairing import under_names_of
from speechbrain_taskarith.vectors.states.readers import as_model, as_state
from speechbrain_taskarith.vectors.task_vector import TaskVector, as_vector

ORACLE = "real_target"
# Words that a test split's name has as a part: "test-clean", "tst-COMMON",
# "eval92", "devtest"; not "latest", "contest", "validation".
_TEST_NAME = re.compile(r"(?<![a-z])(dev)?(test|tst|eval)(?!uat)")


def refuse_test_split(split):
    """Raise when a split's name looks like test data.

    Arguments
    ---------
    split : str
        The name of the split that a choice is to be made on.

    Raises
    ------
    ValueError
        For `test`, `test-clean`, `tst-COMMON`, `eval92`, `devtest`, ...

    Example
    -------
    >>> refuse_test_split("dev-other")
    >>> refuse_test_split("eval92")
    Traceback (most recent call last):
        ...
    ValueError: split 'eval92' looks like test data: ...
    """
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(split)).lower()
    if _TEST_NAME.search(plain):
        raise ValueError(
            f"split {str(split)!r} looks like test data: a scale chosen on "
            "it makes the test figures meaningless. Choose on a development "
            "split (split='valid'). For an upper bound that is reported as "
            f"one, say select_on={ORACLE!r}"
        )


def search_scale(
    model,
    base,
    tau,
    wer,
    scales,
    *,
    groups=None,
    split="valid",
    select_on=None,
    hopeless=2.0,
    max_degradation=None,
    domains=None,
    rounds=2,
    leave="initial",
    show_progress=True,
) -> "ScaleSearch":
    """Find the scale of a task vector with the least word error rate.

    `base + scale * tau` is written into the model in place, with the bytes
    that `TaskVector.apply` gives. Without groups this is a line search over
    `scales`. With groups it goes on from the best common scale: one group
    after another tries all scales while the others stay (coordinate search),
    until a whole round changes nothing.

    Arguments
    ---------
    model : torch.nn.Module
        Evaluated; on any device. Buffers that an evaluation changes
        (running statistics) are set back before the next.
    base : path, torch.nn.Module, or mapping of tensors
        The weights to edit.
    tau : TaskVector
        The edit; for several vectors, a rule's `combine` of them. It may
        come from another base, as that of SYN2REAL's sources does;
        `tau.apply(base, search.best)` then wants `any_base=True`.
    wer : callable
        `wer(model)` returns a number or a `WERReport`, or `{domain: number
        or WERReport}`; lower is better. With domains the mean is minimised.
        It should set the mode (`model.eval()`) that it needs; modes are set
        back at the end.
    scales : sequence of float, or dict
        What to try; with groups also `{group: [scale, ...]}`.
    groups : dict, sequence of str, or None
        `{group name: pattern or patterns}`, or patterns; the first that
        fits a parameter takes it. What fits none follows the best common
        scale.
    split : str
        The split that `wer` evaluates on; refused when it looks like test
        data (`refuse_test_split`).
    select_on : str or None
        What to call this choice in tables, e.g. `"synthetic_target"`; None
        takes the split's name. `"real_target"` marks an oracle: only that
        may use a test split, and every row says `oracle`.
    hopeless : float or None
        A setting is hopeless when its WER is NaN, infinite, or more than
        `hopeless` times the least WER so far. Scales farther out on its side
        (from 0; in a group's line from the scale it starts with) are not
        tried, since the WER has one minimum along a line, up to noise. They
        stand in the table as `"skipped"`. None tries all, except after NaN.
    max_degradation : float or None
        With `{domain: WER}`: a setting may not be chosen where a domain is
        worse than at scale 0 by more than this share (0.1: ten per cent).
    domains : sequence of str or None
        The domains that `max_degradation` protects (the old ones); None
        protects all.
    rounds : int
        At most so many rounds over the groups.
    leave : str
        `"initial"` gives the model its first weights back, `"best"` the best
        setting's. After an exception it has its first weights.
    show_progress : bool
        False shows no progress bar; none is shown where nobody watches, see
        `merge_checkpoints`.

    Returns
    -------
    ScaleSearch
        `.best` goes into `tau.apply(base, search.best)`.

    Raises
    ------
    ValueError
        A test split, no scales, scales that are not finite, a pattern that
        matches nothing, shapes that do not fit.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.vectors import TaskVector
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> base = {"weight": torch.tensor([[0.0]])}
    >>> tau = TaskVector.between(base, {"weight": torch.tensor([[10.0]])})
    >>> def error(model):
    ...     return abs(model.weight.item() - 3.0)
    >>> search = search_scale(model, base, tau, error, [0.1, 0.3, 0.5])
    >>> search.best, [row["wer"] for row in search.table]
    (0.3, [2.0, 0.0, 2.0])
    """
    how = {"split": split, "select_on": select_on, "hopeless": hopeless}
    how |= {"max_degradation": max_degradation, "domains": domains}
    oracle = check_choice(wer, leave, **how)
    base, tau = as_model(base), vector_of(tau)
    patterns = _group_patterns(tau, groups)
    candidates = _candidates(scales, patterns)
    search = ScaleSearch(split, select_on or split, oracle, patterns)
    total = sum(len(values) for values in candidates.values())
    with (
        keep_modes(model),
        InPlaceEdits(
            model, base, {REST: tau}, lambda _, name: _group_of(name, patterns)
        ) as edits,
        progress(
            total=total, desc="scales", show_progress=show_progress
        ) as bar,
    ):
        evaluations = Evaluations(search, wer, edits, bar, **how)
        if max_degradation is not None:
            # The reference comes first, and may always be chosen.
            candidates[REST] = [0.0, *candidates[REST]]
        best = _line(
            evaluations, candidates[REST], lambda s: dict.fromkeys(patterns, s)
        )
        for _ in range(rounds if groups and best else 0):
            before = best
            for group in [g for g in patterns if g != REST]:
                best = _line(
                    evaluations,
                    candidates[group],
                    lambda s, group=group, at=best: {**at, group: s},
                    start=best,
                    origin=best[group],
                )
            if best == before:
                break
        evaluations.choose(best)
        if leave == "best":
            edits.write(best, stay=True)
    return search


def vector_of(tau):
    """Return a `TaskVector`, of a path or a mapping, too."""
    tau = as_vector(tau)
    return tau if isinstance(tau, TaskVector) else TaskVector(tau)


def check_choice(
    wer, leave, *, split, select_on, hopeless, max_degradation, domains
):
    """Check what `search_scale` was told; tell whether it is an oracle."""
    checks.one_of("leave", leave, ("initial", "best"))
    oracle = select_on == ORACLE
    if not oracle:
        for name in (split, select_on or split, getattr(wer, "split", split)):
            refuse_test_split(name)
    if hopeless is not None:
        checks.in_range("hopeless", hopeless, 1, math.inf)
    if max_degradation is not None:
        checks.in_range("max_degradation", max_degradation, 0, math.inf)
    return oracle


@dataclass
class Evaluations:
    """Evaluates each setting once and enters it into the table."""

    search: ScaleSearch
    wer: object
    edits: object
    bar: object
    split: str
    select_on: str | None
    hopeless: float | None
    max_degradation: float | None
    domains: list | None
    rows: dict = field(default_factory=dict)
    least: float = math.inf
    limits: dict = field(default_factory=dict)  # by protected domain

    def __call__(self, setting):
        """Return the setting's row of the table."""
        self.bar.update(1)
        key = tuple(sorted(setting.items()))
        if key in self.rows:
            return self.rows[key]
        start = time.perf_counter()
        value = self.wer(self.edits.write(setting))
        seconds = time.perf_counter() - start
        domains = None
        if isinstance(value, Mapping):
            domains = {str(name): rate_of(v) for name, v in value.items()}
            if not domains:
                raise ValueError("wer(model) returned no domains")
            value = math.fsum(domains.values()) / len(domains)
        value = rate_of(value)
        if self.max_degradation is not None and not self.limits:
            self._set_limits(domains)
        state = "ok"
        most = math.inf if self.hopeless is None else self.hopeless * self.least
        if not math.isfinite(value) or value > most:
            state = "hopeless"
        elif any(domains[name] > most for name, most in self.limits.items()):
            state = "forbidden"
        else:
            self.least = min(self.least, value)
        row = self.search.add(
            setting,
            wer=value if math.isfinite(value) else None,
            domains=domains,
            seconds=round(seconds, 4),
            state=state,
        )
        self.rows[key] = row
        return row

    def skip(self, setting):
        """Enter a setting that is not worth trying."""
        if tuple(sorted(setting.items())) not in self.rows:
            self.search.add(
                setting, wer=None, domains=None, seconds=0.0, state="skipped"
            )

    def choose(self, setting):
        """Mark the best setting; raise if there is none."""
        if setting is None:
            raise ValueError(
                "no scale gave a usable word error rate (all were NaN, "
                "infinite or forbidden by max_degradation); the table: "
                f"{self.search.table}"
            )
        self.search.choose(setting)

    def _set_limits(self, domains):
        if domains is None:
            raise ValueError(
                "max_degradation needs a wer(model) that returns "
                "{domain: WER}; it returned a number"
            )
        protected = domains if self.domains is None else self.domains
        if missing := [name for name in protected if name not in domains]:
            raise ValueError(
                f"domains: wer(model) returns none called {missing}; it "
                f"returns {list(domains)}"
            )
        if unknown := [n for n in protected if not math.isfinite(domains[n])]:
            raise ValueError(
                f"max_degradation protects {unknown}, and their word error "
                "rate without an edit is NaN or infinite: nothing says how "
                "much worse it may become. Mend wer(model), or name other "
                "domains"
            )
        share = 1 + self.max_degradation
        self.limits = {name: share * domains[name] for name in protected}


class InPlaceEdits:
    """Writes `base + sum of scale * tau` into a model; restores it at the end.

    Holds one copy of the edited part of the base and of the vectors on the
    model's device, and of the model's own weights where they are not the
    base's. Leaving the context restores weights and buffers.

    `vectors` is `{key: vector}`, and `part(key, name)` what a setting calls
    the scale of a vector's parameter. `outside` holds what no vector edits.
    """

    def __init__(self, model, base, vectors, part, outside=None):
        self._model = model
        live = as_state(model)
        base = _model_of(live, base)
        outside = base if outside is None else _model_of(live, outside)
        parameters = {name for name, _ in model.named_parameters()}
        parts = {}  # {name: [(part, delta), ...]}
        for key, tau in vectors.items():
            tau = tau.named_as(live)
            for state in (base, live):
                tau.check_fits(state)
            of = {name: part(key, name) for name in tau}
            check_tied_edits(tau, live, of)
            for name, delta in tau.items():
                parts.setdefault(name, []).append((of[name], delta))
        origins = {name: live.aliases.get(name, name) for name in live}
        # Of a tied tensor the name that a vector edits, or else the last.
        names = {origin: name for name, origin in origins.items()}
        names |= {origins[name]: name for name in reversed(list(parts))}
        check_writable(live, names.values())
        self._edited, self._buffers, other = {}, [], []
        for name in names.values():
            tensor = live[name]
            if name in parts:
                deltas = [(p, d.to(tensor.device)) for p, d in parts[name]]
                copy = _copy(base[name], tensor)
                self._edited[name] = (tensor, copy, deltas)
                continue
            pair = (tensor, _copy(outside[name], tensor))
            # An evaluation may change buffers, never parameters.
            (other if name in parameters else self._buffers).append(pair)
        self._outside = [p for p in other if not torch.equal(*p)]
        edited = [e for e in self._edited.values() if not torch.equal(*e[:2])]
        self._initial = [
            (tensor, tensor.clone())
            for tensor, *_ in (*self._outside, *self._buffers, *edited)
        ]
        self._stay = False

    def __enter__(self):
        _overwrite(self._outside)
        return self

    def __exit__(self, kind, *_):
        if kind is not None or not self._stay:
            _overwrite((t, base) for t, base, _ in self._edited.values())
            _overwrite(self._initial)

    def write(self, setting, stay=False):
        """Edit by `{part: scale}` and return the model."""
        _overwrite(self._buffers)
        for name, (tensor, base, deltas) in self._edited.items():
            (part, delta), *more = deltas
            scale = setting[part]
            if more:
                delta, scale = delta * scale, 1.0
                for part, other in more:
                    delta += other * setting[part]
            edit_into(tensor, base, delta, scale, name)
        self._stay = stay
        return self._model


def _model_of(live, base):
    """Return a state that gives all that the model holds."""
    base = under_names_of(live, as_model(base))
    base.verify()
    match_names(base, live, partial=True)
    return base


def _line(evaluations, scales, setting_of, start=None, origin=0.0):
    """Search a line from `origin` outwards; return the best setting or None."""
    best, best_row = start, None if start is None else evaluations(start)
    stopped = set()
    # Outwards: a hopeless setting then rules out what lies behind it, and of
    # two equal settings the one nearer the origin (at first the base) stays.
    for scale in sorted(set(scales), key=lambda s: (abs(s - origin), s)):
        side = scale > origin
        if scale != origin and side in stopped:
            evaluations.skip(setting_of(scale))
            continue
        row = evaluations(setting_of(scale))
        if row["state"] == "hopeless" and scale != origin:
            stopped.add(side)
        elif row["state"] == "ok" and (
            best_row is None or row["wer"] < best_row["wer"]
        ):
            best, best_row = setting_of(scale), row
    return best


def _group_patterns(tau, groups):
    """Return `{group: [patterns]}`, with a last group for what is left."""
    if not groups:
        return {REST: [REST]}
    if not isinstance(groups, Mapping):
        groups = {pattern: pattern for pattern in groups}
    patterns = {group: list(as_tuple(p)) for group, p in groups.items()}
    for pattern in itertools.chain(*patterns.values()):
        require_match(tau, pattern)
    if any(_group_of(name, patterns) is None for name in tau):
        # Last, so that the first match wins in `best` too.
        patterns[REST] = patterns.pop(REST, []) + [REST]
    return patterns


def _candidates(scales, patterns):
    """Return `{group: [scale, ...]}`, the common line under `REST`."""
    if isinstance(scales, Mapping):
        unknown = [g for g in scales if g not in patterns and g != REST]
        if unknown:
            raise ValueError(
                f"scales: no groups {unknown}; there are {list(patterns)}"
            )
        common = scales.get(REST, [s for g in scales.values() for s in g])
        given = {g: scales.get(g, common) for g in (*patterns, REST)}
    else:
        given = dict.fromkeys((*patterns, REST), scales)
    for group, values in given.items():
        given[group] = [float(checks.finite("scales", v)) for v in values]
        if not given[group]:
            raise ValueError("scales: expected at least one")
    return given


def _group_of(name, patterns):
    """Return the first group whose patterns fit a name, or None."""
    for group, given in patterns.items():
        if any(matches(name, pattern) for pattern in given):
            return group
    return None


def _copy(source, like):
    return source.detach().to(like.device, like.dtype, copy=True)


@torch.no_grad()
def _overwrite(pairs):
    for tensor, content in pairs:
        tensor.copy_(content)
