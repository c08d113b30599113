"""The documentation runs: its Python, its commands, its YAML, its links.

In a page, all blocks run in order in one empty folder. A YAML block that
starts with the comment `# <name>.yaml` is saved under that name, for the
commands below it. A block after `<!-- not run: why -->` is only looked at.
"""

import importlib
import inspect
import re
import shlex
import textwrap

import pytest
import yaml
from house import ROOT, files, shown

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.fragments import fragment_path

PAGES = [ROOT / "README.md", *files(".md", under=ROOT / "docs")]
ALL_PAGES = files(".md")
BLOCK = re.compile(
    r"(?P<mark><!-- not run: [^>]+ -->\n+)?^```(?P<kind>\w+)\n(?P<text>.*?)^```",
    re.M | re.S,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[\w-]+)?\)")


def blocks(path):
    """Yield `(kind, text, whether it runs, line)` of a page's code blocks."""
    page = path.read_text(encoding="utf-8")
    for found in BLOCK.finditer(page):
        line = page.count("\n", 0, found.start("text"))
        yield found["kind"], found["text"], not found["mark"], line + 1


def commands(text):
    """Yield the `taskarith` command lines of a shell block, split."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        if line.startswith("taskarith "):
            yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize(
    "path", [page for page in PAGES if page.exists()], ids=shown
)
def test_page_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for kind, text, runs, line in blocks(path):
        label = f"{shown(path)}:{line}"
        if kind == "yaml":
            check_yaml(text, label)
            found = re.match(r"# ([\w/]+\.yaml)\n", text)
            if found:
                target = tmp_path / found[1]
                target.parent.mkdir(exist_ok=True)
                target.write_text(text)
        elif not runs:
            continue
        elif kind == "python":
            code = compile("\n" * (line - 1) + text, str(path), "exec")
            exec(code, names)  # the documentation is ours
        elif kind in ("bash", "sh", "shell"):
            for words in commands(text):
                status = main(words)
                assert status == 0, f"{label}: {words}: {capsys.readouterr()}"
        elif kind == "diff":
            for hunk in text.split("\n@@\n")[1:]:
                new = [x[1:] for x in hunk.splitlines() if x[:1] in ("+", " ")]
                check_yaml(textwrap.dedent("\n".join(new)), label)
        else:
            assert kind in ("text", "console", "json"), f"{label}: {kind}"


def check_yaml(text, label):
    """Assert that tags name what there is, with arguments that it takes."""
    for tag, node in tagged(yaml.compose(text, yaml.BaseLoader)):
        name = tag.partition(":")[2]
        if not name.startswith("speechbrain_taskarith"):
            continue
        module, _, attribute = name.rpartition(".")
        target = getattr(importlib.import_module(module), attribute)
        parameters = inspect.signature(target).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if isinstance(node, yaml.MappingNode):
            given = {key.value for key, _ in node.value}
            known = set(parameters)
            if name == "speechbrain_taskarith.fragment":
                free, known = False, known | fragment_keys(node)
            unknown = given - known
            assert free or not unknown, f"{label}: {name} takes no {unknown}"
            needed = {
                p.name
                for p in parameters.values()
                if p.default is p.empty
                and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            }
            assert needed <= given or "!name" in tag, (
                f"{label}: {name} needs {needed - given}"
            )


def fragment_keys(node):
    """Return the keys of the fragment that a YAML node names."""
    named = {key.value: value.value for key, value in node.value}["name"]
    text = fragment_path(named).read_text(encoding="utf-8")
    return {key.value for key, _ in yaml.compose(text, yaml.BaseLoader).value}


def tagged(node):
    """Yield every `!new:`/`!name:`/`!apply:` tag with its node."""
    if node is None:
        return
    if re.match(r"!(new|name|apply):", node.tag):
        yield node.tag, node
    if isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            yield from tagged(inner)
    elif isinstance(node, yaml.MappingNode):
        for _, inner in node.value:
            yield from tagged(inner)


@pytest.mark.parametrize("path", ALL_PAGES, ids=shown)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.S)):
        if not re.match(r"[a-z]+:", target):
            there = (path.parent / target).exists()
            assert there, f"{shown(path)}: nothing at {target}"


def test_every_capability_has_its_pages():
    for name in ("task_vectors.md", "results.md"):
        assert (ROOT / "docs" / name).is_file()


def test_every_rule_is_in_the_table():
    from speechbrain_taskarith.vectors.rules.description import RULES

    page = (ROOT / "docs" / "task_vectors.md").read_text(encoding="utf-8")
    missing = [n for n in RULES if f"| `{n}" not in page]
    assert not missing, missing


def test_every_encoding_is_in_the_table():
    from speechbrain_taskarith.vectors.encodings import ENCODINGS

    page = (ROOT / "docs" / "task_vectors.md").read_text(encoding="utf-8")
    missing = [name for name in ENCODINGS if f"| `{name}`" not in page]
    assert not missing, missing


def test_every_verb_is_documented():
    from speechbrain_taskarith.commands import VERBS

    pages = "\n".join(
        page.read_text(encoding="utf-8")
        for page in (ROOT / "docs").glob("*.md")
    )
    assert [v for v in VERBS if f"taskarith {v}" not in pages] == []


def test_the_reader_of_blocks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n<!-- not run: slow -->\n```bash\nb\n```\n"
    )
    assert [block[:3] for block in blocks(page)] == [
        ("python", "a = 1\n", True),
        ("bash", "b\n", False),
    ]
    text = "$ taskarith merge \\\n    x.yaml  # so\nls\n"
    assert list(commands(text)) == [["merge", "x.yaml"]]
    with pytest.raises(AssertionError, match="takes no"):
        bad = "r: !new:speechbrain_taskarith.vectors.TIES {dense: 1}"
        check_yaml(bad, "here")
    with pytest.raises(AssertionError, match="takes no .*poling"):
        where = "name: models/looking_back, poling: mean"
        bad = f"r: !apply:speechbrain_taskarith.fragment {{{where}}}"
        check_yaml(bad, "here")
