"""Writing so that a reader never sees half a file.

Everything the plugin leaves on disk goes through this file: a temporary name
in the same folder, flush, fsync, rename. After a crash there is either the
old content or the new one under the final name.
"""

import contextlib
import ctypes
import datetime
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

# Every temporary name starts like this, so that a later run can tell a
# left-over from a result, and so that SpeechBrain's `CKPT+*` search and the
# suffix-based readers never pick one up.
TEMPORARY_PREFIX = ".partial-"


def temporary_file(path):
    """Make a temporary file beside `path`; return its descriptor and path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{path.suffix}"
    temporary = path.with_name(name)
    # Not by tempfile, whose files are private; results obey the umask.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(temporary, flags, 0o666), temporary


def write_error(error, path):
    """Return an OSError that names the final path, not the temporary one."""
    reason = f"could not write ({error.strerror})"
    what = f"{reason}; nothing under this name was changed"
    return OSError(error.errno, what, str(path))


def fsync_directory(folder):
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    descriptor, temporary = temporary_file(path)
    try:
        with os.fdopen(descriptor, mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename in (None, str(temporary), temporary):
            raise write_error(error, path) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a temporary folder that replaces `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
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
    except ValueError as error:
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


def remove_leftovers(folder):
    """Remove temporary files of killed processes; return their names.

    Only for a folder that nobody else writes to.
    """
    found = sorted(Path(folder).glob(TEMPORARY_PREFIX + "*"))
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in found]
