"""The documentation runs: its Python, its commands, its YAML, its links.

In a page, all blocks run in order in one empty folder, after those of the page
that it goes on from (`<!-- after: page.md -->`). A YAML block that
starts with the comment `# <name>.yaml` is saved under that name, for the
commands below it. A block after `<!-- not run: why -->` is only looked at.
"""

import configparser
import importlib
import importlib.util
import inspect
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml
from house import PACKAGE, ROOT, files, pages_before, shown
from PIL import Image, ImageChops

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.fragments import fragment_path

PAGES = [ROOT / "README.md", *files(".md", under=ROOT / "docs")]
ALL_PAGES = files(".md")
BLOCK = re.compile(
    r"(?P<mark><!-- not run: [^>]+ -->\n+)?^```(?P<kind>\w+)\n(?P<text>.*?)^```",
    re.M | re.S,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
API = re.compile(r"^```\{api\} (\S+)\n(.*?)^```$", re.M | re.S)
TREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.M | re.S)


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


@pytest.mark.parametrize("path", PAGES, ids=shown)
def test_page_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for page in (*pages_before(path), path):
        for kind, text, runs, line in blocks(page):
            if kind == "yaml":
                save_named(text)
            if runs or kind == "yaml":
                run_block(kind, text, page, line, names, capsys)


def save_named(text):
    """Save a YAML block that starts with its file's name."""
    if found := re.match(r"# ([\w/]+\.yaml)\n", text):
        target = Path(found[1])
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)


def run_block(kind, text, page, line, names, capsys):
    """Run a block of a page among the names of those before it."""
    label = f"{shown(page)}:{line}"
    if kind == "yaml":
        check_yaml(text, label)
    elif kind == "python":
        code = compile("\n" * (line - 1) + text, str(page), "exec")
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
        assert kind in ("text", "console", "json", "math"), f"{label}: {kind}"


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
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target, anchor in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        # A badge: GitHub's page of a workflow, from the README's folder.
        target = target.removesuffix("/badge.svg")
        target = target.replace("../../actions", ".github")
        there = path.parent / target if target else path
        assert there.exists(), f"{shown(path)}: nothing at {target}"
        if anchor:
            assert anchor in anchors(there), f"{shown(path)}: no #{anchor}"


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and MyST name them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


def test_every_public_name_is_on_a_page():
    listed = [
        f"{module}.{name}"
        for page in files(".md", under=ROOT / "docs" / "api")
        for module, names in API.findall(page.read_text(encoding="utf-8"))
        for name in names.split()
    ]
    assert len(listed) == len(set(listed)), "a name stands on two pages"
    public = {
        ".".join((*stub.parent.relative_to(ROOT).parts, name))
        for stub in files(".pyi", under=PACKAGE)
        for name in re.findall(r" as (\w+)", stub.read_text(encoding="utf-8"))
    }
    assert set(listed) <= public
    # What two rooms export stands on the page of one of them.
    shown_once = {id(resolve(name)) for name in listed}
    left = {n for n in public - set(listed) if id(resolve(n)) not in shown_once}
    assert not left, f"on no page of docs/api: {sorted(left)}"
    assert len(shown_once) == len(listed), "one object under two names"


def resolve(name):
    """Return an object by its full name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_page_is_on_the_map():
    index = ROOT / "docs" / "index.md"
    trees = TREE.findall(index.read_text(encoding="utf-8"))
    there = {index}
    for line in "".join(trees).splitlines():
        name = re.sub(r".* <(.*)>$", r"\1", line)
        there.add((index.parent / f"{name}.md").resolve())
    for page in ALL_PAGES:
        if page.parts[len(ROOT.parts)] in ("docs", "recipes", "benchmarks"):
            assert page in there, f"{shown(page)}: not in docs/index.md"


def test_every_extra_is_on_the_install_page():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(listed) == sorted(setup["options.extras_require"])


@pytest.fixture(scope="module")
def results():
    """Return docs/results.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "results", ROOT / "docs" / "results.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_results_are_those_of_the_summaries(
    results, tmp_path, monkeypatch
):
    for path, text in results.pages().items():
        kept = path.read_text(encoding="utf-8")
        assert text == kept, f"{path.name}: run python docs/results.py"
    # One figure changed by hand.
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    changed = re.sub(r"(baseline \| )\d", r"\g<1>9", page, count=1)
    assert changed != page
    assert results.written(changed, results.read_shown()) == page
    # A place less than there are studies.
    for path in results.pages():
        text = path.read_text(encoding="utf-8")
        text = text.replace("figures: whisper_merging", "figure: no")
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    (tmp_path / "results.yaml").write_bytes(
        (ROOT / "docs" / "results.yaml").read_bytes()
    )
    monkeypatch.setattr(results, "DOCS", tmp_path)
    with pytest.raises(ValueError, match="places for"):
        results.pages()


def test_the_pictures_of_results_are_those_of_the_summaries(results, tmp_path):
    drawn = [
        results.DRAW[kind](name, entry[kind], tmp_path)
        for name, entry in results.read_shown().items()
        for kind in entry.keys() & results.DRAW.keys()
    ]
    assert drawn
    for path in drawn:
        name = path.name
        kept = ROOT / "docs" / "figures" / name
        assert kept.is_file(), f"no {name}: run python docs/results.py"
        with Image.open(path) as new, Image.open(kept) as old:
            # Another version of matplotlib may place type otherwise.
            if new.info["Software"] == old.info["Software"]:
                pair = new.convert("RGB"), old.convert("RGB")
                difference = ImageChops.difference(*pair).getbbox()
                assert difference is None, f"{name}: run python docs/results.py"


def test_the_readme_is_read_in_five_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 900


def test_the_readme_has_the_figures_of_the_results():
    """And not others that were once true."""
    spread = re.compile(r"\d+\.\d ± \d+\.\d")
    pages = [
        *(ROOT / "docs").glob("results*.md"),
        *(ROOT / "recipes").glob("*/*/*/README.md"),
    ]
    page = "".join(path.read_text(encoding="utf-8") for path in pages)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert spread.search(text)
    assert set(spread.findall(text)) <= set(spread.findall(page))
    rows = [x for x in text.splitlines() if x.startswith("| [") and "**" in x]
    assert len(rows) == 5, "the strongest rival is in bold"
    for row in rows:
        assert "±" in row.split("|")[3] or "(gain " in row.split("|")[4]
        assert set(re.findall(r"\d+\.\d", row)) <= set(
            re.findall(r"\d+\.\d", page)
        )


def test_the_papers_can_be_cited():
    page = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    joined = " ".join(page.split())
    for paper in content["references"]:
        assert paper["url"].rpartition("/")[2] in page
        assert paper["title"] in joined
        names = [
            f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]
        ]
        assert " and ".join(names) in joined
    assert f"version = {{{content['version']}}}" in page


def test_what_a_page_does_not_run_is_run_by_a_test():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for reason in re.findall(r"<!-- not run: (.+?) -->", text):
            found = re.search(r"tests/\S+\.py", reason)
            assert found, f"{shown(path)}: no test is named: {reason}"
            test = ROOT / found[0]
            assert test.is_file(), f"{shown(path)}: {found[0]} is missing"
            # It reads the page, so that it runs what stands there.
            assert path.name in test.read_text(encoding="utf-8"), shown(test)


def test_guides_are_short():
    long = {}
    for page in (ROOT / "docs").glob("*.md"):
        count = len(FENCE.sub("", page.read_text(encoding="utf-8")).split())
        if count > 1200:
            long[page.name] = count
    assert not long, f"a guide is read in ten minutes, 1200 words: {long}"


def test_every_rule_is_in_the_table():
    from speechbrain_taskarith.vectors.rules.description import RULES

    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
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
