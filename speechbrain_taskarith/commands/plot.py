"""`taskarith plot`: cosine matrix and layer norms of stored vectors."""

from pathlib import Path

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.console import Result, table
from speechbrain_taskarith.utils.progress import progress

_EXAMPLES = """\
  taskarith plot cosine us.safetensors de.safetensors -o cosine.png
  taskarith plot layers us.safetensors de.safetensors -o layers.png
  taskarith plot layers us.safetensors --relative-to base.ckpt -o layers.pdf
  taskarith plot cosine *.safetensors --include 'encoder.*' -o encoder.png
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
        "plot",
        "Draw how alike vectors are (cosine), or where they are large "
        "(layers). PNG, PDF or SVG.",
        _EXAMPLES,
        run,
    )
    parser.add_argument("what", choices=("cosine", "layers"))
    parser.add_argument("vectors", nargs="+", metavar="TAU")
    shared.add_writing(parser)
    shared.add_patterns(parser)
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="labels (the files' names)"
    )
    parser.add_argument(
        "--relative-to",
        metavar="BASE",
        help="layers: divide by the norm of this model's layers",
    )


def run(options):
    """Draw.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        The numbers that were drawn.
    """
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
        options.vectors, desc="reading", enable=not options.no_progress
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
    names = options.names or [_name(path) for path in options.vectors]
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


def _name(path):
    return Path(path).stem or str(path)


def _cosine(vectors, output, options):
    from speechbrain_taskarith.vectors import cosine_matrix, plot_cosine_matrix

    matrix = cosine_matrix(
        list(vectors.values()),
        include=options.include,
        exclude=options.exclude,
    )
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

    base = None
    if options.relative_to:
        base = open_state(options.relative_to)
    norms = {
        name: layer_norms(
            tau, base=base, include=options.include, exclude=options.exclude
        )
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
