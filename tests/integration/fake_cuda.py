"""A GPU that is not there: torch's FakeTensorMode, with numbers.

A fake tensor knows its device, and torch refuses operations on two devices at
once. Here its numbers lie on the CPU beside it: loops that depend on numbers
run to their end, results can be compared with the CPU's, and each time that
the host has to wait for the device is counted.
"""

import ast
import contextlib
import itertools
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import speechbrain_taskarith

aten = torch.ops.aten
ASKS = "speechbrain_taskarith.utils.lengths"
# Of libraries that are not there.
OTHER_KERNELS = {"_use_cudnn_ctc_loss", "_use_miopen_ctc_loss"}
# What only the numbers tell.
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)
# No fake kernel was written.
UNWRITTEN = (NotImplementedError, UnsupportedOperatorException)
# Fake tensors have these without numbers, but their CUDA kernels wait for some.
WAITING = {
    aten.bincount.default,
    aten.equal.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
    aten._linalg_solve_ex.default,
    aten.multinomial.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}


class FakeCuda(FakeTensorMode):
    """Runs every operation on fake tensors, and on their numbers.

    `waits` counts the operations for which the host waits for the device, by
    `(operation, function of our package that asked for it)`.
    """

    def __init__(self, package="speechbrain_taskarith"):
        super().__init__(
            allow_non_fake_inputs=True, allow_fallback_kernels=False
        )
        self.package, self.waits = package, Counter()
        self._inside, self._patches = False, contextlib.ExitStack()

    def __enter__(self):
        # Torch enters its modes again, inside.
        patched = (
            ()
            if self._inside
            else (
                (FakeTensor, "tolist", self._tolist()),
                (torch.Tensor, "numpy", self._of_numbers("numpy")),
                (torch.Tensor, "data_ptr", self._of_numbers("data_ptr")),
                (
                    torch.Tensor,
                    "untyped_storage",
                    self._of_numbers("untyped_storage"),
                ),
                (torch.Tensor, "backward", _backward),
                (torch.autograd, "grad", _grad),
                (torch._VF, "lstm", _lstm),
                (torch.utils, "swap_tensors", _take),
            )
        )
        for owner, name, function in patched:
            self._patches.enter_context(
                mock.patch.object(owner, name, function)
            )
        if patched:
            # It would ask for a driver.
            flags = torch.backends.cudnn.flags(enabled=False)
            self._patches.enter_context(flags)
        return super().__enter__()

    def __exit__(self, *error):
        if not self._inside:
            self._patches.close()
        return super().__exit__(*error)

    def dispatch(self, func, types, args=(), kwargs=None):
        """Run an operation twice: for device and shape, and for numbers."""
        kwargs = kwargs or {}
        if self._inside:
            return super().dispatch(func, types, args, kwargs)
        if func._overloadpacket.__name__ in OTHER_KERNELS:
            return False
        if _waits(func, args, kwargs):
            self._note(func._overloadpacket.__name__)
        try:
            # First, so that what torch refuses changes no number.
            out = self._super(func, types, args, kwargs)
        except (*UNKNOWN, *UNWRITTEN) as error:
            device = _tensors((args, kwargs))[0].device
            if device.type == "cuda" and isinstance(error, UNKNOWN):
                self._note(func._overloadpacket.__name__)
            found = _on_host(func, args, kwargs)
            return tree_map_only(
                torch.Tensor, lambda t: self.imitate(t, device), found
            )
        return _attach(out, _on_host(func, args, kwargs))

    def _super(self, func, types, args, kwargs):
        self._inside = True
        try:
            return super().dispatch(func, types, args, kwargs)
        finally:
            self._inside = False

    def imitate(self, tensor, device="cuda"):
        """Return a fake tensor with the numbers of a real one."""
        made = self._super(
            aten.empty_strided.default,
            (),
            (tensor.shape, tensor.stride()),
            {"dtype": tensor.dtype, "device": torch.device(device)},
        )
        made.numbers = tensor
        return made

    def put(self, value):
        """Move a tensor or a module, and count no wait."""
        waits, self.waits = self.waits, Counter()
        try:
            return value.to("cuda")
        finally:
            self.waits = waits

    def _tolist(self):
        def tolist(tensor):
            if tensor.device.type == "cuda":
                self._note("tolist")
            return tensor.numbers.tolist()

        return tolist

    def _of_numbers(self, name):
        """Return a method of tensors that answers for a fake one's numbers."""
        real = getattr(torch.Tensor, name)

        def method(tensor, *args, **kwargs):
            # Torch asks fake tensors, too.
            if isinstance(tensor, FakeTensor) and not self._inside:
                if name == "numpy" and tensor.device.type != "cpu":
                    raise TypeError("numpy() on cuda: copy it first")
                with unset_fake_temporarily():
                    return real(tensor.numbers.detach(), *args, **kwargs)
            return real(tensor, *args, **kwargs)

        return method

    def _note(self, operation):
        frame, place = sys._getframe(1), None
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            where = f"{name}.{frame.f_code.co_name}"
            # Not the function that all ask through; nor what has no name,
            # which depends on the version of Python.
            named = name != ASKS and not where.endswith(">")
            if named and name.startswith(self.package + "."):
                place = where[len(self.package) + 1 :]
                break
            if name.startswith("speechbrain."):
                place = place or where
            frame = frame.f_back
        self.waits[operation, place] += 1


def numbers(tensor):
    """Return what lies in a fake tensor, without counting a wait."""
    return tensor.numbers if isinstance(tensor, FakeTensor) else tensor


def run(case):
    """Run `case(put)` on the CPU, and with `put` moving to the fake device.

    Compares what it returns, and returns the waits of the fake run.
    """
    torch.manual_seed(0)
    expected = case(lambda value: value)
    torch.manual_seed(0)
    with FakeCuda() as mode:
        found = case(mode.put)
    for one, other in zip(
        tree_leaves(found), tree_leaves(expected), strict=True
    ):
        if isinstance(one, FakeTensor):
            assert one.device.type == "cuda"
            torch.testing.assert_close(
                one.numbers.detach(), other.detach(), rtol=1e-4, atol=1e-5
            )
        else:
            assert one == other
    waits = Counter()
    for (_, place), number in mode.waits.items():
        waits[place] += number
    return waits


# For a table of waits: some at every step, vector or tensor.
EACH = "each"


def check(waits, expected):
    """Hold the waits of a run against `{place: number or EACH}`."""
    assert set(waits) == set(expected)
    for place, number in expected.items():
        assert number in (EACH, waits[place]), (place, number, waits[place])


def public_names(room):
    """Return what a room exports, by its `__init__.pyi`."""
    stub = Path(speechbrain_taskarith.__file__).parent / room / "__init__.pyi"
    tree = ast.parse(stub.read_text())
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    return {alias.asname for node in imports for alias in node.names}


def _take(parameter, moved):
    """Put a moved parameter in place, where torch would swap the objects."""
    parameter.data = moved.data
    parameter.fake_device = moved.fake_device
    parameter.numbers = moved.numbers


def _tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _waits(func, args, kwargs):
    tensors = _tensors((args, kwargs))
    devices = {t.device.type for t in tensors if func in COPIES or t.dim()}
    if func is aten._to_copy.default and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
        return len(devices) > 1 and not kwargs.get("non_blocking")
    if func in COPIES:
        return len(devices) > 1
    if "index" in func._overloadpacket.__name__:
        # Indices of the host are copied, masks counted (unless one number is
        # written).
        if "put" in func._overloadpacket.__name__ and args[2].numel() == 1:
            return False
        indices = (
            _tensors(args[1]) if isinstance(args[1], (list, tuple)) else []
        )
        if "cuda" in devices:
            return any(
                i.device.type != "cuda" or i.dtype == torch.bool
                for i in indices
            )
    return "cuda" in devices and func in WAITING


def _on_host(func, args, kwargs):
    def move(value):
        if isinstance(value, FakeTensor):
            return value.numbers
        is_device = isinstance(value, torch.device) and value.type == "cuda"
        return torch.device("cpu") if is_device else value

    with unset_fake_temporarily(), torch.no_grad():
        args, kwargs = tree_map(move, (tuple(args), dict(kwargs)))
        if func is aten.view.default:
            # Kernels of the CPU lay out their results in another order.
            return args[0].reshape(args[1])
        return func(*args, **kwargs)


def _attach(out, found):
    for fake, tensor in zip(tree_leaves(out), tree_leaves(found), strict=True):
        if isinstance(fake, FakeTensor):
            fake.numbers = tensor
    return out


def _lstm(x, state, weights, bias, layers, dropout, training, both, first):
    """Run an LSTM by the formula: cuDNN, which is not there, has one kernel."""
    assert bias and first and not both and not (dropout and training)
    hs, cs = [], []
    for layer in range(layers):
        w_x, w_h, b_x, b_h = weights[4 * layer : 4 * layer + 4]
        h, c, out = state[0][layer], state[1][layer], []
        for step in x.unbind(1):
            i, f, g, o = (step @ w_x.T + b_x + h @ w_h.T + b_h).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        x = torch.stack(out, 1)
        hs.append(h)
        cs.append(c)
    return x, torch.stack(hs), torch.stack(cs)


# The engine of autograd asks for a real device before it runs: so the graph is
# walked here, node by node.


def _walk(outputs, grads):
    """Run a graph backward; return gradients of tensors' nodes, by node."""
    order, seen = [], set()

    def visit(node):
        stack = [(node, iter(node.next_functions))]
        seen.add(node)
        while stack:
            top, rest = stack[-1]
            for following, _ in rest:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append((following, iter(following.next_functions)))
                    break
            else:
                order.append(top)
                stack.pop()

    pending = {}
    for out, grad in zip(outputs, grads):
        node, index = _edge(out)
        if node not in seen:
            visit(node)
        _add(pending, node, index, grad)
    with torch.no_grad():
        for node in reversed(order):
            given = pending.get(node)
            if given is None or hasattr(node, "variable"):
                continue
            for (following, index), grad in zip(*_run(node, given)):
                if following is not None and grad is not None:
                    _add(pending, following, index, grad)
    return pending


def _run(node, given):
    """Run a node on gradients by index: its edges, and a gradient for each."""
    grads = [given.get(i) for i in range(len(node._input_metadata))]
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        found = node(*grads)
        found = found if isinstance(found, tuple) else (found,)
        return node.next_functions, found
    grads = [
        torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
        for m, g in zip(node._input_metadata, grads)
    ]
    found = node.apply(*grads)
    found = found if isinstance(found, tuple) else (found,)
    # It answers for all its arguments, and has edges for its tensors.
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    return edges, itertools.compress(found, node.needs_input_grad)


def _edge(tensor):
    node = tensor.grad_fn
    if node is None:
        return torch.autograd.graph.get_gradient_edge(tensor)[:2]
    return node, tensor.output_nr


def _add(pending, node, index, grad):
    # As the engine: what was broadcast is summed.
    metadata = node._input_metadata[index]
    grad = grad.sum_to_size(metadata.shape).to(metadata.dtype)
    given = pending.setdefault(node, {})
    given[index] = given[index] + grad if index in given else grad


def _grad(outputs, inputs, grad_outputs=None, *args, **kwargs):
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    if grad_outputs is None:
        grad_outputs = [torch.ones_like(out) for out in outputs]
    elif isinstance(grad_outputs, torch.Tensor):
        grad_outputs = [grad_outputs]
    pending = _walk(outputs, grad_outputs)
    single = isinstance(inputs, torch.Tensor)
    edges = [_edge(t) for t in ([inputs] if single else inputs)]
    return tuple(pending.get(node, {}).get(index) for node, index in edges)


def _backward(tensor, gradient=None, **kwargs):
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    for node, given in _walk([tensor], [gradient]).items():
        if hasattr(node, "variable"):
            leaf, grad = node.variable, given[0]
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
