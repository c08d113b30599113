"""N adapters of one layer, computed together."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from speechbrain_taskarith.adapters.bottleneck import BottleneckAdapter
from speechbrain_taskarith.adapters.caching import DerivedWeights

# Of state dict keys; also keeps task names off the attributes of a module.
_PREFIX = "adapter_"

#: What `handle.use` takes for the combination, hence no task's name.
COMBINED = "combined"


class Stacked(NamedTuple):
    """N adapters as one, LN's gain and offset taken into the projection.

    With the normalised input `n(x)` (LN without gain and offset),
    `h = act(down n(x) + shift)` holds all adapters' hidden entries side by
    side, and adapter n gives `up[n]^T h[n] + beta[n]`.

    Arguments
    ---------
    down : torch.Tensor
        [N b, d]
    shift : torch.Tensor
        [N b]
    up : torch.Tensor
        [N b, d], transposed: one row for a hidden entry.
    beta : torch.Tensor
        [N, d]
    """

    down: torch.Tensor
    shift: torch.Tensor
    up: torch.Tensor
    beta: torch.Tensor

    @property
    def width(self):
        """Hidden entries of one adapter (padded to the widest)."""
        return self.down.shape[0] // self.beta.shape[0]


class AdapterBank(torch.nn.Module):
    """The adapters of several tasks, for one layer.

    Every adapter keeps parameters of its own, so that one can be trained,
    saved or taken out while the bytes of the others stay what they are; they
    are stacked when computed together (once, while frozen).

    Arguments
    ---------
    names : sequence of str
        N different names of tasks, at least one.
    d_model : int
        Width d of the layer's output.
    bottleneck : int
        Width b of each adapter.
    activation : callable
        See `BottleneckAdapter`; one for all.
    layer_norm : bool
        See `BottleneckAdapter`.
    eps : float
        See `BottleneckAdapter`.

    Raises
    ------
    ValueError
        No name, a name twice, an empty one, `"combined"`.

    Example
    -------
    >>> bank = AdapterBank(["news", "calls"], d_model=8, bottleneck=2)
    >>> bank.each(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 2, 8])
    >>> bank["news"](torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        names,
        d_model,
        bottleneck=256,
        activation=torch.nn.SiLU,
        layer_norm=True,
        eps=1e-5,
    ):
        super().__init__()
        names = [names] if isinstance(names, str) else list(names)
        if not names:
            raise ValueError("an adapter bank needs at least one task name")
        self.d_model, self.bottleneck = d_model, bottleneck
        self.layer_norm, self.eps = layer_norm, eps
        self._activation = activation
        self.activation = activation()
        self.names = []
        self._derived = DerivedWeights()
        for name in names:
            self.add(name)

    # ------------------------------------------------------------- members

    def add(self, name, bottleneck=None):
        """Add a fresh adapter, which changes nothing until it is trained.

        Arguments
        ---------
        name : str
            A new name.
        bottleneck : int or None
            Its width, None for the bank's.

        Returns
        -------
        BottleneckAdapter
            The adapter, on the device and in the type of the others.
        """
        self.check_new(name)
        adapter = self._fresh(bottleneck)
        self._modules[_key(name)] = adapter
        self.names.append(name)
        self._derived.clear()
        return adapter

    def replace(self, name, bottleneck):
        """Put a fresh adapter of another width in the place of one.

        Arguments
        ---------
        name : str
            A name of the bank.
        bottleneck : int
            The new width.

        Returns
        -------
        BottleneckAdapter
            The new adapter.
        """
        self.require(name)
        self._modules[_key(name)] = adapter = self._fresh(bottleneck)
        self._derived.clear()
        return adapter

    def _fresh(self, bottleneck):
        adapter = BottleneckAdapter(
            self.d_model,
            self.bottleneck if bottleneck is None else bottleneck,
            self._activation,
            self.layer_norm,
            self.eps,
        )
        if self.names:
            like = self[self.names[0]].down.weight
            adapter.to(like.device, like.dtype)
        return adapter.train(self.training)

    def remove(self, name):
        """Take an adapter out.

        Arguments
        ---------
        name : str
            A name of the bank, not the last one.
        """
        self.require(name)
        if len(self.names) == 1:
            raise ValueError(
                f"{name!r} is the last adapter of the bank; take all "
                "adapters out with handle.remove() instead"
            )
        del self._modules[_key(name)]
        self.names.remove(name)
        self._derived.clear()

    def check_new(self, name):
        """Raise where a name cannot be given to a new adapter.

        Arguments
        ---------
        name : str
            The name.

        Raises
        ------
        ValueError
            It is taken, empty, no text, or `"combined"`.
        """
        if not isinstance(name, str) or not name or name == COMBINED:
            raise ValueError(
                f"{name!r} cannot be the name of an adapter: use text, but "
                f"not {COMBINED!r}, which means all of them together"
            )
        if name in self.names:
            raise ValueError(
                f"there is an adapter {name!r} already; choose another name "
                "or remove that one first"
            )

    def require(self, *names):
        """Raise where a name is none of the bank's.

        Arguments
        ---------
        *names : str
            Names.

        Raises
        ------
        ValueError
            Naming what is missing and what there is.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(
                f"no adapter {', '.join(map(repr, missing))}; there are "
                f"{', '.join(map(repr, self.names))}"
            )

    def __getitem__(self, name):
        self.require(name)
        return self._modules[_key(name)]

    def __contains__(self, name):
        return name in self.names

    def __len__(self):
        return len(self.names)

    def _apply(self, fn, recurse=True):
        self._derived.clear()
        return super()._apply(fn, recurse)

    # --------------------------------------------------------- computation

    def stacked(self, names=None):
        """Return adapters as one wide adapter.

        Arguments
        ---------
        names : sequence of str or None
            Which, in which order; None for all.

        Returns
        -------
        Stacked
            Differentiable where parameters are trained and gradients are on.
        """
        names = tuple(self.names if names is None else names)
        members = [self[name] for name in names]
        parameters = [p for member in members for p in member.parameters()]
        return self._derived.get(
            names, parameters, lambda: self._stack(members)
        )

    def _stack(self, members):
        width = max(member.bottleneck for member in members)
        downs, shifts, ups = [], [], []
        for member in members:
            # A narrow adapter is a wide one whose last rows of `up` are 0.
            missing = width - member.bottleneck
            downs.append(F.pad(member.down.weight, (0, 0, 0, missing)))
            shifts.append(F.pad(member.down.bias, (0, missing)))
            ups.append(F.pad(member.up.weight.t(), (0, 0, 0, missing)))
        down, shift = torch.cat(downs), torch.cat(shifts)
        beta = torch.stack([member.up.bias for member in members])
        if self.layer_norm:
            # W (g * n + o) + c = (W * g) n + (W o + c)
            gain = torch.stack([member.norm.weight for member in members])
            offset = torch.stack([member.norm.bias for member in members])
            down = down.unflatten(0, (len(members), width))
            moved = (down @ offset.unsqueeze(-1)).flatten()
            down = (down * gain.unsqueeze(1)).flatten(0, 1)
            shift = shift + moved
        return Stacked(down, shift, torch.cat(ups), beta)

    def normalise(self, x):
        """Return LN without gain and offset, which the stack has taken.

        Arguments
        ---------
        x : torch.Tensor
            [..., d]

        Returns
        -------
        torch.Tensor
            [..., d]; x itself in a bank without LN.
        """
        if not self.layer_norm:
            return x
        return F.layer_norm(x, (self.d_model,), eps=self.eps)

    def hidden(self, x, stack):
        """Return what all bottlenecks hold, by one matrix product.

        Arguments
        ---------
        x : torch.Tensor
            [..., d]
        stack : Stacked
            From `stacked`.

        Returns
        -------
        torch.Tensor
            [..., N b]
        """
        normed = self.normalise(x)
        return self.activation(F.linear(normed, stack.down, stack.shift))

    def each(self, x, names=None):
        """Return every adapter's output apart.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, d], or any [..., d]
        names : sequence of str or None
            Which, in which order; None for all.

        Returns
        -------
        torch.Tensor
            [B, T, N, d]: costs N times the memory of x, which the
            combinations avoid.
        """
        stack = self.stacked(names)
        hidden = self.hidden(x, stack).unflatten(-1, (-1, stack.width))
        up = stack.up.unflatten(0, (-1, stack.width))
        return torch.einsum("...nb,nbw->...nw", hidden, up) + stack.beta

    def routed(self, x, index):
        """Return each utterance's own adapter's output, in one pass.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, d]
        index : torch.Tensor
            [B], whole numbers: positions in `names`.

        Returns
        -------
        torch.Tensor
            [B, T, d]
        """
        stack = self.stacked()

        def own(weight):
            return weight.unflatten(0, (len(self), -1)).index_select(0, index)

        down, up, shift = own(stack.down), own(stack.up), own(stack.shift)
        normed = self.normalise(x)
        hidden = torch.matmul(normed, down.mT) + shift.unsqueeze(1)
        beta = stack.beta.index_select(0, index)
        return torch.matmul(self.activation(hidden), up) + beta.unsqueeze(1)

    def forward(self, x):
        """As `each`.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, d]

        Returns
        -------
        torch.Tensor
            [B, T, N, d]
        """
        return self.each(x)


def _key(name):
    """Return a task's key among the modules, where no dot may be."""
    return _PREFIX + name.replace("%", "%25").replace(".", "%2E")
