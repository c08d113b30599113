"""SpeechBrain checkpoint folders: `CKPT+...` with a `CKPT.yaml` inside.

They are found as `Checkpointer` finds them, less what a killed process left.
"""

import math
import warnings
from pathlib import Path

from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.vectors.states.pairing import without_wrappers
from speechbrain_taskarith.vectors.states.safetensors import damaged
from speechbrain_taskarith.vectors.states.state import State
from speechbrain_taskarith.vectors.states.torch_files import open_torch_file

META_FILE = "CKPT.yaml"
# Under this key of CKPT.yaml stands what this package knows of a checkpoint.
META_KEY = "taskarith"
PREFIX = "CKPT+"
# Stands for all recoverables that are networks.
ALL = "all"
# Behind a recoverable's name: the weights before the edit, for resuming.
FINETUNED = ".finetuned"


def find_checkpoint_folder(path, *, min_key=None, max_key=None):
    """Find the checkpoint that a path means.

    Arguments
    ---------
    path : str or pathlib.Path
        A `CKPT+` folder, or a folder that holds some.
    min_key, max_key : str or None
        Among several, the one with the least (greatest) such score in its
        `CKPT.yaml`; without, the newest.

    Returns
    -------
    pathlib.Path
        A folder that holds `CKPT.yaml`.

    Raises
    ------
    FileNotFoundError
        None there, or none with such a score.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.vectors import save_checkpoint
    >>> folder = getfixture("tmp_path")
    >>> weights = {"model": {"w": torch.ones(1)}}
    >>> for wer in (9.0, 4.0, 6.0):
    ...     path = save_checkpoint(
    ...         weights, folder / f"CKPT+{wer}", meta={"WER": wer}
    ...     )
    >>> find_checkpoint_folder(folder, min_key="WER").name
    'CKPT+4.0'
    """
    path, key = Path(path), min_key or max_key
    if (path / META_FILE).is_file():
        return path
    found = whole_checkpoints(path)
    if key:
        for meta, folder in found:
            _check_number(meta, key, folder)
        # NaN, of a training that diverged, is no score.
        found = [
            one for one in found if not math.isnan(one[0].get(key, math.nan))
        ]
    if not found:
        score = f" with {key!r} in its {META_FILE}" if key else ""
        raise FileNotFoundError(
            f"{path}: holds no whole SpeechBrain checkpoint (a {PREFIX}... "
            f"folder{score})"
        )
    if key:
        sign = -1 if min_key else 1
        best = max(sign * meta[key] for meta, _ in found)
        found = [entry for entry in found if sign * entry[0][key] == best]
    return max(found, key=_recency)[1]


def newest_checkpoint(folder):
    """Return the newest whole checkpoint in a folder, or None."""
    found = whole_checkpoints(Path(folder))
    return max(found, key=_recency)[1] if found else None


def _recency(found):
    meta, folder = found
    return meta.get("unixtime", 0), folder.name


def whole_checkpoints(folder):
    """Return `[(CKPT.yaml's content, folder)]` of the whole checkpoints."""
    folders = sorted(folder.glob(f"{PREFIX}*"))
    folders = [inside for inside in folders if (inside / META_FILE).is_file()]
    found = [(read_checkpoint_meta(inside), inside) for inside in folders]
    return [(meta, inside) for meta, inside in found if is_whole(inside, meta)]


def is_whole(folder, meta=None):
    """Tell whether all files that a checkpoint was written with are there.

    Deleting a checkpoint takes its files away one by one; a process killed
    meanwhile leaves a folder that looks like a checkpoint and is none.
    Checkpoints that list no files (SpeechBrain's own) count as whole.
    """
    return not missing_files(folder, meta)


def missing_files(folder, meta=None):
    """Return the files that a checkpoint lists and that are not there."""
    if meta is None:
        meta = read_checkpoint_meta(folder)
    ours = meta.get(META_KEY)
    files = ours.get("files", ()) if isinstance(ours, dict) else ()
    return [file for file in files if not (Path(folder) / file).exists()]


def read_checkpoint_meta(folder):
    """Read a checkpoint's `CKPT.yaml`, plain types only."""
    import yaml

    path = Path(folder) / META_FILE
    try:
        # Listing a folder reads all of these: libyaml's reader, ten times as
        # fast, where it is there.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        meta = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise damaged(path, f"is not plain YAML ({error})") from None
    if not isinstance(meta or {}, dict):
        what = f"holds a {type(meta).__name__}, expected a mapping"
        raise damaged(path, what)
    meta = meta or {}
    _check_number(meta, "unixtime", folder)
    ours = meta.get(META_KEY)
    files = ours.get("files", []) if isinstance(ours, dict) else []
    if not (isinstance(files, list) and all(type(f) is str for f in files)):
        raise damaged(path, f"has no list of names as its 'files': {files!r}")
    return meta


def _check_number(meta, key, folder):
    """Checkpoints are compared by their time and scores."""
    if not isinstance(value := meta.get(key, 0), (int, float)):
        what = f"has {value!r} for {key!r}, expected a number"
        raise damaged(Path(folder) / META_FILE, what)


def open_checkpoint(folder, recoverable=None):
    """Open one recoverable's weights; see `readers.open_state`."""
    content = read_checkpoint_meta(folder)
    metadata = {str(key): str(value) for key, value in content.items()}
    if recoverable is None:
        return _only_network(folder, metadata)
    if recoverable == ALL or "," in recoverable:
        return _several(folder, metadata, recoverable)
    path = folder / f"{recoverable}.ckpt"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder}: no recoverable {recoverable!r}; it holds: "
            f"{', '.join(recoverables(folder)) or 'none'}"
        )
    return open_torch_file(path, folder, metadata)


def _several(folder, metadata, recoverable):
    """Open several networks as one, each under its recoverable's name."""
    if recoverable == ALL:
        found = _networks(folder, metadata)
        if not found:
            raise ValueError(f"{folder}: holds no network")
    else:
        names = [name.strip() for name in recoverable.split(",")]
        found = {name: open_checkpoint(folder, name) for name in names}
    found = {name: without_wrappers(one) for name, one in found.items()}
    if len(found) == 1:
        return next(iter(found.values()))
    parts = ({}, {}, {})
    for name, one in found.items():
        held = (one.entries, one.extra, one.unreadable)
        for part, own in zip(parts, held):
            part.update({f"{name}.{inner}": own[inner] for inner in own})

    def check(_):
        for one in found.values():
            one.verify()

    state = State(parts[0], folder, metadata, check)
    state.extra, state.unreadable = parts[1:]
    state.networks = tuple(found)
    return state


def by_network(state, recoverable=None):
    """Return `{recoverable: weights}`; several networks are taken apart."""
    names = state.networks or (recoverable or "model").split(",")
    if len(names) == 1:
        return {names[0]: state}
    return {name: state.rename(prefix=f"{name}.") for name in names}


def _networks(folder, metadata):
    """Open all of a checkpoint's recoverables that are networks."""
    found = {}
    for name in recoverables(folder):
        if name.endswith(FINETUNED):
            continue
        try:
            path = folder / f"{name}.ckpt"
            found[name] = open_torch_file(path, folder, metadata)
        except ValueError:
            # Others are no state dict (a counter, an optimizer); a damaged
            # model is.
            if name == "model":
                raise
    return found


def _only_network(folder, metadata):
    """Open `model`, with a warning of what it leaves out, or what is alone."""
    found = _networks(folder, metadata)
    sizes = {
        name: sum(state.info(key).numel for key in state)
        for name, state in found.items()
    }
    others = [name for name in found if name != "model"]
    if "model" not in found and len(others) != 1:
        raise ValueError(
            f"{folder}: expected a recoverable called 'model' or exactly one "
            f"network; there are: {_listed(others, sizes) or 'none'}. Name "
            "one or several: --recoverable NAME,NAME (or all), "
            "open_state(path, recoverable=...), or the .ckpt file itself"
        )
    if "model" in found and others:
        warnings.warn(
            f"{folder}: 'model' ({sizes['model']} parameters) is taken, left "
            f"out: {_listed(others, sizes)}; for all of them say --recoverable "
            "all or recoverable='all', for some their names (NAME,NAME)",
            stacklevel=4,
        )
    return found["model" if "model" in found else others[0]]


def _listed(names, sizes):
    return ", ".join(f"{name} ({sizes[name]} parameters)" for name in names)


def recoverables(folder):
    """Return the names of a checkpoint's recoverables."""
    return sorted(file.stem for file in folder.glob("*.ckpt"))


def write_meta(folder, content):
    """Write `CKPT.yaml` last: it lists the files that are there by then."""
    import yaml

    files = [f"{name}.ckpt" for name in recoverables(Path(folder))]
    ours = {**content.get(META_KEY, {}), "files": files}
    content = {**content, META_KEY: ours}
    with atomic_write(Path(folder) / META_FILE, "w") as stream:
        stream.write("# yamllint disable\n")
        yaml.safe_dump(content, stream, sort_keys=True)


def plain(value, label):
    """Return a value in types that files beside weights hold and give back.

    SpeechBrain writes whatever it is given; a tuple, tensor or NumPy number
    saves well and then breaks every later look at the folder. `label` says
    where the value stands, for the error.

    Example
    -------
    >>> import torch
    >>> plain({"WER": torch.tensor(4.5), "shape": (1, 2)}, "meta")
    {'WER': 4.5, 'shape': [1, 2]}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v, f"{label}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(entry, label) for entry in value]
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        return plain(value.item(), label)
    # Subclasses of plain types, which YAML would write by their own name.
    for kind, base in ((str, (str, Path)), (int, int), (float, float)):
        if isinstance(value, base):
            return kind(value)
    raise ValueError(
        f"{label}: a {type(value).__name__} cannot be kept beside weights; "
        "expected numbers, texts, lists or dicts of them"
    )
