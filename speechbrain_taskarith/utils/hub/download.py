"""Models of Hugging Face's hub: which texts name one, and where it lies."""

import contextlib
import re
from pathlib import Path

from speechbrain_taskarith.utils.optional import require
from speechbrain_taskarith.utils.progress import is_watched

# What describes a model, its features and its tokenizer, beside its weights.
DESCRIPTIONS = (
    "*config.json",
    "tokenizer.json",
    "vocab.*",
    "merges.txt",
    "normalizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.model",
    "*.spm",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
)
# A hub model's weights, the form that is taken first.
_WEIGHTS = (
    (
        "model.safetensors",
        "model-*.safetensors",
        "model.safetensors.index.json",
    ),
    (
        "pytorch_model.bin",
        "pytorch_model-*.bin",
        "pytorch_model.bin.index.json",
    ),
)
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_EXPECTED = (
    "expected a base or checkpoint: a CKPT+ folder or one that holds some, a "
    f"file of weights ({', '.join(_SUFFIXES)}), a Hugging Face folder, or a "
    "hub name such as openai/whisper-base"
)


HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_name(source):
    """Tell whether a text is `owner/name`, and no path that lacks its file.

    Where the folder `owner` stands here, it is a path: what is misspelt must
    not become somebody's model.

    Example
    -------
    >>> is_hub_name("openai/whisper-tiny.en"), is_hub_name("model.ckpt")
    (True, False)
    """
    path, text = Path(source), str(source)
    return (
        HUB_NAME.fullmatch(text) is not None
        and path.suffix not in _SUFFIXES
        and not path.parent.exists()
    )


def local_path(source, cache=None):
    """Return where weights lie; a hub name is looked up or downloaded.

    Arguments
    ---------
    source : str or pathlib.Path
        A file or folder; `owner/name` of a model on the hub, which the hub's
        own cache gives where it is there and unchanged, or where there is no
        network; or the `save_path` that a wrapper of SpeechBrain was
        downloaded to.
    cache : str, pathlib.Path or None
        Folder for downloads; None: Hugging Face's own cache.

    Returns
    -------
    pathlib.Path
        It exists.

    Raises
    ------
    FileNotFoundError
        Nothing stands there, and the hub has no such model or no network.
    """
    path = Path(source)
    if is_hub_name(source):
        return _download(str(source), cache)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; {_EXPECTED}")
    # As the hub's client, and so wrappers of SpeechBrain, leave it.
    if path.is_dir() and not any(path.glob("CKPT*")):
        cached = list(path.glob("models--*"))
        if len(cached) == 1 and not any(path.glob("*.json")):
            path = cached[0]
        if snapshots := sorted(path.glob("snapshots/*")):
            main = path / "refs" / "main"
            commit = main.read_text().strip() if main.exists() else ""
            chosen = path / "snapshots" / commit
            return chosen if commit and chosen.exists() else snapshots[-1]
    return path


def shared_folder(source, files, cache=None, revision=None, local_dir=None):
    """Return the folder of something shared: one that is here, or the hub's.

    Only what is named by `files` is downloaded.

    Arguments
    ---------
    source : str or pathlib.Path
        A folder, or `owner/name` on the hub.
    files : sequence of str
        Shell patterns of file names.
    cache : str, pathlib.Path or None
        See `local_path`.
    revision : str or None
        A branch, tag or commit of the hub; None: its `main`.
    local_dir : str, pathlib.Path or None
        Where the files are put in place of the cache.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    FileNotFoundError
        No such folder, and nothing that hub or cache gives.
    """
    if Path(source).is_dir():
        return Path(source)
    reason = "a name on the hub is owner/name"
    if is_hub_name(source):
        folder, reason = _snapshot(source, files, cache, revision, local_dir)
        if folder is not None:
            return folder
    raise FileNotFoundError(
        f"{source}: no such folder, and nothing that Hugging Face's hub or "
        f"cache gives ({reason}); without network, download it elsewhere (hf "
        f"download {source} --local-dir FOLDER) and give the folder"
    )


@contextlib.contextmanager
def bars_if_watched():
    """Let the hub's client show its bars only where ours are shown."""
    bars = require("huggingface_hub.utils", "huggingface", "the hub")
    if is_watched() or bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()


def _snapshot(name, files, cache=None, revision=None, local_dir=None):
    """Return a hub repository's folder, or None and why there is none."""
    hub = require("huggingface_hub", "huggingface", f"the hub name {name}")
    try:
        with bars_if_watched():
            folder = hub.snapshot_download(
                str(name),
                cache_dir=cache,
                local_dir=local_dir,
                revision=revision,
                allow_patterns=list(files),
            )
    # Offline, unknown, private, no network: each has its own class.
    except (OSError, ValueError) as error:
        return None, str(error).strip().splitlines()[0]
    return Path(folder), ""


def _download(name, cache):
    """Return a hub model's folder with its weights and descriptions."""
    reason = "it holds neither model.safetensors nor pytorch_model.bin"
    for weights in _WEIGHTS:
        folder, why = _snapshot(name, [*DESCRIPTIONS, *weights], cache)
        if folder is None:
            reason = why
        elif any(any(folder.glob(pattern)) for pattern in weights):
            return folder
    raise FileNotFoundError(
        f"{name}: no such file or folder, and no model that Hugging Face's "
        f"hub or cache gives ({reason}). Without network, copy the folder "
        f"from a machine with it (hf download {name} --local-dir FOLDER) and "
        f"give its path; {_EXPECTED}"
    )
