"""SYN2REAL: what real speech adds to synthetic speech, as a vector.

Su et al., "Task Arithmetic can Mitigate Synthetic-to-Real Gap in Automatic
Speech Recognition", EMNLP 2024, https://arxiv.org/abs/2406.02925.
"""

from typing import NamedTuple

from speechbrain_taskarith.vectors.checks import scale_by_name
from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.states.names import (
    check_ties,
    match_names,
)
from speechbrain_taskarith.vectors.states.pairing import (
    under_names_of,
)
from speechbrain_taskarith.vectors.states.readers import as_model
from speechbrain_taskarith.vectors.task_vector import TaskVector


def syn2real(
    target_synthetic,
    pairs,
    *,
    scale=0.2,
    target_scale=1.0,
    base=None,
    rule=None,
    include=("*",),
    exclude=(),
    dtype=None,
):
    """Move a model that knows a domain from synthetic speech towards real.

    With `S` source domains, of which there is real and synthetic speech, and
    a target domain `T`, of which there is only synthetic speech (eq. 1-2)::

        theta = base + target_scale * (theta_syn^T - base)
                     + scale * mean_i(theta_real^i - theta_syn^i)

    The paper's `target_scale` is 1; then the base cancels out. Below 1 the
    target's own vector shrinks, so that less of its synthetic speech is kept.

    All models are fine-tuned from one pre-trained model, the base: the
    caller's word, since the weights do not show it. Several pairs are the
    paper's ensemble.

    Integer buffers (counters) and running statistics (BatchNorm) are the
    target's; `reestimate_statistics` renews the latter from data.

    Arguments
    ---------
    target_synthetic : path, torch.nn.Module, or mapping of tensors
        The target domain's model, tuned on synthetic speech.
    pairs : sequence of (real, synthetic)
        The source domains' models, in this order, each as the target's. A
        lone pair need not be put into a list. A base in place of the
        synthetic model adds all that real speech taught (a support language).
    scale : float or dict
        Share of the vector that is added; `{pattern: scale}` gives each
        parameter the scale of the first pattern that its name fits, or 0. The
        paper's scripts use 0.2 and 0.25.
    target_scale : float or dict
        Share of the target's own vector that is kept; in a dict, parameters
        that fit no pattern keep all of it. `search_scales` chooses both.
    base : path, torch.nn.Module, mapping of tensors, or None
        What all models were fine-tuned from; needed unless `target_scale`
        is 1.
    rule : object or None
        What makes one vector of several sources', by its `combine`; None
        takes the mean. Only `scale` scales: a scale of the rule's own is
        left aside, unless it depends on the parameter (`LiNeS`, `ByLayer`).
    include, exclude : str or sequence of str
        Patterns of the parameters to be edited; only these must be the same
        in all models.
    dtype : str, torch.dtype or None
        Type of the floating point tensors of the result; None: the target's.

    Returns
    -------
    dict
        The edited state, with the target's names, dtypes and order.

    Raises
    ------
    ValueError
        No pairs; a source or a base that is not the target's model (other
        names or shapes), or a base that is the target itself; patterns that
        fit nothing; no base where one is needed.
    KeyError
        A real and a synthetic model with different names.

    Example
    -------
    >>> import torch
    >>> target, real, synthetic, base = (
    ...     {"w": torch.tensor([float(value)])} for value in (10, 3, 1, 0)
    ... )
    >>> syn2real(target, [(real, synthetic)], scale=0.5)
    {'w': tensor([11.])}
    >>> syn2real(
    ...     target, (real, synthetic), scale=0.5, target_scale=0.7, base=base
    ... )
    {'w': tensor([8.])}
    """
    target = as_model(target_synthetic)
    edit = edit_of(
        target,
        pairs,
        scale=scale,
        target_scale=target_scale,
        base=base,
        rule=rule,
        include=include,
        exclude=exclude,
    )
    # The one place where a vector meets a base that it was not taken from:
    # that is the method.
    return edit.vector.apply(target, edit.scale, any_base=True, dtype=dtype)


class SyntheticToRealEdit(NamedTuple):
    """What `syn2real` does to the target: `target + scale * vector`."""

    vector: TaskVector
    scale: object
    difference: TaskVector  # real - synthetic speech, of all sources
    back: TaskVector | None  # base - target, where it is needed


def edit_of(
    target, pairs, *, scale, target_scale, base, rule, include, exclude
):
    """Return the edit that `syn2real` makes of a target, a `State`."""
    chosen = {"include": include, "exclude": exclude}
    vectors = []
    for number, (real, synthetic) in enumerate(_as_pairs(pairs)):
        synthetic = as_model(synthetic)
        vectors.append(TaskVector.between(synthetic, real, **chosen))
        _check_same(target, synthetic, f"pairs[{number}]", chosen)
    if rule is not None:
        difference = check_rule(rule).combine(vectors, base=target)
        if rule.scales_by_parameter():
            own = rule.scales(difference)
            difference = _sum(target, (difference, own))
    elif len(vectors) == 1:
        difference = vectors[0]
    else:
        difference = TaskVector.mean(v.named_as(target) for v in vectors)
    difference = difference.named_as(target)
    kept = scale_by_name(target_scale, difference, default=1.0)
    if base is not None:
        base = _check_same(target, as_model(base), "base", chosen)
    if all(share == 1 for share in kept.values()):
        return SyntheticToRealEdit(difference, scale, difference, None)
    if base is None:
        raise ValueError(
            f"target_scale={target_scale!r} is a share of what was learned "
            "since the base: give base=, the model that all others were "
            "fine-tuned from"
        )
    back = TaskVector.between(target, base, **chosen)
    if not any(delta.any() for delta in back.values()):
        raise ValueError(
            f"base: {base.label} holds the target's own weights in all that "
            "is edited, so that target_scale would change nothing; give the "
            "model that the target was fine-tuned from"
        )
    added = scale_by_name(scale, difference)
    left = {name: 1 - share for name, share in kept.items()}
    vector = _sum(target, (difference, added), (back, left))
    return SyntheticToRealEdit(vector, 1.0, difference, back)


def _sum(target, *parts):
    """Return the sum of vectors, each with a scale for every parameter."""
    for vector, scales in parts:
        check_ties(target, vector, scales)
    deltas, made = {}, {}
    for name, like in parts[0][0].items():
        # Names of one tensor go on sharing one.
        key = tuple(
            (id(vector[name]), scales[name]) for vector, scales in parts
        )
        if key not in made:
            made[key] = sum(
                vector[name].to(like.device) * scales[name]
                for vector, scales in parts
            )
        deltas[name] = made[key]
    return TaskVector(deltas)


def _check_same(target, other, what, chosen):
    """Return a model under the target's names; raise if it does not fit."""
    other = under_names_of(target, other)
    try:
        match_names(target, other, **chosen)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{what} and the target are not the same model; all models of "
            f"SYN2REAL are fine-tuned from one. {error.args[0]}"
        ) from None
    return other


def _as_pairs(pairs):
    """Check the pairs' form: a swapped or flat list would run and be wrong."""
    pairs, kinds = list(pairs), (tuple, list)
    if len(pairs) == 2 and not any(isinstance(pair, kinds) for pair in pairs):
        pairs = [tuple(pairs)]
    if not pairs:
        raise ValueError(
            "pairs: expected at least one (real, synthetic) pair of models "
            "of a source domain, got none"
        )
    for number, pair in enumerate(pairs):
        if not isinstance(pair, kinds) or len(pair) != 2:
            what = "expected (real, synthetic), two models"
            raise ValueError(f"pairs[{number}]: {what}")
    return pairs
