"""Distillation: speech translation learns from text translation."""

from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask


def distillation_loss(student, teacher, lens, temperature=1.0):
    """Return the divergence of a student's words from a teacher's.

    `tau^2 KL(teacher || student)` at temperature tau (Hinton et al. 2015,
    arXiv 1503.02531), as a mean over tokens. The teacher gets no gradient.

    Arguments
    ---------
    student : torch.Tensor
        [B, U, V], logits or log-probabilities of speech translation.
    teacher : torch.Tensor
        [B, U, V], of text translation, for the same prefixes.
    lens : torch.Tensor
        [B], relative lengths on the axis U.
    temperature : float
        tau.

    Returns
    -------
    torch.Tensor
        A scalar in nats.

    Raises
    ------
    ValueError
        Shapes that differ.

    Example
    -------
    >>> import torch
    >>> scores = torch.randn(2, 3, 5)
    >>> float(distillation_loss(scores, scores + 1.0, torch.ones(2)).abs()) < 1e-6
    True
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}: "
            "expected the same targets and the same vocabulary"
        )
    taught = (teacher.detach() / temperature).log_softmax(-1)
    learnt = (student / temperature).log_softmax(-1)
    each = (taught.exp() * (taught - learnt)).sum(-1)
    outside = padding_mask(
        absolute_lengths(lens, student.shape[1]), student.shape[1]
    )
    total = each.masked_fill(outside, 0.0).sum()
    return temperature**2 * total / (~outside).sum()
