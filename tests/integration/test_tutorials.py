"""The tutorials run from top to bottom, with tiny models and made speech.

What they claim is asserted in their own cells. Here is what a reader must not
meet: an error, a warning, a dead link, a path of one machine, a notebook that
shows nothing.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from tiny_whisper import save_tiny_whisper, tell_languages

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)#\s]+)")
HOME = re.compile(r"(?<![\w.~$}/])/(?:work|opt|root|home|tmp|mnt|Users)/\w")

# Parameters of a size that says nothing about speech, and takes seconds.
SMALL = {
    "adapters_on_a_frozen_encoder": {
        "WIDTH": 16,
        "LAYERS": 1,
        "BASE_STEPS": 4,
        "STEPS": 3,
        "TRAIN_TAKES": 20,
        "TEST_TAKES": 20,
    },
    "merge_and_edit_whisper": {
        "MODEL": "whisper-tiny",
        "TRAIN_LINES": 4,
        "VALID_LINES": 2,
        "TEST_LINES": 2,
        "STEPS": 1,
    },
    "speech_translation_with_length_reduction": {
        "MODEL": "whisper-tiny",
        "TRAIN_SENTENCES": 16,
        "TEST_SENTENCES": 2,
        "WIDTH": 16,
        "LAYERS": 1,
        "ASR_EPOCHS": 1,
        "EPOCHS": 2,
    },
    "streaming_recogniser": {
        "WIDTH": 16,
        "LAYERS": 1,
        "STEPS": 2,
        "LAST_STEPS": 1,
        "TEST_STRINGS": 2,
    },
}


@pytest.fixture(scope="module")
def run():
    """The tool beside the notebooks."""
    path = TUTORIALS / "run.py"
    module = importlib.util.spec_from_file_location("run_tutorials", path)
    loaded = importlib.util.module_from_spec(module)
    module.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def kernel():
    """What runs notebooks; skips where it is not installed."""
    for needed in ("nbclient", "ipykernel", "espeakng_loader", "transformers"):
        pytest.importorskip(
            needed, reason=f"NO {needed}: pip install '.[tutorials]'"
        )


def save_whisper_with_languages(folder):
    """Save a tiny Whisper whose `generate` takes a language."""
    save_tiny_whisper(folder, seconds=6)
    tell_languages(folder)


def outputs(notebook):
    """Yield the outputs of all cells, as plain dicts."""
    for cell in notebook["cells"]:
        yield from cell.get("outputs", ())


def text_of(output):
    """Return what an output says."""
    found = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "".join(found)


def test_every_tutorial_has_a_small_size():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorial_runs(path, run, kernel, tmp_path):
    if "MODEL" in SMALL[path.stem]:
        save_whisper_with_languages(tmp_path / SMALL[path.stem]["MODEL"])
    before = path.read_bytes()
    notebook = run.execute(path, SMALL[path.stem], tmp_path)
    assert path.read_bytes() == before
    errors = [
        text_of(o) for o in outputs(notebook) if o.get("name") == "stderr"
    ]
    assert not errors, "".join(errors)
    said = "".join(text_of(output) for output in outputs(notebook))
    assert str(tmp_path) not in said
    pictures = [
        o for o in outputs(notebook) if "image/png" in o.get("data", {})
    ]
    kept = json.loads(before)
    assert len(pictures) == sum(
        "image/png" in output.get("data", {}) for output in outputs(kept)
    ), "the kept outputs are of another version of the notebook"
    sources = [cell["source"] for cell in notebook.cells]
    assert sources == ["".join(cell["source"]) for cell in kept["cells"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs_are_whole(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    numbers = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            numbers.append(cell["execution_count"])
    assert numbers == list(range(1, len(numbers) + 1)), "not run to the end"
    for output in outputs(notebook):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", text_of(output)
        assert not HOME.search(text_of(output)), text_of(output)
    last = text_of(list(outputs(notebook))[-1])
    minutes = float(re.match(r"([\d.]+) minutes of processor time", last)[1])
    assert minutes <= 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for target in LINK.findall(text):
                if not re.match(r"[a-z]+:", target):
                    assert (TUTORIALS / target).exists(), target
            for target in re.findall(r"`(recipes/[\w/.]+)`", text):
                assert (TUTORIALS.parents[1] / target).exists(), target


def small_notebook(path, *cells):
    """Write a notebook of code cells; the first holds the parameters."""
    import nbformat

    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def test_values_stand_in_for_parameters_and_leave_no_trace(
    run, kernel, tmp_path
):
    path = tmp_path / "a.ipynb"
    small_notebook(path, "SIZE, NAME = 3, 'a'", "print(SIZE, NAME)")
    notebook = run.execute(path, {"SIZE": 5}, tmp_path)
    assert [cell.source for cell in notebook.cells][1] == "print(SIZE, NAME)"
    assert text_of(notebook.cells[1].outputs[0]) == "5 a\n"
    assert [cell.execution_count for cell in notebook.cells] == [1, 2]
    again = run.execute(path, {"SIZE": 5}, tmp_path)
    assert again == notebook, "two runs differ"


def test_a_parameter_that_is_none_and_a_cell_that_fails(run, kernel, tmp_path):
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "a.ipynb"
    small_notebook(path, "SIZE = 3", "assert SIZE < 4")
    with pytest.raises(ValueError, match=r"no parameter WIDTH; there are SIZE"):
        run.execute(path, {"WIDTH": 5}, tmp_path)
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run.execute(path, {"SIZE": 5}, tmp_path)


def test_pieces_of_one_stream_are_joined(run):
    def said(text, name="stdout"):
        return {"output_type": "stream", "name": name, "text": text}

    picture = {"output_type": "display_data", "data": {"image/png": ""}}
    pieces = [said("a"), said("b"), picture, picture, said("c"), said("d", "x")]
    expected = [said("ab"), picture, picture, said("c"), said("d", "x")]
    assert run.joined(pieces) == expected
    assert run.joined([]) == []


@pytest.mark.parametrize(
    "text, value",
    [
        ("SIZE=5", ("SIZE", 5)),
        ("DATA=None", ("DATA", None)),
        ("MODEL=openai/whisper-base", ("MODEL", "openai/whisper-base")),
        ("A={'a': 'b=c'}", ("A", {"a": "b=c"})),
    ],
)
def test_values_of_the_command_line(run, text, value):
    assert run.value_of(text) == value
