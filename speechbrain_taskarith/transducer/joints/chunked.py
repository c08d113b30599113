"""Transitions of a joint network, some nodes of the lattice at a time.

The joint network is an ordinary module; what is special is that its scores
live for a moment only. Forward keeps, of every node, the two transitions and
the normaliser. Backward computes the scores of the nodes that matter once
more and turns them into their own gradient where they lie.
"""

import torch

from speechbrain_taskarith.transducer.loss.lattice import usable_transitions
from speechbrain_taskarith.transducer.loss.transitions import (
    accumulate_type,
    scores_gradient_,
    transitions,
)

# A node with less than this share of its sequence's largest gradient changes
# no bit of a float32 gradient: 1e-9 of 25,000 nodes together is 2.5e-5 in sums
# of several hundred. (Those of a float64 gradient are all taken.)
_FLOOR = 1e-9


def chunked_transitions(
    joint,
    encoder,
    predictor,
    encoder_rows,
    following,
    frames,
    labels,
    memory_budget,
):
    """Return blank and label transitions of every node in use.

    Arguments
    ---------
    joint : torch.nn.Module
        With the methods of `RNNTJoint`.
    encoder : torch.Tensor
        [B, T, J], projected.
    predictor : torch.Tensor
        [H, U + 1, J], projected.
    encoder_rows : torch.Tensor
        [H], the row of `encoder` of each sequence.
    following : torch.Tensor
        [H, U + 1], the label that may come next.
    frames, labels : torch.Tensor
        [H], absolute lengths.
    memory_budget : int
        Bytes for scores and what is beside them.

    Returns
    -------
    blank, label : torch.Tensor
        [H, T, U + 1], 0 where nothing is in use.

    Raises
    ------
    ValueError
        A joint with active dropout, a budget that is no number of bytes.
    """
    _refuse_dropout(joint)
    if memory_budget <= 0:
        raise ValueError(f"memory_budget {memory_budget}: expected bytes, > 0")
    shape = (len(predictor), encoder.shape[1], predictor.shape[1])
    usable, _ = usable_transitions(shape, frames, labels)
    nodes = usable.nonzero().unbind(1)
    parameters = [p for p in joint.parameters() if p.requires_grad]
    plan = _Plan(joint, nodes, shape, encoder_rows, following, memory_budget)
    return _Chunked.apply(plan, encoder, predictor, *parameters)


def _refuse_dropout(joint):
    for name, module in joint.named_modules():
        active = module.training and getattr(module, "p", 0)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and active:
            raise ValueError(
                f"the joint network has dropout ({name}, p={module.p}): its "
                "scores are computed twice and would differ. Apply dropout to "
                "the outputs of encoder and predictor instead"
            )


class _Plan:
    """Which rows make which node, and how many go into a piece."""

    def __init__(
        self, joint, nodes, shape, encoder_rows, following, memory_budget
    ):
        h, t, u = nodes
        self.joint, self.nodes, self.shape = joint, nodes, shape
        self.encoder_row = encoder_rows[h] * shape[1] + t
        self.predictor_row = h * shape[2] + u
        self.following = following[h, u]
        self.memory_budget = memory_budget

    def pieces(self, of, width, vocab):
        """Yield index tensors into the nodes, a piece each."""
        # Scores in place and, in low precision, normalised in float32; of
        # the joint's width: input, sum, activation and their gradients.
        per_row = 8 * vocab + 24 * width
        rows = max(1, self.memory_budget // per_row)
        yield from of.split(rows)

    def rows(self, encoder, predictor, which):
        """Return the projected rows that a piece is made from."""
        e = encoder.flatten(0, 1).index_select(0, self.encoder_row[which])
        p = predictor.flatten(0, 1).index_select(0, self.predictor_row[which])
        return e, p


class _Chunked(torch.autograd.Function):
    """The transitions; parameters are inputs so that gradients reach them."""

    @staticmethod
    def forward(ctx, plan, encoder, predictor, *parameters):
        kind = accumulate_type(encoder.dtype)
        blank, label = (
            torch.zeros(plan.shape, dtype=kind, device=encoder.device)
            for _ in range(2)
        )
        every = torch.arange(len(plan.nodes[0]), device=encoder.device)
        norm = torch.empty(len(every), dtype=kind, device=encoder.device)
        vocab = plan.joint.vocab_size or _vocabulary(plan, encoder, predictor)
        width = encoder.shape[-1]
        for which in plan.pieces(every, width, vocab):
            where = tuple(index[which] for index in plan.nodes)
            # No name for the scores: they would outlive their piece.
            blank[where], label[where], norm[which] = transitions(
                plan.joint.scores(*plan.rows(encoder, predictor, which)),
                plan.following[which],
                plan.joint.blank_index,
                plan.joint.normalization,
            )
        ctx.plan, ctx.vocab, ctx.parameters = plan, vocab, parameters
        ctx.autocast = _autocast_state(encoder.device.type)
        ctx.save_for_backward(encoder, predictor, norm)
        return blank, label

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_blank, by_label):
        encoder, predictor, norm = ctx.saved_tensors
        plan, parameters = ctx.plan, ctx.parameters
        by_node = [grad[plan.nodes] for grad in (by_blank, by_label)]
        active = _active(by_blank, by_label, plan.nodes)
        # Sums of many small numbers: in float32 at least.
        sums = [
            torch.zeros_like(whole, dtype=norm.dtype) if needed else None
            for whole, needed in zip(
                (encoder, predictor, *parameters), ctx.needs_input_grad[1:]
            )
        ]
        width = encoder.shape[-1]
        for which in plan.pieces(active, width, ctx.vocab):
            found = _piece_gradients(
                ctx, encoder, predictor, norm, by_node, which
            )
            rows = (plan.encoder_row[which], plan.predictor_row[which])
            for i, (total, grad) in enumerate(zip(sums, found)):
                if total is None or grad is None:
                    continue
                if i < 2:
                    total.flatten(0, 1).index_add_(0, rows[i], grad.to(total))
                else:
                    total.add_(grad)
            # Before the next piece makes its own.
            del found, grad
        wholes = (encoder, predictor, *parameters)
        return None, *(
            None if total is None else total.to(whole.dtype)
            for total, whole in zip(sums, wholes)
        )


def _piece_gradients(ctx, encoder, predictor, norm, by_node, which):
    """Return a piece's gradients by its rows and by the parameters."""
    plan, joint = ctx.plan, ctx.plan.joint
    device_type, enabled, dtype = ctx.autocast
    with (
        torch.enable_grad(),
        torch.autocast(device_type, dtype=dtype, enabled=enabled),
    ):
        leaves = [
            rows.detach().requires_grad_(needed)
            for rows, needed in zip(
                plan.rows(encoder, predictor, which),
                ctx.needs_input_grad[1:3],
            )
        ]
        scores = joint.scores(*leaves)
    own = scores.detach()
    grad = scores_gradient_(
        own if joint.overwritable else own.clone(),
        plan.following[which],
        norm[which],
        by_node[0][which],
        by_node[1][which],
        joint.blank_index,
        joint.normalization,
    )
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    wanted += list(ctx.parameters)
    found = iter(torch.autograd.grad(scores, wanted, grad, allow_unused=True))
    return [
        next(found) if leaf.requires_grad else None
        for leaf in (*leaves, *ctx.parameters)
    ]


def _active(by_blank, by_label, nodes):
    """Return which nodes have a gradient worth computing."""
    size = by_blank.abs() + by_label.abs()
    least = 0.0 if size.dtype == torch.float64 else _FLOOR
    # NaN compares as False: written so that it stays in.
    dropped = size <= least * size.amax((1, 2), keepdim=True)
    return (~dropped)[nodes].nonzero().squeeze(1)


def _vocabulary(plan, encoder, predictor):
    """Ask a joint that does not say how many scores it gives."""
    first = torch.zeros(1, dtype=torch.long, device=encoder.device)
    return plan.joint.scores(*plan.rows(encoder, predictor, first)).shape[-1]


def _autocast_state(device_type):
    return (
        device_type,
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
    )
