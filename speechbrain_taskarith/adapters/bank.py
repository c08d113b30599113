"""The adapters of one layer: a bottleneck each, computed together."""

import copy
import functools
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

#: What `handle.use` takes for the combination, hence no task's name.
COMBINED = "combined"

#: What trains the combination, hence no task's name either: the combination
#: alone, or its adapters as well.
MODES = ("ST-A", "MT-A")

# Of state dict keys; also keeps task names off the attributes of a module.
_PREFIX = "adapter_"


class BottleneckAdapter(torch.nn.Module):
    """What one adapter adds to the output of a layer.

    The pre-norm form of Houlsby et al., "Parameter-Efficient Transfer
    Learning for NLP" (2019), as Audio-AdapterFusion takes it (Tomanek et
    al. 2021 for speech)::

        a(x) = W_up act(W_down LN(x) + c) + beta

    `W_up` and `beta` start at zero, so that a fresh adapter changes nothing.
    It takes a layer's output x [..., d] and gives a(x) of that shape, without
    the residual, and has `2 d b + b + d + 2 d` parameters.

    Arguments
    ---------
    d_model : int
        Width d of the layer's output, at least 1 or a `ValueError`.
    bottleneck : int
        Width b in between, likewise. 256 makes four adapters a layer 17 % of
        a 12 to 17 layer Conformer of width 512.
    activation : callable
        Makes the activation, e.g. the class `torch.nn.SiLU`; one that works
        entry by entry and has no parameters (`ValueError`).
    layer_norm : bool
        False leaves LN out, for adapters from other libraries without it.
    eps : float
        Of the LN.

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
        self.d_model, self.bottleneck = d_model, bottleneck
        self.norm = torch.nn.LayerNorm(d_model, eps) if layer_norm else None
        self.down = torch.nn.Linear(d_model, bottleneck)
        self.activation = _made(activation)
        if any(True for _ in self.activation.parameters()):
            raise ValueError(
                f"the activation {type(self.activation).__name__} has "
                "parameters; adapters of a bank share one activation, use "
                "one without (SiLU, GELU, ReLU, ...)"
            )
        self.up = torch.nn.Linear(bottleneck, d_model)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.zeros_(self.up.bias)

    def is_untrained(self):
        """Tell whether `W_up` and `beta` still are 0, see `BottleneckAdapter`."""
        weight, bias = weight_and_bias(self.up)
        return not (weight.any() or bias.any())

    def forward(self, x):
        """Return a(x), see `BottleneckAdapter`."""
        normed = x if self.norm is None else self.norm(x)
        return self.up(self.activation(self.down(normed)))


def _made(activation):
    """Return the module that `activation` makes."""
    try:
        made = activation()
    except TypeError as error:
        made = error
    if not isinstance(made, torch.nn.Module):
        raise ValueError(
            f"activation is {activation!r}, which makes no module ({made!r}); "
            "give a class such as torch.nn.SiLU, or a function without "
            "arguments that returns a module"
        )
    return made


class DerivedWeights(dict):
    """Remembers what was computed from parameters that do not change.

    A frozen bank's weights are stacked once, not at every batch. Whether
    the parameters are the same is read off their addresses and version
    counters, which operations of torch move, and off a sample of their
    content, since writes through `.data` or NumPy move no counter. On a GPU
    there is no sample: `train()` and `eval()` forget what is remembered.
    """

    def derive(self, key, parameters, compute):
        """Return `compute()`, remembered while `parameters` stay the same.

        It has a graph, and is not remembered, where gradients have to reach
        the parameters.
        """
        # A graph has the computation in it.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        device = parameters[0].device.type if parameters else "cpu"
        # Products of parameters lose too much in half.
        exactly = torch.autocast(device, enabled=False)
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            with exactly:
                return compute()
        # Made under inference_mode, they have no counters.
        if any(p.is_inference() for p in parameters):
            with torch.no_grad(), exactly:
                return compute()
        versions = [(p.data_ptr(), p._version, p.dtype) for p in parameters]
        if key in self and self[key][0] == versions:
            _, views, sample, value = self[key]
            if [view.tobytes() for view in views] == sample:
                return value
        # Made under inference_mode, they could not be saved for a later
        # backward pass.
        with torch.inference_mode(False), torch.no_grad(), exactly:
            value = compute()
        views = [sample_view(p) for p in parameters]
        sample = [view.tobytes() for view in views]
        self[key] = (versions, views, sample, value)
        return value

    def __reduce__(self):
        # A copy's parameters have other addresses; it computes its own.
        return type(self), ()


def sample_view(tensor, entries=64):
    """Return up to that many entries of a tensor on the CPU, as bytes.

    They are spread over it, and a view: it sees what is written later.
    """
    readable = tensor.device.type == "cpu" and tensor.is_contiguous()
    if not readable or not tensor.numel():
        return np.empty(0)
    flat = tensor.detach().reshape(-1)
    step = max(1, len(flat) // entries)
    # A step that divides the rows would see one column alone.
    step += step > 1 and step % 2 == 0
    return flat.view(torch.uint8).numpy().reshape(len(flat), -1)[::step]


def weight_and_bias(linear):
    """Return both as plain tensors, of a quantised layer as well."""
    weight, bias = linear.weight, linear.bias
    if callable(weight):
        weight, bias = weight(), bias()
    if weight.is_quantized:
        weight = weight.dequantize()
    return weight, bias


class Stacked(NamedTuple):
    """N adapters as one, LN's gain and offset taken into the projection.

    With the normalised input `n(x)` (LN without gain and offset),
    `h = act(down n(x) + shift)` holds all adapters' hidden entries side by
    side, and adapter n gives `up[n]^T h[n] + beta[n]`.
    """

    down: torch.Tensor  # [N b, d]
    shift: torch.Tensor  # [N b]
    up: torch.Tensor  # [N b, d], transposed: one row for a hidden entry
    beta: torch.Tensor  # [N, d]
    width: int  # b, of the widest; narrower ones are padded


class AdapterBank(torch.nn.Module):
    """The adapters of several tasks, for one layer.

    Every adapter has its own parameters, so one can be trained, saved or
    removed without changing a byte of the others. They are stacked when
    computed together (once, while frozen).

    Arguments
    ---------
    names : sequence of str
        N names of tasks, see `add`; at least one, or a `ValueError`.
    d_model, bottleneck, activation, layer_norm, eps
        See `BottleneckAdapter`; the same for all.

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
        self.activation = _made(activation)
        # LN without gain and offset, which `Stacked` holds.
        self.normalise = (
            torch.nn.LayerNorm(d_model, eps, elementwise_affine=False)
            if layer_norm
            else torch.nn.Identity()
        )
        self.names = []
        self._derived = DerivedWeights()
        for name in names:
            self.add(name)

    # ------------------------------------------------------------- members

    def add(self, name, bottleneck=None, *, replace=False):
        """Add a fresh adapter, which changes nothing until it is trained.

        Arguments
        ---------
        name : str
            A new name; `ValueError` if it is taken, empty, no text,
            `"combined"`, `"ST-A"` or `"MT-A"`.
        bottleneck : int or None
            Its width, None for the bank's.
        replace : bool
            True puts it in the place of an adapter of that name.

        Returns
        -------
        BottleneckAdapter
            The adapter, on the device and in the type of the others.
        """
        reserved = (COMBINED, *MODES)
        if not isinstance(name, str) or not name or name in reserved:
            raise ValueError(
                f"{name!r} cannot be the name of an adapter: use text, but "
                f"not {', '.join(map(repr, reserved))}, which stand for all "
                "of them together"
            )
        if name in self.names and not replace:
            raise ValueError(
                f"there is an adapter {name!r} already; choose another name "
                "or remove that one first"
            )
        adapter = BottleneckAdapter(
            self.d_model,
            self.bottleneck if bottleneck is None else bottleneck,
            # Not by what made it, which need not pickle (a lambda).
            functools.partial(copy.deepcopy, self.activation),
            self.layer_norm,
            self.eps,
        )
        if self.names:
            adapter.to(self.device, self.dtype)
        self._modules[adapter_key(name)] = adapter.train(self.training)
        if name not in self.names:
            self.names.append(name)
        self._derived.clear()
        return adapter

    def remove(self, name):
        """Remove an adapter, not the last; as `AdapterHandle.remove_adapter`."""
        self.require(name)
        if len(self.names) == 1:
            raise ValueError(
                f"{name!r} is the last adapter of the bank; use "
                "handle.remove() to remove all adapters"
            )
        del self._modules[adapter_key(name)]
        self.names.remove(name)
        self._derived.clear()

    def require(self, *names):
        """Raise `ValueError` for a name that the bank does not have.

        Arguments
        ---------
        *names : str
            Names.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(
                f"no adapter {', '.join(map(repr, missing))}; there are "
                f"{', '.join(map(repr, self.names))}"
            )

    def __getitem__(self, name):
        self.require(name)
        return self._modules[adapter_key(name)]

    def __contains__(self, name):
        return name in self.names

    def __len__(self):
        return len(self.names)

    @property
    def dtype(self):
        """Return the type in which the adapters compute."""
        return next(p.dtype for p in self._numbers())

    @property
    def device(self):
        """Return the device of the adapters."""
        return next(p.device for p in self._numbers())

    def _numbers(self):
        """Yield parameters that say type and device, if only the input's."""
        for adapter in self._modules.values():
            for parameter in adapter.parameters():
                if parameter.is_floating_point():
                    yield parameter
        yield torch.empty(0)  # all of it quantised

    def _apply(self, fn, recurse=True):
        self._derived.clear()
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        """As `torch.nn.Module.train`; forgets what weights were stacked."""
        self._derived.clear()
        return super().train(mode)

    # --------------------------------------------------------- computation

    def stacked(self, names=None):
        """Return adapters (None: all) as one wide adapter, see `Stacked`.

        Differentiable where parameters are trained and gradients are on.
        """
        names = tuple(self.names if names is None else names)
        members = [self[name] for name in names]
        parameters = [p for member in members for p in member.parameters()]
        return self._derived.derive(
            names, parameters, lambda: self._stack(members)
        )

    def _stack(self, members):
        width = max(member.bottleneck for member in members)
        downs, shifts, ups, betas = [], [], [], []
        for member in members:
            # A narrow adapter is a wide one whose last rows of `up` are 0.
            missing = width - member.bottleneck
            down, shift = weight_and_bias(member.down)
            up, offset = weight_and_bias(member.up)
            downs.append(F.pad(down, (0, 0, 0, missing)))
            shifts.append(F.pad(shift, (0, missing)))
            ups.append(F.pad(up.t(), (0, 0, 0, missing)))
            betas.append(offset)
        down, shift = torch.cat(downs), torch.cat(shifts)
        beta = torch.stack(betas)
        if self.layer_norm:
            # W (g * n + o) + c = (W * g) n + (W o + c)
            gain = torch.stack([member.norm.weight for member in members])
            offset = torch.stack([member.norm.bias for member in members])
            down = down.unflatten(0, (len(members), width))
            moved = (down @ offset.unsqueeze(-1)).flatten()
            down = (down * gain.unsqueeze(1)).flatten(0, 1)
            shift = shift + moved
        return Stacked(down, shift, torch.cat(ups), beta, width)

    def hidden(self, x, stack):
        """Return what all bottlenecks hold, [..., N b], see `Stacked`."""
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

        def select(weight):
            return weight.unflatten(0, (len(self), -1)).index_select(0, index)

        down, up = select(stack.down), select(stack.up)
        shift = select(stack.shift)
        normed = self.normalise(x)
        hidden = torch.matmul(normed, down.mT) + shift.unsqueeze(1)
        return torch.matmul(self.activation(hidden), up) + select(stack.beta)

    def forward(self, x):
        """As `each`."""
        return self.each(x)


def adapter_key(name):
    """Return a task's key among the modules, where no dot may be."""
    return _PREFIX + name.replace("%", "%25").replace(".", "%2E")


def adapter_name(key):
    """Return the name of the task of which `adapter_key` makes this key."""
    name = key.removeprefix(_PREFIX)
    return name.replace("%2E", ".").replace("%25", "%")
