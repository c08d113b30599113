"""Files out of Debian packages, without installing or root.

Some corpora come as packages that anyone can fetch by name (`apt-get
download NAME`). A package is an ar archive that holds two tar archives.
"""

import contextlib
import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

from speechbrain_taskarith.data.preparation import check_disk
from speechbrain_taskarith.utils.files import temporary_path


def package_fields(path):
    """Return what a package says of itself: `{"Package": ..., ...}`.

    A damaged package is a ValueError that names it.
    """
    with _tar(path, "control") as tar:
        for member in tar:
            if os.path.normpath(member.name) == "control":
                text = tar.extractfile(member).read().decode("utf-8")
                return dict(re.findall(r"^(\S+): *(.*)$", text, re.M))
        raise tarfile.ReadError("no control in it")


def find_packages(folder, names):
    """Return `{name: path}` of packages in a folder, or of a package itself.

    A missing one is a FileNotFoundError that says how to get it; one that is
    there twice is a ValueError.
    """
    found = {}
    folder = Path(folder)
    for path in [folder] if folder.is_file() else sorted(folder.glob("*.deb")):
        if not path.name.startswith(tuple(names)):
            continue
        name = package_fields(path)["Package"]
        if name in found:
            raise ValueError(
                f"{found[name]} and {path} are both {name}. Keep one of them"
            )
        found[name] = path
    missing = [name for name in names if name not in found]
    if missing:
        raise missing_packages(folder, missing)
    return {name: found[name] for name in names}


def missing_packages(place, names):
    """Return the error that says how to get packages."""
    return FileNotFoundError(
        f"{place}: no package {', '.join(names)}. On Debian or Ubuntu, in a "
        f"folder of your own: apt-get download {' '.join(names)}"
    )


@contextlib.contextmanager
def unpacked_packages(paths, pattern, folder):
    """Yield a temporary folder, inside another, with files of packages.

    For `pattern` see `unpack_files`.
    """
    paths = list(paths)
    check_disk(folder, sum(Path(path).stat().st_size for path in paths))
    inside = temporary_path(Path(folder) / "unpacked")
    try:
        for path in paths:
            unpack_files(path, pattern, inside)
        yield inside
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def unpack_files(path, pattern, folder):
    """Write a package's files to a folder; return how many.

    Arguments
    ---------
    path : str or pathlib.Path
        The `.deb`.
    pattern : str
        Regular expression for whole names in the package, without a leading
        `./`. Its first group is the name inside the folder.
    folder : str or pathlib.Path
        Where to. Files keep their times.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        The package is damaged, or compressed in a way that needs
        `dpkg-deb`, which is not there.
    """
    count = 0
    with _tar(path, "data") as tar:
        for member in tar:
            name = re.fullmatch(pattern, member.name.removeprefix("./"))
            if not name or not member.isfile():
                continue
            if ".." in Path(name[1]).parts or os.path.isabs(name[1]):
                raise tarfile.ReadError(f"{member.name} leads out of it")
            target = Path(folder) / name[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(member).read())
            os.utime(target, (member.mtime, member.mtime))
            count += 1
    return count


@contextlib.contextmanager
def _tar(path, name):
    """Open `control.tar.*` or `data.tar.*` of a package."""
    path = Path(path)
    try:
        with tarfile.open(fileobj=io.BytesIO(_member(path, name))) as tar:
            yield tar
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path}: damaged or cut short ({error or type(error).__name__}). "
            f"Fetch it again: apt-get download {path.name.split('_')[0]}"
        ) from error


def _member(path, name):
    """Return the bytes of a tar in a package."""
    with open(path, "rb") as stream:
        if stream.read(8) != b"!<arch>\n":
            raise tarfile.ReadError("no Debian package")
        while header := stream.read(60):
            if header[58:] != b"`\n" or not header[48:58].strip().isdigit():
                raise tarfile.ReadError("no entry where one was expected")
            member = header[:16].decode("ascii", "replace").strip().rstrip("/")
            size = int(header[48:58])
            if not member.startswith(f"{name}.tar"):
                stream.seek(size + size % 2, os.SEEK_CUR)
                continue
            content = stream.read(size)
            if len(content) < size:
                raise tarfile.ReadError(f"{member} ends early")
            if member.endswith(".zst"):
                content = _without_zstd(path, member, name)
            return content
    raise tarfile.ReadError(f"no {name}.tar in it")


def _without_zstd(path, member, name):
    """Return a tar that Python itself cannot read before 3.14."""
    if not shutil.which("dpkg-deb"):
        raise ValueError(
            f"{path}: {member} needs dpkg-deb, which is not here. Unpack the "
            "package where it is (dpkg-deb -x PACKAGE.deb FOLDER), or take "
            "that of Debian, which needs none"
        )
    what = {"data": "--fsys-tarfile", "control": "--ctrl-tarfile"}[name]
    run = subprocess.run(
        ["dpkg-deb", what, str(path)], capture_output=True, check=False
    )
    if run.returncode:
        raise tarfile.ReadError(run.stderr.decode(errors="replace").strip())
    return run.stdout
