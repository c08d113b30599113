"""One Emformer layer: attention within blocks, the same for both paths.

A block is a segment of C frames, copies of the R frames behind it, and a
summary; it attends to a memory of M vectors, L frames before it, and itself.
The parallel path has all blocks of an utterance beside one another, the
streaming path one at a time; both come down to `EmformerLayer.block`.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


class EmformerLayer(torch.nn.Module):
    """Layer norm, attention, feed-forward, layer norm (Shi 2021, section 2).

    Arguments
    ---------
    input_dim : int
        Width d.
    num_heads : int
        Attention heads.
    ffn_dim : int
        Width inside the feed-forward part.
    dropout : float
        In attention and feed-forward part.
    with_memory : bool
        Whether blocks have a summary, which becomes memory.
    """

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
        """Project to keys and values, in one.

        Arguments
        ---------
        x : torch.Tensor
            [..., d], normalised.

        Returns
        -------
        torch.Tensor
            [..., 2 d].
        """
        return self.key_value(x)

    def summary(self, x, valid):
        """Average the valid frames of segments.

        Arguments
        ---------
        x : torch.Tensor
            [..., C, d].
        valid : torch.Tensor
            [..., C], bool.

        Returns
        -------
        torch.Tensor
            [..., 1, d]; 0 where nothing is valid.
        """
        weight = valid.to(x.dtype).unsqueeze(-1)
        total = (x * weight).sum(-2, keepdim=True)
        return total / weight.sum(-2, keepdim=True).clamp(min=1.0)

    def block(self, queries, left, own, memory, masks, segment_length):
        """Attend and feed forward, in any number of blocks.

        Arguments
        ---------
        queries : torch.Tensor
            [N, C + R, d], frames of segment and right context.
        left : torch.Tensor
            [N, L, 2 d], keys and values of the frames before.
        own : torch.Tensor
            [N, C + R, 2 d], of the block's frames.
        memory : torch.Tensor
            [N, M, d], memory vectors.
        masks : tuple of torch.Tensor
            Which of memory [N, M], left [N, L], own frames [N, C + R] are
            there, bool.
        segment_length : int
            C.

        Returns
        -------
        x : torch.Tensor
            [N, C + R, d].
        new_memory : torch.Tensor or None
            [N, 1, d].
        """
        there_memory, there_left, there_own = masks
        normed = self.norm_in(queries)
        asked = [normed]
        if self.with_memory:
            asked.append(
                self.summary(
                    normed[:, :segment_length], there_own[:, :segment_length]
                )
            )
        keys = [left, own]
        there = [there_left, there_own]
        if self.with_memory:
            keys.insert(0, self.keys_values(memory))
            there.insert(0, there_memory)
        there = torch.cat(there, 1)[:, None]
        allowed = there.expand(-1, queries.shape[1], -1)
        if self.with_memory:
            # A summary does not look at memory: it would only copy it.
            last = there.clone()
            last[..., : there_memory.shape[1]] = False
            allowed = torch.cat((allowed, last), 1)
        found = self._attend(torch.cat(asked, 1), torch.cat(keys, 1), allowed)
        x = queries + self.drop(found[:, : queries.shape[1]])
        x = self.norm_out(x + self.feed_forward(x))
        new_memory = None
        if self.with_memory:
            # Bounded, so that memory fed back for long does not grow.
            new_memory = torch.tanh(found[:, queries.shape[1] :])
        return x, new_memory

    def _attend(self, asked, keys, allowed):
        # Blocks of padding alone have nothing to look at. Their results are
        # not used, but must not be NaN.
        allowed = allowed | ~allowed.any(-1, keepdim=True)
        heads = self.num_heads

        def split(x):
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        key, value = keys.chunk(2, -1)
        found = scaled_dot_product_attention(
            split(self.query(asked)),
            split(key),
            split(value),
            attn_mask=allowed.unsqueeze(1),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.project(found.transpose(1, 2).flatten(-2))
