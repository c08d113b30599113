"""Whether an adapter file belongs to an encoder and what stands beside it."""

import hashlib
import logging

import torch

from speechbrain_taskarith.adapters.layer import CHILD

logger = logging.getLogger(__name__)

#: Of the format: 2 says which frozen modules stood beside the encoder.
VERSION = 2


def check_file(handle, path, tensors, header, kind, any_base=False):
    """Refuse a file that does not fit the encoder's layers.

    Arguments
    ---------
    handle : AdapterHandle
        What it is to be loaded into.
    path, tensors, header
        As `read_file` returns them.
    kind : str
        `"adapter"` or `"combination"`.
    any_base : bool
        See `load_adapter`.

    Raises
    ------
    ValueError
        As `load_adapter`, but for the base: its weights may not be
        there yet.
    """
    found = (header or {"kind": "another library's file"}).get("kind")
    if found != kind:
        raise ValueError(
            f"{path}: expected {kind}, found {found}"
            + ("; give a name_map to read it" if kind == "adapter" else "")
        )
    if header["version"] > VERSION:
        raise ValueError(
            f"{path}: written by a later version (format "
            f"{header['version']}, known is {VERSION}); update this "
            "package"
        )
    if fingerprint(tensors) != header["checksum"]:
        raise ValueError(
            f"{path}: its checksum does not match its content; it is "
            "damaged, fetch or save it again"
        )
    widths = [layer.bank.d_model for layer in handle.layers]
    if header["d_model"] != widths:
        raise ValueError(
            f"{path}: made for {len(header['d_model'])} layers of width "
            f"{_short(header['d_model'])}, but this encoder has adapters "
            f"behind {len(widths)} of width {_short(widths)}"
        )
    if any_base:
        return
    names = handle.layer_names
    for i, (theirs, here) in enumerate(zip(header["layers"], names)):
        if theirs != here:
            raise ValueError(
                f"{path}: made for layer {theirs!r}, where layer {here!r} "
                f"has adapters here (number {i + 1} of {len(names)}); "
                "insert them behind the same layers, or pass any_base=True"
            )
    here = next(handle.layers[0].bank.parameters()).dtype
    theirs = next(iter(tensors.values())).dtype if tensors else here
    # A base in half precision has adapters in float32, which hold all of it.
    if torch.promote_types(theirs, here) != here:
        raise ValueError(
            f"{path}: its numbers are {theirs}, those of the adapters "
            f"here {here}; load into an encoder of that dtype, or pass "
            "any_base=True to convert them"
        )


def check_base(handle, path, header):
    """Refuse a file that was trained on another base, or beside others.

    Arguments
    ---------
    handle, path, header
        As `read_file` has them.

    Raises
    ------
    ValueError
        The encoder, or a module that `freeze` was given, has other
        weights or statistics than when the file was written.
    """
    base = handle.base_fingerprint()
    if header["base"] != base:
        raise ValueError(
            f"{path}: trained on another base (fingerprint "
            f"{header['base'][:12]}, this encoder has {base[:12]}); load "
            "that base's weights first, or pass any_base=True"
        )
    here = handle.frozen_fingerprints()
    same = {entry["fingerprint"] for entry in here}
    left = [e for e in header.get("frozen", ()) if e["fingerprint"] not in same]
    known = {e["fingerprint"] for e in header.get("frozen", ())}
    rivals = [e for e in here if e["fingerprint"] not in known]
    for entry in left:
        rival = _rival(entry, rivals)
        if rival is None:
            logger.warning(
                "%s: trained beside a frozen %s (fingerprint %s), which "
                "is not frozen here, so that it cannot be checked: give "
                "it to freeze",
                path,
                entry["name"],
                entry["fingerprint"][:12],
            )
            continue
        raise ValueError(
            f"{path}: trained beside another {entry['name']} (fingerprint "
            f"{entry['fingerprint'][:12]}, {rival['name']} here has "
            f"{rival['fingerprint'][:12]}); load that one's weights and "
            "statistics first, or pass any_base=True"
        )


def _rival(entry, here):
    """Return the frozen module that stands where that of a file stood."""
    for other in here:
        if other["name"] == entry["name"]:
            return other
    # Without names of their own, modules of a class stand for one another.
    for other in here:
        unnamed = other["class"] in (other["name"], entry["name"])
        if other["class"] == entry["class"] and (
            unnamed or entry["name"] == entry["class"]
        ):
            return other
    return None


def frozen_fingerprints(frozen, known):
    """Return what `AdapterHandle.frozen_fingerprints` describes."""
    found = []
    for name, module in frozen:
        state = frozen_state(module)
        if state:
            entry = {"name": name, "class": type(module).__name__}
            found.append({**entry, "fingerprint": known.of(module, state)})
    return found


def frozen_state(module):
    """Return weights and statistics of a module, without adapters in it.

    SpeechBrain's `InputNormalization` has its statistics as plain
    attributes, which `state_dict` does not know.
    """
    state = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if CHILD not in name.split(".")
    }
    for name, inner in module.named_modules():
        for statistic in ("glob_mean", "glob_std"):
            value = getattr(inner, statistic, None)
            if isinstance(value, torch.Tensor):
                state[f"{name}.{statistic}".lstrip(".")] = value
    return state


def base_state(encoder):
    """Return `frozen_state` without statistics that nothing has measured."""
    state = frozen_state(encoder)
    own = encoder.state_dict().keys()
    return {n: t for n, t in state.items() if n in own or t.numel()}


def _tensors(state):
    """Yield `(name, tensor)`; quantised modules have theirs in tuples."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield name, value.dequantize() if value.is_quantized else value
        elif isinstance(value, (tuple, list)):
            parts = {f"{name}.{i}": part for i, part in enumerate(value)}
            yield from _tensors(parts)


def fingerprint(state):
    """Return the SHA-256 over tensors, whatever their order and device."""
    root = hashlib.sha256()
    for name, tensor in sorted(_tensors(state), key=lambda pair: pair[0]):
        shape = ",".join(map(str, tensor.shape))
        dtype = str(tensor.dtype).removeprefix("torch.")
        leaf = hashlib.sha256(f"{name}\0{dtype}\0{shape}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        leaf.update(flat.view(torch.uint8).numpy())
        root.update(leaf.digest())
    return root.hexdigest()


class Fingerprints(dict):
    """SHA-256 of modules' states, computed anew where one has changed.

    Whether it has is read off addresses, version counters and the sum of each
    tensor's bytes: writes through `.data` move no counter. That takes a tenth
    of the time.
    """

    def of(self, module, state):
        """Return the fingerprint of a module's state."""
        marks = [(name, _mark(tensor)) for name, tensor in _tensors(state)]
        if self.get(id(module), (None,))[0] != marks:
            self[id(module)] = marks, fingerprint(state)
        return self[id(module)][1]

    def __reduce__(self):
        # A copy's modules are others.
        return type(self), ()


def _mark(tensor):
    tensor = tensor.detach()
    version = -1 if tensor.is_inference() else tensor._version
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = len(flat) // 8 * 8
    total = flat[:words].view(torch.int64).sum() + flat[words:].sum()
    shape = tuple(tensor.shape)
    return tensor.data_ptr(), version, tensor.dtype, shape, int(total)


def _short(widths):
    return ", ".join(map(str, sorted(set(widths))))
