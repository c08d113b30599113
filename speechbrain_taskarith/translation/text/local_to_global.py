"""Local to global: convolutions that get wider from layer to layer."""

import torch

from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask


class LocalExtractor(torch.nn.Module):
    """One convolution module with its residual: `x + Conv(LN(x))`.

    Conformer's module (pointwise and GLU, depthwise, norm, SiLU, pointwise)
    with LayerNorm for BatchNorm, as in SpeechBrain. Padding is zero where the
    depthwise convolution reads it, so nothing of it reaches a valid frame.
    Called with x [B, S, d], whose padding is ignored, and relative lengths
    [B], it returns [B, S, d], 0 in the padding.

    Behind a frozen encoder it is an adaptor (see `AcousticEncoder`) that cannot
    move a label far from where it was spoken, as attention can.

    Arguments
    ---------
    d_model : int
        Width d.
    kernel_size : int
        Vectors that each one sees, an odd number; else a `ValueError`.
    dropout : float
        Of what is added.

    Example
    -------
    >>> LocalExtractor(8, kernel_size=5)(torch.rand(2, 9, 8), torch.ones(2)).shape
    torch.Size([2, 9, 8])
    """

    def __init__(self, d_model, kernel_size, dropout=0.1):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size {kernel_size}: expected an odd number, so that a "
                "frame sees as far back as ahead"
            )
        self.kernel_size = kernel_size
        self.norm = torch.nn.LayerNorm(d_model)
        self.gated = torch.nn.Linear(d_model, 2 * d_model)
        self.depthwise = torch.nn.Conv1d(
            d_model,
            d_model,
            kernel_size,
            padding=kernel_size // 2,
            groups=d_model,
        )
        self.after = torch.nn.Sequential(
            torch.nn.LayerNorm(d_model),
            torch.nn.SiLU(),
            torch.nn.Linear(d_model, d_model),
            torch.nn.Dropout(dropout),
        )

    def forward(self, x, lens):
        """Extract, see `LocalExtractor`."""
        size = x.shape[1]
        outside = padding_mask(absolute_lengths(lens, size), size)[..., None]
        x = x.masked_fill(outside, 0.0)
        out = torch.nn.functional.glu(self.gated(self.norm(x)))
        # Biases have filled the padding again.
        out = out.masked_fill(outside, 0.0)
        out = self.depthwise(out.transpose(1, 2)).transpose(1, 2)
        return x + self.after(out).masked_fill(outside, 0.0)


class LocalToGlobal(torch.nn.Module):
    """Convolution modules in front of the layers of the textual encoder.

    Layer i sees `kernel + stride * i` vectors, made odd: 5, 9, 11, 15, 17, 21
    (arXiv 2311.03810, section 4.2). Called with x [B, S, d], relative lengths
    [B] and a layer's position, it returns [B, S, d].

    Arguments
    ---------
    d_model, num_layers : int
        Width and layers of the textual encoder.
    kernel, stride : int
        Vectors that the first one sees, and how many more each following one.
    dropout : float
        Of what is added.

    Example
    -------
    >>> local = LocalToGlobal(8, num_layers=6)
    >>> local.kernel_sizes
    [5, 9, 11, 15, 17, 21]
    >>> local.layers[0](torch.rand(1, 4, 8), torch.ones(1)).shape
    torch.Size([1, 4, 8])
    """

    def __init__(self, d_model, num_layers=6, kernel=5, stride=3, dropout=0.1):
        super().__init__()
        if kernel < 1 or stride < 0:
            raise ValueError(
                f"kernel {kernel}, stride {stride}: expected kernel from 1 and "
                "stride from 0"
            )
        self.layers = torch.nn.ModuleList(
            LocalExtractor(d_model, size | 1, dropout)
            for size in (kernel + stride * i for i in range(num_layers))
        )

    @property
    def kernel_sizes(self):
        """Vectors that each layer sees."""
        return [layer.kernel_size for layer in self.layers]

    def forward(self, x, lens, layer):
        """Run the module before layer number `layer`, see `LocalToGlobal`."""
        return self.layers[layer](x, lens)
