"""Writing so that a reader never sees half a file.

Everything the plugin leaves on disk goes through this file: a temporary name
in the same folder, flush, fsync, rename. After a crash there is either the
old content or the new one under the final name. A name that is a link stays
one: what it points to is replaced.
"""

import contextlib
import ctypes
import datetime
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path

# Every temporary name starts like this, so that a later run can tell a
# left-over from a result, and so that SpeechBrain's `CKPT+*` search and the
# suffix-based readers never pick one up.
TEMPORARY_PREFIX = ".partial-"

# Who wrote it: system, process, when that process started.
_OWNER = re.compile(
    re.escape(TEMPORARY_PREFIX) + r"([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\b"
)
# Whether a process of another system is alive cannot be asked.
_FOREIGN_AGE = 48 * 3600.0
_UNCHANGED = "nothing under this name was changed"
# What a write without a file name in its error is known by.
_WRITE_ERRORS = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS")
# Folders that this process has swept: once is enough.
_swept = set()


def destination(path):
    """Return where a write to a path goes: through links, to their target."""
    path = Path(path)
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, "is a link that leads to itself", str(path))
    return target


def temporary_path(path):
    """Return a temporary name beside a path; sweep what killed runs left.

    Missing parent folders are made.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, path) from error
    process = os.getpid()
    owner = f"{_system()}-{process}-{_own_start(process)}"
    name = f"{TEMPORARY_PREFIX}{owner}-{secrets.token_hex(4)}{path.suffix}"
    folder = os.path.abspath(path.parent)
    # A temporary folder of ours has no left-overs.
    if not path.parent.name.startswith(TEMPORARY_PREFIX):
        if (process, folder) not in _swept:
            _swept.add((process, folder))
            remove_leftovers(folder, shared=True)
    return path.with_name(name)


def temporary_file(path):
    """Make a temporary file beside `path`; return its descriptor and path."""
    temporary = temporary_path(path)
    # Not by tempfile, whose files are private; results obey the umask.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        return os.open(temporary, flags, 0o666), temporary
    except OSError as error:
        raise write_error(error, path) from error


def write_error(error, path):
    """Return an OSError that names the final path, not the temporary one."""
    reason = error.strerror or str(error)
    if _UNCHANGED not in reason.lower():
        reason = f"could not write ({reason}); {_UNCHANGED}"
    return OSError(error.errno, reason, str(path))


def _is_of(error, temporary):
    """Tell whether an OSError is about a temporary file or folder."""
    names = [error.filename, error.filename2]
    if names == [None, None]:
        return errno.errorcode.get(error.errno) in _WRITE_ERRORS
    return any(str(n).startswith(str(temporary)) for n in names if n)


def fsync_directory(folder):
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor, data, offset):
    """Write bytes at a place of an open file, all of them."""
    data = memoryview(data)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file that gets its final name only if the block succeeds.

    `mode` is `"wb"`, `"w"` (UTF-8, newlines as written) or `"w+b"` (to read
    back); missing parent folders are made. An OSError names the final path;
    what stood there before is unchanged.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> with atomic_write(str(folder / "note.txt"), "w") as out:
    ...     _ = out.write("done")
    >>> open(str(folder / "note.txt")).read()
    'done'
    """
    target = destination(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    descriptor, temporary = temporary_file(target)
    try:
        with os.fdopen(descriptor, mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and _is_of(error, temporary):
            raise write_error(error, path) from error
        raise
    fsync_directory(target.parent)


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a temporary folder that replaces `path` if the block succeeds.

    An OSError names `path`, also where a file inside could not be written.
    """
    target = destination(path)
    temporary = temporary_path(target)
    try:
        temporary.mkdir()
        yield temporary
        publish_folder(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and _is_of(error, temporary):
            raise write_error(error, path) from error
        raise


def publish_folder(folder, path):
    """Flush a complete folder and give it its final name, replacing `path`.

    `folder` stands in the same parent. On Linux the two are exchanged in one
    step. Elsewhere the old one steps aside as `<name>.replaced`, since no
    single rename replaces a filled folder: killed in between, it is still
    there under that name.
    """
    folder, path = Path(folder), Path(path)
    for inside in folder.rglob("*"):
        if inside.is_file():
            with open(inside, "rb") as stream:
                os.fsync(stream.fileno())
    fsync_directory(folder)
    if path.is_dir() and _exchange(folder, path):
        old = folder
    else:
        old = path.with_name(f"{path.name}.replaced")
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(folder, path)
    fsync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one, other):
    """Exchange two names in one step; False where the system cannot."""
    try:
        libc = ctypes.CDLL(None)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return not libc.renameat2(
            here, os.fsencode(one), here, os.fsencode(other), exchange
        )
    except (AttributeError, OSError, TypeError):
        return False


def write_json(path, content):
    """Write plain content as JSON, atomically.

    NaN and infinity are refused: other readers of JSON stumble over them.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_write(path, "w") as stream:
        stream.write(text + "\n")


def read_json(path):
    """Read a JSON file; an unreadable one is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected JSON, found something else ({error}). The file "
            "is damaged or was not written by this plugin; restore it, or "
            "delete it and make it again."
        ) from None


def now():
    """Return the time as our files state it: UTC, ISO 8601, to the second."""
    moment = datetime.datetime.now(datetime.timezone.utc)
    return moment.isoformat(timespec="seconds")


def sha256_of(path, block=1 << 22):
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while data := stream.read(block):
            digest.update(data)
    return digest.hexdigest()


def remove_leftovers(folder, shared=False):
    """Remove temporary files of killed processes; return their names.

    All of them: for a folder that nobody else writes to. `shared`: those
    whose process has ended; of another system (or without an owner in the
    name), those that nothing was written to for two days.
    """
    found = sorted(Path(folder).glob(TEMPORARY_PREFIX + "*"))
    found = [path for path in found if not (shared and _in_use(path))]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return [path.name for path in found]


def _in_use(temporary):
    """Tell whether the process that made a temporary file may still run."""
    owner = _OWNER.match(temporary.name)
    if owner is None or owner[1] != _system():
        inside = [temporary, *temporary.rglob("*")]
        with contextlib.suppress(OSError):
            newest = max(path.lstat().st_mtime for path in inside)
            return time.time() - newest < _FOREIGN_AGE
        return False
    process = int(owner[2])
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    # A number is given again; a zombie has ended.
    started = _started(process)
    return started is None or str(started) == owner[3] or owner[3] == "0"


def _started(process):
    """Return when a process began, in ticks; -1: it has ended; None: unknown."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        # The name, in brackets, may hold anything.
        state, *fields = text.rpartition(")")[2].split()
        return -1 if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _own_start(process):
    return _started(process) or 0


@functools.cache
def _system():
    """Return 8 digits for the space in which process numbers are unique."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        boot = "/proc/sys/kernel/random/boot_id"
        parts.append(Path(boot).read_text(encoding="utf-8"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
