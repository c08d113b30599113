"""Emformer: a Transformer encoder for streaming, in SpeechBrain's form.

Shi et al. 2021, arXiv 2010.10759. What a segment's frames depend on is bounded
on both sides by construction: the right context is copied once, at the input,
so that looking ahead does not add up over layers.
"""

from dataclasses import dataclass

import torch

from speechbrain_taskarith.transducer.loss.lengths import checked_lengths
from speechbrain_taskarith.transducer.streaming.emformer_layer import (
    EmformerLayer,
)
from speechbrain_taskarith.utils.lengths import padding_mask


@dataclass
class EmformerContext:
    """What an Emformer keeps between two chunks, of every layer.

    Arguments
    ---------
    left : list of torch.Tensor
        [B, L, 2 d] each, keys and values of the frames before.
    left_there : torch.Tensor
        [B, L], bool.
    memory : list of torch.Tensor
        [B, M, d] each.
    memory_there : torch.Tensor
        [B, M], bool.
    """

    left: list
    left_there: torch.Tensor
    memory: list
    memory_there: torch.Tensor


class Emformer(torch.nn.Module):
    """Emformer encoder, with a parallel path and a streaming one that agree.

    Arguments
    ---------
    input_dim : int
        Width d of input and output.
    num_heads : int
        Attention heads; divides d.
    ffn_dim : int
        Width inside the feed-forward parts.
    num_layers : int
        Number of layers.
    segment_length : int
        Frames C of a segment, e.g. 4 of 40 ms.
    right_context : int
        Frames R of look-ahead, 0 or more.
    left_context : int
        Frames L of the past that are attended to, 0 or more.
    memory_size : int
        Vectors M of memory, one a segment; 0 goes without.
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
        if (
            segment_length < 1
            or min(right_context, left_context, memory_size) < 0
        ):
            raise ValueError(
                f"segment_length {segment_length}, right_context "
                f"{right_context}, left_context {left_context}, memory_size "
                f"{memory_size}: expected a segment of 1 frame or more, and "
                "no negative number"
            )
        self.input_dim = input_dim
        self.segment_length = segment_length
        self.right_context = right_context
        self.left_context = left_context
        self.memory_size = memory_size
        self.layers = torch.nn.ModuleList(
            EmformerLayer(
                input_dim, num_heads, ffn_dim, dropout, memory_size > 0
            )
            for _ in range(num_layers)
        )

    def forward(self, x, lens=None):
        """Encode whole utterances, all segments at once.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, d]; padding may hold anything.
        lens : torch.Tensor or None
            [B], relative lengths in (0, 1]; None takes all frames.

        Returns
        -------
        torch.Tensor
            [B, T, d]; 0 in padding.
        """
        self._check(x)
        batch, time, width = x.shape
        frames = torch.full((batch,), time, device=x.device)
        if lens is not None:
            frames = checked_lengths(lens, time, "input").to(x.device)
        inside = ~padding_mask(frames, time)
        x = x.masked_fill(~inside[..., None], 0.0)
        size, ahead = self.segment_length, self.right_context
        segments = -(-time // size)
        # Blocks of C + R frames every C frames: the hard copy.
        padding = segments * size + ahead - time
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
        there = torch.nn.functional.pad(inside, (0, padding))
        own_there = self._blocks(there, size + ahead, size)
        left_there = self._left(inside, segments)
        blocks = self._blocks(x, size + ahead, size)
        memory, memory_there = self._first_memory(blocks, own_there, segments)
        masks = tuple(
            mask.flatten(0, 1) for mask in (memory_there, left_there, own_there)
        )
        for layer in self.layers:
            own = layer.keys_values(layer.norm_in(blocks))
            line = own[:, :, :size].flatten(1, 2)
            found, new_memory = layer.block(
                blocks.flatten(0, 1),
                self._left(line, segments).flatten(0, 1),
                own.flatten(0, 1),
                memory.flatten(0, 1),
                masks,
                size,
            )
            blocks = found.unflatten(0, (batch, segments))
            if new_memory is not None:
                memory = self._before(new_memory.view(batch, segments, width))
        x = blocks[:, :, :size].flatten(1, 2)[:, :time]
        return x.masked_fill(~inside[..., None], 0.0)

    def make_streaming_context(self, batch=1, device=None, dtype=None):
        """Begin to stream.

        Arguments
        ---------
        batch : int
            Number of streams.
        device : torch.device or None
            None takes that of the weights.
        dtype : torch.dtype or None
            None takes that of the weights.

        Returns
        -------
        EmformerContext
            To be given to `forward_streaming`, which changes it.
        """
        like = self.layers[0].query.weight
        device = like.device if device is None else device
        dtype = like.dtype if dtype is None else dtype

        def zeros(length, width):
            return [
                torch.zeros(batch, length, width, device=device, dtype=dtype)
                for _ in self.layers
            ]

        return EmformerContext(
            zeros(self.left_context, 2 * self.input_dim),
            torch.zeros(
                batch, self.left_context, dtype=torch.bool, device=device
            ),
            zeros(self.memory_size, self.input_dim),
            torch.zeros(
                batch, self.memory_size, dtype=torch.bool, device=device
            ),
        )

    def forward_streaming(self, chunk, context, lens=None):
        """Encode one segment.

        Arguments
        ---------
        chunk : torch.Tensor
            [B, t, d], a segment and what follows it: C + R frames, the next
            chunk beginning C frames on. At the end of a stream fewer.
        context : EmformerContext
            Of these streams; changed.
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
        batch, time, _ = chunk.shape
        size, ahead = self.segment_length, self.right_context
        if not 1 <= time <= size + ahead:
            raise ValueError(
                f"a chunk of {time} frames; expected {size + ahead} (segment "
                f"{size} + right context {ahead}), or fewer at the end"
            )
        frames = torch.full((batch,), time, device=chunk.device)
        if lens is not None:
            frames = checked_lengths(lens, time, "chunk", least=0)
            frames = frames.to(chunk.device)
        x = torch.nn.functional.pad(chunk, (0, 0, 0, size + ahead - time))
        own_there = ~padding_mask(frames, size + ahead)
        x = x.masked_fill(~own_there[..., None], 0.0)
        masks = (context.memory_there, context.left_there, own_there)
        carried = None
        if self.memory_size:
            # What the first layer remembers: averages of its input.
            carried = self.layers[0].summary(x[:, :size], own_there[:, :size])
        for index, layer in enumerate(self.layers):
            own = layer.keys_values(layer.norm_in(x))
            x, new_memory = layer.block(
                x, context.left[index], own, context.memory[index], masks, size
            )
            context.left[index] = _behind(
                context.left[index], own[:, :size], self.left_context
            )
            if self.memory_size:
                context.memory[index] = _behind(
                    context.memory[index], carried, self.memory_size
                )
                carried = new_memory
        context.left_there = _behind(
            context.left_there, own_there[:, :size], self.left_context
        )
        context.memory_there = _behind(
            context.memory_there,
            own_there[:, :size].any(1, keepdim=True),
            self.memory_size,
        )
        keep = min(time, size)
        return x[:, :keep].masked_fill(~own_there[:, :keep, None], 0.0)

    def _check(self, x):
        if x.dim() != 3 or x.shape[-1] != self.input_dim or not x.shape[1]:
            raise ValueError(
                f"expected [batch, frames, {self.input_dim}] with at least "
                f"one frame, found {tuple(x.shape)}"
            )

    @staticmethod
    def _blocks(x, length, step):
        """Cut [B, T, ...] into overlapping [B, S, length, ...]."""
        blocks = x.unfold(1, length, step)
        return blocks.movedim(-1, 2)

    def _left(self, x, segments):
        """Return the L frames before each segment, [B, S, L, ...].

        Of [B, T, ...]; what lies before the beginning is 0 (or False).
        """
        length, step = self.left_context, self.segment_length
        tail = [0] * (2 * (x.dim() - 2))
        if not length:
            return x.new_zeros(len(x), segments, 0, *x.shape[2:])
        need = (segments - 1) * step
        x = torch.nn.functional.pad(x[:, :need], (*tail, length, 0))
        x = torch.nn.functional.pad(
            x, (*tail, 0, max(0, need + length - x.shape[1]))
        )
        return self._blocks(x, length, step)

    def _before(self, vectors):
        """Return the M vectors of the segments before each, [B, S, M, ...]."""
        count = self.memory_size
        tail = [0] * (2 * (vectors.dim() - 2))
        padded = torch.nn.functional.pad(vectors[:, :-1], (*tail, count, 0))
        return self._blocks(padded, count, 1)

    def _first_memory(self, blocks, own_there, segments):
        """Return the first layer's memory and which of it is there."""
        size = self.segment_length
        if not self.memory_size:
            shape = (len(blocks), segments, 0)
            nothing = blocks.new_zeros(*shape, self.input_dim)
            return nothing, own_there.new_zeros(shape)
        averages = self.layers[0].summary(
            blocks[:, :, :size], own_there[:, :, :size]
        )
        there = own_there[:, :, :size].any(-1)
        return self._before(averages.squeeze(2)), self._before(there)


def _behind(old, new, count):
    """Append, and keep the last `count`."""
    if not count:
        return old
    # Detached from the graph: a stream does not end.
    return torch.cat((old, new.detach()), 1)[:, -count:]
