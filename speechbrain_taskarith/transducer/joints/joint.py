"""The joint network, and the loss that never holds all of its output."""

import torch

from speechbrain_taskarith.transducer.joints.chunked import chunked_transitions
from speechbrain_taskarith.transducer.loss.lattice import lattice_log_prob
from speechbrain_taskarith.transducer.loss.lengths import (
    check_targets,
    check_vocabulary,
    checked_lengths,
    reduced,
)
from speechbrain_taskarith.transducer.loss.transitions import (
    accumulate_type,
    next_labels,
)


class RNNTJoint(torch.nn.Module):
    """Joint network of an RNN-T: `W tanh(W_e x + W_p g + b) + c`.

    Arguments
    ---------
    encoder_dim : int
        Width of the encoder's output.
    predictor_dim : int
        Width of the predictor's output.
    joint_dim : int
        Width inside.
    vocab_size : int
        Number of scores V: labels and blank.
    blank_index : int
        Index of the blank among them.
    activation : type
        Class of the non-linearity.

    Example
    -------
    >>> joint = RNNTJoint(8, 6, 16, 10)
    >>> encoder_out, predictor_out = torch.rand(2, 5, 8), torch.rand(2, 4, 6)
    >>> joint(encoder_out.unsqueeze(2), predictor_out.unsqueeze(1)).shape
    torch.Size([2, 5, 4, 10])
    """

    normalization = "softmax"
    # The last operation of `scores` keeps no reference to its result.
    overwritable = True

    def __init__(
        self,
        encoder_dim,
        predictor_dim,
        joint_dim,
        vocab_size,
        blank_index=0,
        activation=torch.nn.Tanh,
    ):
        super().__init__()
        check_vocabulary(vocab_size, blank_index)
        self.encoder_layer = torch.nn.Linear(encoder_dim, joint_dim)
        self.predictor_layer = torch.nn.Linear(
            predictor_dim, joint_dim, bias=False
        )
        self.activation = activation()
        self.output = torch.nn.Linear(joint_dim, vocab_size)
        self.vocab_size = vocab_size
        self.blank_index = blank_index

    def project_encoder(self, encoder_out):
        """Bring the encoder's output to the joint's width, once a frame.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [..., encoder_dim].

        Returns
        -------
        torch.Tensor
            [..., joint_dim].
        """
        return self.encoder_layer(encoder_out)

    def project_predictor(self, predictor_out):
        """Bring the predictor's output to the joint's width, once a label.

        Arguments
        ---------
        predictor_out : torch.Tensor
            [..., predictor_dim].

        Returns
        -------
        torch.Tensor
            [..., joint_dim].
        """
        return self.predictor_layer(predictor_out)

    def scores(self, encoder, predictor):
        """Combine what was projected.

        Arguments
        ---------
        encoder, predictor : torch.Tensor
            [..., joint_dim], of shapes that broadcast.

        Returns
        -------
        torch.Tensor
            [..., V], raw scores.
        """
        return self.output(self.activation(encoder + predictor))

    def log_probs(self, encoder, predictor):
        """As `scores`, normalised; what searches use.

        Arguments
        ---------
        encoder, predictor : torch.Tensor
            [..., joint_dim], of shapes that broadcast.

        Returns
        -------
        torch.Tensor
            [..., V], log-probabilities of blank and labels.
        """
        scores = self.scores(encoder, predictor)
        return scores.log_softmax(-1, dtype=accumulate_type(scores.dtype))

    def forward(self, encoder_out, predictor_out):
        """Score every pair of frame and label position.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [B, T, 1, encoder_dim].
        predictor_out : torch.Tensor
            [B, 1, U + 1, predictor_dim].

        Returns
        -------
        torch.Tensor
            [B, T, U + 1, V], raw scores (of HAT: log-probabilities).
        """
        return self.scores(
            self.project_encoder(encoder_out),
            self.project_predictor(predictor_out),
        )

    def internal_lm(self, predictor_out):
        """Score labels without hearing anything: the internal LM.

        The encoder's part of the joint is set to 0, the blank is left out
        (Variani 2020, arXiv 2003.07705, section 4; for an RNN-T the same is
        an estimate, Meng 2021, arXiv 2011.01991).

        Arguments
        ---------
        predictor_out : torch.Tensor
            [..., predictor_dim].

        Returns
        -------
        torch.Tensor
            [..., V], log-probabilities of labels; minus infinity at the
            blank.

        Example
        -------
        >>> lm = RNNTJoint(8, 6, 16, 10).internal_lm(torch.rand(2, 3, 6))
        >>> bool(torch.allclose(lm.exp().sum(-1), torch.ones(2, 3)))
        True
        """
        projected = self.project_predictor(predictor_out)
        scores = self.scores(torch.zeros_like(projected), projected)
        return labels_only(scores, self.blank_index)


def labels_only(scores, blank_index):
    """Normalise scores over the labels alone.

    Arguments
    ---------
    scores : torch.Tensor
        [..., V].
    blank_index : int
        What to leave out.

    Returns
    -------
    torch.Tensor
        [..., V], minus infinity at the blank.
    """
    blank = torch.zeros(scores.shape[-1], dtype=torch.bool)
    blank[blank_index] = True
    blank = blank.to(scores.device)
    scores = scores.masked_fill(blank, float("-inf"))
    return scores.log_softmax(-1, dtype=accumulate_type(scores.dtype))


def as_joint(joint, blank_index):
    """Return a joint of ours, or a wrapped `joint(x[B,T,1,E], g[B,1,U+1,P])`.

    Arguments
    ---------
    joint : torch.nn.Module or callable
        A joint.
    blank_index : int
        The blank.

    Returns
    -------
    torch.nn.Module
        With the methods of `RNNTJoint`.
    """
    if hasattr(joint, "project_encoder"):
        return joint
    from speechbrain_taskarith.transducer.joints.speechbrain_joint import (
        SpeechBrainJoint,
    )

    return SpeechBrainJoint(joint, blank_index=blank_index)


def joint_transducer_loss(
    joint,
    encoder_out,
    predictor_out,
    targets,
    input_lens,
    target_lens,
    blank_index,
    reduction="mean",
    memory_budget=2**28,
    *,
    windows=None,
    fastemit_lambda=0.0,
):
    """`transducer_loss` of a joint network, in bounded memory.

    Joint, normaliser and choice of the two transitions of a node are computed
    for a few thousand nodes (t, u) at a time, and once more in backward; the
    [B, T, U + 1, V] scores are never there as a whole. Nodes in padding are
    left out, and in backward also those that no alignment passes through
    with a probability of 1e-9 or more (in float64: none).

    Arguments
    ---------
    joint : torch.nn.Module
        `RNNTJoint`, `HATJoint`, `SpeechBrainJoint`, or anything that takes
        [B, T, 1, E] and [B, 1, U + 1, P] and gives scores or
        log-probabilities. Without active dropout: a second computation would
        draw others.
    encoder_out : torch.Tensor
        [B, T, E].
    predictor_out : torch.Tensor
        [B, U + 1, P], of a blank and then the targets.
    targets : torch.Tensor
        [B, U], label indices.
    input_lens : torch.Tensor
        [B], relative lengths in (0, 1].
    target_lens : torch.Tensor
        [B], relative lengths in [0, 1].
    blank_index : int
        Index of the blank.
    reduction : str
        `"mean"` over the batch, `"sum"` or `"none"`.
    memory_budget : int
        Bytes for the joint's intermediate results.
    windows : torch.Tensor or None
        See `transducer_loss`.
    fastemit_lambda : float
        See `transducer_loss`.

    Returns
    -------
    torch.Tensor
        A scalar, or [B] for `"none"`, in nats.

    Raises
    ------
    ValueError
        As `transducer_loss`; a joint with active dropout; a blank index that
        is not the joint's.

    Example
    -------
    >>> joint = RNNTJoint(8, 6, 16, 10)
    >>> x, g = torch.rand(2, 5, 8), torch.rand(2, 4, 6)
    >>> y, one = torch.randint(1, 10, (2, 3)), torch.ones(2)
    >>> chunked = joint_transducer_loss(joint, x, g, y, one, one, 0)
    >>> from speechbrain_taskarith.transducer import transducer_loss
    >>> logits = joint(x.unsqueeze(2), g.unsqueeze(1))
    >>> bool(chunked.isclose(transducer_loss(logits, y, one, one, 0)))
    True
    """
    joint = as_joint(joint, blank_index)
    if joint.blank_index != blank_index:
        raise ValueError(
            f"blank_index {blank_index} given, but the joint was made with "
            f"blank_index {joint.blank_index}; give both the same"
        )
    if encoder_out.dim() == 4:
        encoder_out = encoder_out.squeeze(2)
    if predictor_out.dim() == 4:
        predictor_out = predictor_out.squeeze(1)
    frames = checked_lengths(input_lens, encoder_out.shape[1], "input")
    labels = checked_lengths(target_lens, targets.shape[1], "target", least=0)
    log_prob = sequence_log_prob(
        joint,
        encoder_out,
        predictor_out,
        targets,
        frames,
        labels,
        memory_budget=memory_budget,
        windows=windows,
        fastemit_lambda=fastemit_lambda,
    )
    return reduced(-log_prob, reduction)


def sequence_log_prob(
    joint,
    encoder_out,
    predictor_out,
    targets,
    frames,
    labels,
    *,
    encoder_rows=None,
    memory_budget=2**28,
    windows=None,
    fastemit_lambda=0.0,
):
    """log P(y|x) of label sequences, several per utterance if need be.

    What MinWER and re-scoring are built from: hypotheses of one utterance
    share its encoder output, which is never repeated in memory.

    Arguments
    ---------
    joint : torch.nn.Module
        With the methods of `RNNTJoint`.
    encoder_out : torch.Tensor
        [B, T, E].
    predictor_out : torch.Tensor
        [H, U + 1, P], one row a sequence.
    targets : torch.Tensor
        [H, U].
    frames : torch.Tensor
        [B], absolute.
    labels : torch.Tensor
        [H], absolute.
    encoder_rows : torch.Tensor or None
        [H], the utterance of each sequence; None where H = B.
    memory_budget, windows, fastemit_lambda
        See `joint_transducer_loss`.

    Returns
    -------
    torch.Tensor
        [H], float32 (float64 for float64 inputs).

    Example
    -------
    >>> joint = RNNTJoint(8, 6, 16, 10)
    >>> x, g = torch.rand(1, 5, 8), torch.rand(2, 4, 6)
    >>> y, three = torch.randint(1, 10, (2, 3)), torch.tensor([3, 2])
    >>> rows = torch.zeros(2, dtype=torch.long)
    >>> five = torch.tensor([5])
    >>> sequence_log_prob(joint, x, g, y, five, three, encoder_rows=rows).shape
    torch.Size([2])
    """
    device = encoder_out.device
    targets, labels = targets.to(device), labels.to(device)
    frames = frames.to(device)
    if encoder_rows is None:
        if len(encoder_out) != len(predictor_out):
            raise ValueError(
                f"{len(encoder_out)} rows of the encoder but "
                f"{len(predictor_out)} of the predictor"
            )
        encoder_rows = torch.arange(len(encoder_out), device=device)
    vocab_size = getattr(joint, "vocab_size", None)
    check_targets(
        targets,
        labels,
        joint.blank_index,
        2**31 if vocab_size is None else vocab_size,
        predictor_out.shape[1] - 1,
    )
    targets = targets[:, : predictor_out.shape[1] - 1]
    predictor_out = predictor_out[:, : targets.shape[1] + 1]
    following = next_labels(targets, labels, joint.blank_index)
    frames = frames[encoder_rows]
    blank, label = chunked_transitions(
        joint,
        joint.project_encoder(encoder_out),
        joint.project_predictor(predictor_out),
        encoder_rows,
        following,
        frames,
        labels,
        memory_budget,
    )
    log_prob = lattice_log_prob(
        blank, label[:, :, :-1], frames, labels, windows, fastemit_lambda
    )
    return log_prob.to(accumulate_type(encoder_out.dtype))
