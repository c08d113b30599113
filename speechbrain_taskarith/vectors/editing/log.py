"""The log of a sequence of edits: what was applied, when, with what hash.

The log is one JSON file that is replaced whole, last, and atomically. What it
does not name never happened: a process killed between writing a vector and
replacing the log has lost nothing that was reported done.
"""

import errno
import fcntl
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from speechbrain_taskarith.utils.files import read_json, write_json

LOG_NAME = "edits.json"
LOCK_NAME = ".lock"
_FORMAT = "speechbrain_taskarith edit log"
_VERSION = 1

# Locks of this process: POSIX locks do not keep a process from itself.
_own_locks = set()


@dataclass(frozen=True)
class Edit:
    """One edit of a sequence, as the log stores it.

    Arguments
    ---------
    name : str
        What was learned, unique in the sequence.
    vector : str
        The stored vector's file, relative to the editor's folder.
    sha256, encoding : str
        Hash of that file, and how the vector is stored in it.
    scale : float or dict
        What the stored vector is multiplied by.
    rule : dict
        The rule that made the stored vector, in plain types.
    learned_on, state : str
        Fingerprints: of the state that the model was fine-tuned from, and of
        the state after this edit.
    exact : bool
        True where the vector was applied to the state it was learned on.
        False marks an approximation: an earlier edit was dropped or moved.
    when, note : str
        Time of learning, UTC, ISO 8601; and free text.
    selected_on : str or None
        What the scale was chosen on, where it was chosen.
    """

    name: str
    vector: str
    sha256: str
    encoding: str
    scale: float | dict
    rule: dict
    learned_on: str
    state: str
    exact: bool
    when: str
    selected_on: str | None = None
    note: str = ""

    def to_dict(self):
        """Return the fields as plain types, see `Edit`."""
        return asdict(self)


def slug(name):
    """Turn an edit's name into a short piece of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40] or "edit"


@dataclass
class EditLog:
    """The content of `edits.json`."""

    # {"file" | "path", "fingerprint", "from"} of the state that the sequence
    # starts from; `file` is relative to the folder, `path` lies outside it.
    base: dict
    # The editor's rule, scale (see `SequentialEditor`) and encoding, in plain
    # types, and the patterns of the parameters that are edited.
    rule: dict
    schedule: object
    encoding: str
    include: list
    exclude: list
    # `Edit`s in force, in order, and all that was done, undone edits too.
    edits: list
    history: list

    def write(self, folder):
        """Replace the log of a folder, atomically."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        write_json(Path(folder) / LOG_NAME, content)

    @classmethod
    def read(cls, folder):
        """Read and check the log of a folder; errors name the file."""
        path = Path(folder) / LOG_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: there is no edit log. Start one with "
                "SequentialEditor(base, rule, folder), or give its folder"
            )
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path}: is JSON, but not an edit log")
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{path}: written in version {content.get('version')} of the "
                f"format, this package reads version {_VERSION}; use the "
                "package that wrote it"
            )
        try:
            values = {f.name: content[f.name] for f in fields(cls)}
            values["edits"] = [Edit(**entry) for entry in values["edits"]]
            if "fingerprint" not in values["base"]:
                raise KeyError("base.fingerprint")
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: an entry is missing or unknown ({error}); the log "
                "was altered. Restore it from a copy of the folder"
            ) from None
        return cls(**values)


_REMEDY = (
    "Close it there (editor.close()), or open it for reading with "
    "SequentialEditor.resume(folder, read_only=True)"
)


class FolderLock:
    """One process at a time may edit a folder.

    A POSIX record lock: it ends with the process, however that ends, and
    data-loading workers forked from the process do not inherit it.
    """

    _descriptor = None

    def __init__(self, folder, remedy=_REMEDY):
        self._remedy = remedy
        self._path = (Path(folder) / LOCK_NAME).resolve()
        self._process = os.getpid()
        self._key = (self._process, str(self._path))
        if self._key in _own_locks:
            raise self._busy("another editor of this process")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise OSError(
                    error.errno,
                    f"this file system cannot lock files ({error.strerror});"
                    " edit on another one, e.g. a local disk",
                    str(self._path),
                ) from error
            owner = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            raise self._busy(f"process {owner or 'unknown'}") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{self._process}\n".encode(), 0)
        self._descriptor = descriptor
        _own_locks.add(self._key)

    def _busy(self, owner):
        return RuntimeError(
            f"{self._path.parent}: {owner} has this folder open for editing. "
            f"{self._remedy}"
        )

    def check(self):
        """Raise after `release`, and in a child (the lock is its parent's)."""
        if self._descriptor is None or os.getpid() != self._process:
            raise RuntimeError(
                f"{self._path.parent}: this editor was opened in process "
                f"{self._process} and is closed here; open the folder again "
                "with SequentialEditor.resume(folder)"
            )

    def release(self):
        """Let others edit. A second call does nothing."""
        if self._descriptor is not None and os.getpid() == self._process:
            _own_locks.discard(self._key)
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self):
        self.release()
