"""Opening weights, whatever they are stored in or held by.

Nothing here executes code found in a file.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from speechbrain_taskarith.utils.files import read_json
from speechbrain_taskarith.utils.hub.download import is_hub_name, local_path
from speechbrain_taskarith.vectors.states.pairing import (
    module_names,
    without_wrappers,
)
from speechbrain_taskarith.vectors.states.safetensors import (
    CHECKED,
    FINGERPRINT,
    ITEM_SIZE,
    TIED,
    damaged,
    read_header,
    read_tied,
)
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    META_FILE,
    PREFIX,
    missing_files,
    newest_checkpoint,
    open_checkpoint,
)
from speechbrain_taskarith.vectors.states.state import (
    TASK_VECTOR,
    OpenFile,
    State,
    StoredTensor,
    from_mapping,
)
from speechbrain_taskarith.vectors.states.torch_files import (
    TORCH_SUFFIXES,
    open_torch_file,
)


def open_state(path, *, recoverable=None, as_stored=False, key=None) -> "State":
    """Open stored weights lazily, without executing anything.

    Arguments
    ---------
    path : str or pathlib.Path
        One of: a SpeechBrain checkpoint folder (`CKPT+...`), or a folder of
        such folders (the newest is taken); a `.ckpt`, `.pt`, `.pth` or
        `.bin` file of `torch.save` (the weights may lie inside under
        `state_dict`, `model_state_dict`, `model` or `module`); a
        `.safetensors` file; a Hugging Face folder, sharded or not; the name
        of a model on Hugging Face's hub (`"openai/whisper-base"`), which is
        downloaded with its tokenizer and settings unless the hub's cache has
        it; the cache's folder of a model. Names come without what wrappers
        put in front (`module.`, `_orig_mod.`).
    recoverable : str or None
        In a SpeechBrain folder, whose weights; by default `model`, or else
        the only recoverable that is a state dict. Several (`"wav2vec2,model"`,
        or `"all"`) are opened as one, each behind its name and a dot; a
        `CKPT+` folder takes them apart again.
    as_stored : bool
        True: the names as they are stored, with wrappers' prefixes.
    key : str or None
        In a file of `torch.save`, under which key the weights lie, e.g.
        `"ema"` or `"model.state_dict"`.

    Returns
    -------
    State
        Lazy, read-only, memory-mapped.

    Raises
    ------
    FileNotFoundError
        Nothing stands there, or the hub or its cache does not give it; or a
        shard or recoverable is missing.
    ValueError
        Damaged, of an unknown format, or a pickle with more than tensors.

    Example
    -------
    >>> import torch
    >>> path = str(getfixture("tmpdir") / "model.ckpt")
    >>> torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    >>> open_state(path).info("weight")
    TensorInfo(dtype='F32', shape=(3, 2))
    """
    name, path = path, local_path(path)
    if key is None:
        state = _open(path, recoverable)
    elif path.is_file() and path.suffix in TORCH_SUFFIXES:
        state = open_torch_file(path, key=key)
    else:
        raise ValueError(
            f"{path}: key={key!r} is for a file of torch.save "
            f"({', '.join(TORCH_SUFFIXES)}); leave it out"
        )
    plain = as_stored or TASK_VECTOR in state.metadata
    state = state if plain else without_wrappers(state)
    if is_hub_name(name):
        state.label = str(name)  # not of the cache's folder
    return state


def _open(path, recoverable):
    if path.is_dir():
        return _open_folder(path, recoverable)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return open_torch_file(path)
    raise ValueError(
        f"{path}: unknown suffix {path.suffix!r}; expected one of "
        f".safetensors, {', '.join(TORCH_SUFFIXES)}"
    )


def check_no_input(output, inputs):
    """Raise if an output is, lies in, or holds one of the paths read."""
    here = Path(output).resolve()
    for path in inputs:
        given = Path(path).resolve()
        # A checkpoint folder may be written beside its siblings.
        inside = given in here.parents and (given / META_FILE).exists()
        # A folder is replaced as a whole.
        if here == given or inside or here in given.parents:
            raise ValueError(
                f"{output}: is (or lies in, or holds) an input; name another "
                "output"
            )


def form_of(path):
    """Return the form to write that follows from a path's name, or raise."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in TORCH_SUFFIXES:
        return "torch"
    if path.name.startswith(PREFIX):
        return "speechbrain"
    if not path.suffix or path.is_dir():
        return "hugging face"
    raise ValueError(
        f"{path}: unknown suffix {path.suffix!r}; expected .safetensors, "
        f"{', '.join(TORCH_SUFFIXES)}, a CKPT+ folder, or a folder (one with "
        "a dot in its name must exist)"
    )


def as_state(source, *, recoverable=None) -> "State":
    """Return a `State` for a path, a module, a mapping or a `State`.

    Arguments
    ---------
    source : str, pathlib.Path, torch.nn.Module, mapping of tensors, State
        What `DistributedDataParallel`, `DataParallel`, `AveragedModel`,
        `torch.compile`, sharding and checkpointing wrap keeps its own names.
    recoverable : str or None
        Of a path, see `open_state`.

    Returns
    -------
    State
        A view: the tensors are not copied.

    Raises
    ------
    TypeError
        For anything else.
    ValueError
        A mapping without weights, or with an entry that is no tensor.

    Example
    -------
    >>> import torch
    >>> as_state({"w": torch.zeros(2, 3)}).info("w")
    TensorInfo(dtype='F32', shape=(2, 3))
    """
    if isinstance(source, State):
        return source
    if isinstance(source, (str, os.PathLike)):
        return open_state(source, recoverable=recoverable)
    if isinstance(source, Mapping):
        return from_mapping(source, "the mapping")
    if hasattr(source, "state_dict") and hasattr(source, "parameters"):
        content = source.state_dict()
        names = module_names(source, content)
        content = {names[name]: content[name] for name in names}
        return from_mapping(content, type(source).__name__)
    raise TypeError(
        "expected weights as a path, a torch.nn.Module, a mapping from name "
        f"to tensor or a State, got {type(source).__name__}"
    )


def as_model(source, *, recoverable=None):
    """Return a `State` as `as_state` does; a task vector is refused.

    Its numbers would pass for weights that are nearly zero.
    """
    state = as_state(source, recoverable=recoverable)
    in_memory = isinstance(source, Mapping) and hasattr(
        source, "base_fingerprint"
    )
    if TASK_VECTOR in state.metadata or in_memory:
        label = "a TaskVector" if in_memory else f"{state.label}: a task vector"
        raise ValueError(
            f"{label} was given where a model is expected. Give the model's "
            "weights, or apply the vector to its base first "
            "(TaskVector.apply, taskarith apply)"
        )
    given = isinstance(source, Mapping) and not isinstance(source, State)
    return without_wrappers(state) if given else state


def _open_safetensors(path, shown_as=None):
    tensors, metadata = read_header(path)
    file = OpenFile(path)
    entries = {
        name: StoredTensor(file, info, offset)
        for name, (info, offset) in tensors.items()
        if info.dtype in ITEM_SIZE
    }
    tied = read_tied(path, metadata.pop(TIED, None), tensors)
    twins = State({name: entries[name] for name in tied})
    entries |= {name: entries[origin] for name, origin in tied.items()}
    written = metadata.get(FINGERPRINT)
    promised = metadata.pop(CHECKED, None)

    def check(state):
        if promised is not None and written is None:
            raise damaged(path, "its header has lost its fingerprint")
        whole = written in (None, state.fingerprint)
        # Of tied tensors only the first one's bytes are used.
        if not (
            whole and all(twins.digest(n) == state.digest(n) for n in tied)
        ):
            raise damaged(path, "its tensors are not those it was written with")

    state = State(entries, shown_as or path, metadata, check)
    state.unreadable = {
        name: f"of type {info.dtype}"
        for name, (info, _) in tensors.items()
        if name not in entries
    }
    return state


def _open_folder(folder, recoverable):
    whole = (folder / META_FILE).exists()
    checkpoint = folder if whole else newest_checkpoint(folder)
    if checkpoint is not None:
        return open_checkpoint(checkpoint, recoverable)
    for file, opener in (
        ("model.safetensors", _open_safetensors),
        ("pytorch_model.bin", open_torch_file),
    ):
        # A whole model first, as transformers does: an index beside it is
        # what an older save has left.
        if (folder / file).exists():
            return opener(folder / file, folder)
        if (index := folder / f"{file}.index.json").exists():
            return _open_shards(folder, index)
    for broken in sorted(folder.glob(f"{PREFIX}*")):
        if (broken / META_FILE).is_file():
            raise ValueError(
                f"{folder}: no whole checkpoint. {broken.name} lacks "
                f"{', '.join(missing_files(broken))}, which it was written "
                "with; put it back, or open the file of its weights itself"
            )
    raise ValueError(
        f"{folder}: holds no weights that can be read. Expected CKPT.yaml "
        "or CKPT+ folders (SpeechBrain), or model.safetensors, "
        "pytorch_model.bin or their .index.json (Hugging Face)"
    )


def _open_shards(folder, index):
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else {}
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise damaged(index, "holds no 'weight_map'")
    for file in weight_map.values():
        # A name from outside must not lead out of the folder, nor back to it.
        if not isinstance(file, str) or Path(file).name != file or not file:
            what = f"names a shard that is no file beside it: {file!r}"
            raise damaged(index, what)
    shards = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file}: shard is missing")
        shards[file] = _open(folder / file, None)
    entries, unreadable = {}, {}
    for name, file in weight_map.items():
        if name in shards[file].unreadable:
            unreadable[name] = shards[file].unreadable[name]
            continue
        if name not in shards[file]:
            raise damaged(folder / file, f"lacks {name!r}, which is indexed")
        entries[name] = shards[file].entries[name]

    def check(_):
        for shard in shards.values():
            shard.verify()

    # What all shards say; each has a fingerprint of its own.
    texts = [shard.metadata.items() for shard in shards.values()]
    common = {k: v for k, v in texts[0] if all((k, v) in t for t in texts)}
    state = State(entries, folder, common, check)
    state.unreadable = unreadable
    return state
