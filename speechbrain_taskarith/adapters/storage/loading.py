"""What `insert_adapters(load=...)` takes: files, a folder, checkpoints.

A YAML makes its objects before a `Pretrainer` loads the base. So files are
read and put in at once, and held against the base at the first forward pass.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from speechbrain_taskarith.adapters.bank import COMBINED, adapter_key
from speechbrain_taskarith.adapters.checks import (
    base_state,
    check_base,
    check_file,
    fingerprint,
    frozen_state,
)
from speechbrain_taskarith.adapters.layer import CHILD
from speechbrain_taskarith.adapters.storage.files import read_file

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
# Settings of a combination that do not change what it computes.
_HOW = ("form", "recompute", "guided")


class Source:
    """One file that was read, and what in the handle came from it."""

    def __init__(self, handle, path, name):
        self.path, self.name, self.any_base = path, name, False
        self.is_checkpoint = _is_checkpoint(path)
        if _is_folder(path) and not self.is_checkpoint:
            raise ValueError(
                f"{path}: a folder without checkpoints (CKPT+*); give the "
                f"file of adapter {name!r}, or a run's save folder"
            )
        if self.is_checkpoint:
            self.tensors, self.header = _from_checkpoint(handle, path, name)
        else:
            self.tensors, self.header = read_file(path)
        self.kind = (self.header or {}).get("kind", "adapter")
        if name is None and self.header is not None:
            combined = self.kind == "combination"
            self.name = COMBINED if combined else self.header["name"]

    def put(self, handle, any_base):
        """Check the file against the layers and put it in.

        A combination goes into the one that was asked for, if there is one.
        """
        self.any_base = any_base
        kind = "combination" if self.name == COMBINED else "adapter"
        check_file(handle, self.path, self.tensors, self.header, kind, any_base)
        if kind == "combination":
            asked = handle.layers[0].combination
            handle._put_combination(self.path, self.tensors, self.header, asked)
        else:
            handle._put_adapter(self.path, self.tensors, self.header, self.name)
        self.tensors = None

    def check(self, handle):
        """Refuse it where it was trained on another base, see `check_base`."""
        if self.any_base:
            return
        header = self.header
        if self.is_checkpoint:
            frozen = list(_frozen_then(handle, _states(self.path)))
            header = {**header, "frozen": frozen}
            base = base_state(handle.encoder)
            lacking = base.keys() - handle.encoder.state_dict().keys()
            alone = {n: t for n, t in base.items() if n not in lacking}
            if lacking and header["base"] == fingerprint(alone):
                header["base"] = handle.base_fingerprint()
                logger.warning(
                    "%s: a model's checkpoint lacks %s, which cannot be "
                    "checked",
                    self.path,
                    ", ".join(sorted(lacking)),
                )
        try:
            check_base(handle, self.path, header)
        except ValueError as error:
            raise ValueError(f"adapter {self.name!r}: {error}") from None


def load_files(handle, load, any_base=False):
    """Put the adapters and the combination of files in; return the sources.

    `load` is as for `insert_adapters`.
    """
    sources = [Source(handle, *one) for one in _planned(handle, load)]
    there = {source.name for source in sources}
    kept = []
    for source in sources:
        if source.name == COMBINED and source.kind == "combination":
            fault = _misfit(handle, source.header, there)
            if fault is None:
                kept.append(source)
            elif _is_folder(load):
                logger.warning(
                    "%s: %s; the combination was left out", source.path, fault
                )
            else:
                raise ValueError(
                    f"{source.path}: {fault}; insert_adapters(combination=..., "
                    "names=...) as the file has them, or without combination"
                )
        elif source.name in (COMBINED, *handle.names):
            kept.append(source)
        elif _is_folder(load):
            logger.info(
                "%s: adapter %r is not among the names and was left out",
                source.path,
                source.name,
            )
        else:
            raise ValueError(
                f"{source.path}: adapter {source.name!r} is not among the "
                f"names {', '.join(handle.names)}; add it to names, or give "
                "load: {name: path}"
            )
    # A combination needs its adapters.
    kept.sort(key=lambda source: source.name == COMBINED)
    for source in kept:
        source.put(handle, any_base)
    return kept


def _misfit(handle, header, there):
    """Say what of a file's combination is not as it was asked for, or None.

    `there` has the names of all files that were found.
    """
    asked, names = handle.layers[0].combination, header["names"]
    if asked is None:
        gone = [n for n in names if n in there and n not in handle.names]
        return (
            f"combines {', '.join(gone)}, not among the names" if gone else None
        )
    kind = type(asked)
    if header["class"] != kind.__name__:
        return f"is {header['class']}, but {kind.__name__} was asked for"
    theirs = kind(**header["settings"]).settings()
    for what, ours in asked.settings().items():
        if what not in _HOW and theirs[what] != ours:
            return f"its {what} is {theirs[what]}, but {ours} was asked for"
    if set(names) != set(asked.names):
        return (
            f"combines {', '.join(names)}, but {', '.join(asked.names)} was "
            "asked for"
        )
    return None


def _planned(handle, load):
    """Yield `(path, name)` of what `load` names; None: as the file has it."""
    if isinstance(load, Mapping):
        for name, path in load.items():
            if name not in (COMBINED, *handle.names):
                raise ValueError(
                    f"load: there is no adapter {name!r} among the names "
                    f"{', '.join(handle.names)}; add it to names (or use "
                    f"{COMBINED!r} for a combination)"
                )
            yield path, name
    elif _is_folder(load):
        if _is_checkpoint(load):
            raise ValueError(
                f"{load}: a checkpoint; say which adapter to take from it, "
                "load: {name: path}"
            )
        found = sorted(Path(load).glob(f"*{_SUFFIX}"))
        if not found:
            raise ValueError(f"{load}: no {_SUFFIX} file in this folder")
        for path in found:
            yield path, None
    elif isinstance(load, (str, Path)):
        if _is_checkpoint(load):
            raise ValueError(
                f"{load}: a checkpoint; say which adapter to take from it, "
                "load: {name: path}"
            )
        yield load, None
    else:
        raise ValueError(
            f"load is {load!r}, expected {{name: path}}, a file or a folder"
        )


def _is_folder(load):
    return isinstance(load, (str, Path)) and Path(load).is_dir()


def _is_checkpoint(path):
    """Tell whether a path is SpeechBrain's: a save folder, CKPT+*, *.ckpt."""
    path = Path(path)
    inside = path.is_dir() and any(path.glob("CKPT+*"))
    return inside or path.name.startswith("CKPT+") or path.suffix == ".ckpt"


def _states(path):
    """Yield `(file, state dict)` of a checkpoint, the model's first."""
    path = Path(path)
    if path.is_dir() and not path.name.startswith("CKPT+"):
        from speechbrain.utils.checkpoints import Checkpointer

        path = Path(Checkpointer(path).find_checkpoint().path)
    files, folder = [], path
    if not path.is_dir():
        files, folder = [path], path.parent
    others = sorted(folder.glob("*.ckpt"), key=lambda p: p.stem != "model")
    for file in [*files, *(other for other in others if other not in files)]:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception:  # a counter's text, an optimizer's classes, ...
            continue
        if isinstance(state, dict):
            yield file, state


def _from_checkpoint(handle, path, name):
    """Return tensors and header of one adapter in a checkpoint."""
    if name == COMBINED:
        raise ValueError(
            f"{path}: a combination cannot be taken from a checkpoint; "
            "continue from that run by the pretrainer, or write a file with "
            "handle.save_combination(path)"
        )
    member = f"bank.{adapter_key(name)}."
    pattern = re.compile(
        rf"(.*\b{CHILD}\.)layers\.(\d+)\.{re.escape(member)}(.+)"
    )
    for file, state in _states(path):
        hits = [m for key in state if (m := pattern.fullmatch(str(key)))]
        if not hits:
            continue
        start = hits[0][1]
        tensors = {f"layers.{m[2]}.{m[3]}": state[m[0]] for m in hits}
        number = len({m[2] for m in hits})
        before = start.removesuffix(f"{CHILD}.")
        base = {
            key.removeprefix(before): value
            for key, value in state.items()
            if key.startswith(before) and not key.startswith(start)
        }
        names = handle.layer_names
        return tensors, {
            "kind": "adapter",
            "version": 1,
            "name": name,
            # A state dict names neither layers nor activation.
            "layers": names if len(names) == number else [""] * number,
            "d_model": [
                len(tensors[f"layers.{i}.up.bias"]) for i in range(number)
            ],
            "base": fingerprint(base),
            "checksum": fingerprint(tensors),
            "file": str(file),
        }
    raise ValueError(
        f"{path}: no checkpoint of a model with an adapter {name!r} is here; "
        "give the save folder, a CKPT+ folder or the model's .ckpt file of "
        "the run that trained it"
    )


def _frozen_then(handle, states):
    """Yield what stood in a checkpoint where modules are frozen here."""
    states = [state for _, state in states]
    for name, module in handle._frozen:
        here = frozen_state(module)
        if not here:
            continue
        then = [fingerprint(found) for found in _like(here, states)]
        if then:
            own = fingerprint(here)
            entry = {"name": name, "class": type(module).__name__}
            yield {**entry, "fingerprint": own if own in then else then[0]}


def _like(here, states):
    """Yield parts of state dicts that have a module's names and shapes."""
    first = next(iter(here))
    for state in states:
        for key in state:
            if not str(key).endswith(first):
                continue
            start = key.removesuffix(first)
            found = {name: state.get(start + name) for name in here}
            if all(
                isinstance(found[name], torch.Tensor)
                and found[name].shape == tensor.shape
                for name, tensor in here.items()
            ):
                yield found
