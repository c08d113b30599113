"""`taskarith inspect` and `taskarith plot`: what files and vectors hold."""

import contextlib
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import (
    Result,
    checkpoint_of,
    counted,
    numbers,
    size,
    table,
)
from speechbrain_taskarith.utils.hub.download import local_path
from speechbrain_taskarith.utils.patterns import select
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors.engine.vector_header import (
    read_vector_header,
)

_EXAMPLES = """\
  taskarith inspect results/us/save
  taskarith inspect us.safetensors de.safetensors --json
  taskarith inspect model.ckpt --tensors 'encoder.layers.0.*'
  taskarith inspect edits/            (the folder of a sequence of edits)
"""
_PLOT_EXAMPLES = """\
  taskarith plot cosine us.safetensors de.safetensors -o cosine.png
  taskarith plot layers us.safetensors de.safetensors -o layers.png
  taskarith plot layers us.safetensors --relative-to base.ckpt -o layers.pdf
  taskarith plot cosine *.safetensors --include 'encoder.*' -o encoder.png
"""


def add_parser(verbs, summary):
    """Add the parser of `inspect`."""
    about = (
        "Show form, tensors, fingerprint and provenance; for task vectors also "
        "norm, density and norms by layer."
    )
    parents = [shared.reading("recoverable")]
    parser = shared.add_verb(
        verbs, "inspect", summary, _EXAMPLES, run, parents, about
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


def run(options):
    """Look at every file."""
    lines, entries = [], []
    shown = not options.no_progress
    for path in progress(options.files, desc="inspecting", show_progress=shown):
        entries.append(_look(Path(path), options))
        lines += ["", *_shown(entries[-1])]
    return Result(lines[1:], {"verb": "inspect", "files": entries})


def _look(path, options):
    from speechbrain_taskarith.utils.hub.cards import read_card
    from speechbrain_taskarith.vectors import open_state
    from speechbrain_taskarith.vectors.editing.log import has_log

    if has_log(path):
        from speechbrain_taskarith.commands.weights.edit import describe_log

        return {"path": str(path), "form": "edits", **describe_log(path)}
    state = open_state(path, recoverable=options.recoverable)
    name, path = path, local_path(path)
    entry = {"path": str(name), "form": _form(path, state), **numbers(state)}
    dtypes, tied = Counter(), defaultdict(list)
    for info in map(state.info, state):
        dtypes[info.dtype] += info.numel
    for name, first in sorted(state.aliases.items()):
        tied[first].append(name)
    entry |= {"dtypes": dtypes, "tied": sorted(tied.values())}
    entry |= {"extra": sorted(state.extra), "unreadable": state.unreadable}
    if not options.no_fingerprint:
        state.verify()
        entry["fingerprint"] = state.fingerprint
        # That of a checkpoint may be of more networks than are looked at.
        one = entry["form"] != "SpeechBrain checkpoint"
        told = one and read_card(path).get("fingerprint")
        if told and told != state.fingerprint:
            entry["card_of_other_weights"] = told
    entry["metadata"] = _metadata(path, state)
    if entry["form"] == "task vector":
        entry.update(_vector(path, state, options))
    if options.tensors is not None:
        names = select(state, options.tensors or ["*"])
        infos = {name: state.info(name) for name in names}
        entry["contents"] = {
            name: [info.dtype, list(info.shape)] for name, info in infos.items()
        }
    return entry


def _form(path, state):
    if "task_vector" in state.metadata:
        return "task vector"
    if checkpoint_of(path):
        return "SpeechBrain checkpoint"
    if path.is_dir():
        return "Hugging Face folder"
    return "safetensors" if path.suffix == ".safetensors" else "torch file"


def _metadata(path, state):
    """Return what is written beside the weights about their origin."""
    from speechbrain_taskarith.utils.files import read_json
    from speechbrain_taskarith.utils.hub.cards import read_card
    from speechbrain_taskarith.vectors.states.readers import TORCH_SUFFIXES
    from speechbrain_taskarith.vectors.states.speechbrain_folder import (
        read_checkpoint_meta,
    )

    if folder := checkpoint_of(path):
        return read_checkpoint_meta(folder)
    if path.suffix in TORCH_SUFFIXES:
        # Its metadata stands in its card; earlier versions wrote JSON.
        beside, found = Path(f"{path}.json"), read_card(path)
        if not found and beside.is_file():
            found = read_json(beside)
        return {
            key: value
            for key, value in found.items()
            if key != "fingerprint" and value not in (None, "", [])
        }
    found = dict(state.metadata)
    for key, text in state.metadata.items():
        if key.startswith("task_vector") or key in ("fingerprint", "format"):
            del found[key]
        else:
            with contextlib.suppress(ValueError):
                found[key] = json.loads(text)
    return found


def _vector(path, state, options):
    """Return a stored vector's facts; without its numbers if not wanted."""
    from speechbrain_taskarith.vectors import TaskVector, layer_norms
    from speechbrain_taskarith.vectors.products import ties_of

    layout, base_fingerprint, provenance = read_vector_header(state)
    tau = None if options.no_fingerprint else TaskVector.load(path)
    # Of tied names one counts; a header tells them of dense tensors alone.
    ties = state.aliases if tau is None else ties_of(tau)
    own = {n: e for n, e in layout.items() if ties.get(n, n) == n}
    facts = {
        "encoding": sorted({entry["as"] for entry in layout.values()}),
        "base_fingerprint": base_fingerprint,
        "provenance": provenance,
        "stored_tensors": len(state),
        "tensors": len(layout),
        "parameters": sum(math.prod(e["shape"]) for e in own.values()),
    }
    if tau is None:
        return facts
    nonzero = sum(int((tau[name] != 0).sum()) for name in own)
    facts["norm"] = tau.norm()
    facts["density"] = nonzero / max(facts["parameters"], 1)
    facts["layer_norms"] = layer_norms(tau)
    return facts


def _shown(entry):
    if entry["form"] == "edits":
        from speechbrain_taskarith.commands.weights.edit import shown_log

        return [f"{entry['path']}: a sequence of edits", *shown_log(entry)]
    lines = [
        f"{entry['path']}: {entry['form']}",
        f"  {counted(entry['tensors'], 'tensor')}, "
        f"{counted(entry['parameters'], 'parameter')}, {size(entry['bytes'])}",
    ]
    if entry["form"] != "task vector":
        shares = ", ".join(f"{d}: {n:,}" for d, n in entry["dtypes"].items())
        lines.append(f"  dtypes       {shares}")
    if entry["extra"]:
        lines.append(f"  no tensors   {', '.join(entry['extra'])}")
    for name, why in entry["unreadable"].items():
        lines.append(f"  not read     {name}: {why}")
    for group in entry["tied"]:
        lines.append(f"  tied         {' = '.join(group)}")
    if "fingerprint" in entry:
        lines.append(f"  fingerprint  {entry['fingerprint']}")
    if told := entry.get("card_of_other_weights"):
        lines.append(
            f"  card         is of other weights ({told[:12]}), written "
            "before these; do not trust it"
        )
    if "encoding" in entry:
        lines.append(f"  taken from   {entry['base_fingerprint']}")
        lines.append(f"  encoding     {', '.join(entry['encoding'])}")
    for facts in (entry.get("provenance", {}), entry["metadata"]):
        for key, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value)
            text = text if len(text) <= 160 else text[:157] + "..."
            lines.append(f"  {key}: {text}")
    if "norm" in entry:
        lines.append(f"  norm         {entry['norm']:.6g}")
        lines.append(f"  density      {entry['density']:.4f}")
        rows = [(k, f"{v:.4g}") for k, v in entry["layer_norms"].items()]
        lines += [f"  {line}" for line in table(rows, ("layer", "norm"))]
    if "contents" in entry:
        rows = [(name, *facts) for name, facts in entry["contents"].items()]
        header = ("tensor", "dtype", "shape")
        lines += [f"  {line}" for line in table(rows, header)]
    return lines


def add_plot(verbs, summary):
    """Add the parser of `plot`."""
    about = (
        "Draw how alike vectors are (cosine), or where they are large "
        "(layers). PNG, PDF or SVG."
    )
    parents = [shared.reading("include", "exclude"), shared.writing()]
    parser = shared.add_verb(
        verbs, "plot", summary, _PLOT_EXAMPLES, draw, parents, about
    )
    parser.add_argument("what", choices=("cosine", "layers"))
    parser.add_argument("vectors", nargs="+", metavar="TAU")
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="labels (the files' names)"
    )
    parser.add_argument(
        "--relative-to",
        metavar="BASE",
        help="layers: divide by the norm of this model's layers",
    )


def draw(options):
    """Draw, and return the numbers that were drawn."""
    output = shared.check_output(
        options.output,
        options.vectors,
        options.overwrite,
        suffixes=(".png", ".pdf", ".svg"),
        what="a plot",
    )
    names = _names(options)
    if options.relative_to and options.what == "cosine":
        raise ValueError("--relative-to is for `plot layers`; leave it out")
    from speechbrain_taskarith.vectors import TaskVector

    files = progress(
        options.vectors, desc="reading", show_progress=not options.no_progress
    )
    vectors = dict(zip(names, map(TaskVector.load, files)))
    draw = _cosine if options.what == "cosine" else _layers
    lines, values = draw(vectors, output, options)
    verb = "would write" if options.dry_run else "wrote"
    data = {
        "verb": "plot",
        "what": options.what,
        "output": str(output),
        "dry_run": options.dry_run,
        "names": names,
        "values": values,
    }
    return Result([f"{verb} {output}", *lines], data)


def _names(options):
    names = options.names or [
        Path(path).stem or str(path) for path in options.vectors
    ]
    if len(names) != len(options.vectors):
        raise ValueError(
            f"--names: {len(names)} names for {len(options.vectors)} vectors"
        )
    if len(set(names)) != len(names):
        raise ValueError(
            f"names must differ to be told apart, got {', '.join(names)}; "
            "give --names"
        )
    return names


def _cosine(vectors, output, options):
    from speechbrain_taskarith.vectors import cosine_matrix, plot_cosine_matrix

    chosen = shared.patterns(options)
    matrix = cosine_matrix(list(vectors.values()), **chosen)
    if not options.dry_run:
        plot_cosine_matrix(matrix, list(vectors), output)
    rows = [
        (name, *(f"{value:.3f}" for value in row))
        for name, row in zip(vectors, matrix.tolist())
    ]
    return table(rows, ("cosine", *vectors)), matrix.tolist()


def _layers(vectors, output, options):
    from speechbrain_taskarith.vectors import (
        layer_norms,
        open_state,
        plot_layer_norms,
    )

    base = open_state(options.relative_to) if options.relative_to else None
    norms = {
        name: layer_norms(tau, base=base, **shared.patterns(options))
        for name, tau in vectors.items()
    }
    if not options.dry_run:
        plot_layer_norms(norms, output, relative=base is not None)
    layers = list(dict.fromkeys(k for found in norms.values() for k in found))
    rows = [
        (layer, *(f"{found.get(layer, 0.0):.4g}" for found in norms.values()))
        for layer in layers
    ]
    return table(rows, ("layer", *vectors)), norms
