"""Emformer: a Transformer encoder for streaming, in SpeechBrain's form.

Shi et al. 2021, arXiv 2010.10759. The frames that a segment depends on are
bounded on both sides by construction: the right context is copied once, at the
input, so that the look-ahead does not add up over layers.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from speechbrain_taskarith.transducer.loss.input_checks import checked_lengths
from speechbrain_taskarith.utils.lengths import padding_mask


@dataclass
class EmformerContext:
    """The state of an Emformer between two chunks; lists have one per layer."""

    left: list  # [B, L, 2 d], keys and values of the frames before
    left_mask: torch.Tensor  # [B, L], True where a frame exists
    memory: list  # [B, M, d]
    memory_mask: torch.Tensor  # [B, M]
    # What inserted adapters keep from chunk to chunk, by layer.
    running_scores: dict = field(default_factory=dict)


class Emformer(torch.nn.Module):
    """Emformer encoder whose parallel and streaming paths agree.

    Arguments
    ---------
    input_dim : int
        Width d of input and output.
    num_heads, num_layers : int
        Number of attention heads, a divisor of d, and of layers.
    ffn_dim : int
        Width inside the feed-forward parts.
    segment_length : int
        Frames C of a segment, e.g. 4 of 40 ms.
    right_context : int
        Frames R of look-ahead, 0 or more.
    left_context : int
        Past frames L that are attended to, 0 or more.
    memory_size : int
        Memory vectors M, one per segment; 0: no memory.
    dropout : float
        In attention and feed-forward parts.

    Example
    -------
    >>> encoder = Emformer(16, 4, 32, 2, 4, 1, 8).eval()
    >>> x = torch.rand(2, 12, 16)
    >>> whole = encoder(x, torch.ones(2))
    >>> whole.shape
    torch.Size([2, 12, 16])
    >>> context = encoder.make_streaming_context(batch=2)
    >>> pieces = [
    ...     encoder.forward_streaming(x[:, t : t + 5], context)
    ...     for t in range(0, 12, 4)
    ... ]
    >>> bool(torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5))
    True
    """

    def __init__(
        self,
        input_dim,
        num_heads,
        ffn_dim,
        num_layers,
        segment_length,
        right_context,
        left_context,
        memory_size=0,
        dropout=0.1,
    ):
        super().__init__()
        if input_dim % num_heads:
            raise ValueError(
                f"num_heads {num_heads} does not divide input_dim {input_dim}"
            )
        contexts = (right_context, left_context, memory_size)
        if segment_length < 1 or min(contexts) < 0:
            raise ValueError(
                f"segment_length {segment_length}, right_context, left_context "
                f"and memory_size {contexts}: expected 1 or more, and 0 or more"
            )
        self.input_dim = input_dim
        self.segment_length = segment_length
        self.right_context = right_context
        self.left_context = left_context
        self.memory_size = memory_size
        self.layers = torch.nn.ModuleList(
            _EmformerLayer(
                input_dim, num_heads, ffn_dim, dropout, memory_size > 0
            )
            for _ in range(num_layers)
        )

    def forward(self, x, lens=None):
        """Encode whole utterances, all segments at once.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, d]; padding is ignored, even NaN.
        lens : torch.Tensor or None
            [B], relative lengths in (0, 1]; None takes all frames.

        Returns
        -------
        torch.Tensor
            [B, T, d]; 0 in padding.
        """
        self._check(x)
        batch, time, width = x.shape
        padding = _padding(x, lens, "input", least=1)
        x = x.masked_fill(padding[..., None], 0.0)
        size, ahead = self.segment_length, self.right_context
        segments = -(-time // size)
        # Blocks of C + R frames every C frames: the hard copy.
        missing = segments * size + ahead - time
        blocks = _blocks(pad(x, (0, 0, 0, missing)), size + ahead, size)
        own_mask = _blocks(pad(~padding, (0, missing)), size + ahead, size)
        inside = own_mask[:, :, :size]
        left_mask = _preceding(~padding, self.left_context, size, segments)
        summaries = blocks[:, :, 0]  # not used without memory
        if self.memory_size:
            # The first layer's memory: means of its input.
            summaries = _masked_mean(blocks[:, :, :size], inside).squeeze(2)
        memory = _preceding(summaries, self.memory_size, 1, segments)
        memory_mask = _preceding(inside.any(-1), self.memory_size, 1, segments)
        masks = (memory_mask, left_mask, own_mask)
        masks = [mask.flatten(0, 1) for mask in masks]
        for layer in self.layers:
            own = layer.keys_values(blocks)
            # Without the copies: all frames in order.
            in_order = own[:, :, :size].flatten(1, 2)
            left = _preceding(in_order, self.left_context, size, segments)
            given = [x.flatten(0, 1) for x in (blocks, left, own, memory)]
            out, new_memory = layer(
                *given, masks, segment_length=size, segments=segments
            )
            blocks = out.unflatten(0, (batch, segments))
            if new_memory is not None:
                new_memory = new_memory.view(batch, segments, width)
                memory = _preceding(new_memory, self.memory_size, 1, segments)
        x = blocks[:, :, :size].flatten(1, 2)[:, :time]
        return x.masked_fill(padding[..., None], 0.0)

    def make_streaming_context(self, batch=1, device=None, dtype=None):
        """Return the state at the beginning of streams.

        Arguments
        ---------
        batch : int
            Number of streams.
        device, dtype : torch.device or None, torch.dtype or None
            None takes those of the weights.

        Returns
        -------
        EmformerContext
            For `forward_streaming`, which changes it.
        """
        # A norm is never quantised.
        weight = self.layers[0].norm_in.weight

        def zeros(*shape, dtype=dtype):
            return weight.new_zeros((batch, *shape), device=device, dtype=dtype)

        left, memory = self.left_context, self.memory_size
        return EmformerContext(
            [zeros(left, 2 * self.input_dim) for _ in self.layers],
            zeros(left, dtype=torch.bool),
            [zeros(memory, self.input_dim) for _ in self.layers],
            zeros(memory, dtype=torch.bool),
        )

    def forward_streaming(self, chunk, context, lens=None):
        """Encode one segment.

        Arguments
        ---------
        chunk : torch.Tensor
            [B, t, d], a segment and its right context: C + R frames; the next
            chunk begins C frames later. Fewer at the end of a stream.
        context : EmformerContext
            The streams' state, which is changed.
        lens : torch.Tensor or None
            [B], relative lengths of the chunk in [0, 1], for streams that end
            within it; None takes all frames.

        Returns
        -------
        torch.Tensor
            [B, min(t, C), d]; 0 in padding.

        Raises
        ------
        ValueError
            A chunk that is too long.
        """
        self._check(chunk)
        time = chunk.shape[1]
        size, ahead = self.segment_length, self.right_context
        if not 1 <= time <= size + ahead:
            raise ValueError(
                f"a chunk of {time} frames; expected {size + ahead} (segment "
                f"{size} + right context {ahead}), or fewer at the end"
            )
        missing = size + ahead - time
        own_mask = pad(~_padding(chunk, lens, "chunk", least=0), (0, missing))
        x = pad(chunk, (0, 0, 0, missing))
        x = self.encode_segment(x, own_mask, context)
        frames = min(time, size)
        return x[:, :frames].masked_fill(~own_mask[:, :frames, None], 0.0)

    def encode_segment(self, x, own_mask, context):
        """Encode one segment of fixed shape, without checks.

        Arguments
        ---------
        x : torch.Tensor
            [B, C + R, d], a segment and its right context.
        own_mask : torch.Tensor
            [B, C + R], True where a frame exists.
        context : EmformerContext
            The streams' state, which is changed.

        Returns
        -------
        torch.Tensor
            [B, C + R, d]; anything where no frame is.
        """
        size = self.segment_length
        x = x.masked_fill(~own_mask[..., None], 0.0)
        masks = (context.memory_mask, context.left_mask, own_mask)
        new_memory = None
        if self.memory_size:
            # Means of the first layer's input; then each layer makes that of
            # the next one.
            new_memory = _masked_mean(x[:, :size], own_mask[:, :size])
        for index, layer in enumerate(self.layers):
            own = layer.keys_values(x)
            left, memory = context.left[index], context.memory[index]
            context.left[index] = _append(left, own[:, :size])
            if self.memory_size:
                context.memory[index] = _append(memory, new_memory)
            x, new_memory = layer(
                x,
                left,
                own,
                memory,
                masks,
                segment_length=size,
                context=context,
            )
        context.left_mask = _append(context.left_mask, own_mask[:, :size])
        context.memory_mask = _append(
            context.memory_mask, own_mask[:, :size].any(1, keepdim=True)
        )
        return x

    def _check(self, x):
        if x.dim() != 3 or x.shape[-1] != self.input_dim or not x.shape[1]:
            raise ValueError(
                f"expected [batch, frames, {self.input_dim}] with at least "
                f"one frame, found {tuple(x.shape)}"
            )


class _EmformerLayer(torch.nn.Module):
    """Layer norm, attention, feed-forward, layer norm (Shi 2021, section 2).

    Works on blocks: a segment of C frames, copies of the R frames after it,
    and with memory a summary. A block attends to a memory of M vectors, to L
    frames before it, and to itself. The parallel path has all blocks of an
    utterance side by side, the streaming path one at a time.
    """

    #: A call has blocks with copies of frames, not the frames so far.
    frames_in_order = False

    def __init__(self, input_dim, num_heads, ffn_dim, dropout, with_memory):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.with_memory = with_memory
        self.norm_in = torch.nn.LayerNorm(input_dim)
        self.query = torch.nn.Linear(input_dim, input_dim)
        self.key_value = torch.nn.Linear(input_dim, 2 * input_dim)
        self.project = torch.nn.Linear(input_dim, input_dim)
        self.feed_forward = torch.nn.Sequential(
            torch.nn.LayerNorm(input_dim),
            torch.nn.Linear(input_dim, ffn_dim),
            torch.nn.GELU(),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(ffn_dim, input_dim),
            torch.nn.Dropout(dropout),
        )
        self.norm_out = torch.nn.LayerNorm(input_dim)
        self.drop = torch.nn.Dropout(dropout)

    def keys_values(self, x):
        """Project frames [..., d] to keys and values [..., 2 d]."""
        return self.key_value(self.norm_in(x))

    def forward(
        self,
        queries,
        left,
        own,
        memory,
        masks,
        *,
        segment_length,
        segments=1,
        context=None,
    ):
        """Process N blocks; return frames [N, C + R, d], new memory [N, 1, d].

        `queries` [N, C + R, d] are segment and right context, `left`
        [N, L, 2 d] and `own` [N, C + R, 2 d] keys and values of the frames
        before and of these, `memory` [N, M, d]. `masks` are True where memory
        [N, M], left [N, L] and own frames [N, C + R] exist. The new memory is
        None without memory. Of use to hooks alone: an utterance's `segments`
        are blocks side by side; a stream's `context` keeps their state, too.
        """
        asking, keys_values = [self.norm_in(queries)], [left, own]
        key_mask = torch.cat(masks, 1)[:, None]
        allowed = key_mask.expand(-1, queries.shape[1], -1)
        if self.with_memory:
            segment = asking[0][:, :segment_length]
            summary = _masked_mean(segment, masks[2][:, :segment_length])
            asking.append(summary)
            keys_values.insert(0, self.key_value(memory))
            # A summary does not attend to memory: it would only copy it.
            summary_mask = key_mask.clone()
            summary_mask[..., : memory.shape[1]] = False
            allowed = torch.cat((allowed, summary_mask), 1)
        found = self._attend(
            torch.cat(asking, 1), torch.cat(keys_values, 1), allowed
        )
        x = queries + self.drop(found[:, : queries.shape[1]])
        x = self.norm_out(x + self.feed_forward(x))
        new_memory = None
        if self.with_memory:
            # Bounded, so that memory fed back for long does not grow.
            new_memory = torch.tanh(found[:, queries.shape[1] :])
        return x, new_memory

    def _attend(self, queries, keys_values, allowed):
        # Blocks of padding alone have nothing to attend to. Their results are
        # not used, but must not be NaN.
        allowed = allowed | ~allowed.any(-1, keepdim=True)

        def split(x):
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = keys_values.chunk(2, -1)
        found = scaled_dot_product_attention(
            split(self.query(queries)),
            split(key),
            split(value),
            attn_mask=allowed.unsqueeze(1),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.project(found.transpose(1, 2).flatten(-2))


def _masked_mean(x, mask):
    """Return the mean [..., 1, d] of the frames in `mask`; 0 of none."""
    weight = mask.to(x.dtype).unsqueeze(-1)
    total = (x * weight).sum(-2, keepdim=True)
    return total / weight.sum(-2, keepdim=True).clamp(min=1.0)


def _padding(x, lens, what, least):
    """Return [B, T], True at padding, of [B, T, d]."""
    if lens is None:
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    # In the middle of a model: a GPU is not waited for.
    frames = checked_lengths(lens, x.shape[:2], what, least, wait=False)
    return padding_mask(frames.to(x.device), x.shape[1])


def _blocks(x, length, step):
    """Cut [B, T, ...] into overlapping [B, S, length, ...]."""
    return x.unfold(1, length, step).movedim(-1, 2)


def _preceding(x, length, step, segments):
    """Return what precedes each segment, [B, S, length, ...], of [B, T, ...].

    Segments begin every `step`; before the beginning is 0 (or False).
    """
    if not length:
        return x.new_zeros(len(x), segments, 0, *x.shape[2:])
    tail = [0] * (2 * (x.dim() - 2))
    needed = (segments - 1) * step
    x = pad(x[:, :needed], (*tail, length, 0))
    x = pad(x, (*tail, 0, max(0, needed + length - x.shape[1])))
    return _blocks(x, length, step)


def _append(old, new):
    """Append, and drop as many at the beginning."""
    if not old.shape[1]:
        return old
    # Detached from the graph: a stream does not end.
    return torch.cat((old, new.detach()), 1)[:, -old.shape[1] :]
