"""The loss that never holds the whole output of a joint network.

The joint network is an ordinary module, but its scores exist for a moment
only. Forward keeps two transitions and the normaliser of every node. Backward
computes the scores of the nodes that matter once more and overwrites them with
their own gradient.
"""

import torch

from speechbrain_taskarith.transducer.joints.checks import (
    autocast_options,
    overwritable,
    refuse_dropout,
    try_joint,
)
from speechbrain_taskarith.transducer.joints.speechbrain_joint import as_joint
from speechbrain_taskarith.transducer.loss.input_checks import (
    check_targets,
    checked_lengths,
)
from speechbrain_taskarith.transducer.loss.lattice import (
    lattice_log_prob,
    usable_transitions,
)
from speechbrain_taskarith.transducer.loss.reductions import reduced
from speechbrain_taskarith.transducer.loss.transitions import (
    accumulate_type,
    next_labels,
    scores_gradient_,
    transitions,
)
from speechbrain_taskarith.utils.lengths import Refusals, padding_mask

# A node with less than this share of its sequence's largest gradient changes
# no bit of a float32 gradient: 1e-9 of 25,000 nodes together is 2.5e-5 in sums
# of several hundred. (Those of a float64 gradient are all taken.)
_FLOOR = 1e-9


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
    zero_infinity=False,
):
    """`transducer_loss` of a joint network, in bounded memory.

    Scores, normaliser and the two transitions of a node are computed for a few
    thousand nodes (t, u) at a time, and again in backward; the scores
    [B, T, U + 1, V] never exist as a whole. Nodes in padding are left out, and
    in backward also those whose gradient is below 1e-9 of the largest of their
    sequence (in float64: only those whose gradient is 0).

    Arguments
    ---------
    joint : torch.nn.Module
        `RNNTJoint`, `HATJoint`, `SpeechBrainJoint`, or anything that takes
        [B, T, 1, E] and [B, 1, U + 1, P] and returns scores or
        log-probabilities, also a function: the parameters that it reads get
        their gradients. Without active dropout: the second computation would
        draw other masks.
    encoder_out : torch.Tensor
        [B, T, E].
    predictor_out : torch.Tensor
        [B, U + 1, P], of a blank and then the targets.
    targets, input_lens, target_lens, blank_index, reduction
        As of `transducer_loss`.
    memory_budget : int
        Bytes for the joint's intermediate results.
    windows, fastemit_lambda, zero_infinity
        As of `transducer_loss`.

    Returns
    -------
    torch.Tensor
        A scalar, or [B] for `"none"`, in nats.

    Raises
    ------
    ValueError
        As `transducer_loss`; a joint with active dropout, or one that reads a
        tensor computed outside that needs a gradient; a blank index that is
        not the joint's.
    RuntimeError
        In backward: the joint's parameters were changed since forward.

    Example
    -------
    >>> from speechbrain_taskarith.transducer import RNNTJoint, transducer_loss
    >>> joint = RNNTJoint(8, 6, 16, 10)
    >>> x, g = torch.rand(2, 5, 8), torch.rand(2, 4, 6)
    >>> y, one = torch.randint(1, 10, (2, 3)), torch.ones(2)
    >>> chunked = joint_transducer_loss(joint, x, g, y, one, one, 0)
    >>> logits = joint(x.unsqueeze(2), g.unsqueeze(1))
    >>> bool(chunked.isclose(transducer_loss(logits, y, one, one, 0)))
    True
    """
    joint = as_joint(joint, blank_index)
    if encoder_out.dim() == 4:
        encoder_out = encoder_out.squeeze(2)
    if predictor_out.dim() == 4:
        predictor_out = predictor_out.squeeze(1)
    refusals = Refusals()
    frames = checked_lengths(
        input_lens, encoder_out.shape[:2], "input", refusals=refusals
    )
    labels = checked_lengths(target_lens, targets.shape, "target", 0, refusals)
    log_prob = _log_prob(
        joint,
        encoder_out,
        predictor_out,
        targets,
        frames,
        labels,
        None,
        memory_budget,
        windows,
        fastemit_lambda,
        refusals,
    )
    frames = frames.to(log_prob.device)
    return reduced(-log_prob, reduction, frames, zero_infinity)


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

    For MinWER and rescoring: the hypotheses of one utterance share its encoder
    output, which is never repeated in memory.

    Arguments
    ---------
    joint : torch.nn.Module
        With the methods of `RNNTJoint`.
    encoder_out : torch.Tensor
        [B, T, E].
    predictor_out, targets : torch.Tensor
        [H, U + 1, P] and [H, U], one row a sequence.
    frames, labels : torch.Tensor
        [B] and [H], absolute lengths.
    encoder_rows : torch.Tensor or None
        [H], the utterance of each sequence; None where H = B.
    memory_budget, windows, fastemit_lambda
        As of `joint_transducer_loss`.

    Returns
    -------
    torch.Tensor
        [H], float32 (float64 for float64 inputs).

    Example
    -------
    >>> from speechbrain_taskarith.transducer import RNNTJoint
    >>> joint = RNNTJoint(8, 6, 16, 10)
    >>> x, g = torch.rand(1, 5, 8), torch.rand(2, 4, 6)
    >>> y, three = torch.randint(1, 10, (2, 3)), torch.tensor([3, 2])
    >>> rows = torch.zeros(2, dtype=torch.long)
    >>> five = torch.tensor([5])
    >>> sequence_log_prob(joint, x, g, y, five, three, encoder_rows=rows).shape
    torch.Size([2])
    """
    return _log_prob(
        joint,
        encoder_out,
        predictor_out,
        targets,
        frames,
        labels,
        encoder_rows,
        memory_budget,
        windows,
        fastemit_lambda,
        Refusals(),
    )


def _log_prob(
    joint,
    encoder_out,
    predictor_out,
    targets,
    frames,
    labels,
    encoder_rows,
    memory_budget,
    windows,
    fastemit_lambda,
    refusals,
):
    """`sequence_log_prob`, which settles what is refused of lengths, too."""
    refuse_dropout(joint)
    if memory_budget <= 0:
        raise ValueError(f"memory_budget {memory_budget}: expected bytes, > 0")
    device = encoder_out.device
    targets, labels = targets.to(device), labels.to(device)
    if encoder_rows is None:
        if len(encoder_out) != len(predictor_out):
            raise ValueError(
                f"{len(encoder_out)} rows of the encoder but "
                f"{len(predictor_out)} of the predictor"
            )
        encoder_rows = torch.arange(len(encoder_out), device=device)
    frames, longest = frames.to(device), predictor_out.shape[1] - 1
    # 0 instead of NaN in padding: 0 * NaN would reach the layers' gradients.
    encoder = joint.project_encoder(_cleared(encoder_out, frames))
    predictor = joint.project_predictor(
        _cleared(predictor_out, labels + 1)[:, : targets.shape[1] + 1]
    )
    vocab_size, leaves = try_joint(joint, encoder, predictor)
    check_targets(
        targets, labels, joint.blank_index, vocab_size, longest, refusals
    )
    targets, frames = targets[:, :longest], frames[encoder_rows]
    shape = (len(predictor), encoder.shape[1], predictor.shape[1])
    if windows is not None:
        windows = windows[:, : targets.shape[1]]
    usable, _ = usable_transitions(shape, frames, labels, windows)
    following = next_labels(targets, labels, joint.blank_index)
    plan = _Plan(
        joint, vocab_size, usable, encoder_rows, following, memory_budget
    )
    blank, label = _Chunked.apply(plan, encoder, predictor, *leaves)
    log_prob = lattice_log_prob(
        blank, label[:, :, :-1], frames, labels, windows, fastemit_lambda
    )
    return log_prob.to(accumulate_type(encoder_out.dtype))


def _cleared(x, lengths):
    """Set padding of [B, T, d] to 0."""
    return x.masked_fill(padding_mask(lengths, x.shape[1])[..., None], 0.0)


class _Plan:
    """Which projected rows a node's scores are made from, and the pieces."""

    def __init__(
        self, joint, vocab_size, usable, encoder_rows, following, memory_budget
    ):
        self.joint, self.shape = joint, usable.shape
        self.vocab_size = vocab_size
        self.nodes = h, t, u = usable.nonzero().unbind(1)
        self.encoder_row = encoder_rows[h] * usable.shape[1] + t
        self.predictor_row = h * usable.shape[2] + u
        self.following = following[h, u]
        self.memory_budget = memory_budget

    def pieces(self, selected, width):
        """Split indices into the nodes so that a piece fits the budget."""
        # Scores in place and, in low precision, normalised in float32; of
        # the joint's width: input, sum, activation and their gradients.
        bytes_per_node = 8 * self.vocab_size + 24 * width
        return selected.split(max(1, self.memory_budget // bytes_per_node))

    def rows(self, encoder, predictor, piece):
        """Return the projected rows that a piece is made from."""
        e = encoder.flatten(0, 1).index_select(0, self.encoder_row[piece])
        p = predictor.flatten(0, 1).index_select(0, self.predictor_row[piece])
        return e, p


class _Chunked(torch.autograd.Function):
    """Blank and label transitions [H, T, U + 1]; 0 where unused.

    Of projected encoder [B, T, J] and predictor [H, U + 1, J]. The parameters
    are inputs so that gradients reach them.
    """

    @staticmethod
    def forward(ctx, plan, encoder, predictor, *parameters):
        dtype = accumulate_type(encoder.dtype)
        blank, label = (
            torch.zeros(plan.shape, dtype=dtype, device=encoder.device)
            for _ in range(2)
        )
        every = torch.arange(len(plan.nodes[0]), device=encoder.device)
        norm = torch.empty(len(every), dtype=dtype, device=encoder.device)
        ctx.plan, ctx.parameters = plan, parameters
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.autocast = autocast_options(encoder.device)
        ctx.overwritable = overwritable(plan.joint)
        for piece in plan.pieces(every, encoder.shape[-1]):
            nodes = tuple(index[piece] for index in plan.nodes)
            # No name for the scores: they would outlive their piece.
            blank[nodes], label[nodes], norm[piece] = transitions(
                _scores(ctx, *plan.rows(encoder, predictor, piece)),
                plan.following[piece],
                plan.joint.blank_index,
                plan.joint.normalization,
            )
        ctx.save_for_backward(encoder, predictor, norm)
        return blank, label

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_blank, by_label):
        encoder, predictor, norm = ctx.saved_tensors
        plan, inputs = ctx.plan, (encoder, predictor, *ctx.parameters)
        if [p._version for p in ctx.parameters] != ctx.versions:
            raise RuntimeError(
                "a parameter of the joint network was changed in place between "
                "forward and backward (a step of the optimizer?): the scores "
                "that backward computes anew would be others"
            )
        by_node = [grad[plan.nodes] for grad in (by_blank, by_label)]
        active = _active(by_blank, by_label, plan.nodes)
        # Sums of many small numbers: in float32 at least. Contiguous, so that
        # their rows are views, however a projection lays out its result.
        sums = [
            norm.new_zeros(tensor.shape) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad[1:])
        ]
        for piece in plan.pieces(active, encoder.shape[-1]):
            grads = _piece_gradients(
                ctx, encoder, predictor, norm, by_node, piece
            )
            rows = (plan.encoder_row[piece], plan.predictor_row[piece])
            for i, (total, grad) in enumerate(zip(sums, grads)):
                if total is None or grad is None:
                    continue
                if i < 2:
                    total.flatten(0, 1).index_add_(0, rows[i], grad.to(total))
                else:
                    total.add_(grad)
            # Before the next piece makes its own.
            del grads, grad
        return None, *(
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, inputs)
        )


def _scores(ctx, encoder, predictor):
    """Return scores that may be overwritten, as without gradient."""
    with torch.autocast(**ctx.autocast):
        scores = ctx.plan.joint.scores(encoder, predictor)
    return scores if ctx.overwritable else scores.clone()


def _piece_gradients(ctx, encoder, predictor, norm, by_node, piece):
    """Return a piece's gradients by its rows and by the parameters."""
    plan, joint = ctx.plan, ctx.plan.joint
    with torch.enable_grad(), torch.autocast(**ctx.autocast):
        leaves = [
            rows.detach().requires_grad_(needed)
            for rows, needed in zip(
                plan.rows(encoder, predictor, piece), ctx.needs_input_grad[1:3]
            )
        ]
        scores = joint.scores(*leaves)
    values = scores.detach()
    grad = scores_gradient_(
        values if joint.overwritable and ctx.overwritable else values.clone(),
        plan.following[piece],
        norm[piece],
        by_node[0][piece],
        by_node[1][piece],
        joint.blank_index,
        joint.normalization,
    )
    inputs = (*leaves, *ctx.parameters)
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    grads = iter(torch.autograd.grad(scores, trained, grad, allow_unused=True))
    return [next(grads) if tensor.requires_grad else None for tensor in inputs]


def _active(by_blank, by_label, nodes):
    """Return the indices of nodes whose gradient is worth computing."""
    size = by_blank.abs() + by_label.abs()
    floor = 0.0 if size.dtype == torch.float64 else _FLOOR
    # NaN compares as False: written so that it stays in.
    dropped = size <= floor * size.amax((1, 2), keepdim=True)
    return (~dropped)[nodes].nonzero().squeeze(1)
