"""Files out of Debian packages: made by hand, by dpkg-deb, and damaged."""

import shutil
import subprocess

import pytest
from made_packages import make_deb

from speechbrain_taskarith.data.debian import (
    find_packages,
    package_fields,
    unpack_files,
    unpacked_packages,
)

FILES = {
    "./usr/share/game/a.txt": b"first",
    "./usr/share/game/deep/b.txt": b"second, longer",
    "./usr/share/doc/c.txt": b"not wanted",
}
PATTERN = r"usr/share/game/(.*\.txt)"
needs_dpkg = pytest.mark.skipif(
    not shutil.which("dpkg-deb"), reason="no dpkg-deb here"
)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def package(tmp_path):
    path = tmp_path / "game-data_1.0_all.deb"
    make_deb(path, FILES)
    return path


@pytest.mark.parametrize("mode", ["xz", "gz", "bz2"])
def test_wanted_files_come_out(tmp_path, mode):
    path = tmp_path / "game-data_1.0_all.deb"
    make_deb(path, FILES, version="1:2.0-3", mode=mode)
    assert package_fields(path)["Version"] == "1:2.0-3"
    assert unpack_files(path, PATTERN, tmp_path / "out") == 2
    assert content(tmp_path / "out") == {
        "a.txt": b"first",
        "deep/b.txt": b"second, longer",
    }
    assert (tmp_path / "out/a.txt").stat().st_mtime == 1000000000


@needs_dpkg
def test_made_package_is_what_dpkg_takes(package, tmp_path):
    command = ["dpkg-deb", "-x", package, tmp_path / "out"]
    subprocess.run(command, check=True)
    assert content(tmp_path / "out") == {n[2:]: c for n, c in FILES.items()}


def build(tmp_path, compression):
    """Have dpkg-deb make a package."""
    source = tmp_path / "source"
    for name, data in FILES.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    control = source / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text(
        "Package: game-data\nVersion: 1.0\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: made\n"
    )
    path = tmp_path / "game-data_1.0_all.deb"
    built = subprocess.run(
        ["dpkg-deb", f"-Z{compression}", "-b", source, path],
        capture_output=True,
        text=True,
    )
    if built.returncode:
        pytest.skip(f"dpkg-deb makes no {compression}: {built.stderr}")
    return path


@needs_dpkg
@pytest.mark.parametrize("compression", ["xz", "gzip", "none", "zstd"])
def test_package_of_dpkg(tmp_path, compression):
    path = build(tmp_path, compression)
    assert package_fields(path)["Package"] == "game-data"
    assert unpack_files(path, PATTERN, tmp_path / "out") == 2
    assert content(tmp_path / "out")["deep/b.txt"] == b"second, longer"


@needs_dpkg
def test_zstd_without_dpkg_is_refused(tmp_path, monkeypatch):
    path = build(tmp_path, "zstd")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"data\.tar\.zst needs dpkg-deb"):
        unpack_files(path, PATTERN, tmp_path / "out")


def test_every_cut_is_noticed(package, tmp_path):
    whole = package.read_bytes()
    for size in range(0, len(whole) - 1, 11):
        package.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match="game-data_1.0_all.deb: damaged .*apt-get down"
        ):
            unpack_files(package, PATTERN, tmp_path / "out")


def test_damage_inside_is_noticed(package, tmp_path):
    whole = package.read_bytes()
    at = whole.index(b"data.tar.xz") + 60 + 40
    package.write_bytes(whole[:at] + b"\0" * 30 + whole[at + 30 :])
    with pytest.raises(ValueError, match="damaged or cut short"):
        unpack_files(package, PATTERN, tmp_path / "out")


def test_something_else_is_no_package(tmp_path):
    path = tmp_path / "game-data_1.deb"
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="no Debian package"):
        package_fields(path)


@pytest.mark.parametrize("name", ["../../escaped.txt", "/escaped.txt"])
def test_nothing_is_written_elsewhere(tmp_path, name):
    path = tmp_path / "game-data_1.0_all.deb"
    make_deb(path, {f"./usr/share/game/{name}": b"x"})
    with pytest.raises(ValueError, match="leads out of it"):
        unpack_files(path, PATTERN, tmp_path / "a" / "b" / "out")
    assert not list(tmp_path.rglob("escaped*"))


def test_packages_are_found_by_what_they_say(package, tmp_path):
    make_deb(tmp_path / "other_1.deb", FILES)
    (tmp_path / "unrelated.deb").write_text("not looked at")
    names = ["game-data", "other"]
    found = find_packages(tmp_path, names)
    assert {k: v.name for k, v in found.items()} == {
        "game-data": package.name,
        "other": "other_1.deb",
    }
    with pytest.raises(FileNotFoundError, match="apt-get download absent$"):
        find_packages(tmp_path, [*names, "absent"])
    shutil.copy(package, tmp_path / "game-data_1.0_copy.deb")
    with pytest.raises(ValueError, match="are both game-data. Keep one"):
        find_packages(tmp_path, names)


def test_a_package_itself_may_be_given(package):
    assert find_packages(package, ["game-data"]) == {"game-data": package}
    with pytest.raises(FileNotFoundError, match="no package other"):
        find_packages(package, ["game-data", "other"])


def test_unpacked_files_are_temporary(package, tmp_path):
    with pytest.raises(KeyError, match="inside"):
        with unpacked_packages([package], PATTERN, tmp_path) as folder:
            assert folder.parent == tmp_path and len(content(folder)) == 2
            raise KeyError("inside")
    assert [p.name for p in tmp_path.iterdir()] == [package.name]
