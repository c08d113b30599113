"""`taskarith inspect`: what a file or folder holds."""

import json
from pathlib import Path

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.console import Result, counted, size, table
from speechbrain_taskarith.commands.output import checkpoint_of, numbers
from speechbrain_taskarith.utils.patterns import select
from speechbrain_taskarith.utils.progress import progress

_EXAMPLES = """\
  taskarith inspect results/us/save
  taskarith inspect us.safetensors de.safetensors --json
  taskarith inspect model.ckpt --tensors 'encoder.layers.0.*'
  taskarith inspect edits/            (the folder of a sequence of edits)
"""


def add_parser(verbs):
    """Add the verb's parser.

    Arguments
    ---------
    verbs : argparse subparsers
        Where to.
    """
    parser = shared.add_verb(
        verbs,
        "inspect",
        "Show form, tensors, fingerprint and provenance; for task vectors "
        "also norm, density and norms by layer.",
        _EXAMPLES,
        run,
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument(
        "--tensors",
        nargs="*",
        metavar="PATTERN",
        help="list the tensors (that match), with dtype and shape",
    )
    parser.add_argument(
        "--no-fingerprint",
        action="store_true",
        help="do not read the weights; quick for large files",
    )
    shared.add_recoverable(parser)


def run(options):
    """Look at every file.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        One entry a file.
    """
    lines, entries = [], []
    for path in progress(
        options.files, desc="inspecting", enable=not options.no_progress
    ):
        entry = _look(Path(path), options)
        entries.append(entry)
        lines += [*([""] if lines else []), *_shown(entry)]
    return Result(lines, {"verb": "inspect", "files": entries})


def _look(path, options):
    from speechbrain_taskarith.vectors import open_state
    from speechbrain_taskarith.vectors.editing.log import LOG_NAME

    if (path / LOG_NAME).is_file():
        from speechbrain_taskarith.commands.edit_folder import describe_log

        return {"path": str(path), "form": "edits", **describe_log(path)}
    state = open_state(path, recoverable=options.recoverable)
    entry = {"path": str(path), "form": _form(path, state), **numbers(state)}
    dtypes = {}
    for name in state:
        info = state.info(name)
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.numel
    entry["dtypes"] = dtypes
    entry["tied"] = _tied(state)
    if not options.no_fingerprint:
        state.verify()
        entry["fingerprint"] = state.fingerprint
    entry["metadata"] = _metadata(path, state)
    if entry["form"] == "task vector":
        entry.update(_vector(path, state, options))
    if options.tensors is not None:
        names = select(state, options.tensors or ["*"])
        entry["contents"] = {
            name: [state.info(name).dtype, list(state.info(name).shape)]
            for name in names
        }
    return entry


def _form(path, state):
    if "task_vector" in state.metadata:
        return "task vector"
    if path.is_dir():
        if checkpoint_of(path):
            return "SpeechBrain checkpoint"
        return "Hugging Face folder"
    return "safetensors" if path.suffix == ".safetensors" else "torch file"


def _tied(state):
    groups = {}
    for name, first in state.aliases.items():
        groups.setdefault(first, []).append(name)
    return sorted(sorted(group) for group in groups.values())


def _metadata(path, state):
    """What is written beside the weights of where they come from."""
    from speechbrain_taskarith.utils.files import read_json
    from speechbrain_taskarith.vectors.states.readers import (
        TORCH_SUFFIXES,
        read_checkpoint_meta,
    )

    if folder := checkpoint_of(path):
        return read_checkpoint_meta(folder)
    # A torch file's metadata and card lie beside it.
    beside = Path(f"{path}.json")
    if path.suffix in TORCH_SUFFIXES and beside.is_file():
        return {
            key: value
            for key, value in read_json(beside).items()
            if key != "fingerprint" and value not in (None, "", [])
        }
    hidden = ("task_vector", "fingerprint", "format")
    return {
        key: _parsed(value)
        for key, value in state.metadata.items()
        if key not in hidden
    }


def _parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _vector(path, state, options):
    """Facts of a stored vector; its numbers only where they may be read."""
    header = json.loads(state.metadata["task_vector"])
    layout = header["layout"]
    facts = {
        "encoding": sorted({entry["as"] for entry in layout.values()}),
        "base_fingerprint": header["base_fingerprint"],
        "provenance": header["metadata"],
        "stored_tensors": len(state),
        "tensors": len(layout),
        "parameters": sum(_product(e["shape"]) for e in layout.values()),
    }
    if options.no_fingerprint:
        return facts
    from speechbrain_taskarith.vectors import TaskVector, layer_norms

    tau = TaskVector.load(path)
    nonzero = sum(int((delta != 0).sum()) for delta in tau.values())
    facts["norm"] = tau.norm()
    facts["density"] = nonzero / max(facts["parameters"], 1)
    facts["layer_norms"] = layer_norms(tau)
    return facts


def _product(shape):
    total = 1
    for extent in shape:
        total *= extent
    return total


def _shown(entry):
    if entry["form"] == "edits":
        from speechbrain_taskarith.commands.edit_folder import shown_log

        return [f"{entry['path']}: a sequence of edits", *shown_log(entry)]
    lines = [f"{entry['path']}: {entry['form']}"]
    lines.append(
        f"  {counted(entry['tensors'], 'tensor')}, "
        f"{counted(entry['parameters'], 'parameter')}, {size(entry['bytes'])}"
    )
    if entry["form"] != "task vector":
        shares = ", ".join(f"{d}: {n:,}" for d, n in entry["dtypes"].items())
        lines.append(f"  dtypes       {shares}")
    for group in entry["tied"]:
        lines.append(f"  tied         {' = '.join(group)}")
    if "fingerprint" in entry:
        lines.append(f"  fingerprint  {entry['fingerprint']}")
    if "encoding" in entry:
        lines.append(f"  taken from   {entry['base_fingerprint']}")
        lines.append(f"  encoding     {', '.join(entry['encoding'])}")
    for key, value in entry.get("provenance", {}).items():
        lines.append(f"  {key}: {_short(value)}")
    for key, value in entry["metadata"].items():
        lines.append(f"  {key}: {_short(value)}")
    if "norm" in entry:
        lines.append(f"  norm         {entry['norm']:.6g}")
        lines.append(f"  density      {entry['density']:.4f}")
        rows = [(k, f"{v:.4g}") for k, v in entry["layer_norms"].items()]
        lines += [f"  {line}" for line in table(rows, ("layer", "norm"))]
    if "contents" in entry:
        rows = [(n, d, s) for n, (d, s) in entry["contents"].items()]
        lines += [
            f"  {line}" for line in table(rows, ("tensor", "dtype", "shape"))
        ]
    return lines


def _short(value, most=160):
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."
