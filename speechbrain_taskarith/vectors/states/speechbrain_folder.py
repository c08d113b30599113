"""SpeechBrain checkpoint folders: written whole, found by `Checkpointer`.

A checkpoint holds more than weights. When a model is edited or merged, each
of its other recoverables has a policy: copy from the base, pool with the
parents', or drop.
"""

import math
import os
import shutil
import tempfile
import time
from pathlib import Path

from speechbrain_taskarith.utils.files import (
    TEMPORARY_PREFIX,
    atomic_write,
    replace_folder,
)
from speechbrain_taskarith.utils.patterns import first_match, require_match
from speechbrain_taskarith.vectors.states.readers import (
    META_KEY,
    is_whole,
    load_torch_file,
    open_state,
    read_checkpoint_meta,
)
from speechbrain_taskarith.vectors.states.state import as_state
from speechbrain_taskarith.vectors.states.statistics import pool_normalizers
from speechbrain_taskarith.vectors.states.writers import save_state

META_FILE = "CKPT.yaml"
PREFIX = "CKPT+"
# Behind a recoverable's name: the weights before the edit, for resuming.
FINETUNED = ".finetuned"

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
    the files inside.

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
        states must have the names, shapes and dtypes found there.
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
    source = None if like is None else find_checkpoint_folder(like)
    plan = _plan(states, source, policy)
    if "pool" in plan.values() and not pool:
        raise ValueError(
            "policy 'pool' needs pool=[checkpoint, ...], the checkpoints to "
            "pool with"
        )
    parents = [find_checkpoint_folder(folder) for folder in pool]
    content = {"unixtime": time.time(), "end-of-epoch": True}
    content |= plain(meta or {}, "meta")
    provenance = {"policy": {**dict.fromkeys(states, "edit"), **plan}}
    provenance |= plain(metadata or {}, "metadata")
    content[META_KEY] = provenance
    for name, state in states.items():
        if source is not None:
            _check_fits(name, state, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
    try:
        for name, state in states.items():
            save_state(state, folder / f"{name}.ckpt")
        for name, action in plan.items():
            file = f"{name}.ckpt"
            if action == "copy":
                shutil.copyfile(source / file, folder / file)
            elif action == "pool":
                _pool(file, source, parents, folder)
        if card is not None:
            card.save(folder)
        write_meta(folder, content)
        folder.chmod(0o755)
        publish(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return path


def publish(folder, path):
    """Flush a complete checkpoint folder and give it its name.

    Arguments
    ---------
    folder : pathlib.Path
        Complete, with a temporary name, in the same parent.
    path : pathlib.Path
        The final name.
    """
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    replace_folder(folder, path)


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
    >>> folder = getfixture("tmp_path")
    >>> weights = {"model": {"w": torch.ones(1)}}
    >>> for wer in (9.0, 4.0, 6.0):
    ...     path = save_checkpoint(
    ...         weights, folder / f"CKPT+{wer}", meta={"WER": wer}
    ...     )
    >>> find_checkpoint_folder(folder, min_key="WER").name
    'CKPT+4.0'
    """
    path = Path(path)
    if (path / META_FILE).is_file():
        return path
    found = []
    for folder in sorted(path.glob(f"{PREFIX}*")):
        if not (folder / META_FILE).is_file():
            continue
        meta = read_checkpoint_meta(folder)
        if is_whole(folder, meta):
            found.append((meta, folder))
    key = min_key or max_key
    if key:
        found = [(meta, folder) for meta, folder in found if key in meta]
    if not found:
        score = f" with {key!r} in its {META_FILE}" if key else ""
        raise FileNotFoundError(
            f"{path}: holds no whole SpeechBrain checkpoint (a {PREFIX}... "
            f"folder{score})"
        )

    def rank(entry):
        meta = entry[0]
        recency = meta.get("unixtime", 0)
        if not key:
            return (recency,)
        return (-meta[key] if min_key else meta[key], recency)

    return max(found, key=rank)[1]


def write_meta(folder, content):
    """Write `CKPT.yaml`, with the list of the files beside it.

    Arguments
    ---------
    folder : pathlib.Path
        The checkpoint; all its other files must be there.
    content : dict
        Plain types.
    """
    import yaml

    files = sorted(
        p.name for p in Path(folder).iterdir() if p.suffix == ".ckpt"
    )
    content = dict(content)
    content[META_KEY] = {**content.get(META_KEY, {}), "files": files}
    with atomic_write(Path(folder) / META_FILE, "w") as stream:
        stream.write("# yamllint disable\n")
        yaml.safe_dump(content, stream, sort_keys=True)


def plain(value, label):
    """Return a value in types that `CKPT.yaml` can hold and give back.

    SpeechBrain writes whatever it is given; a tuple, tensor or NumPy number
    saves well and then breaks every later look at the folder.

    Arguments
    ---------
    value : object
        Numbers (also tensors and NumPy scalars of one element), texts,
        lists, tuples, dicts.
    label : str
        Where it stands, for the error.

    Returns
    -------
    object
        Plain Python.

    Raises
    ------
    ValueError
        For anything else; it names the entry.

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
    if isinstance(value, (str, Path)):
        return str(value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise ValueError(
        f"{label}: a {type(value).__name__} cannot stand in {META_FILE}; "
        "expected numbers, texts, lists or dicts of them"
    )


def _plan(states, source, policy):
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
            raise ValueError(
                "policy: there is nothing to take along; give like="
            )
        return {}
    there = sorted(file.stem for file in source.glob("*.ckpt"))
    for pattern in policy:
        require_match(there, pattern, "recoverable")
    table = {**policy, **DEFAULT_POLICY}
    # Those given come first also where they repeat a default's pattern.
    return {
        name: first_match(name, policy) or first_match(name, table)
        for name in there
        if name not in states
    }


def _check_fits(name, state, source):
    if not (source / f"{name}.ckpt").exists():
        raise FileNotFoundError(
            f"{source}: holds no {name}.ckpt for the edited recoverable "
            f"{name!r}; it holds "
            f"{', '.join(sorted(p.stem for p in source.glob('*.ckpt')))}"
        )
    base = open_state(source, recoverable=name)
    differ = sorted(set(state) ^ set(base))
    differ += [
        key
        for key in state
        if key in base and state.info(key) != base.info(key)
    ]
    if differ:
        raise ValueError(
            f"{name!r}: {len(differ)} weights differ in name, shape or dtype "
            f"from those in {source} ({', '.join(differ[:5])}); the edited "
            "state must be one of the same model"
        )


def _pool(file, source, parents, folder):
    import torch

    statistics = []
    for parent in [source, *parents]:
        if not (parent / file).exists():
            raise FileNotFoundError(
                f"{parent / file}: to be pooled, is missing"
            )
        content = load_torch_file(parent / file)
        if not isinstance(content, dict) or "glob_mean" not in content:
            raise ValueError(
                f"{parent / file}: is no input normaliser's; only those can "
                "be pooled (copy or drop it)"
            )
        statistics.append(content)
    with atomic_write(folder / file) as stream:
        torch.save(pool_normalizers(statistics), stream)
