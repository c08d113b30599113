"""One process at a time edits a folder."""

import errno
import fcntl
import os
from pathlib import Path

LOCK_NAME = ".lock"

# Locks of this process: POSIX locks do not keep a process from itself.
_own_locks = set()

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
