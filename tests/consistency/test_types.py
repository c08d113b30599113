"""A type checker sees the public names, and finds a misspelt argument.

mypy reads the stubs beside each `__init__` and follows them to the code, as
an editor does. Heavy packages are skipped: what is checked is our own.
"""

import os
import re
import subprocess
import sys

import pytest
from house import PACKAGE, ROOMS, ROOT, files, pages_before

pytest.importorskip("mypy")

CONFIGURATION = """\
[mypy]
ignore_missing_imports = True
disable_error_code = import-untyped
[mypy-speechbrain_taskarith.*]
follow_imports = silent
[mypy-torch.*,torchaudio.*,speechbrain.*,transformers.*,numpy.*,pandas.*]
follow_imports = skip
"""
PYTHON_BLOCK = re.compile(
    r"(<!-- not run: [^>]+ -->\n+)?^```python\n(.*?)^```", re.M | re.S
)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Return a function that runs mypy on `{file name: code}`."""
    folder = tmp_path_factory.mktemp("mypy")
    (folder / "mypy.ini").write_text(CONFIGURATION)

    def run(sources):
        for name, code in sources.items():
            (folder / name).write_text(code)
        ran = subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file", "mypy.ini"]
            + sorted(sources),
            cwd=folder,
            env={**os.environ, "MYPYPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode in (0, 1), ran.stdout + ran.stderr
        return ran.stdout

    return run


def test_a_misspelt_argument_is_an_error(check):
    found = check(
        {
            "misspelt.py": "from speechbrain_taskarith.vectors import TIES\n"
            "TIES(densty=0.3)\n"
        }
    )
    assert 'Unexpected keyword argument "densty"' in found
    assert 'did you mean "density"' in found


def test_public_names_are_known_to_a_type_checker(check):
    lines = []
    for room in ROOMS:
        stub = (PACKAGE / room / "__init__.pyi").read_text("utf-8")
        names = re.findall(r"as (\w+),?$", stub, re.M)
        assert names, room
        lines.append(f"import speechbrain_taskarith.{room} as {room}")
        lines += [f"reveal_type({room}.{name})" for name in names]
    revealed = check({"names.py": "\n".join(lines) + "\n"})
    unknown = re.findall(r"names.py:(\d+): note: .* \"Any\"", revealed)
    unknown = {lines[int(number) - 1] for number in unknown}
    # torch is skipped here, and so is what its decorators return.
    unknown -= {"reveal_type(translation.greedy_translation)"}
    assert not unknown
    assert "error:" not in revealed, revealed


def test_what_public_functions_return_is_known(check):
    found = check(
        {
            "results.py": "from speechbrain_taskarith.vectors import *\n"
            "from speechbrain_taskarith.adapters import insert_adapters\n"
            "tau = TaskVector.between('a', 'b')\n"
            "(0.5 * tau).scaled('a')\n"
            "reveal_type(open_state('a'))\n"
            "reveal_type(insert_adapters(None, ['us']))\n"
        }
    )
    assert '"TaskVector" has no attribute "scaled"' in found
    assert "state.State" in found and "handle.AdapterHandle" in found


def test_the_documentation_is_well_typed(check):
    pages = [ROOT / "README.md", *files(".md", under=ROOT / "docs")]
    sources = {}
    for page in pages:
        found = [
            block
            for part in (*pages_before(page), page)
            for block in PYTHON_BLOCK.findall(part.read_text("utf-8"))
        ]
        code = "\n".join(text for mark, text in found if not mark)
        if code:
            sources[f"{page.stem.replace('-', '_')}_page.py"] = code
    assert len(sources) > 3
    assert "error:" not in (found := check(sources)), found


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
    stubs = {path.parent for path in files(".pyi", under=PACKAGE)}
    assert {PACKAGE / room for room in ROOMS} <= stubs
