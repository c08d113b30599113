"""Writing weights atomically: safetensors, torch files, folders."""

import collections
import json
import shutil
import time
import warnings
from pathlib import Path

import numpy as np

from speechbrain_taskarith.utils.files import (
    atomic_folder,
    atomic_write,
    read_json,
    write_json,
)
from speechbrain_taskarith.utils.hub.cards import (
    FILE,
    KEY,
    card_path,
    checked_front,
    read_front,
)
from speechbrain_taskarith.utils.hub.download import DESCRIPTIONS
from speechbrain_taskarith.utils.hub.upload import WEIGHTS
from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.utils.patterns import first_match, require_match
from speechbrain_taskarith.vectors.states.names import (
    check_readable,
    match_names,
)
from speechbrain_taskarith.vectors.states.readers import (
    as_state,
    form_of,
    open_state,
)
from speechbrain_taskarith.vectors.states.safetensors import (
    CHECKED,
    FINGERPRINT,
    ITEM_SIZE,
    TIED,
    TORCH_NAME,
    SafetensorsWriter,
    tied_text,
)
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    FINETUNED,
    META_KEY,
    PREFIX,
    by_network,
    find_checkpoint_folder,
    plain,
    recoverables,
    write_meta,
)
from speechbrain_taskarith.vectors.states.state import (
    CHECKSUM,
    TASK_VECTOR,
    fingerprint_of,
    is_extra,
)
from speechbrain_taskarith.vectors.states.torch_files import (
    load_torch_file,
    save_torch_file,
)

_BLOCK = 1 << 22
# What a Hugging Face folder takes along from the one that it is written after:
# what describes model, features and tokenizer. All else may hold or describe
# the old weights (other formats, the state of a training, a model card).
_TAKEN_ALONG = DESCRIPTIONS
# What a folder may hold that a model is written over.
_REPLACED = (FILE, *DESCRIPTIONS, *WEIGHTS, ".gitattributes")
# They lead readers to other weights: an adapter's, quantised ones.
_LEFT_OUT = ("adapter_config.json", "quant*_config.json")

# What files say about themselves.
_HEADER_KEYS = ("format", TIED, CHECKED, FINGERPRINT, TASK_VECTOR, CHECKSUM)
_FOLDER_KEYS = ("editing", "files", "policy")

POLICIES = ("copy", "pool", "drop")
#: What happens to recoverables that are not edited. Optimizers (and the
#: position inside an epoch) belong to weights that are no longer there; a
#: `Checkpointer` asks for everything else by name, so it has to be there.
DEFAULT_POLICY = {
    f"*{FINETUNED}": "drop",
    "*optimizer*": "drop",
    "*opt": "drop",
    "scaler": "drop",
    "dataloader*": "drop",
    "*": "copy",
}


def save_state(
    state,
    path,
    *,
    metadata=None,
    shard_size=5_000_000_000,
    like=None,
    recoverable=None,
):
    """Write weights; the form follows from the path. Atomic.

    Arguments
    ---------
    state : mapping, torch.nn.Module, State or path
        What to write. Tied tensors stay tied. What is no tensor
        (`get_extra_state`, counters) needs a torch file or a SpeechBrain
        folder.
    path : str or pathlib.Path
        `x.safetensors`; `x.ckpt`, `x.pt`, `x.pth` or `x.bin` (a plain state
        dict by `torch.save`); a name that starts with `CKPT+` (a SpeechBrain
        checkpoint folder); any other name without suffix is a Hugging Face
        folder.
    metadata : dict or None
        Plain values to keep beside the weights: in the header of a
        safetensors file, in `CKPT.yaml`, else in the card `<path>.md`. Not
        under names by which files say what they are (`"fingerprint"`, ...).
    shard_size : int
        Largest file of a Hugging Face folder, in bytes.
    like : str, pathlib.Path or None
        For a folder: another one whose further content is taken along
        (Hugging Face: `*config.json`, feature extractor, tokenizer, licence;
        SpeechBrain: the other recoverables, see `save_checkpoint`).
    recoverable : str or None
        What the weights are called in a SpeechBrain folder; None: `model`.

    Returns
    -------
    pathlib.Path
        The path written.

    Raises
    ------
    ValueError
        An unknown suffix, metadata that cannot be kept.
    FileExistsError
        The card's name is taken by another file; a folder of that name holds
        more than a model.
    OSError
        Naming the path (a full disk, ...); what stood there is unchanged.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.vectors import open_state
    >>> path = str(getfixture("tmpdir") / "model.safetensors")
    >>> _ = save_state({"w": torch.ones(2)}, path, metadata={"step": 3})
    >>> open_state(path)["w"], open_state(path).metadata["step"]
    (tensor([1., 1.]), '3')
    """
    path, state, form = Path(path), as_state(state), form_of(path)
    check_readable(state)
    check_extra(state, path, form)
    check_replaced(path, form)
    metadata = check_metadata(metadata, path, form)
    if form == "safetensors":
        save_safetensors(state, path, metadata)
    elif form == "torch":
        save_torch_file(state, path, metadata)
    elif form == "speechbrain":
        states = by_network(state, recoverable)
        save_checkpoint(states, path, like=like, metadata=metadata)
    else:
        _save_hugging_face(state, path, metadata, shard_size, like)
    return path


def check_networks(state, path):
    """Raise unless a path can hold the weights of several recoverables."""
    if state.networks and not Path(path).name.startswith(PREFIX):
        raise ValueError(
            f"{path}: {state.label} gives several networks "
            f"({', '.join(state.networks)}); only a {PREFIX} folder holds "
            "them. Name the output so, or name one recoverable"
        )


def check_extra(state, path, form):
    """Refuse, or warn of, entries that are no tensors and would be lost.

    safetensors (and so a Hugging Face folder) holds tensors only.
    """
    if form in ("torch", "speechbrain") or not state.extra:
        return
    message = (
        f"{path}: safetensors holds tensors only, so {some(state.extra)} of "
        f"{state.label} would be lost. Write x.ckpt or a CKPT+ folder"
    )
    # A module asks for its extra state when it loads, for nothing else.
    if any(map(is_extra, state.extra)):
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def check_metadata(metadata, path, form, also=()):
    """Return metadata in plain types, or raise what writing it would raise.

    `also` are names that the caller adds.
    """
    found = plain(metadata or {}, f"{path}: metadata")
    reserved = _FOLDER_KEYS if form == "speechbrain" else _HEADER_KEYS
    if taken := [name for name in (*reserved, *also) if name in found]:
        raise ValueError(
            f"{path}: metadata[{taken[0]!r}]: the name is kept for what the "
            "file says about itself; choose another"
        )
    if form == "torch":
        # Of the weights that stand there, or somebody else's file.
        card = card_path(path)
        read_front(card)
        if found or also:
            checked_front(card, {KEY: found})
    return found


def check_replaced(path, form):
    """Raise if writing a Hugging Face folder would delete anything else."""
    path = Path(path)
    if form != "hugging face" or not path.is_dir():
        return
    found = sorted(
        inside.name
        for inside in path.iterdir()
        if not inside.is_file() or not any(map(inside.match, _REPLACED))
    )
    if found:
        more = f" and {len(found) - 1} more" * (len(found) > 1)
        raise FileExistsError(
            f"{path}: is replaced as a whole, and holds what belongs to no "
            f"model: {found[0]!r}{more}. Nothing was changed; name another "
            "folder, or move that away"
        )
    checked_front(card_path(path), {})


def metadata_texts(metadata):
    """Return metadata as a safetensors header holds it: texts, or JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }


def save_safetensors(state, path, metadata, names=None):
    """Write a safetensors file, or a shard of one, with checked metadata."""
    names = list(state) if names is None else names
    header = {"format": "pt", **tied_text(state.aliases, names)}
    header |= metadata_texts(metadata)
    # The fingerprint in the header is what `State.verify` checks.
    if len(names) == len(state):
        header["fingerprint"] = state.fingerprint
    else:
        digests = {name: state.digest(name) for name in names}
        header["fingerprint"] = fingerprint_of(digests)
    infos = {name: state.info(name) for name in names}
    with SafetensorsWriter(path, infos, header) as out:
        for name, info in infos.items():
            size = ITEM_SIZE[info.dtype]
            step = _BLOCK // size
            for start in range(0, info.numel, step):
                stop = min(start + step, info.numel)
                buffer = np.empty((stop - start) * size, np.uint8)
                state.read_into(name, start, stop, buffer)
                out.write(name, start, buffer)


def _save_hugging_face(state, path, metadata, shard_size, like):
    shards, filled, total = [[]], 0, 0
    # Names of one tensor go into one file, which notes that they are.
    groups = {}
    for name in state:
        groups.setdefault(state.aliases.get(name, name), []).append(name)
    for names in groups.values():
        size = sum(state.info(name).nbytes for name in names)
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1] += names
        filled += size
        total += size
    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}" for i in range(count)]
    files = [f"{file}.safetensors" for file in files]
    if count == 1:
        files = ["model.safetensors"]
    with atomic_folder(path) as folder:
        for file in Path(like).iterdir() if like is not None else ():
            taken = any(file.match(pattern) for pattern in _TAKEN_ALONG)
            out = any(file.match(pattern) for pattern in _LEFT_OUT)
            if file.is_file() and taken and not out:
                shutil.copy2(file, folder / file.name)
        _note_dtype(folder / "config.json", state)
        for file, names in zip(files, shards):
            save_safetensors(state, folder / file, metadata, names)
        if count > 1:
            pairs = zip(files, shards)
            file_of = {name: file for file, names in pairs for name in names}
            weight_map = {name: file_of[name] for name in state}
            index = {"metadata": {"total_size": total}}
            index["weight_map"] = weight_map
            write_json(folder / "model.safetensors.index.json", index)


def _note_dtype(config, state):
    """Let a config name the type of most weights, in which they are loaded."""
    if not config.is_file():
        return
    sizes = collections.Counter()
    for info in map(state.info, state):
        if info.floating:
            sizes[TORCH_NAME[info.dtype]] += info.nbytes
    content = read_json(config)
    for key in {"dtype", "torch_dtype"} & content.keys():
        most = sizes.most_common(1)[0][0] if sizes else None
        if None not in (most, content[key]) and content[key] != most:
            write_json(config, content | {key: most})


def save_checkpoint(
    states,
    path,
    *,
    like=None,
    policy=None,
    pool=(),
    meta=None,
    metadata=None,
    card=None,
):
    """Write a SpeechBrain checkpoint folder, atomically.

    `Checkpointer` finds it by its name and `CKPT.yaml`, `Pretrainer` loads
    the files inside. A checkpoint holds more than weights: each of the
    recoverables that are not edited has a policy.

    Arguments
    ---------
    states : dict
        `{recoverable: weights}` of what was edited, usually `{"model":
        ...}`; a path, module or mapping of tensors each.
    path : str or pathlib.Path
        The folder; its name must start with `CKPT+`.
    like : str, pathlib.Path or None
        The checkpoint whose other recoverables are taken along: a `CKPT+`
        folder, or a save folder (see `find_checkpoint_folder`). Edited
        states must have the names and shapes found there; their floating
        point type may be another.
    policy : dict or None
        `{pattern: "copy" | "pool" | "drop"}` on recoverables' names; what
        fits no pattern follows `DEFAULT_POLICY`. `"pool"` is for input
        normalisers: pooled by count with those of the `pool` checkpoints.
    pool : sequence of path
        Checkpoints (folders) whose normalisers are pooled with `like`'s.
    meta : dict or None
        Scores for `CKPT.yaml`, e.g. `{"WER": 4.2}`, by which `Checkpointer`
        chooses. `like`'s scores are not taken over: other weights, other
        scores.
    metadata : dict or None
        Provenance; stands in `CKPT.yaml` under `taskarith`.
    card : ModelCard or None
        Written into the folder.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    ValueError
        A bad name or policy, an edited state that does not fit `like`'s,
        meta that is not plain.
    FileNotFoundError
        `like` or a pooled checkpoint lacks what is asked of it.

    Example
    -------
    >>> import torch
    >>> from speechbrain.utils.checkpoints import Checkpointer
    >>> folder = getfixture("tmpdir")
    >>> _ = save_checkpoint(
    ...     {"model": {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}},
    ...     str(folder / "CKPT+merged"),
    ...     meta={"WER": 4.2},
    ... )
    >>> checkpointer = Checkpointer(folder, {"model": torch.nn.Linear(1, 1)})
    >>> checkpointer.recover_if_possible(min_key="WER").path.name
    'CKPT+merged'
    """
    path = Path(path)
    if not path.name.startswith(PREFIX):
        raise ValueError(
            f"{path}: the name of a SpeechBrain checkpoint folder must start "
            f"with {PREFIX!r}, or Checkpointer does not find it"
        )
    states = {name: as_state(state) for name, state in states.items()}
    for state in states.values():
        check_readable(state)
    source = None if like is None else find_checkpoint_folder(like)
    actions = _actions(states, source, policy)
    if "pool" in actions.values() and not pool:
        raise ValueError("policy 'pool' needs pool=[checkpoint, ...]")
    parents = [find_checkpoint_folder(folder) for folder in pool]
    content = {"unixtime": time.time(), "end-of-epoch": True}
    content |= plain(meta or {}, "meta")
    provenance = {"policy": {**dict.fromkeys(states, "edit"), **actions}}
    provenance |= check_metadata(metadata, path, "speechbrain")
    content[META_KEY] = provenance
    for name, state in states.items():
        if source is not None:
            _check_same_model(name, state, source)
    with atomic_folder(path) as folder:
        for name, state in states.items():
            save_torch_file(state, folder / f"{name}.ckpt")
        for name, action in actions.items():
            file = f"{name}.ckpt"
            if action == "copy":
                shutil.copyfile(source / file, folder / file)
            elif action == "pool":
                _pool(file, [source, *parents], folder)
        if card is not None:
            card.save(folder)
        write_meta(folder, content)
    return path


def _actions(states, source, policy):
    """Return `{recoverable: policy}` for what is in `source`, not edited."""
    policy = dict(policy or {})
    for pattern, action in policy.items():
        if action not in POLICIES:
            raise ValueError(
                f"policy {pattern!r}: {action!r}; expected one of "
                f"{', '.join(POLICIES)} (what is edited is given in states)"
            )
    if source is None:
        if policy:
            raise ValueError("policy: nothing to take along; give like=")
        return {}
    names = recoverables(source)
    for pattern in policy:
        require_match(names, pattern, "recoverable")
    # Those given come first also where they repeat a default's pattern.
    return {
        name: first_match(name, policy) or first_match(name, DEFAULT_POLICY)
        for name in names
        if name not in states
    }


def _check_same_model(name, state, source):
    base = open_state(source, recoverable=name)
    try:
        match_names(base, state)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name!r}: the edited state is not one of the model in {source}: "
            f"{error.args[0]}"
        ) from None


def _pool(file, folders, target):
    import torch

    from speechbrain_taskarith.vectors.engine import statistics as normalizers

    statistics = []
    for folder in folders:
        path = folder / file
        if not path.exists():
            raise FileNotFoundError(f"{path}: to be pooled, is missing")
        content = load_torch_file(path)
        if not isinstance(content, dict) or "glob_mean" not in content:
            raise ValueError(
                f"{path}: is not an input normaliser; only those can be pooled "
                "(copy or drop it)"
            )
        statistics.append(content)
    with atomic_write(target / file) as stream:
        torch.save(normalizers.pool_normalizers(statistics), stream)
