"""One adapter: a bottleneck beside a layer of a frozen encoder."""

import torch


class BottleneckAdapter(torch.nn.Module):
    """What one adapter adds to the output of a layer.

    The pre-norm form of Houlsby et al., "Parameter-Efficient Transfer
    Learning for NLP" (2019), as Audio-AdapterFusion takes it (Tomanek et
    al. 2021 for speech)::

        a(x) = W_up act(W_down LN(x) + c) + beta

    `W_up` and `beta` start at zero, so that a fresh adapter changes nothing.
    It has `2 d b + b + d + 2 d` parameters.

    Arguments
    ---------
    d_model : int
        Width d of the layer's output, at least 1.
    bottleneck : int
        Width b in between, at least 1. 256 makes four adapters a layer 17 %
        of a 12 to 17 layer Conformer of width 512.
    activation : callable
        Makes the activation, e.g. the class `torch.nn.SiLU`; one that works
        entry by entry and has no parameters.
    layer_norm : bool
        False leaves LN out, for adapters of others that have none.
    eps : float
        Of the LN.

    Raises
    ------
    ValueError
        A width below 1, or an activation with parameters.

    Example
    -------
    >>> adapter = BottleneckAdapter(d_model=8, bottleneck=2)
    >>> x = torch.randn(3, 5, 8)
    >>> adapter(x).shape, adapter(x).abs().max().item()
    (torch.Size([3, 5, 8]), 0.0)
    >>> sum(p.numel() for p in adapter.parameters())
    58
    """

    def __init__(
        self,
        d_model,
        bottleneck=256,
        activation=torch.nn.SiLU,
        layer_norm=True,
        eps=1e-5,
    ):
        super().__init__()
        for what, value in (("d_model", d_model), ("bottleneck", bottleneck)):
            if isinstance(value, bool) or int(value) != value or value < 1:
                raise ValueError(
                    f"{what} is {value!r}, expected a whole number >= 1"
                )
        self.norm = torch.nn.LayerNorm(d_model, eps) if layer_norm else None
        self.down = torch.nn.Linear(d_model, bottleneck)
        self.activation = activation()
        if any(True for _ in self.activation.parameters()):
            raise ValueError(
                f"the activation {type(self.activation).__name__} has "
                "parameters; adapters of a bank share one activation, use "
                "one without (SiLU, GELU, ReLU, ...)"
            )
        self.up = torch.nn.Linear(bottleneck, d_model)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.zeros_(self.up.bias)

    @property
    def d_model(self):
        """Width of input and output."""
        return self.down.in_features

    @property
    def bottleneck(self):
        """Width in between."""
        return self.down.out_features

    def is_untrained(self):
        """Tell whether the adapter still adds nothing.

        Returns
        -------
        bool
            True while the up-projection is all zero.
        """
        return not (self.up.weight.any() or self.up.bias.any())

    def forward(self, x):
        """Return what is to be added to x.

        Arguments
        ---------
        x : torch.Tensor
            [..., d_model], a layer's output.

        Returns
        -------
        torch.Tensor
            [..., d_model], without the residual.
        """
        normed = x if self.norm is None else self.norm(x)
        return self.up(self.activation(self.down(normed)))
