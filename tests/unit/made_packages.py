"""Debian packages made by hand: an ar archive of two tar archives."""

import io
import tarfile


def ar_entry(name, content):
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
    return head.encode() + content + b"\n" * (len(content) % 2)


def tar_of(files, mode):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{mode}") as tar:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(content), 1000000000
            tar.addfile(about, io.BytesIO(content))
    return stream.getvalue()


def make_deb(path, files, version="1.0.1-1.1", mode="xz"):
    name = path.name.split("_")[0]
    control = f"Package: {name}\nVersion: {version}\n".encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(
        b"!<arch>\n"
        + ar_entry("debian-binary", b"2.0\n")
        + ar_entry(f"control.tar.{mode}", tar_of({"./control": control}, mode))
        + ar_entry(f"data.tar.{mode}", tar_of(files, mode))
    )
