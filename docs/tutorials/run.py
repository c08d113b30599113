#!/usr/bin/env python3
"""Run tutorials from top to bottom, and keep what they show.

All of them, as they stand:
> python docs/tutorials/run.py

One of them with other values in its first code cell; a relative path counts
from `--folder`, where the notebook runs:
> python docs/tutorials/run.py streaming_recogniser DATA=fsdd --folder .
"""

import argparse
import ast
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def parameter_cell(notebook):
    """Return the position of the cell that holds the parameters."""
    for number, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", ()):
            return number
    raise ValueError("no cell has the tag 'parameters'")


def parameter_names(source):
    """Return the names that the parameter cell assigns."""
    return {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def execute(path, values=None, folder="."):
    """Run a notebook in a folder; return it with its outputs.

    `values`, by name, stand in place of those in the parameter cell. A cell
    that fails raises nbclient's CellExecutionError.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    at = parameter_cell(notebook)
    names = parameter_names(notebook.cells[at].source)
    unknown = sorted(set(values or {}) - names)
    if unknown:
        raise ValueError(
            f"{path}: no parameter {', '.join(unknown)}; "
            f"there are {', '.join(sorted(names))}"
        )
    lines = [f"{name} = {value!r}" for name, value in (values or {}).items()]
    given = nbformat.v4.new_code_cell("\n".join(lines))
    notebook.cells.insert(at + 1, given)
    NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    notebook.cells.pop(at + 1)
    return clean(notebook)


def clean(notebook):
    """Leave out what differs from run to run, or from machine to machine."""
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = joined(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count
    return notebook


def joined(outputs):
    """Join pieces of one stream: where they are cut is chance."""
    found = []
    for output in outputs:
        last = found[-1] if found else {}
        if output.get("name", "") and output["name"] == last.get("name"):
            last["text"] += output["text"]
        else:
            found.append(output)
    return found


def value_of(text):
    """Read `NAME=value`; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=value")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main(arguments=None):
    """Read the command line."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", nargs="?", help="without .ipynb; default: all")
    parser.add_argument("values", nargs="*", type=value_of, help="NAME=value")
    parser.add_argument("--folder", help="where to run; default: an empty one")
    given = parser.parse_args(arguments)
    paths = sorted(HERE.glob("*.ipynb"))
    if given.name:
        paths = [path for path in paths if path.stem == given.name]
        if not paths:
            sys.exit(f"{given.name}: no such tutorial in {HERE}")
    for path in paths:
        with tempfile.TemporaryDirectory() as empty:
            folder = given.folder or empty
            notebook = execute(path, dict(given.values), folder)
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main()
