"""Writing so that a reader never sees half a file.

Everything the plugin leaves on disk goes through this file: a temporary name
in the same folder, flush, fsync, rename. After a crash there is either the
old content or the new one under the final name.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

# Every temporary name starts like this, so that a later run can tell a
# left-over from a result, and so that SpeechBrain's `CKPT+*` search and the
# suffix-based readers never pick one up.
TEMPORARY_PREFIX = ".partial-"


def fsync_directory(folder):
    """Make a rename inside `folder` survive a power cut.

    Arguments
    ---------
    folder : str or pathlib.Path
        Folder whose directory entry is to be flushed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file that gets its final name only when all went well.

    Arguments
    ---------
    path : str or pathlib.Path
        The final name; missing parent folders are made.
    mode : str
        `"wb"` or `"w"` (UTF-8, newlines as written); `"w+b"` to read back.

    Yields
    ------
    file object
        What is written to it appears under `path` at the end of the block,
        or not at all when the block raises.

    Raises
    ------
    OSError
        Named after the final path (a full disk, missing permission); what
        stood under `path` before is still there.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> with atomic_write(str(folder / "note.txt"), "w") as out:
    ...     _ = out.write("done")
    >>> open(str(folder / "note.txt")).read()
    'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    descriptor, temporary = tempfile.mkstemp(
        prefix=TEMPORARY_PREFIX, suffix=path.suffix, dir=path.parent
    )
    try:
        # mkstemp makes private files; results are to be shared as any other.
        os.fchmod(descriptor, 0o666 & ~current_umask())
        with os.fdopen(descriptor, mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        if error.filename is None or str(error.filename) == temporary:
            raise OSError(
                error.errno,
                f"could not write ({error.strerror}); nothing under this "
                "name was changed",
                str(path),
            ) from error
        raise
    except BaseException:
        _remove(temporary)
        raise
    fsync_directory(path.parent)


@contextlib.contextmanager
def atomic_folder(path):
    """Fill a folder that gets its final name only when it is whole.

    Arguments
    ---------
    path : str or pathlib.Path
        The final name. A folder that stands there already is replaced, at
        the end, by the new one.

    Yields
    ------
    pathlib.Path
        The temporary folder to fill.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> with atomic_folder(str(folder / "corpus")) as inside:
    ...     _ = (inside / "a.txt").write_text("a")
    >>> sorted(p.name for p in Path(str(folder / "corpus")).iterdir())
    ['a.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
    try:
        os.chmod(temporary, 0o777 & ~current_umask())
        yield temporary
        for inside in temporary.rglob("*"):
            if inside.is_file():
                with open(inside, "rb") as stream:
                    os.fsync(stream.fileno())
        replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(folder, path):
    """Give a complete folder its final name, in place of what stands there.

    On Linux the two folders are exchanged in one step. Elsewhere the old one
    steps aside as `<name>.replaced`, since no single rename replaces a filled
    folder: killed in between, it is still there under that name.

    Arguments
    ---------
    folder : str or pathlib.Path
        Complete, with a temporary name, in the same parent.
    path : str or pathlib.Path
        The final name.
    """
    folder, path = Path(folder), Path(path)
    fsync_directory(folder)
    if path.is_dir() and _exchange(folder, path):
        aside = folder
    else:
        aside = path.with_name(f"{path.name}.replaced")
        if path.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
        os.replace(folder, path)
    fsync_directory(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


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
    """Write plain Python content as JSON, atomically.

    Arguments
    ---------
    path : str or pathlib.Path
        The final name.
    content : dict or list
        Plain types only; NaN and infinity are refused, since other readers
        of JSON stumble over them.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_write(path, "w") as stream:
        stream.write(text + "\n")


def read_json(path):
    """Read a JSON file; an unreadable one is an error that names it.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.

    Returns
    -------
    dict or list
        Its content.

    Raises
    ------
    ValueError
        The file holds no JSON (truncated, altered, or something else).
    """
    with open(path, encoding="utf-8") as stream:
        text = stream.read()
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, found something else ({error}). "
            "The file is damaged or no file of ours; restore it or delete "
            "it and make it again."
        ) from None


def sha256_of(path, block=1 << 22):
    """Return the SHA-256 of a file as hexadecimal text.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.
    block : int
        Bytes read at a time.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while data := stream.read(block):
            digest.update(data)
    return digest.hexdigest()


def remove_leftovers(folder):
    """Take away temporary files that a killed process left in a folder.

    Arguments
    ---------
    folder : str or pathlib.Path
        Folder that only the caller writes to.

    Returns
    -------
    list of str
        The names removed.
    """
    removed = []
    for path in Path(folder).glob(TEMPORARY_PREFIX + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            _remove(path)
        removed.append(path.name)
    return sorted(removed)


def current_umask():
    """Return the process's umask (there is no call that only reads it).

    Returns
    -------
    int
        Permissions that new files do not get.

    Example
    -------
    >>> 0 <= current_umask() <= 0o777
    True
    """
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
