"""Audio-AdapterFusion: attention over adapters, frame by frame."""

import math

import torch
from torch.nn import functional as F

from speechbrain_taskarith.adapters.bank import weight_and_bias
from speechbrain_taskarith.adapters.combination.base import Combination
from speechbrain_taskarith.adapters.combination.folding import (
    FoldedFusion,
    product,
)
from speechbrain_taskarith.adapters.combination.running import (
    STRETCH,
    running_mean,
)


class AudioAdapterFusion(Combination):
    """Attention over the adapters of a layer, without a task ID ("A-AF").

    For every frame h, with one head and the adapters' input as query (Ngai
    et al., "Audio-AdapterFusion", 2023, arXiv 2310.13015; Pfeiffer et al.,
    "AdapterFusion", 2021)::

        s = softmax_n((W_Q h + b_Q) . (W_K a_n)),   o = sum_n s_n W_V a_n
        h' = h + LN(o)

    A key bias would cancel in the softmax, so there is none. `W_V` starts as
    the identity. The order of the adapters does not matter, and one adapter
    alone gives `W_V a_1`.

    The attended sum is computed in the bottlenecks. With
    `q = W_K^T (W_Q h + b_Q)`, scores are `(W_up,n^T q) . h_n + beta_n . q`
    and `o = W_V (W_up (s h) + s beta)`: exact, and [B, T, N, d] is never
    held.

    Arguments
    ---------
    bank : AdapterBank or None
        Whose adapters; None makes a template for `insert_adapters`.
    scaled : bool
        True divides the scores by the root of the width of queries and keys.
    ln_init : str or None
        Start of the LN before the residual, see `Combination`: `"one"`,
        `"small"`, `"zero"`, `"match"` or None for no LN. LN of zero has a
        gradient gain of `1 / sqrt(eps)`, about 316: combine trained adapters
        only, or match.
    attention_dim : int or None
        Width of queries and keys, at least 1 or a `ValueError`; None takes
        d. A small one has fewer parameters.
    names, form, recompute
        See `Combination`.
    running : bool
        True averages the scores over all frames so far (dimension -2 is
        time) before the softmax. Beyond the paper, whose attention looks at
        one frame alone: a frame seldom tells the task, an utterance does.
        It looks at no later frame, and goes on from chunk to chunk where
        layers have SpeechBrain's `forward_streaming` and in our `Emformer`:
        the state is part of the streaming context. Refused where it would
        start anew: with the key-value cache of `generate`
        (`use_cache=False`).
    guided : bool
        True keeps what `AdapterHandle.attention_loss` needs. Beyond the
        paper as well: it teaches the attention which task an utterance of
        the training data is from.

    Example
    -------
    >>> from speechbrain_taskarith.adapters import AdapterBank
    >>> bank = AdapterBank(["news", "calls"], d_model=8, bottleneck=2)
    >>> fusion = AudioAdapterFusion(bank)
    >>> fusion(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    >>> fusion.last_weights.shape
    torch.Size([3, 5, 2])
    """

    per_adapter = ()

    def __init__(
        self,
        bank=None,
        scaled=False,
        ln_init="one",
        *,
        attention_dim=None,
        names=None,
        form="auto",
        recompute=False,
        running=False,
        guided=False,
    ):
        whole = isinstance(attention_dim, int) and attention_dim is not True
        if attention_dim is not None and not (whole and attention_dim >= 1):
            raise ValueError(
                f"attention_dim is {attention_dim!r}, expected a whole number "
                ">= 1 or None"
            )
        super().__init__(
            bank,
            names=names,
            ln_init=ln_init,
            form=form,
            recompute=recompute,
        )
        self.scaled, self.running, self.guided = scaled, running, guided
        self.attention_dim = attention_dim
        if bank is not None:
            width = bank.d_model
            inner = width if attention_dim is None else attention_dim
            self._scale = inner**-0.5 if scaled else 1.0
            self.query = torch.nn.Linear(width, inner)
            self.key = torch.nn.Linear(width, inner, bias=False)
            self.value = torch.nn.Linear(width, width, bias=False)
            # Small scores: the start is near the mean of all adapters.
            torch.nn.init.normal_(self.query.weight, std=0.02)
            torch.nn.init.zeros_(self.query.bias)
            torch.nn.init.normal_(self.key.weight, std=0.02)
            torch.nn.init.eye_(self.value.weight)

    def settings(self):
        """As `Combination.settings`."""
        return {
            "scaled": self.scaled,
            "attention_dim": self.attention_dim,
            "running": self.running,
            "guided": self.guided,
            **super().settings(),
        }

    def extra_repr(self):
        """As `Combination.extra_repr`."""
        return f"{super().extra_repr()}, attention_dim={self.attention_dim}"

    def penalty(self, weight=0.01):
        """As `Combination.penalty`: `weight ||I - W_V||^2`, published: 0.01."""
        return weight * self._from_identity().square().sum()

    def penalty_gradient(self, weight=0.01):
        """As `Combination.penalty_gradient`."""
        return [(self.value.weight, 2 * weight * self._from_identity())]

    def _from_identity(self):
        matrix, _ = weight_and_bias(self.value)
        return matrix - torch.eye(
            len(matrix), dtype=matrix.dtype, device=matrix.device
        )

    def _softmax(self, scores):
        if self.running:
            is_graph = torch.compiler.is_dynamo_compiling()
            scores = running_mean(scores, None if is_graph else STRETCH.get())
        weights = scores.softmax(-1)
        self.last_weights = weights.detach()
        if self.guided:
            self.live_weights = weights
        return weights

    def _as_loop(self, x):
        outputs = [self.bank[name](x) for name in self.names]
        query = self.query(x)
        scores = [(query * self.key(a)).sum(-1) for a in outputs]
        weights = self._softmax(torch.stack(scores, dim=-1) * self._scale)
        return sum(
            weights[..., n, None] * self.value(a) for n, a in enumerate(outputs)
        )

    def _as_stacked(self, x):
        each = self.bank.each(x, self.names)
        query = self.query(x).unsqueeze(-1)
        scores = torch.matmul(self.key(each), query).squeeze(-1)
        weights = self._softmax(scores * self._scale)
        context = torch.matmul(weights.unsqueeze(-2), each).squeeze(-2)
        return self.value(context)

    def _as_collapsed(self, x):
        stack = self.bank.stacked(self.names)
        hidden = self.bank.hidden(x, stack)
        number = len(self.names)
        (last, *first), bias = self._scoring()
        query = x
        for matrix in first:
            query = F.linear(query, matrix)
        query = F.linear(query, last, bias)
        gate = F.linear(query, stack.up) * hidden
        scores = sum_of_parts(gate, number) + F.linear(query, stack.beta)
        weights = self._softmax(scores * self._scale).to(hidden.dtype)
        hidden = hidden.unflatten(-1, (number, -1)) * weights.unsqueeze(-1)
        context = torch.matmul(hidden.flatten(-2), stack.up)
        return self.value(context + torch.matmul(weights, stack.beta))

    def _scoring(self):
        """Return `W_K^T W_Q` as factors, and `W_K^T b_Q`.

        As one matrix: a product less for every frame, and the query itself
        need not be held for the backward pass. Two of them where they have
        fewer entries.
        """
        key, _ = weight_and_bias(self.key)
        query, bias = weight_and_bias(self.query)
        factors = [key.t(), query]
        if key.numel() + query.numel() >= key.shape[1] ** 2:
            factors = [torch.matmul(*factors)]
        return factors, torch.matmul(bias, key)

    def _as_folded(self, x):
        bank, folded, number = self.bank, self.folded(), len(self.names)
        hidden = product(bank.normalise(x), folded.down, folded.shift)
        hidden = bank.activation(hidden)
        scores = product(x, folded.score, folded.score_bias)
        # Without a graph, what is a temporary may be written over.
        free = not (hidden.requires_grad or scores.requires_grad)
        gate, plain = scores.split((hidden.shape[-1], number), dim=-1)
        gate = gate.mul_(hidden) if free else gate * hidden
        weights = self._softmax(sum_of_parts(gate, number) + plain)
        weights = weights.to(hidden.dtype)
        hidden, gain = hidden.unflatten(-1, (number, -1)), weights.unsqueeze(-1)
        hidden = hidden.mul_(gain) if free else hidden * gain
        context = product(hidden.flatten(-2), folded.up)
        return context + torch.matmul(weights, folded.offset)

    def _fold_pays(self, x):
        if torch.compiler.is_compiling():  # one graph for all lengths
            return False
        # Half as many more than even: measured, see benchmarks/README.md.
        return x[..., 0].numel() > 1.5 * self._even_frames()

    def _even_frames(self):
        """Return the frames where both forms of training cost as much.

        In products, with `w = N b`: a frame costs `6 w + 4 d` and `6 w`, the
        gradients of weights `3 w + 2 d` and `3 w` (adapters train) or `2 d`
        and `2 w` (they do not); folding costs `6 w d` or `4 w d` a batch.
        Two thin factors of width a: `2 a` for one d of a frame, and `5 w a`
        for half of `4 w d`.
        """
        members = [self.bank[name] for name in self.names]
        wide = len(members) * max(member.bottleneck for member in members)
        if any(p.requires_grad for m in members for p in m.parameters()):
            return wide
        width, inner = self.bank.d_model, self.query.out_features
        frame, batch = width, 2 * width
        if 2 * inner < width:
            frame, batch = 2 * inner, 5 * inner
        gain = 3 * (width + frame) - 2 * wide
        return wide * (2 * width + batch) / gain if gain > 0 else math.inf

    def _fold(self):
        stack = self.bank.stacked(self.names)
        factors, bias = self._scoring()
        rows = scores = torch.cat((stack.up, stack.beta)) * self._scale
        for matrix in factors:
            scores = torch.matmul(scores, matrix)
        value, _ = weight_and_bias(self.value)
        return FoldedFusion(
            stack.down,
            stack.shift,
            scores,
            torch.matmul(rows, bias),
            torch.matmul(value, stack.up.t()),
            torch.matmul(stack.beta, value.t()),
        )


def sum_of_parts(values, number):
    """Sum the entries of each of N equal parts, in single precision or more.

    Scores in half precision would lose the softmax.
    """
    exact = torch.promote_types(values.dtype, torch.float32)
    return values.unflatten(-1, (number, -1)).sum(-1, dtype=exact)
