"""Uploading a folder to Hugging Face's hub."""

import glob
from fnmatch import fnmatch
from pathlib import Path

from speechbrain_taskarith.utils.hub.cards import FILE
from speechbrain_taskarith.utils.hub.download import (
    DESCRIPTIONS,
    bars_if_watched,
)
from speechbrain_taskarith.utils.optional import require

#: Files of weights: an upload that replaces a model takes older ones away.
WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.ckpt",
    "*.pt",
)
#: What of a folder is uploaded: nothing else that may lie beside it.
SHARED = (FILE, "CKPT.yaml", *DESCRIPTIONS, *WEIGHTS)
#: What only a training that goes on needs, though it looks like weights.
_OF_TRAINING = (
    "optimizer*",
    "*_optimizer*",
    "scheduler*",
    "*_scheduler*",
    "scaler*",
    "rng_state*",
    "training_args*",
    "dataloader-*",
)


def shared_files(folder):
    """Return the names of the files of a folder that are uploaded.

    Folders in it, such as checkpoints of its training, are not. An error says
    what an upload lacks.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / FILE).is_file():
        raise FileNotFoundError(
            f"{folder / FILE}: no such card; the hub shows nothing without "
            "one. Write it by ModelCard(...).save(folder)"
        )
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and _fits(path.name, SHARED)
        and not _fits(path.name, _OF_TRAINING)
    )
    if not any(_fits(name, WEIGHTS) for name in names):
        raise FileNotFoundError(
            f"{folder}: no weights to upload (none of {', '.join(WEIGHTS)})"
        )
    return names


def _fits(name, patterns):
    return any(fnmatch(name, pattern) for pattern in patterns)


def upload_folder(
    folder, name, *, private=None, token=None, overwrite=False, message=None
):
    """Make a repository on the hub and upload a folder as one commit.

    Arguments
    ---------
    folder : str or pathlib.Path
        Weights, their descriptions and `README.md`; other files stay here.
    name : str
        `owner/name`.
    private : bool or None
        Who may see it; None: as the owner has set it.
    token : str or None
        Of an account that may write; None: as `hf auth login` left it, or
        `HF_TOKEN`.
    overwrite : bool
        True: a repository that holds files already gets a commit that
        replaces its weights. One without files needs no leave.
    message : str or None
        Of the commit.

    Returns
    -------
    str
        Address of the repository.

    Raises
    ------
    FileExistsError
        The repository holds files, and `overwrite` is False.
    PermissionError
        The hub does not accept the token, or it may not write there.
    ConnectionError
        The hub cannot be reached, or the client is offline.
    OSError
        The hub's answer is another error.
    """
    folder, files = Path(folder), shared_files(folder)
    hub = require("huggingface_hub", "huggingface", "sharing on the hub")
    failed = require("huggingface_hub.errors", "huggingface", "sharing")
    api = hub.HfApi(token=token)
    try:
        address = _make(api, failed, name, private, overwrite)
        with bars_if_watched():
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in files],
                ignore_patterns=["*/*"],
                delete_patterns=list(WEIGHTS) if overwrite else None,
                commit_message=message or f"Upload {folder.name}",
            )
    except FileExistsError:
        raise
    # A refused connection is an error of the client's own library, the one
    # that the hub's errors are made from.
    except (*failed.HfHubHTTPError.__bases__, OSError, ValueError) as error:
        raise _explained(error, name, api.endpoint) from error
    return str(address)


def _make(api, failed, name, private, overwrite):
    """Make the repository; one that is there may be used if it is empty."""
    try:
        return api.create_repo(name, private=private, exist_ok=overwrite)
    except failed.HfHubHTTPError as error:
        if _status(error) != 409:
            raise
    held = sorted(set(api.list_repo_files(name)) - {".gitattributes"})
    if held:
        more = ", ..." if len(held) > 3 else ""
        raise FileExistsError(
            f"{name}: the hub has this repository already, with "
            f"{', '.join(held[:3])}{more}; overwrite=True replaces its "
            "weights by a further commit, or take another name"
        )
    return api.create_repo(name, private=private, exist_ok=True)


def _status(error):
    return getattr(getattr(error, "response", None), "status_code", None)


def _explained(error, name, endpoint):
    """Return the error with what to do about it."""
    status, reason = _status(error), str(error).strip().splitlines()
    reason = reason[0] if reason else type(error).__name__
    if status in (401, 403):
        return PermissionError(
            f"{name}: the hub does not let this account write ({status}); "
            "log in by `hf auth login`, or give a token that may write to "
            f"{name.partition('/')[0]!r}"
        )
    if status is None and not isinstance(error, ValueError):
        return ConnectionError(
            f"{name}: {endpoint} cannot be reached ({reason}); nothing was "
            "uploaded. Try again with a network and without HF_HUB_OFFLINE, "
            "or keep the folder and upload it later"
        )
    kind = ValueError if isinstance(error, ValueError) else OSError
    return kind(f"{name}: the hub refused the upload: {reason}")
