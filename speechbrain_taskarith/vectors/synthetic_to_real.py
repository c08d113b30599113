"""SYN2REAL: what real speech adds to synthetic speech, as a vector.

Su et al., "Task Arithmetic can Mitigate Synthetic-to-Real Gap in Automatic
Speech Recognition", EMNLP 2024, https://arxiv.org/abs/2406.02925.
"""

from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.states.names import (
    match_names,
    under_names_of,
)
from speechbrain_taskarith.vectors.states.readers import as_model
from speechbrain_taskarith.vectors.task_vector import TaskVector


def syn2real(
    target_synthetic, pairs, *, scale=0.2, rule=None, include=("*",), exclude=()
):
    """Move a model that knows a domain from synthetic speech towards real.

    With `S` source domains, of which there is real and synthetic speech, and
    a target domain `T`, of which there is only synthetic speech (eq. 1-2)::

        theta = theta_syn^T + scale * mean_i(theta_real^i - theta_syn^i)

    All models are fine-tuned from one pre-trained model: the caller's word,
    since the weights do not show it. Several pairs are the paper's ensemble.

    Integer buffers (counters) and running statistics (BatchNorm) are the
    target's; `reestimate_statistics` renews the latter from data.

    Arguments
    ---------
    target_synthetic : path, torch.nn.Module, or mapping of tensors
        The target domain's model, tuned on synthetic speech.
    pairs : sequence of (real, synthetic)
        The source domains' models, in this order, each as the target's. A
        lone pair need not be put into a list.
    scale : float or dict
        Share of the vector that is added; `{pattern: scale}` gives each
        parameter the scale of the first pattern that its name fits. The
        paper's scripts use 0.2 and 0.25.
    rule : object or None
        What makes one vector of several, by its `combine`; None takes the
        mean. Only `scale` scales: a scale of the rule's own is left aside.
    include, exclude : str or sequence of str
        Patterns of the parameters to be edited; only these must be the same
        in all models.

    Returns
    -------
    dict
        The edited state, with the target's names, dtypes and order.

    Raises
    ------
    ValueError
        No pairs, a source that is not the target's model (other names or
        shapes), or patterns that fit nothing.
    KeyError
        A real and a synthetic model with different names.

    Example
    -------
    >>> import torch
    >>> target, real, synthetic = (
    ...     {"w": torch.tensor([float(value)])} for value in (10, 3, 1)
    ... )
    >>> syn2real(target, [(real, synthetic)], scale=0.5)
    {'w': tensor([11.])}
    """
    target = as_model(target_synthetic)
    chosen = {"include": include, "exclude": exclude}
    vectors = []
    for number, (real, synthetic) in enumerate(_as_pairs(pairs)):
        synthetic = as_model(synthetic)
        vectors.append(TaskVector.between(synthetic, real, **chosen))
        try:
            match_names(target, under_names_of(target, synthetic), **chosen)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"pairs[{number}] and the target are not the same model; all "
                "models of SYN2REAL are fine-tuned from one. "
                f"{error.args[0]}"
            ) from None
    if rule is not None:
        combined = check_rule(rule).combine(vectors, base=target)
    elif len(vectors) == 1:
        combined = vectors[0]
    else:
        combined = TaskVector.mean(vectors)
    # The one place where a vector meets a base that it was not taken from:
    # that is the method.
    return combined.apply(target, scale, any_base=True)


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
